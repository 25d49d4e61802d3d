"""Grader for the procedural problems of reasoning-gym, by the data set's own rule; right is a full score.

A reference names a problem, which can be made anew from its name: 'DATASET:SEED:SIZE:INDEX'.
"""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterable

from omniopd_jax.errors import UserError

_BOX = re.compile(r"\\boxed\s*\{")


@functools.cache
def dataset(name: str, seed: int, size: int):
    """The data set of that name: entry i is a function of (name, seed, size, i).

    Raises:
      UserError: reasoning-gym is missing, or has no such set.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("procedural problems need reasoning-gym: pip install reasoning-gym") from error
    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no data set {name!r}; it has: {', '.join(sorted(DATASETS))}")
    return reasoning_gym.create_dataset(name, seed=seed, size=size)


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} of a text holds, its braces balanced; None where there is none or it isn't closed."""
    starts = [m.end() for m in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for at in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[starts[-1] : at].strip()
    return None


class GymGrader:
    r"""Whether the last \boxed{} of a response is the answer, or the whole response where it has no box."""

    extract = staticmethod(last_boxed)

    def grade(self, text: str, reference: str) -> bool:
        """Whether `text` answers the problem that `reference` names."""
        name, seed, size, index = reference.split(":")
        problems = dataset(name, int(seed), int(size))
        answer = last_boxed(text)
        with contextlib.suppress(Exception):  # the rules of a hundred sets, each with its own way to fail on odd text
            return problems.score_answer(text.strip() if answer is None else answer, problems[int(index)]) >= 1
        return False

    def grade_all(self, texts: Iterable[str], answers: Iterable[str]) -> list[bool]:
        """`grade` for each text and its reference."""
        return [self.grade(text, answer) for text, answer in zip(texts, answers, strict=True)]

    def check_answer(self, answer) -> None:
        """Raises a UserError unless `answer` names a problem."""
        parts = answer.split(":") if isinstance(answer, str) else []
        if len(parts) != 4 or not all(part.isdecimal() for part in parts[1:]) or int(parts[3]) >= int(parts[2]):
            raise UserError(
                "an answer for reasoning_gym names a problem as DATASET:SEED:SIZE:INDEX, INDEX below SIZE; "
                f"this is {answer!r:.80}"
            )

    def check_machine(self) -> None:
        """Raises a UserError where reasoning-gym is missing."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError("procedural problems need reasoning-gym: pip install reasoning-gym")

    def close(self) -> None:
        """Nothing to free."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make() -> GymGrader:
    """A GymGrader."""
    return GymGrader()
