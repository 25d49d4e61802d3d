"""The one source of defaults: every key that a recipe may set, with its unit or reason, and the checks on the values.

A recipe in `configs/` starts from `default()` and sets what differs. The ConfigDict is locked, so that an unknown key is
an error. Names follow the field (TRL, Tunix); `kl_coef`, never a bare `beta`.
"""

import difflib

from ml_collections import ConfigDict

from omniopd_jax.errors import UserError, one_of

CHOICES = {
    "max_staleness": (0, 1),
    "data.source": ("world", "jsonl", "hub"),
    "data.overlong": ("error", "drop"),
    "audit.selection": ("peak", "random"),
    "anchor.scope": ("unaudited", "all"),
    "anchor.ref_dtype": ("float32", "bfloat16"),
    "objective.advantage": ("none", "batch_mean", "leave_one_out"),
    "objective.normalizer": ("constant", "separate_means"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "optimizer.mu_dtype": ("float32", "bfloat16"),
    "teacher.continuation": ("auto", "completion", "prefill", "continue_final_message", "prefix", "instruct"),
    "teacher.prefix_order": ("ascending", "free"),
    "teacher.replay": ("only", "prefer", "off"),
    "budget.on_exhausted": ("stop", "fewer_audits", "fewer_continuations"),
    "compute_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "context", "full"),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of lora.targets


def default() -> ConfigDict:
    """A new, locked ConfigDict with every key. The published method's values wherever method.md, section 3, has one."""
    c = ConfigDict()
    c.run_dir = "runs/default"  # everything the run writes: checkpoints, metrics, audits, the resolved config
    c.seed = 0  # of data order, sampling and teacher seeds; all else follows from it
    c.num_steps = 200  # batches; each makes num_iterations optimizer updates
    c.prompts_per_step = 64  # prompts of the global batch
    c.num_generations = 4  # responses a prompt
    c.num_iterations = 1  # grpo: optimizer updates from each batch; from the second on the ratio is clipped
    c.rollout_groups = 1  # pieces of a step's prompts: the teacher answers one while the next is being sampled
    c.max_staleness = 0  # 0: strictly on-policy | 1: step t is audited while step t + 1 is sampled (objective.chunk_ratio)
    c.micro_batches = 1  # gradient accumulation: sums and counts are carried, so the result does not depend on it
    c.max_prompt_length = 1024  # student tokens
    c.max_completion_length = 7168  # student tokens; longer responses are cut, kept and counted
    c.temperature = 1.0  # of the student's sampling
    c.top_p = 1.0  # of the student's sampling
    c.top_k = 0  # of the student's sampling; 0 = off
    c.compute_dtype = "float32"  # float32 | bfloat16; master weights stay float32
    c.vocab_block = 256  # positions a block of the vocabulary pass

    c.student = ConfigDict()
    c.student.path = ""  # a Hugging Face folder, or a hub name (needs network)
    c.student.chat_template_kwargs = ConfigDict()  # passed to the chat template, e.g. enable_thinking; may get new keys

    c.model = ConfigDict()
    c.model.remat = "full"  # none | dots | context | full: what the backward pass keeps of each layer
    c.model.attention = "auto"  # auto | xla | splash | cudnn

    c.packing = ConfigDict()
    c.packing.length = 0  # most tokens of a row that several responses share when scored and trained on; 0 = a row each

    c.data = ConfigDict()
    c.data.source = "world"  # world | jsonl | hub
    c.data.path = ""  # jsonl: a file, one object with `prompt` a line
    c.data.name = ""  # hub: data set name; world: forks | slips | style
    c.data.split = "train"  # hub and world
    c.data.fields = ConfigDict()  # hub: our name -> the data set's column
    c.data.fields.prompt = "prompt"  # column
    c.data.fields.answer = "answer"  # column; may be missing
    c.data.fields.id = "id"  # column; may be missing
    c.data.num_prompts = 0  # take the first so many; 0 = all (world: 4,096)
    c.data.overlong = "drop"  # error | drop: prompts over max_prompt_length

    c.audit = ConfigDict()
    c.audit.num_chunks = 10  # M, a response
    c.audit.chunk_tokens = 50  # C, student tokens
    c.audit.num_continuations = 10  # N, a chunk
    c.audit.min_continuations = 0  # n_min: an audit with fewer is dropped; 0 = half of N, rounded up
    c.audit.selection = "peak"  # peak | random (ablation)
    c.audit.similarity = "edit"  # edit | rouge1 | rougeL | embedding
    c.audit.embedding_model = ""  # embedding: a sentence-transformers folder or hub name
    c.audit.trim_continuation = "auto"  # auto (foreign tokenizers) | always | never: cut to the chunk's characters
    c.audit.log_per_step = 64  # audits a step written to audits.jsonl; what is left out is counted
    c.audit.shuffle_texts = False  # control: each chunk is scored against another prompt's continuations

    c.prior = ConfigDict()
    c.prior.alpha = 1.0  # pseudo-counts of the student's own chunk probability; 0 = no smoothing

    c.anchor = ConfigDict()
    c.anchor.kl_coef = 0.1  # weight of KL(ref || student), exact over the vocabulary
    c.anchor.scope = "unaudited"  # unaudited | all tokens
    c.anchor.ref_dtype = "float32"  # float32 | bfloat16: what the frozen reference is held in (with LoRA: the base)
    c.anchor.ref_offload = False  # its layers lie in pinned host memory; each is brought over when its turn comes

    c.objective = ConfigDict()
    c.objective.name = "omniopd"  # a key of objective.OBJECTIVES
    c.objective.advantage = "none"  # none (published) | batch_mean | leave_one_out
    c.objective.constant = 1.0  # constant: the weight of every chunk; negative pushes down
    c.objective.clip = 0.2  # grpo with several updates a batch: the ratio's clip range
    c.objective.normalizer = "constant"  # constant: rows x max_completion_length | separate_means

    c.reward = ConfigDict()
    c.reward.coef = 0.0  # weight of a task reward's group advantage, added to any objective; grpo: always 1
    c.reward.grader = "world"  # world | math | code | code_unsafe | reasoning_gym; 1 for a right answer, else 0

    c.teacher = ConfigDict()
    c.teacher.provider = "local"  # a key of teachers.TEACHERS
    c.teacher.model = ""  # local: a Hugging Face folder; else the provider's model name
    c.teacher.temperature = 1.0  # must sample: a greedy teacher makes all continuations equal
    c.teacher.top_p = 1.0  # left out of the call where it is 1 (Gemini: always sent)
    c.teacher.chat_template_kwargs = ConfigDict()  # the same for the teacher
    c.teacher.base_url = ""  # openai, anthropic, gemini: a server of your own; "" = the provider's service
    c.teacher.continuation = "auto"  # auto (probed) | completion | prefill | continue_final_message | prefix | instruct
    c.teacher.tokenizer = ""  # its Hugging Face folder: renders the prompt for completion, tells if the student's is another
    c.teacher.max_concurrency = 32  # calls in flight, and responses under audit at a time
    c.teacher.requests_per_minute = 0  # a process; 0 = what the response headers say, if they say anything
    c.teacher.tokens_per_minute = 0  # input and output, a process; 0 = what the response headers say
    c.teacher.timeout_s = 60.0  # one call
    c.teacher.deadline_s = 300.0  # one audit in total, retries included, counted from its turn
    c.teacher.max_retries = 8  # of one call that was answered with an error; an unreachable server is only bound in time
    c.teacher.hedge_s = 0.0  # ask a second time after so long without an answer, the first one counts, both are paid; 0 = off
    c.teacher.prefix_order = "ascending"  # ascending: a response's prefixes one after the other, for caches | free
    c.teacher.replay = "prefer"  # prefer (journal first) | only (never connects, needs no key) | off (writes only)
    c.teacher.journal = ""  # folder on local disk; "" = <run_dir>/journal
    c.teacher.price_input = -1.0  # USD per million tokens; -1 = budget.PRICES (a server of your own: 0)
    c.teacher.price_cached = -1.0  # the same for input that the provider served from its cache
    c.teacher.price_output = -1.0  # the same for output, hidden reasoning included

    c.budget = ConfigDict()  # caps on all that the journal folder has seen; they are never overshot
    c.budget.usd = 0.0  # dollars; 0 = no cap
    c.budget.tokens = 0  # input + output tokens; 0 = no cap
    c.budget.calls = 0  # requests on the wire, retries included; 0 = no cap
    c.budget.on_exhausted = "stop"  # stop (checkpoint, exit) | fewer_audits (lower M) | fewer_continuations (lower N)

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-6  # AdamW, after the warm-up
    c.optimizer.schedule = "constant"  # constant | linear | cosine, after the warm-up
    c.optimizer.warmup_steps = 0  # linear, from the first update on
    c.optimizer.b1 = 0.9  # decay of the first moment
    c.optimizer.b2 = 0.999  # decay of the second moment
    c.optimizer.eps = 1e-8  # added to the root of the second moment
    c.optimizer.weight_decay = 0.0  # decoupled; not on norms and biases
    c.optimizer.max_grad_norm = 1.0  # global norm; 0 = off
    c.optimizer.mu_dtype = "float32"  # float32 | bfloat16: of the first moment between updates; 2 bytes a parameter less

    c.lora = ConfigDict()  # adapters beside frozen projections; the base is the reference, held once
    c.lora.rank = 0  # 0 = off: all parameters are trained
    c.lora.alpha = 32.0  # the adapters' product is scaled by alpha / rank
    c.lora.targets = TARGETS  # projections that get one, by PEFT's names; as a flag: "('q_proj','v_proj')"

    c.mesh = ConfigDict()  # device axes; -1 once = whatever is left
    c.mesh.data = 1  # copies of the parameters; rows are split over it
    c.mesh.fsdp = -1  # parameters, optimizer state and rows are split over it
    c.mesh.tp = 1  # heads, feed-forward and vocabulary are split over it

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # steps; the last step is always saved
    c.checkpoint.keep = 3  # newest so many
    c.checkpoint.keep_every = 0  # steps whose number it divides are kept for good; 0 = none

    c.eval = ConfigDict()
    c.eval.every = 0  # steps; 0 = only before the first and after the last
    c.eval.split = "test"  # world and hub
    c.eval.path = ""  # jsonl
    c.eval.num_prompts = 0  # 0 = no evaluation
    c.eval.grader = "world"  # as reward.grader

    c.distributed = ConfigDict()  # several processes (distributed.py)
    c.distributed.start_s = 300.0  # how long the processes wait for each other at the start
    c.distributed.heartbeat_s = 20.0  # a process that is silent for so long is dead, and the run ends
    c.distributed.barrier_s = 30.0  # a wait for other processes says so often who is missing
    c.distributed.limit_s = 3600.0  # such a wait ends the run; longer than the slowest step of the teacher

    c.profile = ConfigDict()
    c.profile.steps = ""  # FIRST:END, counted from 0: a profiler's trace of these steps in <run_dir>/profile

    c.log = ConfigDict()
    c.log.tensorboard = True  # scalars beside metrics.jsonl
    c.lock()
    for part in (c.student, c.teacher):
        part.chat_template_kwargs.unlock()
    return c


def validate(c: ConfigDict) -> None:
    """Checks the values against each other, before anything is loaded.

    Raises:
      UserError: one line naming the key, its value and what is allowed.
    """
    from omniopd_jax import evaluate, objective, profile, similarity, teachers

    for path, allowed in CHOICES.items():
        one_of(_get(c, path), allowed, path)
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
        "teacher.max_retries": 0, "teacher.hedge_s": 0,
        "teacher.requests_per_minute": 0, "teacher.tokens_per_minute": 0, "teacher.price_input": -1,
        "teacher.price_cached": -1, "teacher.price_output": -1, "budget.usd": 0, "budget.tokens": 0, "budget.calls": 0,
    }.items():  # fmt: skip
        if not _get(c, path) >= least:
            raise UserError(f"{path} = {_get(c, path)} must be at least {least}")
    for path in ("top_p", "teacher.top_p"):
        if not 0 < _get(c, path) <= 1:
            raise UserError(f"{path} = {_get(c, path)} must lie in (0, 1]")
    for path in ("teacher.timeout_s", "teacher.deadline_s", *(f"distributed.{k}" for k in c.distributed)):
        if not _get(c, path) > 0:
            raise UserError(f"{path} = {_get(c, path)} must be more than 0 seconds")
    if not 0 <= c.seed < 2**31:
        raise UserError(f"seed = {c.seed} must lie in [0, 2**31)")
    for axis in ("data", "fsdp", "tp"):
        if c.mesh[axis] < 1 and c.mesh[axis] != -1:
            raise UserError(f"mesh.{axis} = {c.mesh[axis]} must be at least 1, or -1 for whatever is left")
    if c.lora.rank:
        _check_lora(c)
    if c.rollout_groups > c.prompts_per_step:
        raise UserError(f"rollout_groups = {c.rollout_groups} is more than prompts_per_step = {c.prompts_per_step}")
    profile.window(c.profile.steps)
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
        one_of(name, TARGETS, "lora.targets")
    if not c.lora.targets or len(set(c.lora.targets)) < len(c.lora.targets):
        raise UserError(f"lora.targets = {tuple(c.lora.targets)} must name at least one projection, and each once")
    if not c.lora.alpha > 0:
        raise UserError(f"lora.alpha = {c.lora.alpha} must be more than 0")
    if c.anchor.ref_offload:
        raise UserError(
            "anchor.ref_offload with lora.rank: the reference is the base that every pass runs through; set it to False"
        )


def min_continuations(c: ConfigDict) -> int:
    """n_min: `audit.min_continuations`, or half of N rounded up where that is 0 (method.md, section 2, ours)."""
    return c.audit.min_continuations or -(-c.audit.num_continuations // 2)


def apply(c: ConfigDict, variants: dict[str, dict], arg: str | None) -> ConfigDict:
    """Applies the comma-separated variants in `arg` (from `--config=recipe.py:arg`), each a dict of dotted key -> value.

    Raises:
      UserError: a name that `variants` lacks.
    """
    for name in filter(None, (arg or "").split(",")):
        one_of(name, variants, "the recipe's argument")
        c.update_from_flattened_dict(variants[name])
    return c


def unknown_key_message(c: ConfigDict, path: str) -> str:
    """One line on a key that the config lacks, with the nearest ones that it has."""
    known = sorted(flat(c))
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    near = near or [k for k in known if k.split(".")[0] == path.split(".")[0]]
    return f"unknown config key {path!r}; nearest known: {', '.join(near or known)}"


def flat(c: ConfigDict, prefix: str = "") -> dict:
    """The config as {dotted key: value}."""
    out = {}
    for key, value in c.items():
        if isinstance(value, ConfigDict) and key != "chat_template_kwargs":
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _get(c: ConfigDict, path: str):
    for key in path.split("."):
        c = c[key]
    return c


def describe() -> list[tuple[str, str, str]]:
    """(key, default, what) of every key, from the comments in `default`: the README's table is made of it."""
    import inspect
    import re

    rows, values = [], flat(default())
    for key, what in re.findall(r"^    c\.([\w.]+) = .*?  # (.*)$", inspect.getsource(default), re.M):
        if key in values:
            rows.append((key, str(values[key]).strip() or "''", what))
    return rows


def markdown() -> str:
    """The README's table of keys."""
    bar = chr(92) + "|"
    rows = [f"| `{k}` | `{v}` | {what.replace('|', bar)} |" for k, v, what in describe()]
    return "\n".join(["| key | default | what |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":  # python -m omniopd_jax.config: writes the table into README.md
    import pathlib

    _file = pathlib.Path("README.md")
    _begin, _end = "<!-- keys: python -m omniopd_jax.config -->", "<!-- end of keys -->"
    _head, _rest = _file.read_text().split(_begin)
    _file.write_text(f"{_head}{_begin}\n{markdown()}\n{_end}{_rest.split(_end)[1]}")
