"""How a teacher is made to continue the student's text, and what it costs: completion, prefill, instruction fallback.

    python -m benchmarks.continuation_modes                # runs what is missing, then writes the page
    python -m benchmarks.continuation_modes --table        # only docs/results/continuation_modes.md from the lines

One run is one JSON line in docs/results/continuation_modes.jsonl: the small world, 14 steps of configs/tiny.py, the
same student and seed, so that step 0 compares the same chunks. The teacher is the small world's; as an
instruction-following chat model it is emulated (benchmarks/emulated.py says how). Accuracy is greedy, on 256 held-out
problems.
"""

import argparse
import json
import pathlib
import shutil
import tempfile
import time

import numpy as np

RESULTS = pathlib.Path("docs/results/continuation_modes.jsonl")
PAGE = RESULTS.with_suffix(".md")
MODES = {
    "completion": "raw continuation of the rendered prompt",
    "prefill": "the answer as a last assistant turn, its trailing whitespace taken off and put back",
    "instruct": "asked for the next words; the emulated chat model's habits cut away",
}
STEPS = 14


def run(mode: str, seed: int) -> dict:
    """One run in a folder of its own, gone afterwards; returns its result line."""
    from benchmarks.emulated import __main__ as emulated
    from configs import tiny
    from omniopd_jax import teachers, train

    teachers.TEACHERS["emulated"] = teachers.Provider(emulated.make)
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(
        {
            "seed": seed,
            "num_steps": STEPS,
            "optimizer.learning_rate": 2e-4,
            "max_completion_length": 64,
            "teacher.provider": "emulated",
            "teacher.base_url": "http://127.0.0.1:9/v1",
            "teacher.continuation": mode,
            "teacher.tokenizer": cfg.student.path,
            "teacher.prefix_order": "free",
            "teacher.max_concurrency": 1024,
            "teacher.timeout_s": 600.0,
            "teacher.deadline_s": 3600.0,
            "audit.log_per_step": 100_000,
            "checkpoint.every": STEPS,
            "log.tensorboard": False,
            "run_dir": tempfile.mkdtemp(prefix="continuation_modes_"),
        }
    )
    started = time.time()
    try:
        out = train.train(cfg)
        folder = pathlib.Path(cfg.run_dir)
        audits = [json.loads(s) for s in (folder / "audits.jsonl").read_text().split("\n") if s]
        steps = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(cfg.run_dir, ignore_errors=True)
    failures = [f for a in audits for f in a["failures"]]
    return {
        "mode": mode,
        "seed": seed,
        "steps": out["step"],
        "before": out["accuracy_before"],
        "after": out["accuracy_after"],
        "first": k_sem(audits, 0),
        "last": k_sem(audits, STEPS - 1),
        "failed": len(failures),
        "asked": sum(a["n"] for a in audits) + len(failures),
        "dropped": sum(s["audit/dropped"] for s in steps),
        "audits": len(audits),
        "habits": emulated.HABITS if mode == "instruct" else {},
        "characters": float(np.mean([len(t) for a in audits for t in a["continuations"]])),
        "seconds": round(time.time() - started, 1),
    }


def k_sem(audits, step: int) -> dict:
    """Distribution of k_sem / n over the audits of a step that were kept."""
    share = np.array([a["k_sem"] / a["n"] for a in audits if a["step"] == step and a["kept"]])
    out = {f"p{q}": round(float(np.quantile(share, q / 100)), 4) for q in (10, 25, 50, 75, 90)}
    n = [a["n"] for a in audits if a["step"] == step and a["kept"]]
    middle = float(np.mean((share > 0.05) & (share < 0.95)))
    return out | {"mean": round(float(share.mean()), 4), "midband": round(middle, 4), "n": round(float(np.mean(n)), 3)}


def lines() -> list[dict]:
    """The results so far."""
    return [json.loads(s) for s in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    """The page's tables: accuracy by mode and seed, and the distribution of k_sem / n on the same chunks."""
    got = lines()
    out = [
        "| mode | seed | before | after | texts kept | mean n | audits dropped | characters a text |",
        "| --- " * 8 + "|",
    ]
    for r in got:
        kept = 1 - r["failed"] / r["asked"]
        out.append(
            f"| {r['mode']} | {r['seed']} | {r['before']:.1%} | {r['after']:.1%} | {kept:.1%} | {r['first']['n']:.2f} "
            "| "
            f"{r['dropped']:,.0f} of {r['audits']:,} | {r['characters']:.1f} |"
        )
    out += ["", "k_sem / n over kept audits:", ""]
    out += ["| mode | seed | step | p10 | p25 | p50 | p75 | p90 | mean | in (0.05, 0.95) |", "| --- " * 10 + "|"]
    for r in got:
        for name, step in (("first", 1), ("last", r["steps"])):
            d = r[name]
            cells = " | ".join(f"{d[k]:.3f}" for k in ("p10", "p25", "p50", "p75", "p90", "mean"))
            out.append(f"| {r['mode']} | {r['seed']} | {step} | {cells} | {d['midband']:.1%} |")
    return "\n".join(out)


def write_page() -> None:
    """Puts the tables between the page's markers; the words around them are a person's."""
    begin, end = "<!-- table: python -m benchmarks.continuation_modes --table -->", "<!-- end of table -->"
    page = PAGE.read_text() if PAGE.exists() else f"# How a teacher is made to continue\n\n{begin}\n{end}\n"
    head, rest = page.split(begin)
    PAGE.write_text(f"{head}{begin}\n\n{table()}\n\n{end}{rest.split(end)[1]}")


def main():
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["mode"], r["seed"]) for r in lines()}
    for seed in map(int, args.seeds.split(",")):
        for mode in args.modes.split(","):
            if not args.table and (mode, seed) not in done:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(run(mode, seed)) + "\n")
    write_page()


if __name__ == "__main__":
    main()
