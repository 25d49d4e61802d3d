"""Where a prefix of the student's own answer ends and the teacher goes on: the cut rules of continuation fine-tuning.

`zero` is fine-tuning on whole solutions; `fixed` is OLIVE's (arXiv 2609.36246); `uniform` is between them; `peak`
cuts where the student is torn (ours). Plain functions of a response: no teacher, no device.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Cut:
    """A cut rule.

    Attributes:
      places: (open_T, entropy_T, seed, cfg) -> positions, ascending, at most `continuation.cuts`; `open_T` says
        where a cut may be. None: before the first token, so that the student need not answer.
      asks: what the teacher is asked for (`Objective.asks`).
      reads_entropy: the student's responses are scored first.
    """

    places: Callable | None
    asks: str = "prefixes"
    reads_entropy: bool = False


def fixed(open_T, entropy_T, seed: int, cfg) -> list[int]:
    """k, 2 k, .. tokens into the answer, k = `continuation.cut_tokens`; each moved back to where a cut may be."""
    k = cfg.continuation.cut_tokens
    wanted = [k * (i + 1) for i in range(cfg.continuation.cuts) if k * (i + 1) < len(open_T)]
    found = (np.flatnonzero(open_T[: w + 1]) for w in wanted)
    return sorted({int(at[-1]) for at in found if at.size})


def uniform(open_T, entropy_T, seed: int, cfg) -> list[int]:
    """Anywhere in the answer, drawn without replacement by the response's own seed."""
    at = np.flatnonzero(open_T)
    rng = np.random.default_rng(seed)
    return sorted(int(i) for i in rng.choice(at, min(cfg.continuation.cuts, at.size), replace=False))


def peak(open_T, entropy_T, seed: int, cfg) -> list[int]:
    """Before the tokens of highest entropy, at least `audit.chunk_tokens` apart; ties go to the later one."""
    score_T = np.full(len(open_T), -np.inf)  # the place behind the last token has no entropy
    score_T[: len(entropy_T)] = entropy_T
    score_T[~open_T] = -np.inf
    taken: list[int] = []
    while len(taken) < cfg.continuation.cuts and np.isfinite(best := score_T.max(initial=-np.inf)):
        t = int(np.flatnonzero(score_T == best)[-1])
        taken.append(t)
        score_T[max(0, t - cfg.audit.chunk_tokens + 1) : t + cfg.audit.chunk_tokens] = -np.inf
    return sorted(taken)


CUTS = {
    "zero": Cut(None, asks="solutions"),
    "fixed": Cut(fixed),
    "uniform": Cut(uniform),
    "peak": Cut(peak, reads_entropy=True),
}


def most_tokens(cfg) -> int:
    """Tokens of the teacher's text that are trained on at most, E: `continuation.max_tokens`, 0: as a response."""
    return cfg.continuation.max_tokens or cfg.max_completion_length
