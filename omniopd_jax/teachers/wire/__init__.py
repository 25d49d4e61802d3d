"""What the providers share: one call and its reply, what an error means, secrets, HTTP clients.

A provider's client (`openai`, `anthropic`, `gemini`) turns a `Call` into one HTTP exchange and either returns a `Reply`
or raises a `CallError`, which says whether asking again can help and whether it may have been billed. Retries, limits,
money and memory are not its business: `traffic`, `budget`, `journal`. Every answer is read by `read`, bounded and
checked by `http`.
"""

import os
import re

from omniopd_jax.teachers.wire import http, read, secrets
from omniopd_jax.teachers.wire.calls import Billed, Call, CallError, Limits, Reply, ScoreCall, Text, text_of
from omniopd_jax.teachers.wire.http import (
    Connection,
    duration,
    exchange,
    from_exception,
    from_status,
    limits,
    named_field,
    retry_after,
)
from omniopd_jax.teachers.wire.read import as_promised, malformed
from omniopd_jax.teachers.wire.secrets import (
    KEYS,
    api_key,
    base_url,
    check_key_may_go,
    hide_keys,
    is_official,
    own_server,
    scrub,
)

__all__ = [
    "KEYS",
    "MODES",
    "VERSION",
    "Billed",
    "Call",
    "CallError",
    "Connection",
    "Learner",
    "Limits",
    "Reply",
    "ScoreCall",
    "Text",
    "after_prefix",
    "api_key",
    "as_promised",
    "bare",
    "base_url",
    "check_key_may_go",
    "clean",
    "duration",
    "exchange",
    "from_exception",
    "from_status",
    "hide_keys",
    "http",
    "is_official",
    "limits",
    "malformed",
    "named_field",
    "own_server",
    "read",
    "retry_after",
    "same_model",
    "scrub",
    "secrets",
    "text_of",
]
MODES = ("completion", "prefill", "continue_final_message", "prefix", "instruct")
VERSION = 1  # of how a mode is put on the wire: part of every journal key
SINGLE = 3  # calls in a row for n texts that brought one: then they are asked for one by one
AGAIN = 64  # single calls after which n is asked for once more: a server may have had a bad moment


def clean(text: str) -> str:
    """`text` as UTF-8 can hold it: halves of a character that was cut (lone surrogates) become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Learner:
    """What a client finds out about its service: fields refused by name, and whether n texts a call can be had."""

    def __init__(self, *, takes_n: bool):
        self.takes_n = takes_n
        self.n_proven = False  # a call with n > 1 has been answered with several texts
        self.n_suspected = False  # one was refused for no named reason: the next single call tells
        self.single = 0  # calls for n texts in a row that brought one
        self.since = 0  # single calls since n was given up for short answers; 0: it was not
        self.dropped = set()

    def answered(self, call: Call, texts: int) -> None:
        """Takes note of a call that worked: how many texts it brought decides whether n is asked for."""
        self.n_suspected = False
        if call.n > 1 and texts > 1:
            self.n_proven, self.single, self.since = True, 0, 0
        elif call.n > 1:
            self.single += 1
            if not self.n_proven or self.single >= SINGLE:
                self.takes_n, self.since = False, 1
        elif self.since:
            self.since += 1
            if self.since > AGAIN:
                self.takes_n, self.since = True, 0

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

    def learnt_meanwhile(self, error: CallError, before: set) -> bool:
        """Whether a call was refused for a field that others, sent at the same time, have learnt to leave out.

        Args:
          before: `dropped` as it was when the call went out.
        """
        return error.kind == "refused" and error.status in (400, 422) and error.field in self.dropped - before


def same_model(asked: str, served: str, aliases: bool) -> bool:
    """Whether the model that answered is the one that was asked for: by name, or a state of it (a date, a version).

    A server that is not the provider's own may call it by its path or by an alias of its own making (`aliases`): one
    name that holds the other will do.
    """
    a, b = (_family(name) for name in (asked, served))
    return a == b or (aliases and (a in b or b in a))


def _family(name: str) -> str:
    short = name.removeprefix("models/").rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"(?:-latest|[-@]20\d{6}|-20\d\d-\d\d-\d\d|-\d{3})$", "", short)


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
