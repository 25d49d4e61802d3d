"""What packing saves: scoring and the update of responses as long as answers to math problems are, packed and unpacked.

    python -m benchmarks.packing [--rounds 3] [--cap 512]     # adds a line to docs/results/packing.jsonl; then the
    table python -m benchmarks.packing --table                      # only docs/results/packing.md from the lines

Lengths are lognormal (sigma 0.8) with a median of an eleventh of the cap, which is what a median of 650 tokens at a cap
of 7,168 would be; one response is cut at the cap, as nearly always happens. Same model, same responses, one process,
the two layouts in turn, after one round that compiles. The difference of the losses is printed beside.
"""

import argparse
import functools

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from benchmarks import sides
from omniopd_jax import config, model, objective, rollout, step
from omniopd_jax.parallel import packing

MODEL = model.ModelConfig("qwen3", 8192, 192, 512, 4, 6, 2, 32, qk_norm=True, tied=True)
PROMPTS = (8, 24)  # tokens, at a cap of 512


def responses(count: int, cap: int, seed: int = 0):
    """(rows of tokens, prompt_length_B, length_B)."""
    rng = np.random.default_rng(seed)
    length_B = np.minimum(cap, rng.lognormal(np.log(cap / 11), 0.8, count).astype(np.int32) + 1)
    length_B[0] = cap
    low, high = (max(1, p * cap // 512) for p in PROMPTS)
    prompt_B = rng.integers(low, high + 1, count).astype(np.int32)
    return [rng.integers(1, MODEL.vocab_size, n).tolist() for n in prompt_B + length_B], prompt_B, length_B


def batches(rows, prompt_B, length_B, most: int) -> tuple[int, dict[str, objective.Batch]]:
    """(T, {layout: batch})."""
    T, M = rollout.bucket(int(length_B.max())), 2
    peak_BM = np.where(length_B[:, None] >= np.array([[8, 24]]), np.array([[0, 16]]), -1).astype(np.int32)
    n_BM = np.where(peak_BM >= 0, 4, 0).astype(np.int32)
    k_sem_BM = (np.random.default_rng(1).random((len(rows), M)) * n_BM).astype(np.float32)
    token_BL, _ = rollout.pad_rows(rows, rollout.bucket(int(prompt_B.max())) + T)
    plain = objective.Batch(token_BL, prompt_B, length_B, peak_BM, k_sem_BM, n_BM)
    packed = packing.make(rows, prompt_B, most=most, shards=[0], micro_batches=1)
    return T, {"unpacked": plain, "packed": plain.replace(token_BL=None, packed=packed)}


def positions(by_layout: dict[str, objective.Batch], T: int) -> dict[str, int]:
    """Positions that each layout's pass over the vocabulary has."""
    return {k: b.length_B.size * T if b.packed is None else b.packed.owner_ZX.size for k, b in by_layout.items()}


def passes(cfg, T: int):
    """(score, update), jitted; the update returns its loss first."""

    def score(params, batch):
        tokens = batch.token_BL if batch.packed is None else batch.packed
        how = {"model_cfg": MODEL, "block": cfg.vocab_block, "micro_batches": 1}
        return step.score(params, tokens, batch.prompt_length_B, T, **how)

    def update(params, ref, batch, logp_BT):
        weight, mask = objective.weights(logp_BT, batch, cfg)
        return step.loss_and_grads(params, ref, batch, weight, mask, model_cfg=MODEL, cfg=cfg)[:2]

    return jax.jit(score), jax.jit(update)


def measure(rows: int, cap: int, rounds: int) -> dict:
    """Times both layouts; returns the result line."""
    c = config.default()
    c.update_from_flattened_dict(
        {"max_completion_length": cap, "audit.chunk_tokens": 8, "audit.num_chunks": 2, "audit.num_continuations": 4}
    )
    cfg = FrozenConfigDict(c)
    made, prompt_B, length_B = responses(rows, cap)
    T, by_layout = batches(made, prompt_B, length_B, most=2 * (cap + cap // 16))
    score, update = passes(cfg, T)
    params = jax.jit(functools.partial(model.init, cfg=MODEL))(jax.random.key(0))
    ref = jax.tree.map(lambda a: a * 1.1, params)
    times = {layout: {"score": [], "update": []} for layout in by_layout}
    loss, out = {}, {}

    def one_score(layout):
        out[layout] = jax.block_until_ready(score(params, by_layout[layout]))

    def one_update(layout):
        loss[layout] = float(jax.block_until_ready(update(params, ref, by_layout[layout], out[layout].logp_BT))[0])

    for i in range(rounds + 1):  # the first one compiles
        for layout in by_layout:
            for name, run in (("score", one_score), ("update", one_update)):
                wall, _ = sides.timed(run, layout)
                if i:
                    times[layout][name].append(round(wall, 4))
    grids = {k: (b.token_BL if b.packed is None else b.packed.token_RL).shape for k, b in by_layout.items()}
    return {
        "rows": rows, "cap": cap, "real": int((prompt_B + length_B).sum()), "tokens": int(length_B.sum()),
        "median": int(np.median(length_B)), "grids": grids, "positions": positions(by_layout, T), "times": times,
        "gap": abs(loss["packed"] / loss["unpacked"] - 1), "parameters": model.num_params(MODEL),
    }  # fmt: skip


def write_table() -> None:
    """docs/results/packing.md: medians over the rounds."""
    rows = []
    for line in sides.read("packing"):
        took = {(k, n): sides.median(t[n]) for k, t in line["times"].items() for n in t}
        for layout, (r, length) in line["grids"].items():
            positions = line["positions"][layout]
            seconds = [took[layout, n] for n in ("score", "update")]
            ratio = [f"{t / took['unpacked', n]:.2f}" for t, n in zip(seconds, ("score", "update"))]
            ratio = ratio if layout == "packed" else ["", ""]
            rows.append(
                (
                    f"{line['cap']:,}", layout, len(line["times"][layout]["score"]), f"{r} x {length:,}",
                    f"{r * length / line['real']:.2f}", f"{positions / line['tokens']:.2f}",
                    *(f"{t:.2f}" for t in seconds), *ratio, f"{line['gap']:.0e}",
                )
            )  # fmt: skip
    head = ["cap", "layout", "rounds", "rows", "tokens / real", "vocabulary positions / real", "score s", "update s"]
    sides.write_page("packing", sides.table([*head, "score / unpacked", "update / unpacked", "losses apart"], rows))


def main():
    """Runs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cap", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        sides.append("packing", measure(args.rows, args.cap, args.rounds))
    write_table()


if __name__ == "__main__":
    main()
