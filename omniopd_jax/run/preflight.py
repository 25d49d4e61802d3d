"""All checks of a run before its weights load: the config's values against each other, files, data, graders, the
teacher.

What is wrong is collected, so that a person sees everything at once, in every process.
"""

import dataclasses
import importlib.util
import math

import jax
from ml_collections import ConfigDict

from omniopd_jax import config, graders, hf, model, objective, similarity, solutions, step, teachers
from omniopd_jax.data import benchmarks
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.hf.template import Template, check_teacher, of_student
from omniopd_jax.hf.tokenizer import check_fits
from omniopd_jax.model import attention
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import identity, logging, objectives, profiling, thinking, trackers, trained
from omniopd_jax.run.host import AsyncThread
from omniopd_jax.teachers import by_row
from omniopd_jax.teachers.protocol import need_of

LEAST = {  # dotted key -> the smallest value that it may have
    "num_steps": 0, "prompts_per_step": 1, "num_generations": 1, "num_iterations": 1, "micro_batches": 1,
    "rollout.parts": 1, "rollout.slots": 0, "rollout.turn": 0, "rollout.cache_gib": 0,
    "max_prompt_length": 1, "max_completion_length": 1, "vocab_block": 1, "audit.num_chunks": 1,
    "audit.chunk_tokens": 1, "audit.num_continuations": 1, "audit.min_continuations": 0, "audit.log_per_step": 0,
    "audit.adaptive_first": 1, "audit.adaptive_error": 0, "audit.adaptive_sign": 0, "audit.gate_attempts": 1,
    "prior.alpha": 0, "anchor.kl_coef": 0, "checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 0,
    "continuation.cut_tokens": 1, "continuation.cuts": 1, "continuation.max_tokens": 0, "context.clip": 0,
    "context.max_prompt_length": 0, "context.ema_decay": 0,
    "temperature": 0, "teacher.temperature": 0, "optimizer.learning_rate": 0, "optimizer.max_grad_norm": 0,
    "optimizer.min_learning_rate": 0, "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0,
    "optimizer.b1": 0, "optimizer.b2": 0, "objective.clip": 0, "reward.coef": 0, "teacher.budget_share": 0,
    "optimizer.decay_steps": 0, "eval.patience": 0, "eval.stop_below": 0, "lora.rank": 0,
    "top_k": 0, "data.num_prompts": 0, "eval.num_prompts": 0, "eval.every": 0, "packing.length": 0,
    "teacher.max_concurrency": 1, "teacher.max_retries": 0, "teacher.requests_per_minute": 0,
    "teacher.tokens_per_minute": 0, "teacher.price_input": -1, "teacher.price_cached": -1, "teacher.price_output": -1,
    "budget.usd": 0, "budget.tokens": 0, "budget.calls": 0, "budget.confirm_usd": 0, "log.completions_per_step": 0,
    "log.evaluation_answers": 0, "log.text_characters": 1, "log.chance_pairs": 0,
}  # fmt: skip
BUCKET = (("gcsfs", "gcsfs"), ("google-cloud-storage", "google.cloud.storage"))  # package, module: of gs://
FRACTIONS = ("top_p", "teacher.top_p")  # more than 0, at most 1
MOST = {"teacher.budget_share": 1, "eval.stop_below": 1}  # dotted key -> the largest value that it may have
BELOW_ONE = ("optimizer.b1", "optimizer.b2", "context.ema_decay")
EVALUATED = (
    "compute_dtype",
    "max_prompt_length",
    "max_completion_length",
    "mesh.",
    "model.",
    "rollout.",
    "student.",
    "temperature",
    "top_p",
    "top_k",
)  # what omniopd_jax.evaluate reads of a recipe
SECONDS = ("teacher.timeout_s", "teacher.deadline_s", "distributed.start_s", "distributed.heartbeat_s",
           "distributed.barrier_s", "distributed.limit_s")  # fmt: skip


def validate(c: ConfigDict) -> None:
    """Checks the values by themselves and against each other, before anything is loaded; fills in empty graders.

    Raises:
      UserError: one line naming the key, its value and what is allowed.
    """
    check_values(c)
    for name, own in by_row.configs(c).items():
        _check_values(own, _choices(), of=f"teachers.{name}.")
    if not c.optimizer.eps > 0:
        raise UserError(f"optimizer.eps = {c.optimizer.eps} must be more than 0")
    profiling.window(c.profile.steps)
    trackers.check(c.log.trackers)
    objectives.check(c)
    identity.check_allowed(c)
    _check_data(c)
    _check_sizes(c)
    _check_audits(c)
    _check_updates(c)
    _check_evaluations(c)
    if c.lora.rank:
        _check_lora(c)


def check_values(c: ConfigDict, only: tuple[str, ...] = ("",)) -> None:
    """Checks each value by itself.

    Args:
      only: beginnings of the keys that are looked at: what a command reads of a recipe (`EVALUATED`).

    Raises:
      UserError: one line naming the key, its value and what is allowed.
    """
    _check_values(c, _choices(), only=only)
    if not 0 <= c.seed < 2**31:
        raise UserError(f"seed = {c.seed} must be in [0, 2**31)")
    for axis in sharding.AXES:
        if c.mesh[axis] < 1 and c.mesh[axis] != -1:
            raise UserError(f"mesh.{axis} = {c.mesh[axis]} must be at least 1, or -1 for whatever is left")


def _choices() -> dict:
    """{dotted key: what it may be}, with the registries' names."""
    return config.CHOICES | {
        "objective.name": objective.OBJECTIVES,
        "eval.grader": ("", *graders.GRADERS),
        "reward.grader": ("", *graders.GRADERS),
        "audit.similarity": similarity.SIMILARITIES,
        "teacher.provider": teachers.TEACHERS,
    }


def _check_values(c: ConfigDict, choices: dict, of: str = "", only: tuple[str, ...] = ("",)) -> None:
    """Each key by itself, of those that begin as `only` says; with `of` those of a teacher alone, named so."""

    def values(paths):
        for path in paths:
            if path.startswith(only) and (not of or path.startswith("teacher.")):
                yield of + path.removeprefix("teacher.") if of else path, path, config.get(c, path)

    for name, path, value in values(choices):
        one_of(value, choices[path], name)
    for name, path, value in values(config.flat(c)):
        if isinstance(value, float) and not math.isfinite(value):
            off = "; 0 = no cap" if path == "budget.usd" else ""
            raise UserError(f"{name} = {value} must be a finite number{off}")
    for name, path, value in values(LEAST):
        if not value >= LEAST[path]:
            raise UserError(f"{name} = {value} must be at least {LEAST[path]}")
    for name, path, value in values(MOST):
        if value > MOST[path]:
            raise UserError(f"{name} = {value} must be at most {MOST[path]}")
    for name, _, value in values(BELOW_ONE):
        if not value < 1:
            raise UserError(f"{name} = {value} must be less than 1")
    for name, _, value in values(FRACTIONS):
        if not 0 < value <= 1:
            raise UserError(f"{name} = {value} must be in (0, 1]")
    for name, _, value in values(SECONDS):
        if not value > 0:
            raise UserError(f"{name} = {value} must be more than 0 seconds")


def _check_data(c: ConfigDict) -> None:
    if config.is_bucket(c.run_dir):
        _check_bucket(c)
    if config.is_bucket(c.teacher.journal):
        raise UserError(f"teacher.journal = {c.teacher.journal!r} must be a folder on a local disk: SQLite writes it")
    plain = config.default()
    for key in data.unread(c.data.source):
        value, other = config.get(c, key), config.get(plain, key)
        if key.endswith(".path") and value != other:  # a recipe's names may stay where a file takes their place
            able = " or ".join(f"data.source = {name!r}" for name, keys in data.READ.items() if key in keys)
            raise UserError(
                f"{key} = {value!r} is not read with data.source = {c.data.source!r}: set {key} = {other!r}, or {able}"
            )
    graded = objective.needs_reward(c) or solutions.gated(c)
    for section, used in ((c.reward, graded), (c.eval, c.eval.num_prompts > 0)):
        name = "reward.grader" if section is c.reward else "eval.grader"
        if used and not section.grader:
            if c.data.source != "world":
                known = ", ".join(sorted(set(graders.GRADERS) - {"world"}))
                raise UserError(
                    f"{name} is empty, and answers of data.source = {c.data.source!r} need one: set one of {known}"
                )
            section.grader = "world"


def _check_bucket(c: ConfigDict) -> None:
    name, _, path = c.run_dir.removeprefix("gs://").strip("/").partition("/")
    if not c.run_dir.startswith("gs://") or not name or not path:
        raise UserError(
            f"run_dir = {c.run_dir!r} is neither a folder nor gs://BUCKET/PATH, the one kind of bucket that is written "
            "to; others: a folder that they are mounted at"
        )
    missing = [package for package, module in BUCKET if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"run_dir = {c.run_dir!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _check_sizes(c: ConfigDict) -> None:
    longest = c.max_prompt_length + c.max_completion_length
    if 0 < c.packing.length < longest:
        raise UserError(
            f"packing.length = {c.packing.length} holds no prompt and response at their longest: at least "
            "max_prompt_length + "
            f"max_completion_length = {longest}, or 0 for no packing"
        )
    rows = c.prompts_per_step * c.num_generations
    if rows % c.micro_batches:
        raise UserError(f"micro_batches = {c.micro_batches} must divide prompts_per_step x num_generations = {rows}")


def _check_audits(c: ConfigDict) -> None:
    if objective.of(c).chunks and c.audit.chunk_tokens > c.max_completion_length:
        raise UserError(
            f"audit.chunk_tokens = {c.audit.chunk_tokens} is larger than max_completion_length = "
            f"{c.max_completion_length}: no chunk could ever fit; allowed: 1 to {c.max_completion_length}"
        )
    if c.audit.min_continuations > c.audit.num_continuations:
        raise UserError(
            f"audit.min_continuations = {c.audit.min_continuations} is larger than audit.num_continuations = "
            f"{c.audit.num_continuations}: every audit would be dropped"
        )
    if c.max_staleness and (objective.of(c).asks != {"continuations"} or solutions.gated(c)):
        what = f"audit.gate = {c.audit.gate!r}" if solutions.gated(c) else f"objective.name = {objective.title(c)!r}"
        raise UserError(
            f"max_staleness = {c.max_staleness} hides the time of a text teacher's audits alone; {what} asks for "
            "something else: set max_staleness to 0"
        )


def _check_updates(c: ConfigDict) -> None:
    if objective.needs_reward(c) and c.num_generations == 1:
        what = (
            f"objective.name = {objective.title(c)!r}"
            if objective.of(c).needs_reward
            else f"reward.coef = {c.reward.coef}"
        )
        raise UserError(
            f"num_generations = 1 with {what}: a response is compared with others to the same prompt, and alone it "
            "teaches nothing; set num_generations to 2 or more"
        )
    if c.num_iterations > 1 and not objective.of(c).clips:
        able = ", ".join(repr(name) for name, o in objective.OBJECTIVES.items() if o.clips)
        raise UserError(
            f"num_iterations = {c.num_iterations} is for objective.name = {able}, whose ratio is clipped; "
            f"{objective.title(c)!r} takes 1 update a batch"
        )


def _check_evaluations(c: ConfigDict) -> None:
    """What reads the run's evaluations needs some."""
    for path in ("checkpoint.best_metric", "eval.patience", "eval.stop_below"):
        if config.get(c, path) and not c.eval.num_prompts:
            raise UserError(f"{path} = {config.get(c, path)!r} goes by the run's evaluations: set eval.num_prompts")
    for path in ("eval.patience", "eval.stop_below"):
        if config.get(c, path) and not c.eval.every:
            raise UserError(f"{path} = {config.get(c, path)!r} needs evaluations during the run: set eval.every")
    if c.eval.sets and not c.eval.num_prompts:
        raise UserError(
            f"eval.sets = {tuple(c.eval.sets)} are evaluated beside the held-out prompts: set eval.num_prompts"
        )
    if c.optimizer.min_learning_rate > c.optimizer.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate = {c.optimizer.min_learning_rate:g} is above optimizer.learning_rate = "
            f"{c.optimizer.learning_rate:g}"
        )


def _check_lora(c: ConfigDict) -> None:
    for name in c.lora.targets:
        one_of(name, config.TARGETS + config.LINEAR_TARGETS, "lora.targets")
    if not c.lora.targets or len(set(c.lora.targets)) < len(c.lora.targets):
        raise UserError(f"lora.targets = {tuple(c.lora.targets)} must name at least one projection, and each once")
    if not c.lora.alpha > 0:
        raise UserError(f"lora.alpha = {c.lora.alpha} must be more than 0")
    if c.anchor.ref_offload:
        raise UserError(
            "anchor.ref_offload with lora.rank: the reference is the base that every pass runs through; set it to False"
        )


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
        found.of(trained.check_start, cfg, model_cfg)
    prompts, held_out = found.of(load_prompts, cfg, template) or (None, None)
    if prompts is not None and template is not None:
        found.of(objectives.check_privileged, cfg, prompts, template)
    phi = found.of(similarity.make, cfg)
    sets = found.of(benchmarks.load_sets, cfg, template) or ()
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
    template = of_student(cfg, tokenizer)
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
