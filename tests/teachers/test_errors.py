"""What an error means: what is waited for, what costs one prompt its texts, and what ends the run."""

import asyncio
import dataclasses
import json
import socket
import threading
import time

import pytest
from teacher_kit import EXTENSIONS, ask, cfg_for, check, request, teacher_of, texts
from wire_server import WireServer

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import TeacherStopped, wire

UNHURRIED = {"teacher.timeout_s": 60.0, "teacher.deadline_s": 120.0}  # a crowded machine is slow
PROVIDERS = ("openai", "anthropic", "gemini")


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch):
    monkeypatch.setattr("omniopd_jax.teachers.traffic.FIRST_BACKOFF_S", 0.05)


GEMINI_429 = {
    "error": {
        "code": 429,
        "message": "You exceeded your current quota, please check your plan and billing details. For more information on "
        "this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits.\nPlease retry in 0.6s.",
        "status": "RESOURCE_EXHAUSTED",
        "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.6s"}],
    }
}
OPENAI_429 = {
    "error": {
        "message": "Rate limit reached for m on requests per min (RPM): Limit 3, Used 3, Requested 1. Please try again in "
        "20s. You can increase your rate limit by adding a payment method to your account at "
        "https://platform.openai.com/account/billing.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
}


@pytest.mark.parametrize("provider,body", [("gemini", GEMINI_429), ("openai", OPENAI_429)])
@pytest.mark.parametrize("status", [429, 200])
def test_a_limit_of_the_minute_is_waited_for_though_it_speaks_of_billing(provider, body, status, tmp_path):
    first = [True]

    def mangle(answer):
        return (status, {}, json.dumps(body).encode()) if first and first.pop() else answer

    with WireServer(extensions=EXTENSIONS[provider], mangle=mangle) as server:
        [result] = ask(cfg_for(server.url(provider), provider, tmp_path), request())
        times = [entry["time"] for entry in server.calls()]
    assert len(result.continuations) == 4 and len(times) == 2
    assert status == 200 or provider == "openai" or times[1] - times[0] >= 0.6  # its retryDelay


QUOTED = "Invalid 'messages[1].content': 'def get_api key(): ...' is too odd"
MEANINGS = [
    (429, "You exceeded your current quota, please check your plan and billing details. (insufficient_quota)", "stop", ""),
    (429, "Your account is not active, please check your billing details. (billing_not_active)", "stop", ""),
    (429, GEMINI_429["error"]["message"], "retry", ""),
    (400, "Your credit balance is too low to access the Anthropic API. (invalid_request_error)", "stop", ""),
    (500, "upstream: your credit balance is too low to be read", "retry", ""),
    (400, "API key not valid. Please pass a valid API key. (INVALID_ARGUMENT)", "stop", ""),
    (400, QUOTED, "refused", ""),
    (400, "Output blocked by content filtering policy (invalid_request_error)", "refused", "withheld"),
    (403, 'm requires moderation on P. Your input was flagged for "violence".', "refused", "withheld"),
    (403, "Your API key lacks the permission", "stop", ""),
    (400, "Content Exists Risk (invalid_request_error)", "refused", "withheld"),
    (403, "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO", "refused", "withheld"),
    (400, "You have reached your specified API usage limits. You will regain access on 2026-12-01.", "stop", ""),
    (400, "This model's maximum prompt length is 131072 but the request contains 140000 tokens.", "refused", "context"),
    (503, "the content filter is overloaded", "retry", ""),
    (407, "Proxy Authentication Required", "stop", ""),
]  # fmt: skip


@pytest.mark.parametrize("status,message,kind,field", MEANINGS)
def test_what_an_error_means(status, message, kind, field):
    error = wire.from_status(status, message, {}, details={"error": {"message": message}})
    assert (error.kind, error.field) == (kind, field)


@pytest.mark.parametrize(
    "error,status",
    [
        ({"message": GEMINI_429["error"]["message"]}, 429),
        ({"message": "add a payment method under account/billing", "code": "rate_limit_exceeded"}, 429),
        ({"message": "x", "code": "insufficient_quota"}, 402),
        ({"message": "the credits page is being rebuilt", "type": "server_error"}, 500),
        ({"message": "x", "code": "content_filter"}, 400),
    ],
)
def test_what_an_error_inside_a_good_answer_means(error, status):
    assert wire.read.error_in({"error": error}).status == status


# what a service does not answer


def blocked(answer):
    return {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 9}}


def error(status, /, **said):
    return lambda answer: (status, {}, json.dumps({"error": said}).encode())


FILTERED = "The response was filtered due to the prompt triggering the content management policy."
WITHHELD = {
    "gemini": ("gemini", blocked),
    "azure": ("openai", error(400, message=FILTERED, param="prompt", code="content_filter", status=400)),
    "inside": ("openai", error(200, message=FILTERED, code="content_filter")),
    "openrouter": ("openai", error(403, code=403, message="not here", metadata={"reasons": ["violence"]})),
    "anthropic": (
        "anthropic",
        error(400, type="invalid_request_error", message="Output blocked by content filtering policy"),
    ),
}


def refused_while(server, c, mangle, requests, *, before=1):
    """(results of `requests`, asked while the service answers by `mangle`; calls that they took)."""

    async def run():
        async with teacher_of(c) as teacher:
            for i in range(before):
                await teacher.continue_text(request(f"good{i}"))
            calls, server.mangle = len(server.calls()), mangle
            asked = [teacher.continue_text(r) for r in requests]
            return await asyncio.gather(*asked, return_exceptions=True), len(server.calls()) - calls

    return asyncio.run(run())


@pytest.mark.parametrize("name", WITHHELD)
@pytest.mark.parametrize("before", [0, 1])
def test_a_prompt_that_is_withheld_lowers_n_and_never_ends_the_run(name, before, tmp_path):
    provider, mangle = WITHHELD[name]
    with WireServer(extensions=EXTENSIONS[provider]) as server:
        c = cfg_for(server.url(provider), provider, tmp_path, **UNHURRIED)
        results, calls = refused_while(server, c, mangle, [request(f"s{i}") for i in range(20)], before=before)
    assert calls == 20  # asked once each
    for result in results:
        assert not result.continuations and len(result.failures) == 4
        assert all("withheld by the service" in f.error for f in result.failures)


def page(answer):
    return 403, {"Content-Type": "text/html"}, b"<html>Error 1020: Access denied</html>"


def test_a_firewall_that_one_prompt_sets_off_costs_its_texts_and_not_the_run(tmp_path):
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **UNHURRIED)
        results, _ = refused_while(server, c, page, [request(f"s{i}") for i in range(20)])
    assert all(len(r.failures) == 4 and "1020" in r.failures[0].error for r in results)


def odd(answer):
    return 400, {}, b'{"error": {"message": "that will not do"}}'


def about(count, prompts):
    """Requests of so many prompts."""
    said = [({"role": "user", "content": f"Add {i % prompts}."},) for i in range(count)]
    return [dataclasses.replace(request(f"s{i}"), messages=m) for i, m in enumerate(said)]


def test_a_prompt_whose_every_prefix_is_refused_costs_its_texts_and_not_the_run(tmp_path):
    """By words that nobody knew: its failures are final at the next answer, or at the end."""
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **UNHURRIED)
        results, _ = refused_while(server, c, odd, about(20, 1))
        assert all(len(r.failures) == 4 for r in results)
        again, calls = refused_while(server, c, None, about(20, 1))
        assert calls == 0 and all(r.replayed == 4 for r in again)


def test_what_wrong_settings_refused_is_asked_again_once_they_are_right(tmp_path):
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **UNHURRIED)
        results, _ = refused_while(server, c, odd, about(40, 8))
        assert any(isinstance(r, TeacherStopped) for r in results)
        again, _ = refused_while(server, c, None, about(40, 8))
        assert all(len(r.continuations) == 4 for r in again)


def too_long(answer):
    return 400, {}, b'{"error": {"message": "maximum context length is 100 tokens"}}'


def test_prefixes_that_are_too_long_do_not_count_as_refusals(tmp_path):
    refusals = iter([too_long] * 17 + [odd])
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **UNHURRIED)
        results, _ = refused_while(server, c, lambda answer: next(refusals, odd)(answer), about(18, 18))
    assert all(len(r.failures) == 4 for r in results)


def test_a_firewall_that_lets_nothing_through_ends_the_run(tmp_path):
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **UNHURRIED)
        asked = [
            dataclasses.replace(request(f"s{i}"), messages=({"role": "user", "content": f"Add {i % 8}."},))
            for i in range(20)
        ]
        results, _ = refused_while(server, c, page, asked)
        assert any(isinstance(r, TeacherStopped) and "firewall" in str(r) for r in results)
        [stop], calls = refused_while(
            server, cfg_for(server.url("openai"), "openai", tmp_path / "b"), page, asked[:1], before=0
        )
        assert isinstance(stop, TeacherStopped) and calls == 1
        with pytest.raises(UserError, match="something before it refuses"):
            check(cfg_for(server.url("openai"), "openai", tmp_path / "c"))


# how a text ended


@pytest.mark.parametrize(
    "word,finish",
    [(word, "stop") for word in ("stop", "STOP", "end_turn", "eos", "stop_sequence")]
    + [(word, "length") for word in ("length", "MAX_TOKENS", "max_length", "whatever", "null", None, "")]
    + [
        (word, "withheld")
        for word in ("insufficient_system_resource", "not_finished", "incomplete", "truncated", "interrupted")
    ],
)
def test_only_a_word_that_says_so_makes_an_end_of_the_teachers_own(word, finish):
    assert wire.read.text(" half of an ans", word).finish == finish


@pytest.mark.parametrize("word,n", [("insufficient_system_resource", 0), ("hit_a_limit", 2), (None, 2)])
def test_an_interrupted_answer_is_not_one_that_the_teacher_ended(word, n, tmp_path):
    def mangle(answer):
        for choice in answer["choices"]:
            choice["finish_reason"] = word
        return answer

    with WireServer(mangle=mangle) as server:
        [result] = ask(cfg_for(server.url("openai"), "openai", tmp_path), request(n=2))
    assert [c.finish for c in result.continuations] == ["length"] * n


# below HTTP


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_call_that_never_connected_was_not_sent_and_costs_nothing(provider, tmp_path):
    """A host that drops what it is sent: a full queue of connections that nobody accepts."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        filling = [socket.socket() for _ in range(4)]
        for one in filling:
            one.setblocking(False)
            one.connect_ex(silent.getsockname())
        url = f"http://127.0.0.1:{silent.getsockname()[1]}" + ("/v1" if provider == "openai" else "")
        c = cfg_for(url, provider, tmp_path, **{"teacher.timeout_s": 2.0})
        call = wire.Call(request().messages, "so", 1, 8, 1.0, 1.0, 0, "prefill")

        async def run():
            async with teacher_of(c) as teacher:
                await teacher.client.open()
                start = time.monotonic()
                with pytest.raises(wire.CallError, match="ConnectTimeout") as e:
                    await teacher.client.call(call)
                return e.value, time.monotonic() - start

        error, took = asyncio.run(run())
        for one in filling:
            one.close()
    assert error.outcome == "unsent" and error.kind == "retry" and 0.9 <= took < 1.9  # half of the call's own time


class Proxy:
    """A proxy that answers each CONNECT with `answer`."""

    def __init__(self, answer: bytes):
        self.answer, self.asked = answer, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            connection.recv(4096)
            self.asked += 1
            connection.sendall(b"HTTP/1.1 " + self.answer + b"\r\nContent-Length: 0\r\n\r\n")
            connection.close()


@pytest.mark.parametrize(
    "answer,again", [(b"503 Service Unavailable", True), (b"407 Proxy Authentication Required", False)]
)
def test_a_proxys_bad_moment_is_waited_for(answer, again, tmp_path, monkeypatch):
    proxy = Proxy(answer)
    monkeypatch.setenv("https_proxy", proxy.url)
    c = cfg_for("https://teacher.invalid/v1", "openai", tmp_path, **{"teacher.deadline_s": 1.5})
    with pytest.raises(TeacherStopped, match=answer[:3].decode()):
        ask(c, request(n=1))
    assert proxy.asked >= 3 if again else proxy.asked == 1
    asked = proxy.asked
    with pytest.raises(UserError):
        check(c)
    assert proxy.asked - asked == (3 if again else 1)
    proxy.socket.close()


@pytest.mark.parametrize("statuses", [[502], [503, 504]])
def test_a_bad_moment_of_the_list_of_models_does_not_end_a_start(statuses, tmp_path):
    with WireServer(listing_faults=list(statuses)) as server:
        line, _ = check(cfg_for(server.url("openai"), "openai", tmp_path))
        assert "continues by" in line and not server.listing_faults
        server.listing_faults = [502] * 3
        with pytest.raises(UserError, match="not reachable"):
            check(cfg_for(server.url("openai"), "openai", tmp_path))


def test_a_pause_of_the_real_wire_is_one_for_all(tmp_path):
    """One refusal with Retry-After: what was not yet sent waits as well, and the limits that it names hold."""
    after = {"Retry-After": "0.8", "x-ratelimit-limit-requests": "6000"}
    first = [True]

    def mangle(answer):
        return (429, after, b'{"error": {"message": "slow down"}}') if first and first.pop() else answer

    with WireServer(mangle=mangle) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.max_concurrency": 1})

        async def run():
            async with teacher_of(c) as teacher:
                out = await asyncio.gather(*(teacher.continue_text(request(f"s{i}")) for i in range(3)))
                return out, teacher.traffic.requests.rate

        start = time.time()
        results, rate = asyncio.run(run())
        times = [entry["time"] for entry in server.calls()]
    assert all(len(texts(r)) == 4 for r in results) and len(times) == 4 and rate == 100.0
    assert times[0] >= start and times[1] - times[0] >= 0.75
