"""What every teacher speaks: text in, text out.

A teacher never sees tokens, logits or JAX arrays of the student: it is handed the prompt's messages and the student's
unfinished answer as text, and writes what it would have written next. `local` runs a model in process but keeps to the
same protocol, with its own tokenizer.
"""

import asyncio
import dataclasses
import hashlib
from typing import Any, Protocol

import numpy as np

from omniopd_jax.errors import TeacherStopped, UserError

TEXT, LOGP, DISTRIBUTION = "text", "logp", "distribution"  # what an objective may need of a teacher
WHITE_BOX = frozenset({LOGP, DISTRIBUTION})  # as `Objective.asks` names them


def need_of(asks: frozenset[str]) -> str:
    """The one ability that an objective's `asks` need of its teacher; two of WHITE_BOX are refused (objective.mix)."""
    return next(iter(asks & WHITE_BOX), TEXT)


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
      teacher: which of `teachers.NAME` is asked; "": the run's only one.
    """

    sample_id: str
    peak: int
    messages: tuple[dict[str, Any], ...]
    prefix: str
    indices: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    teacher: str = ""

    def seed(self, index: int) -> int:
        """A 31-bit seed that depends on who asks, where and for which continuation, stable across processes."""
        return stable_hash(self.sample_id, self.peak, index) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One text that arrived; `finish` is `stop` (the teacher ended its answer) or `length`."""

    index: int
    text: str
    finish: str


def whole_characters(text: str, finish: str) -> str:
    """A text without the character that its end cut in two: the marks that decoding put for its bytes are no words of
    the teacher's."""
    return text.rstrip("\ufffd") if finish == "length" else text


@dataclasses.dataclass(frozen=True)
class Failure:
    """A continuation that failed for good: it lowers n and is never filled in. `error` carries no secret."""

    index: int
    error: str


@dataclasses.dataclass(frozen=True)
class Usage:
    """What was billed: calls on the wire, tokens in (`tokens_cached` of them from the provider's cache), out,
    dollars."""

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


class Counts:
    """What a teacher did since the last `take`: the one owner of the `teacher/*` metrics of calls, tokens and time."""

    def __init__(self):
        self.usage, self.wanted, self.replayed, self.failed, self.latencies = Usage(), 0, 0, 0, []

    def add(self, result: ContinuationResult) -> ContinuationResult:
        """Counts one answered request; returns it."""
        self.usage += result.usage
        self.wanted += len(result.continuations) + len(result.failures)
        self.replayed += result.replayed
        self.failed += len(result.failures)
        self.latencies.append(result.latency_s)
        return result

    def take(self) -> dict[str, float]:
        """The metrics, and starts over. `cache_hit_rate` is the provider's cached share of the input tokens,
        `replayed_fraction` the journal's share of the texts that were wanted; latencies are of whole requests."""
        usage, latency = self.usage, np.array(self.latencies or [0.0])
        out = {
            "teacher/calls": usage.calls,
            "teacher/retries": usage.retries,
            "teacher/failed": self.failed,
            "teacher/tokens_in": usage.tokens_in,
            "teacher/tokens_cached": usage.tokens_cached,
            "teacher/tokens_out": usage.tokens_out,
            "teacher/cost_usd": usage.cost_usd,
            "teacher/cache_hit_rate": usage.tokens_cached / max(usage.tokens_in, 1),
            "teacher/replayed_fraction": self.replayed / max(self.wanted, 1),
            "teacher/latency_p50": float(np.quantile(latency, 0.5)),
            "teacher/latency_p95": float(np.quantile(latency, 0.95)),
        }
        self.usage, self.wanted, self.replayed, self.failed, self.latencies = Usage(), 0, 0, 0, []
        return out


class Teacher(Protocol):
    """What the loop needs of a teacher. Those who subclass it write `continue_text` alone: the rest costs nothing and
    does nothing, as of a teacher in process.
    """

    foreign_tokenizer: bool = (
        False  # its tokens are not the student's: continuations are trimmed by `audit.trim_continuation`
    )
    model_cfg: Any = None  # of its weights, where it gives its DISTRIBUTION
    asks: Any = None  # what the run asks for (budget.estimate); None: continuations at the peaks
    report: Any = None  # probe.ProbeReport, once `check` has probed it
    journal: Any = None  # journal.Journal: what was bought and what it cost

    async def check(self) -> str:
        """Returns one line on what answered, in seconds, or raises `UserError` saying what to set."""
        return f"teacher: {type(self).__name__}"

    async def continue_text(self, request: ContinuationRequest) -> ContinuationResult:
        """Answers a request. Raises only `TeacherStopped`; a call that fails is a `Failure`."""
        raise NotImplementedError

    async def score_tokens(self, messages, prompt_ids, token_ids) -> np.ndarray:
        """The log-prob of each of `token_ids` after `prompt_ids`; float32 [len(token_ids)], nats. For LOGP alone."""
        raise UserError(f"{type(self).__name__} gives no log-probs of given tokens")

    async def close(self) -> None:
        """Frees connections and files."""

    def named(self, name: str) -> "Teacher":
        """The teacher of a prompt that names it so: of several (by_row.py) that one, else itself."""
        return self

    def take_rows(self, names: list[str]) -> None:
        """Learns which teacher each training prompt names; nothing to a run's only one."""

    def metrics(self) -> dict[str, float]:
        """`Counts.take()` of what it did since the last call; empty for a teacher that does not count."""
        return {}

    def allowance(self, steps_left: int, rows: int, num_chunks: int, num_continuations: int) -> tuple[int, int]:
        """(M, N) that its budget allows the next step of `rows` responses; without a budget what the config asks
        for."""
        return num_chunks, num_continuations

    def given(self, step: str) -> tuple[int, int] | None:
        """(M, N) that a step was given when it was first begun; None: it was not, or nobody keeps it."""

    def give(self, step: str, value: tuple[int, int]) -> None:
        """Keeps what a step was given: repeated, or replayed, it asks for the same, though the ledger has gone on."""

    def spent(self) -> Any:
        """journal.Spent: what this run has spent, over all its starts, unknown outcomes included; None: nothing is
        counted."""
        return None

    def paid(self) -> list:
        """journal.Totals of each paid teacher: all that its journal on this disk has seen."""
        return []

    def divide_budget(self, disks: list[list]) -> None:
        """Takes this process's part of what the caps leave, where the run's hosts keep journals on disks of their own;
        `disks`: what `paid` returns on each of them, this one among them."""


class PaidTeacher(Teacher, Protocol):
    """A teacher whose calls cost money: journaled before use, capped before they go out, forecast before the first
    one."""

    journal: Any  # journal.Journal
    budget: Any  # budget.Budget
    price: Any  # budget.Price
    replay: str  # teacher.replay

    def allowance(self, steps_left: int, rows: int, num_chunks: int, num_continuations: int) -> tuple[int, int]:
        """See `Budget.allowance`."""
        return self.budget.allowance(steps_left, rows, num_chunks, num_continuations)

    def given(self, step: str) -> tuple[int, int] | None:
        """From the journal: of this run, or of whichever a replay reads."""
        return None if self.replay == "off" else self.journal.allowance(step, of_any=self.replay == "only")

    def give(self, step: str, value: tuple[int, int]) -> None:
        """Into the journal, once."""
        if self.replay != "only":
            self.journal.put_allowance(step, value)

    def spent(self) -> Any:
        """By the journal."""
        return self.journal.spent()

    def paid(self) -> list:
        """By the journal, the one that there is."""
        return [self.journal.totals()]

    def divide_budget(self, disks: list[list]) -> None:
        """See `Budget.divide`."""
        self.budget.divide([totals for (totals,) in disks])

    def estimate(self, steps: int | None = None, part: float = 1.0) -> Any:
        """budget.Estimate of what is still to come for `part` of the prompts: calls, tokens, dollars and hours, each
        with a range."""
        raise NotImplementedError

    def forecast(self, steps: int | None = None, part: float = 1.0) -> str:
        """The estimate as a table, with a warning where the budget will not last."""
        raise NotImplementedError


async def gather_all(coroutines) -> list:
    """Their results. What one raises is raised when all have ended, so that nothing paid for is lost: errors before
    stops."""
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
