"""Code grader: takes the program out of a response and runs it against its tests in the sandbox (sandbox/).

The expected output never enters the sandbox, and the assert tests run in another process than the program, so that a
program passes by answering right and not by printing, exiting, patching or comparing equal to everything. What a
program can still do: see the inputs of its own calls, and lie through a helper that the tests take from it by name.
Programs and tests have the standard library alone. The hash seed is fixed, so that two gradings agree.

Verdicts are those of the benchmarks' own harnesses: HumanEval's prompt goes before a completion, LiveCodeBench's
imports and recursion limit before programs that read stdin or define `Solution`, a tuple is as good as a list in the
latter. They allow so much time a case; here a problem has one limit, which grows by a second with each case.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, DecimalException

from omniopd_jax.errors import UserError
from omniopd_jax.graders import code_tests
from omniopd_jax.graders.program_text import candidates, extract_program
from omniopd_jax.graders.sandbox import MOST_PROGRAM_CHARS, Limits, Sandbox

REASONS = ("ok", "wrong_answer", "error", "timeout", "memory", "output")
MOST_CASES_SECONDS = 60  # that a problem's limits on time grow by
TOLERANCE = 1e-6  # of a number in the output, absolute and relative, where the expected one has a point
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,5})?")

__all__ = ["CodeGrader", "Verdict", "extract_program", "make"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The grade of one program; true where it passed."""

    passed: bool
    reason: str  # one of REASONS
    detail: str = ""  # short: the last line of stderr, or the first difference

    def __bool__(self):
        return self.passed

    def __float__(self):
        return float(self.passed)


class CodeGrader:
    """Grades Python programs, each in a sandbox of its own. Safe to share between threads."""

    extract = None

    def __init__(
        self, *, limits: Limits | None = None, workers: int | None = None, unsafe: bool = False, isolation=None
    ):
        self.workers = workers or os.cpu_count() or 1
        self._sandbox = Sandbox(limits or Limits(), unsafe=unsafe, isolation=isolation)

    def grade(self, text: str, answer: str | dict | list) -> Verdict:
        """Runs the program in `text` against the tests `answer`.

        Args:
          text: a response, its program in a fenced block, or Python source alone.
          answer: tests in any form of code_tests.py, or their JSON text.

        Raises:
          UserError: tests of another form, or a machine that can't isolate programs.
        """
        tests = code_tests.read(answer)
        if len(text) > MOST_PROGRAM_CHARS:
            return Verdict(False, "error", f"the response has {len(text)} characters")
        programs = candidates(text, tests.asked, tests.prompt)
        preamble = code_tests.preamble(*programs) if tests.as_livecodebench else ""
        how = {"preamble": preamble, "limits": self._limits_of(tests)}
        if tests.asserts is not None:
            return self._assert(programs, tests, how)
        right = 0
        with contextlib.closing(self._sandbox.run(programs, stdin=tests.inputs, **how)) as told:
            for answer, expected in zip(told, tests.outputs):
                if answer["reason"] != "exit":
                    return Verdict(False, answer["reason"], answer["detail"])
                if answer["code"]:
                    return Verdict(False, "error", answer["detail"] or f"exit code {answer['code']}")
                difference = _difference(answer["stdout"], expected)
                if difference:
                    return Verdict(False, "wrong_answer", difference)
                right += 1
        if right < len(tests.outputs):
            return Verdict(False, "error", "the sandbox ended early")
        return Verdict(True, "ok")

    def _assert(self, programs, tests, how) -> Verdict:
        order = {
            "source": tests.asserts, "entry_point": tests.entry_point, "names": tests.names, "modules": tests.modules,
            "maybe": tests.maybe, "preamble": code_tests.preamble(tests.asserts) if tests.as_livecodebench else None,
        }  # fmt: skip
        with contextlib.closing(self._sandbox.run(programs, asserts=order, **how)) as told:
            last = next(told, {"reason": "timeout", "detail": "the sandbox did not answer"})
        return Verdict(last["reason"] == "ok", last["reason"], last["detail"])

    def _limits_of(self, tests) -> Limits:
        own = self._sandbox.limits
        if not tests.as_livecodebench:
            return own
        more = float(min(tests.count, MOST_CASES_SECONDS))
        # on stdin each case has the limits of a run
        grown = ("total_seconds",) if tests.asserts is None else ("cpu_seconds", "wall_seconds", "total_seconds")
        return dataclasses.replace(own, **{name: getattr(own, name) + more for name in grown})

    def grade_all(self, texts: Iterable[str], answers: Iterable) -> list[Verdict]:
        """`grade` for each text and its answer, `workers` at a time, in order.

        Raises:
          UserError: as `grade`.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.grade, texts, answers))

    def check_answer(self, answer: str | dict | list) -> None:
        """Raises a UserError that says what is wrong where `answer` is no tests of a program."""
        code_tests.read(answer)

    def check_machine(self) -> None:
        """Raises a UserError where this machine can't isolate programs."""
        for _ in self._sandbox.run([""], stdin=[""]):
            pass

    def close(self) -> None:
        """Ends the server process; it would end with this object or this process at the latest."""
        self._sandbox.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make(*, workers: int | None = None, unsafe: bool = False, isolation: str | None = None, **limits) -> CodeGrader:
    """A CodeGrader; `limits` are the fields of `Limits`, `isolation` is "bubblewrap", "namespaces" or None for what
    works.

    Raises:
      UserError: an unknown or impossible limit.
    """
    known = {field.name for field in dataclasses.fields(Limits)}
    for name in limits:
        if name not in known:
            raise UserError(f"code grader setting {name!r} is unknown; choose among: {', '.join(sorted(known))}")
    return CodeGrader(limits=Limits(**limits), workers=workers, unsafe=unsafe, isolation=isolation)


def _difference(got: str, expected: str) -> str:
    """What differs first, or "": lines without the space around them and around the whole, numbers by value."""
    mine, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (got, expected))
    if len(mine) != len(theirs):
        return f"{len(mine)} lines, expected {len(theirs)}"
    for number, (a, b) in enumerate(zip(mine, theirs), 1):
        if a != b and not _same_tokens(a.split(), b.split()):
            return f"line {number}: {a[:60]!r}, expected {b[:60]!r}"
    return ""


def _same_tokens(mine, theirs):
    return len(mine) == len(theirs) and all(a == b or _same_number(a, b) for a, b in zip(mine, theirs))


def _same_number(a, b):
    """Whether two numbers are equal, or within TOLERANCE where the expected one, `b`, has a point."""
    if not (_NUMBER.fullmatch(a) and _NUMBER.fullmatch(b)):
        return False
    try:
        if Decimal(a) == Decimal(b):
            return True
        x, y = float(a), float(b)
        return "." in b and abs(x - y) <= TOLERANCE * max(1.0, abs(y)) < float("inf")
    except (DecimalException, ValueError, OverflowError):
        return False
