"""Peaks -> prefixes -> continuations -> k_sem and n: the only place where text, tokens and positions meet.

The student's chunk is text(y_c) = decode(y_<t+C) with its prefix decode(y_<t) cut off, special tokens left out; the
teacher is handed the prompt's messages and that raw prefix, never the audited tokens (method.md, section 2).
"""

import dataclasses

import numpy as np

from omniopd_jax import teachers
from omniopd_jax.config import min_continuations
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import processes
from omniopd_jax.teachers.protocol import ContinuationRequest, ContinuationResult, Usage


@dataclasses.dataclass
class Audit:
    """One chunk and what came of it. `row` and `m` place it in the batch; `similarity` is one phi a continuation."""

    row: int
    m: int
    request: ContinuationRequest
    chunk: str
    result: ContinuationResult | None = None
    similarity: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Feedback:
    """k_sem_BM float32, n_BM int32 (0 where nothing was asked or nothing arrived), and the audits behind them."""

    k_sem_BM: np.ndarray
    n_BM: np.ndarray
    audits: list[Audit]

    def with_solutions(self, solutions: list[Audit]) -> "Feedback":
        """The same with whole solutions among the audits: they cost what they cost, and are compared with nothing."""
        return dataclasses.replace(self, audits=self.audits + solutions)


class Decoder:
    """Text of token prefixes, special tokens left out; remembers which tokens end inside a UTF-8 character."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._partial: dict[int, bool] = {}

    def text(self, token_ids) -> str:
        """decode(token_ids), special tokens left out, nothing else changed."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def eligible(self, token_ids: list[int]) -> np.ndarray:
        """bool [len]: position t may start a chunk: its prefix decodes on its own (no UTF-8 character is cut)."""
        out = np.ones(len(token_ids), bool)
        start = 0  # the last position whose prefix is known to be whole
        for t in range(1, len(token_ids)):
            if not self._ends_inside(token_ids[t - 1]):
                start = t
            elif self.text(token_ids[start:t]).endswith("\ufffd"):
                out[t] = False
            else:
                start = t
        return out

    def chunk(self, token_ids: list[int], peak: int, chunk_tokens: int) -> tuple[str, str]:
        """(prefix, chunk): decode(y_<t) and what decode(y_<t+C) adds to it."""
        prefix = self.text(token_ids[:peak])
        whole = self.text(token_ids[: peak + chunk_tokens])
        if not whole.startswith(prefix):
            raise ValueError(f"decode(y_<t) is no prefix of decode(y_<t+C) at t = {peak}: {prefix[-20:]!r}")
        return prefix, whole[len(prefix) :]

    def _ends_inside(self, token: int) -> bool:
        if token not in self._partial:
            text = self.text([token])
            self._partial[token] = not text or "\ufffd" in text  # a special token leaves the character before it open
        return self._partial[token]


def eligible_positions(decoder: Decoder, tokens: list[list[int]], T: int) -> np.ndarray:
    """bool [B, T] from each row's response tokens; False past its end."""
    out = np.zeros((len(tokens), T), bool)
    for b, row in enumerate(tokens):
        out[b, : len(row)] = decoder.eligible(row)
    return out


def plan(decoder: Decoder, prompts, tokens, peak_BM, sample_ids, cfg, num_continuations: int = 0) -> list[Audit]:
    """The audits of a batch: one a peak, rows in order, peaks of a row ascending.

    Args:
      num_continuations: N, where a budget lowered it; 0: the config's.
      prompts: a data.Prompt a row.
      tokens: response tokens a row.
      peak_BM: int32, -1 where none.
      sample_ids: a row.
    """
    N = num_continuations or cfg.audit.num_continuations
    audits = []
    for b, peaks in enumerate(np.asarray(peak_BM)):
        for m, peak in enumerate(int(p) for p in peaks if p >= 0):
            prefix, chunk = decoder.chunk(tokens[b], peak, cfg.audit.chunk_tokens)
            request = ContinuationRequest(
                sample_ids[b], peak, tuple(prompts[b].messages), prefix, tuple(range(N)),
                cfg.audit.chunk_tokens, cfg.teacher.temperature, cfg.teacher.top_p,
            )  # fmt: skip
            audits.append(Audit(b, m, request, chunk))
    return audits


async def ask(teacher: teachers.Teacher, audits: list[Audit]) -> None:
    """Sends every audit's request and waits for all answers; results land in the audits.

    Raises:
      TeacherStopped: after the calls under way have ended, so that nothing paid for is lost.
    """

    async def one(audit: Audit):
        audit.result = await teacher.continue_text(audit.request)
        _check_complete(audit)

    await teachers.together(one(a) for a in audits)


def compare(phi, audits: list[Audit], shape: tuple[int, int], cfg, *, trim: bool) -> Feedback:
    """k_sem = sum_i phi(text(y_c), text(z_i)) over the continuations that arrived.

    Args:
      phi: similarity.make(cfg).
      shape: (B, M).
      trim: cut each continuation to the student chunk's length in characters first (foreign tokenizers; ours).
    """
    texts = [[c.text for c in a.result.continuations] for a in audits]
    if cfg.audit.shuffle_texts:
        texts = _of_another_prompt(audits, texts)
    if trim:
        texts = [[t[: len(a.chunk)] for t in ts] for a, ts in zip(audits, texts, strict=True)]
    value = phi([a.chunk for a, ts in zip(audits, texts, strict=True) for _ in ts], [t for ts in texts for t in ts])
    if not (np.isfinite(value).all() and (value >= 0).all() and (value <= 1 + 1e-6).all()):
        raise FloatingPointError(f"audit.similarity = {cfg.audit.similarity!r} gave values outside [0, 1]")
    k_sem_BM, n_BM = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    start = 0
    for audit, ts in zip(audits, texts, strict=True):
        audit.similarity = np.asarray(value[start : start + len(ts)])
        start += len(ts)
        k_sem_BM[audit.row, audit.m] = audit.similarity.sum(dtype=np.float64)
        n_BM[audit.row, audit.m] = len(ts)
    return Feedback(k_sem_BM, n_BM, audits)


def metrics(feedback: Feedback, cfg) -> dict:
    """Host-side figures of a step's audits: what the teacher cost, how long it took, how the similarities lie."""
    results = [a.result for a in feedback.audits]
    own = {  # of this process; quantiles need every process's values
        "usage": dataclasses.astuple(sum((r.usage for r in results), Usage())),
        "counts": [
            sum(len(a.request.indices) for a in feedback.audits), sum(r.replayed for r in results),
            sum(len(r.failures) for r in results),
            sum(0 < len(a.similarity) < min_continuations(cfg) for a in feedback.audits),
        ],
        "similarity": [float(s) for a in feedback.audits for s in a.similarity],
        "latency": [r.latency_s for r in results],
    }  # fmt: skip
    parts = processes.gather("audits", own)
    usage = sum((Usage(*p["usage"]) for p in parts), Usage())
    wanted, replayed, failed, short = (sum(p["counts"][i] for p in parts) for i in range(4))
    similarity = np.array([s for p in parts for s in p["similarity"]])
    latency = np.array([s for p in parts for s in p["latency"]] or [0.0])
    out = {
        "teacher/calls": usage.calls,
        "teacher/retries": usage.retries,
        "teacher/failed": failed,
        "teacher/tokens_in": usage.tokens_in,
        "teacher/tokens_cached": usage.tokens_cached,
        "teacher/tokens_out": usage.tokens_out,
        "teacher/cost_usd": usage.cost_usd,
        "teacher/cache_hit_rate": replayed / max(wanted, 1),
        "teacher/latency_p50": float(np.quantile(latency, 0.5)),
        "teacher/latency_p95": float(np.quantile(latency, 0.95)),
        "audit/short": short,
    }
    for q in (10, 50, 90):
        out[f"audit/similarity_p{q}"] = float(np.quantile(similarity, q / 100)) if similarity.size else 0.0
    return out


def _check_complete(audit: Audit) -> None:
    """Every wanted index came back once, as a text or as a failure: a teacher that loses one must not go unseen."""
    r = audit.result
    got = sorted([c.index for c in r.continuations] + [f.index for f in r.failures])
    if got != sorted(audit.request.indices):
        raise RuntimeError(f"teacher answered indices {got} of {sorted(audit.request.indices)}")


def _of_another_prompt(audits: list[Audit], texts: list[list[str]]) -> list[list[str]]:
    """The control of shuffled texts: audit i gets the answers of the next audit, half a batch on, of another prompt.

    Raises:
      UserError: a step whose audits are all of one prompt.
    """
    out = []
    for i, audit in enumerate(audits):
        order = ((i + len(audits) // 2 + k) % len(audits) for k in range(len(audits)))
        other = next((j for j in order if audits[j].request.messages != audit.request.messages), None)
        if other is None:
            raise UserError("audit.shuffle_texts needs at least two different prompts with an audit in each step")
        out.append(texts[other])
    return out
