"""What the pass over the vocabulary costs against the naive one: time, temporary memory, share of the matrix rate.

    python -m benchmarks.vocab [--minutes 4] [--rounds 3]     # runs what is missing, timing by timing; then the table
    python -m benchmarks.vocab --table                        # only docs/results/vocab.md from the lines

Value and gradients (hidden, head) of `vocab.weighted_nll_and_kl`, the KL to a reference included, against the same loss
in plain jax: two [T, V] arrays of logits, log_softmax, autodiff; both jitted, float32, V = 151,936, 2,048 tokens. All
sides of a width run in one process and take turns: naive, then each block size, then naive again. One line of
docs/results/vocab.jsonl is one timing. Memory is XLA's own analysis of the compiled program: temporaries, without
arguments and results.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides
from omniopd_jax import vocab
from omniopd_jax.model import cpu
from omniopd_jax.parallel import sharding

V, T, BETA = 151_936, 2_048, 0.1
WIDTHS = (1_024, 256, 2_048)
BLOCKS = (256, 64, 128, 512, 1_024)


def naive(hidden, head, ref_hidden, ref_head, target, weight, mask):
    """The loss as one would write it, with all logits in memory."""
    logp = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head), axis=-1)
    ref = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", ref_hidden, ref_head), axis=-1)
    nll = -jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]
    return jnp.sum(weight * nll) + BETA * jnp.sum(mask * jnp.sum(jnp.exp(ref) * (ref - logp), axis=-1))


def ours(*args, block):
    """The same as the update calls it."""
    return vocab.weighted_nll_and_kl(*args, beta=BETA, block=block, columns=cpu.vocab_columns(sharding.default_mesh()))[
        0
    ]


def inputs(D: int) -> tuple:
    """hidden, head, ref_hidden, ref_head, target, weight, mask: the reference near the student, as in training."""
    rng = np.random.default_rng(0)

    def normal(*shape):  # a drawn block repeated: 600 MB of normals would take longer than the benchmark
        return np.resize(rng.normal(size=1_000_003).astype(np.float32), shape)

    hidden, head = normal(4, T // 4, D), normal(D, V) * D**-0.5
    target = rng.integers(0, V, (4, T // 4)).astype(np.int32)
    weight, mask = rng.random((2, 4, T // 4), np.float32) / T
    args = (hidden, head, hidden + 0.1 * normal(*hidden.shape), head, target, weight, mask)
    return jax.block_until_ready(jax.device_put(args))


def compiled(fn, args):
    """Value and gradients of hidden and head, compiled, so that no timing holds a compilation."""
    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1))).lower(*args).compile()


def once(program, args) -> None:
    """One call, its results dropped before the next one's are made."""
    jax.block_until_ready(program(*args))


def run(rounds: int, minutes: float) -> None:
    """Takes the missing timings in turn, round by round, until the time is up."""
    end = time.monotonic() + 60 * minutes
    for D in WIDTHS:
        done = {(line["side"], line["round"]) for line in sides.read("vocab") if line["D"] == D}
        names = ["naive", *(str(b) for b in BLOCKS)]
        todo = [(r, n) for r in range(rounds) for n in names if (n, r) not in done]
        if not todo or time.monotonic() > end:
            continue
        rate, args, programs = sides.matrix_rate(), inputs(D), {}
        for r, name in todo:
            if time.monotonic() > end:
                return
            if name not in programs:
                fn = naive if name == "naive" else functools.partial(ours, block=int(name))
                programs[name] = compiled(fn, args)
            wall, cpu = sides.timed(once, programs[name], args)
            memory = programs[name].memory_analysis().temp_size_in_bytes
            line = {"D": D, "side": name, "round": r, "wall": round(wall, 3), "cpu": round(cpu, 3), "temp": memory}
            sides.append("vocab", line | {"rate": round(rate / 1e9, 1), "V": V, "T": T})


def write_table() -> None:
    """docs/results/vocab.md: medians over the rounds."""
    lines, rows = sides.read("vocab"), []
    for D in sorted(WIDTHS):
        mine = [line for line in lines if line["D"] == D]
        if not any(line["side"] == "naive" for line in mine):
            continue
        rate = 1e9 * max(line["rate"] for line in lines)  # each process measures it once; the least disturbed counts
        base = None
        for name in ("naive", *map(str, sorted(BLOCKS))):
            here = [line for line in mine if line["side"] == name]
            if not here:
                continue
            wall, cpu = (sides.median([line[k] for line in here]) for k in ("wall", "cpu"))
            base = base or (wall, here[0]["temp"])
            ratios = (f"{wall / base[0]:.2f}", f"{here[0]['temp'] / base[1]:.3f}") if name != "naive" else ("", "")
            rows.append(
                (
                    f"{D:,}",
                    name,
                    len(here),
                    f"{wall:.2f}",
                    f"{cpu:.2f}",
                    ratios[0],
                    f"{here[0]['temp'] / 2**20:,.0f}",
                    ratios[1],
                    f"{8 * T * D * V / wall / rate:.0%}",
                )
            )
    head = [
        "D",
        "block",
        "rounds",
        "wall s",
        "CPU s",
        "time / naive",
        "temporary MiB",
        "memory / naive",
        "of matrix rate",
    ]
    sides.write_page("vocab", sides.table(head, rows))


def main():
    """Runs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0, help="no timing starts later than this")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        run(args.rounds, args.minutes)
    write_table()


if __name__ == "__main__":
    main()
