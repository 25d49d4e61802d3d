"""The one source of defaults: every key that a recipe may set, with its unit or reason, and what each may be.

A recipe in `configs/` starts from `default()` and sets what differs. The ConfigDict is locked, so that an unknown key is
an error. Names follow the field (TRL, Tunix); `kl_coef`, never a bare `beta`.
"""

import difflib
import inspect
import re

from ml_collections import ConfigDict

from omniopd_jax.errors import one_of

CHOICES = {
    "max_staleness": (0, 1),
    "data.source": ("world", "jsonl", "hub"),
    "data.overlong": ("error", "drop"),
    "audit.selection": ("peak", "random"),
    "audit.trim_continuation": ("auto", "always", "never"),
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
    c.student.template = "chat"  # chat (the tokenizer's own) | plain (a base model: docs/students.md) | a Jinja file
    c.student.stop_strings = ()  # texts that end an answer, beside the format's own; as a flag: "('\\n\\n',)"
    c.student.chat_template_kwargs = ConfigDict()  # passed to the chat template, e.g. enable_thinking; may get new keys

    c.model = ConfigDict()
    c.model.remat = "full"  # none | dots | context | full: what the backward pass keeps of each layer
    c.model.attention = "auto"  # auto | xla | splash | cudnn

    c.packing = ConfigDict()
    c.packing.length = 0  # most tokens of a row that several responses share when scored and trained on; 0 = a row each

    c.data = ConfigDict()
    c.data.source = "world"  # world | jsonl | hub
    c.data.path = ""  # jsonl: a file of rows with a `prompt`: .jsonl, .jsonl.gz, .json, .csv or .parquet
    c.data.name = ""  # hub: data set name; world: forks | slips | style
    c.data.subset = ""  # hub: the data set's configuration where it has several, e.g. "main"; "" = its only one
    c.data.split = "train"  # hub and world
    c.data.fields = ConfigDict()  # our name -> the column of the data set, or the field of the file's rows
    c.data.fields.prompt = "prompt"  # column
    c.data.fields.answer = "answer"  # column, or a path in it such as reward_model.ground_truth; may be missing
    c.data.fields.solution = "solution"  # column with a worked solution, for sft without a teacher; may be missing
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
    c.reward.grader = ""  # world | math | code | code_unsafe | reasoning_gym; "" = world for the small worlds, else required

    c.teacher = ConfigDict()
    c.teacher.provider = "local"  # a key of teachers.TEACHERS
    c.teacher.model = ""  # local: a Hugging Face folder; else the provider's model name
    c.teacher.temperature = 1.0  # must sample: a greedy teacher makes all continuations equal
    c.teacher.top_p = 1.0  # left out of the call where it is 1 (Gemini: always sent)
    c.teacher.template = "chat"  # chat | plain | a Jinja file: how a prompt is written where that is done here
    c.teacher.preamble = ""  # plain or a Jinja file: worked examples in front of the prompt, or a file that holds them
    c.teacher.stop_strings = ()  # texts that end a continuation, beside the format's own
    c.teacher.chat_template_kwargs = ConfigDict()  # the same for the teacher
    c.teacher.base_url = ""  # openai, anthropic, gemini: a server of your own; "" = the provider's service
    c.teacher.pin_model = False  # True: an answer of another model than asked for ends the run; else it is a warning
    c.teacher.key_over_http = False  # True: a key may go unencrypted (http://) to another machine
    c.teacher.continuation = "auto"  # auto (probed) | completion | prefill | continue_final_message | prefix | instruct
    c.teacher.tokenizer = ""  # its Hugging Face folder: renders the prompt for completion, tells if the student's is another
    c.teacher.max_concurrency = 32  # calls in flight, and responses under audit at a time
    c.teacher.requests_per_minute = 0  # a process; 0 = what the response headers say, if they say anything
    c.teacher.tokens_per_minute = 0  # input and output, a process; 0 = what the response headers say
    c.teacher.timeout_s = 60.0  # one call
    c.teacher.deadline_s = 300.0  # one audit in total, retries included, counted from its turn
    c.teacher.max_retries = 8  # of one call that was answered with an error; an unreachable server is only bound in time
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
    c.budget.confirm_usd = 20.0  # dollars; a run without a cap whose middle estimate is above needs --yes
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
    c.eval.grader = ""  # as reward.grader

    c.distributed = ConfigDict()  # several processes (distributed.py)
    c.distributed.start_s = 300.0  # how long the processes wait for each other at the start
    c.distributed.heartbeat_s = 20.0  # a process that is silent for so long is dead, and the run ends
    c.distributed.barrier_s = 30.0  # a wait for other processes says so often who is missing
    c.distributed.limit_s = 3600.0  # such a wait ends the run; longer than the slowest step of the teacher

    c.profile = ConfigDict()
    c.profile.steps = ""  # FIRST:END, counted from 0: a profiler's trace of these steps in <run_dir>/profile

    c.resume = ConfigDict()
    c.resume.allow = ()  # keys, or beginnings of keys, that may differ from those of the run that is resumed

    c.log = ConfigDict()
    c.log.tensorboard = True  # scalars and tables beside metrics.jsonl, in <run_dir>/tensorboard
    c.log.trackers = ()  # more of them: wandb | trackio; as a flag: "('wandb',)"
    c.log.completions_per_step = 4  # whole responses a step written to completions.jsonl; what is left out is counted
    c.log.evaluation_answers = 256  # answers of each evaluation written to evaluations.jsonl; the first ones
    c.log.text_characters = 20_000  # of each text in a record; what is cut is counted
    c.log.chance_pairs = 128  # comparisons a step with another prompt's continuations: agreement by chance; 0 = none
    c.lock()
    for part in (c.student, c.teacher):
        part.chat_template_kwargs.unlock()
    return c


def min_continuations(c: ConfigDict) -> int:
    """n_min: `audit.min_continuations`, or half of N rounded up where that is 0 (method.md, section 2, ours)."""
    return c.audit.min_continuations or -(-c.audit.num_continuations // 2)


def apply(c: ConfigDict, variants: dict[str, dict], arg: str | None) -> ConfigDict:
    """Applies the comma-separated variants in `arg` (from `--config=recipe.py:arg`), each a dict of dotted key -> value.

    A variant is another run: its name is added to `run_dir`.

    Raises:
      UserError: a name that `variants` lacks.
    """
    for name in filter(None, (arg or "").split(",")):
        one_of(name, variants, "the recipe's argument")
        c.update_from_flattened_dict(variants[name])
        c.run_dir += f"-{name}"
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


def get(c: ConfigDict, path: str):
    """The value of a dotted key."""
    for key in path.split("."):
        c = c[key]
    return c


def describe() -> list[tuple[str, str, str]]:
    """(key, default, what) of every key, from the comments in `default`: the README's table is made of it."""
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
