"""The loop: prompts -> rollout -> scoring -> peaks -> teacher -> similarity -> update, readable from top to bottom.

Between jitted passes the host samples, asks the teacher and compares texts; everything that the run depends on follows
from the config's seed and the step, so a run that was killed and started again goes on as if it had not been.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from omniopd_jax import audit, config, evaluate, experience, hf, model, objective, similarity, step, teachers
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import Stopped, UserError
from omniopd_jax.model import attention, lora
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import checkpoint, files, flops, host, logging, preflight, profiling
from omniopd_jax.teachers import wire

LORA_STREAM = 0x10AA  # folded into the run's key for the adapters' first values; sample ids are folded in elsewhere
compiled_steps = functools.lru_cache(maxsize=1)(step.make_steps)  # another seed in this process compiles nothing


@dataclasses.dataclass
class Run:
    """Everything that a run holds besides its state."""

    cfg: ConfigDict
    tokenizer: object
    train: data.Prompts
    held_out: data.Prompts | None
    teacher: teachers.Teacher | None
    phi: object
    model_cfg: model.ModelConfig
    end_ids: tuple[int, ...]
    mesh: jax.sharding.Mesh
    steps: step.Steps
    ref_params: dict | None  # the frozen initial student: the anchor's reference, with LoRA the adapters' base
    teacher_params: dict | None
    decoder: audit.Decoder
    timer: logging.PhaseTimer
    thread: host.AsyncThread
    profiler: profiling.Profiler
    compiled: profiling.Recompilations
    disks: list[int] = dataclasses.field(default_factory=lambda: [0])  # checkpoint.restore_journal
    stop: host.StopFlag = dataclasses.field(default_factory=host.StopFlag)
    ahead: dict[int, experience.Asked] = dataclasses.field(default_factory=dict)  # sampled, under audit (max_staleness)

    def policy(self, state: step.TrainState) -> dict:
        """The whole model as it stands."""
        return step.policy(state.params, self.ref_params, self.cfg)


def train(cfg: ConfigDict) -> dict:
    """Trains as the config says; resumes from the newest checkpoint in `run_dir`.

    Returns:
      The summary that is also printed and written to summary.json.

    Raises:
      UserError: before anything is loaded or compiled, where a setting, the data or the teacher is wrong.
      TeacherStopped: after a checkpoint, when the teacher can give no more.
    """
    preflight.validate(cfg)
    with host.StopFlag() as stop:
        return guarded(cfg, stop)


def guarded(cfg: ConfigDict, stop: host.StopFlag) -> dict:
    """`train`, with the signals caught."""
    disks = checkpoint.restore_journal(cfg)
    run = prepare(cfg)
    if run.teacher:
        run.teacher.divide_budget(len(set(disks)))
    checkpoints = checkpoint.Checkpoints(cfg.run_dir, keep=cfg.checkpoint.keep, keep_every=cfg.checkpoint.keep_every)
    checkpoints.disks = disks
    state, totals = first_state(run, checkpoints)
    start = int(jax.device_get(state.step))
    writer = logging.Writer(cfg.run_dir, start_step=start, tensorboard=cfg.log.tensorboard)
    run.stop, run.disks = stop, disks
    try:
        before = totals.get("accuracy_before")
        if run.held_out and before is None:
            before = totals["accuracy_before"] = held_out_accuracy(run, state)
            logging.say(f"accuracy before: {before:.1%}")
        run.timer.take()
        with stop.deferred(), run.compiled, jax.transfer_guard("disallow"):
            state, totals = loop(run, state, checkpoints, writer, totals, stop)
        if stop.agreed:
            return {"exit_code": host.RESUME_EXIT_CODE, "step": int(jax.device_get(state.step))}
        after = held_out_accuracy(run, state) if run.held_out else None
        out = summary(run, state, totals, before, after) | {"exit_code": 0}
        processes.barrier("end")
        return out
    finally:
        writer.close()
        checkpoints.close()
        if run.teacher:
            run.thread.submit(run.teacher.close()).result(timeout=30)
        run.thread.close()


def graders_of(cfg) -> list[str]:
    """Names of the graders that the run will ask."""
    return [cfg.reward.grader] * experience.needs_reward(cfg) + [cfg.eval.grader] * (cfg.eval.num_prompts > 0)


def prepare(cfg: ConfigDict) -> Run:
    """Checks data, student and teacher within seconds, then loads; nothing is compiled before all three answered.

    Raises:
      UserError: everything that is wrong, in every process.
    """
    thread, problems, found = host.AsyncThread(), [], {}

    def attempt(name, function):
        try:
            found[name] = function()
        except UserError as error:
            problems.append(str(error))

    how = {"packed": cfg.packing.length > 0, "on": attention.platform(None)}
    attempt("attention", lambda: attention.resolve(cfg.model.attention, cfg.compute_dtype, **how))
    attempt("model_cfg", lambda: hf.read_config(cfg.student.path))
    attempt("trained", lambda: step.trained(found["model_cfg"], cfg)) if "model_cfg" in found else None
    attempt("tokenizer", lambda: hf.load_tokenizer(cfg.student.path)) if "model_cfg" in found else None
    attempt("train", lambda: load_prompts(cfg, found.get("tokenizer")))
    attempt("phi", lambda: similarity.make(cfg))
    attempt("graders", lambda: [evaluate.grader(name) for name in graders_of(cfg)])
    found["teacher"] = None
    if cfg.objective.name in objective.TAUGHT and "attention" in found:
        attempt("teacher", lambda: teachers.make(cfg))
    if found["teacher"]:
        attempt("said", lambda: thread.submit(found["teacher"].check()).result())
    if found.get("train"):
        attempt("same", lambda: same_prompts(found["train"][0]))
    told = processes.gather("checks", problems)
    if any(told):
        thread.close()
        others = [f"process {r}: {p}" for r, ps in enumerate(told) for p in ps if not problems]
        raise UserError("\n".join(dict.fromkeys(problems or others)))
    logging.say(found.get("said", f"objective {cfg.objective.name}: no teacher"))
    if found["teacher"] and found["teacher"].report:
        logging.say(f"{found['teacher'].report.table()}\nstill to come, at most:\n{found['teacher'].forecast()}")
    mesh = sharding.make_mesh(cfg.mesh)
    model_cfg = dataclasses.replace(
        found["model_cfg"], dtype=cfg.compute_dtype, remat=cfg.model.remat, mesh=mesh if mesh.size > 1 else None,
        attention=found["attention"],
    )  # fmt: skip
    model_cfg = lora.scaled(model_cfg, cfg.lora)
    sharding.check_rows(mesh, cfg)
    ref_params = load_reference(cfg, model_cfg, mesh)
    train_prompts, held_out = found["train"]
    teacher_params, teacher_cfg = None, None
    if cfg.objective.name == "opd_exact":
        teacher_params, teacher_cfg = white_box(cfg, found["teacher"], mesh)
    steps = compiled_steps(model_cfg, frozen(cfg), mesh, teacher_cfg)
    logging.say(
        f"student: {model_cfg.family}, {model.num_params(model_cfg) / 1e6:.2f} M parameters, "
        f"{model.count(found['trained']) / 1e6:.2f} M of them trained; attention {model_cfg.attention}; "
        f"mesh {dict(mesh.shape)}; {len(train_prompts):,} prompts "
        f"({train_prompts.duplicates} duplicates and {train_prompts.overlong} overlong left out)"
    )
    tokenizer = found["tokenizer"]
    return Run(
        cfg, tokenizer, train_prompts, held_out, found["teacher"], found["phi"], model_cfg,
        hf.end_ids(cfg.student.path, tokenizer), mesh, steps, ref_params, teacher_params,
        audit.Decoder(tokenizer), logging.PhaseTimer(), thread, profiling.Profiler(cfg), profiling.Recompilations(logging.say),
    )  # fmt: skip


def load_reference(cfg, model_cfg, mesh) -> dict | None:
    """The frozen initial student, in its dtype and memory; None where no update reads it."""
    if not step.holds_reference(cfg):
        return None
    where = step.reference_shardings(model_cfg, cfg, mesh)
    return hf.load(cfg.student.path, mesh=mesh, dtype=cfg.anchor.ref_dtype, shardings=where)[0]


def first_params(run: Run, key) -> dict:
    """What a new run trains: new adapters, or the student in float32."""
    cfg = run.cfg
    if cfg.lora.rank:
        where = run.steps.state_shardings.params
        new = jax.jit(lambda k: lora.init(jax.random.fold_in(k, LORA_STREAM), run.model_cfg, cfg.lora), out_shardings=where)
        return new(key)
    if run.ref_params is None or cfg.anchor.ref_offload or cfg.anchor.ref_dtype != "float32":
        return hf.load(cfg.student.path, mesh=run.mesh)[0]
    return run.ref_params


def same_prompts(prompts: data.Prompts) -> None:
    """All processes must read the same prompts: each takes its slice of one permutation.

    Raises:
      UserError: they do not.
    """
    digests = processes.gather("prompts", [len(prompts), teachers.stable_hash(*(p.id for p in prompts.prompts))])
    if any(d != digests[0] for d in digests):
        raise UserError(f"the processes read different training prompts: {[d[0] for d in digests]} of them, by process")


def white_box(cfg, teacher, mesh) -> tuple[dict, model.ModelConfig]:
    """The parameters of a teacher in process, for `opd_exact`, laid out on the mesh.

    Raises:
      UserError: the teacher is no local one, or has another tokenizer.
    """
    if teachers.DISTRIBUTION not in teacher.white_box or teacher.foreign_tokenizer:
        raise UserError("objective.name = 'opd_exact' needs teacher.provider = 'local' with the student's own tokenizer")
    model_cfg = dataclasses.replace(teacher.model_cfg, mesh=mesh if mesh.size > 1 else None)
    return hf.load(cfg.teacher.model, setting="teacher.model", mesh=mesh)[0], model_cfg


def frozen(cfg: ConfigDict) -> FrozenConfigDict:
    """The config as a hashable static argument, without what no jitted code reads: a new run_dir must not recompile."""
    plain = cfg.to_dict()
    unread = ("run_dir", "seed", "student", "data", "teacher", "eval", "log", "checkpoint", "budget", "distributed", "profile")
    for key in unread:
        plain.pop(key, None)
    return FrozenConfigDict(plain)


def load_prompts(cfg, tokenizer):
    """(training prompts, held-out prompts or None), rendered and tokenized where there is a tokenizer."""
    train_prompts = data.load(cfg, source=cfg.data.source, split=cfg.data.split, path=cfg.data.path, count=cfg.data.num_prompts)
    held_out = None
    if cfg.eval.num_prompts:
        held_out = data.load(
            cfg, source=cfg.data.source, split=cfg.eval.split, path=cfg.eval.path, count=cfg.eval.num_prompts, section="eval"
        )
        missing = next((p.id for p in held_out.prompts if p.answer is None), None)
        if missing is not None:
            raise UserError(
                f"eval.num_prompts = {cfg.eval.num_prompts} needs an `answer` a prompt; prompt {missing!r} of "
                f"{cfg.eval.path or cfg.data.name or 'the world'} has none"
            )
    if tokenizer is None:
        return train_prompts, held_out
    return data.encode(train_prompts, tokenizer, cfg), held_out and data.encode(held_out, tokenizer, cfg)


def first_state(run: Run, checkpoints) -> tuple[step.TrainState, dict]:
    """The newest checkpoint's state and totals, or a new state; writes the resolved config beside the run."""
    cfg = run.cfg
    folder = pathlib.Path(cfg.run_dir)
    like = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        step.abstract_state(run.model_cfg, frozen(cfg)),
        run.steps.state_shardings,
    )
    if checkpoints.latest() is not None:
        processes.together("same run", lambda: check_same_run(cfg, folder))
    if found := checkpoints.restore_newest(like):
        state, totals = found
        logging.say(f"resumed from step {int(jax.device_get(state.step))} in {folder}")
    else:
        key = jax.random.key(cfg.seed)
        state = step.create_state(first_params(run, key), frozen(cfg), run.steps, key)
        totals = {}
    if jax.process_index() == 0:
        files.write_atomic(folder / "config.json", as_json(cfg) + "\n")
    return state, totals


def as_json(cfg: ConfigDict) -> str:
    """The resolved config as a run's config.json holds it."""
    plain = cfg.to_dict()
    plain["teacher"]["base_url"] = wire.secrets.public_url(plain["teacher"]["base_url"])
    return wire.hide_keys(json.dumps(plain, indent=1, default=str))


def check_same_run(cfg, folder: pathlib.Path) -> None:
    """A run that is resumed must draw the same prompts and samples as before.

    Raises:
      UserError: names the keys that differ from the run's own config.json.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    advice = "write it again from the recipe of this run, or move it away to go on without comparing settings"
    before, now = config.flat(ConfigDict(files.read_json(file, advice))), config.flat(ConfigDict(json.loads(as_json(cfg))))
    fixed = ("seed", "prompts_per_step", "num_generations", "student.path", "data.", "lora.")
    changed = [k for k in now if k.startswith(fixed) and k in before and before[k] != now[k]]
    if changed:
        detail = "; ".join(f"{k} was {before[k]!r}, is {now[k]!r}" for k in changed)
        raise UserError(f"{folder} holds a run with other settings ({detail}): set them back, or set another run_dir")


def loop(run: Run, state, checkpoints, writer, totals: dict, stop: host.StopFlag):
    """Steps from the state's own to `num_steps`; metrics of a step are read after the next one was dispatched."""
    cfg, pending = run.cfg, None
    start = int(jax.device_get(state.step))
    progress = logging.Progress(cfg.num_steps, start)

    def flush():
        nonlocal pending
        if pending is not None:
            report(run, writer, progress, totals, *pending)
            pending = None

    def save():
        experience.save_ahead(run, int(jax.device_get(state.step)))
        with run.compiled.expected():
            checkpoints.save(state, totals, journal=run.teacher.journal if run.teacher else None)

    experience.load_ahead(run, start)
    try:
        for t in range(start, cfg.num_steps):
            with run.profiler.step(t):
                got = experience.collect(run, state, t)
                with run.timer.phase("update"):  # from its dispatch on
                    state, device_metrics, targets = run.steps.train_step(
                        state, run.ref_params, got.batch, got.stats, run.teacher_params
                    )
                    flush()
                    jax.block_until_ready(state.step)
            stop.agreed = processes.any_of("stop", stop.requested)
            done, extra = t + 1 == cfg.num_steps, {}
            if run.held_out and cfg.eval.every and (t + 1) % cfg.eval.every == 0 and not (done or stop.agreed):
                extra = {"eval/accuracy": held_out_accuracy(run, state)}
                stop.agreed = processes.any_of("stop", stop.requested)  # a signal may have come meanwhile
            pending = (t, device_metrics, targets, got, run.timer.take() | extra)
            if done or stop.agreed or (t + 1) % cfg.checkpoint.every == 0:
                flush()
                save()
            run.compiled.step_done(t + 1 - start)
            if stop.agreed:
                experience.drain(run)
                progress.say(f"stopped by {stop.agreed} after step {t + 1}; the checkpoint is saved")
                break
    except Stopped as stopped:
        flush()
        save()
        stop.agreed = str(stopped)
        progress.say(f"stopped by {stop.agreed}; the checkpoint is saved")
    except teachers.TeacherStopped:
        flush()
        experience.drain(run)
        save()
        raise
    finally:
        run.profiler.close()
        checkpoints.wait()
        progress.close()
    return state, totals


def report(run: Run, writer, progress, totals: dict, t: int, device_metrics, targets, got, own) -> None:
    """Reads a step's metrics from the device, checks them, writes them."""
    values = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
    for key in ("loss", "grad_norm"):
        if not np.isfinite(values[key]):
            raise FloatingPointError(f"{key} is {values[key]} at step {t}; nothing after the last checkpoint is kept")
    responses, feedback = got.responses, got.feedback
    asked = audit.metrics(feedback, run.cfg)
    asked |= logging.total(processes.gather("teacher's own counts", got.service), run.disks)
    for key in ("teacher/calls", "teacher/tokens_in", "teacher/tokens_out", "teacher/cost_usd", "teacher/failed"):
        totals[key] = totals.get(key, 0) + asked[key]
    for key, seconds in own.items():
        if key.startswith("time/"):
            totals[key] = totals.get(key, 0.0) + seconds
    targets = jax.tree.map(sharding.local_rows, targets)
    records, left_out = audit.records(
        feedback, t, responses.prompts, responses.entropy_BT, targets, -(-run.cfg.audit.log_per_step // jax.process_count())
    )
    values |= asked | own | {"teacher/cost_usd_total": asked.get("teacher/cost_usd_total", totals["teacher/cost_usd"])}
    here = {
        "completions/truncated_fraction": float(1 - responses.finished_B.mean()),
        "completions/repeated_fraction": float(np.mean([evaluate.repeated_ngrams(r) for r in responses.tokens])),
        "rollout/score_logp_gap": responses.sampler_gap,
    }
    if got.rewards is not None:
        here["reward/mean"] = float(got.rewards.mean())
    lengths = [[len(p.token_ids) for p in responses.prompts], list(map(len, responses.tokens))]
    parts = processes.gather("host metrics", [here, left_out, *lengths])  # every process has as many rows
    values |= {k: float(np.mean([part[0][k] for part in parts])) for k in here}
    values["audit/log_left_out"] = sum(part[1] for part in parts)
    prompts, tokens = (sum((part[i] for part in parts), []) for i in (2, 3))
    totals["student_tokens"] = totals.get("student_tokens", 0) + sum(tokens)
    white = run.teacher.model_cfg if run.teacher_params is not None else None
    computed = got.batch.token_BL.size if got.batch.packed is None else got.batch.packed.token_RL.size
    values["perf/padding_fraction"] = 1 - (sum(prompts) + sum(tokens)) / computed
    values |= flops.metrics(run.cfg, run.model_cfg, white, prompts, tokens, own, run.mesh, flops.chip())
    writer.metrics(t, values)
    writer.audits(records)
    progress.step(t + 1, values)


def held_out_accuracy(run: Run, state) -> float:
    """Greedy accuracy on the held-out prompts."""
    with run.timer.phase("eval"), run.compiled.expected(), jax.transfer_guard("allow"):
        return evaluate.greedy(
            run.policy(state), run.model_cfg, run.held_out.prompts, run.tokenizer, run.end_ids,
            grader=evaluate.grader(run.cfg.eval.grader), max_new_tokens=run.cfg.max_completion_length,
        ).accuracy  # fmt: skip


def cost(teacher) -> str:
    """What the run has cost so far, for the table at its end."""
    spent = teacher.spent() if teacher else None
    if spent is None:
        return "none"
    return f"${spent.usd:.2f}" if teacher.price.known else "unknown: set teacher.price_input and teacher.price_output"


def summary(run: Run, state, totals: dict, before: float | None, after: float | None) -> dict:
    """What the run came to; printed as a table and written to summary.json."""
    out = {"step": int(jax.device_get(state.step)), "accuracy_before": before, "accuracy_after": after} | totals
    if run.teacher and (spent := run.teacher.spent()):  # the journal's: also what was paid between a checkpoint and a crash
        out |= {"teacher/calls": spent.calls, "teacher/cost_usd": spent.usd}
    rows = [("steps", str(out["step"]))]
    if before is not None and after is not None:
        gain = f"{100 * (after - before):+.1f} points"
        rows += [("accuracy before", f"{before:.1%}"), ("accuracy after", f"{after:.1%}  ({gain})")]
    rows += [
        ("teacher calls", f"{out.get('teacher/calls', 0):,.0f}  ({totals.get('teacher/failed', 0):,.0f} failed)"),
        ("teacher tokens in / out", f"{totals.get('teacher/tokens_in', 0):,.0f} / {totals.get('teacher/tokens_out', 0):,.0f}"),
        ("teacher cost", cost(run.teacher)),
        ("student tokens", f"{totals.get('student_tokens', 0):,}"),
    ]
    rows += [(f"time, {k[5:]}", f"{v:.1f} s") for k, v in totals.items() if k.startswith("time/") and k != "time/step"]
    rows += [("time, evaluation", f"{run.timer.total.get('eval', 0):.1f} s")]
    logging.say(logging.table(rows, f"{run.cfg.objective.name} in {run.cfg.run_dir}"))
    if jax.process_index() == 0:
        files.write_atomic(pathlib.Path(run.cfg.run_dir) / "summary.json", json.dumps(out, indent=1) + "\n")
    return out
