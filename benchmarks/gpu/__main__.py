"""Update, scoring and decoding of a random-weight Qwen3-1.7B on one GPU, against what the card could do; cuDNN against
xla.

    pip install "jax[cuda13]==0.10.2"                         # beside requirements-lean.txt, on a machine with a GPU
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 python -m benchmarks.gpu [--only update,decode] [--trace FOLDER]
    python -m benchmarks.gpu --table                          # only docs/results/gpu.md from the lines

The passes are the run's own (`step.make_steps`, `rollout.sample`), bfloat16 over float32 masters, rows of 512 + 3,584
tokens. MFU: operations counted from shapes (flops.py: forward and backward of the student, forward of the reference,
the causal half of attention, no rematerialised work) over the maker's dense bfloat16 peak. Decoding: bytes that must be
read (parameters once a time step, every row's own keys and values) over the maker's bandwidth. Both ceilings are
measured as
well: a product of 8,192-square matrices and a copy of 4 GiB, read and written. One line of docs/results/gpu.jsonl is
one case on one card.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides
from configs import math
from omniopd_jax import model, objective, rollout, step, vocab
from omniopd_jax.hf.published import PUBLISHED
from omniopd_jax.model import attention
from omniopd_jax.parallel import sharding
from omniopd_jax.run import flops, setup

MODEL = "Qwen/Qwen3-1.7B"
PROMPT, RESPONSE = 512, 3_584
UPDATES = (
    {"attention": "cudnn", "remat": "dots", "rows": 8, "micro_batches": 2, "vocab_block": 2_048},
    {"attention": "cudnn", "remat": "context", "rows": 8, "micro_batches": 2, "vocab_block": 2_048},
    {"attention": "cudnn", "remat": "full", "rows": 8, "micro_batches": 2, "vocab_block": 2_048},
    {"attention": "xla", "remat": "full", "rows": 8, "micro_batches": 8, "vocab_block": 2_048},
)
DECODES = ({"rows": 64, "new": 512}, {"rows": 256, "new": 512})
SAMPLES = 4  # completions of a prompt, which share its prefill
ROUNDS = 5


MODEL_CFG = PUBLISHED[MODEL]


def peaks(_: dict) -> dict:
    """What this card does at best: bfloat16 operations a second, bytes a second."""
    n = 8_192
    a, b = (jax.random.normal(k, (n, n), jnp.bfloat16) for k in jax.random.split(jax.random.key(0)))
    rate = (
        2
        * n**3
        * 10
        / best(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, x: (x @ b * (1 / 64)).astype(x.dtype), a), a, b)
    )
    x = jnp.zeros(2**30, jnp.float32)
    return {"rate": rate, "bandwidth": 2 * x.nbytes / best(lambda x: x + 1, x)}


def best(f, *args) -> float:
    """Seconds of the best of a few runs of a jitted function."""
    run = jax.jit(f).lower(*args).compile()
    return min(seconds(lambda: jax.block_until_ready(run(*args))))


def seconds(run, rounds: int = ROUNDS) -> list[float]:
    """Of each round, after one that is not counted."""
    run()
    return [sides.timed(run)[0] for _ in range(rounds)]


def attend(case: dict) -> dict:
    """`attend` alone, forward and with gradient: seconds, temporary bytes, and its distance from float32 xla."""
    B, L, Q, K, H = case["rows"], PROMPT + RESPONSE, 16, 8, 128
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (B, L, n, H), jnp.bfloat16) for key, n in zip(keys, (Q, K, K, Q)))

    def forward(backend, q, k, v):
        return attention.attend(q, k, v, backend=backend)

    def gradient(backend, q, k, v, g):
        return jax.vjp(functools.partial(forward, backend), q, k, v)[1](g)

    def flat(trees):
        return jnp.concatenate([a.astype(jnp.float32).ravel() for a in jax.tree.leaves(trees)])

    wide = [a[:1].astype(jnp.float32) for a in (q, k, v, g)]
    exact = [forward("xla", *wide[:3]), gradient("xla", *wide)]
    out = {}
    for backend in ("cudnn", "xla"):
        one = [a[:1] for a in (q, k, v, g)]
        ours = [forward(backend, *one[:3]), gradient(backend, *one)]
        error = [float(jnp.linalg.norm(flat(a) - flat(b)) / jnp.linalg.norm(flat(b))) for a, b in zip(ours, exact)]
        both = functools.partial(gradient, backend)
        temp = jax.jit(both).lower(q, k, v, g).compile().memory_analysis().temp_size_in_bytes
        out[backend] = {
            "forward_s": best(functools.partial(forward, backend), q, k, v),
            "gradient_s": best(both, q, k, v, g),
            "temp": temp,
            "forward_error": error[0],
            "gradient_error": error[1],
        }
    return out | {"forward_flops": 4 * B * Q * H * L * (L + 1) / 2}


def recipe(case: dict):
    """The config of an update or scoring case: the published method, its rows and its knobs."""
    c = math.get_config()
    c.update_from_flattened_dict({
        "prompts_per_step": case["rows"], "num_generations": 1, "micro_batches": case["micro_batches"],
        "max_prompt_length": PROMPT, "max_completion_length": RESPONSE, "vocab_block": case["vocab_block"],
        "model.remat": case["remat"], "anchor.ref_dtype": "bfloat16",
    })  # fmt: skip
    return setup.frozen(c)


def batch_of(cfg):
    """A whole batch: every row of full length, all its audits answered."""
    B, M, rng = cfg.prompts_per_step, cfg.audit.num_chunks, np.random.default_rng(0)
    peaks = np.arange(M, dtype=np.int32)[None].repeat(B, 0) * (RESPONSE // M)
    batch = objective.Batch(
        rng.integers(0, 150_000, (B, PROMPT + RESPONSE)).astype(np.int32), np.full(B, PROMPT, np.int32),
        np.full(B, RESPONSE, np.int32), peaks, np.full((B, M), 5, np.float32), np.full((B, M), 10, np.int32),
    )  # fmt: skip
    stats = vocab.TokenStats(*np.full((2, B, RESPONSE), -1, np.float32))
    return jax.device_put((batch, stats))


def update(case: dict) -> dict:
    """The jitted update and the scoring pass of a step, as a run has them."""
    cfg, model_cfg = recipe(case), MODEL_CFG
    compute = model.Compute("bfloat16", case["remat"], case["attention"], sharding.make_mesh(cfg.mesh))
    steps = step.make_steps(model_cfg, cfg, compute=compute)
    start = jax.jit(lambda k: model.init(k, model_cfg), out_shardings=steps.state_shardings.params)
    cast = jax.jit(
        lambda p: jax.tree.map(lambda a: a.astype(cfg.anchor.ref_dtype), p), out_shardings=steps.reference_shardings
    )
    ref = cast(start(jax.random.key(1)))
    state = step.create_state(start(jax.random.key(0)), cfg, steps, jax.random.key(2))
    batch, stats = batch_of(cfg)
    began = time.perf_counter()
    train_step = steps.train_step.lower(state, ref, batch, stats, None).compile()
    compile_s = time.perf_counter() - began
    metrics = {}

    def one():
        nonlocal state, metrics
        state, metrics, _ = jax.block_until_ready(train_step(state, ref, batch, stats, None))

    update_s = seconds(one)
    traced(case, one)
    score_step = steps.score_step.lower(state.params, batch.token_BL, batch.prompt_length_B, RESPONSE).compile()
    score_s = seconds(lambda: jax.block_until_ready(score_step(state.params, batch.token_BL, batch.prompt_length_B)))
    lengths, heads = [PROMPT + RESPONSE] * case["rows"], [RESPONSE] * case["rows"]
    analysis = train_step.memory_analysis()
    return {
        "update_s": update_s, "score_s": score_s, "compile_s": compile_s, "loss": float(metrics["loss"]),
        "update_flops": flops.update(model_cfg, lengths, heads, anchored=True),
        "score_flops": flops.forward(model_cfg, lengths, heads), "arguments": analysis.argument_size_in_bytes,
        "temp": analysis.temp_size_in_bytes,
    }  # fmt: skip


def decode(case: dict) -> dict:
    """`rollout.sample` of all rows to the full length, no end token; the prefill with one token also by itself."""
    model_cfg, compute = MODEL_CFG, model.Compute("bfloat16", attention="cudnn")
    prompts = case["rows"] // SAMPLES
    params = rollout.prepare(jax.jit(lambda k: model.init(k, model_cfg))(jax.random.key(0)), model_cfg, compute=compute)
    token = np.random.default_rng(0).integers(0, 150_000, (prompts, PROMPT)).astype(np.int32)
    token, length = jax.device_put((token, np.full(prompts, PROMPT, np.int32)))
    keys = rollout.row_keys(jax.random.key(3), np.arange(case["rows"]))

    def sample(new=case["new"]):
        out = rollout.sample(
            params, model_cfg, token, length, keys, max_new_tokens=new, num_samples=SAMPLES, compute=compute
        )
        assert int(out.length_B.sum()) == case["rows"] * new
        return jax.block_until_ready(out)

    def prefill():
        jax.block_until_ready(
            rollout.sample(
                params, model_cfg, token, length, keys, max_new_tokens=1, num_samples=SAMPLES, compute=compute
            )
        )

    began = time.perf_counter()
    sample()
    first = time.perf_counter() - began
    traced(case, lambda: sample(32))
    n, new = case["rows"], case["new"]
    moved = flops.decode_bytes(model_cfg, [PROMPT] * n, [new] * n, rows_together=n, itemsize=2)
    return {
        "sample_s": seconds(sample, 3),
        "prefill_s": seconds(prefill, 3),
        "first_s": first,
        "moved": moved,
    }


def traced(case: dict, run) -> None:
    """A profiler's trace of a run, compiled before, into a folder, where the case names one."""
    if folder := case.get("trace"):
        run()
        with jax.profiler.trace(folder):
            run()


PARTS = {
    "peaks": (peaks, ({},)),
    "attention": (attend, ({"rows": 4},)),
    "update": (update, UPDATES),
    "decode": (decode, DECODES),
}


def write_table() -> None:
    """docs/results/gpu.md from the lines: each share against the maker's figure and against what the card was measured
    at."""
    lines = sides.read("gpu")
    cards = {line["card"]: line for line in lines if line["part"] == "peaks"}
    updates = [line for line in lines if line["part"] == "update"]
    text = [
        sides.table(PEAKS, map(peaks_row, cards.values())),
        "The update:\n\n"
        + sides.table([*HOW, "MFU", "of the measured rate", "GiB"], [update_row(x, cards) for x in updates]),
        "Scoring:\n\n"
        + sides.table([*HOW[:2], *HOW[3:], "MFU"], {row[:4]: row for row in map(score_row, updates)}.values()),
        "Decoding:\n\n" + sides.table(DECODED, [decode_row(x, cards) for x in lines if x["part"] == "decode"]),
        "Attention alone, 16 heads over 8 of 128:\n\n"
        + sides.table(ATTENDED, [row for x in lines if x["part"] == "attention" for row in attention_rows(x)]),
    ]
    sides.write_page("gpu", "\n\n".join(text))


PEAKS = ["card", "bfloat16 TFLOP/s, of the maker's", "TB/s, of the maker's", "jax"]
HOW = ["card", "attention", "remat", "micro-batches x rows", "vocab_block", "s", "tokens/s"]
DECODED = [
    "card",
    "rows",
    "tokens",
    "s",
    "prefill s",
    "decode tokens/s",
    "ms a token",
    "of the maker's TB/s",
    "of measured",
]
ATTENDED = [
    "card",
    "rows x tokens",
    "attention",
    "forward ms",
    "TFLOP/s, causal half",
    "with gradient ms",
    "temporaries, MiB",
    "forward, relative error",
    "gradient's",
]


def peaks_row(line: dict) -> tuple:
    """A card's measured ceilings."""
    chip = flops.chip_of(line["card"])
    rate = f"{line['rate'] / 1e12:,.0f} of {chip.flops / 1e12:,.0f}"
    return line["card"], rate, f"{line['bandwidth'] / 1e12:.2f} of {chip.bandwidth / 1e12:.2f}", line["jax"]


def how(line: dict) -> tuple:
    """The knobs of an update."""
    each = line["rows"] // line["micro_batches"]
    return line["card"], line["attention"], line["remat"], f"{line['micro_batches']} x {each}", line["vocab_block"]


def update_row(line: dict, cards: dict) -> tuple:
    """The median over the rounds."""
    s, tokens = sides.median(line["update_s"]), line["rows"] * (PROMPT + RESPONSE)
    rate = line["update_flops"] / s
    return (
        *how(line),
        f"{s:.3f}",
        f"{tokens / s:,.0f}",
        f"{rate / flops.chip_of(line['card']).flops:.1%}",
        f"{rate / cards[line['card']]['rate']:.1%}",
        f"{(line['arguments'] + line['temp']) / 2**30:.1f}",
    )


def score_row(line: dict) -> tuple:
    """The scoring pass of the same case."""
    s, tokens, (card, kernel, _, *rest) = sides.median(line["score_s"]), line["rows"] * (PROMPT + RESPONSE), how(line)
    mfu = line["score_flops"] / s / flops.chip_of(card).flops
    return card, kernel, *rest, f"{s:.3f}", f"{tokens / s:,.0f}", f"{mfu:.1%}"


def decode_row(line: dict, cards: dict) -> tuple:
    """The best of the runs, less the prefill."""
    whole, before = min(line["sample_s"]), min(line["prefill_s"])
    s, new, card = whole - before, line["new"], line["card"]
    rate = line["moved"] / s
    return (
        card,
        line["rows"],
        f"{PROMPT} + {new}",
        f"{whole:.2f}",
        f"{before:.2f}",
        f"{line['rows'] * new / s:,.0f}",
        f"{1e3 * s / new:.2f}",
        f"{rate / flops.chip_of(card).bandwidth:.1%}",
        f"{rate / cards[card]['bandwidth']:.1%}",
    )


def attention_rows(line: dict) -> list[tuple]:
    """One a kernel."""
    rows = []
    for name in ("cudnn", "xla"):
        one = line[name]
        rate = line["forward_flops"] / one["forward_s"] / 1e12
        rows.append(
            (
                line["card"],
                f"{line['rows']} x {PROMPT + RESPONSE}",
                name,
                f"{1e3 * one['forward_s']:.2f}",
                f"{rate:,.0f}",
                f"{1e3 * one['gradient_s']:.2f}",
                f"{one['temp'] / 2**20:,.0f}",
                f"{one['forward_error']:.1e}",
                f"{one['gradient_error']:.1e}",
            )
        )
    return rows


def main():
    """Runs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--case", type=int, default=-1, help="only this case of each part")
    parser.add_argument("--trace", default="", help="a folder for the profiler's traces")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if unknown := [name for name in args.only.split(",") if name not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    if not args.table:
        card = jax.devices()[0].device_kind
        for name in args.only.split(","):
            run, cases = PARTS[name]
            for i, case in enumerate(cases):
                if args.case in (-1, i):
                    trace = f"{args.trace}/{name}{i}" if args.trace else ""
                    line = run(case | ({"trace": trace} if trace else {}))
                    sides.append("gpu", {"part": name, "card": card, "jax": jax.__version__} | case | line)
                    jax.clear_caches()
    write_table()


if __name__ == "__main__":
    main()
