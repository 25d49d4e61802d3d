"""The three wire protocols, through the official SDKs, against a server that checks every field."""

import asyncio
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import tiny
from teacher_kit import EXTENSIONS, PROMPT, ask, cfg_for, check, request, teacher_of, texts
from wire_server import WireServer, speak

from omniopd_jax import teachers
from omniopd_jax.errors import UserError
from omniopd_jax.teachers import Failure, TeacherStopped, remote, wire
from omniopd_jax.teachers.probe import OPEN_PREFIX
from omniopd_jax.teachers.protocol import whole_characters

PROVIDERS = ("openai", "anthropic", "gemini")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in (*sum(wire.KEYS.values(), ()), "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server_of():
    running = []

    def make(provider="openai", **settings):
        running.append(WireServer(**({"extensions": EXTENSIONS[provider]} | settings)).start())
        return running[-1]

    yield make
    for server in running:
        server.stop()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_request_brings_its_continuations_and_says_what_it_cost(provider, server_of, tmp_path):
    server = server_of(provider)
    prices = {"teacher.price_input": 2.0, "teacher.price_cached": 1.0, "teacher.price_output": 10.0}
    [result] = ask(cfg_for(server.url(provider), provider, tmp_path, **prices), request())
    assert [c.index for c in result.continuations] == [0, 1, 2, 3] and not result.failures
    assert len(set(texts(result))) == 4 and all(c.finish == "length" for c in result.continuations)
    log = server.calls()
    assert result.usage.calls == len(log) == (4 if provider == "anthropic" else 1)
    assert server.arrived() == 4 and result.replayed == 0
    tokens_in, tokens_out = sum(e["usage"]["in"] for e in log), sum(e["usage"]["out"] for e in log)
    cached = sum(e["usage"]["in"] // 2 for e in log)
    assert (result.usage.tokens_in, result.usage.tokens_cached, result.usage.tokens_out) == (
        tokens_in,
        cached,
        tokens_out,
    )
    assert result.usage.cost_usd == pytest.approx(((tokens_in - cached) * 2 + cached * 1 + tokens_out * 10) / 1e6)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_goes_out(provider, server_of, tmp_path):
    server = server_of(provider)
    ask(cfg_for(server.url(provider), provider, tmp_path), request(prefix="The sum is \n", n=2, temperature=0.7))
    body = server.calls()[0]["body"]
    if provider == "gemini":  # left out, its service would take 0.95
        assert body["generationConfig"]["topP"] == 1.0
    else:
        assert "top_p" not in body
    if provider == "openai":
        assert body["messages"] == [*PROMPT, {"role": "assistant", "content": "The sum is"}]
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        assert body["n"] == 2 and body["temperature"] == 0.7 and body["max_tokens"] == 8
        assert body["seed"] == request().seed(0)
    elif provider == "anthropic":
        assert body["system"] == "Be brief." and body["thinking"] == {"type": "disabled"}
        assert [m["role"] for m in body["messages"]] == ["user", "assistant"]
        assert body["messages"][1]["content"] == "The sum is"  # too short to be cached: no mark (test_models.py)
        assert body["temperature"] == 0.7 and "seed" not in body and "n" not in body
    else:
        assert [c["role"] for c in body["contents"]] == ["user", "model"]
        config = body["generationConfig"]
        assert config["candidateCount"] == 2 and config["seed"] == request().seed(0) and config["maxOutputTokens"] == 8
        assert config["thinkingConfig"] in ({"thinkingBudget": 0}, {"thinking_budget": 0})


def test_temperature_one_and_top_p_one_are_left_out_for_anthropic(server_of, tmp_path):
    server = server_of("anthropic")
    c = cfg_for(server.url("anthropic"), "anthropic", tmp_path)
    ask(c, request(n=1))
    assert not {"temperature", "top_p", "top_k"} & server.calls()[0]["body"].keys()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_held_back_whitespace_is_not_said_twice(provider, server_of, tmp_path):
    def speaks(context, max_tokens, seed, index):
        return " 7" if index or seed == request().seed(1) else "\n\n7"

    server = server_of(provider, speak=speaks)
    [result] = ask(cfg_for(server.url(provider), provider, tmp_path), request(prefix="The sum is ", n=1))
    assert texts(result)[0] in ("7", "\n\n7")
    assert wire.after_prefix(" 7", "The sum is", " ") == "7"
    assert wire.after_prefix("7", "The sum is", " ") == "7"
    assert wire.after_prefix("\n\n7", "x = 1.", "\n") == "\n7"
    assert wire.after_prefix("The sum is 7", "The sum is", "") == " 7"


def test_a_server_that_ignores_n_is_asked_again_one_by_one(server_of, tmp_path):
    server = server_of(honours_n=False)
    [result, more] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request(), request("s1"))
    assert len(result.continuations) == len(more.continuations) == 4
    assert server.arrived() == 8 and len(set(texts(result))) == 4
    assert sum("n" in entry["body"] for entry in server.calls()) <= 2


@pytest.mark.parametrize("field", ["n", "seed", "max_tokens"])
def test_a_refused_field_is_left_out(field, server_of, tmp_path):
    server = server_of(refuses={field})
    [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request())
    assert len(result.continuations) == 4
    last = server.calls()[-1]["body"]
    assert field not in last and last.get("max_completion_tokens", 8) == 8


def test_a_refused_temperature_is_not_dropped_in_silence(server_of, tmp_path):
    server = server_of(refuses={"temperature"})
    c = cfg_for(server.url("openai"), "openai", tmp_path)
    [result] = ask(c, request())  # 1.0 is what the service does anyway
    assert len(result.continuations) == 4
    with pytest.raises(TeacherStopped, match="temperature"):
        ask(c, request(temperature=0.5))


def test_a_request_that_can_never_succeed_is_asked_once(server_of, tmp_path):
    server = server_of("anthropic", extensions=set())
    [result] = ask(cfg_for(server.url("anthropic"), "anthropic", tmp_path), request())
    assert not result.continuations and [f.index for f in result.failures] == [0, 1, 2, 3]
    assert "prefill" in result.failures[0].error and len(server.calls()) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_empty_prefix_is_a_plain_answer(provider, server_of, tmp_path):
    server = server_of(provider)
    [result] = ask(cfg_for(server.url(provider), provider, tmp_path), request(peak=-1, prefix="", n=1))
    assert len(result.continuations) == 1
    body = server.calls()[0]["body"]
    assert (body.get("messages") or body["contents"])[-1]["role"] == "user" and "continue_final_message" not in body


@pytest.mark.parametrize("mode,extension", [("prefix", "prefix"), ("prefill", "prefill"), ("completion", "completion")])
def test_the_other_openai_modes(mode, extension, server_of, tmp_path):
    server = server_of(extensions={extension})
    c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.continuation": mode})
    [result] = ask(c, request(prefix="The sum is "))
    assert len(result.continuations) == 4
    body = server.calls()[0]["body"]
    if mode == "completion":
        assert body["prompt"] == "Be brief.\n\nAdd 3 and 4.\n\nThe sum is "
    else:
        assert body["messages"][-1] == {"role": "assistant", "content": "The sum is"} | (
            {"prefix": True} if mode == "prefix" else {}
        )


def test_a_base_teacher_behind_a_server_is_asked_in_the_plain_format(server_of, tmp_path):
    """By raw completion alone, after worked examples; its answer ends where it begins another question."""
    server = server_of(extensions={"completion"}, speak=lambda *a: " and 4 is 7.\n\nQuestion: What")
    (tmp_path / "shots.txt").write_text("Question: 1 + 1?\nAnswer: 2\n")
    settings = {"teacher.template": "plain", "teacher.preamble": str(tmp_path / "shots.txt")}
    settings["teacher.continuation"] = "completion"
    [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path, **settings), request(prefix=" The sum of 3", n=2))
    assert texts(result) == [" and 4 is 7.\n"] * 2 and {c.finish for c in result.continuations} == {"stop"}
    body = server.calls()[0]["body"]
    examples = "Question: 1 + 1?\nAnswer: 2\n\n"
    assert body["prompt"] == f"{examples}Be brief.\n\nQuestion: Add 3 and 4.\nAnswer: The sum of 3"
    assert body["stop"] == ["\nQuestion:"]


def test_instruct_asks_for_the_next_words_and_cuts_what_is_repeated(server_of, tmp_path):
    def ended(answer):
        for choice in answer["choices"]:
            choice["finish_reason"] = "stop"
        return answer

    server = server_of(speak=lambda *a: 'Sure! Here is the continuation: "sum of 3 and 4 is seven."', mangle=ended)
    c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.continuation": "instruct"})
    [result] = ask(c, request(prefix="The sum of 3 and 4", n=1, max_tokens=100))
    assert texts(result) == [" is seven."]
    assert [c.finish for c in result.continuations] == ["length"], "told to write so many words, it has not ended"
    [whole] = ask(c, request(prefix="", n=1, max_tokens=100))
    assert [c.finish for c in whole.continuations] == ["stop"]
    assert "cut off by accident" in server.calls()[0]["body"]["messages"][-1]["content"]


def test_a_start_token_that_the_tokenizer_does_not_add_stays_in_the_prompt(server_of, tmp_path):
    """SmolLM2's: its template begins with it. A server puts in front only what its tokenizer adds by itself."""
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    server = server_of(extensions={"completion"})
    settings = {"teacher.continuation": "completion", "teacher.tokenizer": str(tmp_path / "tokenizer")}
    ask(cfg_for(server.url("openai"), "openai", tmp_path, **settings), request(n=1))
    assert server.calls()[0]["body"]["prompt"].startswith("<|im_start|>system\nBe brief.")


# the probe


def test_the_probe_picks_the_mode(server_of, tmp_path):
    cases = [
        ("openai", {"continue_final_message"}, "continue_final_message"),
        ("openai", {"prefix"}, "prefix"),
        ("openai", {"prefill"}, "prefill"),
        ("openai", set(), "instruct"),
        ("openai", {"ignore_unknown"}, "instruct"),  # swallows every extension and starts over
        ("anthropic", {"prefill"}, "prefill"),
        ("anthropic", set(), "instruct"),
        ("gemini", {"prefill"}, "prefill"),
        ("gemini", set(), "instruct"),
    ]
    for i, (provider, extensions, mode) in enumerate(cases):
        server = server_of(provider, extensions=extensions)
        c = cfg_for(server.url(provider), provider, tmp_path / str(i), **{"teacher.continuation": "auto"})
        line, report = check(c)
        assert report.mode == mode and mode in line and "\n" not in line, (provider, extensions, report.table())
        assert dict(report.rows)["samples at temperature 1"] == "yes"
        assert (tmp_path / str(i) / "teacher_probe.json").exists() and len(server.calls()) <= 16


@pytest.mark.parametrize("rest, mode", [("seven eight", "instruct"), ("en eight", "prefill")])
def test_the_probe_tells_a_new_turn_from_a_stripped_text(server_of, tmp_path, rest, mode):
    """A server that closes the last turn and begins another, where a good model counts on; one that strips its texts."""

    def counts(context, n, seed, index):
        asked = {"six seven": "eight nine ten", "six sev": rest}
        return asked.get(" ".join(context.split()[-2:])) or speak(context, n, seed, index)

    server = server_of("anthropic", extensions={"prefill"}, speak=counts)
    c = cfg_for(server.url("anthropic"), "anthropic", tmp_path, **{"teacher.continuation": "auto"})
    assert check(c)[1].mode == mode


STORY = f"{OPEN_PREFIX} there lived a fox who sang to the moon until the moon sang back"


@pytest.mark.parametrize("goes_on, mode", [(True, "prefill"), (False, "instruct")])
def test_the_probe_tells_a_new_turn_of_a_teacher_that_cannot_count(server_of, tmp_path, goes_on, mode):
    def speaks(context, n, seed, index):
        told = context[context.find(OPEN_PREFIX) :] if goes_on and OPEN_PREFIX in context else OPEN_PREFIX
        return STORY.removeprefix(told)[:40] if STORY.startswith(told) else " I see"

    server = server_of("anthropic", extensions={"prefill"}, speak=speaks)
    c = cfg_for(server.url("anthropic"), "anthropic", tmp_path, **{"teacher.continuation": "auto"})
    assert check(c)[1].mode == mode


def test_a_bad_moment_does_not_change_the_mode(server_of, tmp_path):
    server = server_of(faults=["language", "500", "empty"])
    c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.continuation": "auto"})
    assert check(c)[1].mode == "continue_final_message"


def test_the_probe_sees_a_greedy_teacher_and_one_that_ignores_n(server_of, tmp_path):
    server = server_of(speak=lambda *a: " and so it goes, on and on", honours_n=False)
    _, report = check(cfg_for(server.url("openai"), "openai", tmp_path))
    rows = dict(report.rows)
    assert rows["samples at temperature 1"].startswith("NO") and rows["texts a call"] == "one"


def test_the_probe_sees_n_texts_that_are_one(server_of, tmp_path):
    """A server that gives every text of a call the call's own seed: asked one by one, each continuation has its own."""
    server = server_of(speak=lambda context, n, seed, index: speak(context, n, seed, 0))
    c = cfg_for(server.url("openai"), "openai", tmp_path)

    async def run():
        async with teacher_of(c) as teacher:
            await teacher.check()
            return dict(teacher.report.rows), await teacher.continue_text(request())

    rows, result = asyncio.run(run())
    assert "SAME" in rows["texts of one call"] and rows["samples at temperature 1"] == "yes"
    assert len(set(texts(result))) == 4 and result.usage.calls == 4


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_thinking_model_is_silenced_or_refused(provider, server_of, tmp_path):
    server = server_of(provider, model_thinks=True)
    _, report = check(cfg_for(server.url(provider), provider, tmp_path / "a"))
    assert dict(report.rows)["hidden reasoning"] == "none"
    server.model_thinks = "always"
    with pytest.raises(UserError, match="think|reasoning"):
        check(cfg_for(server.url(provider), provider, tmp_path / "b"))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_stops_the_run_at_the_start(provider, server_of, tmp_path, monkeypatch):
    server = server_of(provider, key="right-key-0123456789")
    c = cfg_for(server.url(provider), provider, tmp_path)
    name = wire.KEYS[provider][0]
    monkeypatch.setenv(name, "wrong-key-0123456789")
    with pytest.raises(UserError, match=name) as e:
        check(c)
    assert "wrong-key" not in str(e.value)
    monkeypatch.setenv(name, "right-key-0123456789")
    check(c)
    c.teacher.model = "absent"
    with pytest.raises(UserError, match="absent"):
        check(c)
    c.teacher.model = ""
    with pytest.raises(UserError, match="teacher.model"):
        teachers.make(c)
    c.teacher.model = "m"
    key = "k0123456789"
    for url in ("127.0.0.1:80", f"http://user:{key}@h/v1", f"http://{key}@h/v1", f"http://h/v1?key={key}"):
        c.teacher.base_url = url
        with pytest.raises(UserError, match="base_url") as e:
            teachers.make(c)
        assert key not in str(e.value)
    c.teacher.base_url = ""
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=name):
        teachers.make(c)
    server.stop()
    c.teacher.base_url = server.url(provider)
    with pytest.raises(UserError, match="not reachable"):
        check(c)
    server.start()


def test_a_revoked_key_stops_the_run(server_of, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-proj-revoked0123456789")
    server = server_of(key="another")
    with pytest.raises(TeacherStopped) as e:
        ask(cfg_for(server.url("openai"), "openai", tmp_path), request())
    assert "revoked" not in str(e.value) and "401" in str(e.value)


# connections and order


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(provider, server_of, tmp_path, monkeypatch):
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = server_of(provider)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    far = "http://teacher.invalid" + ("/v1" if provider == "openai" else "")
    [result] = ask(cfg_for(far, provider, tmp_path / "far"), request(n=1))
    assert len(result.continuations) == 1 and server.calls()[-1]["proxied"]
    [result] = ask(cfg_for(server.url(provider), provider, tmp_path / "near"), request(n=1))
    assert len(result.continuations) == 1 and not server.calls()[-1]["proxied"]


def test_a_responses_prefixes_go_in_ascending_order(server_of, tmp_path):
    server = server_of(delay_s=0.03)
    c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.max_concurrency": 4})
    peaks = [40, 10, 30, 20]
    requests = [request(who, peak, "x" * peak) for peak in peaks for who in ("s1", "s2", "s3", "s4", "s5", "s6")]
    results = ask(c, *requests)
    assert all(len(r.continuations) == 4 for r in results)
    by_sample = {}
    seeds = {request(who, peak).seed(0): (who, peak) for who in ("s1", "s2", "s3", "s4", "s5", "s6") for peak in peaks}
    for entry in server.calls():
        who, peak = seeds[entry["body"]["seed"]]
        by_sample.setdefault(who, []).append(peak)
    assert all(asked == sorted(peaks) for asked in by_sample.values())
    assert 2 <= server.most_in_flight <= 4


def test_the_next_prefix_waits_for_the_first_answer_only(server_of, tmp_path):
    server = server_of("anthropic", delay_s=0.05)
    ask(
        cfg_for(server.url("anthropic"), "anthropic", tmp_path),
        request(peak=20, prefix="b" * 20),
        request(peak=10, prefix="a" * 10),
    )
    calls = sorted(server.calls(), key=lambda e: e["time"])
    prefixes = [entry["body"]["messages"][-1]["content"] for entry in calls]
    assert prefixes[0] == "a" * 10 and "b" * 20 in prefixes[1:5] and server.most_in_flight >= 3


def test_free_order_sends_them_side_by_side(server_of, tmp_path):
    server = server_of(delay_s=0.2)
    c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.prefix_order": "free"})
    ask(c, *(request(peak=p) for p in (1, 2, 3, 4)))
    assert server.most_in_flight >= 3


def test_every_step_may_have_an_event_loop_of_its_own(server_of, tmp_path):
    server = server_of()
    teacher = teachers.make(cfg_for(server.url("openai"), "openai", tmp_path))
    for step in range(3):
        result = asyncio.run(teacher.continue_text(request(f"s{step}")))
        assert len(result.continuations) == 4
    asyncio.run(teacher.close())


def test_headers_slow_the_traffic_down(server_of, tmp_path):
    server = server_of(headers={"x-ratelimit-limit-requests": "600", "x-ratelimit-limit-tokens": "90000"})

    async def run():
        async with teacher_of(cfg_for(server.url("openai"), "openai", tmp_path)) as teacher:
            await teacher.continue_text(request())
            return teacher.traffic.requests.rate, teacher.traffic.tokens.rate

    assert asyncio.run(run()) == (10.0, 1500.0)
    assert wire.duration("6m0s") == 360 and wire.duration("20ms") == 0.02 and wire.duration("x") is None
    assert wire.retry_after({"retry-after": "3"}) == 3 and wire.retry_after({"retry-after-ms": "250"}) == 0.25


@pytest.mark.parametrize("said", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "0", "-5", "0.0", "", "1e999", "inf", "nan"])
def test_a_retry_after_that_asks_for_no_wait_is_none(said):
    """Then the usual back-off applies: asked again at once, every try would be spent in seconds."""
    assert wire.retry_after({"retry-after": said}) is None and wire.retry_after({"retry-after-ms": said}) is None


def test_a_request_rate_is_kept(server_of, tmp_path):
    server = server_of(honours_n=False)
    c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.requests_per_minute": 120})
    ask(c, *(request(f"s{i}", n=4) for i in range(4)))  # 16 calls: 12 at once, then two a second
    times = sorted(entry["time"] for entry in server.calls())
    assert times[-1] - times[0] > 1.2


# secrets


SECRET_RUN = """
import asyncio, logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
sys.path[:0] = [{tests!r}, {repo!r}]
from teacher_kit import cfg_for, request, teacher_of
async def run(provider, url):
    c = cfg_for(url, provider, {folder!r} + "/" + provider, **{{"teacher.max_retries": 2, "teacher.deadline_s": 6.0}})
    async with teacher_of(c) as teacher:
        for i in range(4):
            try:
                print(await teacher.continue_text(request("s%d" % i)))
            except Exception as e:
                print(repr(e), logging.exception("failed"))
        try:
            print(await teacher.check())
        except Exception as e:
            print(repr(e), logging.exception("failed"))
        teacher.journal.export_jsonl({folder!r} + "/" + provider + "/out.jsonl")
async def all_of_them():
    await asyncio.gather(*(run(*who) for who in {urls!r}.items()))
asyncio.run(all_of_them())
"""


def test_a_key_is_written_nowhere(server_of, tmp_path):
    mark = "sk-MARKEDKEY-0123456789abcdef"
    bad = {
        p: server_of(p, key="other" if p == "gemini" else mark, share=0.6, retry_after_s=0.05, stall_s=3.0)
        for p in PROVIDERS
    }
    env = os.environ | {name: mark for names in wire.KEYS.values() for name in names}
    here = pathlib.Path(__file__).parents[1]
    code = SECRET_RUN.format(
        tests=str(here / "support"),
        repo=str(here.parent),
        urls={p: s.url(p) for p, s in bad.items()},
        folder=str(tmp_path),
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DEBUG" in done.stdout and all(server.calls() for server in bad.values())
    assert "MARKEDKEY" not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        assert b"MARKEDKEY" not in path.read_bytes(), path


def test_two_names_of_one_tokenizer_are_not_foreign(tmp_path, monkeypatch):
    """Models of a family by their hub names: their files decide, not where this program was started."""
    for name, text in (("32B", "{1}"), ("1.7B", "{1}"), ("other", "{2}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)

    def resolve(name, *, files):
        if not (found := tmp_path / name.split("/")[-1]).is_dir():
            raise UserError("no such model")
        return found

    monkeypatch.setattr(remote.hub, "resolve", resolve)
    assert remote._same_tokenizer("Qwen/32B", "Qwen/1.7B")
    assert not remote._same_tokenizer("Qwen/32B", "some/other")
    assert not remote._same_tokenizer("Qwen/32B", "some/gone") and not remote._same_tokenizer("some/gone", "some/lost")
    assert not remote._same_tokenizer("", "Qwen/1.7B") and remote._same_tokenizer("some/gone", "some/gone")


def test_half_a_character_at_a_texts_end_is_no_text_of_the_teacher(server_of, tmp_path):
    """A text that was cut at its length inside a character; one that the teacher ended stays as it is."""
    assert whole_characters("5 \u20ac, \u65e5\ufffd", "length") == "5 \u20ac, \u65e5"
    assert whole_characters("\ufffd", "stop") == "\ufffd"
    server = server_of(speak=lambda *_: " 7 \u65e5\ufffd")
    [got] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request())
    assert {(c.text, c.finish) for c in got.continuations} == {(" 7 \u65e5", "length")}


def test_scrub():
    assert "abc" not in wire.scrub("key sk-abcdefghijkl and AIzaabcdefghijk Bearer abcdefg.hij http://u:abc@h/x")
    assert logging.getLogger("openai").level == 0  # nobody's log settings were touched


def test_failure_is_a_value():
    assert Failure(1, "x") == Failure(1, "x")


@pytest.mark.parametrize(
    "name,value",
    [
        ("http_proxy", "::::"),
        ("http_proxy", "socks9://x:1"),
        ("http_proxy", "http://[::1"),
        ("http_proxy", "http://127.0.0.1:9"),
        ("HTTPS_PROXY", "nonsense.invalid"),
        ("all_proxy", "http://h.invalid:99999"),
        ("SSL_CERT_FILE", "/no/such/file"),
        ("SSL_CERT_FILE", "/etc/passwd"),
        ("http_proxy", "http://user:pa55word@127.0.0.1:9"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_in_one_line(name, value, tmp_path, monkeypatch):
    for other in (*wire.secrets.PROXIES, "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    url = "http://h.invalid/v1" if name == "http_proxy" else "https://h.invalid/v1"
    with pytest.raises(UserError, match=name) as e:
        check(cfg_for(url, "openai", tmp_path, **{"teacher.deadline_s": 3.0}))
    assert "\n" not in str(e.value) and "pa55word" not in str(e.value)
