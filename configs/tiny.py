"""The embedded default: the small world's student learns from the small world's teacher, on a CPU, without a download.

    python -m omniopd_jax.main --config=configs/tiny.py

Hardware: 2 CPU cores, 2 GiB.
"""

from omniopd_jax import config

WORLD = "omniopd_jax/world/checkpoints/forks"  # found in the package, from any folder


def get_config(arg=None):
    """The recipe; it takes no argument."""
    c = config.default()
    c.run_dir = "runs/tiny"
    c.num_steps = 20
    c.prompts_per_step = 64  # 64 x 2 rows per step
    c.num_generations = 2
    c.max_prompt_length = 48
    c.max_completion_length = 48  # the longest solution has 46
    c.vocab_block = 4096  # the vocabulary is tiny: few blocks
    c.model.remat = "none"  # rows are short

    c.student.path = f"{WORLD}/student"
    c.teacher.provider = "local"
    c.teacher.model = f"{WORLD}/teacher"
    c.data.name = "forks"

    c.audit.num_chunks = 2
    c.audit.chunk_tokens = 8
    c.audit.num_continuations = 4
    c.objective.advantage = "batch_mean"  # the published `none` rises more slowly here and then falls
    c.optimizer.learning_rate = 2e-4

    c.checkpoint.every = 5
    c.eval.num_prompts = 256
    return config.apply(c, {}, arg)
