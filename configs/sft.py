"""Baseline: the student is fine-tuned on the teacher's own solutions, collected through the same protocol and journal.

    python -m omniopd_jax.main --config=configs/sft.py --config.teacher.base_url=http://HOST:8000/v1

Variant: configs/sft.py:4b.

Four solutions per prompt, each up to 7,168 tokens, cross-entropy on each of their tokens; no anchor, no audit. A
solution that fails is an empty row, one that is cut at the cap is kept without an end token. The journal makes a second
epoch, another learning rate or a resume free: the solutions are the data set.
Hardware: as configs/math.py (a v5e-16 or v5p-8 slice, or 8 GPUs of 80 GB), and any OpenAI-compatible server.
Time and cost: 256 solutions per step, about 0.5 M teacher tokens at 2,000 tokens each; not run here.
Result reported by the paper (not run here): 1.7B from Qwen3-32B 51.87 -> 53.76, 4B 54.01 -> 63.80.
"""

from configs import math
from omniopd_jax import config

VARIANTS = {"4b": math.VARIANTS["4b"]}


def get_config(arg=None):
    """configs/math.py with the objective `sft`; `arg` names variants."""
    c = math.get_config()
    c.run_dir = "runs/sft"
    c.objective.name = "sft"
    c.rollout.parts = 1  # nothing is sampled
    c.objective.normalizer = "separate_means"  # the mean over tokens, as cross-entropy is written
    c.anchor.kl_coef = 0.0  # plain fine-tuning
    c.teacher.deadline_s = 1800.0  # a whole solution, not fifty tokens
    c.teacher.timeout_s = 900.0
    c.optimizer.learning_rate = 1e-5  # ten times the policy recipes': the data is not the student's own
    c.optimizer.schedule = "cosine"
    return config.apply(c, VARIANTS, arg)
