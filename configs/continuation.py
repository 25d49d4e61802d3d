"""Continuation fine-tuning (OLIVE, arXiv 2609.36246): the student begins, the teacher goes on once, cross-entropy on
the teacher's tokens.

    python -m omniopd_jax.main --config=configs/continuation.py --config.teacher.base_url=http://HOST:8000/v1

Variants, comma-separated after a colon: fixed (its paper's cut, after 4,096 tokens: an answer that ended before has
none), uniform (anywhere), zero (whole solutions: configs/sft.py on the same keys), e4096 (longer texts), gate (prompts
that the teacher fails are not bought), 4b.

Kept of its paper: texts of up to 1,024 tokens, learning rate 1e-5, 64 prompts x 4, no KL. Ours: the prefix ends where
the student is least certain, which was good on all four tasks of docs/choosing.md, the paper's cut on one of three; the
answer is sampled to 4,096 tokens and no further.
Hardware: as configs/math.py (a v5e-16 or v5p-8 slice, or 8 GPUs of 80 GB), and any OpenAI-compatible server.
Time and cost: 256 texts of up to 1,024 tokens per step, a ninth of the audits' output tokens (docs/recipes.md has the
estimate beside OmniOPD's); not run here.
Result reported by the paper (not run here): RLVE avg@8 of Qwen3-4B 18.1 -> 23.5, of 1.7B 3.3 -> 7.8; one run each.
"""

from configs import math
from omniopd_jax import config

VARIANTS = {
    "fixed": {"continuation.cut": "fixed"},
    "uniform": {"continuation.cut": "uniform"},
    "zero": {
        "continuation.cut": "zero",
        "continuation.max_tokens": 0,
        "max_completion_length": 7168,
        "rollout.parts": 1,  # nothing is sampled
    },
    "e4096": {"continuation.max_tokens": 4096},
    "gate": {"audit.gate": "graded", "reward.grader": "math"},
    "4b": math.VARIANTS["4b"],
}


def get_config(arg=None):
    """configs/math.py with the objective `continuation`; `arg` names variants."""
    c = math.get_config()
    c.run_dir = "runs/continuation"
    c.objective.name = "continuation"
    c.objective.normalizer = "separate_means"  # the mean over the teacher's tokens, as cross-entropy is written
    c.continuation.cut = "peak"
    c.continuation.cut_tokens = 4096  # k of `fixed`
    c.continuation.max_tokens = 1024  # E
    c.max_completion_length = 4096  # nothing behind the cut is read, with `fixed`
    c.anchor.kl_coef = 0.0
    c.teacher.deadline_s = 600.0  # a thousand tokens, not fifty
    c.teacher.timeout_s = 300.0
    c.optimizer.learning_rate = 1e-5
    return config.apply(c, VARIANTS, arg)
