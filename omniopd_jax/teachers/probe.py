"""The capability probe: before any weights load, find out what the teacher can do, and how to make it continue.

It asks four to some twenty short questions, through the same traffic, budget and journal as the run. The answers choose
`teacher.continuation = auto`, are printed as a table and saved as `<run_dir>/teacher_probe.json`. What cannot work as a
teacher (not reachable, key refused, hidden reasoning that cannot be switched off, an answer that is always started
over) stops the run here with what to change.
"""

import asyncio
import dataclasses
import hashlib
import json
import statistics
import time

from omniopd_jax import config
from omniopd_jax.errors import TeacherStopped, UserError
from omniopd_jax.run import host
from omniopd_jax.teachers import traffic, wire
from omniopd_jax.teachers.budget import PROBE_TOKENS
from omniopd_jax.teachers.protocol import Continuation, Failure
from omniopd_jax.teachers.traffic import TWICE_MORE, now
from omniopd_jax.teachers.wire import instruct, scoring

COUNT = (
    {"role": "user", "content": "Write the numbers from one to twenty as English words, separated by single spaces."},
)
PREFIX = "one two three four five six seven"
WORD, REST = "one two three four five six sev", "en"  # cut inside a word
OPEN = ({"role": "user", "content": "Invent the first sentence of a story about an animal and a place."},)
OPEN_PREFIX = "In a village that no map has ever shown,"
WHO = "probe"  # who asks, in the journal
THOUGHTS = ("<think", "<thinking", "<|channel|>analysis", "<reasoning")  # how open models begin to think
PATIENCE_S = 30.0  # a question, or one call's time where that is longer: a server's first answer may take a minute


@dataclasses.dataclass(frozen=True)
class ProbeReport:
    """What the probe found: the mode, rows of (question, answer), (median, slow) seconds and dollars a call."""

    model: str
    mode: str
    rows: tuple[tuple[str, str], ...]
    latency_s: tuple[float, float]
    usd_per_call: float
    calls: int
    answering: str = ""  # the model that answered, where it is another than the one asked for
    price_known: bool = True
    thinks: str = ""  # how an answer to an empty prefix begins: with `hidden` or `open` thoughts, or none

    def table(self) -> str:
        """Plain text, one row a question."""
        width = max(len(question) for question, _ in self.rows)
        return "\n".join(f"{question.ljust(width)}  {answer}" for question, answer in self.rows)

    def line(self) -> str:
        """The one line for the log."""
        cost = f"{self.usd_per_call:.6f} USD" if self.price_known else "an unknown price"
        return (
            f"teacher {self.model!r}: continues by {self.mode!r}, {self.latency_s[0]:.2f} s and "
            f"{cost} a call ({self.calls} calls probed)"
        )


async def probe_teacher(teacher) -> ProbeReport:
    """Probes a `RemoteTeacher`; the outcome goes to its journal and run folder. Raises `UserError` (see `probe`)."""
    return await _Probe(teacher).run()


class _Probe:
    def __init__(self, teacher):
        self.teacher, self.client, self.t = teacher, teacher.client, teacher.cfg.teacher
        self.rows, self.latencies, self.usd, self.calls = [], [], 0.0, 0
        self.thinks, self.greedy, self.asked = "", False, False
        # answers of a probe that did not end well are not believed again: what was wrong may be corrected by now
        t = self.t
        self.replays = t.replay != "off" and bool(teacher.journal.report(t.provider, t.model, t.continuation))

    async def run(self) -> ProbeReport:
        """Asks all questions; `probe_teacher`."""
        ended_well = False
        try:
            report = await self._run()
            ended_well = not self.greedy
            return report
        finally:
            if self.asked and not ended_well:
                self.teacher.journal.forget(WHO, 0)

    async def _run(self) -> ProbeReport:
        start = time.monotonic()
        await self._reach()
        if self.teacher.scores:
            mode = await self._score()
        else:
            mode = await self._choose()
            await self._sampling(mode)
        slow = max(self.latencies)
        latency = (statistics.median(self.latencies), slow)
        usd = self.usd / max(1, self.calls)
        known = self.teacher.price.known
        price, spent = (f"{d:.6f} USD" if known else "price unknown" for d in (usd, self.usd))
        self._row("one call", f"{latency[0]:.2f} s (slowest {slow:.2f} s), {price} for {PROBE_TOKENS} tokens")
        replayed = len(self.latencies) - self.calls
        kept = f", {replayed} answers from the journal" if replayed > 0 else ""
        self._row("probe", f"{self.calls} calls{kept}, {time.monotonic() - start:.1f} s, {spent}")
        answering = self.teacher.answering
        if answering:
            self._row("answered by", f"{answering}, not {self.client.model}")
        rows = tuple(self.rows)
        report = ProbeReport(self.client.model, mode, rows, latency, usd, self.calls, answering, known, self.thinks)
        self._save(report)
        return report

    def _row(self, question, answer):
        self.rows.append((question, wire.scrub(answer)))

    def _save(self, report):
        self.teacher.journal.put_mode(
            self.t.provider, self.client.model, self.t.continuation, report.mode, dataclasses.asdict(report)
        )
        path = config.local_folder(self.teacher.cfg) / "teacher_probe.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        host.write_whole(path, json.dumps(dataclasses.asdict(report), indent=1) + "\n")

    def _where(self):
        return f"the teacher {self.client.model!r} at {wire.scrub(self.client.url)}"

    async def _reach(self):
        try:
            said = await self._reached()
        except wire.CallError as e:
            if e.outcome == "rejected" and e.kind == "stop":
                raise UserError(self._refusal(e)) from None
            if e.outcome != "rejected":
                between = wire.http.in_between(self.client.url, str(e))
                raise UserError(
                    f"{self._where()} is not reachable ({e}): start it, or set teacher.base_url, network or "
                    f"proxy{between}"
                ) from None
            said = str(e)
        self._row("service", f"{self.t.provider}, {self.client.model}, {wire.scrub(self.client.url)}")
        self._row("reachable, key accepted", f"yes; {said}" if said else "yes")

    async def _reached(self) -> str:
        """What the service says of itself, asked again as a question is; nothing listens: at once."""
        tries = 0
        while True:
            try:
                return await self.client.reach()
            except wire.CallError as e:
                nobody = e.outcome == "unsent" and e.status is None
                if e.kind != "retry" or nobody or tries == TWICE_MORE:
                    raise
                wait = e.retry_after or traffic.FIRST_BACKOFF_S * 2**tries
            tries += 1
            await asyncio.sleep(min(wait, self.t.deadline_s))

    def _refusal(self, error) -> str:
        if error.status in (401, 403):
            names = " or ".join(wire.KEYS[self.t.provider])
            return f"{self._where()} refuses the key ({error}): set {names} to a valid one"
        return f"{self._where()} cannot be used: {error}"

    async def _ask(self, messages, prefix, mode, *, n=1, seed=1, greedy=False) -> wire.Reply:
        """One question; what the service refuses is left out as in the run. Raises `CallError` or `UserError`."""
        temperature = 0.0 if greedy else float(self.t.temperature)
        while True:
            call = wire.Call(messages, prefix, n, PROBE_TOKENS, temperature, float(self.t.top_p), seed, mode)
            try:
                reply = await self._send(call)
            except wire.CallError as e:
                if self.client.learn(e, call):
                    n = n if self.client.seen.takes_n else 1
                    continue
                raise
            if reply.tokens_hidden or any("<think>" in text.text for text in reply.texts):
                if self.client.silence():
                    continue
                cost = self.teacher.price.output * reply.tokens_hidden / 1e6
                paid = f", {cost:.6f} USD a call" if self.teacher.price.known and cost else ""
                raise UserError(
                    f"{self._where()} spends its tokens on hidden reasoning ({reply.tokens_hidden} of "
                    f"{reply.stated.tokens_out}{paid}) and it cannot be switched off: choose a model that does not, or "
                    "set teacher.chat_template_kwargs.enable_thinking = False where the server takes it"
                )
            return reply

    async def _send(self, call) -> wire.Reply:
        """One question: from the journal, where this teacher has been asked it before, else through the run's own
        traffic.

        Raises:
          CallError: refused, or not answered. A refusal is kept in the journal too.
          UserError: no call can work.
        """
        key, self.asked = self._key(call), True
        known = self.teacher.journal.get(key, WHO, 0, (0,)) if self.replays else {}
        if known:
            return self._replayed(known[0], call)
        began, patience = now(), min(max(PATIENCE_S, self.t.timeout_s), self.t.deadline_s)
        deadline = self.teacher.traffic.deadline(patience)

        def accept(reply):
            self.latencies.append(now() - began)
            text = wire.hide_keys(json.dumps(dataclasses.asdict(reply) | {"latency": self.latencies[-1]}))
            return [(key, WHO, 0, Continuation(0, text, "probe"), None)]

        try:
            sent = await self.teacher.traffic.send(call, key, deadline=deadline, accept=accept, fail_fast=True)
        except TeacherStopped as e:
            raise UserError(f"{self._where()}: {e}") from None
        except wire.CallError as e:
            if e.kind == "refused" and e.status in (400, 422):
                about = json.dumps({"message": str(e), "status": e.status, "field": e.field, "outcome": e.outcome})
                self.teacher.journal.put_failure(key, WHO, 0, Failure(0, about))
            raise
        self.usd += sent.usd
        self.calls += sent.attempts
        return sent.reply

    def _key(self, call) -> bytes:
        """What a question is found by: all that decides how it goes out and who answers."""
        about = [
            self.t.provider,
            self.client.model,
            self.client.url,
            self.t.tokenizer,
            self.t.chat_template_kwargs.to_dict(),
        ]
        about += [
            sorted(self.client.seen.dropped),
            sorted(self.client.extra),
            wire.VERSION,
            instruct.VERSION,
            scoring.VERSION,
        ]
        content = json.dumps(["probe", *about, dataclasses.asdict(call)], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).digest()

    def _replayed(self, known, call) -> wire.Reply:
        """An answer as the journal has it. Raises `CallError` where it was a refusal."""
        if isinstance(known, Failure):
            about = json.loads(known.error)
            raise wire.CallError(
                about["message"], "refused", status=about["status"], field=about["field"], outcome=about["outcome"]
            )
        kept = json.loads(known.text)
        self.latencies.append(kept["latency"])
        reply = wire.Reply(
            tuple(wire.Text(**t) for t in kept["texts"]), tuple(kept["logp"]),
            wire.Billed(**kept["billed"]) if kept["billed"] else None, kept["tokens_hidden"], model=kept["model"],
        )  # fmt: skip
        self.teacher.served(reply.model)
        if isinstance(call, wire.Call):
            self.client.seen.answered(call, len(reply.texts))
        return reply

    async def _score(self) -> str:
        """The first way that gives log-probs of a prompt's tokens, for a teacher that scores (`opd`)."""
        tokenizer, said = self.client.tokenizer, []
        prompt, answer = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (self.client.render(COUNT), PREFIX)
        )
        for way in scoring.WAYS:
            try:
                reply = await self._send(wire.ScoreCall(prompt, answer, way))
            except wire.CallError as e:
                if e.outcome != "rejected":
                    raise UserError(f"{self._where()} does not answer: {e}") from None
                said.append(f"{way}: {e}")  # some servers answer 500 to what they do not know
                continue
            for token, text in zip((*prompt, *answer), reply.texts):
                there, here = text.text.strip(), tokenizer.decode([token]).strip()
                if there and here and "\ufffd" not in there + here and there != here:
                    raise UserError(
                        f"{self._where()} has another tokenizer than the student: its token {token} is {there!r}, the "
                        f"student's {here!r}; objective.name = 'opd' needs the same one"
                    )
            self._row("log-probs of a prompt", f"by {way}, for the ids that were sent")
            self._row("log-prob of 'one two ... seven'", f"{sum(reply.logp):.3f} nats in {len(answer)} tokens")
            return way
        raise UserError(
            f"{self._where()} gives no log-probs of a prompt ({'; '.join(said)}), which objective.name = 'opd' needs: "
            "serve it "
            "with vLLM or SGLang, or load it here with teacher.provider = 'local'"
        )

    async def _choose(self) -> str:
        """The configured mode, or the first that really continues; one that could not be told comes last."""
        asked = self.t.continuation
        modes = self.client.modes() if asked == "auto" else (asked,)
        verdicts = {}
        for mode in modes:
            verdicts[mode] = await self._try(mode)
            if verdicts[mode] == "continues":
                break
        unclear = [m for m, v in verdicts.items() if v == "unclear"]
        if not self.client.official:  # any server takes a last assistant turn: that alone says nothing
            unclear.sort(key=lambda mode: mode == "prefill")
        good = [m for m, v in verdicts.items() if v == "continues"] + unclear
        if not good:
            said = "; ".join(f"{m}: {v}" for m, v in verdicts.items())
            raise UserError(
                f"{self._where()} does not continue an unfinished answer ({said}): set teacher.continuation = 'auto', "
                "another mode, or choose another teacher"
            )
        mode = good[0]
        self._row("mode", mode + ("" if verdicts[mode] == "continues" else " (accepted, but not seen to continue)"))
        self._row("texts a call", "n" if self.client.seen.takes_n else "one")
        return mode

    async def _try(self, mode) -> str:
        """What a mode comes to: the best of up to three answers, since a teacher samples and a service has bad
        moments."""
        seen = []
        while len(seen) < 3 and "continues" not in seen:
            try:
                # 2, not the run's N: enough to see whether n is honoured
                reply = await self._ask(COUNT, PREFIX, mode, n=2 if self.client.seen.takes_n else 1, seed=len(seen) + 1)
            except wire.CallError as e:
                if e.kind == "retry":
                    raise UserError(f"{self._where()} does not answer: {e}") from None
                if e.field == "firewall":
                    raise UserError(f"{self._where()} cannot be used, something before it refuses: {e}") from None
                self._row(f"continues by {mode}", f"refused: {e}")
                return f"refused: {e}"
            seen.append(verdict(reply.texts[0].text, mode))
        best, text = next(v for v in ("continues", "restarts", "unclear") if v in seen), reply.texts[0].text
        if mode not in ("completion", "instruct"):  # the server's template may have closed the turn
            if best == "continues" and not text[:1].isspace():
                best, text = await self._inside_a_word(mode)
            elif best == "unclear" and self.t.continuation == "auto" and not self.client.official:
                best = await self._again_from_the_middle(mode)
        self._row(f"continues by {mode}", f"{best}: {text[:60]!r}")
        return best

    async def _inside_a_word(self, mode) -> tuple[str, str]:
        """(`continues` or `restarts`, the last text) of a count that is cut inside a word.

        Asked where a text came without the space in front: a server that closes the last turn and begins another one
        lets a model go on counting there too, but none begins a turn with the rest of a word.
        """
        for seed in (1, 2, 3):
            try:
                reply = await self._ask(COUNT, WORD, mode, seed=seed)
            except wire.CallError as e:
                raise UserError(f"{self._where()} does not answer: {e}") from None
            text = reply.texts[0].text
            if text.startswith(REST):
                return "continues", text
        return "restarts", text

    async def _again_from_the_middle(self, mode) -> str:
        """What a teacher that cannot count does: a greedy text that is cut and put behind the prefix must go on there.

        In a turn of its own it would begin again.
        """
        try:
            whole = (await self._ask(OPEN, OPEN_PREFIX, mode, greedy=True)).texts[0].text
            cut = whole.find(" ", len(whole) // 3)
            if cut < 1:
                return "unclear"
            rest = (await self._ask(OPEN, OPEN_PREFIX + whole[:cut], mode, greedy=True)).texts[0].text
        except wire.CallError:  # some services take no temperature
            return "unclear"
        return "continues" if rest[:8] == whole[cut : cut + 8] else "restarts"

    async def _whole(self, mode) -> tuple[str, str]:
        """(what an empty prefix gets, how it thinks: `hidden`, `open` or ""), as first chunks and whole solutions do.

        Only here a teacher that thinks shows it: with a prefix it goes on with an answer that has begun. One that
        thinks out of sight is asked once more with its reasoning switched off, as far as the service takes that.
        """
        call = wire.Call(OPEN, "", 1, PROBE_TOKENS, float(self.t.temperature), float(self.t.top_p), 13, mode)
        while True:
            try:
                reply = await self._send(call)
            except wire.CallError as e:
                if self.client.learn(e, call):
                    continue
                return f"refused: {e}", ""
            if reply.tokens_hidden and self.client.silence():
                continue
            return begins(reply)

    async def _sampling(self, mode):
        """Does it sample, keep the seed, the cap on tokens and leading whitespace?"""
        n = 3 if self.client.seen.takes_n else 1
        try:
            first = await self._ask(OPEN, OPEN_PREFIX, mode, n=n, seed=11)
            again = await self._ask(OPEN, OPEN_PREFIX, mode, seed=11)
            other = await self._ask(OPEN, OPEN_PREFIX, mode, seed=12)
        except wire.CallError as e:
            raise UserError(f"{self._where()} does not answer: {e}") from None
        texts = [reply.texts[0].text for reply in (first, again, other)]
        if len(first.texts) > 1 and len({text.text for text in first.texts}) == 1 and texts[0] != texts[2]:
            self.client.seen.takes_n = False
            self._row("texts of one call", "all the SAME: asked one by one, each with a seed of its own")
        self.greedy = len(set(texts)) == 1 and self.t.temperature > 0
        self._row(
            f"samples at temperature {self.t.temperature:g}",
            "NO: three answers are equal; a greedy teacher makes k_sem 0 or N (is do_sample on?)"
            if self.greedy
            else "yes",
        )
        seeded = self.client.takes_seed and "seed" not in self.client.seen.dropped
        self._row(
            "seed", ("repeats" if texts[0] == texts[1] else "accepted, does not repeat") if seeded else "not taken"
        )
        most = max(-(-reply.stated.tokens_out // len(reply.texts)) for reply in (first, again, other))
        self._row("max_tokens", f"kept: {most} of {PROBE_TOKENS}" if most <= PROBE_TOKENS else f"NOT kept: {most}")
        self._row("leading whitespace", "kept" if any(text[:1].isspace() for text in texts) else "not seen")
        said, self.thinks = await self._whole(mode)
        self._row("hidden reasoning", "none in continuations" if self.thinks else "none")
        self._row("a whole answer", said)
        left_out = ", ".join(sorted(self.client.seen.dropped))
        if left_out:
            self._row("left out (refused)", left_out)


def begins(reply) -> tuple[str, str]:
    """(how an answer to an empty prefix begins, `hidden`, `open` or "": with thoughts out of sight, seen, or none)."""
    text = reply.texts[0].text.lstrip()
    if reply.tokens_hidden:
        said = f"begins with hidden thoughts ({reply.tokens_hidden} tokens): first chunks and solutions are cut short"
        return f"{said} by them; switch its thinking off, or raise the caps", "hidden"
    if text.startswith(THOUGHTS):
        off = "teacher.chat_template_kwargs.enable_thinking = False"
        return f"begins with its thoughts ({text[:20]!r}): {off}, unless the student thinks", "open"
    return "begins with the answer", ""


def verdict(text: str, mode: str) -> str:
    """`continues`, `restarts` or `unclear`: what a teacher made of the unfinished count."""
    if mode == "instruct":
        cut = instruct.cut(PREFIX, text)
        text = "one" if cut is None else cut
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    if words[:1] == ["eight"]:
        return "continues"
    return "restarts" if words[:1] == ["one"] else "unclear"
