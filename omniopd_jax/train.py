"""The loop. One step, from prompts to the update, is `begin` and `finish`: read them from top to bottom.

Between jitted passes the host samples, asks the teacher and compares texts; everything that the run depends on follows
from the config's seed and the step, so a run that was killed and started again goes on as if it had not been.
"""

import functools

import jax
from ml_collections import ConfigDict

from omniopd_jax import config, experience, graders, objective, rollout
from omniopd_jax.errors import Stopped, TeacherStopped
from omniopd_jax.evaluation import sampling as evaluation
from omniopd_jax.experience import Group
from omniopd_jax.parallel import processes
from omniopd_jax.run import bucket, checkpoint, host, logging, preflight, reporting, setup
from omniopd_jax.run.setup import Run
from omniopd_jax.run.state import TrainState


def train(cfg: ConfigDict) -> dict:
    """Trains as the config says; resumes from the newest checkpoint in `run_dir`.

    Returns:
      The summary that is also printed and written to summary.json, and `exit_code`.

    Raises:
      UserError: before anything is loaded or compiled, where a setting, the data or the teacher is wrong.
      TeacherStopped: after a checkpoint, when the teacher can give no more.
    """
    preflight.validate(cfg)
    with host.StopFlag() as stop, bucket.held(cfg) as mirror:
        disks = checkpoint.restore_journal(cfg)
        with setup.prepared(cfg, stop, disks) as run, checkpoint.opened(cfg, disks, mirror) as checkpoints:
            return run_steps(run, checkpoints)


def run_steps(run: Run, checkpoints: checkpoint.Checkpoints) -> dict:
    """Evaluates, takes the steps that are left, evaluates again; returns the summary."""
    state, totals = setup.first_state(run, checkpoints)
    with reporting.Reports(run, totals, start=int(jax.device_get(state.step))) as reports:
        if run.held_out and totals.get("accuracy_before") is None:
            run.stop.doing = "evaluating before the first step"
            totals["accuracy_before"] = evaluate(run, state, reports)
            logging.say(f"accuracy before: {totals['accuracy_before']:.1%}")
        run.timer.take()
        with run.stop.deferred(), run.compiled, jax.transfer_guard("disallow"):
            state = loop(run, state, checkpoints, reports)
        if run.stop.agreed:
            return {"exit_code": host.RESUME_EXIT_CODE, "step": int(jax.device_get(state.step))}
        run.stop.saved, run.stop.doing = True, "evaluating after the last step"
        after = evaluate(run, state, reports) if run.held_out else None
        reports.close()
        out = reporting.summary(run, int(jax.device_get(state.step)), totals, after) | {"exit_code": 0}
        processes.barrier("end")
        return out


def begin(run: Run, state: TrainState, t: int) -> tuple[Group, int]:
    """The first half of step t: the student answers, the teacher is asked. Returns what waits for it, and N.

    Responses come in parts as they end: the teacher answers one while the rest are being sampled.
    """
    cfg, student, phase = run.cfg, run.student, run.timer.phase
    drawn = experience.draw(run.prompts, cfg, t)
    M, N = experience.allowance(run.teacher, cfg, t)
    if objective.of(cfg).asks == "solutions":
        with phase("teacher_wait"):
            if run.teacher is None:  # the prompts file has them
                responses, solved = experience.given_solutions(drawn, student, cfg), []
            else:
                responses, solved = experience.solutions(run.teacher, run.thread, run.stop, drawn, student, cfg)
        with phase("score"):
            scores = experience.score(run.steps, run.policy(state), responses, student, cfg)
        return Group(responses, scores, experience.peaks(scores, responses, student, cfg, M), [], solved), N
    policy = run.policy(state)
    sampler, groups = rollout.prepare(policy, student.model_cfg, compute=student.compute), []
    for responses in run.timer.each("rollout", experience.sample(sampler, drawn, student, state.key, cfg)):
        with phase("score"):
            scores = experience.score(run.steps, policy, responses, student, cfg)
            peak_BM = experience.peaks(scores, responses, student, cfg, M)
        with phase("teacher_wait"):
            asked = experience.ask(run.teacher, run.thread, responses, peak_BM, student.decoder, cfg, N)
        groups.append(Group(responses, scores, peak_BM, asked))
    return experience.merge(groups), N


def finish(run: Run, state: TrainState, group: Group, N: int) -> experience.Experience:
    """The second half: the teacher's texts become similarities, grades and the batch of an update."""
    cfg, student, phase = run.cfg, run.student, run.timer.phase
    responses, now = group.responses, None
    if cfg.max_staleness:  # an older policy sampled
        with phase("score"):
            now = experience.score(run.steps, run.policy(state), responses, student, cfg)
    with phase("teacher_wait"):
        audits = experience.answers(group, run.stop)
    with phase("similarity"):
        foreign = [run.teacher.named(a.request.teacher).foreign_tokenizer for a in audits]
        feedback = experience.compare(run.similarity, audits, len(responses.tokens), cfg, foreign_tokenizer=foreign)
    rewards = teacher_logp_BT = None
    if objective.needs_reward(cfg):
        with phase("reward"):
            rewards = experience.grade(graders.shared(cfg.reward.grader), responses, student.decoder)
    if objective.of(cfg).asks == "logp":
        with phase("teacher_wait"):
            T = group.scores.logp_BT.shape[1]
            teacher_logp_BT = experience.teacher_logp(run.teacher, run.thread, run.stop, responses, T)
    feedback = feedback.with_solutions(group.solutions)
    return experience.assemble(group, feedback, rewards, teacher_logp_BT, N, student, cfg, now)


def loop(run: Run, state: TrainState, checkpoints: checkpoint.Checkpoints, reports: reporting.Reports) -> TrainState:
    """Steps from the state's own to `num_steps`; the metrics of a step are read after the next one was dispatched."""
    cfg, stop = run.cfg, run.stop
    start = int(jax.device_get(state.step))
    if cfg.max_staleness:
        ask = functools.partial(ask_again, run)
        drawn = experience.draw(run.prompts, cfg, start)
        run.ahead.load(config.local_folder(cfg), start, drawn, ask)

    def save():
        reports.flush()
        run.ahead.save(config.local_folder(cfg), int(jax.device_get(state.step)), cfg.checkpoint.keep)
        with run.compiled.expected():
            checkpoints.save(state, reports.totals, journal=run.teacher.journal if run.teacher else None)

    try:
        for t in range(start, cfg.num_steps):
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
            done = t + 1 == cfg.num_steps
            if run.held_out and cfg.eval.every and (t + 1) % cfg.eval.every == 0 and not (done or stop.agreed):
                evaluate(run, state, reports)
                stop.agreed = processes.any_of("stop", stop.requested)  # a signal may have come meanwhile
            reports.add(t, values, targets, got, run.timer.take())
            if done or stop.agreed or (t + 1) % cfg.checkpoint.every == 0:
                save()
            run.compiled.step_done(t + 1 - start)
            if stop.agreed:
                run.ahead.drain(cfg.teacher.timeout_s)
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


def evaluate(run: Run, state: TrainState, reports: reporting.Reports) -> float:
    """Greedy answers to the held-out prompts, reported with the number of updates before them; returns the accuracy."""
    student, cfg = run.student, run.cfg
    with run.timer.phase("eval"), run.compiled.expected(), jax.transfer_guard("allow"):
        found = evaluation.greedy(
            run.policy(state), student.model_cfg, run.held_out.prompts, student.template, student.end_ids,
            grader=graders.shared(cfg.eval.grader), max_new_tokens=cfg.max_completion_length, how=experience.how(cfg),
            compute=student.compute,
        )  # fmt: skip
    reports.evaluation(int(jax.device_get(state.step)), found)
    return found.accuracy
