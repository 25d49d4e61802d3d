"""Answers that no service should send, one kind a line, for all three protocols; seeded where they draw.

`KINDS[name] = (makes, expected)`: `makes(shape, answer)` turns a good answer into what goes out, an object, bytes, or
(status, headers, bytes); `expected` is what may become of it: `text` (the texts that were sent, no other), `nothing`
(no continuation), or `stop` (no continuation, and the run ends in one line).
"""

import gzip
import json
import random
import zlib


class OpenAIShape:
    """Where the parts of an answer are, for chat completions."""

    name, reasoning = "openai", {"reasoning_content": "I think"}
    usage_key, tokens_in, tokens_out = "usage", "prompt_tokens", "completion_tokens"

    @staticmethod
    def texts(answer):
        return answer["choices"]

    @staticmethod
    def content(choice, value):
        choice["message"]["content"] = value

    @staticmethod
    def finish(choice, value):
        choice["finish_reason"] = value

    @staticmethod
    def lacks_content(choice):
        del choice["message"]["content"]

    @staticmethod
    def refusal(choice):
        choice["message"] |= {"content": None, "refusal": "I can't help with that."}

    @staticmethod
    def thoughts(choice):
        choice["message"] |= {"content": "", "reasoning_content": "I think so."}

    @staticmethod
    def tool(choice):
        choice["message"] |= {
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}],
        }

    @staticmethod
    def parts(choice, *texts):
        choice["message"]["content"] = [{"type": "text", "text": text} for text in texts]

    cached = ("prompt_tokens_details", "cached_tokens")
    stop, length, blocked, called = "stop", "length", "content_filter", "tool_calls"


class AnthropicShape:
    """The same for the Messages API."""

    name = "anthropic"
    usage_key, tokens_in, tokens_out = "usage", "input_tokens", "output_tokens"

    @staticmethod
    def texts(answer):
        return [answer]

    @staticmethod
    def content(answer, value):
        answer["content"] = value if value is None or isinstance(value, list) else [{"type": "text", "text": value}]

    @staticmethod
    def finish(answer, value):
        answer["stop_reason"] = value

    @staticmethod
    def lacks_content(answer):
        del answer["content"]

    @staticmethod
    def refusal(answer):
        answer |= {"content": [], "stop_reason": "refusal"}

    @staticmethod
    def thoughts(answer):
        answer["content"] = [{"type": "thinking", "thinking": "I think so.", "signature": "s"}]

    @staticmethod
    def tool(answer):
        answer["content"] = [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]

    @staticmethod
    def parts(answer, *texts):
        answer["content"] = [{"type": "text", "text": text} for text in texts]

    cached = (None, "cache_read_input_tokens")
    stop, length, blocked, called = "end_turn", "max_tokens", "refusal", "tool_use"


class GeminiShape:
    """The same for generateContent."""

    name = "gemini"
    usage_key, tokens_in, tokens_out = "usageMetadata", "promptTokenCount", "candidatesTokenCount"

    @staticmethod
    def texts(answer):
        return answer["candidates"]

    @staticmethod
    def content(candidate, value):
        parts = value if value is None or isinstance(value, list) else [{"text": value}]
        candidate["content"] = None if parts is None else {"role": "model", "parts": parts}

    @staticmethod
    def finish(candidate, value):
        candidate["finishReason"] = value

    @staticmethod
    def lacks_content(candidate):
        del candidate["content"]

    @staticmethod
    def refusal(candidate):
        candidate |= {"content": {"role": "model"}, "finishReason": "SAFETY"}

    @staticmethod
    def thoughts(candidate):
        candidate["content"] = {"role": "model", "parts": [{"text": "I think so.", "thought": True}]}

    @staticmethod
    def tool(candidate):
        candidate["content"] = {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]}

    @staticmethod
    def parts(candidate, *texts):
        candidate["content"] = {"role": "model", "parts": [{"text": text} for text in texts]}

    cached = (None, "cachedContentTokenCount")
    stop, length, blocked, called = "STOP", "MAX_TOKENS", "PROHIBITED_CONTENT", "UNEXPECTED_TOOL_CALL"


SHAPES = {shape.name: shape for shape in (OpenAIShape, AnthropicShape, GeminiShape)}


def each(change):
    """Applies `change(shape, text)` to every text of an answer."""

    def makes(shape, answer):
        for text in shape.texts(answer):
            change(shape, text)
        return answer

    return makes


def with_content(value, finish="stop"):
    def change(shape, text):
        shape.content(text, value)
        shape.finish(text, getattr(shape, finish) if finish in ("stop", "length", "blocked", "called") else finish)

    return each(change)


def with_finish(finish):
    return each(lambda shape, text: shape.finish(text, getattr(shape, finish) if hasattr(shape, finish) else finish))


def called(name):
    return each(lambda shape, text: getattr(shape, name)(text))


def error(value, *, beside=None):
    """An error inside a 200 answer; `beside`: a content that stands next to it, else the answer is the error alone."""

    def makes(shape, answer):
        if beside is None:
            return {"error": value} if not isinstance(value, tuple) else dict([value])
        answer = with_content(None if beside == "null" else beside)(shape, answer)
        return answer | {"error": value}

    return makes


def with_usage(**fields):
    """Sets parts of the usage: `into`, `out`, `cached`, or the whole by `all`; a value `del` takes one away."""

    def makes(shape, answer):
        if "all" in fields:
            return answer | {shape.usage_key: fields["all"]}
        usage = answer[shape.usage_key]
        names = {"into": (usage, shape.tokens_in), "out": (usage, shape.tokens_out)}
        inner, key = shape.cached
        names["cached"] = (usage.setdefault(inner, {}) if inner else usage, key)
        for name, value in fields.items():
            where, key = names[name]
            where.pop(key, None)
            if value != "del":
                where[key] = value
        return answer

    return makes


def raw(function):
    """The bytes that go out, of a good answer's JSON."""
    return lambda shape, answer: function(json.dumps(answer).encode())


def page(status, body, **headers):
    return lambda shape, answer: (status, {k.replace("_", "-"): v for k, v in headers.items()}, body)


def choices(value):
    def makes(shape, answer):
        key = {"openai": "choices", "anthropic": "content", "gemini": "candidates"}[shape.name]
        return answer | {key: value}

    return makes


def deep(levels):
    return lambda shape, answer: b'{"choices": ' + b"[" * levels + b"]" * levels + b"}"


def noise(seed):
    """Seeded: a random part of the answer replaced by a random wrong value."""

    def makes(shape, answer):
        rng = random.Random(seed)
        places = []

        def walk(value):
            for key in value if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    walk(value[key])

        walk(answer)
        holder, key = rng.choice(places)
        holder[key] = rng.choice([None, -1, 10**30, 1e300, True, "x", [], {}, [None], {"a": 1}, "\ud800", "\x1b[2J"])
        return answer

    return makes


GZ = {"Content-Encoding": "gzip"}
KINDS = {
    # texts that did not come
    "null content, finished": (with_content(None), "nothing"),
    "null content, at the length limit": (with_content(None, "length"), "nothing"),
    "null content, no word why": (with_content(None, None), "nothing"),
    "null content, an unknown word why": (with_content(None, "whatever"), "nothing"),
    "no content at all": (called("lacks_content"), "nothing"),
    "a refusal": (called("refusal"), "nothing"),
    "reasoning alone": (called("thoughts"), "nothing"),
    "a tool call alone": (called("tool"), "nothing"),
    "withheld in the middle": (with_finish("blocked"), "nothing"),
    "finished by a tool call, empty": (with_content("", "called"), "nothing"),
    "finished by an error, half a text": (with_finish("error"), "nothing"),
    "cancelled": (with_finish("cancelled"), "nothing"),
    "timed out inside": (with_finish("timeout"), "nothing"),
    "empty, at the length limit": (with_content("", "length"), "nothing"),
    "empty, no word why": (with_content("", None), "nothing"),
    "empty, an unknown word why": (with_content("", "whatever"), "nothing"),
    "a part that is null": (with_content([{"type": "text", "text": None}]), "nothing"),
    "a part of another type": (with_content([{"type": "image_url", "image_url": {}}]), "nothing"),
    "content is a number": (with_content([7]), "nothing"),
    "content is true": (with_content([True]), "nothing"),
    # texts that came
    "a list of parts": (each(lambda shape, text: shape.parts(text, " real", " text")), "text"),
    "control characters": (with_content(" real\x1b[2Jtext\x00"), "text"),
    "half a character": (with_content(" real \ud83d"), "text"),
    "an unknown word why, with a text": (with_content(" real", "hit_eos"), "text"),
    "a byte order mark": (raw(lambda b: b"\xef\xbb\xbf" + b), "text"),
    "compressed": (lambda shape, answer: (200, GZ, gzip.compress(json.dumps(answer).encode())), "text"),
    "twice as many texts": (lambda shape, answer: {k: v * 2 if k == "choices" else v for k, v in answer.items()}, "text"),
    # errors inside HTTP 200
    "error 429 alone": (error({"code": 429, "message": "slow down"}), "nothing"),
    "error 429 beside null": (error({"code": 429, "message": "slow down"}, beside="null"), "nothing"),
    "error 500 beside an empty text": (error({"code": "500", "message": "oops"}, beside=""), "nothing"),
    "error 503 beside a text": (error({"code": 503, "message": "overloaded"}, beside=" made up"), "nothing"),
    "error as a string": (error("internal failure", beside="null"), "nothing"),
    "error as a list": (error([{"message": "overloaded_error"}], beside="null"), "nothing"),
    "error by type alone": (error({"type": "overloaded_error"}), "nothing"),
    "error without a word": (error({"x": 1}, beside="null"), "nothing"),
    "detail alone": (error(("detail", "the engine is dead")), "nothing"),
    "message and code at the top": (lambda shape, answer: {"object": "error", "message": "no", "code": 500}, "nothing"),
    "not a success": (lambda shape, answer: {"success": False, "message": "busy"}, "nothing"),
    "an error in a list": (lambda shape, answer: [{"error": {"code": 503, "message": "busy"}}], "nothing"),
    "error 400 beside null": (error({"code": 400, "message": "bad field"}, beside="null"), "nothing"),
    "error 401 beside null": (error({"code": 401, "message": "who are you"}, beside="null"), "stop"),
    "error 402 alone": (error({"code": 402, "message": "pay first"}), "stop"),
    "no key by name": (error({"type": "authentication_error", "message": "bad"}, beside="null"), "stop"),
    "no credit by name": (error({"code": "insufficient_quota", "message": "x"}), "stop"),
    # bodies
    "no JSON": (raw(lambda b: b"hello"), "nothing"),
    "half of it": (raw(lambda b: b[: len(b) // 2]), "nothing"),
    "nothing": (raw(lambda b: b""), "nothing"),
    "a page": (page(200, b"<html>login</html>", Content_Type="text/html"), "nothing"),
    "a stream": (raw(lambda b: b"data: " + b + b"\n\ndata: [DONE]\n\n"), "nothing"),
    "a number": (raw(lambda b: b"7"), "nothing"),
    "null": (raw(lambda b: b"null"), "nothing"),
    "an empty list": (raw(lambda b: b"[]"), "nothing"),
    "an empty object": (raw(lambda b: b"{}"), "nothing"),
    "not UTF-8": (raw(lambda b: b[:-2] + b"\xff\xfe}"), "nothing"),
    "nested 200,000 deep": (deep(200_000), "nothing"),
    "a number of 10,000 digits": (raw(lambda b: b[:-1] + b', "x": ' + b"9" * 10_000 + b"}"), "nothing"),
    "a gzip bomb": (lambda shape, answer: (200, GZ, BOMB), "nothing"),
    "broken compression": (lambda shape, answer: (200, GZ, b"\x1f\x8b\x08" + b"x" * 40), "nothing"),
    "an encoding that was not asked for": (page(200, b"x" * 40, Content_Encoding="br"), "nothing"),
    "20 MB of spaces": (raw(lambda b: b" " * (20 << 20) + b), "nothing"),
    "a 50 MB error page": (page(500, b"<html>" + b"x" * (50 << 20)), "nothing"),
    "no choice": (choices([]), "nothing*"),
    "choices are an object": (choices({}), "nothing"),
    "choices are a string": (choices("text"), "nothing*"),
    "a choice is null": (choices([None]), "nothing"),
    "a choice is a number": (choices([3]), "nothing"),
    "no content status": (page(204, b""), "nothing"),
    "moved": (page(301, b"", Location="http://127.0.0.1:9/v1"), "stop"),
    "a teapot": (page(418, b"short and stout"), "nothing"),
    "a gateway's 502": (page(502, b"<html>bad gateway</html>"), "nothing"),
    "a gateway's 504": (page(504, b""), "nothing"),
    # usage that cannot be
    "usage: negative input": (with_usage(into=-1000), "text"),
    "usage: negative output": (with_usage(out=-50), "text"),
    "usage: cached above prompt": (with_usage(into=10, cached=5000), "text"),
    "usage: negative cached": (with_usage(cached=-5000), "text"),
    "usage: no output": (with_usage(out="del"), "text"),
    "usage: no input": (with_usage(into="del"), "text"),
    "usage: null": (with_usage(all=None), "text"),
    "usage: a word": (with_usage(all="free"), "text"),
    "usage: a list": (with_usage(all=[1]), "text"),
    "usage: empty": (with_usage(all={}), "text"),
    "usage: text": (with_usage(into="many"), "text"),
    "usage: digits as text": (with_usage(into="12"), "text"),
    "usage: half a token": (with_usage(out=1.5), "text"),
    "usage: true": (with_usage(out=True), "text"),
    "usage: 10**30": (with_usage(into=10**30), "text"),
    "usage: 1e400": (raw(lambda b: b.replace(b'"x-out": 1', b'"x-out": 1e400')), "text"),
    "usage: a million tokens out": (with_usage(out=10**6), "text"),
    "usage: a million tokens in": (with_usage(into=10**6), "text"),
    "usage: zeros": (with_usage(into=0, out=0), "text"),
    "usage: nothing written": (with_usage(out=0), "text"),
    "usage: 2**63": (with_usage(into=2**63), "text"),
} | {f"noise {seed}": (noise(seed), "any") for seed in range(24)}  # fmt: skip


def _bomb():
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    block = b" " * (1 << 20)
    return b"".join([*(coder.compress(block) for _ in range(64)), coder.flush()])


BOMB = _bomb()  # 64 MB in 64 kB
