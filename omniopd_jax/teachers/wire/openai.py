"""OpenAI-compatible servers: OpenAI, vLLM, SGLang, TGI, llama.cpp, `transformers serve`, LiteLLM, DeepSeek, Mistral.

What differs between them, and how each is met:

- OpenAI itself continues no assistant turn (`instruct`), and its newer models take `max_completion_tokens` where older
  servers know only `max_tokens`; reasoning models get `reasoning_effort = "none"` or are refused by the probe.
- vLLM, SGLang and TGI take `continue_final_message`; DeepSeek and Mistral `"prefix": true`; llama.cpp and LMDeploy
  continue a last assistant turn as it is (`prefill`).
- `completion` renders the chat template here (`teacher.tokenizer`) and asks `/v1/completions` for raw continuation: the
  one way that keeps every character, for every engine with an open model.
- vLLM takes its sampling defaults from the model's generation_config.json (Qwen3: top_p 0.95, top_k 20): start it with
  `--generation-config vllm` (launch/teacher_vllm.sh does), since a top_p of 1.0 is left out on the wire.
"""

import json

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import wire
from omniopd_jax.teachers.protocol import TEXT
from omniopd_jax.teachers.remote import RemoteTeacher
from omniopd_jax.teachers.wire import instruct, scoring

OFFICIAL = "https://api.openai.com/v1"
# each server has names of its own for an end of the model's own making
FINISH = {"length": "length", "content_filter": "withheld", "abort": "withheld", "error": "withheld"}


def make(cfg, needs: str = TEXT):
    """The teacher for `teacher.provider = "openai"`. Raises `UserError` on a missing key, model or bad address."""
    return RemoteTeacher(cfg, OpenAIClient(cfg), needs)


class OpenAIClient:
    """One call to a chat or completions endpoint at a time; knows nothing of retries or money."""

    provider = "openai"
    takes_seed = True

    def __init__(self, cfg):
        t = cfg.teacher
        self.model, self.timeout_s, self.tokenizer_path = t.model, t.timeout_s, t.tokenizer
        self.url = wire.base_url(cfg, "openai", "OPENAI_BASE_URL", OFFICIAL, "/v1")
        self.self_hosted = "api.openai.com" not in self.url
        self.template_kwargs = t.chat_template_kwargs.to_dict()
        self.seen = wire.Learner(takes_n=True)
        self.extra = {}  # reasoning_effort, where the probe found that it is needed
        self.connection = wire.Connection(self.url, self.timeout_s, t.max_concurrency, self._sdk)
        self.tokenizer = None

    def modes(self) -> tuple[str, ...]:
        """Ways of continuing, best first, for `teacher.continuation = "auto"`."""
        if not self.self_hosted:
            return ("instruct",)
        first = ("completion",) if self.tokenizer_path else ()
        return first + ("continue_final_message", "prefix", "prefill", "instruct")

    def check_settings(self):
        """Raises `UserError` where a call could not even be made: no key."""
        wire.api_key("openai", required=not self.self_hosted)

    async def open(self):
        """Makes the connection for the running event loop."""
        await self.connection.open()
        if self.tokenizer_path:
            self.render([{"role": "user", "content": ""}])

    async def close(self):
        """Closes the connections."""
        await self.connection.close()

    def _sdk(self, http):
        import openai

        return openai.AsyncOpenAI(
            api_key=wire.api_key("openai", required=not self.self_hosted),
            base_url=self.url,
            max_retries=0,
            timeout=self.timeout_s,
            http_client=http,
        )

    def silence(self) -> bool:
        """Switches hidden reasoning off, if there is a way that has not been tried. Returns whether there was."""
        if "reasoning_effort" in self.extra or "reasoning_effort" in self.seen.dropped:
            return False
        self.extra["reasoning_effort"] = "none"
        return True

    async def reach(self) -> str:
        """One line on what the server says of itself, at no cost. Raises `CallError` (not reachable, key refused).

        Raises:
          UserError: the server lists its models and `teacher.model` is not among them.
        """
        listed = await self._models()
        names = [str(m.get("id")) for m in listed]
        if self.self_hosted and names and self.model not in names and not any(self.model in n for n in names):
            raise UserError(f"teacher.model = {self.model!r} is not served at {self.url}; it serves: {', '.join(names[:8])}")
        engine = next((str(m.get("owned_by")) for m in listed if m.get("owned_by")), "")
        if engine in ("vllm", "sglang"):
            return f"{engine}: start it with its own sampling defaults off (vLLM: --generation-config vllm)"
        return f"lists {len(names)} models" if names else "lists no models"

    async def _models(self) -> list[dict]:
        import openai

        try:
            raw = await self.connection.sdk.models.with_raw_response.list()
            data = raw.http_response.json().get("data")
            return [m for m in data if isinstance(m, dict)] if isinstance(data, list) else []
        except openai.APIStatusError as e:
            error = self._error(e)
            if error.kind == "stop":
                raise error from None
            return []  # not every server lists its models
        except openai.APIConnectionError as e:
            raise wire.from_exception(e) from None
        except (ValueError, AttributeError):
            return []

    async def call(self, call: wire.Call) -> wire.Reply:
        """One exchange. Raises `CallError`."""
        import openai

        client, sent, space = self.connection.sdk, call.prefix, ""
        body = {"model": self.model, "n": call.n, "temperature": call.temperature, "top_p": call.top_p}
        body |= {"seed": call.seed, "max_tokens": call.max_tokens}
        if call.n == 1:
            del body["n"]
        if call.top_p == 1.0:
            del body["top_p"]
        if "max_tokens" in self.seen.dropped:
            body["max_completion_tokens"] = call.max_tokens
        body = {k: v for k, v in body.items() if k not in self.seen.dropped}
        extra = dict(self.extra)
        if call.mode == "completion":
            method = client.completions
            body["prompt"] = self.render(call.messages) + call.prefix
        else:
            method = client.chat.completions
            body["messages"], more, sent, space = self._messages(call)
            extra |= more
        try:
            raw = await method.with_raw_response.create(**body, extra_body=extra or None)
            answer = wire.json_object(raw.http_response)
        except openai.APIStatusError as e:
            raise self._error(e) from None
        except openai.OpenAIError as e:
            raise wire.from_exception(e) from None
        self.seen.answered(call)
        with wire.as_promised():
            return self._reply(answer, raw.headers, sent, space, chat=call.mode != "completion", mode=call.mode)

    async def score(self, call: wire.ScoreCall) -> wire.Reply:
        """Log-probs of given tokens, by `/v1/completions` with the ids themselves as the prompt: nothing is tokenized again.

        Raises:
          CallError: as `call`; `refused` with the field `logprobs` where the server gives none, `stop` where what it
            gives is not for the tokens that were sent.
        """
        import openai

        body = {"model": self.model, "prompt": [*call.prompt_ids, *call.token_ids], "max_tokens": call.max_tokens}
        try:
            raw = await self.connection.sdk.completions.with_raw_response.create(
                **body, extra_body=scoring.WAYS[call.way]
            )
            answer = wire.json_object(raw.http_response)
        except openai.APIStatusError as e:
            raise self._error(e) from None
        except openai.OpenAIError as e:
            raise wire.from_exception(e) from None
        with wire.as_promised():
            logp, names = scoring.read(answer, call)
            texts = tuple(wire.Text(name, "length") for name in names)
            return wire.Reply(texts, logp, **self._usage(answer), limits=wire.limits(raw.headers))

    def learn(self, error: wire.CallError, call: wire.Call) -> bool:
        """Whether the call is worth sending once more, without what the server has refused by name."""
        droppable = {"seed", "top_p", "temperature", "chat_template_kwargs", "reasoning_effort"}
        if call.mode != "completion":
            droppable.add("max_tokens")  # newer models want max_completion_tokens
        if not self.seen.learn(error, call, droppable):
            return False
        self.extra.pop(error.field, None)
        return True

    def _messages(self, call):
        """(messages, extension fields, the prefix as sent, the whitespace held back)."""
        extra = {}
        if self.template_kwargs and self.self_hosted and "chat_template_kwargs" not in self.seen.dropped:
            extra["chat_template_kwargs"] = self.template_kwargs
        sent, space = wire.bare(call.prefix)
        if not sent:
            return list(call.messages), extra, "", call.prefix
        if call.mode == "instruct":
            return instruct.messages(call.messages, sent, call.max_tokens), extra, "", ""
        turn = {"role": "assistant", "content": sent}
        if call.mode == "prefix":
            turn["prefix"] = True
        elif call.mode == "continue_final_message":
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        return [*call.messages, turn], extra, sent, space

    def _reply(self, answer, headers, sent, space, *, chat, mode) -> wire.Reply:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise wire.malformed("choices")
        texts = []
        for choice in choices:
            message = choice.get("message") if chat else choice
            if not isinstance(message, dict):
                raise wire.malformed("message in a choice")
            text = message.get("content" if chat else "text")
            text = text if isinstance(text, str) else ""
            if mode != "instruct":
                text = wire.after_prefix(text, sent, space)
            texts.append(wire.Text(text, FINISH.get(choice.get("finish_reason"), "stop")))
        usage = self._usage(answer)
        hidden = ((answer.get("usage") or {}).get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
        if not hidden and any(c.get("message", {}).get("reasoning_content") or c.get("message", {}).get("reasoning")
                              for c in choices if chat):  # fmt: skip
            hidden = usage["tokens_out"] or 1
        return wire.Reply(texts=tuple(texts), **usage, tokens_hidden=int(hidden), limits=wire.limits(headers))

    @staticmethod
    def _usage(answer) -> dict[str, int]:
        """What the answer says was billed, by `Reply`'s names."""
        usage = answer.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return {
            "tokens_in": int(usage.get("prompt_tokens") or 0),
            "tokens_cached": int(cached or 0),
            "tokens_out": int(usage.get("completion_tokens") or 0),
        }

    def _error(self, exc) -> wire.CallError:
        """OpenAI's `{"error": {"message", "param", "code"}}`, FastAPI's `{"detail": ...}`, or plain text."""
        body = exc.body if isinstance(exc.body, dict) else {}
        error = body.get("error") if isinstance(body.get("error"), dict) else body
        message = error.get("message") or body.get("detail") or error or exc.response.text or exc.message
        message = message if isinstance(message, str) else json.dumps(message)
        field = error.get("param") if error.get("param") in wire.FIELDS else ""
        code = error.get("code")
        return wire.from_status(
            exc.status_code,
            f"{message} ({code})" if isinstance(code, str) else message,
            exc.response.headers,
            field=field,
        )

    def render(self, messages) -> str:
        """The prompt as `teacher.tokenizer`'s chat template writes it, up to where the answer begins.

        Without a tokenizer the messages' texts alone, a blank line between: for models that have no chat format.
        """
        if not self.tokenizer_path:
            return "\n\n".join(wire.text_of(m) for m in messages) + "\n\n"
        if self.tokenizer is None:
            import transformers

            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer_path)
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )
        # the server puts its own start token in front
        return text.removeprefix(self.tokenizer.bos_token or "")
