"""The small worlds' experiments: one run is one JSON line in docs/results/small_world.jsonl; page and plots are made
from them.

    python -m benchmarks.small_world --method=default --seed=0                   # one run, skipped if its line is there
    python -m benchmarks.small_world --methods=sft,opd --seeds=0,1,2             # several, one after the other
    python -m benchmarks.small_world --world=slips --seeds=0,1,2                 # what issue 5 asks of that world
    python -m benchmarks.small_world --sweep --methods=sft,grpo                  # learning rates, on the validation
    split python -m benchmarks.small_world --all --minutes=5                           # whatever is missing, in order
    of weight python -m benchmarks.small_world --try_steps=2 --method=opd                  # a look: prints its line,
    stores nothing python -m benchmarks.small_world --table                                     # page and plots from
    what is there

Accuracy is greedy, on the first 512 problems of the world's test split. Learning rates come from
docs/results/small_world_lr.json (three rates a method, by accuracy on the validation split); a world without a sweep of
its own takes that of forks, a method without any the recipe's, and the page says so. An ablation takes the rate of
`default`.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil
import tempfile
import time

from absl import flags

from benchmarks.small_world import page
from benchmarks.small_world.cells import (
    ABLATIONS,
    IN_WORLD,
    METHODS,
    RATES,
    RESULTS,
    SWEEP,
    SWEEP_SEED,
    cells,
    checkpoints,
    chosen,
    lines,
    rate,
    rates,
    recipe,
)
from omniopd_jax import objective, train, world
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.run import cli


def run(cfg, method: str, overrides: dict | None = None) -> dict:
    """One run in a folder of its own, gone afterwards; returns its result line. `overrides`: None: the method's own."""
    cfg.run_dir = tempfile.mkdtemp(prefix="small_world_")
    started = time.time()
    try:
        out = train.train(cfg)
        steps = [json.loads(s) for s in (pathlib.Path(cfg.run_dir) / "metrics.jsonl").read_text().split("\n") if s]
    finally:
        shutil.rmtree(cfg.run_dir, ignore_errors=True)
    curve, tokens, spent = [], [], [0, 0]
    sampled = cfg.prompts_per_step * cfg.num_generations if objective.of(cfg).samples else 0
    for s in steps:
        spent = [spent[0] + round(s["completions/mean_length"] * sampled), spent[1] + s["teacher/tokens_out"]]
        if s.get("eval/updates"):
            curve.append([s["eval/updates"], round(s["eval/accuracy"], 4)])
            tokens.append(spent)
    return {
        "method": method, "world": cfg.data.name, "seed": cfg.seed,
        "overrides": (METHODS | ABLATIONS)[method] if overrides is None else overrides,
        "steps": out["step"], "learning_rate": cfg.optimizer.learning_rate, "before": out["accuracy_before"],
        "after": out["accuracy_after"], "curve": curve, "curve_tokens": tokens, "student_tokens": spent[0],
        "teacher_tokens": out["teacher/tokens_out"],
        "teacher_scored": spent[0] if cfg.objective.name.startswith("opd") else 0,
        "repeated": steps[-1]["completions/repeated_fraction"], "kl": steps[-1].get("anchor/kl_ref_to_student_exact"),
        "mean_length": steps[-1]["completions/mean_length"], "seconds": round(time.time() - started, 1),
    }  # fmt: skip


def sweep(method: str, which: str) -> None:
    """Fills in the method's three rates: accuracy after a run, on problems of the validation split alone."""
    if method in ABLATIONS:
        raise UserError(f"--sweep: {method!r} is an ablation and takes the learning rate of 'default'")
    for value in SWEEP:
        try_rate(method, which, value)


def try_rate(method: str, which: str, value: float) -> None:
    """One rate of a sweep, where it is missing."""
    if f"{value:g}" in rates().get(which, {}).get(method, {}):
        return
    cfg = recipe(method, which, SWEEP_SEED)
    cfg.optimizer.learning_rate, cfg.eval.split, cfg.eval.every = value, "validation", 0
    accuracy = run(cfg, method)["after"]
    with _lock("rates"):  # another process may sweep another method
        known = rates()
        known.setdefault(which, {}).setdefault(method, {})[f"{value:g}"] = accuracy
        RATES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def main(_) -> int:
    """Runs what is missing, then writes page and plots."""
    given = flags.FLAGS.flag_values_dict()
    if not given["table"]:
        which = one_of(given["world"], world.WORLDS, "--world")
        if missing := [str(folder) for folder in checkpoints(which) if not folder.is_dir()]:
            raise UserError(f"--world={which}: not run, no {missing[0]}; see benchmarks/small_world/build.py")
        methods = [given["method"]] if given["method"] else given["methods"]
        for method in methods:
            one_of(method, METHODS | ABLATIONS, "--method")
        seeds = [int(s) for s in ([given["seed"]] if given["seed"] is not None else given["seeds"])]
        cli.setup_jax()
        if given["all"]:
            fill_all(given["minutes"])
        elif given["sweep"]:
            for method in methods or [m for m in IN_WORLD[which] if m in METHODS]:
                sweep(method, which)
        elif given["try_steps"]:
            for method in methods or IN_WORLD[which]:
                cfg = recipe(method, which, seeds[0])
                cfg.num_steps, cfg.eval.num_prompts = given["try_steps"], 32
                print(json.dumps(run(cfg, method)), flush=True)
            return 0
        else:
            fill(which, methods or IN_WORLD[which], seeds)
    page.write()
    return 0


def fill(which: str, methods, seeds) -> None:
    """Runs the cells that have no line yet, seed by seed, each stored as it ends."""
    for seed in seeds:
        for method in methods:
            if seed not in {r["seed"] for r in chosen(method, which, lines())}:
                result = run(recipe(method, which, seed), method)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")


def is_done(which: str, method: str, value: float | None, seed: int) -> bool:
    """Whether a cell has its result, or waits for its sweep."""
    if value is not None:
        return f"{value:g}" in rates().get(which, {}).get(method, {})
    unswept = rate(method, which) is None and rate(method, "forks") is None
    return unswept or seed in {r["seed"] for r in chosen(method, which, lines())}


@contextlib.contextmanager
def claimed(cell):
    """Whether this process may run the cell: several may be at work."""
    try:
        with _lock("_".join(map(str, cell)), fcntl.LOCK_NB):
            yield True
    except BlockingIOError:
        yield False


@contextlib.contextmanager
def _lock(name: str, how: int = 0):
    with (pathlib.Path(tempfile.gettempdir()) / f"small_world_{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        yield


def fill_all(minutes: float) -> None:
    """Runs missing cells in order until the time is up; the last one begun is finished."""
    started = time.time()
    for cell in cells():
        which, method, value, seed = cell
        with claimed(cell) as mine:
            if not mine or is_done(*cell) or not all(folder.is_dir() for folder in checkpoints(which)):
                continue
            if time.time() - started > 60 * minutes:
                return
            if value is not None:
                try_rate(method, which, value)
            else:
                fill(which, [method], [seed])


def _define_flags() -> None:
    flags.DEFINE_string("method", None, "one of METHODS or ABLATIONS")
    flags.DEFINE_list("methods", [], "several, in order; default: all of the world")
    flags.DEFINE_list("seeds", ["0"], "seeds, in order")
    flags.DEFINE_integer("seed", None, "one seed")
    flags.DEFINE_string("world", "forks", "forks | slips | style")
    flags.DEFINE_bool("sweep", False, "find learning rates in place of results")
    flags.DEFINE_bool("all", False, "every world's missing sweeps and results, in order of weight")
    flags.DEFINE_float("minutes", 1e9, "--all: start nothing after this many")
    flags.DEFINE_integer("try_steps", 0, "run this many steps, print the line, store nothing")
    flags.DEFINE_bool("table", False, "only write page and plots")


if __name__ == "__main__":
    _define_flags()  # here, not on import: the page imports this file
    cli.run(main)
