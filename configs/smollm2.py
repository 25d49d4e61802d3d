"""A real language model on two CPU cores: SmolLM2-135M-Instruct learns word problems from a teacher behind vLLM.

    make real          # makes what is needed, serves the teacher, runs this recipe; with a server of your own:
    python -m omniopd_jax.main --config=configs/smollm2.py --config.teacher.base_url=http://127.0.0.1:PORT/v1

Variants, comma-separated after a colon: teacher (how the default teacher's adapter was made: plain fine-tuning on the
problems' own solutions), gemma (a foreign teacher: Gemma-3-270M, a base model, with worked examples in front),
gemma_tuned (the same after such fine-tuning, without examples), of_gemma (with `teacher`: how that was made).

The teacher of `make real` is the student after that fine-tuning; it gives text alone, over the OpenAI-compatible wire.
Hardware: 2 CPU cores, 12 GiB with the server. Time: 41 s a step on two quiet cores, 20 minutes in all. Free.
Result: docs/results/real_model.md.
"""

from omniopd_jax import config

REAL = ".cache/real"  # made by `python -m benchmarks.real.prepare`
EXAMPLES = """Question: Rosa has 4 bags with 5 plums each. She buys 6 more. How many plums does Rosa have now?
Answer: Rosa has 4 bags with 5 plums each, which is 4 x 5 = 20 plums. She buys 6 more, so she now has 20 + 6 = 26 plums.

Question: Hugo has 15 pens. He loses 4. How many pens does Hugo have now?
Answer: Hugo has 15 pens. He loses 4, so he now has 15 - 4 = 11 pens.

Question: Clara has 7 stones. She finds 9 more. She gives 3 to Noah. How many stones does Clara have now?
Answer: Clara has 7 stones. She finds 9 more, so she now has 7 + 9 = 16 stones. She gives 3 to Noah, so she now has \
16 - 3 = 13 stones."""
VARIANTS = {
    "teacher": {
        "objective.name": "sft",
        "objective.normalizer": "separate_means",
        "anchor.kl_coef": 0.0,
        "num_generations": 1,
        "num_steps": 40,
        "prompts_per_step": 16,
        "eval.num_prompts": 0,
        "lora.rank": 4,  # 2.5 MB in bfloat16
        "lora.alpha": 8.0,
        "optimizer.warmup_steps": 5,
    },
    "gemma": {
        "teacher.model": "gemma3",
        "teacher.tokenizer": f"{REAL}/gemma3",
        "teacher.template": "plain",
        "teacher.preamble": EXAMPLES,
    },
    "gemma_tuned": {
        "teacher.model": "gemma3_tuned",
        "teacher.tokenizer": f"{REAL}/gemma3",
        "teacher.template": "plain",
    },
    "of_gemma": {"student.path": f"{REAL}/gemma3", "student.template": "plain"},
}


def get_config(arg=None):
    """The recipe; `arg` names variants."""
    c = config.default()
    c.run_dir = "runs/smollm2"
    c.num_steps = 20
    c.prompts_per_step = 8  # 8 x 2 rows per step
    c.num_generations = 2
    c.max_prompt_length = 96
    c.max_completion_length = 96  # a teacher's solution fits; 38% of the student's first answers are cut
    c.temperature = 0.7  # at 1 half of what the student writes is no English
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
    c.teacher.tokenizer = f"{REAL}/smollm2"  # raw completion

    c.audit.num_chunks = 4
    c.audit.chunk_tokens = 10
    c.audit.num_continuations = 4
    c.audit.similarity = "rouge1"  # of edit's value 41% is chance here, of this 23%: docs/results/real_similarity.md
    c.objective.advantage = "batch_mean"
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2
    c.checkpoint.every = 5
    return config.apply(c, VARIANTS, arg)
