"""Traffic: how many calls are in flight, how fast they go out, in which order, and when to ask again.

Everything here belongs to one event loop, and goes by its clock.
"""

import asyncio
import contextlib
import dataclasses
import random
import sys

from omniopd_jax.errors import TeacherStopped, UserError
from omniopd_jax.teachers import wire
from omniopd_jax.teachers.wire import Call, CallError, Limits, Reply, ScoreCall

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 30.0
TWICE_MORE = (
    2  # how often a refusal of everything (a key, a model) is asked again where the service has answered before
)
SILENT_S, SILENT_AGAIN_S = 10.0, 30.0  # when a service that does not answer is reported, and how often after that
HEED_S = 60.0  # how long a limit holds that a header named, unless another answer names it again


def now() -> float:
    """The running event loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


@dataclasses.dataclass(frozen=True)
class Sent:
    """A call that was answered: the reply, the journal rows made of it, dollars, and exchanges that it took."""

    reply: Reply
    rows: list
    usd: float
    attempts: int


class Bucket:
    """Lets at most `per_minute` units through a minute, in bursts of a tenth of that; 0 = no limit."""

    def __init__(self, per_minute: float = 0.0):
        self.rate, self.burst, self.level, self.at, self.until = 0.0, 1.0, 0.0, now(), float("inf")
        self.turn = asyncio.Lock()  # waiters are served in order
        self.set(per_minute)

    def set(self, per_minute: float, until: float = float("inf")) -> None:
        """Changes the limit, up to the time `until`."""
        self.until = until
        if self.rate == per_minute / 60.0:
            return
        self.rate, self.burst = per_minute / 60.0, max(1.0, per_minute / 10.0)
        self.level = min(self.level, self.burst) if self.level else self.burst

    async def take(self, units: float) -> None:
        """Waits until `units` may pass; more than a burst counts as a burst."""
        async with self.turn:
            while self.rate and now() < self.until:
                least = min(units, self.burst)
                time = now()
                self.level, self.at = min(self.burst, self.level + (time - self.at) * self.rate), time
                if self.level >= least:
                    self.level -= least
                    return
                await asyncio.sleep(min((least - self.level) / self.rate, max(0.0, self.until - time)))


class Order:
    """Which request goes next: so many responses at a time, and each one's prefixes in ascending order.

    A response's later prefix is let through when the one before has its first answer, so that it finds the provider's
    cache filled. Requests of one response that are started together are put in order.
    """

    def __init__(self, responses: int, *, ascending: bool):
        self.ascending = ascending
        self.free = responses
        self.queue = []  # futures of responses that wait for a place
        self.waiting = {}  # sample id -> {ticket: event}
        self.place = {}  # sample id -> future, done when it has its place
        self.users = {}  # sample id -> requests that wait or run
        self.count = 0

    @contextlib.asynccontextmanager
    async def turn(self, sample_id: str, peak: int):
        """Waits for the request's turn; yields `answered`, to be called when the first answer is there."""
        self.count += 1
        ticket, go = (peak, self.count), asyncio.Event()
        waiting = self.waiting.setdefault(sample_id, {})
        waiting[ticket] = go
        held = {ticket}

        def answered():
            if ticket in held:
                held.clear()
                del waiting[ticket]
                if waiting:
                    waiting[min(waiting)].set()

        self.users[sample_id] = self.users.get(sample_id, 0) + 1
        try:
            await asyncio.sleep(0)  # the response's other requests, started in the same breath, take their tickets
            await self._admitted(sample_id)
            if self.ascending:
                if min(waiting) == ticket:
                    go.set()
                await go.wait()
            yield answered
        finally:
            answered()
            self._leave(sample_id)

    async def _admitted(self, sample_id):
        if sample_id not in self.place:
            self.place[sample_id] = asyncio.get_running_loop().create_future()
            if self.free:
                self.free -= 1
                self.place[sample_id].set_result(None)
            else:
                self.queue.append(self.place[sample_id])
        await asyncio.shield(self.place[sample_id])

    def _leave(self, sample_id):
        self.users[sample_id] -= 1
        if self.users[sample_id]:
            return
        del self.users[sample_id], self.waiting[sample_id]
        place = self.place.pop(sample_id, None)
        if place is None:
            return
        if not place.done():
            self.queue.remove(place)
        elif self.queue:
            self.queue.pop(0).set_result(None)
        else:
            self.free += 1


class Traffic:
    """Sends calls through a provider's client: bounded, paced, budgeted, retried within a deadline."""

    def __init__(self, cfg, client, budget, served=lambda model: (None, ""), most_in=None):
        t = cfg.teacher
        self.client, self.budget, self.served = client, budget, served
        self.most_in = most_in or (lambda call: call.max_input_tokens())  # call -> upper bound of its input in tokens
        self.timeout_s, self.max_retries, self.max_concurrency = t.timeout_s, t.max_retries, t.max_concurrency
        self.ascending = t.prefix_order == "ascending"
        self.requests_per_minute, self.tokens_per_minute = t.requests_per_minute, t.tokens_per_minute
        self.jitter = random.Random()  # not the run's seed: processes must not retry in step
        self.calls = self.retries = 0
        self.failed_in_a_row = 0
        self.last_success = float("-inf")
        self.report = report

    def bind(self) -> None:
        """Makes what belongs to the running event loop."""
        self.slots = asyncio.Semaphore(self.max_concurrency)
        self.order = Order(self.max_concurrency, ascending=self.ascending)
        self.requests, self.tokens = Bucket(self.requests_per_minute), Bucket(self.tokens_per_minute)
        self.not_before = 0.0
        self.waiting, self.watch, self.since = {}, None, now()
        self.budget.bind()

    async def send(
        self, call: Call | ScoreCall, key: bytes, *, deadline: float, accept, fail_fast: bool = False
    ) -> Sent:
        """`_send`, and a word on the terminal where it takes long."""
        with self._waiting(deadline):
            return await self._send(call, key, deadline=deadline, accept=accept, fail_fast=fail_fast)

    async def _send(self, call, key, *, deadline, accept, fail_fast) -> Sent:
        """One call until it is answered, refused, or out of retries or time.

        Args:
          call: what to ask.
          key: the journal's key of the request.
          deadline: the loop's time (`now()`) after which nothing more is tried.
          accept: turns the `Reply` into journal rows, before they are used.
          fail_fast: give up at once where nothing listens, and after two retries: for the probe.

        Raises:
          CallError: refused, or still failing; its `attempts` says how often it was sent.
          TeacherStopped: nothing more can be asked.
        """
        tries = answered = refused = 0
        while True:
            try:
                reply, rows, usd = await self._once(call, key, deadline, accept)
                return Sent(reply, rows, usd, tries + 1)
            except CallError as e:
                error = e
            self.failed_in_a_row += error.kind == "retry"
            # an unreachable server costs nothing and may come back: only the deadline ends that
            tries, answered = tries + 1, answered + (error.outcome != "unsent")
            error.attempts = tries
            again = False
            if error.status in (401, 403, 404) and self.last_success > float("-inf") and refused < TWICE_MORE:
                refused, again = refused + 1, True  # it worked before: a gateway may have had a bad moment
            elif error.kind == "stop":
                raise TeacherStopped(f"the teacher {self.client.model!r} cannot be used: {error}")
            if (error.kind != "retry" and not again) or (fail_fast and (error.outcome == "unsent" or tries > 2)):
                raise error
            if answered > self.max_retries:
                raise error
            ceiling = min(
                LAST_BACKOFF_S if error.outcome != "unsent" else 5.0, FIRST_BACKOFF_S * 2 ** min(tries - 1, 10)
            )
            wait = self.jitter.uniform(0, ceiling)  # full jitter
            if error.retry_after is not None:
                wait = error.retry_after + self.jitter.uniform(0, FIRST_BACKOFF_S)
            if now() + wait >= deadline:
                missed = CallError(
                    f"deadline missed after {tries} tries; the last: {error}", "retry", status=error.status, late=True
                )
                missed.attempts = tries
                raise missed
            self.retries += 1
            await asyncio.sleep(wait)

    async def _once(self, call, key, deadline, accept):
        """One exchange, with everything that belongs around it."""
        id_ = None
        try:
            async with asyncio.timeout_at(deadline) as limit:
                async with self.slots:
                    while (pause := self.not_before - now()) > 0:
                        await asyncio.sleep(pause)
                    tokens_in, tokens_out = self.most_in(call), call.n * call.max_tokens
                    await self.requests.take(1)
                    await self.tokens.take(tokens_in / 4 + tokens_out)
                    id_ = await self.budget.reserve(key, call.n, tokens_in, tokens_out)
                    return await self._exchange(id_, call, accept)
        except TimeoutError:
            if not limit.expired():
                raise
            raise CallError("deadline missed: no answer in time", "retry", outcome="unknown", late=True) from None

    async def _exchange(self, id_, call, accept):
        """The call itself, settled whatever comes of it."""
        self.calls += 1
        start, settled = now(), False
        try:
            try:
                async with asyncio.timeout(self.timeout_s):
                    reply = await (self.client.score(call) if isinstance(call, ScoreCall) else self.client.call(call))
            except (CallError, UserError):
                raise
            except TimeoutError:
                raise CallError(f"no answer in {self.timeout_s:g} s", "retry", outcome="unknown") from None
            except Exception as e:  # whatever an answer set off: this call's failure, not the run's
                raise CallError(f"{type(e).__name__}: {e}", "retry", outcome="unknown") from e
            latency = now() - start
            price, by = self.served(reply.model)
            rows = accept(reply)
            settled = True
            usd = self.budget.settle(id_, "ok", reply.billed, price=price, latency=latency, results=rows, by=by)
            self.last_success, self.failed_in_a_row = now(), 0
            self._heed(reply.limits)
            return reply, rows, usd
        except CallError as e:
            settled = True
            self.budget.settle(id_, e.outcome, latency=now() - start, error=str(e))
            raise
        finally:
            if not settled:  # cancelled: a deadline, or the run ends; it may have been billed
                self.budget.settle(id_, "unknown", latency=now() - start, error="cancelled")

    def _heed(self, limits: Limits) -> None:
        """Takes over what the headers say: the rates where the config names none, and a pause where nothing is left.

        What one answer says is replaced by the next one that says something, and lapses where none does.
        """
        for bucket, configured, named in (
            (self.requests, self.requests_per_minute, limits.requests_per_minute),
            (self.tokens, self.tokens_per_minute, limits.tokens_per_minute),
        ):
            if named and not configured:
                bucket.set(named, until=now() + HEED_S)
        left = [n for n in (limits.requests_left, limits.tokens_left) if n is not None]
        if left and min(left) > 0:
            self.not_before = 0.0
        for left, reset in (
            (limits.requests_left, limits.requests_reset_s),
            (limits.tokens_left, limits.tokens_reset_s),
        ):
            if left == 0 and reset:
                self.not_before = max(self.not_before, now() + min(reset, HEED_S))

    @contextlib.contextmanager
    def _waiting(self, deadline: float):
        """Counts a call as waiting; while any does, a silent service is reported."""
        ticket = object()
        self.waiting[ticket] = deadline
        if self.watch is None or self.watch.done():
            self.since = now()
            self.watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            del self.waiting[ticket]
            if not self.waiting and self.watch:
                self.watch.cancel()
                self.watch = None

    async def _watch(self):
        """Says on the terminal that nothing comes: after SILENT_S, then every SILENT_AGAIN_S."""
        said = 0.0
        while True:
            quiet_since = max(self.since, self.last_success, said)
            due = quiet_since + (SILENT_AGAIN_S if said and said == quiet_since else SILENT_S)
            if now() < due:
                await asyncio.sleep(due - now())
                continue
            said = now()
            silent = said - max(self.since, self.last_success)
            self.report(
                f"the teacher {self.client.model!r} has not answered for {silent:.0f} s: {len(self.waiting)} calls "
                "wait, "
                f"the first is given up in {max(0.0, min(self.waiting.values()) - said):.0f} s"
            )


def report(line: str) -> None:
    """A line for the person at the terminal; a progress display keeps it above itself."""
    print(wire.scrub(line), file=sys.stderr, flush=True)
