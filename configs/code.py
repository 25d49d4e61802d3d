"""The paper's code recipe: Qwen3-1.7B learns to program from a text-only teacher; prompts from your own JSONL file.

    python -m omniopd_jax.main --config=configs/code.py --config.data.path=PROMPTS.jsonl \
        --config.teacher.base_url=http://HOST:8000/v1

The paper's code prompts are not known to us: `data.path` is a file with one {"prompt": ..., "answer": ...} per line;
`answer`, the tests, is read by the grader alone.
Variants as in configs/math.py. Hardware: a v5e-16 or v5p-8 slice, or 8 GPUs of 80 GB.
Result reported by the paper (not run here): 1.7B code average 47.93, against 40.44 for SFT and 47.06 for white-box OPD.
"""

from configs import math


def get_config(arg=None):
    """configs/math.py on code prompts."""
    c = math.get_config(arg)
    c.run_dir = c.run_dir.replace("math", "code")  # the variants' names stay
    c.data.source = "jsonl"
    c.data.name = ""
    c.data.path = "data/code_prompts.jsonl"
    c.data.fields.answer = "answer"
    c.eval.suffix, c.eval.grader = "", "code"
    return c
