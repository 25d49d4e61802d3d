"""Accuracy at the same teacher tokens bought: one run is one JSON line in docs/results/equal_cost.jsonl, one command
makes tables and plots of them.

    python -m benchmarks.equal_cost --all --minutes=30     # what is missing, in the plan's order; resumes
    python -m benchmarks.equal_cost --table                # page and plots from what is there; runs nothing
    python -m benchmarks.equal_cost --list                 # every cell, done or not, with the command that runs it
    python -m benchmarks.equal_cost --world=forks --method=sft --budget=1 --seed=0           # one cell, stored
    python -m benchmarks.equal_cost --world=forks --method=sft --budget=1 --seed=0 --again   # the same, only printed
    python -m benchmarks.equal_cost --method=sft --budget=1 --rate=2e-4 --again              # a cell of its sweep
"""

import argparse
import json
import pathlib
import sys
import time

from absl import flags

from benchmarks import sides
from benchmarks.equal_cost import grid as g
from benchmarks.equal_cost import page
from benchmarks.equal_cost.cells import FRONTIER, GRID, LONG, METHODS, WORLDS, finalists, is_hopeless
from omniopd_jax.errors import UserError
from omniopd_jax.run import cli


def fill(grid: g.Grid, minutes: float, pause: str) -> None:
    """Runs missing cells in the plan's order until the time is up; the last one begun is finished."""
    started, failed = time.time(), set()
    while time.time() - started < 60 * minutes:
        if pause and pathlib.Path(pause).exists():
            time.sleep(2)
            continue
        lines = grid.lines()
        cell = next((c for c in missing(grid, lines) if c not in failed), None)
        if cell is None:
            return
        try:
            g.append(grid, g.run(grid, cell, lines))
        except (UserError, FloatingPointError) as error:
            print(f"error: {cell}: {error}", file=sys.stderr, flush=True)
            failed.add(cell)


def missing(grid: g.Grid, lines: list[dict]):
    """The cells of the plan without a line whose rate is known."""
    for cell in grid.plan(grid, lines):
        if cell.rate is not None:
            if g.is_wanted(grid, cell, lines):
                yield cell
        elif g.result(grid, cell, lines) is None and g.rate(grid, cell.method, cell.budget, lines) is not None:
            yield cell


def body(grid: g.Grid, lines: list[dict]) -> str:
    """The page's tables; draws the plots."""
    plan = grid.plan(grid, lines)
    ran = sum(state(grid, c, lines) == DONE for c in plan)
    left_out = [m for m in METHODS if is_hopeless(grid, m, lines)]
    out = [f"{ran} of {len(plan)} cells of the plan have run. Left out by the rule: {', '.join(left_out) or 'none'}. "
           f"Finalists: {', '.join(finalists(grid, lines)) or 'not known yet'}."]  # fmt: skip
    for world in WORLDS:
        out += [f"## {world}", f"Base student: {page.base(grid, world, lines)}.",
                page.accuracy_table(grid, world, METHODS, lines),
                page.difference_table(grid, world, [m for m in METHODS if m != "sft"], "sft", lines),
                f"What budget 1 bought in {world}:", page.bought_table(grid, world, METHODS, lines, 1.0)]  # fmt: skip
        if page.plot(grid, world, METHODS, lines):
            out.append(f"![accuracy against tokens bought and dollars]({grid.name}_{world}.png)")
    settings, small = ["omni_baseline", "omni_adaptive", *FRONTIER], [b for b in grid.budgets if b <= 1]
    out += ["## The frontier of OmniOPD (forks)", "M = 2, N = 4, C = 8 is `omni_baseline`.",
            page.accuracy_table(grid, "forks", settings, lines, small),
            page.difference_table(grid, "forks", settings[1:], "omni_baseline", lines, small),
            page.bought_table(grid, "forks", settings, lines, 1.0), "## Long runs"]  # fmt: skip
    for world in ("forks", "style"):
        out += [f"In {world}:", page.long_table(grid, world, LONG, lines)]
    out += ["## The sweeps (forks, validation split)",
            page.sweep_table(grid, [m for m, method in METHODS.items() if not method.like], lines)]  # fmt: skip
    return "\n\n".join(out)


DONE, SKIPPED, OPEN = "done", "skipped", "not run"


def state(grid: g.Grid, cell: g.Cell, lines: list[dict]) -> str:
    """Whether a cell of the plan has its line; a rate that was hopeless at the budget before is skipped."""
    if g.result(grid, cell, lines) is not None:
        return DONE
    return SKIPPED if cell.rate is not None and not g.is_wanted(grid, cell, lines) else OPEN


def main() -> int:
    """Runs what is asked for, then writes page and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="whatever is missing, in the plan's order")
    parser.add_argument("--minutes", type=float, default=1e9, help="--all: start nothing after this many")
    parser.add_argument("--pause", default="", help="--all: start nothing while this file exists")
    parser.add_argument("--table", action="store_true", help="only write page and plots")
    parser.add_argument("--list", action="store_true", help="print every cell and its command")
    parser.add_argument("--world", choices=WORLDS, default="forks")
    parser.add_argument("--method", choices=GRID.methods)
    parser.add_argument("--budget", type=float, choices=GRID.budgets, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="a cell of the sweep, on the validation split")
    parser.add_argument("--again", action="store_true", help="run although there is a line, and only print the new one")
    args = parser.parse_args()
    lines = GRID.lines()
    if args.list:
        for cell in GRID.plan(GRID, lines):
            print(f"{state(GRID, cell, lines):8}{GRID.command(cell)}")
        return 0
    if args.method or args.all:
        flags.FLAGS(["equal_cost"])
        cli.setup_jax()
    if args.method:
        seed = args.seed if args.rate is None else g.SWEEP_SEED
        cell = g.Cell(args.world, args.method, args.budget, seed, args.rate)
        line = g.run(GRID, cell, lines, fresh=args.again)
        print(json.dumps(line), flush=True) if args.again else g.append(GRID, line)
    if args.all:
        fill(GRID, args.minutes, args.pause)
    if not args.again:
        sides.write_page(GRID.name, body(GRID, GRID.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
