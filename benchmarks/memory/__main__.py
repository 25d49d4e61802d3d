"""Bytes a TPU chip holds, by part, for Qwen3-1.7B and 4B: scoring, decode and the full update, compiled ahead of time.

    pip install -r requirements-tpu.txt                       # the TPU compiler; no TPU is needed
    python -m benchmarks.memory [--minutes 4]                 # compiles what is missing, pass by pass; then the table
    python -m benchmarks.memory --table                       # only docs/results/memory.md from the lines

Nothing runs: the passes of `configs/math.py` (64 prompts x 4 responses, 1,024 + 7,168 tokens, bfloat16, remat full;
half of the rows decoded at a time) are compiled for a slice by `aot`, and the figures are the compiler's. `arguments`
is what the pass is given (of the update: state, reference, batch), `beside it` what the run holds meanwhile, `peak` the
arguments with results and temporaries. One line of docs/results/memory.jsonl is one pass.
"""

import argparse
import time

from benchmarks import sides

MIB = 2.0**20
CASES = (("Qwen/Qwen3-1.7B", "v5e:4x4"), ("Qwen/Qwen3-4B", "v5p:2x2x2"))
PASSES = ("score", "update", "decode")


def measure(path: str, topology: str, name: str) -> dict:
    """Compiles one pass; returns its line."""
    from configs import math
    from omniopd_jax.run import fit, flops

    cfg = math.get_config()
    cfg.student.path, cfg.rollout.cache_gib = path, 7.0
    said = []
    plan, (done,), fits = fit.check(cfg, topology, (name,), say=said.append)
    chip = flops.CHIPS[topology.split(":")[0]]
    return {
        "model": path, "topology": topology, "pass": name, "devices": plan.mesh.size, "mesh": dict(plan.mesh.shape),
        "micro_batches": cfg.micro_batches, "rows": plan.rows, "sampled": plan.sampled, "sizes": plan.sizes(),
        "arguments": done.arguments, "outputs": done.outputs, "aliased": done.aliased, "temporaries": done.temporaries,
        "peak": done.peak, "beside": done.resident, "total": done.total, "memory": chip.memory, "fits": fits,
        "problem": done.problem, "seconds": round(done.seconds, 1),
    }  # fmt: skip


def write_table() -> None:
    """docs/results/memory.md."""
    lines = sides.read("memory")
    parts, passes = {}, []
    for line in sorted(lines, key=lambda x: ([c[0] for c in CASES].index(x["model"]), PASSES.index(x["pass"]))):
        where = (line["model"], f"{line['topology']} ({line['devices']} chips)")
        sizes = [f"{line['sizes'][k] / MIB:,.0f}" for k in ("parameters", "optimizer", "reference", "cache")]
        parts[where] = (*where, *sizes)
        figures = [f"{line[k] / MIB:,.0f}" for k in ("arguments", "temporaries", "peak", "beside", "total")]
        passes.append(
            (*where, line["pass"], *figures, f"{line['total'] / line['memory']:.0%}", line["problem"] or "yes")
        )
    head = ["model", "slice", "parameters", "optimizer", "reference", "cache at its longest"]
    more = [
        "model",
        "slice",
        "pass",
        "arguments",
        "temporaries",
        "peak of the pass",
        "beside it",
        "together",
        "of HBM",
        "fits",
    ]
    text = "MiB a chip, what the run holds:\n\n" + sides.table(head, parts.values())
    sides.write_page("memory", text + "\n\nMiB a chip, pass by pass:\n\n" + sides.table(more, passes))


def main():
    """Compiles and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="no pass starts later than this")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    done = {(line["model"], line["topology"], line["pass"]) for line in sides.read("memory")}
    for path, topology in CASES:
        for name in PASSES:
            if not args.table and (path, topology, name) not in done and time.monotonic() < end:
                sides.append("memory", measure(path, topology, name))
    write_table()


if __name__ == "__main__":
    main()
