"""A published model against transformers and torch; printed for docs/results/families.md.

    python -m benchmarks.families logits FOLDER          # ten texts, float32; the longest against float64 too
    python -m benchmarks.families step FOLDER            # one update of a run, against torch's
    python -m benchmarks.families.mixing                 # linear attention against quadratic (mixing.py)

FOLDER is a Hugging Face folder with weights.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.families import reference
from omniopd_jax import config as configs
from omniopd_jax import hf, model, objective, optim, step, vocab
from omniopd_jax.run import setup

TEXTS = (
    "Question: Tom has 3 apples and buys 4 more. How many apples does he have? Answer: Tom has 3 + 4 =",
    "The Eiffel Tower is located in Paris, the capital of France, and was completed in 1889.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "La teoría de la relatividad fue desarrollada por Albert Einstein a principios del siglo XX.",
    "In 2019, the global average temperature was about 0.95 degrees Celsius above the 20th-century average.",
    "import numpy as np\nx = np.linspace(0, 1, 100)\ny = np.sin(2 * np.pi * x)\n",
    "Water boils at 100 degrees Celsius at sea level, but at higher altitudes it boils at a lower temperature.",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
    " ".join(f"The number {i} squared is {i * i}." for i in range(1, 70)),
)
T = 24  # response tokens of a row of the update


def logits(folder: str) -> None:
    """The largest difference of the logits of each text."""
    ids = reference.token_ids(folder, TEXTS)
    theirs = {how: reference.logits(folder, ids, how) for how in ("sdpa", "eager")}
    exact = reference.logits(folder, ids[-1:], "float64")[0]
    params, cfg = hf.load(folder)
    run = jax.jit(lambda p, token: model.logits(p, cfg, model.hidden(p, cfg, token)))
    ours = []
    for row in ids:  # two shapes
        width = 64 if len(row) <= 64 else len(row)
        ours.append(np.asarray(run(params, jnp.asarray([row + [0] * (width - len(row))])))[0, : len(row)])
    for row, mine, z in zip(ids, ours, theirs["sdpa"]):
        print(f"{len(row)} tokens: {np.abs(mine - z).max():.1e} of transformers' sdpa, deviation {z.std():.2f}")
    last = {"ours": ours[-1], "sdpa": theirs["sdpa"][-1], "eager": theirs["eager"][-1], "float64": exact}
    for a, b in (("ours", "eager"), ("sdpa", "eager"), *((name, "float64") for name in ("ours", "sdpa", "eager"))):
        print(f"the longest, {a} and {b}: {np.abs(last[a] - last[b]).max():.1e}")


def batch(ids: list[list[int]]) -> objective.Batch:
    """Four texts as a prompt and the T tokens behind it, two audited chunks each, with made-up agreement."""
    rows = [row for row in ids if len(row) >= T + 2][:4]
    width, start = max(map(len, rows)), [len(row) - T for row in rows]
    k, n = np.linspace(0.2, 3.8, 8, dtype=np.float32).reshape(4, 2), np.full((4, 2), 4, np.int32)
    token = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    peak = np.tile(np.array([[2, 12]], np.int32), (4, 1))
    return objective.Batch(token, np.array(start, np.int32), np.full(4, T, np.int32), peak, k, n)


def recipe():
    """The published objective with its anchor; a rate whose updates float32 weights resolve."""
    c = configs.default()
    c.update_from_flattened_dict({
        "audit.num_chunks": 2, "audit.chunk_tokens": 6, "audit.num_continuations": 4, "max_completion_length": T,
        "objective.advantage": "batch_mean", "optimizer.learning_rate": 1e-4, "micro_batches": 2, "model.remat": "none",
    })  # fmt: skip
    return setup.frozen(c)


def one_step(folder: str) -> None:
    """Loss, gradient norm and parameters after one update, and the loss on the same batch after it."""
    cfg, rows = recipe(), batch(reference.token_ids(folder, TEXTS))
    params, model_cfg = hf.load(folder)
    steps = step.make_steps(model_cfg, cfg)
    held = jax.tree.map(jnp.copy, params)
    stats = steps.score_step(params, rows.token_BL, rows.prompt_length_B, T)
    weight, mask = (np.asarray(a) for a in objective.weights(stats.logp_BT, rows, cfg))
    rate = float(optim.make_schedule(cfg)(0))
    theirs = reference.update(folder, rows, weight, cfg, rate)
    state = step.create_state(params, cfg, steps, jax.random.key(0))
    state, metrics, _ = steps.train_step(state, held, rows, stats, None)
    ours = {name: float(value) for name, value in metrics.items()}
    print(f"loss {ours['loss']:.7f}, torch {theirs.loss:.7f}; anchored tokens {int((mask > 0).sum())}")
    print(f"gradient norm {ours['grad_norm']:.6f}, torch {theirs.grad_norm:.6f}")
    print(f"KL to the reference, the student itself: {ours['anchor/kl_ref_to_student_exact']:.1e}")
    gaps = theirs.gaps(state.params, model.table(model_cfg))
    leaf = max(gaps, key=lambda name: gaps[name])
    print(f"what the update moves, of each leaf's own move: at most {gaps[leaf]:.1e} from torch's ({leaf})")
    after = steps.score_step(state.params, rows.token_BL, rows.prompt_length_B, T)
    print(f"weighted log-prob before {_weighted(weight, stats):.6f}, after {_weighted(weight, after):.6f}")


def _weighted(weight, stats: vocab.TokenStats) -> float:
    return float((weight * np.asarray(stats.logp_BT)).sum())


def main():
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("logits", "step"))
    parser.add_argument("folder")
    args = parser.parse_args()
    {"logits": logits, "step": one_step}[args.what](args.folder)


if __name__ == "__main__":
    main()
