"""The checks of a config that need to know the rest of the program, before anything is loaded."""

from ml_collections import ConfigDict

from omniopd_jax import config, evaluate, objective, similarity, teachers
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.run import profiling


def validate(c: ConfigDict) -> None:
    """Checks the values against each other, before anything is loaded.

    Raises:
      UserError: one line naming the key, its value and what is allowed.
    """
    for path, allowed in config.CHOICES.items():
        one_of(config.get(c, path), allowed, path)
    one_of(c.objective.name, objective.OBJECTIVES, "objective.name")
    one_of(c.eval.grader, evaluate.GRADERS, "eval.grader")
    one_of(c.reward.grader, evaluate.GRADERS, "reward.grader")
    one_of(c.audit.similarity, similarity.SIMILARITIES, "audit.similarity")
    one_of(c.teacher.provider, teachers.TEACHERS, "teacher.provider")
    one_of(c.audit.trim_continuation, ("auto", "always", "never"), "audit.trim_continuation")
    for path, least in {
        "num_steps": 0, "prompts_per_step": 1, "num_generations": 1, "num_iterations": 1, "micro_batches": 1,
        "rollout_groups": 1, "max_prompt_length": 1, "max_completion_length": 1,
        "vocab_block": 1, "audit.num_chunks": 1, "audit.chunk_tokens": 1,
        "audit.num_continuations": 1, "audit.min_continuations": 0, "audit.log_per_step": 0, "prior.alpha": 0,
        "anchor.kl_coef": 0, "checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 0,
        "temperature": 0, "teacher.temperature": 0,
        "optimizer.learning_rate": 0, "optimizer.max_grad_norm": 0, "lora.rank": 0, "top_k": 0, "data.num_prompts": 0,
        "eval.num_prompts": 0, "eval.every": 0, "packing.length": 0, "teacher.max_concurrency": 1,
        "teacher.max_retries": 0,
        "teacher.requests_per_minute": 0, "teacher.tokens_per_minute": 0, "teacher.price_input": -1,
        "teacher.price_cached": -1, "teacher.price_output": -1, "budget.usd": 0, "budget.tokens": 0, "budget.calls": 0,
    }.items():  # fmt: skip
        if not config.get(c, path) >= least:
            raise UserError(f"{path} = {config.get(c, path)} must be at least {least}")
    for path in ("top_p", "teacher.top_p"):
        if not 0 < config.get(c, path) <= 1:
            raise UserError(f"{path} = {config.get(c, path)} must lie in (0, 1]")
    for path in ("teacher.timeout_s", "teacher.deadline_s", *(f"distributed.{k}" for k in c.distributed)):
        if not config.get(c, path) > 0:
            raise UserError(f"{path} = {config.get(c, path)} must be more than 0 seconds")
    if not 0 <= c.seed < 2**31:
        raise UserError(f"seed = {c.seed} must lie in [0, 2**31)")
    for axis in ("data", "fsdp", "tp"):
        if c.mesh[axis] < 1 and c.mesh[axis] != -1:
            raise UserError(f"mesh.{axis} = {c.mesh[axis]} must be at least 1, or -1 for whatever is left")
    if c.lora.rank:
        _check_lora(c)
    if c.rollout_groups > c.prompts_per_step:
        raise UserError(f"rollout_groups = {c.rollout_groups} is more than prompts_per_step = {c.prompts_per_step}")
    profiling.window(c.profile.steps)
    if c.audit.chunk_tokens > c.max_completion_length:
        raise UserError(
            f"audit.chunk_tokens = {c.audit.chunk_tokens} is larger than max_completion_length = "
            f"{c.max_completion_length}: no chunk could ever fit; allowed: 1 to {c.max_completion_length}"
        )
    longest = c.max_prompt_length + c.max_completion_length
    if 0 < c.packing.length < longest:
        raise UserError(
            f"packing.length = {c.packing.length} holds no prompt and response at their longest: at least max_prompt_length + "
            f"max_completion_length = {longest}, or 0 for no packing"
        )
    if c.audit.min_continuations > c.audit.num_continuations:
        raise UserError(
            f"audit.min_continuations = {c.audit.min_continuations} is larger than audit.num_continuations = "
            f"{c.audit.num_continuations}: every audit would be dropped"
        )
    if c.max_staleness and c.objective.name not in objective.AUDITED:
        raise UserError(
            f"max_staleness = {c.max_staleness} hides a text teacher's time; objective.name = {c.objective.name!r} asks none: 0"
        )
    if c.num_iterations > 1 and c.objective.name != "grpo":
        raise UserError(
            f"num_iterations = {c.num_iterations} is for objective.name = 'grpo', whose ratio is clipped; "
            f"{c.objective.name!r} takes 1 update a batch"
        )
    rows = c.prompts_per_step * c.num_generations
    if rows % c.micro_batches:
        raise UserError(f"micro_batches = {c.micro_batches} must divide prompts_per_step x num_generations = {rows}")


def _check_lora(c: ConfigDict) -> None:
    """What `validate` asks of the adapters."""
    for name in c.lora.targets:
        one_of(name, config.TARGETS, "lora.targets")
    if not c.lora.targets or len(set(c.lora.targets)) < len(c.lora.targets):
        raise UserError(f"lora.targets = {tuple(c.lora.targets)} must name at least one projection, and each once")
    if not c.lora.alpha > 0:
        raise UserError(f"lora.alpha = {c.lora.alpha} must be more than 0")
    if c.anchor.ref_offload:
        raise UserError(
            "anchor.ref_offload with lora.rank: the reference is the base that every pass runs through; set it to False"
        )
