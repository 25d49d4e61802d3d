"""The ways to learn whose whole runs the tests take: name -> dotted keys beside `tiny.overrides`."""

CONTINUATION = {
    "objective.name": "continuation", "continuation.cut": "uniform", "continuation.cuts": 2,
    "continuation.max_tokens": 10, "anchor.kl_coef": 0.05,
}  # fmt: skip
CONTEXT = {
    "objective.name": "context", "anchor.kl_coef": 0.05, "context.template": "{solution} {prompt}",
    "context.max_prompt_length": 200,  # the tests' models have 256 positions
}  # fmt: skip
METHODS = {
    "continuation": CONTINUATION,
    "peak": CONTINUATION | {"continuation.cut": "peak", "objective.normalizer": "separate_means"},
    "context": CONTEXT,
    "mix": {"objective.mix.omniopd": 1.0, "objective.mix.continuation": 0.5, "objective.mix.grpo": 0.2}
    | {key: value for key, value in CONTINUATION.items() if key != "objective.name"},
    "adaptive": {
        "audit.adaptive": True,
        "audit.adaptive_first": 2,
        "audit.num_continuations": 6,
        "audit.adaptive_error": 0.09,
        "objective.advantage": "batch_mean",
    },
    "self": CONTEXT | {"context.model": "self", "anchor.kl_coef": 0.0},
    "ema": CONTEXT | {"context.model": "ema", "context.divergence": "reverse", "context.clip": 1.0},
}
