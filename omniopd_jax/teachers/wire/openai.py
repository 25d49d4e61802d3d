"""OpenAI-compatible servers: OpenAI, vLLM, SGLang, TGI, llama.cpp, `transformers serve`, LiteLLM, DeepSeek, Mistral.

What differs between them, and how each is met:

- OpenAI itself continues no assistant turn (`instruct`), and its newer models take `max_completion_tokens` where older
  servers know only `max_tokens`; reasoning models get `reasoning_effort = "none"` or are refused by the probe.
- vLLM, SGLang and TGI take `continue_final_message`; DeepSeek and Mistral `"prefix": true`; llama.cpp and LMDeploy
  continue a last assistant turn as it is (`prefill`).
- `completion` renders the chat template here (`teacher.tokenizer`) and asks `/v1/completions` for raw continuation: the
  one way that keeps every character, for every engine with an open model.
- gpt-oss writes its thoughts and its answer in channels: `completion` puts the prefix in one, and reads them off what
  comes (`hf.harmony`); the server is asked to leave the marks in (`skip_special_tokens`: vLLM, SGLang).
- vLLM takes its sampling defaults from the model's generation_config.json (Qwen3: top_p 0.95, top_k 20): start it with
  `--generation-config vllm` (launch/teacher_vllm.sh does), since a top_p of 1.0 is left out on the wire.
"""

import dataclasses

from omniopd_jax import hf
from omniopd_jax.errors import UserError
from omniopd_jax.hf import harmony, thoughts
from omniopd_jax.hf.template import of_teacher
from omniopd_jax.teachers import wire
from omniopd_jax.teachers.protocol import LOGP, TEXT
from omniopd_jax.teachers.remote import RemoteTeacher
from omniopd_jax.teachers.wire import instruct, scoring

OFFICIAL = "https://api.openai.com/v1"
SPARE = 64  # tokens that a server may put around a raw prompt: its start token


def make(cfg, needs: str = TEXT):
    """The teacher for `teacher.provider = "openai"`. Raises `UserError` on a missing key, model or bad address."""
    return RemoteTeacher(cfg, OpenAIClient(cfg, needs), needs)


class OpenAIClient:
    """One call to a chat or completions endpoint at a time; knows nothing of retries or money."""

    provider = "openai"
    most_texts = 128  # a call
    takes_seed = True

    def __init__(self, cfg, needs: str = TEXT):
        t = cfg.teacher
        self.model, self.timeout_s, self.tokenizer_path = t.model, t.timeout_s, t.tokenizer
        self.url = wire.base_url(cfg, "openai", "OPENAI_BASE_URL", OFFICIAL, "/v1")
        self.official, self.self_hosted = wire.is_official(self.url, "api.openai.com"), wire.own_server(self.url)
        self.template_kwargs = t.chat_template_kwargs.to_dict()
        self.cfg, self.template = cfg, None
        self.raw = bool(t.tokenizer) or t.template != "chat"  # prompts are written here, for /v1/completions
        self.seen = wire.Learner(takes_n=True)
        self.extra = {}  # reasoning_effort, where the probe found that it is needed
        wire.check_key_may_go(cfg, "openai", self.url)
        most = wire.http.MAX_SCORES if needs == LOGP else wire.http.MAX_REPLY
        self.connection = wire.Connection(self.url, self.timeout_s, t.max_concurrency, self._sdk, max_bytes=most)
        self.tokenizer = None

    def modes(self) -> tuple[str, ...]:
        """Ways of continuing, best first, for `teacher.continuation = "auto"`."""
        if self.cfg.teacher.template != "chat":
            return ("completion",)  # a format of our own: the server's chat endpoint would write another
        if self.official:
            return ("instruct",)
        first = ("completion",) if self.raw else ()
        return first + ("continue_final_message", "prefix", "prefill", "instruct")

    def check_settings(self):
        """Raises `UserError` where a call could not even be made: no key."""
        wire.api_key("openai", required=self.official)

    async def open(self):
        """Makes the connection for the running event loop."""
        await self.connection.open()
        if self.raw:
            self.template = self._template()  # reads the tokenizer now

    async def close(self):
        """Closes the connections."""
        await self.connection.close()

    def _sdk(self, http):
        import openai

        return openai.AsyncOpenAI(
            api_key=wire.api_key("openai", required=self.official),
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

    def max_input_tokens(self, call: wire.Call | wire.ScoreCall) -> int:
        """An upper bound of what a call sends: of a prompt that is written here its bytes, worked examples included."""
        if isinstance(call, wire.ScoreCall) or call.mode != "completion":
            return call.max_input_tokens()
        return SPARE + len(self._continued(call).encode())

    async def reach(self) -> str:
        """One line on what the server says of itself, at no cost. Raises `CallError` (not reachable, key refused).

        Raises:
          UserError: the server lists its models and `teacher.model` is not among them.
        """
        listed = await self._models()
        names = [str(m.get("id")) for m in listed]
        if not self.official and names and self.model not in names and not any(self.model in n for n in names):
            served = wire.scrub(", ".join(name[:80] for name in names[:8]))
            if not self.self_hosted:  # a router's variants and a cloud's deployments are in no list
                return f"does not list {self.model!r} among its {len(names)} models: {served}"
            raise UserError(
                f"teacher.model = {self.model!r} is not served at {wire.scrub(self.url)}; it serves: {served}"
            )
        ends = next((m.get("shutdown_date") for m in listed if m.get("id") == self.model), None)
        if isinstance(ends, str | int) and ends:
            return (
                f"lists {len(names)} models; {self.model} is shut down on {str(ends)[:40]}: choose its successor "
                "in time"
            )
        engine = next((str(m.get("owned_by")) for m in listed if m.get("owned_by")), "")
        if engine in ("vllm", "sglang"):
            return f"{engine}: start it with its own sampling defaults off (vLLM: --generation-config vllm)"
        return f"lists {len(names)} models" if names else "lists no models"

    async def _models(self) -> list[dict]:
        try:
            with wire.exchange():
                raw = await self.connection.sdk.models.with_raw_response.list()
        except wire.CallError as e:
            if (
                e.kind == "refused"
                or e.status == 403
                or (e.outcome == "unknown" and e.status is None and "HTTP 200" in str(e))
            ):
                return []  # not every server lists its models
            raise
        data = wire.read.json_object(raw.http_response.content).get("data")
        return [m for m in data if isinstance(m, dict)] if isinstance(data, list) else []

    async def call(self, call: wire.Call) -> wire.Reply:
        """One exchange. Raises `CallError`."""
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
            body["prompt"] = self._continued(call)
            if self.harmony:
                extra["skip_special_tokens"] = False  # channels are read off the marks: no refusal is passed over
            stops = self._template().stop_strings if self.raw else ()
            if stops and "stop" not in self.seen.dropped:
                body["stop"] = list(stops[:4])  # OpenAI's most; the text is cut here too
        else:
            method = client.chat.completions
            body["messages"], more, sent, space = self._messages(call)
            extra |= more
        with wire.exchange():
            raw = await method.with_raw_response.create(**body, extra_body=extra or None)
        answer = wire.read.json_object(raw.http_response.content)
        with wire.as_promised():
            reply = self._reply(
                answer, raw.headers, sent, space, chat=call.mode != "completion", mode=call.mode, prefix=call.prefix
            )
        self.seen.answered(call, len(reply.texts))
        return reply

    async def score(self, call: wire.ScoreCall) -> wire.Reply:
        """Log-probs of given tokens, by `/v1/completions` with the ids themselves as the prompt: nothing is tokenized
        again.

        Raises:
          CallError: as `call`; `refused` with the field `logprobs` where the server gives none, `stop` where what it
            gives is not for the tokens that were sent.
        """
        body = {"model": self.model, "prompt": [*call.prompt_ids, *call.token_ids], "max_tokens": call.max_tokens}
        with wire.exchange():
            raw = await self.connection.sdk.completions.with_raw_response.create(
                **body, extra_body=scoring.WAYS[call.way]
            )
        answer = wire.read.json_object(raw.http_response.content)
        with wire.as_promised():
            logp, names = scoring.read(answer, call)
            texts = tuple(wire.Text(name, "length") for name in names)
            return wire.Reply(
                texts, logp, billed=_billed(answer), limits=wire.limits(raw.headers), model=_model(answer)
            )

    def learn(self, error: wire.CallError, call: wire.Call) -> bool:
        """Whether the call is worth sending once more, without what the server has refused by name."""
        droppable = {"seed", "top_p", "temperature", "chat_template_kwargs", "reasoning_effort", "stop"}
        if call.mode != "completion":
            droppable.add("max_tokens")  # newer models want max_completion_tokens
        if not self.seen.learn(error, call, droppable):
            return False
        self.extra.pop(error.field, None)
        return True

    def _messages(self, call):
        """(messages, extension fields, the prefix as sent, the whitespace held back)."""
        extra = {}
        if self.template_kwargs and not self.official and "chat_template_kwargs" not in self.seen.dropped:
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

    def _reply(self, answer, headers, sent, space, *, chat, mode, prefix) -> wire.Reply:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise wire.malformed("choices")
        texts, hidden, billed = [], 0, _billed(answer, wrote=False)
        # SGLang writes null where the model had nothing to add: an end token a choice, and no other
        ended = billed is not None and 0 < billed.tokens_out <= len(choices)
        for choice in choices:
            message = choice.get("message") if chat else choice
            if not isinstance(message, dict):
                raise wire.malformed("message in a choice")
            reasoning = message.get("reasoning_content") or message.get("reasoning") if chat else None
            hidden += bool(reasoning)
            text = wire.read.text(
                message.get("content" if chat else "text"),
                "error" if choice.get("error") else choice.get("finish_reason"),
                refusal=message.get("refusal"),
                reasoning=reasoning,
                calls=message.get("tool_calls") or message.get("function_call"),
                ended_empty=chat and ended,
            )
            if mode != "instruct" and text.text:
                text = dataclasses.replace(text, text=wire.after_prefix(text.text, sent, space))
            if mode == "completion" and self.template is not None:
                text = self._cut(text, prefix)
            texts.append(text)
        wrote = any(text.text for text in texts)
        billed = _billed(answer, wrote=wrote)
        told = wire.read.as_dict(wire.read.as_dict(answer.get("usage")).get("completion_tokens_details")).get(
            "reasoning_tokens"
        )
        told = told if isinstance(told, int) and told > 0 else 0
        hidden = told or (hidden and (billed.tokens_out if billed else 0) or hidden)
        return wire.Reply(
            tuple(texts), billed=billed, tokens_hidden=hidden, limits=wire.limits(headers), model=_model(answer)
        )

    def render(self, messages) -> str:
        """The prompt as the teacher's template writes it, up to where the answer begins.

        Without a tokenizer and a template the messages' texts alone, a blank line between: for the probe's own
        questions.
        """
        if not self.raw:
            return "\n\n".join(wire.text_of(m) for m in messages) + "\n\n"
        template = self._template()
        # the server's tokenizer puts its start token in front, if it does that at all: SmolLM2's is `<|im_start|>`,
        # which its template writes and its tokenizer does not add
        return template.render(messages).removeprefix(template.start)

    def _continued(self, call) -> str:
        """The prompt and the unfinished answer behind it, for `/v1/completions`."""
        return thoughts.joined(self.render(call.messages), call.prefix)

    @property
    def harmony(self) -> bool:
        """Whether the teacher's own template writes gpt-oss's channels (`hf.harmony`)."""
        source = self._template().source if self.raw else None
        return bool(source) and harmony.BEGINS in source

    def _cut(self, text: wire.Text, prefix: str) -> wire.Text:
        """A text of raw completion up to where it ends: at a stop string, or a mark of the format."""
        body, ended = text.text, False
        if self.harmony:
            marks = (thoughts.OPEN, thoughts.CLOSE)
            body, ended = harmony.read(body, thoughts.CLOSE, thinking=harmony.thinking(prefix, *marks))
        body, stopped = self.template.cut(body)
        return dataclasses.replace(text, text=body, finish="stop" if stopped or ended else text.finish)

    def _template(self):
        """The teacher's template (`hf.template`), made when first asked."""
        if self.template is None:
            if self.tokenizer_path:
                self.tokenizer = hf.load_tokenizer(self.tokenizer_path, setting="teacher.tokenizer")
            self.template = of_teacher(self.cfg, self.tokenizer)
        return self.template


def _billed(answer, *, wrote: bool = True) -> wire.Billed | None:
    """What the answer says was billed."""
    usage = wire.read.as_dict(answer.get("usage"))
    inputs, outputs = (wire.read.as_dict(usage.get(f"{part}_tokens_details")) for part in ("prompt", "completion"))
    told = (inputs.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), usage.get("cached_tokens"))
    cached = next((value for value in told if value is not None), None)  # OpenAI; DeepSeek; Moonshot
    return wire.read.billed(
        usage.get("prompt_tokens"), usage.get("completion_tokens"), cached=cached,
        written=inputs.get("cache_write_tokens"), hidden=outputs.get("reasoning_tokens"),
        total=usage.get("total_tokens"), wrote=wrote,
    )  # fmt: skip


def _model(answer) -> str:
    return answer["model"] if isinstance(answer.get("model"), str) else ""
