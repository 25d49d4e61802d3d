"""Google's Gemini API (`generateContent`), through google-genai.

- `prefill`: a last turn of role `model` is continued; `instruct` where it is not.
- `candidateCount` asks for n texts where the model takes it, at most 8; a seed is taken.
- Thinking is switched off by `thinkingBudget = 0` (2.5 Flash); where that is refused (3.x), `thinkingLevel = minimal`
  is asked for, and where that is too, nothing. A model that then thinks (2.5 Pro) is refused by the probe.
- `topP` always goes out, at 1.0 too: left out, the service takes its own 0.95, which is not the method's distribution.
A model
  that refuses it (3.7 and 3.8 flash) is asked without, as it is for temperature and the thinking budget; the probe says
  so. Its `topK` (64) has no value that means "all", and stays.
- Prompt caching is implicit: nested prefixes in ascending order are all it needs.
"""

import dataclasses

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import wire
from omniopd_jax.teachers.remote import RemoteTeacher
from omniopd_jax.teachers.wire import instruct

OFFICIAL = "https://generativelanguage.googleapis.com"


def make(cfg):
    """The teacher for `teacher.provider = "gemini"`. Raises `UserError` on a missing key, model or bad address."""
    return RemoteTeacher(cfg, GeminiClient(cfg))


class GeminiClient:
    """One `generateContent` at a time; knows nothing of retries or money."""

    provider = "gemini"
    most_texts = 8  # a call
    takes_seed = True

    def __init__(self, cfg):
        t = cfg.teacher
        self.model, self.timeout_s = t.model, t.timeout_s
        self.url = wire.base_url(cfg, "gemini", "GOOGLE_GEMINI_BASE_URL", OFFICIAL, "/v1beta")
        self.official, self.self_hosted = wire.is_official(self.url, "googleapis.com"), wire.own_server(self.url)
        if t.continuation not in ("auto", "prefill", "instruct"):
            raise UserError(f"teacher.continuation = {t.continuation!r}: Gemini has auto, prefill and instruct")
        self.seen = wire.Learner(takes_n=True)
        self.extra = {}
        wire.check_key_may_go(cfg, "gemini", self.url)
        self.connection = wire.Connection(self.url, self.timeout_s, t.max_concurrency, self._sdk, name_field=_field)

    def modes(self) -> tuple[str, ...]:
        """Ways of continuing, best first."""
        return ("prefill", "instruct")

    def check_settings(self):
        """Raises `UserError` where a call could not even be made: no key."""
        wire.api_key("gemini", required=self.official)

    async def open(self):
        """Makes the connection for the running event loop."""
        await self.connection.open()

    async def close(self):
        """Closes the connections."""
        await self.connection.close()

    def _sdk(self, http):
        from google import genai
        from google.genai import types

        return genai.Client(
            api_key=wire.api_key("gemini", required=self.official),
            vertexai=False,
            http_options=types.HttpOptions(
                base_url=self.url,
                timeout=int(self.timeout_s * 1000),
                retry_options=types.HttpRetryOptions(attempts=1),
                httpx_async_client=http,
            ),
        )

    def silence(self) -> bool:
        """There is no other way to switch thinking off than the one that every call takes."""
        return False

    def max_input_tokens(self, call: wire.Call) -> int:
        """An upper bound of what a call sends."""
        return call.max_input_tokens()

    async def reach(self) -> str:
        """What the service says of the model, at no cost. Raises `CallError` (not reachable, key refused)."""
        try:
            with wire.exchange():
                model = await self.connection.sdk.aio.models.get(model=self.model)
        except wire.CallError as e:
            if (
                e.kind == "refused"
                or e.status == 403
                or (e.outcome == "unknown" and e.status is None and "HTTP 200" in str(e))
            ):
                return "does not describe the model"
            raise
        own = ", ".join(f"{k} {v:g}" for k in ("top_k",) if (v := getattr(model, k, None)) is not None)
        return (model.display_name or "") + (f"; its own sampling defaults: {own}" if own else "")

    async def call(self, call: wire.Call) -> wire.Reply:
        """One exchange. Raises `CallError`."""
        contents, config, sent, space = self._body(call)
        with wire.exchange():
            raw = await self.connection.sdk.aio.models.generate_content(
                model=self.model, contents=contents, config=config
            )
        answer = wire.read.json_object(raw.sdk_http_response.body.encode())
        with wire.as_promised():
            reply = self._reply(answer, raw.sdk_http_response.headers or {}, sent, space, call.mode)
        self.seen.answered(call, len(reply.texts))
        return reply

    def _body(self, call):
        """(contents, config, the prefix as sent, the whitespace held back)."""
        from google.genai import types

        system = "\n\n".join(wire.text_of(m) for m in call.messages if m["role"] == "system")
        turns = [m for m in call.messages if m["role"] != "system"]
        sent, space = wire.bare(call.prefix)
        if sent and call.mode == "instruct":
            turns, space = instruct.messages(turns, sent, call.max_tokens), ""
        elif sent:
            turns = [*turns, {"role": "assistant", "content": sent}]
        contents = [
            types.Content(
                role="model" if m["role"] == "assistant" else "user", parts=[types.Part(text=wire.text_of(m))]
            )
            for m in turns
        ]
        settings = {"temperature": call.temperature, "top_p": call.top_p, "max_output_tokens": call.max_tokens}
        settings = {k: v for k, v in settings.items() if k not in self.seen.dropped}
        settings["automatic_function_calling"] = types.AutomaticFunctionCallingConfig(disable=True)
        settings["should_return_http_response"] = True  # the SDK's own reading believes whatever it is sent
        if call.n > 1:
            settings["candidate_count"] = call.n
        if "seed" not in self.seen.dropped:
            settings["seed"] = call.seed
        if "thinking" not in self.seen.dropped:
            settings["thinking_config"] = types.ThinkingConfig(thinking_budget=0)
        elif "thinking_level" not in self.seen.dropped:
            settings["thinking_config"] = types.ThinkingConfig(thinking_level=types.ThinkingLevel.MINIMAL)
        if system:
            settings["system_instruction"] = system
        return contents, types.GenerateContentConfig(**settings), sent, space

    def learn(self, error: wire.CallError, call: wire.Call) -> bool:
        """Whether the call is worth sending once more, without what the service has refused by name."""
        # thinking: of a model that knows none; one that cannot stop it is caught by the probe
        if error.field == "thinking" and "thinking" in self.seen.dropped:
            error.field = "thinking_level"
        return self.seen.learn(error, call, {"seed", "thinking", "thinking_level", "temperature", "top_p"})

    def _reply(self, answer, headers, sent, space, mode) -> wire.Reply:
        candidates = answer.get("candidates")
        if candidates is not None and not isinstance(candidates, list):
            raise wire.malformed("candidates")
        blocked = wire.read.mapping(answer.get("promptFeedback")).get("blockReason")
        if not candidates and blocked:
            outcome = "unknown" if wire.read.states_usage(answer) else "rejected"
            raise wire.CallError(
                f"the prompt was blocked: {blocked}", "refused", outcome=outcome, status=200, field="withheld"
            )
        if not candidates:
            raise wire.malformed("candidates")
        usage = wire.read.as_dict(answer.get("usageMetadata"))
        thoughts = usage.get("thoughtsTokenCount")
        texts, thought = [], False
        for candidate in candidates:
            if not isinstance(candidate, dict):
                raise wire.malformed("candidate")
            content = candidate.get("content")
            if content is None and candidate.get("finishReason") is None:
                raise wire.malformed("content in a candidate")
            parts = wire.read.mapping(content).get("parts")
            thought |= any(isinstance(part, dict) and part.get("thought") is True for part in parts or [])
            # an answer of the model without a part is how the service says that it had nothing to add
            ended = parts is None and bool(content) and content.get("role") == "model"
            text = wire.read.text(parts, candidate.get("finishReason"), reasoning=thoughts or None, ended_empty=ended)
            if mode != "instruct" and text.text:
                text = dataclasses.replace(text, text=wire.after_prefix(text.text, sent, space))
            texts.append(text)
        wrote = any(text.text for text in texts)
        written = usage.get("candidatesTokenCount", None if wrote else 0)  # zeros are left out
        parts = [written, thoughts or 0]
        billed = wire.read.billed(
            usage.get("promptTokenCount"), sum(parts) if all(map(wire.read.whole, parts)) else None,
            cached=usage.get("cachedContentTokenCount"), hidden=thoughts, wrote=wrote,
        )  # fmt: skip
        model = answer.get("modelVersion")
        return wire.Reply(
            tuple(texts),
            billed=billed,
            tokens_hidden=(thoughts if wire.read.whole(thoughts) else 0) or int(thought),
            limits=wire.limits(headers),
            model=model if isinstance(model, str) else "",
        )


def _field(message: str) -> str:
    low = message.lower().replace("_", "")
    names = {
        "thinking": "thinking",
        "candidatecount": "candidateCount",
        "multiple candidates": "candidateCount",
        "topp": "top_p",
        "temperature": "temperature",
        "seed": "seed",
    }
    return next((field for name, field in names.items() if name in low), "") or wire.named_field(message)
