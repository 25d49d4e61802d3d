"""Google's Gemini API (`generateContent`), through google-genai.

- `prefill`: a last turn of role `model` is continued; `instruct` where it is not.
- `candidateCount` asks for n texts where the model takes it; a seed is taken.
- Thinking is switched off by `thinkingBudget = 0` (2.5 Flash); a model that cannot (2.5 Pro) is refused by the probe.
- `topP` always goes out, at 1.0 too: left out, the service takes its own 0.95, which is not the method's distribution.
  Its `topK` (64) has no value that means "all", and stays.
- Prompt caching is implicit: nested prefixes in ascending order are all it needs.
"""

import json
import re

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import wire
from omniopd_jax.teachers.remote import RemoteTeacher
from omniopd_jax.teachers.wire import instruct

OFFICIAL = "https://generativelanguage.googleapis.com"
# every other reason (SAFETY, RECITATION, PROHIBITED_CONTENT, LANGUAGE, OTHER ...): the text is not what the model would write
FINISH = {"MAX_TOKENS": "length", "STOP": "stop", "FINISH_REASON_UNSPECIFIED": "stop", None: "stop"}


def make(cfg):
    """The teacher for `teacher.provider = "gemini"`. Raises `UserError` on a missing key, model or bad address."""
    return RemoteTeacher(cfg, GeminiClient(cfg))


class GeminiClient:
    """One `generateContent` at a time; knows nothing of retries or money."""

    provider = "gemini"
    takes_seed = True

    def __init__(self, cfg):
        t = cfg.teacher
        self.model, self.timeout_s = t.model, t.timeout_s
        self.url = wire.base_url(cfg, "gemini", "GOOGLE_GEMINI_BASE_URL", OFFICIAL, "/v1beta")
        self.self_hosted = "googleapis.com" not in self.url
        if t.continuation not in ("auto", "prefill", "instruct"):
            raise UserError(f"teacher.continuation = {t.continuation!r}: Gemini has auto, prefill and instruct")
        self.seen = wire.Learner(takes_n=True)
        self.connection = wire.Connection(self.url, self.timeout_s, t.max_concurrency, self._sdk)

    def modes(self) -> tuple[str, ...]:
        """Ways of continuing, best first."""
        return ("prefill", "instruct")

    def check_settings(self):
        """Raises `UserError` where a call could not even be made: no key."""
        wire.api_key("gemini", required=not self.self_hosted)

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
            api_key=wire.api_key("gemini", required=not self.self_hosted),
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

    async def reach(self) -> str:
        """What the service says of the model, at no cost. Raises `CallError` (not reachable, key refused)."""
        try:
            model = await self._guarded(self.connection.sdk.aio.models.get(model=self.model))
        except wire.CallError as e:
            if e.kind == "stop" or e.outcome != "rejected":
                raise
            return "does not describe the model"
        own = ", ".join(f"{k} {v:g}" for k in ("top_k",) if (v := getattr(model, k, None)) is not None)
        return (model.display_name or "") + (f"; its own sampling defaults: {own}" if own else "")

    async def call(self, call: wire.Call) -> wire.Reply:
        """One exchange. Raises `CallError`."""
        contents, config, sent, space = self._body(call)
        answer = await self._guarded(
            self.connection.sdk.aio.models.generate_content(model=self.model, contents=contents, config=config)
        )
        self.seen.answered(call)
        with wire.as_promised():
            return self._reply(answer, sent, space, call.mode)

    async def _guarded(self, request):
        """Awaits a request of the SDK and turns what it raises into `CallError`."""
        import httpx2
        from google.genai import errors

        try:
            return await request
        except errors.APIError as e:
            raise self._error(e) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as e:
            raise wire.from_exception(e) from None
        except (ValueError, TypeError, AttributeError, KeyError, errors.UnknownApiResponseError) as e:
            # a 200 whose body is not what the protocol says
            raise wire.CallError(f"HTTP 200 with a malformed body ({type(e).__name__})", "retry", outcome="unknown") from None

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
            types.Content(role="model" if m["role"] == "assistant" else "user", parts=[types.Part(text=wire.text_of(m))])
            for m in turns
        ]
        settings = {"temperature": call.temperature, "top_p": call.top_p, "max_output_tokens": call.max_tokens}
        settings["automatic_function_calling"] = types.AutomaticFunctionCallingConfig(disable=True)
        if call.n > 1:
            settings["candidate_count"] = call.n
        if "seed" not in self.seen.dropped:
            settings["seed"] = call.seed
        if "thinking" not in self.seen.dropped:
            settings["thinking_config"] = types.ThinkingConfig(thinking_budget=0)
        if system:
            settings["system_instruction"] = system
        return contents, types.GenerateContentConfig(**settings), sent, space

    def learn(self, error: wire.CallError, call: wire.Call) -> bool:
        """Whether the call is worth sending once more, without what the service has refused by name."""
        # thinking: of a model that knows none; one that cannot stop it is caught by the probe
        return self.seen.learn(error, call, {"seed", "thinking"})

    def _reply(self, answer, sent, space, mode) -> wire.Reply:
        candidates = answer.candidates or []
        blocked = getattr(answer.prompt_feedback, "block_reason", None)
        if not candidates and blocked:
            raise wire.CallError(f"the prompt was blocked: {blocked}", "refused", status=200)
        if not candidates:
            raise wire.malformed("candidates")
        texts, thought = [], False
        for candidate in candidates:
            parts = (candidate.content.parts if candidate.content else None) or []
            thought = thought or any(part.thought for part in parts)
            text = "".join(part.text or "" for part in parts if not part.thought)
            if mode != "instruct":
                text = wire.after_prefix(text, sent, space)
            if candidate.content is None and candidate.finish_reason is None:
                raise wire.malformed("content in a candidate")
            reason = getattr(candidate.finish_reason, "value", candidate.finish_reason)
            texts.append(wire.Text(text, FINISH.get(reason, "withheld")))
        usage = answer.usage_metadata
        count = {
            name: (getattr(usage, f"{name}_token_count", None) or 0)
            for name in ("prompt", "cached_content", "candidates", "thoughts")
        }
        return wire.Reply(
            texts=tuple(texts),
            tokens_in=count["prompt"],
            tokens_cached=count["cached_content"],
            tokens_out=count["candidates"] + count["thoughts"],
            tokens_hidden=count["thoughts"] or int(thought),
            limits=wire.limits((answer.sdk_http_response.headers or {}) if answer.sdk_http_response else {}),
        )

    def _error(self, exc) -> wire.CallError:
        """`{"error": {"code", "message", "status", "details"}}`; a 429 says when to come back in its RetryInfo."""
        headers = getattr(exc.response, "headers", None) or {}
        message = exc.message or ""
        message = message if isinstance(message, str) else json.dumps(message)
        low = message.lower()
        if exc.code == 400 and ("api key" in low or "api_key" in low):
            return wire.CallError(f"HTTP 400: {message}", "stop", status=401)
        field = next((f for f in ("thinking", "seed", "candidateCount") if f.lower() in low), "")
        error = wire.from_status(exc.code or 500, f"{message} ({exc.status})", headers, field=field)
        if error.kind == "retry" and error.retry_after is None:
            found = re.search(r"['\"]retryDelay['\"]: ?['\"](\d+(?:\.\d+)?)s", json.dumps(exc.details, default=str))
            error.retry_after = float(found.group(1)) if found else None
        return error
