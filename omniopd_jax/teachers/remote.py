"""A teacher behind a service: the journal first, then the wire, in the mode that the probe chose."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import weakref

import numpy as np

from omniopd_jax import config
from omniopd_jax.errors import TeacherStopped, UserError
from omniopd_jax.hf import hub
from omniopd_jax.run.files import place
from omniopd_jax.teachers import budget as money
from omniopd_jax.teachers import probe, wire
from omniopd_jax.teachers.journal import Journal, folder_of
from omniopd_jax.teachers.protocol import (
    LOGP,
    TEXT,
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    Counts,
    Failure,
    PaidTeacher,
    Usage,
    gather_all,
    whole_characters,
)
from omniopd_jax.teachers.traffic import Traffic, now
from omniopd_jax.teachers.wire import instruct, scoring

MAX_REFUSED = 16  # requests in a row, each refused: it is the settings, not the request
MANY_PROMPTS = 4  # of as many prompts among them: it is not what one of them says
SCORE = "score"  # who asks for log-probs: they depend on the tokens alone
MAX_FAILED = 20  # calls in a row, over all requests: the service is gone


class RemoteTeacher(PaidTeacher):
    """Composes a provider's client with traffic, budget and journal.

    Raises:
      UserError: a missing key or price, a bad address, an unsound journal.
    """

    def __init__(self, cfg, client, needs: str = TEXT):
        t = cfg.teacher
        if not t.model:
            raise UserError(f"teacher.model is empty: name the model of teacher.provider = {t.provider!r}")
        self.cfg, self.client, self.replay, self.prompts = cfg, client, t.replay, np.inf
        if self.replay != "only":
            client.check_settings()
        self.answering = ""  # the model that wrote the last reply, where it is another than the one asked for
        self.prices = {"": self._price_of(t.model)}  # of each that has answered
        folder = folder_of(cfg)
        if self.replay == "only" and not folder.is_dir():
            raise UserError(f"teacher.replay = 'only' needs a journal: teacher.journal = {str(folder)!r} is no folder")
        self.journal = Journal(folder, str(place(cfg.run_dir)))
        self.budget = money.Budget(cfg, self.journal, self.price)
        self.traffic = Traffic(
            cfg, client, self.budget, served=self.served, most_in=client.max_input_tokens, stopped=lambda: self.stopped
        )
        # known to be the student's own only where both are named; else continuations are trimmed by characters
        self.foreign_tokenizer = not _same_tokenizer(t.tokenizer, cfg.student.path)
        self.scores = needs == LOGP  # asked for log-probs in the place of text: the mode is a way of scoring
        self.mode = None if t.continuation == "auto" or self.scores else t.continuation
        self.asking = weakref.WeakValueDictionary()  # key of a score -> the lock of those who want it
        self.loop = self.resolving = None
        self.stood_in = None  # models that earlier versions kept this one's texts under; looked for when one is missed
        self.running, self.refused, self.refused_prompts = set(), 0, set()  # tasks with calls out; refusals in a row
        self.doubtful = []  # failures by those refusals, for the journal: see `refuse`
        self.stopped = None  # the first TeacherStopped: what still waits for its turn is not tried
        self.counts = Counts()

    # the protocol

    async def check(self) -> str:
        """Probes the teacher (or, with `replay = only`, opens the journal) and returns one line; the table is `report`.

        Raises:
          UserError: unreachable, refused, or impossible as a teacher, and what to change.
        """
        if self.replay == "only":
            return f"teacher {self.client.model!r}: replay of {self.journal.count()} journal entries, no connection"
        await self._bind()
        self.report = await probe.probe_teacher(self)
        self.mode = self.report.mode
        return self.report.line()

    async def continue_text(self, request: ContinuationRequest) -> ContinuationResult:
        """Answers from the journal where `replay` allows it, and asks the rest. Raises only `TeacherStopped`."""
        start = now()
        try:
            mode = await self._mode()
            key, about = self._key(request, mode)
            known = self._recall(key, request, mode)
            missing = tuple(i for i in request.indices if i not in known)
            usage = Usage()
            if missing and self.replay == "only":
                raise TeacherStopped(
                    f"teacher.replay = 'only': journal {str(self.journal.folder)!r} has no continuation {missing[0]} "
                    f"of sample {request.sample_id} at peak {request.peak} by these settings ({self.client.model!r}, "
                    f"{mode!r}); set teacher.replay = 'prefer' to ask for what is missing"
                )
            if missing:
                with self._under_way():
                    fresh, usage = await _Audit(self, request, mode, key).run(missing, about)
                known |= fresh
        except Exception as e:
            raise self._stop(e) from e.__cause__
        entries = [known[i] for i in request.indices]
        failures = tuple(e for e in entries if isinstance(e, Failure))
        replayed = len(request.indices) - len(missing)
        continuations = tuple(e for e in entries if isinstance(e, Continuation))
        return self.counts.add(ContinuationResult(continuations, failures, usage, now() - start, replayed))

    async def score_tokens(self, messages, prompt_ids, token_ids) -> np.ndarray:
        """White-box baseline: the teacher's log-prob of each of `token_ids` after `prompt_ids`; float32
        [len(token_ids)], nats.

        From the journal where `replay` allows it. A score is never left out: what cannot be had ends the run.

        Raises:
          TeacherStopped: no answer, a refusal, or log-probs that are not for these tokens.
        """
        if not len(token_ids):
            return np.zeros(0, np.float32)
        start = now()
        try:
            key, about = scoring.key(self.cfg, self.client.model, prompt_ids, token_ids)
            text, usage = self._known_score(key), Usage()
            if text is None and self.replay == "only":
                raise TeacherStopped(
                    f"teacher.replay = 'only': journal {str(self.journal.folder)!r} has no log-probs of these "
                    f"{len(token_ids)} tokens by {self.client.model!r}; set teacher.replay = 'prefer' to ask for them"
                )
            replayed = int(text is not None)
            if text is None:
                with self._under_way():
                    text, usage = await self._score(key, about, messages, prompt_ids, token_ids)
        except Exception as e:
            raise self._stop(e) from e.__cause__
        score = Continuation(0, text, SCORE)
        self.counts.add(ContinuationResult((score,), (), usage, now() - start, replayed))
        return np.array(json.loads(text), np.float32)

    async def close(self) -> None:
        """Ends what is under way, which stays spent, then closes connections and the journal."""
        mine = [task for task in self.running if task.get_loop() is asyncio.get_running_loop()]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        await self.client.close()
        if not self.stopped:  # else what was refused may have been the settings' fault
            self.believe_refusals()
        self.journal.close()

    # for the loop

    def metrics(self) -> dict[str, float]:
        """`teacher/*` since the last time this was called; `cost_usd_total` counts all that the journal has seen."""
        return self.counts.take() | {
            "teacher/cost_usd_total": self.journal.totals().usd,
            "teacher/price_known": int(self.price.known),
        }

    def forecast(self, steps: int | None = None, part: float = 1.0) -> str:
        """`estimate` as a table, and a warning where the budget will not last; plain text."""
        estimate = self.estimate(steps, part)
        steps = self.cfg.num_steps if steps is None else steps
        left = {name: self.budget.hosts * part for name, part in self.budget.left().items()}
        warning = money.ends_early(self.cfg, estimate, left, steps)
        if not self.price.known:
            warning = "\n".join(filter(None, (
                f"the price of {self.client.model!r} is not known, and with it what the run costs: set "
                "teacher.price_input and "
                "teacher.price_output (USD per million tokens)", warning,
            )))  # fmt: skip
        return estimate.table() + (f"\n{warning}" if warning else "")

    def estimate(self, steps: int | None = None, part: float = 1.0) -> money.Estimate:
        """Calls, tokens, dollars and hours still to come, each with a range; at the probed latency after `check`.

        `part`: of the prompts, where they have several teachers.
        """
        steps = (self.cfg.num_steps if steps is None else steps) * part
        how = {"takes_n": bool(self.client.seen.takes_n), "most": self.client.most_texts, "asks": self.asks}
        how |= {"latency_s": self.report.latency_s if self.report else money.LATENCY_S, "prompts": self.prompts}
        return money.estimate(self.cfg, self.price.on(self.budget.today()), steps=steps, **how)

    def take_rows(self, names: list[str]) -> None:
        """Counts the training prompts that are its own."""
        self.prompts = len(names)

    # inside

    @property
    def price(self) -> money.Price:
        """Of the model that answers; known where that of each that has answered is."""
        return dataclasses.replace(self.prices[self.answering], known=all(p.known for p in self.prices.values()))

    def _price_of(self, model: str) -> money.Price:
        client = self.client
        return money.price(self.cfg, self_hosted=client.self_hosted, official=client.official, model=model)

    def served(self, model: str) -> tuple[money.Price, str]:
        """(price of a reply, who wrote it where that is another model than the one asked for, else ""), by what it
        calls its model; one that says nothing is taken for the last one's. Another model is reported once.

        Raises:
          TeacherStopped: it is another one and `teacher.pin_model` is set, or its price is not known and a budget needs
          it.
        """
        by = self.answering
        if model:
            same = wire.same_model(self.client.model, model, not self.client.official)
            by = "" if same else wire.scrub(model)[:80]
        if by not in self.prices:
            said = wire.scrub(f"teacher.model = {self.client.model!r} was asked, and {by!r} answers")
            if self.cfg.teacher.pin_model:
                raise TeacherStopped(
                    f"{said}; teacher.pin_model allows no other: set teacher.model to one that is served"
                )
            try:
                self.prices[by] = self._price_of(by)
            except UserError as e:
                raise TeacherStopped(f"{said}: {e}") from None
            self.budget.prices.append(self.prices[by])
            kept = "" if self.client.self_hosted else "; its texts are kept as its and priced as its"
            self.traffic.report(f"warning: {said}{kept}")
        self.answering, self.budget.price = by, self.prices[by]
        return self.prices[by], by

    @contextlib.contextmanager
    def _under_way(self):
        """Around what has calls out: `close` ends it."""
        task = asyncio.current_task()
        self.running.add(task)
        try:
            yield
        finally:
            self.running.discard(task)

    def refuse(self, error, prompt: str) -> bool:
        """Counts a request that the service refused. Returns whether the settings may be why, and not this prompt.

        Raises:
          TeacherStopped: they are.
        """
        answered = self.traffic.last_success > float("-inf")
        # this prompt's content, whose other prefixes are refused as well; or a prefix too long for the teacher
        if error.field == "withheld" or (error.field == "context" and answered):
            return False
        self.refused += 1
        self.refused_prompts.add(prompt)
        many = self.refused >= MAX_REFUSED and not (answered and len(self.refused_prompts) < MANY_PROMPTS)
        if error.field == "firewall" and answered and not many:
            return True  # what is in a few prompts may set one off
        if error.status in (403, 404) or error.field == "temperature" or many:
            advice = {
                "temperature": "set teacher.temperature = 1.0",
                "context": "its context is too short for the student's answers",
                "firewall": "something before the service refuses it: a firewall, or a proxy",
            }.get(error.field, "check teacher.model and base_url")
            self.journal.forget(probe.WHO, 0)  # what it once could do is asked again at the next start
            self.doubtful = []  # asked again once the settings are right
            raise TeacherStopped(f"the teacher {self.client.model!r} refuses what it is asked: {error}; {advice}")
        return True

    def believe_refusals(self) -> None:
        """The settings are right: what was refused since the last answer was refused for what it held."""
        self.refused, self.refused_prompts = 0, set()
        doubtful, self.doubtful = self.doubtful, []
        for row in doubtful:
            self.journal.put_failure(*row)

    async def _bind(self):
        """Ties connections and queues to the running event loop; a loop of its own a step works too."""
        loop = asyncio.get_running_loop()
        if self.loop is not loop:
            self.loop = loop
            self.traffic.bind()
            self.resolving = asyncio.Lock()
            await self.client.open()

    async def _mode(self) -> str:
        """The mode of continuing: configured, replayed from the journal, or probed once."""
        if self.mode is None and self.replay == "only":
            t = self.cfg.teacher
            self.mode = self.journal.mode(t.provider, self.client.model, t.continuation)
            if self.mode is None:
                raise TeacherStopped(
                    "teacher.replay = 'only': the journal has no probe of it; name the mode in teacher.continuation"
                )
        if self.replay != "only":
            await self._bind()
        if self.mode is None:
            async with self.resolving:
                if self.mode is None:
                    await self.check()
        return self.mode

    def _stop(self, error) -> TeacherStopped:
        """What ends the run, after a checkpoint; whoever still waits for a turn finds it and does not try."""
        stop = error if isinstance(error, TeacherStopped) else TeacherStopped(str(error))
        if not isinstance(error, UserError):
            what = (
                f"the teacher {self.client.model!r} failed in a way that is not foreseen "
                f"({type(error).__name__}: {error})"
            )
            stop = TeacherStopped(wire.scrub(" ".join(what.split())[:400]))
            stop.__cause__ = error  # for --verbosity=1
        self.stopped = self.stopped or stop
        self.traffic.end_queue()
        return stop

    def _known_score(self, key) -> str | None:
        found = self.journal.get(key, SCORE, 0, (0,)) if self.replay != "off" else {}
        return found[0].text if found else None

    async def _score(self, key, about, messages, prompt_ids, token_ids) -> tuple[str, Usage]:
        """Asks for a score; returns it as the journal holds it, JSON, and what was billed."""
        await self._mode()
        same = self.asking.setdefault(key, asyncio.Lock())  # two responses may be the same, to the last token
        async with same, self.traffic.order.turn(key.hex(), 0):
            if self.stopped:
                raise TeacherStopped(str(self.stopped))
            if (text := self._known_score(key)) is not None:
                return text, Usage()
            sent = [int(i) for i in (*prompt_ids, *token_ids)]
            self.journal.describe(key, about, messages, json.dumps(sent))
            first, deadline = len(prompt_ids), self.traffic.deadline(self.cfg.teacher.deadline_s)
            call = wire.ScoreCall(tuple(sent[:first]), tuple(sent[first:]), self.mode)
            rows = []

            def accept(reply):
                rows.append((key, SCORE, 0, Continuation(0, json.dumps(reply.logp), "score"), None))
                return rows

            try:
                sent = await self.traffic.send(call, key, deadline=deadline, accept=accept)
            except wire.CallError as e:
                raise TeacherStopped(
                    f"the teacher {self.client.model!r} gives no log-probs of {len(token_ids)} tokens after {first}: "
                    f"{e}; "
                    "objective.name = 'opd' can leave no answer out: start again to go on from the checkpoint"
                ) from None
            return rows[-1][3].text, _usage(sent)

    def _recall(self, key, request, mode) -> dict:
        """What the journal holds of a request, by index. Texts are kept under the model that was asked for; earlier
        versions kept them under the one that had answered in its place."""
        if self.replay == "off":
            return {}
        about, pinned = (request.sample_id, request.peak), self.cfg.teacher.pin_model
        found = self.journal.get(key, *about, request.indices, pinned=pinned)
        if len(found) < len(request.indices) and self.client.official and not pinned:
            if self.stood_in is None:
                self.stood_in = self.journal.stood_in(self.client.provider, self.client.model)
            for model in self.stood_in:
                rest = [i for i in request.indices if i not in found]
                found |= self.journal.get(self._key(request, mode, model)[0], *about, rest)
        return found

    def _key(self, request, mode, model: str = "") -> tuple[bytes, dict]:
        """(hash of what is asked, what it says in words); `model`: in the place of the one asked for."""
        t = self.cfg.teacher
        about = {
            "provider": t.provider,
            "model": model or self.client.model,
            "mode": mode,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "chat_template_kwargs": t.chat_template_kwargs.to_dict(),
            "tokenizer": t.tokenizer if mode == "completion" else "",
            **_own_format(t),
            "version": f"{wire.VERSION}.{instruct.VERSION if mode == 'instruct' else 0}",
        }
        content = json.dumps([about, list(request.messages), request.prefix], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).digest(), about


def _own_format(t) -> dict:
    """What identifies a prompt's format beside the tokenizer's own template; {} where that is it."""
    given = {"template": t.template, "preamble": t.preamble, "stop_strings": list(t.stop_strings)}
    default = {"template": "chat", "preamble": "", "stop_strings": []}
    out = {k: v for k, v in given.items() if v != default[k]}
    for key in out.keys() & {"template", "preamble"}:  # a file's content, not its name
        with contextlib.suppress(OSError, ValueError):
            out[key] = config.expanded(out[key]).read_text()
    return out


def _same_tokenizer(teacher: str, student: str) -> bool:
    """Whether both name the same tokenizer: the same place, or folders or hub names with equal tokenizer.json."""
    if not teacher or teacher == student:
        return bool(teacher)
    found = [_tokenizer_file(name) for name in (teacher, student)] if student else [None]
    return None not in found and found[0] == found[1]


def _tokenizer_file(name: str) -> bytes | None:
    with contextlib.suppress(UserError, OSError):
        return (hub.resolve(name, files=("tokenizer.json",)) / "tokenizer.json").read_bytes()
    return None


def _usage(sent) -> Usage:
    """What a call that was answered counts as."""
    b = sent.reply.stated
    return Usage(sent.attempts, sent.attempts - 1, b.tokens_in, b.tokens_cached, b.tokens_out, sent.usd)


class _Audit:
    """The wire side of one request: which calls to make, what they brought, what failed for good."""

    def __init__(self, teacher: RemoteTeacher, request, mode, key):
        self.teacher, self.request, self.mode, self.key = teacher, request, mode, key
        self.found, self.usage = {}, Usage()
        self.timed_out = False
        self.doubtful = set()  # indices refused by what may be wrong with the settings
        # no real continuation of so many tokens is longer; a runaway body must not fill memory and journal
        self.max_chars = max(4000, 40 * request.max_tokens)

    async def run(self, missing, about) -> tuple[dict, Usage]:
        """Asks for the missing indices; returns what became of each, and what was billed."""
        client, traffic = self.teacher.client, self.teacher.traffic
        async with traffic.order.turn(self.request.sample_id, self.request.peak) as answered:
            if self.teacher.stopped:
                raise TeacherStopped(str(self.teacher.stopped))
            self.teacher.journal.describe(self.key, about, self.request.messages, self.request.prefix)
            begun = now()
            deadline = traffic.deadline(self.teacher.cfg.teacher.deadline_s)
            await self._ask(missing[: client.most_texts] if client.seen.takes_n else missing[:1], missing, deadline)
            answered()  # the provider's cache is filled: the next prefix may go, and the rest of this one side by side
            while todo := tuple(i for i in missing if i not in self.found):
                most = client.most_texts if client.seen.takes_n else 1
                await self._side_by_side([todo[i : i + most] for i in range(0, len(todo), most)], missing, deadline)
        self._finish(begun, deadline)
        return self.found, self.usage

    async def _side_by_side(self, groups, missing, deadline):
        """One call a group; a stop waits for the others, whose texts are paid for."""
        await gather_all(self._ask(group, missing, deadline.copy()) for group in groups)

    async def _ask(self, group, missing, deadline):
        """One call for `group`, until each of its texts that came is in `found`, or each index as a failure."""
        t, r = self.teacher, self.request
        while True:
            call = wire.Call(
                r.messages, r.prefix, len(group), r.max_tokens, r.temperature, r.top_p, r.seed(group[0]), self.mode,
                wanted=len(missing),
            )  # fmt: skip
            dropped = set(t.client.seen.dropped)
            try:
                sent = await t.traffic.send(
                    call, self.key, deadline=deadline, accept=lambda reply, group=group: self._rows(reply, group)
                )
                break
            except wire.CallError as e:
                self.usage += Usage(calls=e.attempts, retries=max(0, e.attempts - 1))
                if t.client.learn(e, call) or t.client.seen.learnt_meanwhile(e, dropped):
                    group = group if t.client.seen.takes_n else group[:1]
                    continue
                if e.kind == "refused" or e.late:  # the same for every index: ask no more
                    group = tuple(i for i in missing if i not in self.found)
                if e.kind == "refused" and t.refuse(e, json.dumps(list(r.messages), sort_keys=True)):
                    self.doubtful |= set(group)
                self.timed_out |= e.late
                said = f"withheld by the service ({e})" if e.field == "withheld" else str(e)
                self.found |= {i: Failure(i, said) for i in group}
                return
        reply = sent.reply
        t.believe_refusals()
        self.usage += _usage(sent)
        self.found |= {row[3].index: row[3] for row in sent.rows}
        for index, item in zip(group, reply.texts):
            self.found.setdefault(index, Failure(index, self._why_not(item, reply)))

    def _rows(self, reply, group):
        """Journal rows of the texts that are continuations."""
        rows, r, asked = [], self.request, self.mode == "instruct" and self.request.prefix
        for index, item in zip(group, reply.texts):
            if item.finish in ("withheld", "failed"):
                continue
            text = whole_characters(wire.hide_keys(wire.clean(item.text[: self.max_chars])), item.finish)
            kept = instruct.cut(r.prefix, text) if asked else text
            if kept is None or (not kept and item.finish == "length"):
                continue
            # asked for so many words, a model that stops has not ended the answer; one that writes nothing has
            continuation = Continuation(index, kept, "length" if asked and kept else item.finish)
            rows.append((self.key, r.sample_id, r.peak, continuation, text if kept != text else None))
        return rows

    def _why_not(self, item, reply) -> str:
        if item.finish == "withheld":
            return wire.scrub(f"withheld by the service ({item.why[:100]})")
        if item.finish == "failed" and not reply.tokens_hidden:
            return wire.scrub(item.why[:100])
        if reply.tokens_hidden:
            return f"empty: {reply.tokens_hidden} tokens went into hidden reasoning; switch the teacher's thinking off"
        return "no continuation: empty at the length limit, or the answer was started over"

    def _finish(self, begun, deadline):
        """Writes the failures down as final, unless the whole service is gone: then the run stops and may resume."""
        failures = [f for f in self.found.values() if isinstance(f, Failure)]
        t, traffic = self.teacher, self.teacher.traffic
        silent = now() - max(begun, traffic.last_success)
        # a call is given up where its next try would be behind the deadline
        waited = silent + max(0.0, deadline.left())
        gone = traffic.last_success < begun or (self.timed_out and waited >= traffic.patience_s / 2)
        if failures and gone and (self.timed_out or traffic.failed_in_a_row >= MAX_FAILED):
            raise TeacherStopped(
                f"the teacher {t.client.model!r} has not answered for {silent:.0f} s "
                f"({traffic.failed_in_a_row} calls in a row; the last: {failures[-1].error}); "
                "start again to go on from the checkpoint once it is back"
            )
        for failure in failures:
            row = (self.key, self.request.sample_id, self.request.peak, failure)
            if failure.index in self.doubtful and t.refused:
                t.doubtful.append(row)
            else:
                t.journal.put_failure(*row)
