"""Graders: rules that say whether a response is right. A new one is a module with a `make`, and one line in GRADERS.

with graders.make("math") as grader:
    grader.check_answer("1/2")
    grader.grade(r"so it is \\boxed{0.5}", "1/2")             # True
    grader.grade_all([response, response], ["1/2", "1/3"])    # in parallel
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from omniopd_jax.errors import one_of
from omniopd_jax.graders import code, gym, math, small_world


class Grader(Protocol):
    """What every grader does. Safe to share between threads."""

    extract: Callable[[str], str | None] | None = None  # the answer in a text, for majority votes; None: not comparable

    def grade(self, text: str, answer: Any) -> bool | float:
        """How right the response `text` is: true or 1 where it gives `answer`; anything that says so as bool(...)."""

    def grade_all(self, texts: Iterable[str], answers: Iterable) -> list:
        """`grade` for each text and its answer, in order and in parallel."""

    def check_answer(self, answer: Any) -> None:
        """Raises a UserError that names what is wrong where `answer` is of a form that this grader can't compare
        with."""

    def check_machine(self) -> None:
        """Raises a UserError where something that the grader needs is missing on this machine."""

    def close(self) -> None:
        """Ends what the grader started; it would end with this process at the latest."""


GRADERS: dict[str, Callable[..., Grader]] = {  # name -> make(**settings); what they need is imported when they start
    "world": small_world.make,
    "math": math.make,
    "code": code.make,
    "code_unsafe": functools.partial(code.make, unsafe=True),  # as the current user, under rlimits alone
    "reasoning_gym": gym.make,
}


def make(name: str, **settings) -> Grader:
    """The grader of that name, with `settings` of its own module's `make`.

    Raises:
      UserError: an unknown name or setting.
    """
    return GRADERS[one_of(name, GRADERS, "grader")](**settings)


@functools.cache
def shared(name: str) -> Grader:
    """The grader of that name that this process shares, made when first asked for and known to run on this machine.

    Raises:
      UserError: an unknown name, or a machine that can't run it.
    """
    grader = make(name)
    grader.check_machine()
    return grader
