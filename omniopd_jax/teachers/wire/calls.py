"""What goes out and what comes back: one call, its reply, and the error that stands for a call that brought nothing."""

import dataclasses

from omniopd_jax.teachers.wire.secrets import scrub


@dataclasses.dataclass(frozen=True)
class Call:
    """One exchange with a provider: `n` continuations of `prefix`, in the way that `mode` names.

    `wanted`: how many texts are wanted of this prefix in all, by this call and others: whether a cache of it can pay.
    """

    messages: tuple
    prefix: str
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    mode: str
    wanted: int = 1

    def max_input_tokens(self) -> int:
        """An upper bound: no tokenizer makes more tokens than bytes; 1,024 more for templates and our instruction."""
        return 1024 + sum(64 + len(text_of(m).encode()) for m in self.messages) + len(self.prefix.encode())


@dataclasses.dataclass(frozen=True)
class ScoreCall:
    """One exchange that writes next to nothing: the log-probs of `token_ids` after `prompt_ids`, in the student's
    tokens."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    way: str  # how the server is asked: one of scoring.WAYS
    n: int = 1
    max_tokens: int = 1  # servers refuse 0

    def max_input_tokens(self) -> int:
        """An upper bound: the ids themselves, and a start token that a server may add."""
        return len(self.prompt_ids) + len(self.token_ids) + 1


@dataclasses.dataclass(frozen=True)
class Text:
    """One text that came back.

    `finish` is `stop` or `length`; `withheld`, where the provider kept (part of) it back; or `failed`, where no text
    came at all (null content, reasoning or a tool call alone): `why` says so. Neither of the last two is an empty text.
    """

    text: str
    finish: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Billed:
    """Tokens that an answer says it used. `tokens_in` holds the cached and the cache-writing ones, `tokens_out` the
    hidden. `tokens_written` is None where the answer has no such field."""

    tokens_in: int
    tokens_out: int
    tokens_cached: int = 0
    tokens_written: int | None = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the response headers say of rate limits; None where they say nothing. Seconds until the reset."""

    requests_per_minute: int | None = None
    requests_left: int | None = None
    requests_reset_s: float | None = None
    tokens_per_minute: int | None = None
    tokens_left: int | None = None
    tokens_reset_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What one exchange brought.

    `billed` is None where the answer does not say what it used, or says what cannot be. `logp` is what a `ScoreCall`
    asked for. `model` is the one that answered, as it calls itself.
    """

    texts: tuple[Text, ...]
    logp: tuple[float, ...] = ()
    billed: Billed | None = None
    tokens_hidden: int = 0
    limits: Limits = Limits()
    model: str = ""

    @property
    def stated(self) -> Billed:
        """`billed`, zeros where it is not known: for counts that are shown."""
        return self.billed or Billed(0, 0)


class CallError(Exception):
    """A call that brought nothing usable.

    Attributes:
      kind: `retry` (asking again may help), `refused` (this request never will), `stop` (no request will).
      outcome: `unsent`, `rejected` (answered with an error, not billed) or `unknown` (may have been billed).
      status: HTTP status, or None.
      retry_after: seconds that the server asked to wait, or None.
      field: the request field that the server named, or ''; `context` where the request is too long for the model,
        `withheld` where the service does not answer such content, `firewall` where something before it refused.
      limits: what the headers of the error say of rate limits.
      late: the deadline was missed.
      attempts: how often the call was sent.
    """

    def __init__(
        self, message, kind, *, outcome="rejected", status=None, retry_after=None, field="", late=False, limits=Limits()
    ):  # fmt: skip
        super().__init__(scrub(" ".join(str(message)[:4000].split()))[:400])
        self.kind, self.outcome, self.status, self.retry_after, self.field = kind, outcome, status, retry_after, field
        self.late, self.limits, self.attempts = late, limits, 1


def text_of(message) -> str:
    """The text of one chat message, whose content may be a string or a list of text parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
