"""Baseline: GRPO from a rule-based reward, no teacher; DAPO's variant (arXiv 2503.14476) as far as one update per batch
allows.

    python -m omniopd_jax.main --config=configs/grpo.py

Variants, comma-separated after a colon: kl (KL to the frozen base at 0.001, which DAPO leaves out), 4b, twice (two
updates a batch, the ratio of the second clipped to 1 +- 0.2).

Kept of DAPO: no KL, the loss a mean over tokens of the whole batch, DAPO-Math-17K, lr 1e-6, sixteen responses per
prompt.
Left out: dynamic sampling (a group of equal rewards has advantage 0 and still costs its responses), overlong shaping,
and clip-higher: one update per batch keeps the ratio at 1, and `twice` clips both sides alike (`objective.clip`).
Hardware: a v5p-8 slice, or 8 GPUs of 80 GB (1,024 rows: their cache is too large for a v5e-16).
Time: four times the rollouts of configs/math.py and no teacher; not run here.
Result reported by the paper for its GRPO (not run here): 1.7B 51.87 -> 62.41, 4B 54.01 -> 70.24.
"""

from configs import math
from omniopd_jax import config

VARIANTS = {"kl": {"anchor.kl_coef": 0.001}, "4b": math.VARIANTS["4b"], "twice": {"num_iterations": 2}}


def get_config(arg=None):
    """configs/math.py with the objective `grpo`; `arg` names variants."""
    c = math.get_config()
    c.run_dir = "runs/grpo"
    c.objective.name = "grpo"
    c.objective.normalizer = "separate_means"  # DAPO's mean over tokens
    c.reward.grader = "math"  # 1 for a right boxed answer, else 0
    c.anchor.kl_coef = 0.0
    c.num_generations = 16  # the group
    c.rollout.cache_gib = 14.0  # of the 56 GiB that 1,024 rows of full length take on each of 8 GPUs
    c.micro_batches = 16  # divides 128 rows over 8 GPUs
    return config.apply(c, VARIANTS, arg)
