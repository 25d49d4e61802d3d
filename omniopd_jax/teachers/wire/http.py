"""One HTTP client for all three SDKs: what it reads is bounded, and what goes wrong becomes a `CallError` in one place.

The SDKs hand every request to `Bounded.send`. It reads at most `max_bytes` of an answer, compressed or not, turns every
status but 2xx into a `CallError`, and looks into a 2xx answer for JSON and for an error inside. A 3xx is not followed:
a key would go wherever the server says.
"""

import asyncio
import contextlib
import datetime
import email.utils
import json
import os
import re
import time
import zlib

from omniopd_jax.errors import UserError
from omniopd_jax.teachers.wire import read
from omniopd_jax.teachers.wire.calls import CallError, Limits
from omniopd_jax.teachers.wire.secrets import PROXIES, is_loopback, scrub

MAX_REPLY = 8 << 20  # bytes of an answer: 128 texts of 32k characters, with room
MAX_SCORES = 128 << 20  # of an answer with log-probs: some 1 kB a token of the longest context
CERTIFICATES, NO_PROXIES = ("SSL_CERT_FILE", "SSL_CERT_DIR"), ("NO_PROXY", "no_proxy")
MAX_ERROR = 1 << 16  # bytes of an error's page that are looked at
TOO_LONG = re.compile(  # how OpenAI, vLLM, SGLang, llama.cpp, TGI, Anthropic and Gemini say that a request does not fit
    r"context[ _-]?(?:length|size|window)|maximum context|(?:prompt|input|request)s? (?:is|are) too (?:long|large)|"
    r"longer than the model|exceeds? the maximum number of tokens|input token count|must have less than \d+ tokens|"
    r"max_model_len|max_new_tokens`? must be <=|maximum prompt length|context limit",
    re.IGNORECASE,
)
NO_CREDIT = re.compile(r"insufficient_quota|billing_(?:not_active|hard_limit)|credit balance is too low", re.IGNORECASE)
SPENT = "reached your specified api usage limits"  # Anthropic, of a limit that its customer has set
NO_KEY = re.compile(r"\W*(?:(?:your|the|an?|no|missing|invalid|incorrect) )*api[ _-]?key\b", re.IGNORECASE)
# how Azure, OpenAI, Anthropic, OpenRouter, DashScope, DeepSeek and xAI say that they do not answer a content
WITHHELD = re.compile(
    r"content[ _](?:filter|policy|management)|responsible ?ai|requires moderation|data[ _]?inspection[ _]?failed|"
    r"(?:prompt|input|request|output|response) (?:was|is|were|has been) (?:flagged|filtered|blocked by)|"
    r"content exists risk|violates? (?:\w+ )?usage guidelines|safety_check_type|(?:unsafe|sensitive) content",
    re.IGNORECASE,
)
FIELDS = (
    "n",
    "seed",
    "top_p",
    "max_tokens",
    "temperature",
    "chat_template_kwargs",
    "reasoning_effort",
    "thinking",
    "stop",
)
MAYBE_BILLED = frozenset({499, 502, 504, 520, 524})  # a proxy gave up on a server that may have finished the answer


def client_of(url: str, timeout_s: float, max_connections: int, *, max_bytes: int, name_field):
    """An httpx2 client with one pool of connections. Proxies of the environment are honoured, but not for this machine.

    Args:
      max_bytes: most of an answer's body, compressed or not.
      name_field: message -> the request field that an error of this provider names, '' for none.

    Raises:
      UserError: a proxy or certificate variable of the environment cannot be used.
    """
    import httpx2

    # connecting ends before the call's own time limit does, so that a call that was never sent is known for one
    timeout = httpx2.Timeout(timeout_s, connect=min(10.0, timeout_s / 2), pool=None)

    class Bounded(httpx2.AsyncClient):
        """See the module."""

        async def send(self, request, *, stream=False, **more):
            """The answer, read whole; raises `CallError` where it is no 2xx or holds an error."""
            request.headers["accept-encoding"] = "gzip, deflate"
            request.extensions["timeout"] = timeout.as_dict()  # the SDKs put a single number in its place
            response = await super().send(request, stream=True, **more)
            try:
                body = await _read(response, max_bytes)
            finally:
                await response.aclose()
            _check(response.status_code, response.headers, body, name_field)
            headers = [
                (k, v)
                for k, v in response.headers.multi_items()
                if k.lower() not in ("content-encoding", "content-length")
            ]
            return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    tls = url.startswith("https:")  # without it, reading the certificates would be most of the set-up time
    try:
        return Bounded(
            timeout=timeout,
            limits=httpx2.Limits(
                max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=60.0
            ),
            trust_env=not is_loopback(url),
            verify=tls,
            follow_redirects=False,
        )
    except Exception as e:  # httpx2 and ssl raise whatever they meet
        raise UserError(_environment(e)) from None


def _environment(error: Exception) -> str:
    """One line on the proxy or certificate variables, of which one cannot be used."""
    names = CERTIFICATES if isinstance(error, OSError) else PROXIES + NO_PROXIES  # ssl's errors are OSErrors
    what = scrub(" ".join(str(error).split()))[:200]
    return (
        f"the teacher's HTTP client cannot be made ({what}): correct or unset {_as_set(names) or 'its proxy variables'}"
    )


def in_between(url: str, error: str) -> str:
    """The variables that stand between this machine and `url`, for the line that says that it cannot be reached; ''."""
    if is_loopback(url):
        return ""
    scheme = url.partition(":")[0]
    names = [n for n in PROXIES if n.lower() in (f"{scheme}_proxy", "all_proxy")]
    names += CERTIFICATES if "certificate" in error.lower() or "ssl" in error.lower() else ()
    said = _as_set(names)
    return f"; on the way {said} (correct or unset it where it is not meant)" if said else ""


def _as_set(names) -> str:
    return ", ".join(f"{name} = {scrub(os.environ[name])!r}" for name in names if os.environ.get(name))


async def _read(response, max_bytes: int) -> bytes:
    """The body, decompressed here and no further than `max_bytes`.

    Raises:
      CallError: a 2xx answer that is longer, or one in an encoding that was not asked for.
    """
    good = 200 <= response.status_code < 300
    most = max_bytes if good else MAX_ERROR
    coding = response.headers.get("content-encoding", "").strip().lower()
    decoder = None
    if coding in ("gzip", "x-gzip", "deflate"):
        decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
    elif coding not in ("", "identity"):
        if good:
            raise CallError(f"HTTP {response.status_code} in the encoding {coding!r}", "retry", outcome="unknown")
        return b""
    body = bytearray()
    async with contextlib.aclosing(response.aiter_raw()) as chunks:
        async for chunk in chunks:
            if decoder is not None:
                try:
                    chunk = decoder.decompress(chunk, most + 1 - len(body))
                except zlib.error:
                    raise CallError("an answer whose compression is broken", "retry", outcome="unknown") from None
            body += chunk
            if len(body) > most:
                break
            await asyncio.sleep(0)  # other calls get their turn
    if len(body) > most and good:
        raise CallError(f"HTTP 200 with more than {most >> 20} MB", "retry", outcome="unknown", status=200)
    return bytes(body[:most])


def _check(status: int, headers, body: bytes, name_field) -> None:
    """Raises `CallError` for a status that is no 2xx, and for an error inside a 2xx answer."""
    if 300 <= status < 400:
        where = scrub(headers.get("location", "nowhere"))[:100]
        raise CallError(f"HTTP {status}: moved to {where}; set teacher.base_url", "refused", status=404)
    if status >= 400:
        try:
            answer = json.loads(body.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            answer = None
        answer = answer[0] if isinstance(answer, list) and answer else answer
        found = read.error_in(answer) or (read.error_in({"error": answer}) if answer else None)
        found = found or read.Inside(None, body[:2000].decode("utf-8", "replace") or "no message", "")
        raise from_status(status, found.message, headers, field=_field(found, name_field), details=answer)
    answer = read.json_object(body, headers.get("content-type", ""))
    if found := read.error_in(answer):
        # what its own code says; without one, that asking again may help
        error = from_status(
            found.status or 500, found.message, headers, field=_field(found, name_field), details=answer
        )
        told = f" {found.status}" if found.status else ""
        raise CallError(
            f"HTTP 200 with an error{told} inside: {found.message}",
            error.kind,
            outcome="unknown" if read.states_usage(answer) else error.outcome,  # it may be billed, as it says
            status=error.status,
            retry_after=error.retry_after,
            field=error.field,
            limits=error.limits,
        )


def _field(found: read.Inside, name_field) -> str:
    return found.param if found.param in FIELDS else name_field(found.message)


@contextlib.contextmanager
def exchange():
    """Around one exchange by an SDK: whatever it raises is a `CallError`."""
    try:
        yield
    except CallError:
        raise
    except Exception as e:  # SDKs have classes of their own, and what they meet in an answer may be anything
        raise from_exception(e) from None


def from_status(status: int, message: str, headers, *, field: str = "", details=None) -> CallError:
    """What an HTTP error status means: whether to ask again, and after how long.

    `details`: the answer, where a delay may be written in its body (Gemini).
    """
    text, low, said = f"HTTP {status}: {message}", message.lower(), limits(headers)
    page = status == 403 and (details is None or (isinstance(details, dict) and details.get("cloudflare_error")))
    if status in (400, 403, 422, 451) and not page and (WITHHELD.search(message) or _moderated(details)):
        return CallError(text, "refused", status=status, field="withheld")
    if page:  # a service of ours answers in JSON
        return CallError(text, "refused", status=status, field="firewall")
    if status in (401, 403, 407) or (status == 400 and NO_KEY.match(message)):
        return CallError(text, "stop", status=401 if status == 400 else status)
    no_credit = (status == 429 and NO_CREDIT.search(message)) or (
        status == 400 and (low.startswith("your credit balance") or SPENT in low)
    )
    if status == 402 or no_credit:
        return CallError(text, "stop", status=status)
    if status == 429 and "request too large" in low:  # more tokens than a whole minute allows
        return CallError(text, "refused", status=status, field="context", limits=said)
    if status in (408, 409, 425, 429, 499) or status >= 500 and status not in (501, 505):
        wait = retry_after(headers)
        if wait is None and details is not None:
            found = re.search(
                r"['\"]retryDelay['\"]: ?['\"](\d+(?:\.\d+)?)s", json.dumps(details, default=str)[:MAX_ERROR]
            )
            wait = float(found.group(1)) if found and float(found.group(1)) > 0 else None
        outcome = "unknown" if status in MAYBE_BILLED else "rejected"
        return CallError(text, "retry", outcome=outcome, status=status, retry_after=wait, limits=said)
    if TOO_LONG.search(message):
        return CallError(text, "refused", status=status, field="context")
    return CallError(text, "refused", status=status, field=field or named_field(message))


def _moderated(answer) -> bool:
    """Whether an error's metadata say that the request's content was flagged (OpenRouter)."""
    error = answer.get("error") if isinstance(answer, dict) else None
    about = error.get("metadata") if isinstance(error, dict) else None
    return isinstance(about, dict) and bool(about.get("reasons") or about.get("flagged_input"))


def from_exception(exc: BaseException) -> CallError:
    """What an SDK raised: a `CallError` of ours inside it, or a failure below HTTP: nothing sent, or nobody knows."""
    import httpx2

    chain, seen = [], exc
    while seen is not None and len(chain) < 8:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    if ours := next((e for e in chain if isinstance(e, CallError)), None):
        return ours
    cause = next((e for e in chain if isinstance(e, httpx2.TransportError)), exc)
    detail = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)):
        return CallError(detail, "retry", outcome="unsent")
    if isinstance(cause, httpx2.ProxyError) and not re.match(r"407\b|Invalid username", str(cause)):
        said = re.match(r"[45]\d\d\b", str(cause))  # what it answered to CONNECT
        return CallError(detail, "retry", outcome="unsent", status=int(said.group()) if said else None)
    if isinstance(cause, (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.ProxyError)):
        return CallError(detail, "stop", outcome="unsent")
    return CallError(detail, "retry", outcome="unknown")


def named_field(message: str) -> str:
    """The request field that an error message names, of those that a client can do without; '' for none."""
    for field in FIELDS:
        if re.search(rf"(?:['\"`]|\b(?:parameter|field|argument)s?:? )\$?\.?{field}\b", message):
            return field
    return ""


def retry_after(headers) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After` (a number or a date); None where they ask for no wait at all:
    absent, malformed, 0, negative or past. Then the usual back-off applies."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = (headers.get(name) or "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
            seconds = float(value) * unit
        elif name == "retry-after" and value:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        else:
            continue
        if seconds > 0:
            return seconds
    return None


def limits(headers) -> Limits:
    """Rate limits from OpenAI's `x-ratelimit-*` and Anthropic's `anthropic-ratelimit-*` headers."""

    def number(*names):
        for name in names:
            if re.fullmatch(r"\d{1,15}", value := (headers.get(name) or "").strip()):
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
    value = value.strip()[:64]
    if parts := re.findall(r"(\d{1,9}(?:\.\d+)?)(ms|s|m|h|d)", value):
        unit = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        return sum(float(n) * unit[u] for n, u in parts)
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, datetime.datetime.fromisoformat(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


class Connection:
    """A provider's SDK over one HTTP client, made for the running event loop."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        max_connections: int,
        make_sdk,
        *,
        max_bytes: int = MAX_REPLY,
        name_field=named_field,
    ):
        self.url, self.timeout_s, self.max_connections, self.make_sdk = url, timeout_s, max_connections, make_sdk
        self.max_bytes, self.name_field = max_bytes, name_field
        self.http = self.sdk = None

    async def open(self) -> None:
        """Makes both anew; imports the SDK now: seconds that no call's time limit should count."""
        self.http = client_of(
            self.url, self.timeout_s, self.max_connections, max_bytes=self.max_bytes, name_field=self.name_field
        )
        self.sdk = self.make_sdk(self.http)

    async def close(self) -> None:
        """Closes what is open."""
        http, self.http, self.sdk = self.http, None, None
        if http is not None:
            with contextlib.suppress(RuntimeError):  # its event loop is closed, and the connections with it
                await http.aclose()
