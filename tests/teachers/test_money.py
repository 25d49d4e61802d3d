"""Money under servers that lie: no cap is passed, by one process or by two, and what was spent is what is shown."""

import asyncio
import dataclasses
import itertools
import math
import pathlib
import subprocess
import sys

import pytest
from hostile_answers import KINDS, SHAPES, with_usage
from teacher_kit import EXTENSIONS, cfg_for, check, request, teacher_of
from wire_server import WireServer

from omniopd_jax.errors import UserError
from omniopd_jax.run import estimate, reporting
from omniopd_jax.teachers import TeacherStopped, budget, wire
from omniopd_jax.teachers.journal import Journal, Spent, Totals, folder_of

PRICE = {"teacher.price_input": 3.0, "teacher.price_cached": 0.3, "teacher.price_output": 15.0}
LIES = tuple(name for name in KINDS if name.startswith("usage:"))
CAPS = {"calls": 23, "tokens": 30_000, "usd": 0.1}


def totals_of(folder):
    journal = Journal(folder)
    out, unknown = journal.totals(), journal.unknown()
    journal.close()
    return out, unknown


def lying(shape=SHAPES["openai"]):
    """A server's `mangle` that goes through all lies about usage, one a call."""
    lies = itertools.cycle(KINDS[name][0] for name in LIES)
    return lambda answer: next(lies)(shape, answer)


def spend(c, requests):
    async def run():
        async with teacher_of(c) as teacher:
            return await asyncio.gather(*(teacher.continue_text(r) for r in requests), return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.parametrize("cap", CAPS)
def test_no_cap_is_passed_by_answers_that_lie(cap, tmp_path):
    with WireServer(mangle=lying()) as server:
        settings = PRICE | {f"budget.{cap}": CAPS[cap], "teacher.max_concurrency": 8}
        c = cfg_for(server.url("openai"), "openai", tmp_path, **settings)
        out = spend(c, [request(f"s{i}", n=1, max_tokens=16, prefix="y" * 400) for i in range(60)])
    assert all(isinstance(e, TeacherStopped) or len(e.continuations) == 1 for e in out)
    spent, _ = totals_of(tmp_path / "journal")
    assert 0.6 * CAPS[cap] < getattr(spent, cap) <= CAPS[cap] and min(spent.calls, spent.tokens, spent.usd) >= 0
    stop = next(str(e) for e in out if isinstance(e, TeacherStopped))
    assert f"budget.{cap}" in stop and "reserved for" in stop and "the next call may take" in stop


WORKER = """
import sys; sys.path[:0] = [{support!r}, {repo!r}]
import asyncio
from teacher_kit import EXTENSIONS, cfg_for, request, teacher_of
async def run():
    settings = {settings!r}
    async with teacher_of(cfg_for({url!r}, "openai", {folder!r}, **settings)) as t:
        await asyncio.gather(*(t.continue_text(request(sys.argv[1] + str(i), n=1)) for i in range(60)), return_exceptions=True)
asyncio.run(run())
"""


@pytest.mark.slow
@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("cap", CAPS)
def test_two_processes_share_a_cap_and_use_it_up(cap, honest, tmp_path):
    """One waits for what the other has reserved: a dollar cap does not end at a third of itself."""
    tests = pathlib.Path(__file__).parents[1]
    with WireServer(delay_s=0.05, mangle=None if honest else lying()) as server:
        code = WORKER.format(
            support=str(tests / "support"),
            repo=str(tests.parent),
            url=server.url("openai"),
            folder=str(tmp_path),
            settings=PRICE | {f"budget.{cap}": CAPS[cap], "teacher.max_concurrency": 16},
        )
        workers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
        assert [w.wait(timeout=120) for w in workers] == [0, 0]
    spent, _ = totals_of(tmp_path / "journal")
    assert 0.6 * CAPS[cap] < getattr(spent, cap) <= CAPS[cap] or (honest and spent.calls == 120)


@pytest.mark.parametrize("status", [502, 504])
def test_a_gateway_that_gave_up_may_have_billed_the_answer(status, tmp_path):
    bad = [True]

    def mangle(answer):
        return (status, {}, b"<html>") if bad and bad.pop() else answer

    with WireServer(mangle=mangle) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **PRICE)
        [result] = spend(c, [request(n=1)])
    spent, unknown = totals_of(tmp_path / "journal")
    assert len(result.continuations) == 1 and spent.calls == 2 and unknown.calls == 1 and spent.usd > unknown.usd > 0


def test_an_error_inside_200_is_not_paid_for(tmp_path):
    with WireServer(mangle=lambda a: {"error": {"code": 500, "message": "oops"}, "choices": None}) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **PRICE | {"teacher.max_retries": 1})
        [result] = spend(c, [request(n=1)])
    spent, unknown = totals_of(tmp_path / "journal")
    assert "oops" in result.failures[0].error and spent == Totals(2, 0, 0.0) and not unknown.calls


def test_what_a_gateway_counts_anthropics_way_stays_reserved(tmp_path):
    """Cached tokens that are not part of the prompt's: the difference is negative, and was once given back as money."""
    with WireServer(mangle=lambda a: with_usage(into=10, cached=5000)(SHAPES["openai"], a)) as server:
        [result] = spend(cfg_for(server.url("openai"), "openai", tmp_path, **PRICE), [request(n=1)])
    spent, unknown = totals_of(tmp_path / "journal")
    assert result.usage.cost_usd == spent.usd == unknown.usd > 0


def test_the_end_table_has_what_the_journal_has(tmp_path):
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **PRICE | {"teacher.continuation": "auto"})
        check(c)
        spend(c, [request()])

        async def later():  # the process that paid is gone; its checkpoint knew nothing of it
            async with teacher_of(c) as teacher:
                return teacher.spent(), reporting.cost(teacher, teacher.spent().usd)

        spent, shown = asyncio.run(later())
        assert spent.usd == pytest.approx(totals_of(tmp_path / "journal")[0].usd) and spent.calls == len(server.calls())
        assert min(spent.tokens_in, spent.tokens_out) > 0 and spent.tokens_in + spent.tokens_out == spent.tokens
        assert shown == f"${spent.usd:.2f}"
        c.run_dir, c.teacher.journal = str(tmp_path / "other"), str(tmp_path / "journal")
        assert asyncio.run(later())[0] == Spent()  # another run on the same journal


def test_a_cap_that_is_less_than_one_a_host_is_refused(tmp_path):
    class Caps:
        usd, tokens, calls, on_exhausted = 1.0, 0, 3, "stop"

    money = budget.Budget(type("C", (), {"budget": Caps, "seed": 0, "num_steps": 1}), Journal(tmp_path), budget.Price())
    with pytest.raises(UserError, match="budget.calls = 3 is less than 1 for each of the run's 4 hosts"):
        money.divide([Totals()] * 4)
    money.divide([Totals()] * 3)
    assert money.caps == Totals(1, 0, 1.0 / 3)


@pytest.mark.parametrize("here", [True, False])
def test_hosts_divide_what_the_caps_leave_whoever_spent_the_rest(tmp_path, here):
    """One host had spent 60 of 100: resumed on two, each may spend 20, and no cap that is used up becomes none."""
    cfg = cfg_for("", "openai", tmp_path, **PRICE | {"budget.usd": 100.0, "budget.calls": 5, "num_steps": 100})
    journal, mine = Journal(tmp_path), Totals(5, 100, 60.0)
    if here:
        for _ in range(5):
            journal.settle(journal.ask(b"key", 1, 20, 12.0, Totals()), "ok", usage=(10, 0, 10, 12.0))
        assert journal.totals() == mine
    money = budget.Budget(cfg, journal, budget.Price())
    money.divide([mine, Totals()])
    assert money.left() == {"usd": 20.0, "tokens": math.inf, "calls": 0}
    assert money.caps.usd == (80.0 if here else 20.0) and money.hosts == 2
    assert journal.ask(b"key", 1, 1, 0.1, money.caps) == "calls"
    assert isinstance(journal.ask(b"key", 1, 1, 20.0, dataclasses.replace(money.caps, calls=0)), int)
    assert journal.ask(b"key", 1, 1, 0.1, dataclasses.replace(money.caps, calls=0)) == "usd"


def test_an_estimate_takes_off_the_caps_what_the_journal_has_seen(tmp_path):
    c = cfg_for("", "openai", tmp_path, **PRICE | {"num_steps": 100})
    low = estimate.Preview(c, True).estimate.usd[0]
    c.budget.usd = 1.1 * low
    assert f"budget.usd = {c.budget.usd:,}: low is enough" in "\n".join(estimate.Preview(c, True).caps())
    journal = Journal(folder_of(c))
    journal.settle(journal.ask(b"key", 1, 20, low, Totals()), "ok", usage=(10, 0, 10, 0.6 * low))
    journal.close()
    assert f"{0.5 * low:,.2f} of it left: low ends after 5" in "\n".join(estimate.Preview(c, True).caps())


def test_the_price_of_a_model_that_no_table_has_is_unknown_and_shown_as_such(tmp_path):
    c = cfg_for("", "openai", tmp_path, **{"teacher.model": "brand-new-9"})
    price = budget.price(c, self_hosted=False)
    assert not price.known and "unknown" in budget.estimate(c, price, takes_n=True, latency_s=(1.0, 2.0)).table()
    c.teacher.price_input, c.teacher.price_output = 1.0, 2.0
    assert budget.price(c, self_hosted=False).known
    c.teacher.model, c.teacher.price_input, c.teacher.price_output = "gpt-4.1-mini", -1.0, -1.0
    assert budget.price(c, self_hosted=False).known and budget.price(c, self_hosted=True).known


@pytest.mark.parametrize("cap,value", [("usd", 1.0), ("tokens", 1_000_000), ("calls", 5_000)])
def test_a_budget_below_the_least_estimate_names_the_step_at_which_the_run_will_end(cap, value, tmp_path):
    c = cfg_for("", "openai", tmp_path, **{f"budget.{cap}": value, "num_steps": 200})
    price = budget.Price(3.0, 0.3, 15.0)
    e = budget.estimate(c, price, takes_n=True, latency_s=(1.0, 2.0))
    left = {"usd": float("inf"), "tokens": float("inf"), "calls": float("inf")} | {cap: value}
    said = budget.ends_early(c, e, left, 200)
    least = {"usd": e.usd[0], "tokens": e.tokens_in[0] + e.tokens_out[0], "calls": e.calls[0]}[cap]
    assert f"budget.{cap}" in said and f"step {int(200 * value / least)} of 200" in said
    assert not budget.ends_early(c, e, left | {cap: 2 * least}, 200)


def test_no_cost_is_shown_as_zero_where_the_price_is_unknown(tmp_path, monkeypatch):
    """A host that may bill: neither the probe nor a cap that is used up says $0."""
    monkeypatch.setattr(wire, "own_server", lambda url: False)
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"budget.calls": 12})
        line, report = check(c)
        out = spend(c, [request(f"s{i}", n=1) for i in range(12)])
    said = f"{line} {report.table()} {next(str(e) for e in out if isinstance(e, TeacherStopped))}"
    assert "an unknown price a call" in line and "price unknown" in report.table() and "0.0000" not in said


def test_worked_examples_in_front_are_reserved_and_estimated(tmp_path):
    """28 kB of them: no cap is passed, by the server's own count either."""
    examples = "\n\n".join(
        f"Q: What is {i} plus {i}?\nA: {i} plus {i} is {2 * i}, so it is {2 * i}." for i in range(500)
    )
    own = {"teacher.continuation": "completion", "teacher.template": "plain", "teacher.preamble": examples}
    with WireServer(extensions={"completion"}) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **own | {"budget.tokens": 60_000})
        out = spend(c, [request(f"s{i}", n=1) for i in range(8)])
        told = sum(e["usage"]["in"] + e["usage"]["out"] for e in server.calls())
    spent, _ = totals_of(tmp_path / "journal")
    assert any(isinstance(e, TeacherStopped) for e in out) and 0.5 * 60_000 < spent.tokens == told <= 60_000
    how = {"takes_n": True, "latency_s": (1.0, 1.0), "steps": 1}
    with_them = budget.estimate(c, budget.Price(), **how)
    c.teacher.preamble, c.teacher.template = "", "chat"
    without = budget.estimate(c, budget.Price(), **how)
    more = [(a - b) / n for a, b, n in zip(with_them.tokens_in, without.tokens_in, with_them.calls)]
    assert more == pytest.approx([len(examples) / 5, len(examples) / 4, len(examples) / 3])


@pytest.mark.parametrize("said,believed", [(3_000, True), (10**6, False)])
def test_usage_above_the_bound_counts_as_far_as_a_service_may_add_text_of_its_own(said, believed, tmp_path):
    shape = SHAPES["openai"]
    with WireServer(mangle=lambda a: with_usage(into=said, out=8)(shape, a)) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **PRICE)
        spend(c, [request(f"s{i}", n=1) for i in range(3)])
        spent, unknown = totals_of(tmp_path / "journal")
        assert len(server.calls()) == 3
        if believed:
            assert spent.tokens == 3 * (said + 8) and unknown.calls == 0
        else:
            assert unknown == spent and 3 * 4 * 1024 < spent.tokens < 3 * 4 * 1500
        c = cfg_for(server.url("openai"), "openai", tmp_path / "capped", **PRICE | {"budget.tokens": 7_000})
        out = spend(c, [request(f"s{i}", n=1) for i in range(6)])
    spent, _ = totals_of(tmp_path / "capped" / "journal")
    assert any(isinstance(e, TeacherStopped) for e in out) and 0.6 * 7_000 < spent.tokens <= 7_000


@pytest.mark.parametrize("provider", SHAPES)
def test_an_error_inside_200_that_states_its_usage_stays_spent(provider, tmp_path):
    with WireServer(
        extensions=EXTENSIONS[provider], mangle=lambda a: a | {"error": {"code": 500, "message": "gone"}}
    ) as server:
        c = cfg_for(server.url(provider), provider, tmp_path, **PRICE | {"teacher.max_retries": 0})
        [result] = spend(c, [request(n=1)])
    spent, unknown = totals_of(tmp_path / "journal")
    assert result.failures and unknown == spent and spent.calls == 1 and spent.usd > 0
