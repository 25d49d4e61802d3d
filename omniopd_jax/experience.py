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

from omniopd_jax import audit, model, objective, rollout, scheduler, span, vocab
from omniopd_jax import step as steps
from omniopd_jax.data.prompts import Prompt, Prompts, batch_indices
from omniopd_jax.errors import Stopped, TeacherStopped, UserError
from omniopd_jax.graders import Grader
from omniopd_jax.hf import thoughts
from omniopd_jax.hf.template import Template
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import batching
from omniopd_jax.run.host import AsyncThread, StopFlag
from omniopd_jax.run.state import TrainState
from omniopd_jax.similarity import Similarity
from omniopd_jax.teachers.protocol import ContinuationRequest, Teacher, gather_all, sample_id, stable_hash


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
    """

    prompts: list[Prompt]
    sample_ids: list[str]
    tokens: list[list[int]]
    finished_B: np.ndarray
    sampled_logp_BT: np.ndarray | None = None
    place_B: np.ndarray | None = None


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
class Asked:
    """Audits under way: the future ends when each has its answer."""

    future: concurrent.futures.Future
    audits: list[audit.Audit]


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of responses as far as it can be taken before the teacher has answered."""

    responses: Responses
    scores: Scores | None
    peak_BM: np.ndarray
    asked: list[Asked]
    solutions: list[audit.Audit] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Experience:
    """What an update is made from: the global batch and its scores on the devices, and this process's part on the
    host."""

    batch: objective.Batch
    stats: vocab.TokenStats | None
    responses: Responses
    scores: Scores | None
    feedback: audit.Feedback
    rewards: np.ndarray | None


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


def allowance(teacher: Teacher | None, cfg, t: int) -> tuple[int, int]:
    """(M, N) of step t: the config's, or less where `budget.on_exhausted` spreads what is left of the budget.

    Each process reads the ledger at its own moment; all go by the smallest, for N decides what arrays a batch has.
    """
    M, N = cfg.audit.num_chunks, cfg.audit.num_continuations
    if teacher is None:
        return M, N
    rows = cfg.prompts_per_step * cfg.num_generations // jax.process_count()
    own = teacher.allowance(cfg.num_steps - t, rows, M, N)
    return tuple(min(values) for values in zip(*processes.gather("allowance", list(own))))


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


def solutions(
    teacher: Teacher, thread: AsyncThread, stop: StopFlag, drawn: Drawn, student: Student, cfg
) -> tuple[Responses, list[audit.Audit]]:
    """The teacher's own solutions in the student's tokens, `num_generations` per prompt, and the requests they answer.

    A solution that failed is an empty row: it weighs nothing. One cut at the cap is kept, without an end token.

    Raises:
      TeacherStopped, Stopped: in every process, whichever had it.
    """
    n = cfg.num_generations
    requests = {
        p.id: ContinuationRequest(
            solution_id(p.id), -1, tuple(p.messages), "", tuple(range(n)), cfg.max_completion_length,
            cfg.teacher.temperature, cfg.teacher.top_p, p.teacher,
        )
        for p in drawn.prompts
    }  # fmt: skip
    audits = [audit.Audit(b, 0, r, "", similarity=np.zeros(0)) for b, r in enumerate(requests.values())]
    wait([thread.submit(audit.ask(teacher, audits))], stop)
    answered = {a.request.sample_id: a for a in audits}
    tokens, finished = [], []
    for p in drawn.prompts:
        got = {c.index: c for c in answered[solution_id(p.id)].result.continuations}
        for g in range(n):
            whole = g in got and got[g].finish == "stop"
            text = thoughts.after_mark(got[g].text, opened=bool(student.decoder.opened(p))) if g in got else ""
            text = student.template.tokenizer(text, add_special_tokens=False)["input_ids"]
            end = list(student.template.turn_end_ids[:1]) if whole else []
            tokens.append((text + end)[: cfg.max_completion_length])
            finished.append(whole)
    rows = [p for p in drawn.prompts for _ in range(n)]
    return Responses(rows, [solution_id(p.id) for p in rows], tokens, np.array(finished)), audits


def given_solutions(drawn: Drawn, student: Student, cfg) -> Responses:
    """The prompts file's own solutions in the student's tokens, one per prompt; those over the cap are cut."""
    tokenizer, end = student.template.tokenizer, student.template.turn_end_ids[:1]
    texts = tokenizer([p.solution for p in drawn.prompts], add_special_tokens=False)["input_ids"]
    tokens = [[*text, *end][: cfg.max_completion_length] for text in texts]
    finished_B = np.array([len(text) < cfg.max_completion_length for text in texts])
    return Responses(drawn.prompts, [solution_id(p.id) for p in drawn.prompts], tokens, finished_B)


def solution_id(prompt_id: str) -> str:
    """Who asks for a whole solution: the prompt alone, so that epochs and methods share what was bought (method.md,
    5)."""
    return f"{stable_hash('solution', prompt_id):016x}"


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
        eligible_BT &= span.eligible(student.template.tokenizer, responses.prompts, responses.tokens, T, cfg)
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
    cfg, N: int,
) -> list[Asked]:  # fmt: skip
    """Starts asking the teacher at every peak. Empty: nothing is asked."""
    if not objective.of(cfg).audited:
        return []
    audits = audit.plan(decoder, responses.prompts, responses.tokens, peak_BM, responses.sample_ids, cfg, N)
    if responses.place_B is not None:
        for a in audits:
            a.row = int(responses.place_B[a.row])
    return [Asked(thread.submit(audit.ask(teacher, audits)), audits)]


def merge(groups: list[Group]) -> Group:
    """The parts of a step as one, each row in its place."""
    if len(groups) == 1:
        return groups[0]
    parts = [g.responses for g in groups]
    order = np.argsort(np.concatenate([p.place_B for p in parts]))

    def placed(lists):
        joined = sum(lists, [])
        return [joined[i] for i in order]

    responses = Responses(
        placed([p.prompts for p in parts]), placed([p.sample_ids for p in parts]), placed([p.tokens for p in parts]),
        np.concatenate([p.finished_B for p in parts])[order], _stack([p.sampled_logp_BT for p in parts])[order],
    )  # fmt: skip
    scores = None
    if groups[0].scores is not None:
        logp_BT, entropy_BT = (_stack([getattr(g.scores, n) for g in groups])[order] for n in ("logp_BT", "entropy_BT"))
        scores = Scores(logp_BT, entropy_BT, None, None)
    peak_BM = np.concatenate([g.peak_BM for g in groups])[order]
    return Group(responses, scores, peak_BM, sum((g.asked for g in groups), []))


def answers(group: Group, stop: StopFlag) -> list[audit.Audit]:
    """The audits, answered.

    Raises:
      TeacherStopped, Stopped: in every process, whichever had it; only when all have ended, so that nothing paid is
      lost.
    """
    wait([asked.future for asked in group.asked], stop)
    return [a for asked in group.asked for a in asked.audits]


def wait(futures: list[concurrent.futures.Future], stop: StopFlag) -> None:
    """Waits for all, then raises what went wrong in any; TeacherStopped and Stopped in every process."""

    def wait_here():
        errors = [e for future in futures if (e := _error_of(future, stop))]
        if errors:
            raise next((e for e in errors if not isinstance(e, TeacherStopped)), errors[0])

    processes.raise_on_all("teacher", wait_here)


def _error_of(future: concurrent.futures.Future, stop: StopFlag) -> BaseException | None:
    """The future's error, if any; a signal ends the wait, which may be longer than the notice before a preemption.

    Raises:
      Stopped: the step is given up; what has been answered is in the journal, where the resumed run finds it.
    """
    while True:
        try:
            return future.exception(timeout=0.5)
        except TimeoutError:
            if stop.requested:
                raise Stopped(stop.requested) from None


def compare(
    similarity: Similarity, audits: list[audit.Audit], rows: int, cfg, *, foreign_tokenizer: bool | list[bool]
) -> audit.Feedback:
    """k_sem and n of every chunk. `foreign_tokenizer`: of the teacher, or one bool an audit."""
    how = cfg.audit.trim_continuation
    trim = foreign_tokenizer if how == "auto" else how == "always"
    return audit.compare(similarity, audits, (rows, cfg.audit.num_chunks), cfg, trim=trim)


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
            raise FloatingPointError(
                f"the teacher scored {len(row)} of {len(responses.tokens[b])} tokens, or not all finite"
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
) -> Experience:
    """The global batch on the devices.

    Args:
      rewards: [B], None without a task reward. teacher_logp_BT: of a white-box objective, else None.
      N: continuations asked for per chunk.
      now: scores under the present policy, where another one sampled (staleness.py); else the group's own hold.
    """
    responses, scores = group.responses, now or group.scores
    rows = scores.rows if scores else None
    if rows is None:
        rows = batching.put(responses.prompts, responses.tokens, student.mesh, cfg)
    stats = scores.stats if scores else None
    if scores and stats is None:
        stats = sharding.put_rows(vocab.TokenStats(scores.logp_BT, scores.entropy_BT), student.mesh)
    length_B = np.array(list(map(len, responses.tokens)), np.int32)
    advantage_B = None
    if rewards is not None:
        advantage_B = np.asarray(objective.group_advantage(rewards, cfg.num_generations), np.float32)
    n_min_B = None
    if cfg.audit.num_continuations > N:
        n_min_B = np.full(len(length_B), audit.fewest(cfg, N), np.int32)
    host = objective.Batch(
        None,
        None,
        length_B,
        group.peak_BM,
        feedback.k_sem_BM,
        feedback.n_BM,
        n_min_B,
        advantage_B,
        teacher_logp_BT=teacher_logp_BT,
        width=rows.T,
        **(stale_fields(group, now, cfg) if now else {}),
    )
    batch = sharding.put_rows(host, student.mesh)
    batch = batch.replace(token_BL=rows.token_BL, packed=rows.packed, prompt_length_B=rows.prompt_length_B)
    return Experience(batch, stats, responses, scores, feedback, rewards)


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
