"""OmniOPD on the paper's math: Qwen3-1.7B learns from a text-only teacher on DAPO-Math-17K.

    python -m omniopd_jax.main --config=configs/math.py --config.teacher.base_url=http://HOST:8000/v1

Variants, comma-separated after a colon: published, no_anchor, random_chunks, no_smoothing, m5, c25, c100, alpha5,
alpha01, rouge1, 4b, lora, thinking, e.g. --config=configs/math.py:published,m5. Every weight has the batch's mean taken
off, which is ours; `published` is the paper's objective as printed: at equal cost it was surely worse in most
comparisons and surely better in none, and 1,000 updates of it wear the small worlds' student down (docs/choosing.md).

`thinking` trains the student in its thinking mode, as the paper's base scores imply (1.7B on AIME: 48.5 / 37.5, which
are public thinking-mode scores; docs/method.md, section 3): up to 31,744 tokens a response (prompt and response fill
32,768 of the model's 40,960 positions), whole responses audited (`audit.span`). The teacher goes on inside the open
<think> block, by raw completion, so its tokenizer is named; it thinks too, so that a chunk at the very start is
compared with thoughts, and its context must hold the longest row: launch/teacher_vllm.sh --max-len 33024. Almost four
times the input tokens of the plain recipe a step, at the same calls. For chips of 80 GB (v5p, H100: 8 of them); not
run, and not compiled for them.

Hardware: a v5e-16 or v5p-8 slice (docs/results/aot.md), or 8 GPUs of 80 GB. On 64 chips: rollout.parts=2,
micro_batches=2, mesh.data=4. Teacher: Qwen3-32B behind any OpenAI-compatible server.
Time and cost: 25,600 continuations per step at the defaults; --estimate prints calls, tokens, dollars and hours.
The paper's result for `published` (not run here): 1.7B from Qwen3-32B 51.87 -> 60.67, mean of five benchmarks.
"""

from omniopd_jax import config

THINKING = {
    "student.chat_template_kwargs": {"enable_thinking": True},
    "teacher.chat_template_kwargs": {"enable_thinking": True},
    "teacher.tokenizer": "Qwen/Qwen3-32B",  # raw completion: a server's chat template would close the open block
    "max_completion_length": 31_744,  # responses over it are cut, kept and counted: watch truncated_fraction
    "rollout.cache_gib": 30.0,  # of 80 GB a chip; on 8 chips the keys and values of 70 rows at their longest
}
VARIANTS = {
    "published": {"objective.advantage": "none"},
    "no_anchor": {"anchor.kl_coef": 0.0},
    "random_chunks": {"audit.selection": "random"},
    "no_smoothing": {"prior.alpha": 0.0},
    "m5": {"audit.num_chunks": 5},
    "c25": {"audit.chunk_tokens": 25},
    "c100": {"audit.chunk_tokens": 100},
    "alpha5": {"prior.alpha": 5.0},
    "alpha01": {"prior.alpha": 0.1},
    "rouge1": {"audit.similarity": "rouge1"},
    "4b": {"student.path": "Qwen/Qwen3-4B"},
    "lora": {"lora.rank": 32, "lora.alpha": 64.0, "optimizer.learning_rate": 1e-5, "anchor.ref_dtype": "bfloat16"},
    "thinking": THINKING,
}


def get_config(arg=None):
    """OmniOPD on math, with our baseline; `arg` names variants."""
    c = config.default()
    c.run_dir = "runs/math"
    c.num_steps = 200
    c.prompts_per_step = 64
    c.num_generations = 4
    c.rollout.parts = 4  # 64 rows are scored and audited while the rest are decoded
    c.rollout.cache_gib = 7.0  # per chip of a v5e-16: half of what 256 rows of full length take
    c.micro_batches = 8
    c.max_prompt_length = 1024
    c.max_completion_length = 7168
    c.compute_dtype = "bfloat16"

    c.student.path = "Qwen/Qwen3-1.7B"  # or a local folder
    c.student.chat_template_kwargs.enable_thinking = False  # variant `thinking` switches both on
    c.data.source = "hub"
    c.data.name = "open-r1/DAPO-Math-17k-Processed"
    c.data.fields.answer = "solution"
    c.data.overlong = "drop"
    c.eval.suffix = r"Please reason step by step, and put your final answer within \boxed{}."  # as the training prompts
    c.eval.grader = "math"

    c.teacher.provider = "openai"
    c.teacher.model = "Qwen/Qwen3-32B"
    c.teacher.chat_template_kwargs.enable_thinking = False  # else first chunks and solutions begin with <think>

    # The published method's values but for the last; spelled out because they are the recipe.
    c.audit.num_chunks = 10  # M
    c.audit.chunk_tokens = 50  # C
    c.audit.num_continuations = 10  # N
    c.audit.similarity = "edit"
    c.prior.alpha = 1.0
    c.anchor.kl_coef = 0.1
    c.anchor.scope = "unaudited"
    c.objective.advantage = "batch_mean"  # ours; the paper has none

    c.optimizer.learning_rate = 1e-6
    c.optimizer.warmup_steps = 10
    c.checkpoint.every = 10
    return config.apply(c, VARIANTS, arg)
