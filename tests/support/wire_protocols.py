"""What the wire server checks and answers: the OpenAI, Anthropic and Gemini protocols, field by field.

Each class knows one provider's requests (`parse`), answers, errors and model listing (`describe`).
"""

import json


class Refusal(Exception):
    """An answer with an error status: (status, message, field)."""


def _fields(body, allowed, where="", refuses=()):
    """Checks types and names; `allowed` maps a field to a test."""
    for name, value in body.items():
        if name in refuses:
            raise Refusal(400, f"Unsupported parameter: '{name}' is not supported with this model.", name)
        if name not in allowed:
            raise Refusal(400, f"Unrecognized request argument supplied: {where}{name}", "")
        if not allowed[name](value):
            raise Refusal(400, f"Invalid value for '{where}{name}': {json.dumps(value)[:80]}", name)


def _integer(low, high):
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _number(low, high):
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high


def _string(v):
    return isinstance(v, str) and bool(v)


def _boolean(v):
    return isinstance(v, bool)


def _need(body, *names):
    for name in names:
        if name not in body:
            raise Refusal(400, f"Missing required parameter: '{name}'.", name)


def _tail(messages):
    """(last role, text that the model continues) of chat messages: everything, the turns separated by blank lines."""
    return messages[-1]["role"], "\n\n".join(message["content"] for message in messages)


def _instructed(messages):
    """The unfinished answer, where the last turn asks for the next words of it; else None."""
    asks = len(messages) > 1 and messages[-1]["role"] == "user" and "cut off by accident" in messages[-1]["content"]
    return messages[-2]["content"] if asks and messages[-2]["role"] == "assistant" else None


class OpenAI:
    """`/v1/chat/completions`, `/v1/completions`, `/v1/models`: openai-openapi, with vLLM's and DeepSeek's
    extensions."""

    name = "openai"
    TOO_LONG = "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens."
    SHARED = {
        "model": _string, "n": _integer(1, 128), "temperature": _number(0, 2), "top_p": _number(0, 1),
        "seed": _integer(-(2**63), 2**63 - 1), "max_tokens": _integer(1, 2**31),
        "stop": lambda v: _string(v) or (isinstance(v, list) and len(v) <= 4 and all(map(_string, v))),
    }  # fmt: skip
    CHAT = SHARED | {
        "messages": lambda v: isinstance(v, list) and bool(v), "max_completion_tokens": _integer(1, 2**31),
        "reasoning_effort": lambda v: v in ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    }  # fmt: skip
    COMPLETION = SHARED | {
        "prompt": lambda v: _string(v) or (isinstance(v, list) and bool(v) and all(map(_integer(0, 2**31), v))),
        "echo": _boolean, "logprobs": _integer(0, 5),
    }  # fmt: skip
    SCORING = {"prompt_logprobs": {"prompt_logprobs": _integer(-1, 2**31)}, "echo": {}}
    IDS = {"return_token_ids": _boolean, "return_tokens_as_token_ids": _boolean}
    VLLM = {"continue_final_message": _boolean, "add_generation_prompt": _boolean}
    VLLM |= {"chat_template_kwargs": lambda v: isinstance(v, dict)}

    @staticmethod
    def sent_key(headers):
        return (headers.get("authorization") or "").removeprefix("Bearer ")

    @staticmethod
    def describe(owner, path):
        if path.rstrip("/") != "/v1/models":
            raise Refusal(404, f"Unknown request URL: GET {path}", "")
        return 200, {
            "object": "list",
            "data": [{"id": m, "object": "model", "created": 1, "owned_by": "test"} for m in owner.models],
        }

    @staticmethod
    def error(status, message, field):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        return {"error": {"message": message, "type": kind, "param": field or None, "code": None}}

    @classmethod
    def parse(cls, owner, body, path, headers):
        if path == "/v1/completions" and "completion" in owner.extensions:
            gives = [way for way in cls.SCORING if way in owner.extensions]
            more = {k: v for way in gives for k, v in (cls.SCORING[way] | cls.IDS).items()}
            if "ignore_unknown" in owner.extensions:
                more = cls.SCORING["prompt_logprobs"] | cls.IDS
            if "skip_special_tokens" in owner.extensions:
                more = more | {"skip_special_tokens": _boolean}
            _fields(body, cls.COMPLETION | more, refuses=owner.refuses)
            _need(body, "model", "prompt")
            cls.known(owner, body)
            if isinstance(body["prompt"], str):
                return cls.asked(body, body["prompt"], raw=True)
            ids = body["prompt"]
            scores = {
                "score": {k: body.get(k) for k in (*cls.IDS, "prompt_logprobs", "echo", "logprobs")} | {"ids": ids}
            }
            return cls.asked(body, " ".join(map(str, ids)), raw=True) | scores | {"tokens_in": len(ids)}
        if path != "/v1/chat/completions":
            raise Refusal(404, f"Unknown request URL: POST {path}", "")
        extended = "continue_final_message" in owner.extensions or "ignore_unknown" in owner.extensions
        _fields(body, cls.CHAT | (cls.VLLM if extended else {}), refuses=owner.refuses)
        _need(body, "model", "messages")
        cls.known(owner, body)
        for i, message in enumerate(body["messages"]):
            allowed = {
                "role": lambda v: v in ("system", "developer", "user", "assistant"),
                "content": lambda v: isinstance(v, str),
            }
            if "prefix" in owner.extensions or "ignore_unknown" in owner.extensions:
                allowed["prefix"] = lambda v, i=i: v is True and i == len(body["messages"]) - 1
            _fields(message, allowed, f"messages[{i}].")
            _need(message, "role", "content")
        role, context = _tail(body["messages"])
        final = body.get("continue_final_message", False)
        if final and body.get("add_generation_prompt", True):
            raise Refusal(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "")
        if final and role != "assistant":
            raise Refusal(400, "continue_final_message needs a last message of the assistant", "")
        if (answer := _instructed(body["messages"])) is not None:
            context = answer
        else:
            continues = role == "assistant" and (
                (final and "continue_final_message" in owner.extensions)
                or (body["messages"][-1].get("prefix") and "prefix" in owner.extensions)
                or "prefill" in owner.extensions
            )
            if role == "assistant" and not continues:
                context = "one"  # a chat service takes the turn as finished and starts over
                return cls.asked(body, "", restart=True)
            if continues:
                return cls.asked(body, context, raw=True) | {"thinks": cls.thinks(owner, body)}
        return cls.asked(body, context) | {"thinks": cls.thinks(owner, body)}

    @staticmethod
    def known(owner, body):
        if body["model"] not in owner.models:
            raise Refusal(404, f"The model `{body['model']}` does not exist or you do not have access to it.", "")

    @staticmethod
    def thinks(owner, body):
        return owner.model_thinks == "always" or (owner.model_thinks and body.get("reasoning_effort") != "none")

    @staticmethod
    def asked(body, context, *, raw=False, restart=False):
        most = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        return {
            "context": context,
            "n": body.get("n", 1),
            "seed": body.get("seed"),
            "max_tokens": most,
            "chat": not raw,
            "thinks": False,
            "restart": restart,
            "completion": "prompt" in body,
            "model": body["model"],
        }

    @staticmethod
    def answer(asked, texts, usage):
        texts = ["one two three" if asked["restart"] else text for text in texts]
        choices = []
        for i, text in enumerate(texts):
            choice = {"index": i, "finish_reason": "length" if text or usage["hidden"] else "stop", "logprobs": None}
            choice |= (
                {"text": text}
                if asked["completion"]
                else {"message": {"role": "assistant", "content": text, "refusal": None}}
            )
            choices.append(choice)
        total = usage["in"] + usage["out"]
        return {
            "id": "cmpl-1",
            "object": "text_completion" if asked["completion"] else "chat.completion",
            "created": 1,
            "model": asked["model"],
            "choices": choices,
            "usage": {
                "prompt_tokens": usage["in"],
                "completion_tokens": usage["out"],
                "total_tokens": total,
                "prompt_tokens_details": {"cached_tokens": usage["in"] // 2},
                "completion_tokens_details": {"reasoning_tokens": usage["hidden"]},
            },
        }

    @classmethod
    def scored(cls, owner, asked):
        """The choice of a request whose prompt is token ids: vLLM's `prompt_logprobs`, or `echo` as vLLM and SGLang
        have it."""
        want, ids = asked["score"], list(asked["score"]["ids"])
        choice = {"index": 0, "text": " x", "finish_reason": "length", "logprobs": None, "stop_reason": None}
        if owner.scores is None or owner.misfit == "missing":
            return choice | {"prompt_logprobs": None}
        values = list(owner.scores(ids))
        if owner.misfit == "count":
            ids, values = ids[:-1], values[:-1]
        if owner.misfit in ("nan", "zero"):
            values[-1] = float("nan") if owner.misfit == "nan" else -9999.0
        if owner.misfit == "ids":
            ids[-2] += 1
        if want["return_token_ids"] and owner.misfit != "nameless":
            choice |= {"prompt_token_ids": ids, "token_ids": [7]}
        if want["prompt_logprobs"] is not None and "prompt_logprobs" in owner.extensions:
            rows = [
                {str(i + 1): {"logprob": -0.1}, str(i): {"logprob": v, "rank": 2, "decoded_token": owner.name_of(i)}}
                for i, v in zip(ids[1:], values[1:])
            ]
            choice["prompt_logprobs"] = [None, *rows]
        if want["echo"] and want["logprobs"] is not None and "echo" in owner.extensions:
            as_ids = want["return_tokens_as_token_ids"] and owner.names_ids
            names = [f"token_id:{i}" if as_ids and owner.misfit != "nameless" else owner.name_of(i) for i in (*ids, 7)]
            values = [None, *values[1:], -1.0]
            choice["logprobs"] = {"tokens": names, "token_logprobs": values, "top_logprobs": [], "text_offset": [-1]}
        return choice


class Anthropic:
    """`/v1/messages` and `/v1/models/ID`: the Messages API of 2023-06-01 and 2026-10-21 (the SDK's)."""

    name = "anthropic"
    TOO_LONG = "prompt is too long: 200041 tokens > 200000 maximum"
    FIELDS = {
        "model": _string, "max_tokens": _integer(1, 2**31), "messages": lambda v: isinstance(v, list) and bool(v),
        "system": lambda v: isinstance(v, str | list), "temperature": _number(0, 1), "top_p": _number(0, 1),
        "thinking": lambda v: v == {"type": "disabled"}, "stop_sequences": lambda v: isinstance(v, list),
    }  # fmt: skip

    @staticmethod
    def sent_key(headers):
        return headers.get("x-api-key") or (headers.get("authorization") or "").removeprefix("Bearer ")

    @staticmethod
    def describe(owner, path):
        name = path.removeprefix("/v1/models/").split("?")[0]
        if name not in owner.models:
            raise Refusal(404, f"model: {name}", "")
        off = {"supported": owner.model_thinks != "always"}
        capabilities = {"thinking": {"supported": True, "types": {"disabled": off}}}
        return 200, {
            "type": "model",
            "id": name,
            "display_name": "Test",
            "created_at": "2026-01-01T00:00:00Z",
            "capabilities": capabilities,
        }

    @staticmethod
    def error(status, message, field):
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(status, "overloaded_error" if status in (503, 529) else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}

    @classmethod
    def parse(cls, owner, body, path, headers):
        if headers.get("anthropic-version") not in ("2023-06-01", "2026-10-21"):
            raise Refusal(400, "anthropic-version: header is required", "")
        _fields(body, cls.FIELDS, refuses=owner.refuses)
        _need(body, "model", "max_tokens", "messages")
        if body["model"] not in owner.models:
            raise Refusal(404, f"model: {body['model']}", "")
        if "temperature" in body and "top_p" in body:
            raise Refusal(
                400, "`temperature` and `top_p` cannot both be specified for this model. Please use only one.", ""
            )
        turns, marks, sequence = [], 0, [("system", str(body.get("system", "")), False)]
        for i, message in enumerate(body["messages"]):
            _fields(
                message, {"role": lambda v: v in ("user", "assistant"), "content": lambda v: bool(v)}, f"messages.{i}."
            )
            _need(message, "role", "content")
            blocks = message["content"]
            blocks = [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks
            for block in blocks:
                allowed = {"type": lambda v: v == "text", "text": lambda v: isinstance(v, str) and bool(v.strip())}
                _fields(
                    block, allowed | {"cache_control": lambda v: v == {"type": "ephemeral"}}, f"messages.{i}.content."
                )
                marks += "cache_control" in block
            turns.append({"role": message["role"], "content": "".join(block["text"] for block in blocks)})
            sequence += [(message["role"], block["text"], "cache_control" in block) for block in blocks]
        if marks > 4:
            raise Refusal(400, f"A maximum of 4 blocks with cache_control may be provided. Found {marks}.", "")
        if turns[0]["role"] != "user":
            raise Refusal(400, "messages: first message must use the user role", "")
        role, context = _tail(turns)
        if role == "assistant":
            if "prefill" not in owner.extensions:
                raise Refusal(
                    400,
                    "This model does not support assistant message prefill. The conversation must end with a user "
                    "message.",
                    "",
                )
            if turns[-1]["content"] != turns[-1]["content"].rstrip():
                raise Refusal(400, "messages: final assistant content cannot end with trailing whitespace", "")
        answer = _instructed(turns)
        thinks = owner.model_thinks == "always" or (owner.model_thinks and "thinking" not in body)
        return {
            "context": answer if answer is not None else context,
            "n": 1,
            "seed": None,
            "max_tokens": body["max_tokens"],
            "chat": role != "assistant",
            "thinks": thinks,
            "model": body["model"],
            "cache": cls.cache(owner, sequence),
        }

    LOOK_BACK = 20  # blocks before a mark at which an earlier entry is looked for

    @classmethod
    def cache(cls, owner, sequence):
        """(fresh, read, written) tokens of a request, by the marks that it carries; None where the server keeps no
        cache."""
        if owner.cache_least is None:
            return None
        ends, before, hashes = [], 0, []
        for i, (_, text, _) in enumerate(sequence):
            before += len(text)
            ends.append(before // 4)
            hashes.append(hash(tuple((role, t) for role, t, _ in sequence[: i + 1])))
        marked = [i for i, (*_, mark) in enumerate(sequence) if mark and ends[i] >= owner.cache_least]
        with owner.lock:
            near = {k for i in marked for k in range(max(0, i - cls.LOOK_BACK), i + 1)}
            read = max((ends[k] for k in near if hashes[k] in owner.cached), default=0)
            owner.cached |= {hashes[i] for i in marked}
        written = max((ends[i] for i in marked), default=0)
        return ends[-1] - max(written, read), read, max(0, written - read)

    @staticmethod
    def answer(asked, texts, usage):
        fresh, read, written = asked["cache"] or (usage["in"] - usage["in"] // 2, usage["in"] // 2, 0)
        content = [{"type": "text", "text": texts[0]}] if texts[0] else []
        if usage["hidden"]:
            content = [{"type": "thinking", "thinking": "", "signature": "x"}]
        return {
            "id": "msg_1", "type": "message", "role": "assistant", "model": asked["model"], "content": content,
            "stop_reason": "max_tokens" if texts[0] or usage["hidden"] else "end_turn", "stop_sequence": None,
            "usage": {
                "input_tokens": fresh, "cache_read_input_tokens": read,
                "cache_creation_input_tokens": written, "output_tokens": usage["out"],
                "output_tokens_details": {"thinking_tokens": usage["hidden"]},
            },
        }  # fmt: skip


class Gemini:
    """`/v1/models/ID:generateContent` and `/v1/models/ID` (or v1beta). Proto JSON: either case of a name is right."""

    name = "gemini"
    TOO_LONG = "The input token count (1048700) exceeds the maximum number of tokens allowed (1048576)."
    THINKING = {
        "thinkingBudget",
        "includeThoughts",
        "thinkingLevel",
        "thinking_budget",
        "include_thoughts",
        "thinking_level",
    }
    CONFIG = {
        "temperature": _number(0, 2),
        "topP": _number(0, 1),
        "topK": _integer(1, 1000),
        "candidateCount": _integer(1, 8),
        "maxOutputTokens": _integer(1, 65536),
        "seed": _integer(-(2**31), 2**31 - 1),
        "thinkingConfig": lambda v: isinstance(v, dict) and v.keys() <= Gemini.THINKING,
    }

    @staticmethod
    def sent_key(headers):
        return headers.get("x-goog-api-key")

    @staticmethod
    def describe(owner, path):
        name = path.split("?")[0].partition("/models/")[2]
        if name not in owner.models:
            raise Refusal(404, f"models/{name} is not found for API version v1beta", "")
        return 200, {
            "name": f"models/{name}",
            "displayName": "Test",
            "inputTokenLimit": 1000000,
            "outputTokenLimit": 65536,
        }

    @staticmethod
    def error(status, message, field):
        names = {
            400: "INVALID_ARGUMENT",
            401: "UNAUTHENTICATED",
            404: "NOT_FOUND",
            429: "RESOURCE_EXHAUSTED",
            503: "UNAVAILABLE",
        }
        error = {"code": status, "message": message, "status": names.get(status, "INTERNAL")}
        if status == 429:
            error["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.1s"}]
        return {"error": error}

    @classmethod
    def parse(cls, owner, body, path, headers):
        name, _, verb = path.split("?")[0].partition("/models/")[2].partition(":")
        if verb != "generateContent" or name not in owner.models:
            raise Refusal(404, f"models/{name} is not found for API version v1beta, or is not supported for {verb}", "")
        _fields(
            body,
            {
                "contents": lambda v: isinstance(v, list) and bool(v),
                "generationConfig": lambda v: isinstance(v, dict),
                "systemInstruction": lambda v: isinstance(v, dict),
            },
        )
        _need(body, "contents")
        config = body.get("generationConfig", {})
        _fields(config, cls.CONFIG, "generationConfig.", refuses=owner.refuses)
        turns = []
        for i, content in enumerate(body["contents"]):
            _fields(
                content,
                {"role": lambda v: v in ("user", "model"), "parts": lambda v: isinstance(v, list) and bool(v)},
                f"contents[{i}].",
            )
            for part in content["parts"]:
                _fields(part, {"text": lambda v: isinstance(v, str)}, f"contents[{i}].parts.")
            role = "assistant" if content["role"] == "model" else "user"
            turns.append({"role": role, "content": "".join(part["text"] for part in content["parts"])})
        thinking = config.get("thinkingConfig", {})
        if owner.refused and owner.refused(body):
            raise Refusal(400, "thinking_budget is not supported by this model; use thinking_level.", "")
        budget = thinking.get("thinkingBudget", thinking.get("thinking_budget"))
        if owner.model_thinks == "always" and budget == 0:
            raise Refusal(400, "Budget 0 is invalid. This model only works in thinking mode.", "")
        role, context = _tail(turns)
        restart = role == "assistant" and "prefill" not in owner.extensions
        answer = _instructed(turns)
        return {
            "context": "" if restart else answer if answer is not None else context,
            "n": config.get("candidateCount", 1),
            "seed": config.get("seed"),
            "max_tokens": config.get("maxOutputTokens", 64),
            "restart": restart,
            "chat": role != "assistant",
            "thinks": bool(owner.model_thinks) and budget != 0,
            "model": name,
        }

    @staticmethod
    def answer(asked, texts, usage):
        texts = ["one two three" if asked["restart"] else text for text in texts]
        candidates = [
            {
                "index": i,
                "finishReason": "MAX_TOKENS" if text or usage["hidden"] else "STOP",
                "content": {"role": "model", **({"parts": [{"text": text}]} if text else {})},
            }
            for i, text in enumerate(texts)
        ]
        count = {"promptTokenCount": usage["in"], "candidatesTokenCount": usage["out"] - usage["hidden"]}
        count |= {"cachedContentTokenCount": usage["in"] // 2, "totalTokenCount": usage["in"] + usage["out"]}
        if usage["hidden"]:
            count["thoughtsTokenCount"] = usage["hidden"]
        return {"candidates": candidates, "usageMetadata": count, "modelVersion": asked["model"], "responseId": "r"}
