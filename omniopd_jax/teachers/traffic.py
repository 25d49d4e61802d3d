"""Traffic: how many calls are in flight, how fast they go out, in which order, and when to ask again.

Everything here belongs to one event loop, and goes by its clock.
"""

import asyncio
import contextlib
import copy
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
TICK_S = 1e-3  # the shortest wait: of less, a clock's rounding can make none at all
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
        had, self.rate, self.burst = self.rate, per_minute / 60.0, max(1.0, per_minute / 10.0)
        self.level = min(self.level, self.burst) if had else self.burst

    async def take(self, units: float) -> None:
        """Waits until `units` may pass. More than a burst passes when the bucket is full, and leaves it in debt."""
        async with self.turn:
            while self.rate and now() < self.until:
                least = min(units, self.burst)
                time = now()
                self.level, self.at = min(self.burst, self.level + (time - self.at) * self.rate), time
                if self.level >= least:
                    self.level -= units
                    return
                await asyncio.sleep(max(TICK_S, min((least - self.level) / self.rate, self.until - time)))


class Silence:
    """A clock that runs while calls are out, for how long a service has answered none of them."""

    def __init__(self):
        self.out, self.since, self.before, self.last = 0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def call(self):
        """Around a call that is out."""
        if not self.out:
            self.since = now()
        self.out += 1
        try:
            yield
        finally:
            self.out -= 1
            if not self.out:
                self.before += now() - self.since

    def time(self) -> float:
        """What the clock shows, in seconds."""
        return self.before + (now() - self.since if self.out else 0.0)

    def answered(self) -> None:
        """One was answered."""
        self.last = self.time()

    def seconds(self, since: float) -> float:
        """For how long none has been answered, counted from where the clock showed `since`."""
        return self.time() - max(since, self.last)


class Deadline:
    """When a request is given up: `seconds` after now and the time that it waits for us, not for the service; sooner
    where the service has answered nobody for as long.
    """

    def __init__(self, seconds: float, silence: Silence):
        self.seconds, self.silence, self.began = seconds, silence, silence.time()
        self.at = now() + seconds
        self.since = None  # since when it stands still

    def left(self) -> float:
        """Seconds that the service still has."""
        own = self.at - (now() if self.since is None else self.since)
        return min(own, self.seconds - self.silence.seconds(self.began))

    def copy(self) -> "Deadline":
        """The same, for one of several calls that go on side by side."""
        return copy.copy(self)

    @contextlib.contextmanager
    def paused(self):
        """Around a wait of our own: it does not count."""
        self.since = now()
        try:
            yield
        finally:
            self.at, self.since = self.at + now() - self.since, None


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
    """Sends calls through a provider's client: bounded, paced, budgeted, retried within a deadline.

    Args:
      served: told of the model that answered, as it calls itself; (price of the reply, who wrote it).
      most_in: call -> upper bound of its input in tokens.
      stopped: returns what has ended the run, or None; nothing goes out from then on.
    """

    def __init__(
        self, cfg, client, budget, served=lambda model: (None, ""), most_in=None, stopped=lambda: None
    ):  # fmt: skip
        t = cfg.teacher
        self.client, self.budget, self.served, self.stopped = client, budget, served, stopped
        self.most_in = most_in or (lambda call: call.max_input_tokens())
        self.timeout_s, self.max_retries, self.max_concurrency = t.timeout_s, t.max_retries, t.max_concurrency
        self.patience_s = t.deadline_s  # for a service that asks for pauses and answers nobody
        self.ascending = t.prefix_order == "ascending"
        self.requests_per_minute, self.tokens_per_minute = t.requests_per_minute, t.tokens_per_minute
        self.jitter = random.Random()  # not the run's seed: processes must not retry in step
        self.calls = self.retries = 0
        self.failed_in_a_row = 0
        self.last_success = float("-inf")
        self.report = report
        self.queued = set()  # timeouts of the calls that wait for us: `end_queue` makes them all due

    def bind(self) -> None:
        """Makes what belongs to the running event loop."""
        self.slots = asyncio.Semaphore(self.max_concurrency)
        self.order = Order(self.max_concurrency, ascending=self.ascending)
        self.requests, self.tokens = Bucket(self.requests_per_minute), Bucket(self.tokens_per_minute)
        self.not_before = 0.0  # a pause by the headers of an answer: one that has room ends it
        self.refused_until, self.refused_since = 0.0, None  # a pause by Retry-After, and the first since an answer
        self.unsaid = 0  # pauses in a row whose length the service did not say
        self.window = float(self.max_concurrency)  # calls in flight that a service without limit headers bears
        self.room = asyncio.Event()  # a call has come back
        self.silence, self.queued = Silence(), set()
        self.waiting, self.watch, self.since = {}, None, now()
        self.budget.bind()

    async def send(
        self, call: Call | ScoreCall, key: bytes, *, deadline: Deadline, accept, fail_fast: bool = False
    ) -> Sent:
        """`_send`, and a word on the terminal where it takes long."""
        with self._waiting(deadline):
            return await self._send(call, key, deadline=deadline, accept=accept, fail_fast=fail_fast)

    async def _send(self, call, key, *, deadline, accept, fail_fast) -> Sent:
        """One call until it is answered, refused, or out of retries or time.

        Args:
          call: what to ask.
          key: the journal's key of the request.
          deadline: after which nothing more is tried; it stands still while the call waits for us.
          accept: turns the `Reply` into journal rows, before they are used.
          fail_fast: give up at once where nothing listens, and after TWICE_MORE: for the probe.

        Raises:
          CallError: refused, or still failing; its `attempts` says how often it was sent.
          TeacherStopped: nothing more can be asked.
        """
        tries = answered = refused = 0
        while True:
            began = now()
            try:
                reply, rows, usd = await self._once(call, key, deadline, accept)
                return Sent(reply, rows, usd, tries + 1)
            except CallError as e:
                error = e
            if error.late and error.outcome == "unsent":  # given up in our own queue
                error.attempts = tries
                raise error
            self.failed_in_a_row += error.kind == "retry"
            paused = self._pause(error)
            # an unreachable server costs nothing and may come back, and who is put off while others are answered has
            # its turn: only the deadline ends that
            tries += 1
            answered += error.outcome != "unsent" and not (paused and self.last_success >= began)
            error.attempts = tries
            again = False
            asked_before = self.last_success > float("-inf") and error.field != "withheld"
            if error.status in (401, 403, 404) and asked_before and refused < TWICE_MORE:
                refused, again = refused + 1, True  # it worked before: a gateway may have had a bad moment
            elif error.kind == "stop":
                raise TeacherStopped(f"the teacher {self.client.model!r} cannot be used: {error}")
            nobody = error.outcome == "unsent" and error.status is None
            if (error.kind != "retry" and not again) or (fail_fast and (nobody or tries > TWICE_MORE)):
                raise error
            if answered > self.max_retries:
                raise error
            most = LAST_BACKOFF_S if error.outcome != "unsent" else 5.0
            wait = self.jitter.uniform(0, min(most, FIRST_BACKOFF_S * 2 ** min(tries - 1, 10)))  # full jitter
            wait = 0.0 if paused else wait
            if deadline.left() <= wait or (paused and now() - self.refused_since >= self.patience_s):
                missed = CallError(
                    f"deadline missed after {tries} tries; the last: {error}", "retry", status=error.status, late=True
                )
                missed.attempts = tries
                raise missed
            self.retries += 1
            await asyncio.sleep(wait)

    def _pause(self, error: CallError) -> bool:
        """Heeds what an error says of limits. Returns whether it asks for a pause, which then holds for every call."""
        self._heed(error.limits)
        wait = error.retry_after
        if error.kind != "retry" or (wait is None and error.status != 429):
            return False
        if wait is None:  # slower, it says, and not how long
            wait = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self.unsaid, 10))
            self.unsaid += now() >= self.refused_until  # once for those that went out together
        if self.refused_since is None:
            self.refused_since = now()
        if now() >= self.refused_until:  # the first of those that went out together
            self.window = max(1.0, self.window / 2)
        # where it asks for more than the run's patience, it is asked once more at the end of that
        last = max(self.refused_since + self.patience_s, now())
        self.refused_until = max(self.refused_until, min(now() + wait, last))
        return True

    async def _once(self, call, key, deadline, accept):
        """One exchange, with everything that belongs around it."""
        with deadline.paused():
            await self._slot(deadline)
        try:
            with deadline.paused():
                id_ = await self._turn(call, key, deadline)
            return await self._exchange(id_, call, accept, deadline)
        finally:
            self.slots.release()
            self.room.set()

    async def _slot(self, deadline):
        """Waits for a place among the calls in flight, as long as the service answers the others.

        Raises:
          CallError: it has answered nobody for as long as this call may wait for it.
        """
        while (left := deadline.left()) > 0:
            with contextlib.suppress(TimeoutError):
                async with self._in_queue(max(TICK_S, left)):
                    await self.slots.acquire()
                    return
        raise CallError("deadline missed: no answer in time", "retry", outcome="unsent", late=True)

    async def _turn(self, call, key, deadline) -> int:
        """Waits until the call may go out: for pauses, rates and the budget. Returns its id in the journal."""
        tokens_in, tokens_out = self.most_in(call), call.n * call.max_tokens
        likely_in = tokens_in if isinstance(call, ScoreCall) else tokens_in / 4  # a score's are tokens, a text's bytes
        async with self._in_queue():
            await self._pauses()
            await self.requests.take(1)
            await self.tokens.take(likely_in + tokens_out)
            await self._pauses()  # one that was asked for while this call waited for its rate
            while self.silence.out >= int(self.window) and (left := deadline.left()) > 0:
                self.room.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(TICK_S, left)):
                        await self.room.wait()
                await self._pauses()
            return await self.budget.reserve(key, call.n, tokens_in, tokens_out)

    async def _pauses(self):
        """Waits until no pause holds; those who wait do not all go at the same moment."""
        while (pause := max(self.not_before, self.refused_until) - now()) > 0:
            jitter = self.jitter.uniform(0, FIRST_BACKOFF_S) if self.refused_until > self.not_before else 0.0
            await asyncio.sleep(max(TICK_S, pause + jitter))

    @contextlib.asynccontextmanager
    async def _in_queue(self, seconds: float | None = None):
        """Around a wait of our own, of `seconds` at most. Raises `TeacherStopped` at once where the run has ended."""
        if stop := self.stopped():
            raise TeacherStopped(str(stop))
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                self.queued.add(limit)
                try:
                    yield
                finally:
                    self.queued.discard(limit)
        except TimeoutError:
            if stop := self.stopped():
                raise TeacherStopped(str(stop)) from None
            raise

    def end_queue(self) -> None:
        """The run has ended: whoever waits for us waits no longer."""
        for limit in self.queued:
            if not limit.expired():
                limit.reschedule(now())

    def deadline(self, seconds: float) -> Deadline:
        """One that begins now."""
        return Deadline(seconds, self.silence)

    async def _exchange(self, id_, call, accept, deadline):
        """The call itself, settled whatever comes of it."""
        self.calls += 1
        start, settled = now(), False
        seconds = min(self.timeout_s, deadline.left())
        try:
            try:
                if seconds <= 0:
                    raise CallError("deadline missed: no answer in time", "retry", outcome="unsent", late=True)
                with self.silence.call():
                    async with asyncio.timeout(seconds):
                        asked = self.client.score if isinstance(call, ScoreCall) else self.client.call
                        reply = await asked(call)
            except (CallError, UserError):
                raise
            except TimeoutError:
                late = seconds < self.timeout_s
                said = "deadline missed: no answer in time" if late else f"no answer in {self.timeout_s:g} s"
                raise CallError(said, "retry", outcome="unknown", late=late) from None
            except Exception as e:  # whatever an answer set off: this call's failure, not the run's
                raise CallError(f"{type(e).__name__}: {e}", "retry", outcome="unknown") from e
            latency = now() - start
            price, by = self.served(reply.model)
            rows = accept(reply)
            settled = True
            usd = self.budget.settle(id_, "ok", reply.billed, price=price, latency=latency, results=rows, by=by)
            self.last_success, self.failed_in_a_row, self.refused_since, self.unsaid = now(), 0, None, 0
            self.window = min(self.max_concurrency, self.window + 1 / self.window)
            self.silence.answered()
            self._heed(reply.limits)
            return reply, rows, usd
        except CallError as e:
            settled = True
            self.budget.settle(id_, e.outcome, latency=now() - start, error=str(e))
            raise
        finally:
            if not settled:  # cancelled: the run ends; it may have been billed
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
    def _waiting(self, deadline: Deadline):
        """Counts a call as waiting; while any does, a silent service is reported."""
        ticket = object()
        self.waiting[ticket] = deadline
        if self.watch is None or self.watch.done():
            self.since, self.refused_since = now(), None
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
            pause = max(self.not_before, self.refused_until) - said
            first = max(0.0, min(deadline.left() for deadline in self.waiting.values()))
            self.report(
                f"the teacher {self.client.model!r} has not answered for {silent:.0f} s: {len(self.waiting)} calls "
                "wait, "
                + (f"it asked for {pause:.0f} s more" if pause > 0 else f"the first is given up in {first:.0f} s")
            )


def report(line: str) -> None:
    """A line for the person at the terminal; a progress display keeps it above itself."""
    print(wire.scrub(line), file=sys.stderr, flush=True)
