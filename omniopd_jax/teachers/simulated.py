"""A teacher with a known distribution over continuations: for tests of the estimator and of the traffic around it."""

import asyncio
import json
import pathlib

import numpy as np

from omniopd_jax.errors import UserError
from omniopd_jax.teachers.protocol import (
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    Counts,
    Failure,
    Teacher,
    Usage,
)


class SimulatedTeacher(Teacher):
    """Draws each continuation independently from `texts` with `probs`, by the request's own seed.

    Args:
      texts, probs: the distribution, or a function of the request that returns both.
      latency: request -> seconds, or None for none.
      fails: (request, index) -> bool: which continuations never arrive.
    """

    def __init__(self, texts, probs=None, *, latency=None, fails=None):
        self._distribution = texts if callable(texts) else lambda request: (texts, probs)
        self._latency = latency
        self._counts = Counts()
        self._fails = fails or (lambda request, index: False)

    async def check(self) -> str:
        """Always there."""
        return "simulated teacher: a known distribution"

    async def continue_text(self, request: ContinuationRequest) -> ContinuationResult:
        """Draws the wanted indices; the same request gives the same answer."""
        seconds = self._latency(request) if self._latency else 0.0
        await asyncio.sleep(seconds)
        texts, probs = self._distribution(request)
        good = [i for i in request.indices if not self._fails(request, i)]
        drawn = [np.random.default_rng(request.seed(i)).choice(len(texts), p=probs) for i in good]
        result = ContinuationResult(
            tuple(Continuation(i, texts[k], "length") for i, k in zip(good, drawn, strict=True)),
            tuple(Failure(i, "simulated failure") for i in request.indices if i not in good),
            Usage(calls=len(request.indices), tokens_out=sum(len(texts[k].split()) for k in drawn)),
            seconds,
        )
        return self._counts.add(result)

    def metrics(self) -> dict[str, float]:
        """Requests, words and seconds since the last call."""
        return self._counts.take()


def make(cfg) -> SimulatedTeacher:
    """From `teacher.model`: a JSON file {"texts": [...], "probs": [...]}.

    Raises:
      UserError: the file is missing or not of that form.
    """
    try:
        spec = json.loads(pathlib.Path(cfg.teacher.model).read_text())
        texts, probs = list(map(str, spec["texts"])), np.asarray(spec["probs"], float)
        if len(texts) != len(probs) or not np.isclose(probs.sum(), 1.0) or (probs < 0).any():
            raise ValueError("texts and probs must be of one length, probs non-negative with sum 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"teacher.model = {cfg.teacher.model!r} is no simulated teacher: {error}") from error
    return SimulatedTeacher(texts, probs)
