"""How much code one training step is: lines of every function that runs, plus the head of its file.

    python -m benchmarks.step_path    from the repository's root; one step of configs/tiny.py, half a minute

Runs the main command for one step with a profiler that notes each function of the package that is called, jitted ones
while they are traced: up to the weight update inside the loop, in the whole loop, and from the start to the end.
Counted of a file: its head (up to the first function or class), each function that ran, whole, and of a class with such
a function what stands outside its functions. The small worlds' own files are data, and left out.
"""

import argparse
import ast
import collections
import pathlib
import sys
import tempfile
import threading
import unittest.mock

import omniopd_jax
from configs import tiny
from omniopd_jax import train
from omniopd_jax.run import reporting

PARTS = ("update", "loop", "command")
PACKAGE = pathlib.Path(omniopd_jax.__file__).parent


def calls_of(run) -> dict[str, dict[pathlib.Path, set[int]]]:
    """{part: {file of the package: first lines of the functions that were called}} of `run()`, in all threads.

    The parts: `command` from the start to the end, `loop` inside of train.loop, `update` there up to the report of the
    weight update.
    """
    seen = {part: collections.defaultdict(set) for part in PARTS}
    active = {"command"}
    loop, add = train.loop, reporting.Reports.add

    def note(frame, event, _):
        if event == "call":
            for part in tuple(active):
                seen[part][frame.f_code.co_filename].add(frame.f_code.co_firstlineno)

    def noted_loop(*args):
        active.update(PARTS)
        try:
            return loop(*args)
        finally:
            active.intersection_update({"command"})

    def noted_add(*args):
        active.discard("update")
        return add(*args)

    with (
        unittest.mock.patch.object(train, "loop", noted_loop),
        unittest.mock.patch.object(reporting.Reports, "add", noted_add),
    ):
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return {part: {pathlib.Path(f): n for f, n in files.items() if f.startswith(str(PACKAGE))}
            for part, files in seen.items()}  # fmt: skip


def lines_of(path: pathlib.Path, called: set[int]) -> int:
    """Lines of a file that belong to the step."""
    tree, counted = ast.parse(path.read_text()), set()
    parts = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    first = min((_span(n)[0] for n in parts), default=len(path.read_text().splitlines()) + 1)
    counted |= set(range(1, first))

    def ran(node) -> bool:
        return any(isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and _span(n)[0] in called
                   or getattr(n, "lineno", None) in called for n in ast.walk(node))  # fmt: skip

    for node in parts:
        if not isinstance(node, ast.ClassDef):
            counted |= set(range(*_span(node))) if ran(node) else set()
            continue
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        if not inner or any(ran(n) for n in inner):
            counted |= set(range(*_span(node)))
            for n in inner:
                counted -= set() if ran(n) else set(range(*_span(n)))
    return len(counted)


def _span(node) -> tuple[int, int]:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), node.end_lineno + 1


def main() -> None:
    """Runs one step and prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny.get_config()
        cfg.run_dir, cfg.num_steps, cfg.eval.num_prompts = folder, 1, 0
        called = calls_of(lambda: train.train(cfg))
    counts = {
        part: {p.relative_to(PACKAGE): lines_of(p, n) for p, n in files.items() if "world" not in p.parts}
        for part, files in called.items()
    }
    print(("{:>14}" * len(PARTS) + "  file").format(*PARTS))
    for path in sorted(counts["command"], key=lambda p: [-counts[part].get(p, 0) for part in PARTS]):
        print(("{:14,}" * len(PARTS)).format(*(counts[part].get(path, 0) for part in PARTS)), f" {path}")
    print("".join(f"{sum(c.values()):>8,} in {len(c):>2}" for c in counts.values()), " lines in files")


if __name__ == "__main__":
    main()
