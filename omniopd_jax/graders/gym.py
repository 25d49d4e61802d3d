"""Grader for the procedural problems of reasoning-gym, by the data set's own rule; right is a full score.

A reference names a problem, which can be made anew from its name: 'DATASET:SEED:SIZE:INDEX'. The problem is made here,
but the rule is applied to a response in a process of its own (gym_worker.py): some rules evaluate the response as
Python, and any of them may take for ever.
"""

import base64
import functools
import importlib.util
import json
import pickle
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from omniopd_jax.errors import UserError
from omniopd_jax.graders.processes import Pool
from omniopd_jax.graders.program_text import after_thinking

_BOX = re.compile(r"\\boxed\s*\{")
LONGEST = 100_000  # characters of an answer


@functools.cache
def dataset(name: str, seed: int, size: int):
    """The data set of that name: entry i is a function of (name, seed, size, i).

    Raises:
      UserError: reasoning-gym is missing, or has no such set.
    """
    check_name(name)
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=size)


def check_name(name: str) -> None:
    """Raises a UserError where reasoning-gym is missing, or has no data set `name`."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("procedural problems need reasoning-gym: pip install reasoning-gym") from error
    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no data set {name!r}; it has: {', '.join(sorted(DATASETS))}")


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} behind a text's thoughts holds, its braces balanced; None where there is none or it isn't
    closed."""
    text = after_thinking(text)
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
    r"""Whether the last \boxed{} of a response is the answer, or the whole response where it has no box.

    Scores in up to `workers` processes, started when needed. Safe to share between threads.
    """

    @staticmethod
    def extract(text: str) -> str | None:
        """What is scored of a response, and voted by."""
        boxed = last_boxed(text)
        return (after_thinking(text).strip() or None) if boxed is None else boxed

    def __init__(self, *, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096):
        self._pool = Pool(
            "gym_worker", "reasoning_gym grader", seconds=seconds, workers=workers, memory_mb=memory_mb,
            missing="pip install reasoning-gym",
        )  # fmt: skip
        self.workers = self._pool.workers

    def grade(self, text: str, reference: str) -> bool:
        """Whether `text` answers the problem that `reference` names. False for what could not be scored in time."""
        name, seed, size, index = reference.split(":")
        entry = dataset(name, int(seed), int(size))[int(index)]
        answer = self.extract(text) or ""
        if len(answer) > LONGEST:
            return False
        problem, packed = [name, int(seed), int(size)], base64.b64encode(pickle.dumps(entry)).decode()
        lines = [json.dumps(order).encode() + b"\n" for order in (problem, [*problem, packed, answer])]
        return self._pool.ask(lines[1], first=lines[0]) == b"true\n"

    def grade_all(self, texts: Iterable[str], answers: Iterable[str]) -> list[bool]:
        """`grade` for each text and its reference, `workers` at a time, in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.grade, texts, answers))

    def check_answer(self, answer) -> None:
        """Raises a UserError unless `answer` names a problem."""
        parts = answer.split(":") if isinstance(answer, str) else []
        if len(parts) != 4 or not all(part.isdecimal() for part in parts[1:]) or int(parts[3]) >= int(parts[2]):
            raise UserError(
                "an answer for reasoning_gym names a problem as DATASET:SEED:SIZE:INDEX, INDEX below SIZE; "
                f"this is {answer!r:.80}"
            )
        check_name(parts[0])

    def check_machine(self) -> None:
        """Raises a UserError where reasoning-gym is missing."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError("procedural problems need reasoning-gym: pip install reasoning-gym")

    def close(self) -> None:
        """Ends the processes; others start if an answer comes."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def make(*, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096) -> GymGrader:
    """A GymGrader that spends at most `seconds` on an answer, in up to `workers` processes (default: one per core, at
    most 4).

    Raises:
      UserError: an impossible setting.
    """
    return GymGrader(seconds=seconds, workers=workers, memory_mb=memory_mb)
