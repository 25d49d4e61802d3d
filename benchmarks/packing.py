"""What packing saves: scoring and the update of responses as long as answers to math problems are, packed and unpacked.

    python -m benchmarks.packing [--rows 32] [--cap 512] [--repeats 3]

Lengths are lognormal (sigma 0.8) with a median of an eleventh of the cap, which is what a median of 650 tokens at a cap of
7,168 would be; one response is cut at the cap, as nearly always happens. Same model, same responses, one process, the two
layouts alternating; prints medians of wall time, what is computed, and how far the losses are apart.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from omniopd_jax import config, metrics, model, objective, packing, rollout, step

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


def measure(rows: int, cap: int, repeats: int) -> list[str]:
    """Lines of a Markdown table."""
    c = config.default()
    c.update_from_flattened_dict({"max_completion_length": cap, "audit.chunk_tokens": 8, "audit.num_chunks": 2})
    cfg = FrozenConfigDict(c)
    made, prompt_B, length_B = responses(rows, cap)
    T, by_layout = batches(made, prompt_B, length_B, most=2 * (cap + cap // 16))
    score, update = passes(cfg, T)
    params = jax.jit(functools.partial(model.init, cfg=MODEL))(jax.random.key(0))
    ref = jax.tree.map(lambda a: a * 1.01, params)
    seconds = {(layout, name): [] for layout in by_layout for name in ("score", "update")}
    loss = {}
    for k in range(repeats + 1):  # the first one compiles
        for layout, batch in by_layout.items():
            start = time.perf_counter()
            stats = jax.block_until_ready(score(params, batch))
            middle = time.perf_counter()
            loss[layout] = float(jax.block_until_ready(update(params, ref, batch, stats.logp_BT))[0])
            if k:
                seconds[layout, "score"].append(middle - start)
                seconds[layout, "update"].append(time.perf_counter() - middle)
    real, tokens = int((prompt_B + length_B).sum()), int(length_B.sum())
    out = [
        f"{rows} responses, {real:,} real tokens ({tokens:,} of responses, median {int(np.median(length_B))}, longest "
        f"{length_B.max()}); losses differ by {abs(loss['packed'] / loss['unpacked'] - 1):.1e} of their size",
        "",
        "| | rows | tokens computed | over real | vocabulary positions | over real | score, s | update, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for layout, batch in by_layout.items():
        grid = batch.token_BL if batch.packed is None else batch.packed.token_RL
        positions = rows * T if batch.packed is None else batch.packed.owner_QX.size
        times = " | ".join(f"{statistics.median(seconds[layout, name]):.2f}" for name in ("score", "update"))
        shape = f"{grid.shape[0]} x {grid.shape[1]} | {grid.size:,} | {grid.size / real:.2f}"
        out.append(f"| {layout} | {shape} | {positions:,} | {positions / tokens:.2f} | {times} |")
    ratio = [statistics.median(seconds["packed", n]) / statistics.median(seconds["unpacked", n]) for n in ("score", "update")]
    return [*out, f"| packed / unpacked | | | | | | {ratio[0]:.2f} | {ratio[1]:.2f} |"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cap", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    size = f"{model.num_params(MODEL) / 1e6:.1f} M parameters, vocabulary {MODEL.vocab_size:,}, {MODEL.dtype}"
    metrics.say(f"{size}; {MODEL.attention} attention, {jax.devices()[0].device_kind}")
    metrics.say("\n".join(measure(args.rows, args.cap, args.repeats)))
