"""Code grader: runs a program against stdin/stdout or assert tests in the sandbox (sandbox.py and jail/).

The expected output never enters the sandbox, and the assert tests run in another process than the program, so that a
program passes by answering right and not by printing, exiting, patching or comparing equal to everything. What a
program can still do: see the inputs of its own calls, and lie through a helper that the tests take from it by name.
Programs have the standard library alone. The hash seed is fixed, so that two gradings agree.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation

from omniopd_jax.errors import UserError
from omniopd_jax.graders.sandbox import MOST_PROGRAM_CHARS, Limits, Sandbox

REASONS = ("ok", "wrong_answer", "error", "timeout", "memory", "output")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The grade of one program; true where it passed."""

    passed: bool
    reason: str  # one of REASONS
    detail: str = ""  # short: the last line of stderr, or the first difference

    def __bool__(self):
        return self.passed


class CodeGrader:
    """Grades Python programs, each in a sandbox of its own. Safe to share between threads."""

    def __init__(self, *, limits: Limits | None = None, workers: int | None = None, unsafe: bool = False):
        self.workers = workers or os.cpu_count() or 1
        self._sandbox = Sandbox(limits or Limits(), unsafe=unsafe)

    def grade(self, program: str, tests: dict | list) -> Verdict:
        """Runs `program` against `tests`.

        Args:
          program: Python source, without a fence (`extract_program`).
          tests: {"stdin": text or list, "stdout": text or list}, a list of such dicts, or {"asserts": source or list of
            sources, "entry_point": name, optional}. A function `check(candidate)` in the asserts is called with the
            entry point, which then must be given.

        Raises:
          UserError: tests of another form, or a machine that can't isolate programs.
        """
        inputs, outputs, asserts, entry_point = _read_tests(tests)
        if len(program) > MOST_PROGRAM_CHARS:
            return Verdict(False, "error", f"the program has {len(program)} characters")
        if asserts is not None:
            with contextlib.closing(self._sandbox.run(program, asserts=asserts, entry_point=entry_point)) as told:
                last = next(told, {"reason": "timeout", "detail": "the sandbox did not answer"})
            return Verdict(last["reason"] == "ok", last["reason"], last["detail"])
        right = 0
        with contextlib.closing(self._sandbox.run(program, stdin=inputs)) as told:
            for answer, expected in zip(told, outputs):
                if answer["reason"] != "exit":
                    return Verdict(False, answer["reason"], answer["detail"])
                if answer["code"]:
                    return Verdict(False, "error", answer["detail"] or f"exit code {answer['code']}")
                difference = _difference(answer["stdout"], expected)
                if difference:
                    return Verdict(False, "wrong_answer", difference)
                right += 1
        if right < len(outputs):
            return Verdict(False, "error", "the sandbox ended early")
        return Verdict(True, "ok")

    def grade_batch(self, pairs: Iterable[tuple[str, dict | list]]) -> list[Verdict]:
        """`grade` for each (program, tests), `workers` at a time, in order.

        Raises:
          UserError: as `grade`.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: self.grade(*pair), pairs))

    def close(self) -> None:
        """Ends the server process; it would end with this object or this process at the latest."""
        self._sandbox.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make(*, workers: int | None = None, unsafe: bool = False, **limits) -> CodeGrader:
    """A CodeGrader; `limits` are the fields of `Limits`.

    Raises:
      UserError: an unknown or impossible limit.
    """
    known = {field.name for field in dataclasses.fields(Limits)}
    for name in limits:
        if name not in known:
            raise UserError(f"code grader setting {name!r} is unknown; choose among: {', '.join(sorted(known))}")
    return CodeGrader(limits=Limits(**limits), workers=workers, unsafe=unsafe)


def extract_program(text: str) -> str:
    """The program in a model's response: the last fenced block that says Python or nothing, else the whole text."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in ("", "python", "python3", "py")]
    return blocks[-1] if blocks else text


def _read_tests(tests):
    """(inputs, outputs, asserts, entry point) of any of the forms that `grade` takes."""
    if isinstance(tests, dict) and "asserts" in tests:
        asserts = tests["asserts"]
        return None, None, asserts if isinstance(asserts, str) else "\n".join(asserts), tests.get("entry_point")
    pairs = [tests] if isinstance(tests, dict) else list(tests)
    inputs, outputs = [], []
    for pair in pairs:
        if not isinstance(pair, dict) or not {"stdin", "stdout"} <= set(pair):
            raise UserError("code tests need 'stdin' and 'stdout', or 'asserts'")
        inputs += [pair["stdin"]] if isinstance(pair["stdin"], str) else list(pair["stdin"])
        outputs += [pair["stdout"]] if isinstance(pair["stdout"], str) else list(pair["stdout"])
    if not inputs or len(inputs) != len(outputs):
        raise UserError(f"code tests hold {len(inputs)} inputs and {len(outputs)} outputs: need as many, at least one")
    return inputs, outputs, None, None


def _difference(got: str, expected: str) -> str:
    """What differs first, or "": lines without the space at their ends, numbers by value."""
    mine, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (got, expected))
    if len(mine) != len(theirs):
        return f"{len(mine)} lines, expected {len(theirs)}"
    for number, (a, b) in enumerate(zip(mine, theirs), 1):
        if a != b and not _same_tokens(a.split(), b.split()):
            return f"line {number}: {a[:60]!r}, expected {b[:60]!r}"
    return ""


def _same_tokens(mine, theirs):
    return len(mine) == len(theirs) and all(a == b or _same_number(a, b) for a, b in zip(mine, theirs))


def _same_number(a, b):
    try:
        return Decimal(a) == Decimal(b)
    except (InvalidOperation, ValueError):
        return False
