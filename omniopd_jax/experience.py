"""One step's data, on the host: sample, score, find peaks, ask the teacher, grade. Returns the batch that `update` takes.

A step's prompts may be taken in pieces (`rollout_groups`): the teacher answers one while the next is being sampled.
With `max_staleness = 1` it answers step t while step t + 1 is being sampled, by the policy before update t.
"""

import concurrent.futures
import dataclasses
import os
import pathlib

import jax
import numpy as np

from omniopd_jax import audit, evaluate, objective, rollout, scheduler, step, teachers, vocab
from omniopd_jax.config import min_continuations
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import Stopped, UserError
from omniopd_jax.parallel import packing, processes, sharding
from omniopd_jax.teachers.protocol import ContinuationRequest


@dataclasses.dataclass(frozen=True)
class Responses:
    """Sampled responses and their scores, on the host. B rows: prompts x num_generations, a prompt's side by side."""

    prompts: list[data.Prompt]
    sample_ids: list[str]
    tokens: list[list[int]]
    finished_B: np.ndarray
    logp_BT: np.ndarray
    entropy_BT: np.ndarray
    peak_BM: np.ndarray
    sampler_gap: float


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a step is made from: the global batch and its scores on the devices, and this process's part on the host."""

    batch: objective.Batch
    stats: vocab.TokenStats
    responses: Responses
    feedback: audit.Feedback
    rewards: np.ndarray | None
    service: dict  # what the teacher counted, `teacher/*`


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sampled step whose audits are under way: `waiting` holds (future, audits); N continuations were asked for."""

    responses: Responses
    N: int
    waiting: list
    solutions: list[audit.Audit]


def collect(run, state: step.TrainState, t: int) -> Collected:
    """Samples and audits step t with the policy `state.params`, or with `max_staleness` finishes it and begins the next.

    Args:
      run: train.Run.
      t: the step, which is the data position.

    Raises:
      TeacherStopped: the teacher can give no more; nothing of the step is used.
    """
    if not run.cfg.max_staleness:
        return finish(run, begin(run, state, t))
    for s in range(t, min(t + 2, run.cfg.num_steps)):
        if s not in run.ahead:
            run.ahead[s] = begin(run, state, s)
    r = run.ahead[t].responses
    got = finish(run, run.ahead[t], score(run, state, r.prompts, r.tokens))
    del run.ahead[t]
    return got


def begin(run, state: step.TrainState, t: int) -> Asked:
    """Samples step t with the policy `state.params` and starts asking the teacher."""
    cfg = run.cfg
    prompts, ids = own_prompts(run, t)
    M, N = allowance(run, t, len(prompts))
    params = rollout.prepare(run.policy(state), run.model_cfg, run.mesh)
    parts, waiting, solutions = [], [], []
    for piece in np.array_split(np.arange(len(prompts)), cfg.rollout_groups):
        if cfg.objective.name == "sft":
            part, asked = taught(run, state, [prompts[i] for i in piece], [ids[i] for i in piece])
            parts.append(part)
            solutions += asked
            continue
        parts.append(respond(run, state, params, [prompts[i] for i in piece], sum((ids[i] for i in piece), []), M))
        if cfg.objective.name in objective.AUDITED:
            waiting.append(ask(run, parts[-1], N, first_row=sum(len(p.tokens) for p in parts[:-1])))
    return Asked(merge(parts), N, waiting, solutions)


def finish(run, asked: Asked, scored=None) -> Collected:
    """Waits for the teacher, compares and weighs.

    Args:
      scored: (logp_BT, entropy_BT) under the present policy, where another one sampled.
    """
    responses = asked.responses
    audits = answers(run, asked.waiting)
    feedback = compare(run, audits, responses)
    feedback = dataclasses.replace(feedback, audits=feedback.audits + asked.solutions)
    rewards = reward(run, responses) if needs_reward(run.cfg) else None
    return assemble(run, responses, feedback, rewards, asked.N, scored)


def answers(run, waiting) -> list[audit.Audit]:
    """The audits, answered. Raises what stopped one only when all have ended, so that nothing paid for is lost.

    Raises:
      TeacherStopped, Stopped: in every process, whichever had it.
    """
    settle(run, [future for future, _ in waiting])
    return [a for _, audits in waiting for a in audits]


def settle(run, futures) -> None:
    """Waits for all, then raises what went wrong in any, TeacherStopped and Stopped in every process."""

    def wait():
        errors = [e for future in futures if (e := patient(run, future))]
        if errors:
            raise next((e for e in errors if not isinstance(e, teachers.TeacherStopped)), errors[0])

    with run.timer.phase("teacher_wait"):
        processes.together("teacher", wait)


def patient(run, future) -> BaseException | None:
    """The future's error, if any; a signal ends the wait, which may be longer than the notice before a preemption.

    Raises:
      Stopped: the step is given up; what has been answered is in the journal, where the resumed run finds it.
    """
    while True:
        try:
            return future.exception(timeout=0.5)
        except TimeoutError:
            if run.stop.requested:
                raise Stopped(run.stop.requested) from None


def drain(run) -> None:
    """Waits for the calls of what was asked ahead: they are paid for, and the resumed run finds them in the journal."""
    futures = [future for asked in run.ahead.values() for future, _ in asked.waiting]
    concurrent.futures.wait(futures, timeout=run.cfg.teacher.timeout_s)


def save_ahead(run, t: int) -> None:
    """Writes step t's responses beside the checkpoint of step t: the policy that sampled them will be gone (staleness)."""
    if t not in run.ahead:
        return
    r, folder = run.ahead[t].responses, pathlib.Path(run.cfg.run_dir) / "ahead"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{t}.{jax.process_index()}.npz"
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(
            file, token_X=np.concatenate([np.array(row, np.int32) for row in r.tokens]), length_B=list(map(len, r.tokens)),
            finished_B=r.finished_B, logp_BT=r.logp_BT, entropy_BT=r.entropy_BT, peak_BM=r.peak_BM,
            gap=r.sampler_gap, N=run.ahead[t].N,
        )  # fmt: skip
    os.replace(path.with_suffix(".tmp"), path)
    own = [f for f in folder.glob(f"*.{jax.process_index()}.npz") if f.name.split(".")[0].isdigit()]
    own.sort(key=lambda f: int(f.name.split(".")[0]))
    for old in own[: -run.cfg.checkpoint.keep - 1]:  # one more: the newest checkpoint may not be whole yet
        old.unlink()


def load_ahead(run, t: int) -> None:
    """Takes up step t as it was sampled before a resume and asks again, which the journal answers.

    Without the file (the run had another staleness) the step is sampled anew, by the policy at hand.
    """
    path = pathlib.Path(run.cfg.run_dir) / "ahead" / f"{t}.{jax.process_index()}.npz"
    if not run.cfg.max_staleness or not all(processes.gather("ahead", path.is_file())):
        return
    with np.load(path) as f:
        got, N = dict(f), int(f["N"])
    (prompts, ids), G = own_prompts(run, t), run.cfg.num_generations
    rows, ids = [p for p in prompts for _ in range(G)], sum(ids, [])
    tokens = [row.tolist() for row in np.split(got["token_X"], np.cumsum(got["length_B"])[:-1])]
    arrays = [got[k] for k in ("finished_B", "logp_BT", "entropy_BT", "peak_BM")]
    waiting = []
    for piece in np.array_split(np.arange(len(prompts)), run.cfg.rollout_groups):  # as they were asked
        own = slice(piece[0] * G, (piece[-1] + 1) * G)
        part = Responses(rows[own], ids[own], tokens[own], *(a[own] for a in arrays), 0.0)
        waiting.append(ask(run, part, N, first_row=own.start))
    run.ahead[t] = Asked(Responses(rows, ids, tokens, *arrays, float(got["gap"])), N, waiting, [])


def allowance(run, t: int, prompts: int) -> tuple[int, int]:
    """(M, N) of this step: the config's, or less where `budget.on_exhausted` spreads what is left of the budget.

    Each process reads the ledger at its own moment; all go by the smallest, for N decides what arrays a batch has.
    """
    a = run.cfg.audit
    if run.teacher is None:
        return a.num_chunks, a.num_continuations
    own = run.teacher.allowance(run.cfg.num_steps - t, prompts * run.cfg.num_generations, a.num_chunks, a.num_continuations)
    M, N = (min(values) for values in zip(*processes.gather("allowance", list(own))))
    return M, N


def own_prompts(run, t: int) -> tuple[list[data.Prompt], list[list[str]]]:
    """This process's slice of step t's prompts, and the sample ids of each one's generations.

    A prompt that stands in the step twice (a data set smaller than a step, or an epoch's border) goes on counting its
    generations: two responses never share an id, and with it their random draws.
    """
    cfg, G = run.cfg, run.cfg.num_generations
    index = data.batch_indices(cfg.seed, t, cfg.prompts_per_step, len(run.train)).tolist()
    own = len(index) // jax.process_count()
    first = jax.process_index() * own
    prompts, ids = [], []
    for place in range(first, first + own):
        prompt, met = run.train.prompts[index[place]], index[:place].count(index[place])
        prompts.append(prompt)
        ids.append([teachers.sample_id(cfg.seed, t, prompt.id, met * G + g) for g in range(G)])
    return prompts, ids


def respond(run, state, params, prompts, ids, M: int) -> Responses:
    """The student's own responses, scored with the training graph, and where to audit them."""
    cfg = run.cfg
    with run.timer.phase("rollout"):
        out = sample(run, state, params, prompts, ids)
        local = [sharding.local_rows(a) for a in (out.token_BT, out.length_B, out.finished_B, out.logp_model_BT)]
    token_BT, length_B, finished_B, sampled_BT = local
    rows = [p for p in prompts for _ in range(cfg.num_generations)]
    tokens = [row[:n].tolist() for row, n in zip(token_BT, length_B, strict=True)]
    logp_BT, entropy_BT = score(run, state, rows, tokens)
    with run.timer.phase("score"):
        needs_peaks = cfg.objective.name in objective.CHUNKED
        peak_BM = find_peaks(run, entropy_BT, tokens, ids, M) if needs_peaks else no_peaks(run, len(rows))
    width = min(logp_BT.shape[1], sampled_BT.shape[1])
    real_BT = np.arange(width)[None] < length_B[:, None]
    gap = float(np.abs(logp_BT[:, :width] - sampled_BT[:, :width])[real_BT].mean())
    return Responses(rows, ids, tokens, finished_B, logp_BT, entropy_BT, peak_BM, gap)


def sample(run, state, params, prompts, sample_ids) -> rollout.Rollout:
    """num_generations completions of each of this process's prompts."""
    cfg = run.cfg
    put = sharding.put_rows(rollout.pad_rows([p.token_ids for p in prompts], prompt_width(prompts)), run.mesh)
    id_B = np.array([int(i[-8:], 16) for i in sample_ids], np.uint32)
    key_B = rollout.row_keys(state.key, sharding.put_rows(id_B, run.mesh))
    return rollout.sample(
        params, run.model_cfg, *put, key_B, max_new_tokens=cfg.max_completion_length, temperature=cfg.temperature,
        top_p=cfg.top_p, top_k=cfg.top_k, num_samples=cfg.num_generations, end_ids=run.end_ids,
    )  # fmt: skip


def score(run, state, prompts, tokens) -> tuple[np.ndarray, np.ndarray]:
    """(logp_BT, entropy_BT) of this process's rows under the training graph, on the host."""
    with run.timer.phase("score"):
        T = response_width(run, tokens)
        token_BL, packed, prompt_length_B = join(run, prompts, tokens, T)
        put = sharding.put_rows((token_BL if packed is None else packed, prompt_length_B), run.mesh)
        stats = run.steps.score_step(run.policy(state), *put, T)
        return sharding.local_rows(stats.logp_BT), sharding.local_rows(stats.entropy_BT)


def prompt_width(prompts) -> int:
    """P, padded to a bucket that all processes share."""
    return rollout.bucket(sharding.global_max(max(len(p.token_ids) for p in prompts)))


def response_width(run, tokens) -> int:
    """T, padded to a bucket that all processes share."""
    longest = sharding.global_max(max(map(len, tokens)))
    return min(rollout.bucket(longest), rollout.bucket(run.cfg.max_completion_length))


def row_width(prompts, tokens, T: int) -> int:
    """L, padded to a bucket that all processes share: the longest prompt seldom has the longest response."""
    longest = sharding.global_max(max(len(p.token_ids) + len(r) for p, r in zip(prompts, tokens, strict=True)))
    return min(rollout.bucket(longest), prompt_width(prompts) + T)


def join(run, prompts, tokens, T: int) -> tuple[np.ndarray | None, packing.Packed | None, np.ndarray]:
    """(token_BL, None, prompt_length_B), prompt directly followed by response; (None, Packed, prompt_length_B) when packing."""
    rows = [list(p.token_ids) + r for p, r in zip(prompts, tokens, strict=True)]
    prompt_length_B = np.array([len(p.token_ids) for p in prompts], np.int32)
    if not run.cfg.packing.length:
        return rollout.pad_rows(rows, row_width(prompts, tokens, T))[0], None, prompt_length_B
    packed = packing.make(
        rows, prompt_length_B, most=run.cfg.packing.length, shards=sharding.own_shards(run.mesh),
        micro_batches=run.cfg.micro_batches,
    )  # fmt: skip
    return None, packed, prompt_length_B


def find_peaks(run, entropy_BT, tokens, sample_ids, M: int) -> np.ndarray:
    """peak_BM on the host: by entropy, or at random positions (`audit.selection = random`); the first M that were taken."""
    cfg, T = run.cfg, entropy_BT.shape[1]
    eligible_BT = audit.eligible_positions(run.decoder, tokens, T)
    length_B = np.array(list(map(len, tokens)), np.int32)
    score_BT = entropy_BT
    if cfg.audit.selection == "random":
        seeds = [teachers.stable_hash(i, "random chunk") for i in sample_ids]
        score_BT = np.stack([np.random.default_rng(s).random(T, np.float32) for s in seeds])
    peak_BM = scheduler.entropy_peaks(
        *jax.device_put((score_BT, length_B)), num_chunks=M,
        chunk_tokens=cfg.audit.chunk_tokens, eligible_BT=jax.device_put(eligible_BT),
    )  # fmt: skip
    peak_BM = np.asarray(jax.device_get(peak_BM))
    scheduler.check_peaks(peak_BM)
    return np.pad(peak_BM, ((0, 0), (0, cfg.audit.num_chunks - M)), constant_values=-1)


def no_peaks(run, rows: int) -> np.ndarray:
    """peak_BM of an objective without chunks."""
    return np.full((rows, run.cfg.audit.num_chunks), -1, np.int32)


def ask(run, responses: Responses, N: int, *, first_row: int):
    """Starts asking the teacher at every peak; returns (future, audits), the audits' rows counted from `first_row`."""
    with run.timer.phase("teacher_wait"):
        audits = audit.plan(
            run.decoder, responses.prompts, responses.tokens, responses.peak_BM, responses.sample_ids, run.cfg, N
        )
        for a in audits:
            a.row += first_row
        return run.thread.submit(audit.ask(run.teacher, audits)), audits


def compare(run, audits, responses: Responses) -> audit.Feedback:
    """k_sem and n of every chunk."""
    cfg = run.cfg
    trim = cfg.audit.trim_continuation == "always"
    if cfg.audit.trim_continuation == "auto":
        trim = run.teacher is not None and run.teacher.foreign_tokenizer
    with run.timer.phase("similarity"):
        return audit.compare(run.phi, audits, responses.peak_BM.shape, cfg, trim=trim)


def taught(run, state, prompts, ids) -> tuple[Responses, list[audit.Audit]]:
    """For `sft`: the teacher's own solutions, through the same protocol, in the student's tokens.

    A solution that failed is an empty row: it weighs nothing. One cut at the cap is kept, without an end token.
    """
    cfg = run.cfg
    n = cfg.num_generations
    ids = [i[0] for i in ids]
    requests = [
        ContinuationRequest(
            i, -1, tuple(p.messages), "", tuple(range(n)), cfg.max_completion_length, cfg.teacher.temperature, cfg.teacher.top_p
        )
        for i, p in zip(ids, prompts, strict=True)
    ]
    with run.timer.phase("teacher_wait"):
        audits = [audit.Audit(b, 0, r, "", similarity=np.zeros(0)) for b, r in enumerate(requests)]
        asked = run.thread.submit(audit.ask(run.teacher, audits))
    settle(run, [asked])
    rows = [p for p in prompts for _ in range(n)]
    tokens, finished = [], []
    for a in audits:
        got = {c.index: c for c in a.result.continuations}
        for g in range(n):
            whole = g in got and got[g].finish == "stop"
            text = run.tokenizer(got[g].text, add_special_tokens=False)["input_ids"] if g in got else []
            tokens.append((text + [run.end_ids[0]] * whole)[: cfg.max_completion_length])
            finished.append(whole)
    logp_BT, entropy_BT = score(run, state, rows, tokens)
    ids = [i for i in ids for _ in range(n)]
    return Responses(rows, ids, tokens, np.array(finished), logp_BT, entropy_BT, no_peaks(run, len(rows)), 0.0), audits


def needs_reward(cfg) -> bool:
    """Whether the objective reads a task reward."""
    return cfg.objective.name == "grpo" or cfg.reward.coef != 0


def reward(run, responses: Responses) -> np.ndarray:
    """1 for a response whose text is graded right, else 0; [B]."""
    grade = evaluate.grader(run.cfg.reward.grader)
    missing = [p.id for p in responses.prompts if p.answer is None]
    if missing:
        raise UserError(f"a task reward needs an `answer`; prompt {missing[0]!r} has none")
    with run.timer.phase("reward"):
        texts = [run.decoder.text(r) for r in responses.tokens]
        return np.array([grade(t, p.answer) for t, p in zip(texts, responses.prompts, strict=True)], np.float32)


def merge(parts: list[Responses]) -> Responses:
    """The pieces of a step as one."""
    if len(parts) == 1:
        return parts[0]
    T = max(p.logp_BT.shape[1] for p in parts)

    def widen(a_BT):
        return np.pad(a_BT, ((0, 0), (0, T - a_BT.shape[1])))

    return Responses(
        sum((p.prompts for p in parts), []), sum((p.sample_ids for p in parts), []), sum((p.tokens for p in parts), []),
        np.concatenate([p.finished_B for p in parts]), np.concatenate([widen(p.logp_BT) for p in parts]),
        np.concatenate([widen(p.entropy_BT) for p in parts]), np.concatenate([p.peak_BM for p in parts]),
        float(np.mean([p.sampler_gap for p in parts])),
    )  # fmt: skip


def assemble(run, responses: Responses, feedback: audit.Feedback, rewards, N: int, scored=None) -> Collected:
    """The global batch on the devices; `scored` as in `finish`."""
    T = responses.logp_BT.shape[1]
    logp_BT, entropy_BT = scored or (responses.logp_BT, responses.entropy_BT)
    stale = {}
    if scored:
        arrays = jax.device_put((logp_BT, responses.logp_BT, responses.peak_BM))
        ratio_BM = objective.chunk_ratio(*arrays, chunk_tokens=run.cfg.audit.chunk_tokens)
        stale = {"old_logp_BT": responses.logp_BT, "ratio_BM": np.asarray(jax.device_get(ratio_BM))}
    token_BL, packed, prompt_length_B = join(run, responses.prompts, responses.tokens, T)
    length_B = np.array(list(map(len, responses.tokens)), np.int32)
    advantage_B = None
    if rewards is not None:
        advantage_B = np.asarray(objective.group_advantage(rewards, run.cfg.num_generations), np.float32)
    n_min_B = None
    if run.cfg.audit.num_continuations > N:
        n_min_B = np.full(len(length_B), min(min_continuations(run.cfg), -(-N // 2)), np.int32)
    batch = objective.Batch(
        token_BL, prompt_length_B, length_B, responses.peak_BM, feedback.k_sem_BM, feedback.n_BM, n_min_B, advantage_B,
        teacher_logp_BT=teacher_logp(run, responses) if run.cfg.objective.name == "opd" else None, packed=packed, **stale,
    )  # fmt: skip
    stats = vocab.TokenStats(logp_BT, entropy_BT)
    batch, stats = sharding.put_rows((batch, stats), run.mesh)
    service = teachers.Counts().take() | (run.teacher.metrics() if run.teacher else {})
    return Collected(batch, stats, responses, feedback, rewards, service)


def teacher_logp(run, responses: Responses) -> np.ndarray:
    """The white-box teacher's log-probs of the response tokens [B, T]; 0 past a row's end."""
    pairs = zip(responses.prompts, responses.tokens, strict=True)

    scored = run.thread.submit(teachers.together(run.teacher.score_tokens(p.messages, p.token_ids, r) for p, r in pairs))
    settle(run, [scored])
    rows = scored.result()
    out = np.zeros(responses.logp_BT.shape, np.float32)
    for b, row in enumerate(rows):
        if len(row) != len(responses.tokens[b]) or not np.isfinite(row).all():
            raise FloatingPointError(f"the teacher scored {len(row)} of {len(responses.tokens[b])} tokens, or not all finite")
        out[b, : len(row)] = row
    return out
