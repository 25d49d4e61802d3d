"""Log-probs of the student's own tokens from an OpenAI-compatible server, for the white-box objective `opd`.

The ids are sent as they are, so nothing is tokenized again, and what comes back must be for exactly these ids: their
number and each id are compared, and every value must be a log-probability. Nothing is filled in: a score that is
missing or does not fit ends the run with what is wrong.

Two ways that servers have, tried in this order by the probe:

- `prompt_logprobs` (vLLM): one dict a prompt token, token id -> `{"logprob", "rank", "decoded_token"}`, None for the
first.
- `echo` (SGLang, vLLM): `echo` with `logprobs`; the ids come as `prompt_token_ids`, or as names `token_id:N`.

llama.cpp and `transformers serve` give neither, nor do the OpenAI, Anthropic and Gemini services.
"""

import hashlib
import json
import math

from omniopd_jax.teachers import wire

VERSION = 1  # part of the journal's key
WAYS = {  # -> the fields beside `prompt` and `max_tokens`
    "prompt_logprobs": {"prompt_logprobs": 1, "return_token_ids": True},
    "echo": {"echo": True, "logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True},
}
LEAST = -9999.0  # what servers write for minus infinity, which JSON has not


def read(answer: dict, call: wire.ScoreCall) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """(log-probs of `call.token_ids` in nats, the server's names of all tokens sent or '' where it gives none).

    Raises:
      CallError: `refused`, field `logprobs`, where there are no log-probs at all; `stop` where their number or their
      ids
        are not those that were sent, or a value is no log-probability.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise wire.malformed("choices")
    sent, first = [*call.prompt_ids, *call.token_ids], len(call.prompt_ids)
    got = {"prompt_logprobs": _from_prompt_logprobs, "echo": _from_echo}[call.way](choices[0], sent)
    if got is None:
        raise wire.CallError("HTTP 200 without log-probs of the prompt", "refused", status=200, field="logprobs")
    values, names = got
    told = choices[0].get("prompt_token_ids")
    if told is not None and list(told) != sent:
        raise _unfit(f"{len(sent)} token ids were sent, and the server scored others ({_first_difference(sent, told)})")
    for i in range(first, len(sent)):
        value = values[i]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
            raise _unfit(f"the log-prob of token {sent[i]} at position {i} is {value!r}")
        if value <= LEAST:
            raise _unfit(f"token {sent[i]} at position {i} has probability 0: the model cannot write it")
    return tuple(min(0.0, float(v)) for v in values[first:]), tuple(names)


def key(cfg, model: str, prompt_ids, token_ids) -> tuple[bytes, dict]:
    """(the journal's key of a score, what it says in words). It depends on nothing but the model and the ids."""
    about = {"provider": cfg.teacher.provider, "model": model, "mode": "score", "version": str(VERSION)}
    content = json.dumps([about, list(map(int, prompt_ids)), list(map(int, token_ids))], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest(), about


def _from_prompt_logprobs(choice, sent):
    rows = choice.get("prompt_logprobs")
    if rows is None:
        return None
    _same_number(rows, sent)
    values, names = [], []
    for i, (row, token) in enumerate(zip(rows, sent)):
        entry = (row or {}).get(str(token))
        if i and entry is None:
            raise _unfit(
                f"token {token} was sent at position {i}, and the server scored {', '.join(row or {}) or 'none'}"
            )
        values.append(entry["logprob"] if entry else None)
        names.append((entry or {}).get("decoded_token") or "")
    return values, names


def _from_echo(choice, sent):
    logprobs = choice.get("logprobs") or {}
    values, names = logprobs.get("token_logprobs"), logprobs.get("tokens") or []
    if not values or len(values) <= 1 < len(sent):  # nothing, or the written token alone
        return None
    values = values[:-1] if len(values) == len(sent) + 1 else values  # the last is of the token that it wrote itself
    _same_number(values, sent)
    names = [str(name) for name in names[: len(sent)]]
    if names and all(name.startswith("token_id:") for name in names):
        told = [int(name.removeprefix("token_id:")) for name in names]
        if told != sent:
            raise _unfit(
                f"{len(sent)} token ids were sent, and the server scored others ({_first_difference(sent, told)})"
            )
        names = []
    elif choice.get("prompt_token_ids") is None:
        raise _unfit(
            "the server does not say which tokens it scored: neither `prompt_token_ids` nor names `token_id:N`"
        )
    return values, names or [""] * len(sent)


def _same_number(rows, sent):
    if len(rows) != len(sent):
        raise _unfit(f"{len(sent)} tokens were sent, and {len(rows)} log-probs came back")


def _first_difference(sent, told) -> str:
    for i, (a, b) in enumerate(zip(sent, told)):
        if a != b:
            return f"position {i}: {a} was sent, {b} scored"
    return f"{len(told)} of them"


def _unfit(what: str) -> wire.CallError:
    return wire.CallError(f"its log-probs do not fit: {what}", "stop", outcome="unknown", status=200)
