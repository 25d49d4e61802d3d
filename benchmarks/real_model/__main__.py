"""The real model at equal cost: one run is one JSON line in docs/results/real_model.jsonl, one command makes the page.

    python -m benchmarks.real_model --all --minutes=60     # what is missing, in the plan's order; resumes
    python -m benchmarks.real_model --table                # the page from what is there; runs nothing
    python -m benchmarks.real_model --list                 # every cell, done or not, with the command that runs it
    python -m benchmarks.real_model --method=sft --budget=1 --seed=0           # one cell, stored
    python -m benchmarks.real_model --method=sft --budget=1 --seed=0 --again   # the same, only printed

What it needs (benchmarks.real.prepare) is made where it is missing; servers are started and stopped.
"""

import sys

from benchmarks.grid import command
from benchmarks.real import server
from benchmarks.real_model import cells

if __name__ == "__main__":
    with server.ended_by_signals(), cells.SERVED:
        sys.exit(command.main(cells.GRID, __doc__))
