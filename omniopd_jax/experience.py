"""A step's data on the host: the stages that the loop (train.py) names, in their order.

prompts -> responses -> scores -> peaks -> the teacher's texts -> similarities -> the batch that an update takes. Each
stage is a function of what it reads; none keeps anything. Responses come in parts as they end (`rollout.parts`): the
teacher answers one part while the rest are being sampled.
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from omniopd_jax import adaptive, audit, cuts, model, objective, rollout, scheduler, span, vocab
from omniopd_jax import step as steps
from omniopd_jax.data.prompts import Prompt, Prompts, batch_indices
from omniopd_jax.errors import NumberError, Stopped, TeacherStopped, UserError
from omniopd_jax.graders import Grader
from omniopd_jax.hf.template import Template
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import batching
from omniopd_jax.run.host import AsyncThread, StopFlag
from omniopd_jax.run.state import TrainState
from omniopd_jax.similarity import Similarity
from omniopd_jax.solutions import Gate
from omniopd_jax.teachers.protocol import Teacher, gather_all, sample_id, stable_hash


@dataclasses.dataclass(frozen=True)
class Student:
    """The model that learns, as the host handles it. `end_ids` end a response."""

    model_cfg: model.ModelConfig
    compute: model.Compute
    template: Template
    decoder: audit.Decoder
    end_ids: tuple[int, ...]

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """What it is computed on."""
        return self.compute.mesh


@dataclasses.dataclass(frozen=True)
class Drawn:
    """This process's prompts of a step, and the sample ids of each one's generations."""

    prompts: list[Prompt]
    sample_ids: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Responses:
    """Responses on the host. B rows of a step: prompts x num_generations, the generations of a prompt next to each
    other; or a part of them.

    Attributes:
      prompts, sample_ids, tokens: one per row; tokens of the response alone, a sampled end token included.
      finished_B: an end token was sampled.
      sampled_logp_BT: the decode loop's own log-probs; None where the teacher wrote the responses.
      place_B: of a part, which rows of the step these are, ascending; None: all.
      spans: what `in_span` returns, once it was asked; it decodes each row.
    """

    prompts: list[Prompt]
    sample_ids: list[str]
    tokens: list[list[int]]
    finished_B: np.ndarray
    sampled_logp_BT: np.ndarray | None = None
    place_B: np.ndarray | None = None
    spans: list[np.ndarray] = dataclasses.field(default_factory=list)

    def in_span(self, tokenizer, part: str) -> list[np.ndarray]:
        """Of each row, which tokens are in `part`, the run's `audit.span`."""
        if not self.spans:
            rows = zip(self.prompts, self.tokens, strict=True)
            self.spans.extend(span.of_row(tokenizer, prompt, row, part) for prompt, row in rows)
        return self.spans

    def placed(self, audits: list[audit.Audit]) -> None:
        """Numbers the audits' rows as the step does."""
        if self.place_B is not None:
            for a in audits:
                a.row = int(self.place_B[a.row])


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the scoring pass said of responses, on the host, and on the devices beside the tokens that were sent for it.

    `rows` and `stats` are None where the rows of several groups were merged: they are sent again as one batch.
    """

    logp_BT: np.ndarray
    entropy_BT: np.ndarray
    rows: batching.Rows | None
    stats: vocab.TokenStats | None


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How agreement is measured between rounds of continuations; `before`: the previous step's mean, or None."""

    similarity: Similarity
    before: float | None


@dataclasses.dataclass(frozen=True)
class Asked:
    """Audits under way: the future ends when each has its answer."""

    future: concurrent.futures.Future
    audits: list[audit.Audit]


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of responses as far as it can be taken before the teacher has answered.

    Attributes:
      responses: None where the student does not answer: they are then the teacher's, once `taught` has them.
      prompts: those of the group. solving: their whole solutions. continued: texts behind the student's prefixes.
      notes: counts of the gate. right: by prompt id its first solution that the gate found right.
    """

    responses: Responses | None
    scores: Scores | None
    peak_BM: np.ndarray
    asked: list[Asked]
    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    solving: list[Asked] = dataclasses.field(default_factory=list)
    continued: list[Asked] = dataclasses.field(default_factory=list)
    notes: dict[str, float] = dataclasses.field(default_factory=dict)
    right: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experience:
    """What an update is made from: the global batch and its scores on the devices, and this process's part on the
    host.

    `trained` are the rows of the batch and of its `more`: the responses, or the teacher's texts. `notes` are this
    process's counts of them (`teaching.note_metrics`), `continued` the answered requests behind the student's prefixes.
    `scores` are those under the policy that sampled, which chose the chunks.
    """

    batch: objective.Batch
    stats: vocab.TokenStats | None
    responses: Responses
    scores: Scores | None
    feedback: audit.Feedback
    rewards: np.ndarray | None
    trained: list[Responses]
    notes: dict[str, float] = dataclasses.field(default_factory=dict)
    continued: list[audit.Audit] = dataclasses.field(default_factory=list)


def draw(prompts: Prompts, cfg, t: int) -> Drawn:
    """This process's slice of step t's prompts, and the sample ids of each one's generations.

    A prompt that occurs twice in the step (a data set smaller than a step, or the border of an epoch) goes on counting
    its
    generations: two responses never share an id, and with it their random draws.
    """
    G = cfg.num_generations
    index = batch_indices(cfg.seed, t, cfg.prompts_per_step, len(prompts)).tolist()
    own = len(index) // jax.process_count()
    first = jax.process_index() * own
    drawn, ids = [], []
    for place in range(first, first + own):
        prompt, met = prompts.prompts[index[place]], index[:place].count(index[place])
        drawn.append(prompt)
        ids.append([sample_id(cfg.seed, t, prompt.id, met * G + g) for g in range(G)])
    return Drawn(drawn, ids)


def allowance(teacher: Teacher | None, cfg, t: int, asked: float | None = None, disks: int = 1) -> tuple[int, int]:
    """(M, N) of step t: the config's, or less where `budget.on_exhausted` spreads what is left of the budget.

    Each process reads the ledger at its own moment; all go by the smallest, for N decides what arrays a batch has.

    Args:
      asked: continuations that an audit took on the average, where they are asked in rounds; None: N.
      disks: among which the processes' journals, and with them the budget, are divided.
    """
    M, N = cfg.audit.num_chunks, cfg.audit.num_continuations
    if teacher is None:
        return M, N
    name, spreads = f"seed {cfg.seed} step {t}: M = {M}, N = {N}", cfg.budget.on_exhausted != "stop"
    before = [found for found in processes.gather("given", teacher.given(name)) if found] if spreads else []
    if before:  # the step is repeated, or replayed
        return tuple(min(values) for values in zip(*before))
    rows = cfg.prompts_per_step * cfg.num_generations // disks
    mean = N if asked is None else min(N, max(1, round(asked)))
    most, each = teacher.allowance(cfg.num_steps - t, rows, M, mean)
    own = (most, N if each == mean else max(1, N * each // mean))
    out = tuple(min(values) for values in zip(*processes.gather("allowance", list(own))))
    if spreads:
        teacher.give(name, out)
    return out


def sample(params: dict, drawn: Drawn, student: Student, key: jax.Array, cfg) -> Iterator[Responses]:
    """The student's own responses, `num_generations` per prompt, in `rollout.parts` parts as they end.

    Args:
      params: as `rollout.prepare` returns them.
      key: the run's.
    """
    ids, G = sum(drawn.sample_ids, []), cfg.num_generations
    rows = rollout.stream(
        params, student.model_cfg, [p.token_ids for p in drawn.prompts],
        rollout.key_data(key, [int(i[-8:], 16) for i in ids]), max_new_tokens=cfg.max_completion_length,
        temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k, num_samples=G, end_ids=student.end_ids,
        part=len(ids) // cfg.rollout.parts, how=how(cfg), compute=student.compute,
    )  # fmt: skip
    for part in rows:
        stops = [student.template.stop_row(r.tokens.tolist()) for r in part]  # None: no stop string ended it
        yield Responses(
            [drawn.prompts[r.row // G] for r in part], [ids[r.row] for r in part],
            [r.tokens[:n].tolist() for r, n in zip(part, stops, strict=True)],
            np.array([r.finished or n is not None for r, n in zip(part, stops, strict=True)]),
            _stack([r.logp_model[None] for r in part]),
            None if cfg.rollout.parts == 1 else np.array([r.row for r in part]),
        )  # fmt: skip


def how(cfg) -> rollout.How:
    """The sampler's settings."""
    r = cfg.rollout
    return rollout.How(r.slots, r.cache_gib, r.turn, r.cache_dtype)


def score(passes: steps.Steps, policy: dict, responses: Responses, student: Student, cfg) -> Scores | None:
    """Log-probs and entropies of every response token under the training graph; None where no one reads them."""
    if not objective.needs_scores(cfg):
        return None
    rows = batching.put(responses.prompts, responses.tokens, student.mesh, cfg)
    stats = passes.score_step(policy, rows.tokens, rows.prompt_length_B, rows.T)
    return Scores(sharding.local_rows(stats.logp_BT), sharding.local_rows(stats.entropy_BT), rows, stats)


def peaks(scores: Scores | None, responses: Responses, student: Student, cfg, M: int) -> np.ndarray:
    """peak_BM on the host: where chunks start, by entropy, or at random positions (`audit.selection = random`).

    The first M columns are taken; the rest, and all of an objective without chunks, are -1.
    """
    B = len(responses.tokens)
    if not objective.of(cfg).chunks:
        return np.full((B, cfg.audit.num_chunks), -1, np.int32)
    T = scores.entropy_BT.shape[1]
    length_B = np.array(list(map(len, responses.tokens)), np.int32)
    eligible_BT = audit.eligible_positions(student.decoder, responses.tokens, T, cfg.audit.chunk_tokens)
    if cfg.audit.span != "all":
        in_span = responses.in_span(student.template.tokenizer, cfg.audit.span)
        eligible_BT &= span.eligible(in_span, T, cfg.audit.chunk_tokens)
    length_B, eligible_BT = sharding.put_rows((length_B, eligible_BT), student.mesh)
    score_BT = scores.stats.entropy_BT
    if cfg.audit.selection == "random":
        seeds = [stable_hash(i, "random chunk") for i in responses.sample_ids]
        random_BT = np.stack([np.random.default_rng(s).random(T, np.float32) for s in seeds])
        score_BT = sharding.put_rows(random_BT, student.mesh)
    found_BM = scheduler.entropy_peaks(
        score_BT, length_B, num_chunks=M, chunk_tokens=cfg.audit.chunk_tokens, eligible_BT=eligible_BT
    )
    peak_BM = sharding.local_rows(found_BM)
    scheduler.check_peaks(peak_BM)
    return np.pad(peak_BM, ((0, 0), (0, cfg.audit.num_chunks - M)), constant_values=-1)


def ask(
    teacher: Teacher | None, thread: AsyncThread, responses: Responses, peak_BM: np.ndarray, decoder: audit.Decoder,
    cfg, N: int, *, rounds: Rounds | None = None,
) -> list[Asked]:  # fmt: skip
    """Starts asking the teacher at every peak. Empty: nothing is asked.

    `rounds`: how agreement is measured on the way (`audit.adaptive`).
    """
    if not objective.of(cfg).audited:
        return []
    audits = audit.plan(decoder, responses.prompts, responses.tokens, peak_BM, responses.sample_ids, cfg, N)
    responses.placed(audits)
    if cfg.audit.adaptive and rounds is not None:

        def values(some):
            return audit.similarities(rounds.similarity, some, cfg, trim=trims(cfg, teacher, some))

        before = rounds.before if objective.has_baseline(cfg) else None  # without one no sign is waited for
        return [Asked(thread.submit(adaptive.ask(teacher, audits, values, before, cfg)), audits)]
    return [Asked(thread.submit(audit.ask(teacher, audits)), audits)]


def merge(groups: list[Group], prompts: list[Prompt], solving: list[Asked], gate: Gate) -> Group:
    """The parts of a step as one, each row in its place, with the step's prompts, solutions and what the gate found."""
    whole = {"prompts": prompts, "solving": solving, "notes": dict(gate.counts), "right": gate.right}
    if len(groups) == 1:
        return dataclasses.replace(groups[0], **whole)
    parts = [g.responses for g in groups]
    order = np.argsort(np.concatenate([p.place_B for p in parts]))

    def placed(lists):
        joined = sum(lists, [])
        return [joined[i] for i in order] if joined else []

    responses = Responses(
        placed([p.prompts for p in parts]), placed([p.sample_ids for p in parts]), placed([p.tokens for p in parts]),
        np.concatenate([p.finished_B for p in parts])[order], _stack([p.sampled_logp_BT for p in parts])[order],
        spans=placed([p.spans for p in parts]),
    )  # fmt: skip
    scores = None
    if groups[0].scores is not None:
        logp_BT, entropy_BT = (_stack([getattr(g.scores, n) for g in groups])[order] for n in ("logp_BT", "entropy_BT"))
        scores = Scores(logp_BT, entropy_BT, None, None)
    peak_BM = np.concatenate([g.peak_BM for g in groups])[order]
    asked, behind = (sum((getattr(g, n) for g in groups), []) for n in ("asked", "continued"))
    return Group(responses, scores, peak_BM, asked, continued=behind, **whole)


def answers(group: Group, stop: StopFlag) -> list[audit.Audit]:
    """The audits, answered.

    Raises:
      TeacherStopped, Stopped: in every process, whichever had it; only when all have ended, so that nothing paid is
      lost.
    """
    wait([asked.future for asked in (*group.asked, *group.solving, *group.continued)], stop)
    return audits_of(group.asked)


def audits_of(asked: list[Asked]) -> list[audit.Audit]:
    """The audits of several questions, in order."""
    return [a for one in asked for a in one.audits]


def wait(futures: list[concurrent.futures.Future], stop: StopFlag) -> None:
    """Waits for all, then raises what went wrong in any; TeacherStopped and Stopped in every process."""

    def wait_here():
        errors = [e for future in futures if (e := _error_of(future, stop))]
        if errors:
            raise next((e for e in errors if not isinstance(e, TeacherStopped)), errors[0])

    processes.raise_on_all("teacher", wait_here)


def _error_of(future: concurrent.futures.Future, stop: StopFlag) -> BaseException | None:
    """The future's error, if any; a signal to any process ends the wait, which may be longer than the notice before a
    preemption.

    Raises:
      Stopped: the step is given up; what has been answered is in the journal, where the resumed run finds it.
    """
    while True:
        try:
            return future.exception(timeout=0.5)
        except TimeoutError:
            if stop.requested:
                processes.tell("teacher", stop.requested)
            if said := stop.requested or processes.told("teacher"):
                raise Stopped(said) from None


def compare(
    similarity: Similarity, teacher: Teacher | None, audits: list[audit.Audit], rows: int, cfg
) -> audit.Feedback:
    """k_sem and n of every chunk."""
    trim = trims(cfg, teacher, audits)
    return audit.compare(similarity, audits, (rows, cfg.audit.num_chunks), cfg, trim=trim)


def trims(cfg, teacher: Teacher | None, audits: list[audit.Audit]) -> list[bool]:
    """Of each audit, whether its continuations are cut to the chunk's length in characters."""
    how = cfg.audit.trim_continuation
    if how != "auto" or teacher is None:
        return [how == "always"] * len(audits)
    return [teacher.named(a.request.teacher).foreign_tokenizer for a in audits]


def agreement(feedback: audit.Feedback) -> dict[str, float]:
    """The mean of k_sem / n and of what was asked over all processes' audits, for the next step's rounds; {} where
    none was answered. All processes must call."""
    own = [[float(a.similarity.mean()), len(a.request.indices)] for a in feedback.audits if len(a.similarity)]
    every = sum(processes.gather("agreement", own), [])
    return (
        {"agreement": float(np.mean([m for m, _ in every])), "asked": float(np.mean([n for _, n in every]))}
        if every
        else {}
    )


def grade(grader: Grader, responses: Responses, decoder: audit.Decoder) -> np.ndarray:
    """1 for a response whose text is graded right, else 0; float32 [B]."""
    missing = [p.id for p in responses.prompts if p.answer is None]
    if missing:
        raise UserError(f"a task reward needs an `answer`; prompt {missing[0]!r} has none")
    texts = [decoder.text(r) for r in responses.tokens]
    grades = grader.grade_all(texts, [p.answer for p in responses.prompts])
    return np.array([bool(g) for g in grades], np.float32)


def teacher_logp(teacher: Teacher, thread: AsyncThread, stop: StopFlag, responses: Responses, T: int) -> np.ndarray:
    """The white-box teacher's log-probs of the response tokens [B, T]; 0 past a row's end."""
    pairs = zip(responses.prompts, responses.tokens, strict=True)
    scored = thread.submit(
        gather_all(teacher.named(p.teacher).score_tokens(p.messages, p.token_ids, r) for p, r in pairs)
    )
    wait([scored], stop)
    out = np.zeros((len(responses.tokens), T), np.float32)
    for b, row in enumerate(scored.result()):
        if len(row) != len(responses.tokens[b]) or not np.isfinite(row).all():
            raise NumberError(
                f"the teacher scored {len(row)} of {len(responses.tokens[b])} tokens of a response, or not all as "
                "numbers: look at its server, or at the weights in teacher.model"
            )
        out[b, : len(row)] = row
    return out


def assemble(
    group: Group,
    feedback: audit.Feedback,
    rewards,
    teacher_logp_BT,
    N: int,
    student: Student,
    cfg,
    now: Scores | None = None,
    own_rows: tuple[list[Responses], dict[str, float]] = ((), {}),
) -> Experience:
    """The global batch on the devices.

    Args:
      rewards: [B], None without a task reward. teacher_logp_BT: of a white-box objective, else None.
      N: continuations asked for per chunk.
      now: scores under the present policy, where another one sampled (staleness.py); else the group's own hold.
      own_rows: rows that are the teacher's texts, and counts of them (teaching.py).
    """
    responses, scores = group.responses, now or group.scores
    (taught_rows, notes), batches, stats = own_rows, [], None
    if any(objective.of(part).cut is None for _, part in objective.parts(cfg)):
        rows = scores.rows if scores else None
        if rows is None:
            rows = batching.put(responses.prompts, responses.tokens, student.mesh, cfg)
        stats = scores.stats if scores else None
        if scores and stats is None:
            stats = sharding.put_rows(vocab.TokenStats(scores.logp_BT, scores.entropy_BT), student.mesh)
        n_min_BM = None
        if cfg.audit.num_continuations > N or cfg.audit.adaptive:
            n_min_BM = np.full(feedback.n_BM.shape, audit.fewest(cfg, N), np.int32)
            for a in feedback.audits:
                n_min_BM[a.row, a.m] = audit.fewest(cfg, len(a.request.indices))
        more = stale_fields(group, now, cfg) if now else {}
        batches.append(
            batch_of(
                responses,
                rows,
                student,
                cfg,
                rewards,
                peak_BM=group.peak_BM,
                k_sem_BM=feedback.k_sem_BM,
                n_BM=feedback.n_BM,
                n_min_BM=n_min_BM,
                teacher_logp_BT=teacher_logp_BT,
                **more,
            )  # fmt: skip
        )
    for own in taught_rows:
        rows = batching.put(own.prompts, own.tokens, student.mesh, cfg, most=cuts.most_tokens(cfg))
        batches.append(batch_of(own, rows, student, cfg, rewards if own is responses else None))
    trained = [responses] * (len(batches) > len(taught_rows)) + list(taught_rows)
    batch = batches[0].replace(more=tuple(batches[1:]))
    behind = audits_of(group.continued)
    return Experience(batch, stats, responses, group.scores, feedback, rewards, trained, notes, behind)


def batch_of(responses: Responses, rows: batching.Rows, student: Student, cfg, rewards, **arrays) -> objective.Batch:
    """Rows on the devices as a batch; `arrays` are host arrays of `objective.Batch`, no chunks where they have none."""
    B, M = len(responses.tokens), cfg.audit.num_chunks
    none = {"peak_BM": np.full((B, M), -1, np.int32), "k_sem_BM": np.zeros((B, M), np.float32)}
    none["n_BM"] = np.zeros((B, M), np.int32)
    advantage_B = None
    if rewards is not None:
        advantage_B = np.asarray(objective.group_advantage(rewards, cfg.num_generations), np.float32)
    host = objective.Batch(
        token_BL=None, prompt_length_B=None, length_B=np.array(list(map(len, responses.tokens)), np.int32),
        advantage_B=advantage_B, width=rows.T, **none | arrays,
    )  # fmt: skip
    batch = sharding.put_rows(host, student.mesh)
    return batch.replace(token_BL=rows.token_BL, packed=rows.packed, prompt_length_B=rows.prompt_length_B)


def stale_fields(group: Group, now: Scores, cfg) -> dict:
    """`old_logp_BT` and `ratio_BM` of a batch that another policy sampled (`objective.chunk_ratio`)."""
    arrays = jax.device_put((now.logp_BT, group.scores.logp_BT, group.peak_BM))
    ratio_BM = objective.chunk_ratio(*arrays, chunk_tokens=cfg.audit.chunk_tokens)
    return {"old_logp_BT": group.scores.logp_BT, "ratio_BM": np.asarray(jax.device_get(ratio_BM))}


def sampler_gap(responses: Responses, scores: Scores | None) -> float | None:
    """Mean absolute difference between the decode loop's log-probs and the scoring pass's; None without either."""
    if scores is None or responses.sampled_logp_BT is None:
        return None
    width = min(scores.logp_BT.shape[1], responses.sampled_logp_BT.shape[1])
    length_B = np.array(list(map(len, responses.tokens)))
    real_BT = np.arange(width)[None] < length_B[:, None]
    return float(np.abs(scores.logp_BT[:, :width] - responses.sampled_logp_BT[:, :width])[real_BT].mean())


def _stack(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    """[B, T] arrays of several widths as one, padded with 0."""
    if arrays[0] is None:
        return None
    T = max(a.shape[1] for a in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, T - a.shape[1]))) for a in arrays])


def policy(state: TrainState, reference: dict | None, cfg) -> dict:
    """The whole model as it stands: what is trained, or with LoRA the base with the adapters beside it."""
    return steps.policy(state.params, reference, cfg)
