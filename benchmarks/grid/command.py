"""The command of a grid: runs what is asked for, then writes the page."""

import argparse
import json
import pathlib
import sys
import time

from absl import flags

from benchmarks import sides
from benchmarks.grid import runs as g
from omniopd_jax.errors import UserError
from omniopd_jax.run import cli

DONE, SKIPPED, OPEN = "done", "skipped", "not run"


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
            for line in g.run(grid, cell, lines):
                sides.append(grid.name, line)
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


def state(grid: g.Grid, cell: g.Cell, lines: list[dict]) -> str:
    """Whether a cell of the plan has its line; a rate that was hopeless at the budget before is skipped."""
    if g.result(grid, cell, lines) is not None:
        return DONE
    return SKIPPED if cell.rate is not None and g.is_hopeless(grid, cell, lines) else OPEN


def progress(grid: g.Grid, lines: list[dict]) -> str:
    """How much of the plan has run."""
    cells = grid.plan(grid, lines)
    return f"{sum(state(grid, c, lines) == DONE for c in cells)} of {len(cells)} cells of the plan have run."


def main(grid: g.Grid, about: str) -> int:
    """Runs what is asked for, then writes page and plots.

    Args:
      about: the command's own documentation.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="whatever is missing, in the plan's order")
    parser.add_argument("--minutes", type=float, default=1e9, help="--all: start nothing after this many")
    parser.add_argument("--pause", default="", help="--all: start nothing while this file exists")
    parser.add_argument("--table", action="store_true", help="only write page and plots")
    parser.add_argument("--list", action="store_true", help="print every cell and its command")
    parser.add_argument("--world", choices=grid.worlds, default=grid.worlds[0])
    parser.add_argument("--method", choices=grid.methods)
    parser.add_argument("--budget", type=float, choices=sorted({*grid.swept, *grid.budgets}), default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="a cell of the sweep, on the validation split")
    parser.add_argument("--again", action="store_true", help="run although there is a line, and only print the new one")
    args = parser.parse_args()
    lines = grid.lines()
    if args.list:
        for cell in grid.plan(grid, lines):
            print(f"{state(grid, cell, lines):8}{grid.command(cell)}")
        return 0
    if args.method or args.all:
        flags.FLAGS([grid.name])
        cli.setup_jax()
    if args.method:
        seed = args.seed if args.rate is None else grid.sweep_seed
        cell = g.Cell(args.world, args.method, args.budget, seed, args.rate)
        try:
            new = g.run(grid, cell, lines, fresh=args.again)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        for line in new:
            print(json.dumps(line), flush=True) if args.again else sides.append(grid.name, line)
    if args.all:
        fill(grid, args.minutes, args.pause)
    if not args.again:
        sides.write_page(grid.name, grid.body(grid, grid.lines()))
    return 0
