"""Accuracy at the same teacher tokens bought: one run is one JSON line in docs/results/equal_cost.jsonl, one command
makes tables and plots of them.

    python -m benchmarks.equal_cost --all --minutes=30     # what is missing, in the plan's order; resumes
    python -m benchmarks.equal_cost --table                # page and plots from what is there; runs nothing
    python -m benchmarks.equal_cost --list                 # every cell, done or not, with the command that runs it
    python -m benchmarks.equal_cost --world=forks --method=sft --budget=1 --seed=0           # one cell, stored
    python -m benchmarks.equal_cost --world=forks --method=sft --budget=1 --seed=0 --again   # the same, only printed
    python -m benchmarks.equal_cost --method=sft --budget=1 --rate=2e-4 --again              # a cell of its sweep
"""

import sys

from benchmarks.equal_cost.cells import GRID
from benchmarks.grid import command

if __name__ == "__main__":
    sys.exit(command.main(GRID, __doc__))
