"""A service that fails: what arrives is counted right, nothing is filled in, and the run ends or goes on as it
should."""

import asyncio
import email.utils
import random
import threading
import time

import pytest
from teacher_kit import EXTENSIONS, ask, cfg_for, request, teacher_of, texts
from wire_server import FAULTS, LANGUAGE, WireServer

from omniopd_jax.teachers import TeacherStopped

PROVIDERS = ("openai", "anthropic", "gemini")


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch):
    monkeypatch.setattr("omniopd_jax.teachers.traffic.FIRST_BACKOFF_S", 0.05)


def delivered(server, provider, requests):
    """{(sample id, peak): texts that the server's log says went out whole}, by the request's own words."""
    out = {}
    for entry in server.calls():
        said = str(entry["body"])
        who = next((r.sample_id, r.peak) for r in requests if f"<{r.sample_id}:{r.peak}>" in said)
        out[who] = out.get(who, 0) + len(entry["texts"])
    return out


@pytest.mark.parametrize("provider", PROVIDERS)
def test_n_is_what_the_servers_log_says_arrived(provider, tmp_path):
    requests = [request(f"s{s}", p, f"<s{s}:{p}> so", n=3, max_tokens=6) for s in range(6) for p in (4, 9, 12)]
    settings = {
        "teacher.timeout_s": 1.5,
        "teacher.max_retries": 3,
        "teacher.max_concurrency": 12,
        "teacher.deadline_s": 30.0,
    }
    with WireServer(
        extensions=EXTENSIONS[provider],
        share=0.3,
        kinds=list(FAULTS),
        stall_s=3.0,
        rng=random.Random(3),
        retry_after_s=0.1,
    ) as server:
        c = cfg_for(server.url(provider), provider, tmp_path, **settings)
        results = ask(c, *requests)
        asked = len(server.calls())
        came = delivered(server, provider, requests)
        for r, result in zip(requests, results):
            assert len(result.continuations) == came[(r.sample_id, r.peak)], (r.sample_id, r.peak)
            assert len(result.continuations) + len(result.failures) == 3
            assert sorted(x.index for x in result.continuations + result.failures) == [0, 1, 2]
            assert all(len(text) <= 4000 for text in texts(result))
        kinds = {entry["fault"] for entry in server.calls()}
        assert len(kinds) >= 6 and sum(r.usage.retries for r in results) > 0
        assert sum(r.usage.calls for r in results) >= asked  # a call may time out before the server has read it
        again = ask(c, *requests)  # the journal holds everything, failures too
        assert len(server.calls()) == asked
        assert [(r.continuations, r.failures) for r in again] == [(r.continuations, r.failures) for r in results]
        assert all(r.replayed == 3 and r.usage.calls == 0 for r in again)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone(fault, tmp_path):
    with WireServer(faults=[fault], stall_s=6.0, retry_after_s=0.1) as server:
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.timeout_s": 2.0}), request())
        assert len(result.continuations) == 4 and not result.failures
        arrives = fault in ("empty", "language", "megabyte")
        assert len(server.calls()) == (1 if arrives else 2)
        if fault == "empty":
            assert texts(result) == [""] * 4  # the teacher ended its answer: that is a continuation
        if fault == "language":
            assert texts(result) == [LANGUAGE] * 4
        if fault == "megabyte":
            assert all(3000 < len(text) <= 4000 for text in texts(result))


def test_an_empty_text_at_the_length_limit_is_no_continuation(tmp_path):
    with WireServer(model_thinks=True) as server:
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request())
    assert not result.continuations and "hidden reasoning" in result.failures[0].error


def test_retry_after_is_honoured(tmp_path):
    with WireServer(faults=["429_after", "429_after"], retry_after_s=0.7) as server:
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request())
        times = [entry["time"] for entry in server.calls()]
    assert result.usage.retries == 2 and all(b - a >= 0.7 for a, b in zip(times, times[1:]))


def test_retry_after_as_a_date_is_honoured(tmp_path):
    with WireServer(
        faults=["429_after"], retry_after_s=email.utils.formatdate(time.time() + 2.5, usegmt=True)
    ) as server:
        ask(cfg_for(server.url("openai"), "openai", tmp_path), request())
        first, second = [entry["time"] for entry in server.calls()]
    assert 1.0 <= second - first < 5


WITHHELD = {
    "openai": [{"finish_reason": "content_filter"}, {"finish_reason": "abort"}],
    "anthropic": [{"stop_reason": "refusal", "content": []}],
    "gemini": [{"finishReason": "SAFETY", "content": {}}, {"finishReason": "RECITATION"}, {"finishReason": "OTHER"}],
}


@pytest.mark.parametrize("provider,change", [(p, c) for p, cs in WITHHELD.items() for c in cs])
def test_a_text_that_the_service_withheld_is_no_continuation(provider, change, tmp_path):
    """An empty text would be a score of zero that nobody gave."""

    def mangle(answer):
        for choice in answer.get("choices") or answer.get("candidates") or [answer]:
            choice.update(change)
        return answer

    with WireServer(extensions=EXTENSIONS[provider], mangle=mangle) as server:
        [result] = ask(cfg_for(server.url(provider), provider, tmp_path), request())
    assert not result.continuations and [f.index for f in result.failures] == [0, 1, 2, 3]
    assert all("withheld" in f.error for f in result.failures)


ODD = {
    "openai": [{"choices": [None]}, {"choices": ["x"]}, {"choices": [{"message": 3}]}, {"choices": {}}],
    "anthropic": [{"content": None}, {"content": 3}],
    "gemini": [{"candidates": "x"}, {"candidates": [3]}],
}


@pytest.mark.parametrize("provider,odd", [(p, o) for p, odds in ODD.items() for o in odds])
def test_an_answer_of_another_shape_is_asked_again(provider, odd, tmp_path):
    first = [True]

    def mangle(answer):
        return answer | odd if first and first.pop() else answer

    with WireServer(extensions=EXTENSIONS[provider], mangle=mangle) as server:
        [result] = ask(cfg_for(server.url(provider), provider, tmp_path), request(n=1))
        assert len(result.continuations) == 1 and len(server.calls()) == 2


def test_half_a_character_is_left_out_and_the_text_is_kept(tmp_path):
    with WireServer(speak=lambda *_: " half \ud83d") as server:  # a server that cuts text by UTF-16 units
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        [result] = ask(c, request(n=1))
        [again] = ask(c, request(n=1))
    assert texts(result) == texts(again) == [" half "]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_prefix_longer_than_the_teachers_context_costs_its_audit_and_no_more(provider, tmp_path):
    with WireServer(extensions=EXTENSIONS[provider], max_context=300) as server:
        # a late answer is no second call
        c = cfg_for(server.url(provider), provider, tmp_path, **{"teacher.timeout_s": 15.0})
        far = [request(f"s{i}", 9, f"{i} " * 300) for i in range(20)]

        async def run():
            async with teacher_of(c) as teacher:  # the first answer, as of the probe: the service works
                whole = await teacher.continue_text(request("a", 1, "short"))
                return whole, await asyncio.gather(*map(teacher.continue_text, far))

        whole, long = asyncio.run(run())
        assert len(whole.continuations) == 4
        assert all(len(r.failures) == 4 and r.usage.calls == 1 for r in long)  # asked once, never again
        calls = len(server.calls())
        ask(c, *far)
        assert len(server.calls()) == calls


def test_a_context_too_short_for_everything_stops_the_run(tmp_path):
    with WireServer(max_context=5) as server, pytest.raises(TeacherStopped, match="context is too short"):
        ask(cfg_for(server.url("openai"), "openai", tmp_path), *(request(f"s{i}") for i in range(20)))


def test_a_deadline_missed_once_lowers_n_and_is_remembered(tmp_path):
    settings = {"teacher.deadline_s": 1.0, "teacher.timeout_s": 5.0}
    with WireServer(stall_s=10.0) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **settings)

        async def run():
            async with teacher_of(c) as teacher:
                server.faults = ["stall"]
                slow = asyncio.ensure_future(teacher.continue_text(request("slow")))
                await asyncio.sleep(0.3)
                for i in range(5):  # the service as a whole is well
                    await teacher.continue_text(request(f"s{i}"))
                    await asyncio.sleep(0.1)
                return await slow

        start = time.monotonic()
        result = asyncio.run(run())
        assert time.monotonic() - start < 3
        assert not result.continuations and "deadline" in result.failures[0].error
        calls = len(server.calls())
        [again] = ask(c, request("slow"))
        assert again.failures == result.failures and len(server.calls()) == calls


@pytest.mark.parametrize("kind", ["503", "429", "stall", "reset", "html", "truncated"])
def test_total_failure_is_a_clean_stop_inside_the_deadline(kind, tmp_path):
    with WireServer(share=1.0, kinds=[kind], stall_s=10.0) as server:
        settings = {"teacher.deadline_s": 2.0, "teacher.timeout_s": 0.5}
        c = cfg_for(server.url("openai"), "openai", tmp_path, **settings)
        start, busy = time.monotonic(), time.process_time()
        with pytest.raises(TeacherStopped, match="has not answered"):
            ask(c, *(request(f"s{i}") for i in range(30)))
        # work takes as long as a crowded machine lets it
        waited = time.monotonic() - start - (time.process_time() - busy)
        assert waited < 4.5
        server.share = 0.0
        c.teacher.timeout_s, c.teacher.deadline_s = 10.0, 60.0
        results = ask(c, *(request(f"s{i}") for i in range(30)))  # nothing was written off: the resumed run gets it all
        assert all(len(r.continuations) == 4 for r in results)


def test_after_a_stop_nothing_more_is_tried(tmp_path):
    with WireServer(share=1.0, kinds=["stall"], stall_s=10.0) as server:
        settings = {"teacher.deadline_s": 1.0, "teacher.timeout_s": 0.4, "teacher.max_concurrency": 2}
        c = cfg_for(server.url("openai"), "openai", tmp_path, **settings)

        async def run():
            async with teacher_of(c) as teacher:
                asked = (teacher.continue_text(request(f"s{i}", p)) for i in range(20) for p in (1, 2, 3))
                return await asyncio.gather(*asked, return_exceptions=True)

        start = time.monotonic()
        out = asyncio.run(run())
        assert all(isinstance(e, TeacherStopped) for e in out) and time.monotonic() - start < 3.0
        assert len(server.calls()) <= 12


def test_an_outage_in_the_middle_of_audits_writes_nothing_off(tmp_path):
    """Each had its first text when the service went away: the others are asked for once it is back."""
    answers = iter(range(8))

    def mangle(answer):
        return answer if next(answers, None) is not None else (503, {}, b'{"error": {"message": "down"}}')

    async def run(c):
        async with teacher_of(c) as teacher:
            asked = (teacher.continue_text(request(f"s{i}", n=4)) for i in range(8))
            return await asyncio.gather(*asked, return_exceptions=True)

    with WireServer(honours_n=False, mangle=mangle) as server:
        settings = {"teacher.timeout_s": 10.0, "teacher.deadline_s": 4.0, "teacher.max_retries": 1000}
        c = cfg_for(server.url("openai"), "openai", tmp_path, **settings)
        assert all(isinstance(r, TeacherStopped) for r in asyncio.run(run(c)))
        server.mangle = None
        results = asyncio.run(run(c))
    assert [len(r.continuations) for r in results] == [4] * 8 and sum(r.replayed for r in results) == 8


@pytest.mark.parametrize("usage,texts", [({"completion_tokens": 4}, 4), ({"completion_tokens": 40}, 0), (None, 0)])
def test_null_where_the_model_had_nothing_to_add_is_an_empty_text(usage, texts, tmp_path):
    """SGLang's: an end token a choice, and nothing else, was written."""

    def mangle(answer):
        for choice in answer["choices"]:
            choice["message"]["content"], choice["finish_reason"] = None, "stop"
        return answer | {"usage": usage and usage | {"prompt_tokens": 9}}

    with WireServer(mangle=mangle) as server:
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request(n=4))
    assert [(c.text, c.finish) for c in result.continuations] == [("", "stop")] * texts
    assert len(result.failures) == 4 - texts


def test_settings_that_are_always_refused_stop_the_run(tmp_path):
    with WireServer(extensions=set()) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        with pytest.raises(TeacherStopped, match="refuses"):
            ask(c, *(request(f"s{i}") for i in range(20)))


def test_gone_and_back(tmp_path):
    server = WireServer(delay_s=0.1).start()
    c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.max_concurrency": 4, "teacher.max_retries": 1})

    def outage():
        time.sleep(0.5)
        server.stop()
        time.sleep(4.0)
        server.start()

    thread = threading.Thread(target=outage)
    thread.start()
    try:
        results = ask(c, *(request(f"s{i}", n=1) for i in range(60)))
        assert sum(len(r.continuations) for r in results) >= 56  # at most those in flight at the cut may be lost
        assert max(r.latency_s for r in results) > 3.5
    finally:
        thread.join()
        server.stop()


def test_metrics_are_of_the_calls_since_they_were_last_taken(tmp_path):
    with WireServer(faults=["500"]) as server:

        async def run():
            async with teacher_of(cfg_for(server.url("openai"), "openai", tmp_path)) as teacher:
                await teacher.continue_text(request())
                await teacher.continue_text(request())
                return teacher.metrics(), teacher.metrics()

        first, second = asyncio.run(run())
    assert first["teacher/calls"] == 2 and first["teacher/retries"] == 1
    assert first["teacher/replayed_fraction"] == 0.5 and 0.4 < first["teacher/cache_hit_rate"] <= 0.5
    assert first["teacher/latency_p95"] >= first["teacher/latency_p50"] > 0
    assert second["teacher/calls"] == 0
