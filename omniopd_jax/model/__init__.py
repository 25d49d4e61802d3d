"""One decoder for the Qwen3, Qwen2 and Llama families: pure functions over a nested dict of arrays.

Shape letters, for the whole project: B rows, T response positions, L prompt + response, P prompt, V vocabulary, D model
width, N query heads, K key/value heads, G = N / K, H head width, F feed-forward, E experts, S cache length, M chunks,
C chunk tokens, R continuations.

`table(cfg)` declares every parameter once: shape, logical axes, init, and the Hugging Face tensor it is. Loading,
sharding, init and export all read it. Layers are stacked along a leading axis and scanned in training; the sampler
unstacks them once an iteration (`unstack`).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from omniopd_jax.model import attention
from omniopd_jax.model.table import (
    ModelConfig,
    Param,
    count,
    fits,
    init,
    is_param,
    num_params,
    param_shardings,
    table,
    table_shardings,
)

__all__ = [
    "ModelConfig", "Param", "cast_layers", "count", "fits", "head", "hidden", "init", "is_param", "layer",
    "logits", "lookup", "mlp", "num_params", "param_shardings", "project", "qkv", "rms_norm",
    "rope_frequencies", "rope_tables", "rotate", "table", "table_shardings", "unstack",
]  # fmt: skip


def head(params: dict) -> jax.Array:
    """The output projection, head_DV: its own, or the embedding's transpose where they are tied."""
    return params["head"] if "head" in params else params["embed"].T


def logits(params: dict, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> float32 logits [..., V]. For single positions and tests; sequences go through vocab.py."""
    return jnp.einsum("...d,dv->...v", hidden, head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)


def hidden(params: dict, cfg: ModelConfig, token_BL, *, position_BL=None, segment_BL=None, length_B=None) -> jax.Array:
    """Final hidden states, after the last norm, of whole rows (training and scoring).

    Args:
      token_BL: int32 tokens; padding anywhere that no real token attends to (right of the row, or segment 0).
      position_BL: RoPE positions; 0, 1, .. where None.
      segment_BL: tokens attend within their own segment only; 0 is padding. None: one segment, causal.
      length_B: real tokens of right-padded rows, which lets cudnn skip the rest; states beyond mean nothing.

    Returns:
      hidden_BLD in `cfg.dtype`.
    """
    B, L = token_BL.shape
    if position_BL is None:
        position_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    with jax.named_scope("embed"):
        x_BLD = lookup(params["embed"], token_BL, cfg)
    rope = rope_tables(cfg, position_BL)

    def body(x_BLD, p):
        if cfg.host_layers:
            p = jax.device_put(p, jax.memory.Space.Device)

        def attend(q, k, v):
            return attention.attend(
                q, k, v, segment_BL=segment_BL, length_B=length_B, backend=cfg.attention, mesh=cfg.mesh
            )

        return layer(x_BLD, p, cfg, rope, attend), None

    with jax.named_scope("layers"):
        x_BLD, _ = jax.lax.scan(_remat(body, cfg.remat), x_BLD, params["layers"])
    return rms_norm(x_BLD, params["final_norm"], cfg.norm_eps)


def lookup(embed, token_BL, cfg: ModelConfig):
    """Embeddings of the tokens; `embed` is [V, D], or [X, V, D], a copy a shard of rows (spread.py), used where it lies."""
    rows = cfg.mesh and jax.sharding.NamedSharding(cfg.mesh, P(("data", "fsdp")))

    def one(embed_VD, token_BL):  # cast after: the gradient adds up in the master's dtype
        return embed_VD[token_BL].astype(cfg.dtype)

    if embed.ndim == 2:
        return one(embed, token_BL)
    X, (B, L) = embed.shape[0], token_BL.shape
    x_BLD = jax.vmap(one)(embed, token_BL.reshape(X, B // X, L)).reshape(B, L, -1)
    return jax.lax.with_sharding_constraint(x_BLD, rows)


def layer(x_BLD, p: dict, cfg: ModelConfig, rope, attend):
    """One decoder layer; `attend(q_BLNH, k_BLKH, v_BLKH) -> out_BLNH` is the caller's (training, prefill, decode)."""
    q_BLNH, k_BLKH, v_BLKH = qkv(rms_norm(x_BLD, p["attn_norm"], cfg.norm_eps), p, cfg, rope)
    with jax.named_scope("attention"):
        out_BLNH = attend(q_BLNH, k_BLKH, v_BLKH)
        y_BLD = project(out_BLNH, p, "o", cfg, axes=2)
    x_BLD += y_BLD + p["o_bias"].astype(cfg.dtype)[None, None] if cfg.out_bias else y_BLD
    with jax.named_scope("mlp"):
        return x_BLD + mlp(rms_norm(x_BLD, p["mlp_norm"], cfg.norm_eps), p, cfg)


def qkv(x_BLD, p: dict, cfg: ModelConfig, rope):
    """Projections, biases, per-head norms (Qwen3) and rotary embedding: (q_BLNH, k_BLKH, v_BLKH)."""
    with jax.named_scope("qkv"):
        q, k, v = (project(x_BLD, p, name, cfg) for name in "qkv")
        if cfg.qkv_bias:
            q, k, v = (a + p[f"{n}_bias"].astype(cfg.dtype)[None, None] for a, n in ((q, "q"), (k, "k"), (v, "v")))
        if cfg.qk_norm:
            q, k = rms_norm(q, p["q_norm"], cfg.norm_eps), rms_norm(k, p["k_norm"], cfg.norm_eps)
        return rotate(q, rope), rotate(k, rope), v


def project(x, p: dict, name: str, cfg: ModelConfig, axes: int = 1):
    """x W over the last `axes` axes of x and the first of W; where the layer carries an adapter of that name (lora.py),
    x W + (alpha / rank) (x A) B.

    The adapter's products are formed from x, so no merged W is, and none has a gradient but A and B.
    """
    y = _product(x, p[name], cfg, axes)
    if f"{name}_lora_a" not in p:
        return y
    if cfg.lora_scale is None:
        raise ValueError("the layer carries adapters, and ModelConfig.lora_scale is not set")
    low = _product(x, p[f"{name}_lora_a"], cfg, axes)
    return y + _product(cfg.lora_scale * low, p[f"{name}_lora_b"], cfg, 1)


def _product(x, w, cfg: ModelConfig, axes: int):
    """`jnp.tensordot` with w in the computation's dtype, on CPU as a product of two matrices.

    With more axes the CPU's compiler transposes the gradient for that of w element by element: 1.4 times the time.
    """
    w = w.astype(cfg.dtype)
    if attention.platform(cfg.mesh) != "cpu":
        return jnp.tensordot(x, w, axes)
    y = x.reshape(-1, math.prod(x.shape[-axes:])) @ w.reshape(math.prod(w.shape[:axes]), -1)
    return y.reshape(*x.shape[:-axes], *w.shape[axes:])


def mlp(x_BLD, p: dict, cfg: ModelConfig):
    """SwiGLU, or the mixture of experts where the layer has a router."""
    if cfg.num_experts:
        return _experts(x_BLD, p, cfg)
    gate_BLF, up_BLF = (project(x_BLD, p, name, cfg) for name in ("gate", "up"))
    return project(jax.nn.silu(gate_BLF) * up_BLF, p, "down", cfg)


def _experts(x_BLD, p: dict, cfg: ModelConfig):
    """Top-k experts a token by sorting tokens to their experts and one ragged product each for gate, up, down."""
    B, L, D = x_BLD.shape
    x_XD = x_BLD.reshape(B * L, D)
    router_XE = jnp.einsum("xd,de->xe", x_XD, p["router"].astype(cfg.dtype), preferred_element_type=jnp.float32)
    weight_XA, expert_XA = jax.lax.top_k(jax.nn.softmax(router_XE, axis=-1), cfg.experts_per_token)
    if cfg.normalize_experts:
        weight_XA /= weight_XA.sum(-1, keepdims=True)
    order = jnp.argsort(expert_XA.reshape(-1), stable=True)
    sizes_E = jnp.bincount(expert_XA.reshape(-1), length=cfg.num_experts).astype(jnp.int32)
    rows = x_XD[order // cfg.experts_per_token]
    gate = jax.lax.ragged_dot(rows, p["gate"].astype(cfg.dtype), sizes_E)
    up = jax.lax.ragged_dot(rows, p["up"].astype(cfg.dtype), sizes_E)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, p["down"].astype(cfg.dtype), sizes_E)
    out = out * weight_XA.reshape(-1)[order][:, None].astype(cfg.dtype)
    return jnp.zeros_like(x_XD).at[order // cfg.experts_per_token].add(out).reshape(B, L, D)


def rms_norm(x, scale, eps: float):
    """x / rms(x) * scale over the last axis, the variance in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return (y.astype(x.dtype)) * scale.astype(x.dtype).reshape(shape)


def rope_tables(cfg: ModelConfig, position_BL):
    """float32 (sin, cos), each [B, L, 1, H/2], with the family's frequency scaling."""
    freq, gain = rope_frequencies(cfg)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * freq[None, None, None, :]
    return jnp.sin(angle) * gain, jnp.cos(angle) * gain


@functools.lru_cache
def rope_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, np.float32]:
    """(inverse frequencies [H/2], gain of sin and cos), float32: default, `linear`, `llama3` and `yarn` scaling.

    In numpy, so that no backend's power function enters: at position 8,000 an ulp of a frequency is 1e-3 of an angle.
    """
    H = cfg.head_dim
    freq = 1 / np.float32(cfg.rope_theta) ** (np.arange(0, H, 2, dtype=np.float32) / np.float32(H))
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
    H, old = cfg.head_dim, s["original_max_position_embeddings"]

    def turn(rotations):  # the (fractional) pair that turns so often within the original context
        return H * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low, high = turn(s.get("beta_fast") or 32), turn(s.get("beta_slow") or 1)
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


def rotate(x_BLNH, rope):
    """Rotary embedding, half-split pairs, computed in float32."""
    sin, cos = rope
    a, b = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLNH.dtype)


def unstack(params: dict, cfg: ModelConfig, dtype=None) -> dict:
    """Cast to `dtype` (default `cfg.dtype`), `layers` as a list: for the sampler, once an iteration."""
    params = jax.tree.map(lambda a: a.astype(dtype or cfg.dtype), params)
    layers = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(cfg.num_layers)]
    return params | {"layers": layers}


def cast_layers(params: dict, cfg: ModelConfig) -> dict:
    """`params` with the stacked layers in `cfg.dtype`: once in front of a pass, not once a layer, turn and micro-batch.

    A layer's leaf is used once a pass and in `cfg.dtype`: its gradient comes in that dtype, as its product does, and the sum
    over micro-batches belongs in the masters'.
    """
    return params | {"layers": jax.tree.map(lambda a: a.astype(cfg.dtype), params["layers"])}


def _remat(body, name: str):
    keep = jax.checkpoint_policies
    policies = {
        "dots": keep.save_from_both_policies(keep.checkpoint_dots_with_no_batch_dims, attention.saved_by_kernel),
        "context": keep.save_from_both_policies(keep.save_only_these_names("context"), attention.saved_by_kernel),
        "full": keep.nothing_saveable,
    }
    return body if name == "none" else jax.checkpoint(body, policy=policies[name], prevent_cse=False)
