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
    client = Client(*(wire.CallError("nobody listens", "retry", outcome="unsent") for _ in range(9999)))
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
