"""The loop. One step, from prompts to the update, is `begin` and `finish`: read them from top to bottom.

Between jitted passes the host samples, asks the teacher and compares texts; everything that the run depends on follows
from the config's seed and the step, so a run that was killed and started again goes on as if it had not been.
"""

import functools

import jax
from ml_collections import ConfigDict

from omniopd_jax import config, experience, graders, objective, rollout, teaching
from omniopd_jax.errors import Stopped, TeacherStopped
from omniopd_jax.evaluation import sampling as evaluation
from omniopd_jax.experience import Group
from omniopd_jax.parallel import processes
from omniopd_jax.run import best, bucket, checkpoint, estimate, host, identity, logging, reporting, setup, validation
from omniopd_jax.run.setup import Run
from omniopd_jax.run.state import TrainState

EVALUATED = "evaluated"  # of the totals: updates before the newest evaluation
CARRIED = "carried"  # of the totals: what one step leaves to the next beside the state (Run.carried)


def train(cfg: ConfigDict) -> dict:
    """Trains as the config says; resumes from the newest checkpoint in `run_dir`.

    Returns:
      The summary that is also printed and written to summary.json, and `exit_code`.

    Raises:
      UserError: before anything is loaded or compiled, where a setting, the data or the teacher is wrong.
      TeacherStopped: after a checkpoint, when the teacher can give no more.
    """
    validation.validate(cfg)
    with host.StopFlag() as stop, bucket.held(cfg) as mirror:
        stop.saved = estimate.steps_done(cfg.run_dir) > 0  # a signal from here on: starting again goes on
        identity.settle_date(cfg, config.local_folder(cfg) / "config.json")
        disks = checkpoint.restore_journal(cfg)
        with setup.prepared(cfg, stop, disks) as run, checkpoint.opened(cfg, disks, mirror) as checkpoints:
            return run_steps(run, checkpoints)


def run_steps(run: Run, checkpoints: checkpoint.Checkpoints) -> dict:
    """Evaluates, takes the steps that are left, evaluates again; returns the summary."""
    state, totals = setup.first_state(run, checkpoints)
    run.carried.update(totals.get(CARRIED, {}))
    start = int(jax.device_get(state.step))
    if not start:
        totals.setdefault(EVALUATED, 0)
    due = evaluation_due(run.cfg, start, totals)
    again = not start or due or (start >= run.cfg.num_steps and totals.get(best.LAST) is None)  # and its answers
    opened = reporting.Reports(run, totals, start=start, evaluated=not again)
    with opened as reports, best.watched(run.cfg, totals, start) as kept:
        if run.held_out and run.cfg.eval.before and start == 0:
            run.stop.doing = "evaluating before the first step"
            totals["accuracy_before"] = evaluate(run, state, reports, kept)
            logging.say(f"accuracy before: {totals['accuracy_before']:.1%}")
        elif due and run.held_out:  # the run was stopped, or had its end, here
            run.stop.doing = f"evaluating after step {start}"
            evaluate(run, state, reports, kept)
        count_evaluation(run, totals)
        with run.stop.deferred(), run.compiled, jax.transfer_guard("disallow"):
            state = loop(run, state, checkpoints, reports, kept)
        done = int(jax.device_get(state.step))
        if run.stop.agreed:
            return {"exit_code": host.RESUME_EXIT_CODE, "step": done}
        run.stop.saved, run.stop.doing = True, "evaluating after the last step"
        after = totals.get(best.LAST)
        if after is None and not done:  # num_steps = 0: evaluated just now
            after = totals.get("accuracy_before")
        if run.held_out and after is None:
            after = evaluate(run, state, reports, kept)
            count_evaluation(run, totals)
        reports.close()
        out = reporting.summary(run, done, totals, after) | {"exit_code": 0}
        processes.barrier("end")
        return out


def count_evaluation(run: Run, totals: dict) -> None:
    """Adds the seconds of an evaluation outside of the steps to the run's, and starts the next step's."""
    totals["time/eval"] = totals.get("time/eval", 0.0) + run.timer.take().get("time/eval", 0.0)


def evaluation_due(cfg, start: int, totals: dict) -> bool:
    """Whether a resumed run lacks the evaluation at the step that it goes on from."""
    every = cfg.eval.every
    there = totals.get(EVALUATED, start) >= start or totals.get(best.STOPPED)  # older checkpoints: taken for done
    return bool(every) and 0 < start < cfg.num_steps and start % every == 0 and not there


def begin(run: Run, state: TrainState, t: int) -> tuple[Group, int]:
    """The first half of step t: the student answers, the teacher is asked. Returns what waits for it, and N.

    Responses come in parts as they end: the teacher answers one while the rest are being sampled.
    """
    cfg, student, phase = run.cfg, run.student, run.timer.phase
    drawn = experience.draw(run.prompts, cfg, t)
    M, N = experience.allowance(run.teacher, cfg, t, run.carried.get("asked"), len(set(run.disks)))
    rounds = experience.Rounds(run.similarity, run.carried.get("agreement"))  # of `audit.adaptive`
    solving = teaching.solve(run.teacher, run.thread, drawn, cfg)
    if not objective.of(cfg).samples:
        return teaching.unsampled(drawn, solving, cfg), N
    policy = run.policy(state)
    sampler, groups = rollout.prepare(policy, student.model_cfg, compute=student.compute), []
    for responses in run.timer.each("rollout", experience.sample(sampler, drawn, student, state.key, cfg)):
        with phase("score"):
            scores = experience.score(run.steps, policy, responses, student, cfg)
            peak_BM = experience.peaks(scores, responses, student, cfg, M)
        with phase("teacher_wait"):
            if not groups:
                gate = teaching.gate(solving, drawn, run.stop, cfg)
            peak_BM = teaching.unless_closed(peak_BM, responses, gate.shut)
            where = (responses, peak_BM, student.decoder, cfg, N)
            asked = experience.ask(run.teacher, run.thread, *where, rounds=rounds)
            behind = teaching.go_on(run.teacher, run.thread, responses, scores, student, cfg, shut=gate.shut)
        groups.append(Group(responses, scores, peak_BM, asked, continued=behind))
    return experience.merge(groups, drawn.prompts, solving, gate), N


def finish(run: Run, state: TrainState, group: Group, N: int) -> experience.Experience:
    """The second half: the teacher's texts become similarities, grades and the batch of an update."""
    cfg, student, phase, now = run.cfg, run.student, run.timer.phase, None
    if cfg.max_staleness:  # an older policy sampled
        with phase("score"):
            now = experience.score(run.steps, run.policy(state), group.responses, student, cfg)
    with phase("teacher_wait"):
        audits = experience.answers(group, run.stop)
    group, *own_rows = teaching.taught(group, student, cfg)
    responses = group.responses
    with phase("similarity"):
        feedback = experience.compare(run.similarity, run.teacher, audits, len(responses.tokens), cfg)
    rewards = teacher_logp_BT = None
    if cfg.audit.adaptive:
        run.carried.update(experience.agreement(feedback))
    if objective.needs_reward(cfg):
        with phase("reward"):
            rewards = experience.grade(graders.shared(cfg.reward.grader), responses, student.decoder)
    if "logp" in objective.of(cfg).asks:
        with phase("teacher_wait"):
            T = group.scores.logp_BT.shape[1]
            teacher_logp_BT = experience.teacher_logp(run.teacher, run.thread, run.stop, responses, T)
    got = experience.assemble(group, feedback, rewards, teacher_logp_BT, N, student, cfg, now, own_rows)
    return teaching.with_context(got, group, student, cfg)


def loop(
    run: Run, state: TrainState, checkpoints: checkpoint.Checkpoints, reports: reporting.Reports, kept: best.Best
) -> TrainState:
    """Steps from the state's own to `num_steps`; the metrics of a step are read after the next one was dispatched."""
    cfg, stop = run.cfg, run.stop
    start = int(jax.device_get(state.step))
    end = start if reports.totals.get(best.STOPPED) else cfg.num_steps
    if cfg.max_staleness and start < end:
        ask = functools.partial(ask_again, run)
        drawn = experience.draw(run.prompts, cfg, start)
        sizes = (cfg.audit.chunk_tokens, cfg.audit.num_chunks)
        run.ahead.load(config.local_folder(cfg), start, drawn, ask, sizes)

    def save():
        reports.flush()
        reports.totals |= {CARRIED: dict(run.carried)} if run.carried else {}
        step, keep = int(jax.device_get(state.step)), cfg.checkpoint.keep
        run.ahead.save(config.local_folder(cfg), step, keep, cfg.audit.chunk_tokens)
        kept.wait()  # what the totals call the best must be there
        with run.compiled.expected():
            checkpoints.save(state, reports.totals, journal=run.teacher.journal if run.teacher else None)

    try:
        for t in range(start, end):
            with run.profiler.step(t):
                begin_now = functools.partial(begin, run, state)
                group, N = run.ahead.take(t, cfg.num_steps - 1, cfg.max_staleness, begin_now)
                got = finish(run, state, group, N)
                with run.timer.phase("update"):  # from its dispatch on
                    state, values, targets = run.steps.train_step(
                        state, run.reference, got.batch, got.stats, run.teacher_params
                    )
                    reports.flush()
                    jax.block_until_ready(state.step)
            stop.agreed = processes.any_of("stop", stop.requested)
            done, early = t + 1 == cfg.num_steps, None
            if run.held_out and cfg.eval.every and (t + 1) % cfg.eval.every == 0 and not (done or stop.agreed):
                evaluate(run, state, reports, kept)
                stop.agreed = processes.any_of("stop", stop.requested)  # a signal may have come meanwhile
                early = reports.totals.get(best.STOPPED)
            reports.add(t, values, targets, got, run.timer.take())
            if done or early or stop.agreed or (t + 1) % cfg.checkpoint.every == 0:
                save()
            run.compiled.step_done(t + 1 - start)
            if early:
                if run.ahead.drain(cfg.teacher.timeout_s):
                    save()
                reports.say(f"ended early after step {t + 1}: {early}")
                break
            if stop.agreed:
                if run.ahead.drain(cfg.teacher.timeout_s):
                    save()  # the journal's copy, with what came since
                reports.say(f"stopped by {stop.agreed} after step {t + 1}; the checkpoint is saved")
                break
    except Stopped as stopped:
        save()
        stop.agreed = str(stopped)
        reports.say(f"stopped by {stop.agreed}; the checkpoint is saved")
    except TeacherStopped:
        run.ahead.drain(cfg.teacher.timeout_s)
        save()
        raise
    finally:
        run.profiler.close()
        checkpoints.wait()
    return state


def ask_again(run: Run, responses: experience.Responses, peak_BM, N: int) -> list[experience.Asked]:
    """Asks once more for what was asked before a resume: the journal has most of it."""
    decoder = run.student.decoder
    return experience.ask(run.teacher, run.thread, responses, peak_BM, decoder, run.cfg, N)


def evaluate(run: Run, state: TrainState, reports: reporting.Reports, kept: best.Best) -> float:
    """Greedy answers to the held-out prompts and to `eval.sets`, reported with the number of updates before them; the
    best state is kept. Returns the accuracy on the held-out prompts.
    """
    student, cfg = run.student, run.cfg
    with run.timer.phase("eval"), run.compiled.expected(), jax.transfer_guard("allow"):
        params = rollout.prepare(run.policy(state), student.model_cfg, compute=student.compute)
        found, *others = (
            evaluation.greedy(
                params, student.model_cfg, prompts, student.template, student.end_ids, grader=graders.shared(grader),
                max_new_tokens=cfg.max_completion_length, how=experience.how(cfg), compute=student.compute,
            )
            for prompts, grader in [(run.held_out.prompts, cfg.eval.grader), *((s.prompts, s.grader) for s in run.sets)]
        )  # fmt: skip
        named = {s.name: other.accuracy for s, other in zip(run.sets, others, strict=True)}
        updates = int(jax.device_get(state.step))
        kept.take(state, reports.evaluation(updates, found, named))
        reports.totals[EVALUATED] = updates
    return found.accuracy
