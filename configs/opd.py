"""Baseline: white-box on-policy distillation, reverse KL from the teacher's token log-probabilities on the student's
own text.

    python -m omniopd_jax.main --config=configs/opd.py --config.teacher.model=Qwen/Qwen3-4B

    python -m omniopd_jax.main --config=configs/opd.py:remote --config.teacher.base_url=http://HOST:8000/v1

Variants, comma-separated after a colon: remote (Qwen3-32B behind vLLM or SGLang), exact (the whole vocabulary in place
of the sampled token; same memory as a second reference; local only), 4b (the student; give a local run a larger
teacher).

The teacher must give log-probs of the student's tokens (`score_tokens`), with the student's own tokenizer. In process
(teacher.provider = 'local') it is held whole, in float32, on one device beside the student, so the paper's Qwen3-32B
does not fit and the default is Qwen3-4B. `remote` asks a server for the log-probs of the prompt (launch/teacher_vllm.sh
serves one): one call per response, its token ids sent as they are. A server that gives none, or for other ids, is
refused at the start.
Hardware: 8 GPUs of 80 GB, or a v5p-8 slice; `remote`: the server's besides. Time: no teacher sampling, one more forward
pass per step; not run here.
Result reported by the paper (not run here), teacher Qwen3-32B: 1.7B 51.87 -> 61.70, 4B 54.01 -> 64.16.
"""

from configs import math
from omniopd_jax import config

VARIANTS = {
    # one tokenizer for the whole Qwen3 family: named by the student's path, and compared by the probe
    "remote": {"teacher.provider": "openai", "teacher.model": "Qwen/Qwen3-32B", "teacher.tokenizer": "Qwen/Qwen3-1.7B"},
    "exact": {"objective.name": "opd_exact"},
    "4b": math.VARIANTS["4b"],
}


def get_config(arg=None):
    """configs/math.py with the objective `opd`; `arg` names variants."""
    c = math.get_config()
    c.run_dir = "runs/opd"
    c.objective.name = "opd"
    c.anchor.kl_coef = 0.0  # the reverse KL to the teacher is the whole loss
    c.teacher.provider = "local"
    c.teacher.model = "Qwen/Qwen3-4B"
    config.apply(c, VARIANTS, arg)
    if c.teacher.provider == "openai":
        c.teacher.tokenizer = c.student.path  # which another variant may have changed
    return c
