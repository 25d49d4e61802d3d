"""All checks of a run before its weights load: files, data, graders, the teacher (the config's values: validation.py).

What is wrong is collected, so that a person sees everything at once, in every process.
"""

import dataclasses

import jax
from ml_collections import ConfigDict

from omniopd_jax import graders, hf, model, objective, similarity, solutions, step, teachers
from omniopd_jax.data import benchmarks
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.hf.template import Template, check_teacher, of_student
from omniopd_jax.hf.tokenizer import check_fits
from omniopd_jax.model import attention
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import files, logging, objectives, thinking, trained
from omniopd_jax.run.host import AsyncThread
from omniopd_jax.teachers import by_row
from omniopd_jax.teachers.protocol import need_of


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the checks have read on the way. `end_ids` end a response; `teacher_said` is the teacher's one line, ""
    without."""

    attention: str
    model_cfg: model.ModelConfig
    trained: dict
    template: Template
    end_ids: tuple[int, ...]
    prompts: data.Prompts
    held_out: data.Prompts | None
    similarity: similarity.Similarity
    teacher: teachers.Teacher | None
    teacher_said: str
    sets: tuple[benchmarks.Suite, ...]


class Findings:
    """Calls functions and keeps the `UserError`s that they raise; such a call's value is None."""

    def __init__(self):
        self.problems: list[str] = []

    def of(self, function, *args, **kwargs):
        """function(*args, **kwargs), or None where it found something wrong."""
        try:
            return function(*args, **kwargs)
        except UserError as error:
            self.problems.append(str(error))
            return None

    def raise_everywhere(self) -> None:
        """Raises in every process what any of them found.

        Raises:
          UserError: this process's findings, or those of the others.
        """
        by_process = processes.gather("checks", self.problems)
        if any(by_process):
            others = [f"process {r}: {p}" for r, found in enumerate(by_process) for p in found]
            raise UserError("\n".join(dict.fromkeys(self.problems or others)))


def check(cfg: ConfigDict, thread: AsyncThread) -> Checked:
    """Reads everything that is small (configs, tokenizer, prompts) and asks the teacher once; loads no weights.

    Raises:
      UserError: everything that is wrong, in every process.
    """
    found, own = Findings(), objective.of(cfg)
    model_cfg = found.of(hf.read_config, cfg.student.path)
    where = {"on": jax.default_backend(), "head_dim": 0 if model_cfg is None else model_cfg.head_dim}
    packed = cfg.packing.length > 0
    kernel = found.of(attention.resolve, cfg.model.attention, cfg.compute_dtype, packed=packed, **where)
    table, template, end_ids = None, None, ()
    if model_cfg is not None:
        table = found.of(step.trained, model_cfg, cfg)
        template, end_ids = found.of(check_student, cfg, model_cfg) or (None, ())
        if files.newest_step(cfg.run_dir) is None:  # only a new run reads it
            found.of(trained.check_start, cfg, model_cfg)
    prompts, held_out = found.of(load_prompts, cfg, template) or (None, None)
    if prompts is not None and template is not None:
        found.of(objectives.check_privileged, cfg, prompts, template)
    phi = found.of(similarity.make, cfg)
    sets = found.of(benchmarks.load_sets, cfg, template) or ()
    found.of(check_best_metric, cfg, sets)
    for name in dict.fromkeys([*graders_of(cfg), *(s.grader for s in sets)]):
        found.of(graders.shared, name)
    teacher, said = None, ""
    bought = solutions.bought(cfg)
    if prompts is not None and "solutions" in bought and found.of(solutions_given, cfg, prompts):
        del bought["solutions"]
    asks = bool(bought)
    if asks:
        found.of(check_teachers_files, cfg, prompts)
    if own.chunks and template is not None:
        found.of(thinking.check_span, cfg, template)
    in_process = "local" in [c.teacher.provider for c in by_row.configs(cfg).values() or (cfg,)]
    if asks and kernel is not None and (not in_process or not found.problems):
        needs = need_of(own.asks)
        teacher = found.of(teachers.make, cfg, needs, bought)
    if teacher is not None and prompts is not None:
        teacher.take_rows([p.teacher for p in prompts.prompts])
    if teacher is not None and not found.problems:
        said = found.of(lambda: thread.submit(teacher.check()).result())
    if teacher is not None and "distribution" in own.asks and model_cfg is not None:
        found.of(check_same_vocabulary, cfg, model_cfg, teacher.model_cfg)
    try:
        found.raise_everywhere()
        if teacher is not None:
            check_same_modes(cfg, teacher)
    except UserError:
        if teacher is not None:
            thread.submit(teacher.close()).result(timeout=30)
        raise
    return Checked(kernel, model_cfg, table, template, end_ids, prompts, held_out, phi, teacher, said, sets)


def check_best_metric(cfg, sets) -> None:
    """`checkpoint.best_metric` must be of a set that is evaluated. Raises `UserError` with those that are."""
    known = ["eval/accuracy", *(f"eval/accuracy/{s.name}" for s in sets)]
    if cfg.checkpoint.best_metric and len(known) > len(cfg.eval.sets):  # else a set could not be read, which is told
        one_of(cfg.checkpoint.best_metric, known, "checkpoint.best_metric")


def solutions_given(cfg, prompts: data.Prompts) -> bool:
    """Whether the prompts bring solutions of their own, so that no teacher is asked for them.

    Raises:
      UserError: some do and some do not, or each would be trained on several times.
    """
    missing = [p.id for p in prompts.prompts if p.solution is None]
    if len(missing) == len(prompts):
        return False
    if solutions.gated(cfg):
        raise UserError(
            f"audit.gate = {cfg.audit.gate!r} grades the teacher's own solutions, and the prompts bring some: set "
            "data.fields.solution = '' to leave theirs out"
        )
    if missing:
        raise UserError(
            f"{len(missing)} of {len(prompts)} prompts have no `solution`, such as {missing[0]!r}: all or none"
        )
    own = (objective.of(part) for _, part in objective.parts(cfg))
    if cfg.num_generations > 1 and any("solutions" in o.asks and not o.samples for o in own):
        raise UserError(
            f"num_generations = {cfg.num_generations} would train on each `solution` of the prompts more than once: "
            "set it to 1"
        )
    return True


def check_same_vocabulary(cfg, student: model.ModelConfig, teacher: model.ModelConfig) -> None:
    """A divergence over the whole vocabulary needs as many rows in both: one tokenizer is padded to several sizes.

    Raises:
      UserError: names both sizes.
    """
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"objective.name = {cfg.objective.name!r} compares whole distributions: student.path has "
            f"{student.vocab_size:,} "
            f"rows of vocabulary, teacher.model {teacher.vocab_size:,}; take objective.name = 'opd'"
        )


def graders_of(cfg) -> list[str]:
    """Names of the graders that the run will ask."""
    graded = objective.needs_reward(cfg) or solutions.gated(cfg)
    return [cfg.reward.grader] * graded + [cfg.eval.grader] * (cfg.eval.num_prompts > 0)


def check_student(cfg, model_cfg: model.ModelConfig) -> tuple[Template, tuple[int, ...]]:
    """The student's template and the tokens that end its answers, from its small files alone.

    Raises:
      UserError: a tokenizer or a template that does not go with the model or the run's lengths, or no end of an answer.
    """
    tokenizer = hf.load_tokenizer(cfg.student.path)
    check_fits(tokenizer, model_cfg, objectives.longest_row(cfg))
    template = dataclasses.replace(of_student(cfg, tokenizer), rows=model_cfg.vocab_size)
    end_ids, note = template.end_ids(hf.end_ids(cfg.student.path, tokenizer))
    if not end_ids and not template.stop_strings:
        raise UserError(
            f"{cfg.student.path} names no end token (eos_token_id) and there are no student.stop_strings: no answer "
            "would end"
        )
    if note:
        logging.say(note)
    return template, end_ids


def check_teachers_files(cfg, prompts: data.Prompts | None) -> None:
    """What can be said of a teacher before a weight of it is loaded: its template, its tokenizer, its positions.

    Raises:
      UserError: a template that refuses a kind of prompt; a tokenizer or lengths that do not go with the model.
    """
    for name, own in by_row.configs(cfg).items():
        mine = prompts and dataclasses.replace(prompts, prompts=[p for p in prompts.prompts if p.teacher == name])
        try:
            check_teachers_files(own, mine)
        except UserError as error:
            raise UserError(f"teachers.{name}: {error}") from error
    if cfg.teachers:
        return
    template = check_teacher(cfg)
    if prompts is not None:
        data.check_rendering(template, prompts)
    if cfg.teacher.provider == "local" and template is not None:
        model_cfg = hf.read_config(cfg.teacher.model, setting="teacher.model")
        check_fits(template.tokenizer, model_cfg, objectives.longest_row(cfg, teacher=True), setting="teacher.model")


def load_prompts(cfg, template) -> tuple[data.Prompts, data.Prompts | None]:
    """(training prompts, held-out prompts or None), rendered and tokenized where there is a template.

    Raises:
      UserError: what is wrong with a file, a data set or a prompt.
    """
    rewarded = graders.shared(cfg.reward.grader).check_answer if objective.needs_reward(cfg) else None
    prompts = data.load(
        cfg,
        source=cfg.data.source,
        split=cfg.data.split,
        path=cfg.data.path,
        count=cfg.data.num_prompts,
        check=rewarded,
    )
    held_out = None
    if cfg.eval.num_prompts:
        held_out = data.load(
            cfg,
            source="jsonl" if cfg.eval.path else cfg.data.source,
            split=cfg.eval.split,
            path=cfg.eval.path,
            count=cfg.eval.num_prompts,
            section="eval",
            check=graders.shared(cfg.eval.grader).check_answer,
        )
        held_out = data.with_suffix(held_out, cfg.eval.suffix)
    if template is None:
        return prompts, held_out
    held_out = held_out and data.encode(held_out, template, cfg, overlong="eval.overlong")
    return data.encode(prompts, template, cfg), held_out


def check_same_modes(cfg, teacher: teachers.Teacher) -> None:
    """All processes must have found the same way of continuing: it is part of the journal's key.

    Raises:
      UserError: in every process.
    """
    modes = [own.report.mode if own.report else "" for _, own in by_row.each(cfg, teacher)]
    told = processes.gather("teacher's mode", modes)
    if any(other != modes for other in told):
        raise UserError(
            f"the teacher was probed differently by each process ({', '.join(' and '.join(m) for m in told)}): set "
            "teacher.continuation to one of them"
        )


def check_rows(mesh, cfg) -> None:
    """A step's rows and prompts must divide over the mesh, and each process's rows must be its own alone.

    Raises:
      UserError: names the sizes.
    """
    shards, count = sharding.row_shards(mesh), jax.process_count()
    own, rest = divmod(cfg.prompts_per_step, count)
    rows, parts = own * count * cfg.num_generations, cfg.rollout.parts
    scored = shards * max(1, cfg.micro_batches // parts)  # what a part's rows are divided over
    if rest or rows % (shards * cfg.micro_batches) or rows % parts or rows // parts % scored:
        raise UserError(
            f"prompts_per_step = {cfg.prompts_per_step} x num_generations = {cfg.num_generations} = "
            f"{cfg.prompts_per_step * cfg.num_generations} rows must divide over rollout.parts = {cfg.rollout.parts}, "
            f"mesh.data x mesh.fsdp = {shards} and micro_batches = {cfg.micro_batches}, and the prompts over {count} "
            "process(es)"
        )
    if cfg.audit.shuffle_texts and own < 2:
        raise UserError(
            f"audit.shuffle_texts needs two prompts on each of {count} process(es): prompts_per_step = "
            f"{cfg.prompts_per_step}"
        )
    owners: dict[int, set] = {}
    for device, index in sharding.rows_map(mesh, shards).items():
        owners.setdefault(index, set()).add(device.process_index)
    if any(len(o) > 1 for o in owners.values()):
        raise UserError(
            f"mesh.tp = {mesh.shape['tp']} crosses processes: at most the {len(mesh.local_devices)} devices of one"
        )
