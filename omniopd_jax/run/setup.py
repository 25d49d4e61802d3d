"""A run made ready: everything checked (preflight.py), then loaded, laid out on the mesh and compiled passes named."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from omniopd_jax import audit, config, hf, model, objective, step, teachers
from omniopd_jax.data import benchmarks
from omniopd_jax.data.prompts import Prompts
from omniopd_jax.experience import Student
from omniopd_jax.model import lora
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import estimate, identity, logging, preflight, profiling, thinking, trained
from omniopd_jax.run.checkpoint import Checkpoints
from omniopd_jax.run.host import AsyncThread, StopFlag
from omniopd_jax.run.state import TrainState
from omniopd_jax.similarity import Similarity
from omniopd_jax.staleness import Ahead
from omniopd_jax.teachers import by_row
from omniopd_jax.teachers.journal import Totals

LORA_STREAM = 0x10AA  # folded into the run's key for the adapters' first values; sample ids are folded in elsewhere
UNREAD = (  # sections that no jitted code reads: a new value must not recompile
    "run_dir", "local_dir", "seed", "student", "data", "teacher", "teachers", "eval", "log", "checkpoint", "budget",
    "distributed",
    "profile",
)  # fmt: skip
compiled_steps = functools.lru_cache(maxsize=1)(step.make_steps)  # another seed in this process compiles nothing


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a run holds besides its state.

    Attributes:
      reference: the frozen initial student: the anchor's reference, with LoRA the adapters' base; None where none is
        read.
      teacher_params: of a white-box teacher whose whole distribution is read, on the mesh; else None.
      disks: for each process the lowest rank that shares its journal's disk.
      digests: of what the run reads (identity.py).
      sets: of `eval.sets`, encoded.
      carried: what one step leaves to the next beside the state, saved with it: the audits' mean agreement.
    """

    cfg: ConfigDict
    student: Student
    prompts: Prompts
    held_out: Prompts | None
    teacher: teachers.Teacher | None
    similarity: Similarity
    steps: step.Steps
    reference: dict | None
    teacher_cfg: model.ModelConfig | None
    teacher_params: dict | None
    thread: AsyncThread
    stop: StopFlag
    disks: list[int]
    ahead: Ahead
    timer: logging.PhaseTimer
    profiler: profiling.Profiler
    compiled: profiling.Recompilations
    digests: dict[str, str]
    sets: tuple[benchmarks.Suite, ...] = ()
    carried: dict[str, float] = dataclasses.field(default_factory=dict)

    def policy(self, state: TrainState) -> dict:
        """The whole model as it is now."""
        return step.policy(state.params, self.reference, self.cfg)


@contextmanager
def prepared(cfg: ConfigDict, stop: StopFlag, disks: list[int]) -> Iterator[Run]:
    """The run that `cfg` describes, its teacher and thread closed at the end. Nothing compiles before all checks
    passed.

    Raises:
      UserError: everything that is wrong, in every process.
    """
    thread, teacher = AsyncThread(), None
    try:
        checked = preflight.check(cfg, thread)
        teacher = checked.teacher
        if teacher is not None:
            say_teacher(cfg, checked, disks)
        else:
            logging.say(f"objective {cfg.objective.name}: no teacher")
        yield load(cfg, checked, thread, stop, disks)
    finally:
        thread.cancel_all()
        if teacher is not None:
            thread.submit(teacher.close()).result(timeout=30)
        thread.close()


def say_teacher(cfg: ConfigDict, checked: preflight.Checked, disks: list[int]) -> None:
    """The teacher's line, the probe's table and the estimate; a budget is divided among the hosts with a journal."""
    teacher = checked.teacher
    logging.say(checked.teacher_said)
    for own_cfg, own in by_row.each(cfg, teacher):
        for line in remarks(own_cfg, own) + thinking.remarks(own_cfg, checked.template, own):
            logging.say(line)
    if len(set(disks)) > 1:
        paid = processes.gather("spent before", [dataclasses.astuple(totals) for totals in teacher.paid()])
        teacher.divide_budget([[Totals(*t) for t in own] for own in processes.once_a_disk(paid, disks)])
    if teacher.report:
        steps = max(0, cfg.num_steps - estimate.steps_done(cfg.run_dir))
        logging.say(f"{teacher.report.table()}\nstill to come, at most:\n{teacher.forecast(steps)}")


def remarks(cfg: ConfigDict, teacher: teachers.Teacher) -> list[str]:
    """What a person should know of the settings for a teacher that asks for text, one line each."""
    out = []
    if not objective.of(cfg).audited:
        return out
    if cfg.teacher.temperature == 0:
        out.append(
            "warning: teacher.temperature = 0: all continuations of a chunk are equal, so k_sem is 0 or N times one "
            "value"
        )
    unknown = teacher.foreign_tokenizer and cfg.teacher.provider != "local" and not cfg.teacher.tokenizer
    if unknown and cfg.audit.trim_continuation == "auto":
        out.append(
            "continuations are cut to the chunk's characters (audit.trim_continuation = auto), as the teacher's "
            "tokenizer is not "
            "known to be the student's: set teacher.tokenizer to student.path where it is the same"
        )
    return out


def load(cfg: ConfigDict, checked: preflight.Checked, thread: AsyncThread, stop: StopFlag, disks: list[int]) -> Run:
    """Loads the frozen weights and names the passes; what is trained comes with `first_state`."""
    mesh = sharding.make_mesh(cfg.mesh)
    model_cfg = checked.model_cfg
    compute = model.Compute(cfg.compute_dtype, cfg.model.remat, checked.attention, mesh, lora.scale(cfg.lora))
    preflight.check_rows(mesh, cfg)
    digests = identity.digests_of(cfg, checked.prompts, checked.held_out, checked.template.identity, checked.sets)
    identity.check_same_inputs(digests)
    reference = load_reference(cfg, model_cfg, mesh)
    teacher_params, teacher_cfg = None, None
    if "distribution" in objective.of(cfg).asks:
        teacher_params, teacher_cfg = hf.load(cfg.teacher.model, setting="teacher.model", mesh=mesh)
    steps = compiled_steps(model_cfg, frozen(cfg), compute=compute, teacher_cfg=teacher_cfg)
    prompts, template = checked.prompts, checked.template
    logging.say(
        f"student: {model_cfg.family}, {model.num_params(model_cfg) / 1e6:.2f} M parameters, "
        f"{model.count(checked.trained) / 1e6:.2f} M of them trained; attention {compute.attention}; "
        f"mesh {dict(mesh.shape)}; {len(prompts):,} prompts "
        f"({prompts.duplicates} duplicates and {prompts.overlong} overlong left out)"
    )
    if (held := checked.held_out) is not None:
        logging.say(
            f"evaluated on {len(held):,} held-out prompts (eval.num_prompts = {cfg.eval.num_prompts:,}; "
            f"{held.duplicates} duplicates and {held.overlong} overlong left out)"
        )
    elif idle := [f"{key} = {config.get(cfg, key)!r}" for key in ("eval.every", "eval.path") if config.get(cfg, key)]:
        logging.say(f"warning: {' and '.join(idle)}, but eval.num_prompts = 0: nothing is evaluated")
    decoder = audit.Decoder(template.tokenizer, template.stop_strings)
    student = Student(model_cfg, compute, template, decoder, checked.end_ids)
    return Run(
        cfg,
        student,
        prompts,
        checked.held_out,
        checked.teacher,
        checked.similarity,
        steps,
        reference,
        teacher_cfg,
        teacher_params,
        thread,
        stop,
        disks,
        Ahead(),
        logging.PhaseTimer(),
        profiling.Profiler(cfg),
        profiling.Recompilations(logging.say),
        digests,
        checked.sets,
    )


def load_reference(cfg, model_cfg: model.ModelConfig, mesh) -> dict | None:
    """The frozen initial student, in its dtype and memory; None where no update reads it."""
    if not step.holds_reference(cfg):
        return None
    where = step.reference_shardings(model_cfg, cfg, mesh)
    return hf.load(cfg.student.path, mesh=mesh, dtype=cfg.anchor.ref_dtype, shardings=where)[0]


def frozen(cfg: ConfigDict) -> FrozenConfigDict:
    """The config as a hashable static argument, without what no jitted code reads."""
    return FrozenConfigDict({key: value for key, value in cfg.to_dict().items() if key not in UNREAD})


def first_params(run: Run, key: jax.Array) -> dict:
    """What a new run trains: new adapters, or the student in float32; or what `student.start` holds."""
    cfg, mesh = run.cfg, run.student.mesh
    if cfg.student.start:
        return started(cfg, mesh)
    if cfg.lora.rank:
        where = run.steps.state_shardings.params
        new = jax.jit(
            lambda k: lora.init(jax.random.fold_in(k, LORA_STREAM), run.student.model_cfg, cfg.lora),
            out_shardings=where,
        )
        return new(key)
    if run.reference is None or cfg.anchor.ref_offload or cfg.anchor.ref_dtype != "float32":
        return hf.load(cfg.student.path, mesh=mesh)[0]
    return run.reference


def started(cfg, mesh) -> dict:
    """What another run trained, or an export's weights: float32, on the mesh. Adapters are merged unless they go on."""
    start = cfg.student.start
    folder, at = trained.locate(start)
    if not trained.is_run(folder):
        return hf.load(start, mesh=mesh, setting="student.start")[0]
    got = trained.read(folder, at, mesh)
    if cfg.lora.rank or not got.lora.rank:
        return got.params
    return jax.jit(lambda p: lora.merge(p, lora.scale(got.lora), "float32"))(got.whole(mesh))


def first_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict]:
    """The newest checkpoint's state and totals, or a new state; writes the resolved config beside the run."""
    cfg = run.cfg
    folder = config.local_folder(cfg)
    like = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        step.abstract_state(run.student.model_cfg, frozen(cfg)),
        run.steps.state_shardings,
    )
    file, digests = folder / "config.json", run.digests
    if checkpoints.latest() is not None:
        processes.raise_on_all("same run", lambda: identity.check_same_run(cfg, digests, file))
        run.stop.saved = True
    run.stop.doing = "loading"
    if found := checkpoints.restore_newest(like):
        state, totals = found
        totals = {key: value for key, value in totals.items() if key not in ("journal", "budget")}  # that process's
        logging.say(f"resumed from step {int(jax.device_get(state.step))} in {cfg.run_dir}")
    else:
        key = jax.random.key(cfg.seed)
        state = step.create_state(first_params(run, key), frozen(cfg), run.steps, key)
        totals = {}
    if jax.process_index() == 0:
        identity.write(cfg, digests, file, run.student.template.source)
    return state, totals
