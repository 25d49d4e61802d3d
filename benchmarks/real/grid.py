"""The real model's comparison: one run is one JSON line in docs/results/real_model.jsonl, the page is made from them.

    python -m benchmarks.real.grid --method=omniopd --seed=0             # one run against a server that it starts
    python -m benchmarks.real.grid --method=omniopd,sft --rate=3e-4      # several, at a rate of one's own
    python -m benchmarks.real.grid --sweep --method=sft                  # rates on the validation split, 10 updates
    python -m benchmarks.real.grid --record=runs/smollm2 --method=omniopd  # the line of a run that `make real` made
    python -m benchmarks.real.grid --table                               # the page, from what is there

A run that was stopped goes on from its checkpoint in runs/real; a line that is there is not run again.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import time

from benchmarks import sides
from benchmarks.real import accuracy, prepare, server
from configs import smollm2
from omniopd_jax.errors import UserError
from omniopd_jax.evaluation import scores

RUNS = pathlib.Path("runs/real")
STEPS, SWEEP_STEPS = 30, 10
SWEEP = (1e-4, 3e-4, 1e-3)
SWEEP_SEED = 100  # no seed of the table
MEAN = {"objective.normalizer": "separate_means", "anchor.kl_coef": 0.0}
LOCAL = {"teacher.provider": "local", "teacher.model": str(prepare.ROOT / "teacher"), "teacher.tokenizer": ""}


@dataclasses.dataclass(frozen=True)
class Method:
    """What a row of the page is: its words, its settings over configs/smollm2.py, whether it asks the server."""

    about: str
    overrides: dict
    served: bool = True


METHODS = {
    "omniopd_published": Method("OmniOPD as published: no baseline", {"objective.advantage": "none"}),
    "omniopd": Method("OmniOPD with our baseline (batch_mean)", {}),
    "continuation_peak": Method(
        "one continuation to the end from the place of highest entropy, cross-entropy",
        MEAN | {"objective.name": "continuation", "continuation.cut": "peak"},
    ),
    "sft": Method("cross-entropy on whole solutions", MEAN | {"objective.name": "sft"}),
    "opd": Method("white box: reverse KL by the sampled token", LOCAL | {
        "objective.name": "opd", "anchor.kl_coef": 0.0}, served=False),
    "grpo": Method("no teacher: group advantage of right answers, 4 prompts x 4", {
        "objective.name": "grpo", "anchor.kl_coef": 0.0, "prompts_per_step": 4, "num_generations": 4}, served=False),
    "constant": Method("no teacher: weight 1 on the same chunks", {"objective.name": "constant"}, served=False),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method at a rate, from a seed; of a sweep, shorter and on the validation split."""

    method: str
    seed: int
    rate: float
    sweep: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-s{self.seed}-{self.rate:g}" + ("-sweep" if self.sweep else "")

    def config(self):
        """The recipe with this cell's settings."""
        cfg = smollm2.get_config()
        cfg.update_from_flattened_dict(METHODS[self.method].overrides)
        cfg.run_dir, cfg.seed, cfg.optimizer.learning_rate = str(RUNS / self.name), self.seed, self.rate
        cfg.num_steps = SWEEP_STEPS if self.sweep else STEPS
        if self.sweep:
            cfg.eval.path, cfg.eval.num_prompts = str(prepare.ROOT / "data" / "validation.jsonl"), 128
        return cfg

    def of(self, line: dict) -> bool:
        """Whether a result line is this cell's."""
        own = (self.method, self.seed, self.rate, self.sweep, SWEEP_STEPS if self.sweep else STEPS)
        return tuple(line[k] for k in ("method", "seed", "learning_rate", "sweep", "steps")) == own


def run(cell: Cell, url: str) -> None:
    """Runs a cell to its end and adds its line.

    Raises:
      UserError: the run ended with another exit code than 0; its folder stays, and the same command goes on.
    """
    cfg = cell.config()
    flat = METHODS[cell.method].overrides | {
        "run_dir": cfg.run_dir, "seed": cfg.seed, "optimizer.learning_rate": cfg.optimizer.learning_rate,
        "num_steps": cfg.num_steps, "eval.path": cfg.eval.path, "eval.num_prompts": cfg.eval.num_prompts,
    }  # fmt: skip
    if METHODS[cell.method].served:
        flat["teacher.base_url"] = url
    started = time.time()
    settings = [f"--config.{k}={v}" for k, v in flat.items()]
    done = subprocess.run(
        [sys.executable, "-m", "omniopd_jax.main", "--config=configs/smollm2.py", "--yes", *settings], check=False
    )
    if done.returncode:
        raise UserError(f"{cell.name}: ended with {done.returncode}; the same command goes on with it")
    sides.append("real_model", line_of(cell, cfg, round(time.time() - started, 1)))


def line_of(cell: Cell, cfg, seconds: float) -> dict:
    """The result line, from what the run wrote. `right_*`: one character a problem, in the order of the file."""
    steps = [json.loads(s) for s in (pathlib.Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()]
    found = accuracy.evaluations(cfg.run_dir)
    right = {
        what: "".join(str(int(v)) for v in found[k].values()) for what, k in (("before", 0), ("after", cfg.num_steps))
    }

    def total(key: str) -> float:
        return sum(s.get(key, 0) for s in steps)

    return {
        "method": cell.method, "seed": cell.seed, "learning_rate": cell.rate, "sweep": cell.sweep,
        "overrides": METHODS[cell.method].overrides, "steps": cfg.num_steps, "split": pathlib.Path(cfg.eval.path).stem,
        "right_before": right["before"], "right_after": right["after"],
        "teacher_tokens_in": total("teacher/tokens_in"), "teacher_tokens_out": total("teacher/tokens_out"),
        "teacher_calls": total("teacher/calls"),
        "truncated": [steps[0].get("completions/truncated_fraction"), steps[-1].get("completions/truncated_fraction")],
        "mean_length": [steps[0].get("completions/mean_length"), steps[-1].get("completions/mean_length")],
        "seconds": seconds,
    }  # fmt: skip


def recorded(method: str, run_dir: str) -> dict:
    """The line of a finished run that another command made, `make real` say."""
    c = json.loads((pathlib.Path(run_dir) / "config.json").read_text())
    cfg = smollm2.get_config()
    cfg.run_dir, cfg.num_steps, cfg.eval.path = run_dir, c["num_steps"], c["eval"]["path"]
    lines = (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    seconds = sum(json.loads(line).get("time/step", 0.0) for line in lines)
    return line_of(Cell(method, c["seed"], c["optimizer"]["learning_rate"]), cfg, round(seconds, 1))


def swept(method: str, lines: list[dict]) -> dict[float, float]:
    """{rate: accuracy on the validation split after a short run}, as far as it has been swept."""
    return {
        r["learning_rate"]: sum(map(int, r["right_after"])) / len(r["right_after"])
        for r in lines if r["method"] == method and r["sweep"]
    }  # fmt: skip


def best_rate(method: str, lines: list[dict]) -> float | None:
    """The best of the swept rates, the lower of equals; None where the sweep is not whole."""
    rates = swept(method, lines)
    return max(sorted(rates), key=rates.get) if len(rates) >= len(SWEEP) else None


def page() -> None:
    """docs/results/real_model.md: what there is, and 'not run'."""
    lines, rows = sides.read("real_model"), []
    for name, method in METHODS.items():
        own = [r for r in lines if r["method"] == name and not r["sweep"]]
        if not own:
            rows.append((name, method.about, *["not run"] * 7))
        for r in own:
            before, after = ([int(c) for c in r[k]] for k in ("right_before", "right_after"))
            change = [b - a for a, b in zip(before, after, strict=True)]
            low, high = scores.interval(change)
            rows.append((
                name, method.about, r["seed"], f"{r['learning_rate']:g}", r["steps"],
                f"{100 * sum(before) / len(before):.1f}",
                f"{100 * sum(after) / len(after):.1f}",
                f"{100 * sum(change) / len(change):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                f"{r['teacher_tokens_in']:,.0f} / {r['teacher_tokens_out']:,.0f}",
            ))  # fmt: skip
    head = ["method", "what", "seed", "rate", "updates", "before, %", "after, %", "paired gain, points",
            "teacher tokens in / out"]  # fmt: skip
    text = sides.table(head, rows)
    rates = [(m, *[f"{100 * swept(m, lines)[r]:.1f}" if r in swept(m, lines) else "not run" for r in SWEEP])
             for m in METHODS]  # fmt: skip
    text += f"\n\nLearning rates: accuracy on 128 validation problems after {SWEEP_STEPS} updates, one seed.\n\n"
    text += sides.table(["method", *[f"{r:g}" for r in SWEEP]], rates)
    sides.write_page("real_model", text, "real.grid")


def main() -> int:
    """Runs what is asked for and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="", help=f"of {', '.join(METHODS)}, comma-separated")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--rate", type=float, help="default: the best of the sweep, or the recipe's")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--record", default="", help="a folder of a finished run of --method")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.record:
        sides.append("real_model", recorded(args.method, args.record))
        page()
        return 0
    lines, cells = sides.read("real_model"), []
    for method in filter(None, args.method.split(",")):
        if method not in METHODS:
            parser.error(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        if args.sweep:
            rates = (args.rate,) if args.rate else SWEEP
            cells += [Cell(method, SWEEP_SEED, rate, sweep=True) for rate in rates]
        else:
            rate = args.rate or best_rate(method, lines) or smollm2.get_config().optimizer.learning_rate
            cells += [Cell(method, int(seed), rate) for seed in args.seed.split(",")]
    cells = [c for c in cells if not any(c.of(line) for line in lines)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(server.ended_by_signals())
        served = any(METHODS[c.method].served for c in cells)
        url = stack.enter_context(server.vllm(prepare.teacher())).url if served else ""
        for cell in cells:
            run(cell, url)
    page()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
