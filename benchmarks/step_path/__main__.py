"""How much code one training step is: lines of every function that runs, plus the head of its file.

    python -m benchmarks.step_path [--loop]   from the repository's root; one step of configs/tiny.py, half a minute

Runs the main command for one step, or counts its loop alone (what comes after the set-up), with a profiler that notes
each function of the package that is called, jitted ones while they are traced. Counted of a file: its head (up to the
first function or class), each function that ran, whole, and of a class with such a function what stands outside its
functions. The small worlds' own files are data, and left out.
"""

import argparse
import ast
import collections
import functools
import pathlib
import sys
import tempfile
import threading
import unittest.mock

import omniopd_jax
from configs import tiny
from omniopd_jax import train

PACKAGE = pathlib.Path(omniopd_jax.__file__).parent


def calls_of(run) -> dict[pathlib.Path, set[int]]:
    """{file of the package: first lines of the functions that `run()` called}, in all threads."""
    seen = collections.defaultdict(set)

    def note(frame, event, _):
        if event == "call":
            seen[frame.f_code.co_filename].add(frame.f_code.co_firstlineno)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {pathlib.Path(f): lines for f, lines in seen.items() if f.startswith(str(PACKAGE))}


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


def within(module, name: str, run) -> dict[pathlib.Path, set[int]]:
    """`calls_of` of one function of a module alone, while `run()` is at work."""
    seen, real = {}, getattr(module, name)

    def noted(*args, **kwargs):
        out = []
        seen.update(calls_of(lambda: out.append(real(*args, **kwargs))))
        return out[0]

    with unittest.mock.patch.object(module, name, noted):
        run()
    return seen


def main() -> None:
    """Runs one step and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", action="store_true", help="count what runs inside train.loop alone")
    loop = parser.parse_args().loop
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny.get_config()
        cfg.run_dir, cfg.num_steps, cfg.eval.num_prompts = folder, 1, 0
        run = functools.partial(train.train, cfg)
        called = within(train, "loop", run) if loop else calls_of(run)
    table = {p.relative_to(PACKAGE): lines_of(p, lines) for p, lines in called.items() if "world" not in p.parts}
    for path, lines in sorted(table.items(), key=lambda item: -item[1]):
        print(f"{lines:6,}  {path}")
    print(f"{sum(table.values()):6,}  in {len(table)} files")


if __name__ == "__main__":
    main()
