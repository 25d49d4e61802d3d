"""Rotary position embedding: inverse frequencies with each family's scaling, and the rotation."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np

from omniopd_jax.model.table import ModelConfig


def tables(cfg: ModelConfig, position_BL, kind: str = "full"):
    """float32 (sin, cos), each [B, L, 1, H/2] (half of `rotary_dim`), with the family's frequency scaling.

    Args:
      kind: of the layer; a sliding one may have a base of its own, without scaling.
    """
    if kind == "sliding" and cfg.local_rope_theta is not None:
        cfg = dataclasses.replace(cfg, rope_theta=cfg.local_rope_theta, rope_scaling=())
    freq, gain = frequencies(cfg)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * freq[None, None, None, :]
    return jnp.sin(angle) * gain, jnp.cos(angle) * gain


def by_kind(cfg: ModelConfig, position_BL) -> dict:
    """`tables` of each kind of layer that attends."""
    return {kind: tables(cfg, position_BL, kind) for kind in dict.fromkeys(cfg.kinds) if kind != "linear"}


def rotate(x_BLQH, rope):
    """Rotary embedding of queries or keys, half-split pairs, computed in float32."""
    sin, cos = rope
    turned = 2 * sin.shape[-1]
    if turned < x_BLQH.shape[-1]:
        head, rest = jnp.split(x_BLQH, [turned], axis=-1)
        return jnp.concatenate([rotate(head, rope), rest], axis=-1)
    a, b = jnp.split(x_BLQH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLQH.dtype)


@functools.lru_cache
def frequencies(cfg: ModelConfig) -> tuple[np.ndarray, np.float32]:
    """(inverse frequencies [H/2], gain of sin and cos), float32: default, `linear`, `llama3` and `yarn` scaling.

    In numpy, so that no backend's power function enters: at position 8,000 an ulp of a frequency is 1e-3 of an angle.
    """
    H = cfg.rotary_dim or cfg.head_dim
    exponent = (np.arange(0, H, 2, dtype=np.float32) / np.float32(H)).astype(np.float64)
    freq = 1 / (cfg.rope_theta**exponent).astype(np.float32)  # the power rounded once, as torch's is but for a few
    s = dict(cfg.rope_scaling)
    if not s:
        return freq, np.float32(1)
    factor = np.float32(s["factor"])
    if s["rope_type"] == "linear":
        return freq / factor, np.float32(1)
    if s["rope_type"] == "llama3":
        wave = np.float32(2 * math.pi) / freq
        low, high, old = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
        blend = (old / wave - np.float32(low)) / np.float32(high - low)
        mixed = (1 - blend) * freq / factor + blend * freq
        scaled = np.where(wave > old / low, freq / factor, np.where(wave < old / high, freq, mixed))
        return scaled.astype(np.float32), np.float32(1)
    if s["rope_type"] == "yarn":
        return _yarn(cfg, freq, s)
    raise ValueError(f"rope_type {s['rope_type']!r} is not implemented")


def _yarn(cfg: ModelConfig, freq: np.ndarray, s: dict) -> tuple[np.ndarray, np.float32]:
    """YaRN: a ramp between interpolated and original frequencies, and a gain on sin and cos."""
    H, old = cfg.rotary_dim or cfg.head_dim, s["original_max_position_embeddings"]

    def pair(rotations):  # the (fractional) pair that turns `rotations` times within the original context
        return H * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low, high = pair(s.get("beta_fast") or 32), pair(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(H // 2, dtype=np.float32) - low) / (high - low), 0, 1)

    def gain(scale, mscale=1.0):
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    factor = s["factor"]
    if "attention_factor" in s:
        out = s["attention_factor"]
    elif s.get("mscale") and s.get("mscale_all_dim"):
        out = gain(factor, s["mscale"]) / gain(factor, s["mscale_all_dim"])
    else:
        out = gain(factor)
    return (freq / factor * ramp + freq * (1 - ramp)).astype(np.float32), np.float32(out)
