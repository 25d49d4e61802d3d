"""Tokens a second and peak memory of the update with the exact KL to a reference, against eager torch.

    python -m benchmarks.update [--rounds 3] [--case 0]       # runs what is missing; then the table
    python -m benchmarks.update --table                       # only docs/results/update.md from the lines

Both sides start from one random Qwen3 checkpoint (benchmarks/checkpoint.py) as student and another seed's as reference,
CPU, float32, all cores. Theirs is what one would write with transformers: two forwards, log_softmax, gather, kl_div
against the reference over the vocabulary, backward, clipping, AdamW. Ours is `step.update` as the run jits it, with its
metrics. Times: one process, A B A B, after a warm-up. The two losses of the warm-up are compared. Memory: each side in
a process of its own, the peak of its resident set over two updates (VmHWM, reset after a warm-up update) less the
resident set before the model was loaded; so parameters, reference, optimizer state and all that libraries hold on to
count, on either side.
"""

import argparse
import ctypes
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import checkpoint, sides

CASES = ({"V": 32_768, "rows": 8, "T": 256}, {"V": 151_936, "rows": 4, "T": 256})
BETA, RATE = 0.1, 1e-4
REMAT, BLOCK = "dots", 512  # keeping the projections alone is the fastest here, as well as the smallest but one


def tokens(case: dict) -> np.ndarray:
    """[rows, 1 + T]: one token of prompt, then the response."""
    return np.random.default_rng(0).integers(0, case["V"], (case["rows"], 1 + case["T"])).astype(np.int32)


def weights(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """weight_BT and mask_BT as OmniOPD makes them: a quarter of the tokens in audited chunks, the rest anchored."""
    audited = np.arange(case["T"])[None].repeat(case["rows"], 0) % 64 < 16
    return (0.5 * audited / audited.size).astype(np.float32), (~audited / audited.size).astype(np.float32)


def torch_side(case: dict, folders):
    """A function that makes one update and returns its loss."""
    import torch
    import transformers

    student, ref = (transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders)
    ref.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ids = torch.tensor(tokens(case), dtype=torch.long)
    weight, mask = map(torch.tensor, weights(case))

    def update():
        logp = torch.log_softmax(student(ids[:, :-1]).logits, dim=-1)
        with torch.no_grad():
            ref_logp = torch.log_softmax(ref(ids[:, :-1]).logits, dim=-1)
        nll = -logp.gather(-1, ids[:, 1:, None])[..., 0]
        kl = torch.nn.functional.kl_div(logp, ref_logp, reduction="none", log_target=True).sum(-1)
        loss = (weight * nll).sum() + BETA * (mask * kl).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return update


def our_side(case: dict, folders):
    """The same with `step.update`; also its compiled program, for the analysis of its memory."""
    import jax

    from omniopd_jax import config, hf, model, objective, step, vocab

    (params, model_cfg), (ref, _) = (hf.load(f) for f in folders)
    compute = model.Compute(remat=REMAT)
    cfg = config.default()
    cfg.update_from_flattened_dict(
        {
            "max_completion_length": case["T"],
            "prompts_per_step": case["rows"],
            "vocab_block": BLOCK,
            "num_generations": 1,
            "anchor.kl_coef": BETA,
            "optimizer.learning_rate": RATE,
            "objective.name": "omniopd",
            "audit.chunk_tokens": 16,
            "audit.num_chunks": case["T"] // 64,
            "audit.num_continuations": 4,
            "prior.alpha": 0.0,
        }
    )
    cfg = step_config(cfg)
    B, M = case["rows"], case["T"] // 64
    peaks = np.arange(M, dtype=np.int32)[None].repeat(B, 0) * 64
    batch = objective.Batch(
        tokens(case),
        np.ones(B, np.int32),
        np.full(B, case["T"], np.int32),
        peaks,
        np.full((B, M), 2, np.float32),
        np.full((B, M), 4, np.int32),
    )
    stats = vocab.TokenStats(*np.full((2, B, case["T"]), -1, np.float32))
    batch, stats = jax.device_put((batch, stats))
    holder = [step.new_state(params, cfg, jax.random.key(0))]

    def one(state, ref, batch, stats):
        return step.update(state, ref, batch, stats, model_cfg=model_cfg, cfg=cfg, compute=compute)

    program = jax.jit(one, donate_argnums=0).lower(holder[0], ref, batch, stats).compile()

    def update():
        holder[0], metrics, _ = program(holder[0], ref, batch, stats)
        return float(metrics["loss"])

    return update, program


def step_config(cfg):
    """Hashable, as `step` wants it."""
    from ml_collections import FrozenConfigDict

    return FrozenConfigDict(cfg)


SIDES = {"torch": torch_side, "ours": lambda *args: our_side(*args)[0]}


def memory(case: dict, name: str, folders) -> int:
    """Bytes that the updates of one side take at their peak; called in a process of its own."""
    if name == "torch":
        import torch
        import transformers

        transformers.Qwen3ForCausalLM  # noqa: B018  loaded lazily: before the baseline
        torch.nn.Linear(8, 8)(torch.ones(8, 8)).sum().backward()
    else:
        import jax

        from omniopd_jax import config, hf, step  # noqa: F401

        jax.block_until_ready(jax.jit(lambda x: x @ x)(np.ones((8, 8), np.float32)))
    before = status("VmRSS")
    update = SIDES[name](case, folders)
    update()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling and loading freed is not the update's
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    update()
    update()
    return status("VmHWM") - before


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(s for s in pathlib.Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def measure(case: dict, rounds: int) -> dict:
    """Times both sides, then their memory; returns the result line."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"{folder}/{name}" for name in ("student", "reference")]
        for seed, f in enumerate(folders):
            checkpoint.make(f, case["V"], seed)
        theirs, (ours, program) = torch_side(case, folders), our_side(case, folders)
        losses = theirs(), ours()
        if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0]):
            raise SystemExit(f"the two sides compute different losses: {losses}")
        times = sides.alternate({"torch": theirs, "ours": ours}, rounds)
        peak = {name: child(case, name, folders) for name in SIDES}
    analysis = program.memory_analysis()
    xla = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    line = case | {"times": times, "peak": peak, "xla": xla, "xla_temp": analysis.temp_size_in_bytes, "losses": losses}
    return line | {"rate": round(sides.matrix_rate() / 1e9, 1), "flops": flops(case)}


def child(case: dict, name: str, folders) -> int:
    """`memory` in a fresh process."""
    args = [sys.executable, "-m", "benchmarks.update", "--memory", json.dumps([case, name, folders])]
    return int(subprocess.run(args, check=True, stdout=subprocess.PIPE).stdout.split()[-1])


def flops(case: dict) -> float:
    """Matrix operations: forward and backward of the student, forward of the reference, attention as computed whole."""
    s = checkpoint.SIZES
    D, width = s["hidden_size"], s["num_attention_heads"] * s["head_dim"]
    weights = (
        D * s["head_dim"] * 2 * (s["num_attention_heads"] + s["num_key_value_heads"]) + 3 * D * s["intermediate_size"]
    )
    layer = 2 * weights + 4 * width * case["T"]
    return 4 * case["rows"] * case["T"] * (s["num_hidden_layers"] * layer + 2 * D * case["V"])


def write_table() -> None:
    """docs/results/update.md: medians over the rounds."""
    rows = []
    for line in sides.read("update"):
        tokens, t, peak = line["rows"] * line["T"], line["times"], line["peak"]
        wall = {name: sides.median(t[name]["wall"]) for name in t}
        cpu = {name: sides.median(t[name]["cpu"]) for name in t}
        for name in t:
            ratios = (f"{wall['torch'] / wall['ours']:.2f}", f"{peak['ours'] / peak['torch']:.2f}")
            rows.append(
                (
                    f"{line['V']:,}",
                    f"{line['rows']} x {line['T']}",
                    name,
                    len(t[name]["wall"]),
                    f"{wall[name]:.2f}",
                    f"{cpu[name]:.2f}",
                    f"{tokens / wall[name]:,.0f}",
                    ratios[0] if name == "ours" else "",
                    f"{peak[name] / 2**20:,.0f}",
                    ratios[1] if name == "ours" else "",
                    f"{line['flops'] / wall[name] / line['rate'] / 1e9:.0%}",
                )
            )
    head = [
        "V",
        "rows x tokens",
        "side",
        "rounds",
        "wall s",
        "CPU s",
        "tokens/s",
        "times torch",
        "peak MiB",
        "of torch's peak",
    ]
    sides.write_page("update", sides.table([*head, "of matrix rate"], rows))


def main():
    """Runs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", type=int, default=-1, help="only this one")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--memory", default="", help="used by the benchmark itself: one side's peak, in this process")
    args = parser.parse_args()
    if args.memory:
        print(memory(*json.loads(args.memory)))
        return
    done = {(line["V"], line["rows"], line["T"]) for line in sides.read("update")}
    for i, case in enumerate(CASES):
        if not args.table and args.case in (-1, i) and (case["V"], case["rows"], case["T"]) not in done:
            sides.append("update", measure(case, args.rounds))
    write_table()


if __name__ == "__main__":
    main()
