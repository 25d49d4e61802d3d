"""What every teacher speaks: text in, text out.

A teacher never sees tokens, logits or JAX arrays of the student: it is handed the prompt's messages and the student's
unfinished answer as text, and writes what it would have written next. `local` runs a model in process but keeps to the
same protocol, with its own tokenizer.
"""

import asyncio
import dataclasses
import hashlib
from typing import Any, Protocol

from omniopd_jax.errors import TeacherStopped

WHITE_BOX = {  # objective -> the providers that can serve it
    "opd": ("local", "openai"),  # those with `score_tokens`; of the OpenAI-compatible servers vLLM and SGLang (scoring.py)
    "opd_exact": ("local",),  # needs the teacher's whole distribution
}


@dataclasses.dataclass(frozen=True)
class ContinuationRequest:
    """Asks for independent continuations of one unfinished answer.

    Attributes:
      sample_id: hash of (run seed, step, prompt id, generation index): who asks.
      peak: response position (tokens of the student) at which `prefix` ends; -1 for a whole answer.
      messages: the prompt, chat messages with `role` and `content`.
      prefix: the student's answer so far, raw text; empty for a whole answer.
      indices: which continuations are wanted, by index; their number is the n of the call.
      max_tokens: length of each, in the teacher's own tokens.
      temperature, top_p: the teacher's sampling; never greedy in training (method.md, section 2).
    """

    sample_id: str
    peak: int
    messages: tuple[dict[str, Any], ...]
    prefix: str
    indices: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def seed(self, index: int) -> int:
        """A 31-bit seed that depends on who asks, where and for which continuation, stable across processes."""
        return stable_hash(self.sample_id, self.peak, index) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One text that arrived; `finish` is `stop` (the teacher ended its answer) or `length`."""

    index: int
    text: str
    finish: str


@dataclasses.dataclass(frozen=True)
class Failure:
    """A continuation that failed for good: it lowers n and is never filled in. `error` carries no secret."""

    index: int
    error: str


@dataclasses.dataclass(frozen=True)
class Usage:
    """What was billed: calls on the wire, tokens in (`tokens_cached` of them from the provider's cache), out, dollars."""

    calls: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost_usd: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class ContinuationResult:
    """What came of a request. Every wanted index is in `continuations` or in `failures`, none in both.

    `latency_s` is wall time from asking to the last answer; `replayed` counts those taken from a journal.
    """

    continuations: tuple[Continuation, ...]
    failures: tuple[Failure, ...] = ()
    usage: Usage = Usage()
    latency_s: float = 0.0
    replayed: int = 0


class Teacher(Protocol):
    """What the loop needs of a teacher. Optional: `async score_tokens(...)`, for the white-box baseline."""

    foreign_tokenizer: bool  # its tokens are not the student's: continuations are trimmed by `audit.trim_continuation`

    async def check(self) -> str:
        """Returns one line on what answered, in seconds, or raises `UserError` saying what to set."""

    async def continue_text(self, request: ContinuationRequest) -> ContinuationResult:
        """Answers a request. Raises only `TeacherStopped`; a call that fails is a `Failure`."""

    async def close(self) -> None:
        """Frees connections and files."""


async def together(coroutines) -> list:
    """Their results. What one raises is raised when all have ended, so that nothing paid for is lost: errors before stops."""
    done = await asyncio.gather(*coroutines, return_exceptions=True)
    errors = [e for e in done if isinstance(e, BaseException)]
    if errors:
        raise next((e for e in errors if not isinstance(e, TeacherStopped)), errors[0])
    return done


def stable_hash(*parts) -> int:
    """63-bit hash of the parts' text, the same in every process and release."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_id(run_seed: int, step: int, prompt_id: str, generation: int) -> str:
    """Names one response of one run (method.md, section 5): 16 hex digits."""
    return f"{stable_hash(run_seed, step, prompt_id, generation):016x}"
