"""How an answer is read, for all three protocols: JSON, an error inside it, what became of each text, what was billed.

Nothing that a server writes is believed further than it must be: a field of another type, an impossible number or a
missing text has one meaning here, whichever protocol it came by.
"""

import contextlib
import json
import re
from typing import NamedTuple

from omniopd_jax.teachers.wire.calls import Billed, CallError, Text

MAX_TOKENS = 2**40  # more than any call could use, and well inside SQLite's integers
# names that servers have for an end of the model's own making, and for the length cap
STOP = frozenset(
    {
        "stop",
        "eos",
        "eos_token",
        "end_turn",
        "stop_sequence",
        "stop_token",
        "end",
        "done",
        "complete",
        "completed",
        "finished",
    }
)
LENGTH = frozenset(
    {
        "length",
        "max_tokens",
        "max_output_tokens",
        "max_completion_tokens",
        "max_length",
        "model_length",
        "model_context_window_exceeded",
    }
)
WITHHELD = re.compile(
    r"filter|safety|refus|block|abort|cancel|moderat|guard|policy|recit|prohibit|spii|sensitive|language|error|fail|timeout|"
    r"overload|unavailable|malformed|^other$|image_|insufficient|incomplete|interrupt|truncat|not_finished",
    re.IGNORECASE,
)
NO_TEXT = re.compile(r"tool|function|pause", re.IGNORECASE)  # the model did something else than write
STATUS = (  # what an error is called -> the HTTP status that it stands for
    (400, r"content[_ ](?:filter|policy)|requires moderation|(?:prompt|input) was flagged"),
    (402, r"insufficient[_ ](?:quota|balance|credits?|funds)|payment[_ ]required|billing_|credit balance is too low"),
    (429, r"exceeded your current quota"),
    (401, r"invalid[_ ]api[_ ]key|incorrect api key|api key not valid|authenti|unauthori[sz]ed"),
    (403, r"permission|forbidden|access[_ ]denied"),
    (429, r"rate[_ ]?limit|too[_ ]many[_ ]requests|resource[_ ]?exhausted|throttl"),
    (404, r"not[_ ]found|does not exist"),
    (504, r"time[d]?[_ ]?out|deadline[_ ]exceeded"),
    (503, r"overload|unavailable|capacity"),
    (400, r"invalid[_ ](?:request|arg|param)|bad[_ ]?request|failed[_ ]precondition|unprocessable|context[_ ]length"),
    (500, r"server[_ ]?error|internal|api_error"),
)  # fmt: skip


def json_object(data: bytes, kind: str = "") -> dict:
    """The body of a 200 answer as a JSON object.

    Raises:
      CallError: `retry`, outcome unknown, where it is none: another type, no UTF-8, nested too deep, numbers too long.
    """
    try:
        body = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        what = {"RecursionError": "JSON nested too deep", "JSONDecodeError": "a body that is no JSON"}.get(
            type(e).__name__
        )
        body, said = None, what or "a body that cannot be read"
    else:
        if isinstance(body, list) and len(body) == 1:  # Gemini's way to send an error
            body = body[0]
        said = "a body that is no JSON object"
    if not isinstance(body, dict):
        raise CallError(f"HTTP 200 with {said} ({kind or 'no content type'})", "retry", outcome="unknown")
    return body


def malformed(what: str) -> CallError:
    """A 200 answer whose JSON lacks what the protocol promises."""
    return CallError(f"HTTP 200 whose JSON has no {what}", "retry", outcome="unknown")


@contextlib.contextmanager
def as_promised():
    """Around the reading of a 200 answer: whatever goes wrong in it is a `CallError`, not a crash."""
    try:
        yield
    except CallError:
        raise
    except Exception as e:  # an answer may be anything
        raise CallError(
            f"HTTP 200 with a malformed body ({type(e).__name__}: {e})", "retry", outcome="unknown"
        ) from None


# errors


class Inside(NamedTuple):
    """An error that an answer holds: the status that it names itself, by number or by name (None: it names none)."""

    status: int | None
    message: str
    param: str  # the request field that it names beside its message


def error_in(answer) -> Inside | None:
    """The error that an answer holds, in any of the forms that servers have; None: it holds none."""
    if not isinstance(answer, dict):
        return None
    found = answer.get("error") or answer.get("errors")
    if not found and isinstance(answer.get("choices"), list) and answer["choices"]:  # one of its own in every choice
        errors = [c.get("error") if isinstance(c, dict) else None for c in answer["choices"]]
        found = errors[0] if all(errors) else None
    if found:
        found = found[0] if isinstance(found, list) else found
        return _inside(found, answer)
    if answer.get("object") == "error" or answer.get("type") == "error" or answer.get("success") is False:
        return _inside(answer, {})
    has_texts = any(
        name in answer for name in ("choices", "candidates", "content", "data", "promptFeedback", "id", "name")
    )
    if not has_texts and (answer.get("detail") or answer.get("message")):
        return _inside(answer, {})
    return None


def _inside(error, around) -> Inside:
    param = error.get("param") if isinstance(error, dict) else None
    return Inside(_status_of(error, around), _message_of(error), param if isinstance(param, str) else "")


def _message_of(error) -> str:
    if isinstance(error, dict):
        texts = [error.get(k) for k in ("message", "detail", "msg", "error", "description", "reason")]
        words = next((t for t in texts if isinstance(t, str) and t), None)
        words = words or json.dumps(next((t for t in texts if t), error), default=str)[:600]
        names = [str(error[k]) for k in ("code", "type", "status") if isinstance(error.get(k), str) and error[k]]
        return words[:2000] + (f" ({', '.join(names)[:100]})" if names else "")
    return str(error)[:2000]


def _status_of(error, around) -> int | None:
    places = [error] if isinstance(error, dict) else []
    places += [around]
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        places.insert(0, error["error"])
    for place in places:
        for key in ("code", "status", "status_code", "statusCode", "http_status", "error_code"):
            value = place.get(key)
            if isinstance(value, str) and re.fullmatch(r"\s*(?:HTTP\s*)?[45]\d\d\s*", value):
                value = int(value.strip()[-3:])
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
                return value
    names = " ".join(
        str(place.get(k)) for place in places for k in ("code", "type", "status") if isinstance(place.get(k), str)
    )
    for said in (names, _message_of(error)):
        for status, pattern in STATUS:
            if re.search(pattern, said, re.IGNORECASE):
                return status
    return None


# texts


def text(content, finish, *, refusal=None, reasoning=None, calls=None, ended_empty: bool = False) -> Text:
    """What became of one text.

    Args:
      content: a string, a list of parts, or None: what the answer has where the text belongs.
      finish: why the model stopped, in the server's word.
      refusal, reasoning, calls: what may stand beside or in the place of a text.
      ended_empty: whether an answer without any part is this protocol's way to say that the model had nothing to add.
    """
    written, said = _written(content)
    reason = finish if isinstance(finish, str) else "" if finish is None else str(finish)
    if said.get("refusal") or (refusal and refusal is not True):
        return Text("", "withheld", "a refusal in the place of a text")
    if WITHHELD.search(reason):
        return Text("", "withheld", f"finished by {reason!r}")
    if NO_TEXT.search(reason) or (not written and (calls or said.get("calls"))):
        return Text("", "failed", "a tool call in the place of a text")
    if not written and (reasoning or said.get("reasoning")):
        return Text("", "failed", "reasoning alone, no text")
    if written is None and not (ended_empty and reason.lower() in STOP):
        return Text("", "failed", "no text came (null content)")
    if reason.lower() in STOP:
        return Text(written or "", "stop")
    if not written and reason.lower() not in LENGTH:
        return Text("", "failed", f"no text came (finished by {finish!r})")
    return Text(written or "", "length")  # by its cap, or by a word that does not say that the model had ended


def _written(content) -> tuple[str | None, dict]:
    """(the text of a content, None where there is none; what else its parts hold). Raises TypeError for other types."""
    if content is None or isinstance(content, str):
        return content, {}
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise TypeError(f"content is {type(content).__name__}")
    texts, also = [], {}
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise TypeError(f"a part of content is {type(part).__name__}")
        kind = str(part.get("type") or "text").lower()
        if "refus" in kind or part.get("refusal"):
            also["refusal"] = True
        elif "think" in kind or "reason" in kind or part.get("thought") is True:
            also["reasoning"] = True
        elif "tool" in kind or "function" in kind or {"functionCall", "executableCode", "inlineData"} & part.keys():
            also["calls"] = True
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("text") is not None:
            raise TypeError(f"a part's text is {type(part['text']).__name__}")
    return ("".join(texts) if texts else None), also


# money


def billed(
    tokens_in, tokens_out, *, cached=None, written=None, hidden=None, total=None, wrote: bool = True
) -> Billed | None:
    """What an answer says it used, or None where it does not say: a part is missing, negative, no whole number, or
    cannot be.

    Args:
      tokens_in: all of the input, with the cached and the cache-writing tokens in it.
      tokens_out: all of the output.
      cached, written: parts of the input; None where the answer has no such field.
      hidden: the hidden part of the output, where it is told apart.
      total: of input and output; where it is more than both, hidden output was left out of `tokens_out`.
      wrote: whether any text came: then the output cannot be 0.
    """
    parts = [tokens_in, tokens_out, cached or 0, written or 0, hidden or 0]
    if any(not whole(value) for value in parts):
        return None
    tokens_in, tokens_out, cached, there, hidden = parts
    if (
        tokens_in == 0
        or cached + there > tokens_in
        or (wrote and tokens_out == 0)
        or hidden > max(tokens_out, _or_0(total))
    ):
        return None
    if total is not None and not whole(total):
        return None
    return Billed(tokens_in, max(tokens_out, _or_0(total) - tokens_in), cached, written)


def states_usage(answer) -> bool:
    """Whether an answer, of whichever protocol, says that it used tokens."""
    usage = as_dict(as_dict(answer).get("usage") or as_dict(answer).get("usageMetadata"))
    names = (
        "prompt_tokens",
        "completion_tokens",
        "input_tokens",
        "output_tokens",
        "promptTokenCount",
        "totalTokenCount",
    )
    return any(_or_0(usage.get(name)) for name in names)


def whole(value) -> bool:
    """Whether `value` is a count: a whole number, not negative, of a size that could be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS


def _or_0(value) -> int:
    return value if whole(value) else 0


def as_dict(value) -> dict:
    """The fields of a part of the usage; {} where it is no object: then it says nothing."""
    return value if isinstance(value, dict) else {}


def mapping(value) -> dict:
    """`value` where it is an object; {} where it is null; else it is not what the protocol says."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} in the place of an object")
    return value
