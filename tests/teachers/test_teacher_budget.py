"""Prices, the estimate, and caps that nothing overshoots."""

import asyncio
import contextlib
import pathlib
import sqlite3
import subprocess
import sys
import types

import pytest
from teacher_kit import ask, cfg_for, request, teacher_of
from wire_server import WireServer

from omniopd_jax import config, experience, solutions
from omniopd_jax.errors import UserError
from omniopd_jax.teachers import TeacherStopped, budget
from omniopd_jax.teachers.journal import Journal

PRICE = {"teacher.price_input": 3.0, "teacher.price_cached": 0.3, "teacher.price_output": 15.0}


def spend(c, requests):
    """(results, stops) of requests started together; a stop of one does not end the others."""

    async def run():
        async with teacher_of(c) as teacher:
            return await asyncio.gather(*(teacher.continue_text(r) for r in requests), return_exceptions=True)

    out = asyncio.run(run())
    stops = [e for e in out if isinstance(e, TeacherStopped)]
    results = [r for r in out if not isinstance(r, BaseException)]
    assert len(stops) + len(results) == len(out), out
    return results, stops


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("cap", ["calls", "tokens", "usd"])
def test_200_concurrent_calls_never_overshoot(cap, share, tmp_path, monkeypatch):
    monkeypatch.setattr("omniopd_jax.teachers.traffic.FIRST_BACKOFF_S", 0.02)
    caps = {"calls": 57, "tokens": 40_000, "usd": 0.2}
    with WireServer(delay_s=0.05, share=share, kinds=["429", "500", "reset", "truncated"]) as server:
        settings = PRICE | {f"budget.{cap}": caps[cap], "teacher.max_concurrency": 200, "teacher.deadline_s": 60.0}
        c = cfg_for(server.url("openai"), "openai", tmp_path, **settings)
        results, stops = spend(c, [request(f"s{i}", n=1, max_tokens=16, prefix="y" * 400) for i in range(200)])
        log = server.calls()
    usage = [entry["usage"] for entry in log if entry["usage"]]
    usd = sum((u["in"] - u["in"] // 2) * 3 + u["in"] // 2 * 0.3 + u["out"] * 15 for u in usage) / 1e6
    spent = {"calls": len(log), "tokens": sum(u["in"] + u["out"] for u in usage), "usd": usd}
    assert spent[cap] <= caps[cap]
    if cap == "calls":
        assert stops and f"budget.{cap}" in str(stops[0]) and spent["calls"] == 57
    elif share == 0.0:
        # the reserve is given back: small answers do not block the rest
        assert spent[cap] > 0.3 * caps[cap] or not stops
    journal = Journal(tmp_path / "journal")
    totals = journal.totals()
    journal.close()
    assert totals.usd >= spent["usd"] - 1e-9 and totals.tokens >= spent["tokens"]
    # a request on a connection that the server has just reset may never be read: its outcome is unknown, so it stays
    # spent
    [file] = (tmp_path / "journal").glob("*.sqlite")
    with contextlib.closing(sqlite3.connect(file)) as db:
        unknown = db.execute("select count(*) from calls where status = 'unknown'").fetchone()[0]
    assert 0 <= totals.calls - len(log) <= (unknown if share else 0)
    assert not caps[cap] < getattr(totals, cap)


def test_a_spent_budget_stays_spent_over_a_restart_and_can_be_raised(tmp_path):
    with WireServer(honours_n=False) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"budget.calls": 6})
        spend(c, [request("a")])
        _, stops = spend(c, [request("b")])
        assert stops and len(server.calls()) == 6
        _, stops = spend(c, [request("b")])
        assert stops and len(server.calls()) == 6
        c.budget.calls = 20
        [result] = ask(c, request("b"))
        assert len(result.continuations) == 4
        asked = [(e["body"]["seed"]) for e in server.calls()]
        assert len(asked) - len(set(asked)) <= 1  # what had arrived before the stop was not asked again


WORKER = """
import sys; sys.path[:0] = [{tests!r}, {repo!r}]
import asyncio
import contextlib
from teacher_kit import cfg_for, request, teacher_of
async def run():
    c = cfg_for({url!r}, "openai", {folder!r}, **{{"budget.calls": 40, "teacher.timeout_s": 30.0, "teacher.deadline_s": 90.0}})
    async with teacher_of(c) as t:
        await asyncio.gather(*(t.continue_text(request(sys.argv[1] + str(i), n=1)) for i in range(40)), return_exceptions=True)
asyncio.run(run())
"""


def test_processes_that_share_a_folder_share_the_cap(tmp_path):
    here = pathlib.Path(__file__).parents[1]
    with WireServer(delay_s=0.02) as server:
        code = WORKER.format(
            tests=str(here / "support"), repo=str(here.parent), url=server.url("openai"), folder=str(tmp_path)
        )
        workers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
        assert [w.wait(timeout=60) for w in workers] == [0, 0]
        assert len(server.calls()) == 40
    journal = Journal(tmp_path / "journal")
    assert journal.totals().calls == 40
    journal.close()


def test_a_call_of_unknown_outcome_stays_spent(tmp_path):
    with WireServer(faults=["truncated"]) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **PRICE)
        [result] = ask(c, request())
    journal = Journal(tmp_path / "journal")
    totals = journal.totals()
    journal.close()
    assert totals.calls == 2 and totals.tokens > 1000 and totals.usd > result.usage.cost_usd + 0.003


def test_an_answer_that_does_not_say_what_it_used_stays_spent_in_full(tmp_path):
    with WireServer(mangle=lambda answer: {k: v for k, v in answer.items() if k != "usage"}) as server:
        c = cfg_for(
            server.url("openai"), "openai", tmp_path, **PRICE | {"budget.usd": 0.007, "teacher.max_concurrency": 1}
        )
        results, stops = spend(c, [request(f"s{i}", n=1) for i in range(4)])
        assert len(results) == len(server.calls()) == 1 and len(stops) == 3 and "budget.usd" in str(stops[0])
    journal = Journal(tmp_path / "journal")
    totals = journal.totals()
    journal.close()
    assert totals.calls == 1 and 0.003 < totals.usd == results[0].usage.cost_usd <= 0.007


def test_prices(tmp_path):
    c = cfg_for("", "openai", tmp_path, **{"teacher.model": "gpt-4.1-mini-2025-04-14"})
    assert budget.price(c, self_hosted=False).input == 0.40  # the longest name, not gpt-4.1
    assert budget.price(c, self_hosted=True).input == 0.0
    c.teacher.price_input = 1.0
    price = budget.price(c, self_hosted=False)
    assert price.input == 1.0 and price.cached == pytest.approx(0.25) and price.output == 1.60
    c.teacher.price_input, c.teacher.model, c.budget.usd = -1.0, "unknown", 5.0
    with pytest.raises(UserError, match="price"):
        budget.price(c, self_hosted=False)
    assert budget.Price(1, 0.1, 5, 1.25).cost(1000, 400, 10, 100) == pytest.approx((500 + 40 + 125 + 50) / 1e6)


def test_the_estimate_has_ranges_and_prints(tmp_path):
    c = cfg_for("", "anthropic", tmp_path, **{"audit.num_continuations": 10, "audit.num_chunks": 10, "num_steps": 1})
    one = budget.estimate(c, budget.Price(1, 0.1, 5, 1.25), takes_n=False, latency_s=(1.0, 3.0))
    assert one.calls[0] == 64 * 4 * 10 * 10  # method.md, section 5: 25,600 continuations a step
    many = budget.estimate(c, budget.Price(1, 0.1, 5, 1.25), takes_n=True, latency_s=(1.0, 3.0))
    assert many.calls[0] == one.calls[0] / 10 and many.usd[2] < one.usd[2]
    for field in ("calls", "tokens_in", "tokens_out", "usd", "hours"):
        low, middle, high = getattr(one, field)
        assert 0 < low <= middle <= high
    assert "usd" in one.table() and len(one.table().splitlines()) == 6


def test_the_estimate_of_the_baselines(tmp_path):
    sizes = {
        "num_steps": 2,
        "prompts_per_step": 3,
        "num_generations": 4,
        "max_completion_length": 100,
        "max_prompt_length": 60,
    }
    # calls with n and without, most tokens in and out a text
    asks = {"sft": ("solutions", 4, (6, 24), 60, 100), "opd": ("logp", 1, (24, 24), 160, 1)}
    for name, (what, texts, calls, most_in, most_out) in asks.items():
        c = cfg_for("", "openai", tmp_path, **sizes | {"objective.name": name})
        assert solutions.bought(c) == {what: texts}
        for takes_n, count in zip((True, False), calls):
            how = {"takes_n": takes_n, "latency_s": (1.0, 2.0), "asks": {what: texts}}
            e = budget.estimate(c, budget.Price(1, 0.1, 5), **how)
            assert e.calls[0] == count and e.tokens_in[2] == pytest.approx(1.1 * count * most_in)
            assert e.tokens_out[2] == pytest.approx(1.1 * 24 * most_out)
            assert all(0 < low <= middle <= high for low, middle, high in (e.usd, e.hours))


SIZES = {
    "num_steps": 2,
    "prompts_per_step": 3,
    "num_generations": 4,
    "max_completion_length": 100,
    "max_prompt_length": 60,
}


def high(tmp_path, **more):
    """(calls, tokens in, tokens out) at the most, of a service that takes n; a tenth is repeated."""
    c = cfg_for("", "openai", tmp_path, **SIZES | {"audit.num_continuations": 10} | more)
    e = budget.estimate(c, budget.Price(1, 1, 5), takes_n=True, latency_s=(1.0, 2.0), asks=solutions.bought(c))
    assert all(0 < low <= middle <= most for low, middle, most in (e.calls, e.tokens_in, e.tokens_out, e.hours))
    return [field[2] / 1.1 for field in (e.calls, e.tokens_in, e.tokens_out)]


def test_the_estimate_of_prefixes_contexts_the_gate_and_rounds(tmp_path):
    """24 responses of 6 prompts in two steps, every length at its cap; what several parts buy adds up."""
    cut = {"objective.name": "continuation", "continuation.cut_tokens": 40, "continuation.max_tokens": 30}
    assert high(tmp_path, **cut) == pytest.approx([24, 24 * (60 + 40), 24 * 30])
    two = cut | {"continuation.cut": "uniform", "continuation.cuts": 2}
    assert high(tmp_path, **two) == pytest.approx([48, 48 * (60 + 50), 48 * 30])
    whole = high(tmp_path, **{"objective.name": "context"})
    assert whole == pytest.approx([6, 6 * 60, 6 * 100])
    audits = high(tmp_path, **{"audit.num_chunks": 2, "audit.chunk_tokens": 10})
    assert audits == pytest.approx([48, 48 * 110, 48 * 10 * 10])
    gate = {"audit.gate": "graded", "audit.gate_attempts": 3, "audit.num_chunks": 2, "audit.chunk_tokens": 10}
    assert high(tmp_path, **gate) == pytest.approx([a + b for a, b in zip(audits, [6, 6 * 60, 6 * 300])])
    mix = {"objective.mix.omniopd": 1.0, "objective.mix.context": 0.5, "audit.num_chunks": 2, "audit.chunk_tokens": 10}
    assert high(tmp_path, **mix) == pytest.approx([a + b for a, b in zip(audits, whole)])
    rounds = {"audit.num_chunks": 2, "audit.chunk_tokens": 10, "audit.adaptive": True, "audit.adaptive_first": 3}
    assert high(tmp_path, **rounds) == pytest.approx([4 * 48, 4 * 48 * 110, 48 * 10 * 10])  # 3 + 3 + 3 + 1


@pytest.mark.parametrize("disks", [1, 2])
def test_a_disks_share_of_the_budget_pays_for_the_rows_of_its_processes(disks, monkeypatch):
    """Four processes on one disk: what is left there is for all of a step's rows, not for one process's."""
    monkeypatch.setattr(experience.jax, "process_count", lambda: 4)
    monkeypatch.setattr(experience.processes, "gather", lambda name, value: [value])
    asked = []
    teacher = types.SimpleNamespace(allowance=lambda *of: asked.append(of) or (2, 4))
    c = config.default()
    c.prompts_per_step, c.num_generations, c.num_steps = 16, 4, 10
    assert experience.allowance(teacher, c, 3, None, disks) == (2, 4)
    assert asked == [(7, 64 // disks, c.audit.num_chunks, c.audit.num_continuations)]


@pytest.mark.parametrize(
    "way,expect", [("stop", (10, 10)), ("fewer_audits", (2, 10)), ("fewer_continuations", (10, 2))]
)
def test_the_allowance(way, expect, tmp_path):
    settings = {"budget.calls": 104, "budget.on_exhausted": way, "audit.num_chunks": 10, "audit.num_continuations": 10}
    with WireServer(honours_n=False) as server:

        async def run():
            async with teacher_of(cfg_for(server.url("openai"), "openai", tmp_path, **settings)) as teacher:
                before = teacher.allowance(2, 2, 10, 10)
                for i in range(10):
                    await teacher.continue_text(request(f"s{i}", n=2))
                return before, teacher.allowance(2, 2, 10, 10)

        async def started_again():
            async with teacher_of(cfg_for(server.url("openai"), "openai", tmp_path, **settings)) as teacher:
                return teacher.allowance(2, 2, 10, 10)

        before, after = asyncio.run(run())
        assert asyncio.run(started_again()) == expect  # by what the journal knows
    assert before == (10, 10)  # nothing is known yet
    assert after == expect  # 83 calls left for 2 steps of 2 x 10 x 10


def test_a_step_that_is_repeated_or_replayed_asks_for_what_it_asked_for(tmp_path, monkeypatch):
    """Its texts are in the journal, which holds more money spent by then; another run of the folder has its own."""
    monkeypatch.setattr(experience.jax, "process_count", lambda: 2)
    both = {"other": None}

    def gather(name, value):
        other = {"given": None, "allowance": [2, 4]}[name] if both["other"] is None else both["other"][name]
        return [value, other]

    monkeypatch.setattr(experience.processes, "gather", gather)
    settings = {"budget.calls": 104, "budget.on_exhausted": "fewer_audits", "audit.num_chunks": 4,
                "audit.num_continuations": 4}  # fmt: skip

    async def steps(*asked, replay="prefer", run="a"):
        c = cfg_for("http://127.0.0.1:9/v1", "openai", tmp_path, **settings, **{"teacher.replay": replay})
        c.run_dir = str(tmp_path / run)
        c.teacher.journal = str(tmp_path / "journal")
        async with teacher_of(c) as teacher:
            monkeypatch.setattr(teacher.budget, "allowance", lambda left, rows, m, n: (min(m, left), n))
            return [experience.allowance(teacher, c, c.num_steps - left) for left in asked]

    first = asyncio.run(steps(3, 1))
    assert first == [(2, 4), (1, 4)], "the least of both processes, which is what is kept"
    both["other"] = {"given": None, "allowance": [9, 9]}
    assert asyncio.run(steps(3, 1)) == first
    assert asyncio.run(steps(3, 1, run="b")) == [(3, 4), (1, 4)], "another run's ledger is its own"
    assert asyncio.run(steps(3, 1, replay="only", run="c")) in (first, [(3, 4), (1, 4)])
    assert asyncio.run(steps(3, 1, replay="off")) == [(3, 4), (1, 4)]
