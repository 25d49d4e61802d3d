"""Shapes of published models, for what needs no weights: ahead-of-time compilation, sizes and counts.

Typed off their public config.json files (Qwen3, Qwen3.5) and off transformers' convert_gemma3_weights.py (Gemma 3); of
a model of images and text, the text model.
"""

from typing import Any

from omniopd_jax.hf import layered
from omniopd_jax.model import ModelConfig


def _qwen3(D: int, layers: int, Q: int, K: int, F: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        "qwen3", 151_936, D, F, layers, Q, K, 128, rope_theta=1e6, qk_norm=True, tied=tied, max_positions=40_960
    )


def _qwen3_5(D: int, layers: int, Q: int, K: int, F: int, tied: bool, value_heads: int) -> ModelConfig:
    return ModelConfig(
        "qwen3_5", 248_320, D, F, layers, Q, K, 256, rope_theta=1e7, tied=tied, qk_norm=True, max_positions=262_144,
        layer_kinds=("linear", "linear", "linear", "full") * (layers // 4), rotary_dim=64, zero_centred_norms=True,
        attention_gate=True, linear_key_heads=16, linear_value_heads=value_heads, linear_key_dim=128,
        linear_value_dim=128, conv_width=4, prefix=layered.WRAPPED_PREFIX,
    )  # fmt: skip


def _gemma3(D: int, layers: int, Q: int, K: int, F: int, window: int, more: dict | None = None) -> ModelConfig:
    kinds = tuple("sliding" if (i + 1) % 6 else "full" for i in range(layers))
    fields: dict[str, Any] = {"vocab_size": 262_144, "max_positions": 32_768} | (more or {})
    return ModelConfig(
        "gemma3", **fields, hidden_size=D, intermediate_size=F, num_layers=layers, num_heads=Q, num_kv_heads=K,
        head_dim=256, rope_theta=1e6, tied=True, qk_norm=True, layer_kinds=kinds, window=window, local_rope_theta=1e4,
        query_scale=256.0, zero_centred_norms=True, post_norms=True, scaled_embeddings=True, activation="gelu_tanh",
    )  # fmt: skip


_GEMMA3_270M = _gemma3(640, 18, 4, 1, 2_048, 512)
_GEMMA3_1B = _gemma3(1_152, 26, 4, 1, 6_912, 512)
_GEMMA3_4B = _gemma3(
    2_560, 34, 8, 4, 10_240, 1_024,
    {
        "vocab_size": 262_208, "max_positions": 131_072, "prefix": layered.WRAPPED_PREFIX,
        "rope_scaling": (("factor", 8.0), ("rope_type", "linear")),
    },
)  # fmt: skip

PUBLISHED = {
    "Qwen/Qwen3-0.6B": _qwen3(1_024, 28, 16, 8, 3_072, True),
    "Qwen/Qwen3-1.7B": _qwen3(2_048, 28, 16, 8, 6_144, True),
    "Qwen/Qwen3-4B": _qwen3(2_560, 36, 32, 8, 9_728, True),
    "Qwen/Qwen3-8B": _qwen3(4_096, 36, 32, 8, 12_288, False),
    "Qwen/Qwen3-14B": _qwen3(5_120, 40, 40, 8, 17_408, False),
    "Qwen/Qwen3-32B": _qwen3(5_120, 64, 64, 8, 25_600, False),
    "Qwen/Qwen3.5-0.8B": _qwen3_5(1_024, 24, 8, 2, 3_584, True, 16),
    "Qwen/Qwen3.5-2B": _qwen3_5(2_048, 24, 8, 2, 6_144, True, 16),
    "Qwen/Qwen3.5-4B": _qwen3_5(2_560, 32, 16, 4, 9_216, True, 32),
    "Qwen/Qwen3.5-9B": _qwen3_5(4_096, 32, 16, 4, 12_288, False, 32),
    "google/gemma-3-270m": _GEMMA3_270M,
    "google/gemma-3-270m-it": _GEMMA3_270M,
    "google/gemma-3-1b-pt": _GEMMA3_1B,
    "google/gemma-3-1b-it": _GEMMA3_1B,
    "google/gemma-3-4b-pt": _GEMMA3_4B,
    "google/gemma-3-4b-it": _GEMMA3_4B,
}
