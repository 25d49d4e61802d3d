"""Traffic on a clock of its own: rates, order, back-off, deadlines, with a client that answers as the test says."""

import asyncio
import itertools

import fake_clock
import pytest
from teacher_kit import PROMPT, cfg_for

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
        sends = (t.send(CALL, b"k", deadline=deadline, accept=lambda _: []) for _ in range(calls))
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
            await t.send(CALL, b"k", deadline=300.0, accept=lambda _: [])
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
        await asyncio.gather(*(t.send(CALL, b"k", deadline=1e6, accept=lambda _: []) for _ in range(1)))
        await asyncio.gather(*(t.send(CALL, b"k", deadline=1e6, accept=lambda _: []) for _ in range(calls)))
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
        await asyncio.gather(*(t.send(CALL, b"k", deadline=1e6, accept=lambda _: []) for _ in range(1)))
        await asyncio.gather(*(t.send(CALL, b"k", deadline=1e6, accept=lambda _: []) for _ in range(200)))
        return traffic.now()

    assert fake_clock.run(run()) > 180.0


def test_a_silent_service_is_reported_after_10_s_and_then_every_30(tmp_path):
    said = []

    async def run():
        t = sender(tmp_path, Client(seconds=1e6), **{"teacher.timeout_s": 60.0})
        t.report = lambda line: said.append((traffic.now(), line))
        sends = (t.send(CALL, b"k", deadline=95.0, accept=lambda _: []) for _ in range(7))
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
        await asyncio.gather(*(t.send(CALL, b"k", deadline=300.0, accept=lambda _: []) for _ in range(20)))

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
