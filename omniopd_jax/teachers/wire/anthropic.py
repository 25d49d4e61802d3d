"""Anthropic's Messages API.

- No `n`, no seed: one text a call.
- `temperature` and `top_p` are left out at 1.0, which is the service's default: recent models refuse them altogether,
  others refuse the two together. The SDK no longer names them, so other values travel as extra body fields.
- `prefill` (a last assistant turn) up to Claude 4.5; later models answer 400 to it: `instruct`.
- A prefill must not end in whitespace: it is taken off and put back.
- Thinking is switched off in every call; a model that cannot (Opus 5.5, Fable) is refused by the probe.
- Up to three cache marks: the prompt, the unfinished answer's last whole block, its end. The answer goes out in blocks
of one
  size, so that the nested prefixes of a response find each other's blocks in the service's cache.
"""

import dataclasses

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import wire
from omniopd_jax.teachers.remote import RemoteTeacher
from omniopd_jax.teachers.wire import instruct

OFFICIAL = "https://api.anthropic.com"
BLOCK = 4096  # characters of an answer's block
CHARACTERS = 4  # of a token, for the least that is cached
# the least tokens that the service caches, by the beginning of a model's name (platform.claude.com/docs, prompt
# caching)
LEAST = {"claude-haiku-4-5": 4096, "claude-opus-4-5": 4096, "claude-opus-4-6": 4096, "claude-haiku-3": 2048}
LEAST_OF_OTHERS = 1024


def make(cfg):
    """The teacher for `teacher.provider = "anthropic"`. Raises `UserError` on a missing key, model or bad address."""
    return RemoteTeacher(cfg, AnthropicClient(cfg))


class AnthropicClient:
    """One call to `/v1/messages` at a time; knows nothing of retries or money."""

    provider = "anthropic"
    most_texts = 1  # a call
    takes_seed = False

    def __init__(self, cfg):
        t = cfg.teacher
        self.model, self.timeout_s = t.model, t.timeout_s
        self.url = wire.base_url(cfg, "anthropic", "ANTHROPIC_BASE_URL", OFFICIAL, "/v1")
        self.official, self.self_hosted = wire.is_official(self.url, "anthropic.com"), wire.own_server(self.url)
        if t.continuation not in ("auto", "prefill", "instruct"):
            raise UserError(f"teacher.continuation = {t.continuation!r}: Anthropic has auto, prefill and instruct")
        self.seen = wire.Learner(takes_n=False)
        self.extra = {}
        wire.check_key_may_go(cfg, "anthropic", self.url)
        self.connection = wire.Connection(self.url, self.timeout_s, t.max_concurrency, self._sdk, name_field=_field)

    def modes(self) -> tuple[str, ...]:
        """Ways of continuing, best first."""
        return ("prefill", "instruct")

    def check_settings(self):
        """Raises `UserError` where a call could not even be made: no key."""
        wire.api_key("anthropic", required=self.official)

    async def open(self):
        """Makes the connection for the running event loop."""
        await self.connection.open()

    async def close(self):
        """Closes the connections."""
        await self.connection.close()

    def _sdk(self, http):
        import anthropic

        return anthropic.AsyncAnthropic(
            api_key=wire.api_key("anthropic", required=self.official),
            base_url=self.url,
            max_retries=0,
            timeout=self.timeout_s,
            http_client=http,
        )

    def silence(self) -> bool:
        """There is no other way to switch thinking off than the one that every call takes."""
        return False

    def max_input_tokens(self, call: wire.Call) -> int:
        """An upper bound of what a call sends."""
        return call.max_input_tokens()

    async def reach(self) -> str:
        """What the service says of the model, at no cost. Raises `CallError`; `UserError` where it must think."""
        try:
            with wire.exchange():
                raw = await self.connection.sdk.models.with_raw_response.retrieve(self.model)
        except wire.CallError as e:
            if (
                e.kind == "refused"
                or e.status == 403
                or (e.outcome == "unknown" and e.status is None and "HTTP 200" in str(e))
            ):
                return "does not describe the model"
            raise
        body = wire.read.json_object(raw.http_response.content)
        try:
            can_be_off = body["capabilities"]["thinking"]["types"]["disabled"]["supported"]
        except (KeyError, TypeError):
            can_be_off = True
        if not can_be_off:
            raise UserError(
                f"teacher.model = {self.model!r} always thinks, and hidden reasoning would use up every answer: choose "
                "one whose thinking can be switched off, e.g. claude-haiku-4-5"
            )
        return str(body.get("display_name", ""))[:80]

    async def call(self, call: wire.Call) -> wire.Reply:
        """One exchange. Raises `CallError`."""
        body, extra, sent, space = self._body(call)
        with wire.exchange():
            raw = await self.connection.sdk.messages.with_raw_response.create(**body, extra_body=extra or None)
        answer = wire.read.json_object(raw.http_response.content)
        with wire.as_promised():
            return self._reply(answer, raw.headers, sent, space, call.mode)

    def _body(self, call):
        """(request body, fields that the SDK does not name, the prefix as sent, the whitespace held back)."""
        system = "\n\n".join(wire.text_of(m) for m in call.messages if m["role"] == "system")
        turns = [{"role": m["role"], "content": wire.text_of(m)} for m in call.messages if m["role"] != "system"]
        sent, space = wire.bare(call.prefix)
        answer = len(turns) if sent else None  # which turn is the unfinished answer
        if sent and call.mode == "instruct":
            turns = instruct.messages(turns, sent, call.max_tokens)
            space = ""
        elif sent:
            turns.append({"role": "assistant", "content": sent})
        body = {
            "model": self.model,
            "max_tokens": call.max_tokens,
            "messages": self._marked(turns, answer, system, call.wanted),
        }
        if system:
            body["system"] = system
        if "thinking" not in self.seen.dropped:
            body["thinking"] = {"type": "disabled"}
        extra = {}
        if call.temperature != 1.0:
            extra["temperature"] = call.temperature
        if call.top_p != 1.0:
            extra["top_p"] = call.top_p
        return body, extra, sent, space

    def _marked(self, turns, answer: int | None, system: str, wanted: int) -> list[dict]:
        """The turns with cache marks: at the end of the prompt, of the answer's last whole block, and of the answer.

        The answer is cut into blocks of one size, so that a longer prefix of the same answer begins with the same
        blocks: the service finds what an earlier call has written under them. A mark is left out where it cannot pay:
          where there
        is less before it than the service caches, or, at the answer's end, where nobody asks for the same prefix again.
        """
        least = next((n for name, n in LEAST.items() if self.model.startswith(name)), LEAST_OF_OTHERS) * CHARACTERS
        out, before = [], len(system)
        for i, turn in enumerate(turns):
            parts = _blocks(turn["content"]) if i == answer else [turn["content"]]
            last_of_prompt = i == (len(turns) if answer is None else answer) - 1
            blocks = []
            for k, part in enumerate(parts):
                before += len(part)
                whole = i == answer and k == len(parts) - 2
                end = wanted > 1 and (i == answer or answer is None) and k == len(parts) - 1
                block = {"type": "text", "text": part}
                if part.strip() and before >= least and (last_of_prompt or whole or end):
                    block["cache_control"] = {"type": "ephemeral"}
                blocks.append(block)
            plain = len(blocks) == 1 and "cache_control" not in blocks[0]
            out.append({"role": turn["role"], "content": turn["content"] if plain else blocks})
        return out

    def learn(self, error: wire.CallError, call: wire.Call) -> bool:
        """Whether the call is worth sending once more, without what the service has refused by name."""
        # thinking: of a model that knows none; one that cannot stop it is caught by the probe
        return self.seen.learn(error, call, {"thinking"})

    def _reply(self, answer, headers, sent, space, mode) -> wire.Reply:
        content = answer.get("content")
        if not isinstance(content, list | str):
            raise wire.malformed("content")
        blocks = [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
        # no block at all at the end of a turn is how the model says that it has nothing to add
        text = wire.read.text(content, answer.get("stop_reason"), ended_empty=content == [])
        if mode != "instruct" and text.text:
            text = dataclasses.replace(text, text=wire.after_prefix(text.text, sent, space))
        usage = wire.read.as_dict(answer.get("usage"))
        read, written = (usage.get(f"cache_{what}_input_tokens") for what in ("read", "creation"))
        parts = [usage.get("input_tokens"), read or 0, written or 0]
        whole = all(wire.read.whole(part) for part in parts)
        hidden = wire.read.as_dict(usage.get("output_tokens_details")).get("thinking_tokens")
        billed = wire.read.billed(
            sum(parts) if whole else None, usage.get("output_tokens"), cached=read, written=written, hidden=hidden,
            wrote=bool(text.text),
        )  # fmt: skip
        hidden = hidden if wire.read.whole(hidden) else 0
        if any(block.get("type") in ("thinking", "redacted_thinking") for block in blocks):
            hidden = hidden or (billed.tokens_out if billed else 1)
        model = answer.get("model")
        return wire.Reply(
            (text,),
            billed=billed,
            tokens_hidden=hidden,
            limits=wire.limits(headers),
            model=model if isinstance(model, str) else "",
        )


def _field(message: str) -> str:
    return "thinking" if "thinking" in message.lower() else wire.named_field(message)


def _blocks(text: str) -> list[str]:
    """`text` in blocks of BLOCK characters, the last one shorter; none is white space alone, which the service
    refuses."""
    out = []
    for start in range(0, len(text), BLOCK):
        part = text[start : start + BLOCK]
        if out and not part.strip():
            out[-1] += part
        else:
            out.append(part)
    return out
