"""The config's values, each by itself and against each other, before anything is read or loaded."""

import datetime
import importlib.util
import math

from ml_collections import ConfigDict

from omniopd_jax import config, graders, objective, similarity, solutions, teachers
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.parallel import sharding
from omniopd_jax.run import identity, objectives, profiling, trackers
from omniopd_jax.teachers import by_row

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
    _check_date(c)
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


def _check_date(c: ConfigDict) -> None:
    try:
        _ = c.data.date and datetime.date.fromisoformat(c.data.date)
    except ValueError as error:
        raise UserError(f"data.date = {c.data.date!r} is no date: write it as 2026-11-29") from error


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
    greedy = "temperature = 0" if not c.temperature else "top_k = 1" if c.top_k == 1 else ""
    if objective.needs_reward(c) and greedy:
        raise UserError(
            f"{greedy} samples the same response {c.num_generations} times, and a reward compares responses to one "
            "prompt: nothing would be learned; set temperature = 1.0, top_k = 0"
        )
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
    metric = c.checkpoint.best_metric
    if metric and metric != "eval/accuracy" and not (c.eval.sets and metric.startswith("eval/accuracy/")):
        raise UserError(
            f"checkpoint.best_metric = {metric!r} must be eval/accuracy, or eval/accuracy/NAME with NAME of a set in "
            f"eval.sets = {tuple(c.eval.sets)}"
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
