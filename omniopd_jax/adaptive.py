"""Adaptive N: a chunk's continuations are asked in rounds, and no more once its agreement is known well enough (ours).

A chunk is settled where the standard error of its mean similarity is small, or where its mean is so far from the
previous step's that the sign of its advantage is not in doubt. The variance of a few samples is a poor guess (three
equal texts have none at all), so it is pulled towards SPREAD by PRIOR samples' worth: without that, stopping prefers
chunks that agree by luck. What bias is left is measured on recorded audits: docs/results/methods.md.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from omniopd_jax import audit
from omniopd_jax.audit import Audit
from omniopd_jax.teachers.protocol import ContinuationResult, Teacher

PRIOR, SPREAD = 2.0, 0.25  # samples' worth, and the standard deviation of phi that they stand for


def settled(value_N: np.ndarray, before: float | None, cfg) -> bool:
    """Whether the similarities that have arrived say enough.

    Args:
      before: the previous step's mean of k_sem / n; None in a first step, and where no baseline is taken off.
    """
    n = len(value_N)
    if n < 2:
        return False
    mean = float(np.mean(value_N))
    spread = float(np.square(value_N - mean).sum()) + PRIOR * SPREAD**2
    error = (spread / (n - 1 + PRIOR) / n) ** 0.5
    if error <= cfg.audit.adaptive_error:
        return True
    return before is not None and abs(mean - before) > cfg.audit.adaptive_sign * error


async def ask(teacher: Teacher, audits: list[Audit], values: Callable, before: float | None, cfg) -> None:
    """As `audit.ask`, in rounds of `audit.adaptive_first` continuations; an audit's request then says what was asked.

    Args:
      values: audits -> the similarities of what has arrived, one array for each.
    """
    wanted = [a.request for a in audits]
    results = [ContinuationResult(()) for _ in audits]
    left, step, start = list(range(len(audits))), cfg.audit.adaptive_first, 0
    while left:
        for i in left:
            audits[i].request = dataclasses.replace(wanted[i], indices=wanted[i].indices[start : start + step])
        await audit.ask(teacher, [audits[i] for i in left])
        for i in left:
            results[i] = audits[i].result = _joined(results[i], audits[i].result)
            audits[i].request = dataclasses.replace(wanted[i], indices=wanted[i].indices[: start + step])
        start += step
        left = [i for i in left if start < len(wanted[i].indices)]
        known = values([audits[i] for i in left])
        left = [i for i, value_N in zip(left, known, strict=True) if not settled(value_N, before, cfg)]


def _joined(a: ContinuationResult, b: ContinuationResult) -> ContinuationResult:
    """Two rounds of one audit; the rounds' times add up."""
    return ContinuationResult(
        a.continuations + b.continuations, a.failures + b.failures, a.usage + b.usage, a.latency_s + b.latency_s,
        a.replayed + b.replayed,
    )  # fmt: skip


def replay(value_AN: np.ndarray, before: float | None, cfg) -> tuple[np.ndarray, np.ndarray]:
    """What rounds would have made of audits that were asked in full.

    Args:
      value_AN: A recorded audits, their similarities in the order of their indices.

    Returns:
      (mean similarity at the stop, how many were asked), each [A].
    """
    mean_A, asked_A = np.zeros(len(value_AN)), np.zeros(len(value_AN), int)
    for i, value_N in enumerate(value_AN):
        n = cfg.audit.adaptive_first
        while n < len(value_N) and not settled(value_N[:n], before, cfg):
            n += cfg.audit.adaptive_first
        asked_A[i] = min(n, len(value_N))
        mean_A[i] = value_N[: asked_A[i]].mean()
    return mean_A, asked_A
