"""Traffic on a clock of its own: rates, order, back-off, deadlines, with a client that answers as the test says."""

import asyncio
import itertools

import fake_clock
import pytest
from teacher_kit import PROMPT, cfg_for, request, teacher_of

from omniopd_jax.teachers import TeacherStopped, traffic, wire

CALL = wire.Call(PROMPT, "so", 1, 8, 1.0, 1.0, 0, "prefill")
REPLY = wire.Reply((wire.Text("x", "stop"),), billed=wire.Billed(10, 1))


class Client:
    """Answers each call after `seconds` by the next of `answers`, an error or a reply; then always by REPLY."""

    model = "m"

    def __init__(self, *answers, seconds=0.0):
        self.answers, self.seconds, self.times = iter(answers), seconds, []

    async def call(self, call):
        self.times.append(traffic.now())
        await asyncio.sleep(self.seconds)
        answer = next(self.answers, REPLY)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Free:
    """A budget without caps."""

    def __init__(self):
        self.settled = []

    def bind(self):
        pass

    async def reserve(self, key, n, tokens_in, tokens_out):
        return 1

    def settle(self, call, status, billed=None, **more):
        self.settled.append(status)
        return 0.0


def sender(tmp_path, client, **settings):
    c = cfg_for("", "openai", tmp_path, **{"teacher.timeout_s": 60.0, "teacher.deadline_s": 300.0} | settings)
    out = traffic.Traffic(c, client, Free())
    out.bind()
    return out


def send(tmp_path, client, *, calls=1, deadline=300.0, **settings):
    """(what became of each call, the traffic, when it ended)."""

    async def run():
        t = sender(tmp_path, client, **settings)
        sends = (t.send(CALL, b"k", deadline=t.deadline(deadline), accept=lambda _: []) for _ in range(calls))
        out = await asyncio.gather(*sends, return_exceptions=True)
        return out, t, traffic.now()

    return fake_clock.run(run())


def refusal(status, **headers):
    return wire.from_status(status, "no", headers)


def test_a_request_rate_is_kept_over_minutes(tmp_path):
    client = Client()
    _, _, end = send(tmp_path, client, calls=120, **{"teacher.requests_per_minute": 30})
    first = client.times[:3]
    assert max(first) == 0.0 and len(client.times) == 120  # a burst of a tenth of a minute's
    assert end == pytest.approx((120 - 3) * 2.0, abs=0.1)


def test_no_more_than_max_concurrency_calls_are_open(tmp_path):
    client = Client(seconds=1.0)
    _, _, end = send(tmp_path, client, calls=20, **{"teacher.max_concurrency": 5})
    assert end == pytest.approx(4.0) and [client.times.count(float(s)) for s in range(4)] == [5] * 4


def test_the_server_says_how_long_to_wait(tmp_path):
    client = Client(refusal(429, **{"retry-after": "7"}), refusal(429, **{"retry-after-ms": "2500"}))
    send(tmp_path, client)
    first, second = (b - a for a, b in itertools.pairwise(client.times))
    assert 7.0 <= first <= 7.5 and 2.5 <= second <= 3.0


def test_backoff_grows_and_ends_after_max_retries(tmp_path):
    client = Client(*(refusal(500) for _ in range(99)))
    [error], t, end = send(tmp_path, client, **{"teacher.max_retries": 8})
    assert isinstance(error, wire.CallError) and error.attempts == len(client.times) == 9
    assert all(b - a <= min(30.0, 0.5 * 2**i) for i, (a, b) in enumerate(itertools.pairwise(client.times)))
    assert t.budget.settled == ["rejected"] * 9 and end > 3.0


def test_a_server_that_is_away_is_waited_for_up_to_the_deadline(tmp_path):
    client = Client(*(wire.CallError("nobody listens", "retry", outcome="unsent") for _ in range(300)))
    [error], _, end = send(tmp_path, client, deadline=200.0)
    assert error.late and 190 < end <= 200.0 and len(client.times) > 30


def test_an_answer_that_never_comes_is_given_up_at_the_time_limit_and_may_have_been_billed(tmp_path):
    client = Client(seconds=1e6)
    [error], t, end = send(tmp_path, client, **{"teacher.timeout_s": 60.0, "teacher.max_retries": 2})
    assert error.attempts == 3 and 180.0 <= end <= 182.0 and t.budget.settled == ["unknown"] * 3


def test_a_key_that_was_never_accepted_stops_at_once(tmp_path):
    client = Client(refusal(401))
    [stop], _, _ = send(tmp_path, client)
    assert isinstance(stop, TeacherStopped) and len(client.times) == 1


def test_a_refusal_in_the_middle_is_asked_twice_more_before_it_is_final(tmp_path):
    async def run(*answers):
        client = Client(REPLY, *answers)
        t = sender(tmp_path, client)
        for _ in range(2):
            await t.send(CALL, b"k", deadline=t.deadline(300.0), accept=lambda _: [])
        return len(client.times)

    for status in (401, 403, 404):
        assert fake_clock.run(run(refusal(status), refusal(status), REPLY)) == 4
        with pytest.raises((TeacherStopped, wire.CallError), match=str(status)):
            fake_clock.run(run(*(refusal(status) for _ in range(3))))


@pytest.mark.parametrize("zero", ["0", "-1", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_of_no_time_does_not_use_up_the_tries_in_seconds(zero, tmp_path):
    client = Client(*(refusal(429, **{"retry-after": zero}) for _ in range(99)))
    [error], _, end = send(tmp_path, client)
    assert error.attempts == 9 and end > 10.0


def limited(**limits):
    return wire.Reply(REPLY.texts, billed=REPLY.billed, limits=wire.limits(limits))


def test_one_header_does_not_throttle_for_good(tmp_path):
    async def run(*answers, calls):
        client = Client(*answers)
        t = sender(tmp_path, client)
        await asyncio.gather(*(t.send(CALL, b"k", deadline=t.deadline(1e6), accept=lambda _: []) for _ in range(1)))
        await asyncio.gather(*(t.send(CALL, b"k", deadline=t.deadline(1e6), accept=lambda _: []) for _ in range(calls)))
        return traffic.now()

    slow = limited(**{"x-ratelimit-limit-requests": "1"})
    assert fake_clock.run(run(slow, calls=200)) < 2 * 60  # it lapses where no other answer names it
    fast = limited(**{"x-ratelimit-limit-requests": "6000"})
    assert fake_clock.run(run(slow, fast, fast, calls=200)) < 2 * 60
    nothing_left = limited(**{"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9999999h"})
    assert fake_clock.run(run(nothing_left, calls=5)) < 2 * 60


def test_a_limit_that_every_answer_names_is_kept(tmp_path):
    async def run():
        client = Client(*(limited(**{"x-ratelimit-limit-requests": "60"}) for _ in range(300)))
        t = sender(tmp_path, client)
        await asyncio.gather(*(t.send(CALL, b"k", deadline=t.deadline(1e6), accept=lambda _: []) for _ in range(1)))
        await asyncio.gather(*(t.send(CALL, b"k", deadline=t.deadline(1e6), accept=lambda _: []) for _ in range(200)))
        return traffic.now()

    assert fake_clock.run(run()) > 180.0


def test_a_silent_service_is_reported_after_10_s_and_then_every_30(tmp_path):
    said = []

    async def run():
        t = sender(tmp_path, Client(seconds=1e6), **{"teacher.timeout_s": 60.0})
        t.report = lambda line: said.append((traffic.now(), line))
        sends = (t.send(CALL, b"k", deadline=t.deadline(95.0), accept=lambda _: []) for _ in range(7))
        return await asyncio.gather(*sends, return_exceptions=True)

    errors = fake_clock.run(run())
    assert all(e.late for e in errors)
    assert [time for time, _ in said] == pytest.approx([10.0, 40.0, 70.0], abs=0.1)
    assert "has not answered for 10 s: 7 calls wait" in said[0][1] and "given up in 85 s" in said[0][1]


def test_a_service_that_answers_is_not_called_silent(tmp_path):
    said = []

    async def run():
        t = sender(tmp_path, Client(seconds=4.0), **{"teacher.max_concurrency": 1})
        t.report = lambda line: said.append(line)
        await asyncio.gather(*(t.send(CALL, b"k", deadline=t.deadline(300.0), accept=lambda _: []) for _ in range(20)))

    fake_clock.run(run())
    assert not said


@pytest.mark.parametrize("error", [RecursionError("deep"), OverflowError("big"), MemoryError(), KeyError("x")])
def test_an_error_that_nobody_foresaw_is_that_calls_failure(error, tmp_path):
    client = Client(*(error for _ in range(9)))
    [failed], t, _ = send(tmp_path, client, **{"teacher.max_retries": 2})
    assert isinstance(failed, wire.CallError) and type(error).__name__ in str(failed)
    assert t.budget.settled == ["unknown"] * 3


def test_one_short_answer_does_not_switch_n_off_for_good():
    seen = wire.Learner(takes_n=True)
    many, one = (wire.Call(PROMPT, "so", n, 8, 1.0, 1.0, 0, "prefill") for n in (4, 1))
    seen.answered(many, 4)
    seen.answered(many, 1)
    assert seen.takes_n  # it was proven: a bad moment
    seen.answered(many, 1), seen.answered(many, 1)
    assert not seen.takes_n
    for _ in range(64):
        seen.answered(one, 1)
    assert seen.takes_n  # asked for once more
    seen.answered(many, 4)
    assert seen.takes_n


# what is our own doing, and what is the service's


class Limited:
    """A service that answers after a second, and refuses what is over `limit` in each minute of the clock, or over a
    rate that fills up all the time, saying when to come back; after `hangs` seconds it answers nothing."""

    def __init__(self, limit=0, *, steady=False, hangs=1e9, says_when=True):
        self.limit, self.steady, self.hangs, self.says_when = limit, steady, hangs, says_when
        self.answered = self.refused = self.minute = self.used = 0
        self.level, self.at = 5.0, 0.0

    def wait(self) -> float:
        """Seconds to wait; 0 where there is room."""
        time = traffic.now()
        if self.steady:
            self.level, self.at = min(5.0, self.level + (time - self.at) * self.limit / 60), time
            self.level -= (room := self.level >= 1)
            return 0.0 if room else (1 - self.level) * 60 / self.limit
        if int(time // 60) != self.minute:
            self.minute, self.used = int(time // 60), 0
        self.used += 1
        return 61 - time % 60 if self.used > self.limit else 0.0

    async def call(self, call):
        await asyncio.sleep(0.2 if traffic.now() < self.hangs else 1e9)
        if self.limit and (wait := self.wait()):
            self.refused += 1
            raise refusal(429, **({"retry-after": f"{wait:.2f}"} if self.says_when else {}))
        await asyncio.sleep(0.8)
        self.answered += 1
        return REPLY


def audits(tmp_path, service, *, responses=10, during=None, **settings):
    """(what became of each audit of ten texts, the time when all had ended), asked of `service` one text a call."""

    async def run():
        c = cfg_for(
            "http://127.0.0.1:9",
            "anthropic",
            tmp_path,
            **{"teacher.timeout_s": 30.0, "teacher.deadline_s": 60.0} | settings,
        )
        async with teacher_of(c) as teacher:
            teacher.client.call, teacher.client.open = service.call, lambda: asyncio.sleep(0)
            asked = [teacher.continue_text(request(f"s{i}", n=10)) for i in range(responses)]
            out = asyncio.gather(*asked, return_exceptions=True)
            if during:
                await during(teacher, out)
            return await out, traffic.now()

    return fake_clock.run(run())


def short(results):
    """Audits that lack a text."""
    return [r for r in results if isinstance(r, Exception) or len(r.continuations) < 10]


@pytest.mark.parametrize("settings", [{"teacher.requests_per_minute": 20}, {"teacher.tokens_per_minute": 6000}])
def test_the_runs_own_pacing_costs_no_text(settings, tmp_path):
    results, end = audits(tmp_path, Limited(), **settings)
    assert not short(results) and end > 3 * 60.0  # three times the deadline


def test_waiting_for_room_in_the_budget_costs_no_text(tmp_path):
    async def run():
        t = sender(tmp_path, Client())

        async def reserve(key, n, tokens_in, tokens_out):
            await asyncio.sleep(400.0)
            return 1

        t.budget.reserve = reserve
        return await t.send(CALL, b"k", deadline=t.deadline(300.0), accept=lambda _: [])

    assert fake_clock.run(run()).attempts == 1


def test_calls_that_never_left_the_queue_do_not_keep_a_run_that_the_service_hangs(tmp_path):
    """Of 36 calls for four places, four have the service's time; the others do not wait for their turn to hang."""
    service = Limited(hangs=2.5)
    results, end = audits(tmp_path, service, **{"teacher.max_concurrency": 4})
    assert service.answered >= 4 and len(short(results)) == 10
    assert end < 3.5 + 2 * 60.0  # those that were under way, and those that began after the last answer
    assert any(isinstance(r, TeacherStopped) and "has not answered for 60 s" in str(r) for r in results)


def test_a_service_that_refuses_and_then_hangs_is_given_up_and_what_waits_is_not_sent(tmp_path):
    """After refusals few calls are in flight: the others do not go out one after the other to hang."""

    class Hangs(Limited):
        async def call(self, call):
            self.refused += 1
            if self.refused <= 40:
                raise refusal(429, **{"retry-after": "1"})
            self.answered += 1
            await asyncio.sleep(1e9)

    service = Hangs()
    results, end = audits(tmp_path, service, **{"teacher.timeout_s": 15.0})
    assert all(isinstance(r, TeacherStopped) for r in results) and end < 110.0  # 40 s of refusals
    assert service.answered <= 10 * 4 + 4


@pytest.mark.parametrize("steady", [False, True], ids=["by the minute", "steadily"])
def test_a_limit_that_no_header_names_costs_no_text_and_few_refusals(steady, tmp_path):
    service = Limited(20, steady=steady)
    results, end = audits(tmp_path, service)
    assert not short(results) and service.answered == 100 and 3 * 60.0 < end < 7 * 60.0
    assert service.refused < (60 if not steady else 150)  # about as many as were out when the limit was met, each time


def test_a_limit_that_says_nothing_of_when_costs_no_text(tmp_path):
    service = Limited(20, says_when=False)
    results, end = audits(tmp_path, service)
    assert not short(results) and service.answered == 100 and end < 10 * 60.0


def test_one_refusal_with_a_wait_holds_for_every_call(tmp_path):
    client = Client(refusal(429, **{"retry-after": "40"}), seconds=1.0)
    out, _, _ = send(tmp_path, client, calls=20, **{"teacher.max_concurrency": 1})
    assert not any(isinstance(o, Exception) for o in out)
    assert client.times[0] == 0.0 and client.times[1] >= 41.0 and len(client.times) == 21


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_wait_that_is_longer_than_the_deadline_is_waited_for(status, tmp_path):
    class Once(Limited):
        async def call(self, call):
            if not self.refused:
                self.refused = 1
                raise refusal(status, **{"retry-after": "3600"})
            return await super().call(call)

    results, end = audits(tmp_path, Once(), responses=1)
    assert not short(results) and 60.0 <= end < 65.0


def test_a_service_that_only_asks_for_waits_ends_the_run_after_the_deadline(tmp_path):
    results, end = audits(tmp_path, Limited(1e-9))
    assert all(isinstance(r, TeacherStopped) for r in results) and "has not answered for 6" in str(results[0])
    assert 60.0 <= end < 65.0


def test_a_wait_of_the_last_step_is_not_held_against_the_next(tmp_path):
    async def run():
        t = sender(tmp_path, Client(*(refusal(429, **{"retry-after": "1"}) for _ in range(4))))
        t.max_retries = 1
        with pytest.raises(wire.CallError):
            await t.send(CALL, b"k", deadline=t.deadline(300.0), accept=lambda _: [])
        await asyncio.sleep(1000.0)
        t.max_retries = 8
        return await t.send(CALL, b"k", deadline=t.deadline(300.0), accept=lambda _: [])

    assert fake_clock.run(run()).attempts == 3


def test_the_limits_that_a_refusal_names_are_heeded(tmp_path):
    client = Client(refusal(429, **{"retry-after": "1", "x-ratelimit-limit-requests": "60"}))
    _, t, end = send(tmp_path, client, calls=31, **{"teacher.max_concurrency": 1})
    assert t.requests.rate == 1.0 and end > 20.0 and len(client.times) == 32


def test_a_stop_ends_every_wait_of_our_own_at_once(tmp_path):
    """The run is closed while calls wait for a pause, for their rate and for a place."""

    async def close(teacher, out):
        await asyncio.sleep(7.0)
        await teacher.close()

    for settings in ({}, {"teacher.requests_per_minute": 1}):
        _, end = audits(tmp_path, Limited(1e-9), during=close, **settings)
        assert end == pytest.approx(7.0, abs=0.1)


def test_when_the_run_has_ended_nobody_waits_for_a_turn(tmp_path):
    class Refused(Limited):
        async def call(self, call):
            self.answered += 1
            await asyncio.sleep(1.0)
            raise refusal(401) if self.answered > 1 else refusal(503, **{"retry-after": "50"})

    service = Refused()
    results, end = audits(tmp_path, service, **{"teacher.requests_per_minute": 20})
    assert all(isinstance(r, TeacherStopped) for r in results)
    assert end < 5.0 and service.answered <= 3


def test_calls_of_more_than_a_burst_keep_the_rate(tmp_path):
    async def run(units, calls):
        bucket = traffic.Bucket(30_000)
        for _ in range(calls):
            await bucket.take(units)
        return traffic.now()

    assert fake_clock.run(run(20_000, 100)) == pytest.approx((100 - 1) * 40.0, rel=0.01)
    assert fake_clock.run(run(1_000, 100)) == pytest.approx((100 - 3) * 2.0, rel=0.01)


def test_a_score_counts_its_tokens_and_a_text_a_quarter_of_its_bytes(tmp_path):
    client = Client()
    client.score = client.call
    score = wire.ScoreCall(tuple(range(500)), tuple(range(498)), "echo")

    async def run():
        t = sender(tmp_path, client, **{"teacher.tokens_per_minute": 10_000})
        await asyncio.gather(*(t.send(score, b"k", deadline=t.deadline(300.0), accept=lambda _: []) for _ in range(61)))
        return traffic.now()

    assert fake_clock.run(run()) == pytest.approx(60 * 6.0, rel=0.01)  # of 1,000 tokens each, ten a minute
