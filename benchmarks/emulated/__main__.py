"""A chat model that follows instructions, emulated on the small world's teacher, behind the OpenAI client's own code.

The 0.76 M parameter teacher knows word problems and nothing else: asked to "write only what comes next", it would write
noise. So its part is played: the wrapped teacher continues the student's text from where it stops, and what chat models
are known to do around such a continuation is put around it, with fixed shares (`HABITS`). The request is built and the
reply is read by `OpenAIClient` itself, and what is kept is decided by `instruct.cut`; only HTTP is left out.

What a habit costs: everything is cut at max_tokens. A repeat or a restart costs its own tokens; quotes and preambles
cost what they would at C = 50 (four characters a token), scaled to this run's C, since eight tokens hold no preamble at
all.
"""

import asyncio
import random

from omniopd_jax.teachers import ContinuationRequest, local, wire
from omniopd_jax.teachers.remote import RemoteTeacher
from omniopd_jax.teachers.wire.openai import OpenAIClient

HABITS = {  # share of answers, by what the model does around the continuation
    "clean": 0.35,  # only the next words, without their leading space
    "overlap": 0.15,  # repeats the last five words first
    "restart": 0.15,  # repeats the whole answer first
    "quotes": 0.10,
    "preamble": 0.10,  # "Sure! Here is the continuation:"
    "afresh": 0.10,  # starts an answer of its own from the beginning
    "dots": 0.05,  # "..." in front
}
GATHER_S = 0.1  # calls that come within this time are sampled in one batch


def make(cfg):
    """For `teachers.TEACHERS`: `teacher.model` is the small world's teacher, `teacher.continuation` says how it is
    asked."""
    return Emulated(cfg, EmulatedClient(cfg))


class Emulated(RemoteTeacher):
    """Without the probe: a model of word problems cannot count to twenty."""

    async def check(self) -> str:
        """One line; asks nothing."""
        await self._bind()
        return f"emulated chat model over {self.client.model!r}, continued by {self.mode!r}"


class EmulatedClient(OpenAIClient):
    """The OpenAI client with the wrapped teacher in the place of the HTTP exchange."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.teacher, self.chunk_tokens = local.make(cfg), cfg.audit.chunk_tokens
        self.gate, self.count = None, dict.fromkeys(HABITS, 0)

    async def open(self):
        """Nothing to connect to."""

    async def call(self, call: wire.Call) -> wire.Reply:
        """One answer, in OpenAI's form, read as such."""
        _, _, sent, space = ([], {}, call.prefix, "") if call.mode == "completion" else self._messages(call)
        prefix = wire.bare(call.prefix)[0] if call.mode == "instruct" else sent
        habits = [self._habit(call.seed, i) if call.mode == "instruct" else "" for i in range(call.n)]
        await self._gathered()
        texts = await self._continue(call, prefix, -1)
        if "afresh" in habits:
            own = await self._continue(call, "", -2)
            texts = [o if h == "afresh" else t for o, t, h in zip(own, texts, habits)]
        texts = [self._dressed(t, h, prefix, call.max_tokens) if h else t for t, h in zip(texts, habits)]
        if call.mode != "completion":
            texts = [t.strip() if call.mode == "instruct" else t for t in texts]
        usage = {"prompt_tokens": call.max_input_tokens() // 4, "completion_tokens": call.n * call.max_tokens}
        kind = "text" if call.mode == "completion" else "message"
        choices = [
            {"index": i, "finish_reason": "length" if t else "stop", kind: t if kind == "text" else {"content": t}}
            for i, t in enumerate(texts)
        ]
        self.seen.answered(call, len(texts))
        answer = {"choices": choices, "usage": usage}
        return self._reply(answer, {}, sent, space, chat=kind == "message", mode=call.mode)

    async def _gathered(self):
        """Waits a moment for the calls that come together."""
        if self.gate is None:
            self.gate = asyncio.Event()
            asyncio.get_running_loop().call_later(GATHER_S, self._open_gate)
        await self.gate.wait()

    def _open_gate(self):
        gate, self.gate = self.gate, None
        gate.set()

    async def _continue(self, call, prefix, peak):
        request = ContinuationRequest(
            str(call.seed),
            peak,
            call.messages,
            prefix,
            tuple(range(call.n)),
            call.max_tokens,
            call.temperature,
            call.top_p,
        )
        result = await self.teacher.continue_text(request)
        return [c.text for c in result.continuations]

    def _habit(self, seed, index) -> str:
        [habit] = random.Random(f"{seed}|{index}").choices(list(HABITS), HABITS.values())
        self.count[habit] += 1
        return habit

    def _dressed(self, text, habit, prefix, max_tokens) -> str:
        """What the model says: the continuation with its habit around it, cut at max_tokens."""
        tokenizer = self.teacher._tokenizer

        def cut(words, tokens):
            ids = tokenizer(words, add_special_tokens=False)["input_ids"][: max(0, tokens)]
            return tokenizer.decode(ids, skip_special_tokens=True)

        if habit == "overlap":
            return cut(" ".join(prefix.split()[-5:]) + text, max_tokens)
        if habit == "restart":
            return cut(prefix + text, max_tokens)
        front, back = {
            "quotes": ('"', '"'),
            "preamble": ("Sure! Here is the continuation:\n\n", ""),
            "dots": ("...", ""),
        }.get(habit, ("", ""))
        cost = round((len(front) + len(back)) / 4 * self.chunk_tokens / 50)
        return front + cut(text, max_tokens - cost).strip() + back
