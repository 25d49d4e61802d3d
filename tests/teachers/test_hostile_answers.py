"""A server that answers anything at all: no text is made up, no cap is passed, nothing ends the run but what should."""

import asyncio
import time

import pytest
from hostile_answers import KINDS, SHAPES
from teacher_kit import EXTENSIONS, cfg_for, request, teacher_of, texts
from wire_server import WireServer

from omniopd_jax.teachers import TeacherStopped
from omniopd_jax.teachers.journal import Totals

PROVIDERS = tuple(SHAPES)
BOUND_S = 4.0  # of one kind, tries included; a crowded machine is slow
PRICE = {"teacher.price_input": 3.0, "teacher.price_cached": 0.3, "teacher.price_output": 15.0}
# null and unknown names in the place of a list are what Anthropic's client calls a text or none; the rest of them are
# errors
ELSEWHERE = {("anthropic", "choices are a string"): "text*", ("anthropic", "no choice"): "nothing*"}
REAL = " real text"


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch):
    monkeypatch.setattr("omniopd_jax.teachers.traffic.FIRST_BACKOFF_S", 0.01)


def meet(provider, names, folder):
    """{kind: what is wrong with what came of it}, each kind through one teacher, one after the other."""
    wrong, shape = {}, SHAPES[provider]

    async def run(server, c):
        async with teacher_of(c) as teacher:
            await teacher.continue_text(request("first", n=1))  # a service that works
            for i, name in enumerate(names):
                makes, expected = KINDS[name]
                server.mangle = lambda answer, makes=makes: makes(shape, answer)
                before, start, sent = teacher.journal.totals(), time.monotonic(), len(server.calls())
                try:
                    result = await asyncio.wait_for(teacher.continue_text(request(f"s{i}", n=2)), 30.0)
                    said = judge(expected, result)
                except TeacherStopped as e:
                    said = "" if expected in ("stop", "any") and "\n" not in str(e) else f"stopped: {e}"
                    teacher.stopped = None
                except Exception as e:
                    said = f"{type(e).__name__}: {e}"
                after, took = teacher.journal.totals(), time.monotonic() - start
                most = (len(server.calls()) - sent) * 0.02
                if not 0 <= after.usd - before.usd <= most or after.tokens < before.tokens:
                    said += f" charged {after.usd - before.usd}"
                if took > BOUND_S:
                    said += f" took {took:.1f} s"
                if said:
                    wrong[name] = said
                server.mangle = None
                good = await teacher.continue_text(request(f"good{i}", n=1))
                if len(good.continuations) != 1:
                    wrong[name] = f"{wrong.get(name, '')} and the next call brought {good.failures}"
            assert teacher.journal.in_flight() == 0 and isinstance(teacher.journal.totals(), Totals)

    with WireServer(extensions=EXTENSIONS[provider], speak=lambda *_: REAL) as server:
        settings = PRICE | {"teacher.max_retries": 1, "budget.usd": 50.0, "teacher.timeout_s": 5.0}
        asyncio.run(run(server, cfg_for(server.url(provider), provider, folder, **settings)))
    return wrong


def judge(expected, result) -> str:
    """'' where what came of a kind is what may."""
    if sorted(x.index for x in result.continuations + result.failures) != [0, 1]:
        return f"indices of {result}"
    if any("\x1b" in f.error for f in result.failures):
        return "an escape character in an error"
    got = texts(result)
    made_up = [t for t in got if not t.strip().startswith("real")]
    if expected == "any":
        return f"made up {made_up}" if any(t == "" or "made up" in t for t in got) else ""
    if expected == "text":
        return "" if got and not made_up else f"brought {got}, {result.failures}"
    return f"made up {got}" if got and expected == "nothing" else ""


NAMES = tuple(KINDS)
QUICK = NAMES[::4]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("names", [QUICK, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["a quarter", "all"])
def test_no_answer_is_more_than_it_is(provider, names, tmp_path):
    assert len(NAMES) >= 100
    assert meet(provider, names, tmp_path) == {}
