"""Graders: rules that say whether a response is right. A new one is a module with a `make`, and one line in GRADERS.

    with graders.make("math") as grader:
        grader.check_answer("1/2")
        grader.grade(r"so it is \\boxed{0.5}", "1/2")             # True
        grader.grade_all([response, response], ["1/2", "1/3"])    # in parallel
"""

import importlib
from collections.abc import Iterable
from typing import Any, Protocol

from omniopd_jax.errors import one_of

GRADERS = {  # name -> (module with a `make`, settings that the name stands for); imported when asked for
    "world": ("omniopd_jax.graders.small_world", {}),
    "math": ("omniopd_jax.graders.math", {}),
    "code": ("omniopd_jax.graders.code", {}),
    "code_unsafe": ("omniopd_jax.graders.code", {"unsafe": True}),  # as the current user, under rlimits alone
    "reasoning_gym": ("omniopd_jax.graders.gym", {}),
}


class Grader(Protocol):
    """What every grader does. Safe to share between threads."""

    def grade(self, text: str, answer: Any) -> bool | float:
        """How right the response `text` is: true or 1 where it gives `answer`; anything that says so as bool(...)."""

    def grade_all(self, texts: Iterable[str], answers: Iterable) -> list:
        """`grade` for each text and its answer, in order and in parallel."""

    def check_answer(self, answer: Any) -> None:
        """Raises a UserError that names what is wrong where `answer` is of a form that this grader can't compare with."""

    def check_machine(self) -> None:
        """Raises a UserError where something that the grader needs is missing on this machine."""

    def close(self) -> None:
        """Ends what the grader started; it would end with this process at the latest."""


def make(name: str, **settings) -> Grader:
    """The grader of that name, with `settings` of its own module's `make`.

    Raises:
      UserError: an unknown name or setting.
    """
    module, own = GRADERS[one_of(name, GRADERS, "grader")]
    return importlib.import_module(module).make(**own | settings)
