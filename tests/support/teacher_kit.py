"""What the teacher tests share: a config for a wire server, requests, and running a coroutine against a teacher."""

import asyncio
import contextlib

from omniopd_jax import config, teachers
from omniopd_jax.teachers import ContinuationRequest

PROMPT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 3 and 4."})
MODE = {"openai": "continue_final_message", "anthropic": "prefill", "gemini": "prefill"}
EXTENSIONS = {"openai": {"continue_final_message", "completion"}, "anthropic": {"prefill"}, "gemini": {"prefill"}}


def cfg_for(url, provider, folder, **overrides):
    """A small, impatient config; `continuation` is set, so that no probe is sent unless `check` is called."""
    c = config.default()
    c.run_dir = str(folder)
    settings = {
        "teacher.provider": provider,
        "teacher.model": "m",
        "teacher.base_url": url,
        "teacher.continuation": MODE[provider],
        "teacher.timeout_s": 2.0,
        "teacher.deadline_s": 20.0,
        "audit.num_chunks": 2,
        "audit.num_continuations": 4,
    }
    c.update_from_flattened_dict(settings | overrides)
    return c


def request(who="s0", peak=3, prefix="The sum of 3", n=4, max_tokens=8, **more):
    return ContinuationRequest(who, peak, PROMPT, prefix, tuple(range(n)), max_tokens, **more)


@contextlib.asynccontextmanager
async def teacher_of(c):
    teacher = teachers.make(c)
    try:
        yield teacher
    finally:
        await teacher.close()


def ask(c, *requests):
    """Results of requests that are started together."""

    async def run():
        async with teacher_of(c) as teacher:
            return await asyncio.gather(*(teacher.continue_text(r) for r in requests))

    return asyncio.run(run())


def check(c):
    """(the line, the report)."""

    async def run():
        async with teacher_of(c) as teacher:
            return await teacher.check(), teacher.report

    return asyncio.run(run())


def texts(result):
    return [c.text for c in result.continuations]
