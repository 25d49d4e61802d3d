"""Graders: rules that say whether a response is right; a new one is a module with a `make` and a line here."""

import importlib

from omniopd_jax.errors import one_of

GRADERS = {  # name -> module with a `make`; imported when asked for: each has its own dependencies
    "math": "omniopd_jax.graders.math",
    "code": "omniopd_jax.graders.code",
    "reasoning_gym": "omniopd_jax.graders.gym",
}


def make(name: str, **settings):
    """A grader: `.grade(response, reference)`, true where right, `.grade_batch(pairs)` and `.close()`.

    Raises:
      UserError: an unknown name or setting.
    """
    return importlib.import_module(GRADERS[one_of(name, GRADERS, "grader")]).make(**settings)
