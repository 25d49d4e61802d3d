"""Keys and addresses: where a key comes from, where it may go, and how it is kept out of everything that is written.

A key is known by its value in the environment, whatever it looks like; it is found in text in the forms in which
servers, proxies and SDKs repeat it: as typed, URL-encoded, escaped as JSON, in base64 (also inside a longer base64
text), in another case. What merely looks like a key is hidden too.
"""

import base64
import functools
import html
import ipaddress
import os
import re
import urllib.parse

from omniopd_jax.errors import UserError, printable

KEYS = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
}
# beside its key an SDK sends these headers, one `Name: value` a line: a gateway's token, mostly
HEADERS = {"openai": ("OPENAI_CUSTOM_HEADERS",), "anthropic": ("ANTHROPIC_CUSTOM_HEADERS",), "gemini": ()}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# what people set where a server wants some key: hiding such a word would only change texts
NO_SECRETS = frozenset(
    {
        "none",
        "empty",
        "null",
        "test",
        "dummy",
        "local",
        "key",
        "token",
        "no-key",
        "nokey",
        "not-needed",
        "unused",
        "anything",
        "ollama",
        "vllm",
        "sglang",
        "sk-none",
        "xxx",
    }
)
PRIVATE_NAMES = (".local", ".internal", ".localhost", ".lan", ".home.arpa")  # never sold to anybody
SHORT = 3  # characters from which a key is hidden in messages, where it stands alone
LONG = 8  # ... inside words too, and in the teacher's texts
_LOOKS = (
    (re.compile(r"(?i)\b(sk-[\w-]{6}|AIza)[\w-]{6,}"), "***"),
    (re.compile(r"(?i)(bearer\s+|(?:api[-_]?key|x-goog-api-key)['\"]?\s*[:=]\s*['\"]?)[\w.~+/-]{6,}=*"), r"\1***"),
    (re.compile(r"//[^/\s@]+@"), "//***@"),
)
_found_in_urls: set[str] = set()  # segments of an address's path that look like keys


def scrub(text: str) -> str:
    """`text` for a terminal, a log or a message: without any key, and without characters that a terminal obeys."""
    text = hide_keys(text, least=SHORT)
    for pattern, mark in _LOOKS:
        text = pattern.sub(mark, text)
    return printable(text)


def hide_keys(text: str, *, least: int = LONG) -> str:
    """`text` with `***` in the place of every key that this process knows, in any of its usual forms.

    `least`: characters of a key. A short one is a dummy ("1234", "secret") that a teacher's text may well hold.
    """
    pattern = _pattern(tuple(sorted(value for value in _known() if len(value.strip()) >= least)))
    return pattern.sub("***", text) if pattern else text


def _known() -> set[str]:
    names = [os.environ.get(name, "") for name in sum(KEYS.values(), ())]
    for name in PROXIES:
        found = re.match(r"[^/@]*(?://)?[^/@:]*:([^/@]+)@", os.environ.get(name, ""))  # whatever else is wrong with it
        names.append(urllib.parse.unquote(found.group(1)) if found else "")
    names += [value for provider in HEADERS for value in _header_secrets(provider)]
    values = {v for name in names for v in (name, name.strip())} | _found_in_urls
    return {v for v in values if len(v.strip()) >= SHORT and v.strip().lower() not in NO_SECRETS}


def _header_secrets(provider: str) -> list[str]:
    """What the environment's own headers may give away: each value, of `Bearer TOKEN` the token. A plain word (a
    team's name, `true`) is none."""
    lines = [line for name in HEADERS[provider] for line in re.split(r"[\r\n]+", os.environ.get(name, ""))]
    values = [line.partition(":")[2].strip() for line in lines]
    values = [re.sub(r"(?i)^(bearer|basic|token|apikey)\s+", "", value) for value in values]
    return [v for v in values if len(v) >= SHORT and not re.fullmatch(r"[A-Za-z]{1,15}", v)]


@functools.lru_cache(maxsize=16)
def _pattern(values: tuple[str, ...]):
    """Finds every form of these keys, longest first."""
    whole, words = set(), set()
    for value in values:
        forms = {"".join(map(_spelled, value)), re.escape(value.encode().hex())}
        for before in range(3):  # base64 of a longer text: three places where the key may begin
            raw = value.encode()
            coded = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
            first, last = -(-before * 8 // 6), (before + len(raw)) * 8 // 6
            forms.add("".join(map(_spelled, coded[first:last])))
        (whole if len(value) >= LONG else words).update(forms)
    if not values:
        return None
    parts = sorted(whole, key=len, reverse=True)
    parts += [rf"(?<![^\W_])(?:{form})(?![^\W_])" for form in sorted(words, key=len, reverse=True)]
    return re.compile("|".join(parts), re.IGNORECASE)


def _spelled(char: str) -> str:
    """A pattern for one character of a key as addresses, JSON and HTML may write it."""
    if char.isascii() and char.isalnum():
        return char
    percent = "".join(f"%(?:25)?{byte:02x}" for byte in char.encode())
    ways = [
        re.escape(char),
        percent,
        rf"\\+u{ord(char):04x}",
        rf"\\+x{ord(char):02x}",
        f"&#0*{ord(char)};",
        f"&#x0*{ord(char):x};",
    ]
    ways += [rf"\\+{re.escape(char)}", re.escape(html.escape(char))]
    ways += [r"\s+", r"\+"] if char == " " else [r"\-"] if char == "+" else ["_"] if char == "/" else []
    return f"(?:{'|'.join(ways)})"


def api_key(provider: str, *, required: bool) -> str:
    """The provider's key from the environment, or 'none' where none is set and none is required.

    Raises:
      UserError: required and not set, or of characters that no header can carry.
    """
    names = KEYS[provider]
    for name in names:
        if value := os.environ.get(name, "").strip():
            if not (value.isascii() and value.isprintable()):
                raise UserError(f"{name} holds characters that no key has: set it again, without line ends or quotes")
            return value
    if required:
        raise UserError(
            f"teacher.provider = {provider!r} needs a key: set {' or '.join(names)} in the environment "
            "(a server of your own needs none: set teacher.base_url), or teacher.replay = 'only' to replay a journal"
        )
    return "none"


def check_key_may_go(cfg, provider: str, url: str) -> None:
    """Raises `UserError` where a key, or a header's token, would travel unencrypted to another machine and no setting
    allows it."""
    if is_loopback(url) or url.startswith("https:") or cfg.teacher.key_over_http:
        return
    names = [n for n in KEYS[provider] if os.environ.get(n, "").strip()]
    names += HEADERS[provider] if _header_secrets(provider) else ()
    if name := next(iter(names), None):
        raise UserError(
            f"{name} would be sent unencrypted to {scrub(url)}: use https, unset it (a server of your own may need "
            "none), or "
            "set teacher.key_over_http = True"
        )


def check_url(url: str) -> str:
    """`url` without a trailing slash. Raises `UserError` where it is not an http(s) address or carries a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:
        raise UserError(f"teacher.base_url = {scrub(url)!r} is not an address like http://127.0.0.1:8000/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"teacher.base_url = {scrub(url)!r} is not an address like http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise UserError("teacher.base_url must not carry a password or a key: put it in the environment")
    if parts.query or parts.fragment:
        raise UserError(
            f"teacher.base_url = {scrub(url.split('?')[0].split('#')[0])!r} must end with the path: no '?...', no "
            "'#...'"
        )
    _found_in_urls.update(s for s in parts.path.split("/") if _like_a_key(s))
    return parts.geturl().rstrip("/")  # the scheme in lower case


def public_url(url: str) -> str:
    """An address as it may be written to a file: without what looks like a key in its path, without name and
    password."""
    parts = urllib.parse.urlsplit(url)
    path = "/".join("***" if _like_a_key(s) else s for s in parts.path.split("/"))
    return hide_keys(
        re.sub(r"//[^/\s@]+@", "//***@", f"{url[: len(url) - len(url.partition('://')[2])]}{parts.netloc}{path}"),
        least=SHORT,
    )


def _like_a_key(segment: str) -> bool:
    """Whether a part of a path is more likely a key than a word: long, of letters and digits, or begun as keys are."""
    mixed = any(c.isdigit() for c in segment) and any(c.isalpha() for c in segment)
    words = max(map(len, re.split(r"[-_.]", segment))) if segment else 0
    return bool(re.match(r"(?i)(sk|pk|key|token|api)[-_]\w{6,}", segment)) or (mixed and words >= 16)


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


def is_official(url: str, domain: str) -> bool:
    """Whether `url` is of a provider's own domain: the one place where the table's prices hold."""
    host = _host(url)
    return host == domain or host.endswith(f".{domain}")


def own_server(url: str) -> bool:
    """Whether `url` is a server of one's own, which bills nobody: plain http, an address that is not public, or a name
    that no public host can have. Any other host may bill, whatever protocol it speaks."""
    if url.startswith("http:"):
        return True
    host = _host(url)
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(PRIVATE_NAMES)


def _host(url: str) -> str:
    return (urllib.parse.urlsplit(url).hostname or "").rstrip(".")


def is_loopback(url: str) -> bool:
    """Whether `url` is on this machine: no proxy belongs in between."""
    return (urllib.parse.urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")
