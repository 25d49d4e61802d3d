"""Self-distillation with privileged context (OPSD, arXiv 2601.18734) with a text teacher: the frozen student scores the
student's own answer under a prompt that also shows the teacher's solution.

    python -m omniopd_jax.main --config=configs/context.py --config.teacher.base_url=http://HOST:8000/v1

Variants, comma-separated after a colon: self, ema (who scores), reverse (the KL's direction), clip (a token counts at
most 2 nats), 4b.

One solution per prompt, bought once: a second epoch, a resume or configs/sft.py with the same journal and caps finds
it there. Solutions that come with the prompts are taken where data.fields.solution names them. The context gives the
result away: report accuracy on held-out prompts alone.
Hardware: as configs/math.py; the update has a second forward pass, over prompts that are longer by a solution.
Time and cost: 64 solutions per step, about 0.13 M teacher tokens at 2,000 tokens each; not run here.
Result reported elsewhere (radixark/miles PR 3292, not run here): Qwen3-1.7B, AIME24 avg@12, base 0.458, reverse 0.506,
forward 0.569.
"""

from configs import math
from omniopd_jax import config

VARIANTS = {
    "self": {"context.model": "self"},
    "ema": {"context.model": "ema"},
    "reverse": {"context.divergence": "reverse"},
    "clip": {"context.clip": 2.0},
    "4b": math.VARIANTS["4b"],
}


def get_config(arg=None):
    """configs/math.py with the objective `context`; `arg` names variants."""
    c = math.get_config()
    c.run_dir = "runs/context"
    c.objective.name = "context"
    c.objective.normalizer = "separate_means"  # the mean over tokens
    c.context.model = "reference"
    c.context.divergence = "forward"
    c.anchor.kl_coef = 0.0  # the KL to the frozen student with the solution is the whole loss
    c.teacher.deadline_s = 1800.0  # a whole solution, not fifty tokens
    c.teacher.timeout_s = 900.0
    c.micro_batches = 16  # two forward passes and longer rows
    return config.apply(c, VARIANTS, arg)
