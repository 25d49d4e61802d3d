"""What a step computes and moves, counted from shapes; and what the chip could do at most.

XLA's own count takes a loop's body once, whatever its trip count, so it cannot be used. Multiplications and additions
count as two; attention counts the causal half; norms, softmax and the optimizer are left out. Rematerialised work is
not counted: this is model FLOPs utilisation.
"""

import dataclasses
import math
import re

import jax

from omniopd_jax import model


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak dense bfloat16 FLOP/s, bytes of memory and its bandwidth, bytes/s between chips (all links, one way)."""

    flops: float
    memory: float
    bandwidth: float
    links: float
    devices: int = 1  # JAX devices a chip; the other figures are of one device
    room: float = 0.98  # of the memory that a run may plan with (v5e: 15.75 of 16 GiB; GPUs: launch/gpu_node.sh)


# From the makers' public pages: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, and NVIDIA's data sheets (SXM, no
# sparsity). tpu7x: a chip is two JAX devices. A GPU's links are NVLink.
GIB = 2.0**30
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9),
    "tpu7x": Chip(2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9, devices=2),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9, room=0.92),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9, room=0.92),
    "A100": Chip(312e12, 80e9, 2039e9, 300e9, room=0.92),
    "A100-40GB": Chip(312e12, 40e9, 1555e9, 300e9, room=0.92),
}
KINDS = {  # a pattern of `device_kind` -> name; the first that is found
    "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "TPU v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "tpu7x": "tpu7x",
    "TPU7x": "tpu7x", "TPU v7": "tpu7x", r"\bH100": "H100", r"\bH200": "H200", r"\bA100.*40GB": "A100-40GB",
    r"\bA100": "A100",
}  # fmt: skip


def chip(device=None) -> Chip | None:
    """The table's row of a device; None where it has none (a CPU)."""
    return chip_of((device or jax.devices()[0]).device_kind)


def chip_of(kind: str) -> Chip | None:
    """The row of a `device_kind`, by its name alone; None where there is none."""
    return next((CHIPS[name] for part, name in KINDS.items() if re.search(part, kind)), None)


def matmul_params(cfg: model.ModelConfig) -> tuple[int, int]:
    """(parameters of the layers' products that one token passes, parameters of the output projection)."""
    experts, rest = _products(cfg)
    return rest + experts * cfg.experts_per_token // max(1, cfg.num_experts), cfg.hidden_size * cfg.vocab_size


def _products(cfg: model.ModelConfig) -> tuple[int, int]:
    """(parameters of all experts, of the layers' other products)."""
    out = [0, 0]
    for p in model.table(cfg)["layers"].values():
        if len(p.hf_shape) == 2:  # a projection; not a vector, nor a convolution
            out["experts" not in p.axes] += math.prod(p.shape)
    return out[0], out[1]


def read_params(cfg: model.ModelConfig, tokens: float) -> float:
    """Parameters of the layers' products that are read for so many tokens at a time: of the experts those that any of
    them chooses, if all are chosen alike.
    """
    experts, rest = _products(cfg)
    return rest + experts * (1 - (1 - cfg.experts_per_token / max(1, cfg.num_experts)) ** tokens)


def mixing(cfg: model.ModelConfig, n: int) -> float:
    """FLOPs of what mixes the n tokens of a row, in all layers: attention's two products, or the delta rule's three and
    its convolution. The latter is counted as the recurrence; chunks take more.
    """
    width = min(cfg.window, n) if cfg.window else n
    pairs = {"full": n * (n + 1) / 2, "sliding": width * (width + 1) / 2 + (n - width) * width}
    delta = (
        6 * cfg.linear_value_heads * cfg.linear_key_dim * cfg.linear_value_dim + 2 * cfg.conv_width * cfg.conv_channels
    )
    attention = 4 * cfg.num_heads * cfg.head_dim
    return sum(float(n * delta) if kind == "linear" else attention * pairs[kind] for kind in cfg.kinds)


def forward(cfg: model.ModelConfig, lengths, heads) -> float:
    """FLOPs of one forward pass.

    Args:
      lengths: real tokens of each row, prompt and response.
      heads: positions of each row that meet the vocabulary.
    """
    layers, head = matmul_params(cfg)
    return 2.0 * layers * sum(lengths) + sum(mixing(cfg, n) for n in lengths) + 2.0 * head * sum(heads)


def update(
    cfg: model.ModelConfig,
    lengths,
    heads,
    *,
    anchored: bool,
    teacher: model.ModelConfig | None = None,
    frozen: bool = False,
) -> float:
    """FLOPs of one update: forward and backward (three times a forward), a reference's and a white-box teacher's
    forward.

    With `frozen` weights (LoRA) no gradient of theirs is formed; the adapters' own small products are left out.
    """
    layers, head = matmul_params(cfg)
    weights = 2.0 * layers * sum(lengths) + 2.0 * head * sum(heads)
    out = 3 * forward(cfg, lengths, heads) - (weights if frozen else 0.0)
    if anchored:
        out += forward(cfg, lengths, heads)
    return out if teacher is None else out + forward(teacher, lengths, heads)


def decode_bytes(
    cfg: model.ModelConfig, prompts, responses, *, rows_together: int, itemsize: int, cache_dtype: str = "",
    shards: int = 1,
) -> float:  # fmt: skip
    """Bytes that decoding must read: parameters (`read_params`) once a time step and shard, every row's own keys and
    values. The steps are as many as the longest row has tokens, or as full slots take for all tokens: at least so many.

    Args:
      prompts, responses: real tokens of each row.
      rows_together: rows that one shard decodes at a time; each time step reads the parameters once for all of them.
      itemsize: bytes of a parameter and of a cache entry.
      cache_dtype: of the pages; int8 has a float32 scale for each head and position. Rings are not in pages.
      shards: of the rows, which take their steps together.
    """
    layers, head = read_params(cfg, rows_together), cfg.hidden_size * cfg.vocab_size
    steps = max(max(responses, default=0), -(-sum(responses) // (rows_together * shards)))
    weights = (layers + head) * steps * shards
    per_slot = 2 * cfg.num_kv_heads * cfg.head_dim
    slots, page = {"full": 0.0, "sliding": 0.0, "linear": 0.0}, itemsize
    if cache_dtype == "int8":
        page = 1 + 4 / cfg.head_dim
    for p, n in zip(prompts, responses):
        slots["full"] += n * p + n * (n + 1) / 2
        slots["sliding"] += sum(min(cfg.window, p + t + 1) for t in range(n)) if cfg.window else 0
    cache = per_slot * sum(slots[kind] * (page if kind == "full" else itemsize) for kind in cfg.kinds)
    state = 4.0 * cfg.linear_value_heads * cfg.linear_key_dim * cfg.linear_value_dim * cfg.kinds.count("linear")
    return float(itemsize) * weights + cache + state * sum(responses)


def metrics(
    cfg, model_cfg, teacher_cfg, prompts, responses, seconds: dict, mesh, chip: Chip | None, *, trained=None,
    behind=((), ()), scored: bool = True,
) -> dict:  # fmt: skip
    """`perf/*` of a step: tokens a second and device by phase, everywhere; shares of the chip's peaks where it is
    known.

    Args:
      prompts, responses: real tokens of every row of the global batch.
      seconds: `time/*` of the step, that of an evaluation beside it included.
      trained: (prompts, responses) of the rows of the update, where they are others.
      behind: the same, of rows that the update sees once more, behind a privileged prompt.
      scored: whether the responses were scored. They were sampled where there is a time of it.
    """
    devices, tokens = mesh.size, sum(responses)
    lengths = [p + n for p, n in zip(prompts, responses)]
    before, taught = trained or (prompts, responses)
    out, scoring = {}, forward(model_cfg, lengths, responses)
    decoding = sum(mixing(model_cfg, n) for n in lengths) - sum(mixing(model_cfg, p) for p in prompts)
    # a prompt is prefilled once for all its generations
    sampling = forward(model_cfg, prompts[:: cfg.num_generations], [0]) + decoding
    sampling += 2.0 * sum(matmul_params(model_cfg)) * tokens
    passes = 1 + bool(cfg.max_staleness)  # under the policy that sampled, and under the one that is trained
    work = {
        "rollout": sampling if seconds.get("time/rollout") else 0.0,
        "score": scoring * passes if scored else 0.0,
        "update": update(
            model_cfg,
            [p + n for p, n in zip(before, taught)],
            taught,
            anchored=bool(cfg.anchor.kl_coef),
            teacher=teacher_cfg,
            frozen=bool(cfg.lora.rank),
        ),
    }
    for phase in work:
        if work[phase] and (spent := seconds.get(f"time/{phase}")):
            count = passes if phase == "score" else 1
            out[f"perf/{phase}_tokens_per_s"] = (sum(taught) if phase == "update" else tokens * count) / spent / devices
    if chip is None:
        return out
    work["update"] += forward(model_cfg, [p + n for p, n in zip(*behind)], behind[1])
    again = cfg.num_iterations - 1  # each scores the batch anew
    work["update"] += again * (work["update"] + scoring)
    for phase in ("score", "update"):
        if work[phase] and (spent := seconds.get(f"time/{phase}")):
            out[f"perf/{phase}_mfu"] = work[phase] / spent / devices / chip.flops
    out["perf/step_mfu"] = (
        sum(work.values()) / (seconds["time/step"] - seconds.get("time/eval", 0.0)) / devices / chip.flops
    )
    if spent := seconds.get("time/rollout"):
        shards = max(1, devices // mesh.shape["tp"])
        moved = decode_bytes(
            model_cfg,
            prompts,
            responses,
            rows_together=max(1, min(cfg.rollout.slots or len(responses), len(responses)) // shards),
            shards=shards,
            itemsize=2 if cfg.compute_dtype == "bfloat16" else 4,
            cache_dtype=cfg.rollout.cache_dtype,
        )
        out["perf/decode_bandwidth"] = moved / spent / devices / chip.bandwidth
    return out
