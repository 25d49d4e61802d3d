"""Money: what a model costs, what a run will cost, and caps that concurrent calls cannot overshoot.

Before a call goes out, the most that it can cost is reserved (bytes for tokens, every output token used) and written
to the journal; when its answer is there, what was billed takes the reservation's place. A call whose outcome is
unknown stays spent. Caps count everything that the journal folder has seen, so that a resumed run does not start from
zero.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import math

from omniopd_jax.errors import TeacherStopped, UserError
from omniopd_jax.hf.template import read_preamble
from omniopd_jax.teachers.journal import Journal, Totals
from omniopd_jax.teachers.prices import PRICES, Price, listed_price, today

__all__ = ["PRICES", "Budget", "Estimate", "Price", "ends_early", "estimate", "listed_price", "price"]

LATENCY_S = (1.0, 5.0)  # median and slow call of a few tokens: what is taken before anything was asked and measured
PROBE_TOKENS = 16  # what the probe asks for in each call
NOTHING = -1  # a cap that leaves nothing: 0 is no cap
OTHERS_S = 0.2  # how often the calls of other processes are looked at, where they hold the room


def price(cfg, *, self_hosted: bool, official: bool = True, model: str | None = None) -> Price:
    """The price of `teacher.model`, or of the `model` that answers in its place: the config's where it is given, else
    the table's at the provider's own service (`official`); a server of one's own is free. Anywhere else it is unknown.

    Raises:
      UserError: no price is known and `budget.usd` needs one.
    """
    t = cfg.teacher
    model = t.model if model is None else model
    listed = listed_price(model) if official and not self_hosted else None
    known, base = listed is not None, listed or Price()
    given = {"input": t.price_input, "cached": t.price_cached, "output": t.price_output}
    given = {name: value for name, value in given.items() if value >= 0}
    if cfg.budget.usd and not known and not {"input", "output"} <= given.keys():
        raise UserError(
            f"budget.usd = {cfg.budget.usd} needs the price of teacher.model = {model!r}, which is not known: set "
            "teacher.price_input and teacher.price_output (USD per million tokens; 0 for a server of your own)"
        )
    if not (self_hosted or known or {"input", "output"} <= given.keys()):
        given["known"] = False
    if {"input", "output"} <= given.keys():
        base = dataclasses.replace(base, then=None)
    if base.then:
        given["then"] = _with(base.then, given)
    return _with(base, given)


def _with(base: Price, given: dict) -> Price:
    """A price with what the config gives in its place; the parts that go with the input are scaled as it is."""
    given = dict(given)
    if "input" in given:
        scale = given["input"] / base.input if base.input else 1.0
        given["written"] = base.written * scale if base.written else given["input"]
        given.setdefault("cached", base.cached * scale if base.cached else given["input"])
    return dataclasses.replace(base, **given)


class Budget:
    """Reserves before a call, settles after it. The journal makes it exact over processes and restarts."""

    def __init__(self, cfg, journal: Journal, price: Price, today=today):
        b = cfg.budget
        self.caps = Totals(b.calls, b.tokens, b.usd)
        self.hosts = 1  # disks among which the caps are divided
        self.on_exhausted = b.on_exhausted
        self.journal = journal
        self.price = price  # of a reply that nobody says more of
        self.prices = [price]  # of every model that may answer: calls are held at the dearest
        self.today = today
        self.bounds = {}  # id of a call that is out -> the most (tokens in, tokens out) that it can use
        self.in_flight = 0
        self.settled = None  # asyncio.Event of the running loop: some reservation has been given back
        self.turn = None  # asyncio.Lock of the running loop: who waits for room looks for it, the others wait behind
        self.arrived = 0  # continuations, for the mean cost of one
        self.spent_here = Totals()

    def divide(self, disks: list[Totals]) -> None:
        """Gives this process its part of what the caps leave, where the run's hosts keep their journals on disks of
        their own: what this disk has spent, and an equal part of what is left over all.

        Processes that share a folder share the caps by themselves.

        Args:
          disks: what each disk's journal has seen so far.

        Raises:
          UserError: a cap is smaller than the number of hosts.
        """
        hosts, own, spent = len(disks), self.journal.totals(), sum(disks, Totals())
        for name in ("calls", "tokens"):
            if 0 < getattr(self.caps, name) < hosts:
                raise UserError(
                    f"budget.{name} = {getattr(self.caps, name)} is less than 1 for each of the run's {hosts} hosts"
                )
        part = {}
        for name in ("calls", "tokens", "usd"):
            cap, mine, all_spent = (getattr(totals, name) for totals in (self.caps, own, spent))
            each = max(0, cap - all_spent) / hosts
            each = each if name == "usd" else math.floor(each)
            part[name] = (mine + each or NOTHING) if cap else 0
        self.caps, self.hosts = Totals(**part), hosts

    def bind(self) -> None:
        """Makes what belongs to the running event loop."""
        self.settled, self.turn, self.in_flight = asyncio.Event(), asyncio.Lock(), 0

    async def reserve(self, key: bytes, n: int, tokens_in: int, tokens_out: int) -> int:
        """Takes the upper bound of a call off the budget and returns the call's id.

        Where the caps leave no room, waits while calls in flight, of any process of this host, may give some of theirs
        back.

        Raises:
          TeacherStopped: no room is left and nothing in flight could make any.
        """
        usd = self._most(self.prices, tokens_in, tokens_out)
        async with self.turn:
            while True:
                call = self.journal.ask(key, n, tokens_in + tokens_out, usd, self.caps)
                if isinstance(call, int):
                    self.in_flight += 1
                    self.bounds[call] = (tokens_in, tokens_out)
                    return call
                if not self.in_flight and not self.journal.in_flight():
                    raise TeacherStopped(self._used_up(call, Totals(1, tokens_in + tokens_out, usd)))
                self.settled.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.settled.wait(), OTHERS_S)

    def _most(self, prices, tokens_in: int, tokens_out: int) -> float:
        """Dollars of a call at the dearest of some prices, as they are now and tomorrow: a call may last over
        midnight."""
        days = (self.today(), self.today() + datetime.timedelta(days=1))
        return max(price.on(day).most(tokens_in, tokens_out) for price in prices for day in days)

    def _used_up(self, cap: str, wanted: Totals) -> str:
        """What the caps were spent on, in one line."""
        spent, unknown = self.journal.totals(), self.journal.unknown()
        held, among = "", f" (of this host, one of {self.hosts})" if self.hosts > 1 else ""
        known = self.price.known
        if unknown.calls:
            of_them = f"{unknown.usd:.4f}" if known else f"{unknown.tokens} tokens"
            held = f", {of_them} of them reserved for {unknown.calls} calls whose cost is not known"
        usd, next_usd = (f"{t.usd:.4f} USD" if known else "an unknown price" for t in (spent, wanted))
        return (
            f"budget.{cap} = {max(0, getattr(self.caps, cap))}{among} is used up ({spent.calls} calls, "
            f"{spent.tokens} tokens, {usd} spent{held}; the next call may take {wanted.tokens} tokens, "
            f"{next_usd}): "
            "raise it "
            "and start again to go on from the checkpoint"
        )

    def settle(
        self, call: int, status: str, billed=None, *, price: Price | None = None, latency=0.0, error="", results=(),
        by="",
    ) -> float:  # fmt: skip
        """Puts what was billed in the reservation's place, writes the results down, and returns the dollars.

        An answer that does not say what it used stays spent in full; one that says more than it could is believed as
        `Journal.settle` says.

        Args:
          call: from `reserve`.
          status: see `Journal.settle`.
          billed: wire.Billed, or None.
          price: of the model that answered; None: nobody knows who did.
          latency: seconds.
          error: what went wrong.
          results: the journal rows that the answer brought.
          by: the model that answered, where it is another than the one asked for.
        """
        usage, bound = None, self.bounds.pop(call, (0, 0))
        may_be = [price] if price else self.prices if status == "unknown" else [self.price]
        price = (price or self.price).on(self.today())
        if billed is not None:
            usd = price.cost(billed.tokens_in, billed.tokens_cached, billed.tokens_out, billed.tokens_written)
            usage = (billed.tokens_in, billed.tokens_cached, billed.tokens_out, usd)
        try:
            counted = self.journal.settle(
                call, status, usage=usage, most_usd=self._most(may_be, *bound), caps=self.caps,
                latency=latency, error=error, results=results, by=by,
            )  # fmt: skip
        finally:
            self.in_flight -= 1
            self.settled.set()
        if status == "ok":
            self.spent_here += counted
            self.arrived += len(results)
        return counted.usd

    def left(self) -> dict[str, float]:
        """What each cap still allows; inf where there is none."""
        spent = self.journal.totals()
        names = ("usd", "tokens", "calls")
        return {
            k: max(0.0, getattr(self.caps, k) - getattr(spent, k)) if getattr(self.caps, k) else math.inf for k in names
        }

    def allowance(self, steps_left: int, rows: int, num_chunks: int, num_continuations: int) -> tuple[int, int]:
        """(M, N) that the rest of the budget pays for, spread evenly over the steps left.

        With `budget.on_exhausted = "stop"` always what was asked for. Goes by the mean cost of a continuation so far,
        of this process or, until one has arrived in it, of the journal; without any, nothing is lowered. At least 1
        each: a budget that is used up stops the run.

        Args:
          steps_left: optimizer steps still to come, this one included.
          rows: responses a step of the processes that share this disk's journal.
          num_chunks, num_continuations: what the config asks for.
        """
        if self.on_exhausted == "stop":
            return num_chunks, num_continuations
        spent, arrived = (self.spent_here, self.arrived) if self.arrived else self.journal.bought()
        if not arrived:
            return num_chunks, num_continuations
        wanted = max(1, steps_left) * rows * num_chunks * num_continuations
        left, share = self.left(), 1.0
        for name in left:
            mean = getattr(spent, name) / arrived
            if mean > 0:
                share = min(share, left[name] / (mean * wanted))
        if self.on_exhausted == "fewer_audits":
            return max(1, math.floor(num_chunks * share)), num_continuations
        return num_chunks, max(1, math.floor(num_continuations * share))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Low, middle and high of a run's calls, tokens, dollars and hours."""

    calls: tuple[float, float, float]
    tokens_in: tuple[float, float, float]
    tokens_out: tuple[float, float, float]
    usd: tuple[float, float, float]
    hours: tuple[float, float, float]
    price_known: bool = True

    def table(self) -> str:
        """Plain text, one row a quantity."""
        rows = [("", "low", "middle", "high")]
        for name, form in (
            ("calls", ",.0f"),
            ("tokens_in", ",.0f"),
            ("tokens_out", ",.0f"),
            ("usd", ",.2f"),
            ("hours", ",.2f"),
        ):
            unknown = name == "usd" and not self.price_known
            rows.append((name, *("unknown" if unknown else format(value, form) for value in getattr(self, name))))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows)


def estimate(
    cfg, price: Price, *, takes_n: bool, latency_s: tuple[float, float], steps: int | None = None, most: int = 128,
    asks: dict[str, int] | None = None, prompts: float = math.inf,
) -> Estimate:  # fmt: skip
    """What the run will ask of the teacher, before the first call.

    Low: short prompts and answers, repeated input from the provider's cache, fast answers; high: every length at its
      cap, nothing cached, slow answers, one call in ten repeated. Middle: half the caps, half of the repeated input
      cached.

    Args:
      cfg: the recipe.
      price: from `price()`, of the day on which the run goes on.
      takes_n: whether one call brings several continuations of a chunk (the probe's answer).
      most: how many at most.
      latency_s: (median, slow) seconds a call of PROBE_TOKENS, measured by the probe; a longer text may take as much
        longer.
      steps: optimizer steps still to come; `cfg.num_steps` by default.
      prompts: how many different ones there are: a whole solution is bought once for each.
      asks: {what the objective asks for: how many of it (BOUGHT)}; None: continuations at the peaks.
    """
    t = cfg.teacher
    steps = cfg.num_steps if steps is None else steps
    bought = {"continuations": 1} if asks is None else asks
    calls, tokens_in, tokens_out, usd, hours = ([0.0] * 3 for _ in range(5))
    examples = len(read_preamble(t.preamble, "teacher.preamble").encode())
    for what, count in bought.items():
        if what not in BOUGHT:
            continue
        one = BOUGHT[what](cfg, most if takes_n else 1, count)
        in_front = [examples / each if what != "logp" else 0.0 for each in BYTES]
        asked = steps * cfg.prompts_per_step
        if what == "solutions":
            asked = min(asked, prompts)
        slowest = latency_s[1] * max(1.0, one.longest / PROBE_TOKENS)
        slow = (latency_s[0], (latency_s[0] + slowest) / 2, slowest)
        cached = (one.again, one.again / 2, 0.0) if price.cached < price.input else (0.0,) * 3
        for i, repeats in enumerate((1.0, 1.02, 1.1)):
            n = asked * one.calls[i] * repeats
            sent, written = n * (one.sent[i] + in_front[i]), n * one.written[i]
            again = sent * cached[i]
            usd[i] += price.cost(sent, again, written, (sent - again) if price.written > price.input else 0)
            calls[i], tokens_in[i], tokens_out[i] = calls[i] + n, tokens_in[i] + sent, tokens_out[i] + written
            hours[i] += n * slow[i] / t.max_concurrency / 3600
    if t.requests_per_minute:
        hours = [max(h, c / t.requests_per_minute / 60) for h, c in zip(hours, calls)]
    if t.tokens_per_minute:
        hours = [max(h, (i + o) / t.tokens_per_minute / 60) for h, i, o in zip(hours, tokens_in, tokens_out)]
    return Estimate(*map(tuple, (calls, tokens_in, tokens_out, usd, hours)), price.known)


def ends_early(cfg, least: Estimate, left: dict[str, float], steps: int) -> str:
    """A warning where what is left of a cap is less than the run takes at the least, with the step at which it will
    end; ''."""
    for name, low in (
        ("usd", least.usd[0]),
        ("tokens", least.tokens_in[0] + least.tokens_out[0]),
        ("calls", least.calls[0]),
    ):
        if steps and left[name] < low and not (name == "usd" and not least.price_known):
            form = ".2f" if name == "usd" else ",.0f"
            last = cfg.num_steps - steps + math.floor(steps * left[name] / low)
            then = (
                "the run will stop" if cfg.budget.on_exhausted == "stop" else f"{cfg.budget.on_exhausted} begins early"
            )
            return (
                f"warning: budget.{name} leaves {left[name]:{form}}, and the {steps} steps to come take {low:{form}} "
                "at the "
                f"least: {then}, at about step {last} of {cfg.num_steps}"
            )
    return ""


BYTES = (5.0, 4.0, 3.0)  # of a token of the worked examples in front of a prompt: low, middle, high
SHARES = (0.25, 0.5, 1.0)  # of the caps on lengths: low, middle, high


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one kind of question takes: calls a prompt, tokens in and out a call (low, middle, high each), the share of
    the input that an earlier call has sent, tokens of the longest answer."""

    calls: list[float]
    sent: list[float]
    written: list[float]
    again: float
    longest: int


def _audits(cfg, most, _) -> Asked:
    a = cfg.audit
    fit = [min(1.0, share * cfg.max_completion_length / (a.num_chunks * a.chunk_tokens)) for share in SHARES]
    n = (a.num_continuations,) * 3
    if a.adaptive:  # every chunk is settled after the first round, after half of them, never
        n = (a.adaptive_first, (a.adaptive_first + a.num_continuations) / 2, a.num_continuations)
        each_round = -(-a.adaptive_first // most)
        per_audit = [math.ceil(k / a.adaptive_first) * each_round for k in n]
    else:
        per_audit = [-(-a.num_continuations // most)] * 3
    calls = [cfg.num_generations * a.num_chunks * per * f for per, f in zip(per_audit, fit)]
    sent = [share * (cfg.max_prompt_length + cfg.max_completion_length / 2) for share in SHARES]
    written = [a.chunk_tokens * k / per * share for k, per, share in zip(n, per_audit, (0.8, 0.95, 1.0))]
    return Asked(calls, sent, written, 1 - 1 / (per_audit[1] * a.num_chunks), a.chunk_tokens)


def _solutions(cfg, most, count) -> Asked:
    """`count` whole answers per prompt."""
    per_prompt = -(-count // most)
    written = [count / per_prompt * cfg.max_completion_length * share for share in SHARES]
    sent = [share * cfg.max_prompt_length for share in SHARES]
    return Asked([per_prompt] * 3, sent, written, 1 - 1 / per_prompt, cfg.max_completion_length)


def _prefixes(cfg, _, count) -> Asked:
    """A text behind each cut. Answers that end before theirs have none: a quarter, half or all reach it."""
    c, length = cfg.continuation, cfg.max_completion_length
    calls, longest = cfg.num_generations * c.cuts * count, c.max_tokens or length
    k = min(c.cut_tokens * (c.cuts + 1) / 2, length) if c.cut == "fixed" else length / 2
    shares = SHARES if c.cut == "fixed" else (1.0, 1.0, 1.0)
    sent = [share * cfg.max_prompt_length + (k if c.cut == "fixed" else share * k) for share in SHARES]
    return Asked([calls * s for s in shares], sent, [share * longest for share in SHARES], 1 - 1 / c.cuts, longest)


def _scores(cfg, _most, _) -> Asked:
    """Log-probs of the student's answers: one token is written in each call."""
    sent = [share * (cfg.max_prompt_length + cfg.max_completion_length) for share in SHARES]
    return Asked([cfg.num_generations] * 3, sent, [1] * 3, 0.0, 1)


BOUGHT = {"continuations": _audits, "solutions": _solutions, "prefixes": _prefixes, "logp": _scores}
