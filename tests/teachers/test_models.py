"""The providers' models of November 2026: what they refuse, what they cost, who answers in whose place."""

import asyncio
import datetime
import json
import re

import pytest
from teacher_kit import EXTENSIONS, ask, cfg_for, check, request, teacher_of
from wire_protocols import OpenAI
from wire_server import WireServer, speak

from omniopd_jax import teachers
from omniopd_jax.errors import UserError
from omniopd_jax.teachers import TeacherStopped, budget, journal_file, prices, wire
from omniopd_jax.teachers.journal import Journal


@pytest.mark.parametrize(
    "name,like",
    [
        ("gpt-4.1-mini", "gpt-4.1-mini"), ("gpt-4.1-mini-2025-04-14", "gpt-4.1-mini"), ("gpt-4o-latest", "gpt-4o"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"), ("claude-opus-4-1@20250805", "claude-opus-4-1"),
        ("models/gemini-2.5-flash", "gemini-2.5-flash"), ("gemini-2.5-flash-001", "gemini-2.5-flash"),
    ],
)  # fmt: skip
def test_a_price_is_found_by_exact_name_or_a_dated_one(name, like):
    assert budget.listed_price(name) == budget.PRICES[like]


@pytest.mark.parametrize(
    "name",
    [
        "gpt-5.2-pro",
        "gpt-5-pro",
        "gpt-4o-audio-preview",
        "gpt-4.1-mini-search",
        "claude-opus-4-9",
        "claude-opus-4",
        "claude-sonnet-5-7",
        "gemini-2.5-flash-image",
        "gemini-2.5-flash-lite-preview",
        "gpt-4.1-miniature",
        "my-gpt-4o",
        "",
    ],
)
def test_the_price_of_a_name_that_only_begins_alike_is_unknown(name):
    assert budget.listed_price(name) is None


def test_opus_4_1_costs_what_it_costs():
    """It once counted a third: a cap of $100 let $300 through."""
    assert budget.listed_price("claude-opus-4-1-20250805").output == 75.0


@pytest.mark.parametrize(
    "asked,served,same",
    [
        ("gpt-4o", "gpt-4o-2024-11-20", True), ("gemini-2.5-flash", "gemini-3.5-flash-lite", False),
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001", True), ("gpt-4o", "gpt-4o-mini", False),
        ("models/gemini-2.5-flash", "gemini-2.5-flash", True),
    ],
)  # fmt: skip
def test_the_model_that_answers_is_known_by_its_name(asked, served, same):
    assert wire.same_model(asked, served, False) is same


def test_a_server_of_ones_own_may_call_a_model_by_its_path():
    assert wire.same_model("Qwen/Qwen3-32B", "/models/Qwen3-32B", True)
    assert not wire.same_model("Qwen/Qwen3-32B", "llama-3-8b", True)


def rerouted(tmp_path, monkeypatch, capfd, **settings):
    """(the teacher, what was said) after two requests to a service that answers with another model."""
    monkeypatch.setenv("GEMINI_API_KEY", "a-key-0123456789")

    async def run(c):
        async with teacher_of(c) as teacher:
            teacher.client.self_hosted, teacher.client.official = False, True
            for who in ("s0", "s1"):
                await teacher.continue_text(request(who, n=1))
            return teacher

    with WireServer(extensions={"prefill"}, models=["gemini-2.5-flash"],
                    mangle=lambda a: a | {"modelVersion": "gemini-3.8-flash"}) as server:  # fmt: skip
        c = cfg_for(server.url("gemini"), "gemini", tmp_path, **{"teacher.model": "gemini-2.5-flash"} | settings)
        return asyncio.run(run(c)), capfd.readouterr().err


def test_another_model_that_answers_is_reported_once_and_priced(tmp_path, monkeypatch, capfd):
    teacher, said = rerouted(tmp_path, monkeypatch, capfd)
    assert said.count("'gemini-2.5-flash' was asked, and 'gemini-3.8-flash' answers") == 1
    assert teacher.price == teacher.budget.price == budget.PRICES["gemini-3.8-flash"]


def test_a_pinned_model_lets_no_other_answer(tmp_path, monkeypatch, capfd):
    with pytest.raises(TeacherStopped, match="'gemini-3.8-flash' answers; teacher.pin_model"):
        rerouted(tmp_path, monkeypatch, capfd, **{"teacher.pin_model": True})


@pytest.fixture
def as_the_service(monkeypatch):
    """The stand-in is taken for the provider's own service, at the table's prices."""
    monkeypatch.setattr(wire, "is_official", lambda url, domain: True)
    monkeypatch.setattr(wire, "own_server", lambda url: False)
    monkeypatch.setenv("GEMINI_API_KEY", "a-key-0123456789")


def gemini(answers, **more):
    """A server whose next answer is by the next of `answers`, with a usage of 900 tokens in and 100 out."""
    used = {"promptTokenCount": 900, "candidatesTokenCount": 100, "totalTokenCount": 1000}
    return WireServer(
        extensions={"prefill"}, models=["gemini-3.8-flash"],
        mangle=lambda a: a | {"modelVersion": next(answers), "usageMetadata": used}, **more,
    )  # fmt: skip


COST = {
    name: budget.PRICES[name].cost(900, 0, 100)
    for name in ("gemini-2.5-flash-lite", "gemini-3.5-flash-lite", "gemini-3.6-flash", "gemini-3.8-flash")
}


def test_each_reply_is_priced_by_its_own_model_and_the_name_goes_back(tmp_path, as_the_service, capfd):
    async def run(c):
        async with teacher_of(c) as teacher:
            for i, name in enumerate(names):
                result = await teacher.continue_text(request(f"s{i}", n=1, max_tokens=100))
                assert result.usage.cost_usd == pytest.approx(COST[name])
                assert teacher.price == budget.PRICES[name]
            held = teacher.journal.own.execute("select max_usd from calls order by id").fetchall()
            return teacher.journal.totals().usd, [usd for (usd,) in held]

    names = ["gemini-2.5-flash-lite", "gemini-3.8-flash", "gemini-3.6-flash", "gemini-3.8-flash", "gemini-3.6-flash"]
    with gemini(iter(names)) as server:
        usd, held = asyncio.run(run(cfg_for(server.url("gemini"), "gemini", tmp_path, **{"teacher.model": names[1]})))
    assert usd == pytest.approx(sum(COST[name] for name in names))
    assert held[3] == held[4] > held[0] == held[1]  # once 3.6 has answered, it may again
    said = capfd.readouterr().err
    assert said.count("was asked, and 'gemini-3.6-flash' answers") == 1 and said.count("was asked") == 2


@pytest.mark.parametrize("stated", [True, False])
def test_calls_in_flight_at_a_switch_to_a_dearer_model_count_at_its_price(stated, tmp_path, as_the_service):
    async def run(c):
        async with teacher_of(c) as teacher:
            sent = [request(f"s{i}", n=1, max_tokens=100) for i in range(8)]
            await asyncio.gather(*map(teacher.continue_text, sent))
            return teacher.journal.totals().usd, teacher.journal.unknown()

    def mangle(answer):
        answer |= {"modelVersion": "gemini-3.6-flash"}
        answer["usageMetadata"] = {"promptTokenCount": 900, "candidatesTokenCount": 100, "totalTokenCount": 1000}
        return answer if stated else {k: v for k, v in answer.items() if k != "usageMetadata"}

    model = {"teacher.model": "gemini-2.5-flash-lite"}
    with WireServer(extensions={"prefill"}, models=[*model.values()], mangle=mangle) as server:
        usd, unknown = asyncio.run(run(cfg_for(server.url("gemini"), "gemini", tmp_path, **model)))
    if stated:
        assert usd == pytest.approx(8 * COST["gemini-3.6-flash"]) and unknown.calls == 0
    else:
        assert usd == unknown.usd > 8 * COST["gemini-3.6-flash"]


REROUTED = ["gemini-3.8-flash"] * 2 + ["gemini-3.5-flash-lite"] * 4


def bought(c, n=6):
    """Texts of n requests, in turn."""

    async def run():
        async with teacher_of(c) as teacher:
            results = [await teacher.continue_text(request(f"s{i}", n=1)) for i in range(n)]
            return [r.continuations[0].text for r in results]

    return asyncio.run(run())


def test_a_run_that_was_rerouted_is_resumed_and_replayed_without_a_call(tmp_path, as_the_service):
    with gemini(iter(REROUTED)) as server:
        c = cfg_for(server.url("gemini"), "gemini", tmp_path, **{"teacher.model": "gemini-3.8-flash"})
        first = bought(c)
        assert bought(c) == first and len(server.calls()) == 6
        c.teacher.replay = "only"
        assert bought(c) == first
        c.teacher.replay, c.teacher.pin_model = "only", True
        assert bought(c, 2) == first[:2]
        with pytest.raises(TeacherStopped, match="has no continuation"):  # another's text is none of this model's
            bought(c)
    journal = Journal(tmp_path / "journal")
    journal.export_jsonl(tmp_path / "out.jsonl")
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["model"] for line in sorted(lines, key=lambda line: line["sample_id"])] == REROUTED


@pytest.mark.parametrize("told", [True, False])
def test_what_earlier_versions_kept_under_the_name_that_answered_is_found(told, tmp_path, as_the_service):
    """As a reroute left a journal before: the texts after it under the other name, in a file without the new table."""
    with gemini(iter(REROUTED)) as server:
        c = cfg_for(server.url("gemini"), "gemini", tmp_path, **{"teacher.model": "gemini-3.8-flash"})
        first = bought(c)
    teacher = teachers.make(c)
    for i in range(2, 6):
        r, old = request(f"s{i}", n=1), "gemini-3.5-flash-lite"
        (key, about), (new, _) = teacher._key(r, "prefill", old), teacher._key(r, "prefill")
        teacher.journal.describe(key, about, r.messages, r.prefix)
        with teacher.journal._write() as own:
            [(index, text, finish)] = own.execute(
                "select idx, text, finish from continuations where key = ? and sample_id = ?", (new, r.sample_id)
            )
            own.execute("delete from continuations where key = ? and sample_id = ?", (new, r.sample_id))
            journal_file.insert_text(own, key, r.sample_id, r.peak, index, text, finish, None, None, None, 1.0)
    teacher.journal.put_mode("gemini", "gemini-3.8-flash", "auto", "prefill", {"answering": old if told else ""})
    if told:  # then it does not matter who else was asked
        teacher.journal.put_mode("gemini", "gemini-2.5-flash", "auto", "prefill", {"answering": ""})
    with teacher.journal._write() as own:
        own.execute("drop table answered")
    teacher.journal.close()
    c.teacher.replay = "only"
    assert bought(c) == first
    c.teacher.model = "gemini-3.6-flash"  # nobody answered in its place
    with pytest.raises(TeacherStopped, match="has no continuation"):
        bought(c)


def test_the_key_of_a_text_is_what_it_was(tmp_path):
    """Journals of before are found by it."""
    c = cfg_for("https://generativelanguage.googleapis.com", "gemini", tmp_path, **{"teacher.replay": "only"})
    (tmp_path / "journal").mkdir()
    c.teacher.model = "gemini-3.8-flash"
    assert teachers.make(c)._key(request(), "prefill")[0].hex() == "766b941807a13865ed795fdc6bda4494"


@pytest.mark.parametrize(
    "details,written",
    [({"cached_tokens": 100, "cache_write_tokens": 800}, 800), ({"cached_tokens": 100}, 900), ({}, 1000)],
)
def test_what_is_written_to_the_cache_is_paid_for_as_that(details, written, tmp_path, as_the_service, monkeypatch):
    """Where the answer is silent all that is fresh counts as written, as in the estimate."""
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-0123456789")
    used = {"prompt_tokens": 1000, "completion_tokens": 8, "total_tokens": 1008, "prompt_tokens_details": details}
    with WireServer(mangle=lambda a: a | {"model": "gpt-6-luna", "usage": used}, models=["gpt-6-luna"]) as server:
        settings = {"teacher.model": "gpt-6-luna", "teacher.continuation": "instruct"}
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path, **settings), request(n=1))
    cost = budget.PRICES["gpt-6-luna"].cost(1000, details.get("cached_tokens", 0), 8, written)
    assert result.usage.cost_usd == pytest.approx(cost)


@pytest.mark.parametrize("said", [{"prompt_cache_hit_tokens": 960}, {"cached_tokens": 960}])
def test_cached_input_is_read_where_deepseek_and_moonshot_say_it(said, tmp_path):
    used = {"prompt_tokens": 1000, "completion_tokens": 8, "total_tokens": 1008} | said
    with WireServer(mangle=lambda answer: answer | {"usage": used}) as server:
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request(n=1))
    assert result.usage.tokens_cached == 960


def test_a_prompt_that_gemini_blocks_stays_spent_where_it_says_what_it_used(tmp_path):
    def blocked(answer):
        return {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 9}}

    async def run():
        async with teacher_of(c) as teacher:
            await teacher.continue_text(request(n=1))
            return teacher.journal.unknown().calls

    with WireServer(extensions=EXTENSIONS["gemini"], mangle=blocked) as server:
        c = cfg_for(server.url("gemini"), "gemini", tmp_path)
        assert asyncio.run(run()) == 1


@pytest.mark.parametrize("day,times,held", [("2026-12-30", 1, 1), ("2026-12-31", 1, 2), ("2027-01-01", 2, 2)])
def test_a_price_that_changes_on_a_known_day_is_used_from_that_day(day, times, held, tmp_path, as_the_service):
    """What goes out on the eve may be answered on the day."""

    async def run(c):
        async with teacher_of(c) as teacher:
            teacher.budget.today = lambda: datetime.date.fromisoformat(day)
            result = await teacher.continue_text(request(n=1, max_tokens=100))
            [(most,)] = teacher.journal.own.execute("select max_usd from calls")
            return result.usage.cost_usd, most, teacher.estimate(steps=10).usd[1]

    def runs(name, **settings):
        with gemini(iter(["gemini-3.8-flash"])) as server:
            settings |= {"teacher.model": "gemini-3.8-flash"}
            return asyncio.run(run(cfg_for(server.url("gemini"), "gemini", tmp_path / name, **settings)))

    usd, most, estimated = runs("listed")
    given = {"teacher.price_input": 0.75, "teacher.price_cached": 0.075, "teacher.price_output": 3.75}
    usd_1, most_1, estimated_1 = runs("given", **given)  # what a person says holds on every day
    assert usd_1 == pytest.approx((900 * 0.75 + 100 * 3.75) / 1e6)
    ratios = (usd / usd_1, most / most_1, estimated / estimated_1)
    assert ratios == pytest.approx((times, held, times))
    usd_2, most_2, _ = runs("input", **{"teacher.price_input": 1.5})  # the input alone: the output is the table's
    assert usd_2 == pytest.approx((900 * 1.5 + 100 * 3.75 * times) / 1e6)
    assert "from 2027-01-01: 1.5 in, 7.5 out" in prices.source("gemini-3.8-flash")


def test_20_audits_of_10_texts_on_gemini_are_40_calls(tmp_path):
    with WireServer(extensions=EXTENSIONS["gemini"]) as server:
        c = cfg_for(server.url("gemini"), "gemini", tmp_path, **{"audit.num_continuations": 10})
        results = ask(c, *(request(f"s{i}", n=10) for i in range(20)))
        assert all(len(r.continuations) == 10 for r in results) and len(server.calls()) == 40
        asked = sorted(e["body"]["generationConfig"]["candidateCount"] for e in server.calls())
        assert asked == [2] * 20 + [8] * 20
    estimate = budget.estimate(c, budget.Price(), takes_n=True, latency_s=(1.0, 1.0), steps=1, most=8)
    one = budget.estimate(c, budget.Price(), takes_n=True, latency_s=(1.0, 1.0), steps=1)
    assert estimate.calls[0] == 2 * one.calls[0]


@pytest.mark.parametrize("field", ["temperature", "topP", "seed", "thinkingConfig"])
def test_a_sampling_field_that_gemini_refuses_is_left_out_and_said(field, tmp_path):
    """3.7 and 3.8 flash refuse temperature and top_p, and end no model turn: `instruct`."""
    with WireServer(extensions=set(), refuses={field}) as server:
        c = cfg_for(server.url("gemini"), "gemini", tmp_path, **{"teacher.continuation": "auto"})
        _, report = check(c)
        assert report.mode == "instruct" and dict(report.rows)["left out (refused)"]
        [result] = ask(c, request())
        assert len(result.continuations) == 4
        assert field not in server.calls()[-1]["body"]["generationConfig"]


def test_a_field_that_is_refused_in_mid_run_fails_no_call(tmp_path):
    """A model is rerouted while 16 calls are out: each is asked again without the field, and none is written off."""

    async def run(c):
        async with teacher_of(c) as teacher:
            return await asyncio.gather(*(teacher.continue_text(request(f"s{i}", n=1)) for i in range(16)))

    with WireServer(refuses={"seed"}, delay_s=0.05) as server:
        results = asyncio.run(run(cfg_for(server.url("openai"), "openai", tmp_path)))
        assert all(len(r.continuations) == 1 for r in results) and len(server.calls()) <= 32


def test_gemini_is_asked_for_the_least_thinking_that_it_takes(tmp_path):
    """3.x refuses a budget of 0 and takes a level; a model that takes neither is left to itself, and probed."""

    def refuses_budget(body):
        return any("udget" in key for key in body["generationConfig"].get("thinkingConfig", {}))

    with WireServer(extensions=EXTENSIONS["gemini"], refused=refuses_budget) as server:
        c = cfg_for(server.url("gemini"), "gemini", tmp_path)
        _, report = check(c)
        assert dict(report.rows)["left out (refused)"] == "thinking"
        assert server.calls()[-1]["body"]["generationConfig"]["thinkingConfig"].popitem()[1] == "MINIMAL"
    said = "spends its tokens on hidden reasoning .* cannot be switched off"
    with (
        WireServer(extensions=EXTENSIONS["gemini"], model_thinks="always") as server,
        pytest.raises(UserError, match=said),
    ):
        check(cfg_for(server.url("gemini"), "gemini", tmp_path / "always"))


@pytest.mark.parametrize("name", budget.PRICES)
def test_every_price_has_a_day_and_a_page(name):
    listed = prices.TABLE[name]
    assert re.match(r"20\d\d(-\d\d){0,2}$", listed.read) and re.search(r"https?://|\w+/\w+, ", listed.page)
    assert prices.source(f"{name}-latest").startswith(f"read {listed.read}: ")
    assert 0 < listed.price.cached <= listed.price.input <= listed.price.output


def test_a_price_that_rises_with_the_prompts_length_is_reserved_and_counted():
    price = budget.listed_price("claude-haiku-5-5")
    assert price.cost(100_000, 0, 0) == pytest.approx(0.01) and price.cost(100_001, 0, 0) > 0.05
    for sent in (1_000, 100_000, 100_001, 400_000):
        for cached, written in ((0, 0), (sent, 0), (0, sent)):
            assert price.cost(sent, cached, 50, written) <= price.most(sent, 50) + 1e-12
            assert price.cost(sent, cached, 50, written) <= price.most(4 * sent, 50) + 1e-12


PREFIX = "".join(f"step {i}: we add the numbers and carry the one. " for i in range(340))  # some 4,000 tokens


def bill(tmp_path, least, prefixes, n=4):
    """(dollars, calls as the server saw them) of one response's audits."""
    with WireServer(extensions=EXTENSIONS["anthropic"], cache_least=least) as server:
        prices = {"teacher.price_input": 1.0, "teacher.price_cached": 0.1, "teacher.price_output": 5.0}
        c = cfg_for(server.url("anthropic"), "anthropic", tmp_path, **prices)

        async def run():
            async with teacher_of(c) as teacher:
                teacher.prices[""] = teacher.budget.prices[0] = budget.Price(1.0, 0.1, 5.0, 1.25)
                out = [await teacher.continue_text(request("s", len(p), p, n=n)) for p in prefixes]
                return sum(r.usage.cost_usd for r in out)

        return asyncio.run(run()), server.calls()


def test_nested_prefixes_of_an_answer_hit_anthropics_cache(tmp_path):
    prefixes = [PREFIX[:k] for k in (9_000, 11_000, 13_500, 16_000)]
    usd, calls = bill(tmp_path, 1024, prefixes)
    out = sum(e["usage"]["out"] for e in calls) * 5.0 / 1e6
    tokens = [len(p) / 4 for p in prefixes]
    # one growing block: each prefix is written once and read three times, and none finds the one before it
    one_block = sum(t * (1.25 + 3 * 0.1) for t in tokens) / 1e6
    assert usd - out < 0.75 * one_block
    without = sum(4 * t for t in tokens) / 1e6
    assert usd - out < 0.3 * without
    for entry in calls:
        blocks = [b for m in entry["body"]["messages"] if isinstance(m["content"], list) for b in m["content"]]
        assert sum("cache_control" in b for b in blocks) <= 4
        assert all(b["text"].strip() for b in blocks)


def test_a_mark_that_cannot_pay_is_left_out(tmp_path):
    _, calls = bill(tmp_path, 1024, [PREFIX[:2000]])  # less than is cached
    assert "cache_control" not in str([e["body"] for e in calls])
    usd, calls = bill(tmp_path / "one", 1024, [PREFIX[:4090]], n=1)  # nobody asks again
    assert "cache_control" not in str([e["body"] for e in calls])


def test_what_is_sent_is_the_prefix_whatever_its_blocks(tmp_path):
    for k in (4095, 4096, 4097, 8192, 12_289):
        _, calls = bill(tmp_path / str(k), 1024, [PREFIX[:k]], n=1)
        content = calls[-1]["body"]["messages"][-1]["content"]
        sent = content if isinstance(content, str) else "".join(b["text"] for b in content)
        assert sent == PREFIX[:k].rstrip()


def test_the_probe_reports_when_a_model_is_shut_down(tmp_path, monkeypatch):
    listing = {"object": "list", "data": [{"id": "m", "object": "model", "shutdown_date": "2027-01-14"}]}
    monkeypatch.setattr(OpenAI, "describe", staticmethod(lambda owner, path: (200, listing)))
    with WireServer() as server:
        _, report = check(cfg_for(server.url("openai"), "openai", tmp_path))
    assert "shut down on 2027-01-14" in dict(report.rows)["reachable, key accepted"]


@pytest.mark.parametrize("begins,said", [("<think>Let me", "with its thoughts"), ("A fox", "with the answer")])
def test_the_probe_says_how_a_whole_answer_begins(begins, said, tmp_path):
    """Only an empty prefix shows it: a teacher that thinks goes on with an answer that has begun."""

    def speaks(context, max_tokens, seed, index):
        return begins if seed == 13 else speak(context, max_tokens, seed, index)

    with WireServer(speak=speaks) as server:
        _, report = check(cfg_for(server.url("openai"), "openai", tmp_path))
    assert said in dict(report.rows)["a whole answer"]
