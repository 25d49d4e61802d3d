"""A real language model on two CPU cores: SmolLM2-135M-Instruct learns word problems from a teacher behind vLLM.

    make real                                  # makes what is needed, serves the teacher, runs this recipe

Variants, comma-separated after a colon: teacher (how the default teacher's adapter was made), sft.
"""

from omniopd_jax import config

REAL = ".cache/real"  # made by `python -m benchmarks.real.prepare`
VARIANTS = {
    "teacher": {
        "objective.name": "sft",
        "objective.normalizer": "separate_means",
        "anchor.kl_coef": 0.0,
        "num_generations": 1,
        "num_steps": 40,
        "prompts_per_step": 16,
        "max_prompt_length": 96,
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 5,
    },
}


def get_config(arg=None):
    """The recipe; `arg` names variants."""
    c = config.default()
    c.run_dir = "runs/smollm2"
    c.num_steps = 24
    c.prompts_per_step = 8
    c.num_generations = 2
    c.max_prompt_length = 96
    c.max_completion_length = 96
    c.model.remat = "dots"
    c.student.path = f"{REAL}/smollm2"
    c.data.source = "jsonl"
    c.data.path = f"{REAL}/data/train.jsonl"
    c.reward.grader = "math"
    c.eval.grader = "math"
    c.eval.path = f"{REAL}/data/test.jsonl"
    c.eval.num_prompts = 256
    c.teacher.provider = "openai"
    c.teacher.model = "teacher"
    c.teacher.tokenizer = f"{REAL}/smollm2"
    c.audit.num_chunks = 2
    c.audit.chunk_tokens = 10
    c.audit.num_continuations = 4
    c.objective.advantage = "batch_mean"
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.optimizer.learning_rate = 1e-4
    c.checkpoint.every = 4
    return config.apply(c, VARIANTS, arg)
