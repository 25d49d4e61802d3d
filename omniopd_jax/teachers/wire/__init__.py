"""What the providers share: one call and its reply, what an error means, secrets, HTTP clients.

A provider's client (`openai_api`, `anthropic_api`, `gemini_api`) turns a `Call` into one HTTP exchange and either
returns a `Reply` or raises a `CallError`, which says whether asking again can help and whether it may have been
billed. Retries, limits, money and memory are not its business: `traffic`, `budget`, `journal`.
"""

import contextlib
import dataclasses
import datetime
import email.utils
import os
import re
import time
import urllib.parse

from omniopd_jax.errors import UserError

MODES = ("completion", "prefill", "continue_final_message", "prefix", "instruct")
VERSION = 1  # of how a mode is put on the wire: part of every journal key
KEYS = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
}
TOO_LONG = re.compile(  # how OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic and Gemini say that a request does not fit
    r"context[ _-]?(?:length|size|window)|maximum context|(?:prompt|input|request)s? (?:is|are) too (?:long|large)|"
    r"longer than the model|exceeds? the maximum number of tokens|input token count|must have less than \d+ tokens|"
    r"max_model_len|max_new_tokens`? must be <=",
    re.IGNORECASE,
)
FIELDS = ("n", "seed", "top_p", "max_tokens", "temperature", "chat_template_kwargs", "reasoning_effort", "thinking", "stop")


@dataclasses.dataclass(frozen=True)
class Call:
    """One exchange with a provider: `n` continuations of `prefix`, in the way that `mode` names.
    """

    messages: tuple
    prefix: str
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    mode: str

    def max_input_tokens(self) -> int:
        """An upper bound: no tokenizer makes more tokens than bytes; 1,024 more for templates and our instruction."""
        return 1024 + sum(64 + len(text_of(m).encode()) for m in self.messages) + len(self.prefix.encode())


@dataclasses.dataclass(frozen=True)
class ScoreCall:
    """One exchange that writes next to nothing: the log-probs of `token_ids` after `prompt_ids`, in the student's tokens."""

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
    """One text that came back; `finish` is `stop`, `length`, or `withheld` where the provider kept (part of) it back."""

    text: str
    finish: str


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
    """What one exchange brought. `tokens_in` holds the cached and the cache-writing ones; `tokens_out` the hidden.

    `tokens_in` is 0 where the answer says nothing of its usage. `logp` is what a `ScoreCall` asked for.
    """

    texts: tuple[Text, ...]
    logp: tuple[float, ...] = ()
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_written: int = 0
    tokens_out: int = 0
    tokens_hidden: int = 0
    limits: Limits = Limits()


class CallError(Exception):
    """A call that brought nothing usable.

    Attributes:
      kind: `retry` (asking again may help), `refused` (this request never will), `stop` (no request will).
      outcome: `unsent`, `rejected` (answered with an error, not billed) or `unknown` (may have been billed).
      status: HTTP status, or None.
      retry_after: seconds that the server asked to wait, or None.
      field: the request field that the server named, `context` where the request is too long for the model, or ''.
      late: the deadline was missed.
      attempts: how often the call was sent.
    """

    def __init__(self, message, kind, *, outcome="rejected", status=None, retry_after=None, field="", late=False):
        super().__init__(scrub(" ".join(str(message).split()))[:400])
        self.kind, self.outcome, self.status, self.retry_after, self.field = kind, outcome, status, retry_after, field
        self.late, self.attempts = late, 1


def text_of(message) -> str:
    """The text of one chat message, whose content may be a string or a list of text parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def scrub(text: str) -> str:
    """`text` without any API key: the values in the environment, and whatever looks like one."""
    for name in sum(KEYS.values(), ()):
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"(?i)\b(sk-[\w-]{6}|AIza)[\w-]{6,}", "***", text)
    text = re.sub(r"(?i)(bearer\s+|(?:api[-_]?key|x-goog-api-key)['\"]?\s*[:=]\s*['\"]?)[\w.~+/-]{6,}", r"\1***", text)
    return re.sub(r"//[^/\s@]+@", "//***@", text)


def api_key(provider: str, *, required: bool) -> str:
    """The provider's key from the environment, or 'none' where none is set and none is required.

    Raises:
      UserError: required and not set.
    """
    names = KEYS[provider]
    for name in names:
        if value := os.environ.get(name, "").strip():
            return value
    if required:
        raise UserError(
            f"teacher.provider = {provider!r} needs a key: set {' or '.join(names)} in the environment "
            "(a server of your own needs none: set teacher.base_url), or teacher.replay = 'only' to replay a journal"
        )
    return "none"


def check_url(url: str) -> str:
    """`url` without a trailing slash. Raises `UserError` where it is not an http(s) address or carries a password."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"teacher.base_url = {scrub(url)!r} is not an address like http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise UserError("teacher.base_url must not carry a password or a key: put it in the environment")
    if parts.query or parts.fragment:
        raise UserError(f"teacher.base_url = {scrub(url.split('?')[0])!r} must end with the path: no '?...', no '#...'")
    return url.rstrip("/")


def base_url(cfg, provider: str, variable: str, official: str, path: str) -> str:
    """Where calls go: the config, the SDK's environment variable, or the service; with or without its path, as the SDK
    wants.

    Raises:
      UserError: not an address.
    """
    url = check_url(cfg.teacher.base_url or os.environ.get(variable, "") or official)
    if provider == "openai":
        return url if urllib.parse.urlsplit(url).path else url + path
    return url.removesuffix(path).removesuffix("/v1").rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether `url` is on this machine: no proxy belongs in between."""
    return (urllib.parse.urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")


def http_client(url: str, timeout_s: float, max_connections: int):
    """An httpx2 client with one pool of connections. Proxies of the environment are honoured, but not for this machine."""
    import httpx2

    tls = url.startswith("https:")  # without it, reading the certificates would be most of the set-up time
    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(timeout_s, connect=min(10.0, timeout_s), pool=None),
        limits=httpx2.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=60.0
        ),
        trust_env=not is_loopback(url),
        verify=tls,
        follow_redirects=tls,
    )


class Connection:
    """A provider's SDK over one HTTP client, made for the running event loop."""

    def __init__(self, url: str, timeout_s: float, max_connections: int, make_sdk):
        self.url, self.timeout_s, self.max_connections, self.make_sdk = url, timeout_s, max_connections, make_sdk
        self.http = self.sdk = None

    async def open(self) -> None:
        """Makes both anew; imports the SDK now: seconds that no call's time limit should count."""
        self.http = http_client(self.url, self.timeout_s, self.max_connections)
        self.sdk = self.make_sdk(self.http)

    async def close(self) -> None:
        """Closes what is open."""
        http, self.http, self.sdk = self.http, None, None
        if http is not None:
            with contextlib.suppress(RuntimeError):  # its event loop is closed, and the connections with it
                await http.aclose()


def from_status(status: int, message: str, headers, *, field: str = "") -> CallError:
    """What an HTTP error status means: whether to ask again, and after how long."""
    text = f"HTTP {status}: {message}"
    low = message.lower()
    if status in (401, 403):
        return CallError(text, "stop", status=status)
    if status == 402 or (status == 429 and ("insufficient_quota" in low or "billing" in low)):
        return CallError(text, "stop", status=status)
    if status == 429 and "request too large" in low:  # more tokens than a whole minute allows
        return CallError(text, "refused", status=status, field="context")
    if status in (408, 409, 425, 429) or status >= 500 and status not in (501, 505):
        return CallError(text, "retry", status=status, retry_after=retry_after(headers))
    if TOO_LONG.search(message):
        return CallError(text, "refused", status=status, field="context")
    return CallError(text, "refused", status=status, field=field or named_field(message))


def from_exception(exc: BaseException) -> CallError:
    """What a failure below HTTP means: nothing sent, or an outcome that nobody knows."""
    import httpx2

    chain, seen = [], exc
    while seen is not None and len(chain) < 8:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    cause = next((e for e in chain if isinstance(e, httpx2.TransportError)), exc)
    detail = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)):
        return CallError(detail, "retry", outcome="unsent")
    if isinstance(cause, (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.ProxyError)):
        return CallError(detail, "stop", outcome="unsent")
    return CallError(detail, "retry", outcome="unknown")


def json_object(response) -> dict:
    """The body of a 200 answer. Raises `CallError` (`retry`, outcome unknown) where it is not a JSON object."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        kind = response.headers.get("content-type", "no content type")
        raise CallError(f"HTTP 200 with a body that is no JSON object ({kind})", "retry", outcome="unknown")
    return body


def malformed(what: str) -> CallError:
    """A 200 answer whose JSON lacks what the protocol promises."""
    return CallError(f"HTTP 200 whose JSON has no {what}", "retry", outcome="unknown")


@contextlib.contextmanager
def as_promised():
    """Around the reading of a 200 answer: values of other types than the protocol's are a `CallError`, not a crash."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as e:
        raise CallError(f"HTTP 200 with a malformed body ({type(e).__name__}: {e})", "retry", outcome="unknown") from None


def clean(text: str) -> str:
    """`text` as UTF-8 can hold it: halves of a character that was cut (lone surrogates) become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Learner:
    """What a client finds out about its service: fields refused by name, and whether n texts a call can be had."""

    def __init__(self, *, takes_n: bool):
        self.takes_n = takes_n
        self.n_proven = False  # a call with n > 1 has been answered
        self.n_suspected = False  # one was refused for no named reason: the next single call tells
        self.dropped = set()

    def answered(self, call: Call) -> None:
        """Takes note of a call that worked."""
        self.n_proven |= call.n > 1
        self.n_suspected = False

    def learn(self, error: CallError, call: Call, droppable) -> bool:
        """Whether the call is worth sending once more, without what the service has refused by name.

        What the method asks for (a temperature, a top_p) is never dropped in silence.
        """
        if error.kind != "refused" or error.status not in (400, 422):
            return False
        field = error.field
        if field in ("n", "candidateCount") and call.n > 1:
            self.takes_n = False
            return True
        asked_for = {"top_p": call.top_p, "temperature": call.temperature}.get(field, 1.0) != 1.0
        if field in droppable and field not in self.dropped and not asked_for:
            self.dropped.add(field)
            return True
        if call.n > 1 and not self.n_proven and not field:
            self.takes_n, self.n_suspected = False, True
            return True
        if call.n == 1 and self.n_suspected:
            self.takes_n, self.n_suspected = True, False
        return False


def named_field(message: str) -> str:
    """The request field that an error message names, of those that a client can do without; '' for none."""
    for field in FIELDS:
        if re.search(rf"(?:['\"`]|\b(?:parameter|field|argument)s?:? )\$?\.?{field}\b", message):
            return field
    return ""


def retry_after(headers) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After` (a number or a date); None where absent or malformed."""
    try:
        if ms := headers.get("retry-after-ms"):
            return max(0.0, float(ms) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def limits(headers) -> Limits:
    """Rate limits from OpenAI's `x-ratelimit-*` and Anthropic's `anthropic-ratelimit-*` headers."""

    def number(*names):
        for name in names:
            if (value := headers.get(name)) and re.fullmatch(r"\d+", value.strip()):
                return int(value)
        return None

    def seconds(*names):
        return next((s for name in names if (s := duration(headers.get(name) or "")) is not None), None)

    o, a = "x-ratelimit-", "anthropic-ratelimit-"
    return Limits(
        number(f"{o}limit-requests", f"{a}requests-limit"),
        number(f"{o}remaining-requests", f"{a}requests-remaining"),
        seconds(f"{o}reset-requests", f"{a}requests-reset"),
        number(f"{o}limit-tokens", f"{a}tokens-limit"),
        number(f"{o}remaining-tokens", f"{a}tokens-remaining"),
        seconds(f"{o}reset-tokens", f"{a}tokens-reset"),
    )


def duration(value: str) -> float | None:
    """Seconds in '1.5s', '6m0s', '20ms', '3', or until an RFC 3339 time; None where it is none of them."""
    value = value.strip()
    if parts := re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", value):
        unit = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        return sum(float(n) * unit[u] for n, u in parts)
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return max(0.0, datetime.datetime.fromisoformat(value).timestamp() - time.time())
    except ValueError:
        return None


def bare(prefix: str) -> tuple[str, str]:
    """(prefix without its trailing whitespace, that whitespace): chat servers refuse or swallow it."""
    stripped = prefix.rstrip()
    return stripped, prefix[len(stripped) :]


def after_prefix(text: str, sent: str, space: str) -> str:
    """What `text` adds to the student's prefix, where `sent` went out and its trailing `space` was held back.

    Some servers send the prefix back in front of what they add (Mistral's `prefix`, `echo`): it is cut off. The model
    then usually writes the held-back whitespace itself: it is cut off too, for it belongs to the prefix.
    """
    if len(sent) >= 8 and text.startswith(sent):
        text = text[len(sent) :]
    return text[len(os.path.commonprefix([text, space])) :]
