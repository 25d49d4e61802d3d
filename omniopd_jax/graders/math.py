"""Math grader: does a response end in the reference answer? By math-verify, in worker processes that can be killed.

Nothing that a response holds can hang or stop the caller: after `seconds` the worker gives up, a second later it is
ended, and an answer that could not be compared in that time is wrong. Works in any thread.
"""

import importlib.util
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from omniopd_jax.errors import UserError
from omniopd_jax.graders import math_reading
from omniopd_jax.graders.gym import last_boxed
from omniopd_jax.graders.processes import Pool
from omniopd_jax.graders.program_text import after_thinking

NUMBER = re.compile(r"-?\d[\d,]{0,30}(?:\.\d{1,30})?(?:/\d{1,30})?")
LONGEST = 40_000  # characters of a response that go to the worker: its end, and its last box where that comes before
LONGEST_ANSWER = 20_000  # characters of a reference answer


class MathGrader:
    """Compares answers in up to `workers` processes, started when needed. Safe to share between threads."""

    @staticmethod
    def extract(text: str) -> str | None:
        """The answer that a response gives, as it is voted by: its box's, what else marks one, else its last number."""
        if (boxed := last_boxed(text)) is not None:
            return boxed
        try:
            answer, _, prose = math_reading.read(_end_of(text))
        except Exception:  # what no reader foresaw, as a number of 5,000 digits: it is wrong, and votes for nothing
            return None
        numbers = NUMBER.findall(prose) if answer is None else []
        return numbers[-1] if numbers else answer

    def __init__(self, *, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096):
        self._pool = Pool(
            "math_worker", "math grader", seconds=seconds, workers=workers, memory_mb=memory_mb,
            missing="is math-verify installed? pip install math-verify",
        )  # fmt: skip
        self.workers, self.seconds = self._pool.workers, seconds

    def grade(self, text: str, answer: str) -> bool:
        """Whether `text`, a response or an answer alone, gives `answer`. False for what cannot be read or decided.

        Raises:
          UserError: the worker does not start (math-verify is missing, say).
        """
        text, answer = str(text), str(answer)  # some data sets hold numbers
        if len(answer) > LONGEST_ANSWER:
            return False
        return self._pool.ask(json.dumps([_end_of(text), answer]).encode() + b"\n") == b"true\n"

    def grade_all(self, texts: Iterable[str], answers: Iterable[str]) -> list[bool]:
        """`grade` for each text and its answer, `workers` at a time, in order.

        Raises:
          UserError: as `grade`.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.grade, texts, answers))

    def check_answer(self, answer) -> None:
        """Raises a UserError unless `answer` is text or a number."""
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            kind = "null" if answer is None else f"{type(answer).__name__} {answer!r:.60}"
            raise UserError(f"an answer for the math grader is text or a number; this is {kind}")
        if not str(answer).strip():
            raise UserError("an answer for the math grader is text or a number; this is empty")
        if len(str(answer)) > LONGEST_ANSWER:
            raise UserError(
                f"an answer for the math grader has at most {LONGEST_ANSWER} characters; this has {len(str(answer))}"
            )

    def check_machine(self) -> None:
        """Raises a UserError where math-verify is missing."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the math grader needs math-verify: pip install math-verify")

    def close(self) -> None:
        """Ends the processes; others start if an answer comes."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make(*, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096) -> MathGrader:
    """A MathGrader that spends at most `seconds` on a pair, in up to `workers` processes (default: one per core, at
    most 4).

    Raises:
      UserError: an impossible setting.
    """
    return MathGrader(seconds=seconds, workers=workers, memory_mb=memory_mb)


def _end_of(text):
    """The part of a response, behind its thoughts, that can hold its answer."""
    text = after_thinking(text)
    if len(text) <= LONGEST:
        return text
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if 0 <= box < len(text) - LONGEST:
        return text[max(0, box - 200) : box + LONGEST]
    return text[-LONGEST:]
