"""One decoder for the Qwen, Llama and Gemma families: pure functions over a nested dict of arrays.

Shape letters, for the whole project (names end in them, einsums use them):

    B rows                  T response positions     L prompt + response       P prompt positions
    V vocabulary            D model width            Q query heads             K key/value heads
    H head width            F feed-forward           E experts                 A experts per token
    S cache length          M chunks                 C chunk tokens            N continuations
    R rows of a packed or sampled batch              G generations per prompt
    X positions of several rows, laid end to end     Y shards of rows (data x fsdp)
    Z parts of a packed batch (shards x micro-batches)
    J queries that share a key/value head, (Q / K) x L
    W blocks of the vocabulary                       U columns of one block
    O value heads of linear attention                I tokens of its chunks

`table(cfg)` declares every parameter once: shape, logical axes, init, and the Hugging Face tensor it is. Loading,
sharding, init and export all read it. Layers are stacked along a leading axis and scanned in training, those of several
kinds a period at a time; the sampler unstacks them once an iteration (`unstack`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp

from omniopd_jax.model import attention, cpu, linear, moe, rope
from omniopd_jax.model.compute import Compute
from omniopd_jax.model.table import (
    FLOAT32,
    ModelConfig,
    Param,
    cast,
    count,
    fits,
    init,
    is_param,
    layer_slices,
    layers_of,
    num_params,
    param_shardings,
    table,
    table_shardings,
)
from omniopd_jax.parallel import sharding

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = [
    "Compute", "FLOAT32", "Head", "ModelConfig", "Param", "attention_of", "cast", "cast_layers", "count", "fits",
    "head", "hidden", "init", "is_param", "layer", "layer_slices", "layers_of", "logits", "lookup", "mlp", "norm",
    "num_params", "param_shardings", "project", "qkv", "rms_norm", "scaled", "stored_head", "table",
    "table_shardings", "unstack",
]  # fmt: skip


def head(params: dict) -> jax.Array:
    """The output projection, head_DV: its own, or the embedding's transpose where they are tied."""
    return params["head"] if "head" in params else params["embed"].T


@flax.struct.dataclass
class Head:
    """The output projection as it is stored: [D, V], or where `tied` the embedding itself, [V, D], never transposed."""

    matrix: jax.Array
    tied: bool = flax.struct.field(pytree_node=False, default=False)


def stored_head(params: dict) -> Head:
    """The output projection without a transpose; of replicated parameters (replicas.py) [Y, D, V] or [Y, V, D]."""
    return Head(params["head"]) if "head" in params else Head(params["embed"], tied=True)


def logits(params: dict, cfg: ModelConfig, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """hidden [..., D] -> float32 logits [..., V]. For single positions and tests; sequences go through vocab.py."""
    return jnp.einsum("...d,dv->...v", hidden, head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)


def hidden(
    params: dict,
    cfg: ModelConfig,
    token_BL: Int[Array, "B L"],
    *,
    position_BL: Int[Array, "B L"] | None = None,
    segment_BL: Int[Array, "B L"] | None = None,
    compute: Compute | None = None,
) -> Float[Array, "B L D"]:
    """Final hidden states, after the last norm, of whole rows (training and scoring).

    Args:
      token_BL: int32 tokens; padding anywhere that no real token attends to (right of the row, or segment 0).
      position_BL: RoPE positions; 0, 1, .. where None.
      segment_BL: tokens attend within their own segment only; 0 is padding. None: one segment, causal.
      compute: None: float32 on the default device.

    Returns:
      hidden_BLD in `compute.dtype`.
    """
    B, L = token_BL.shape
    compute = compute or Compute()
    if position_BL is None:
        position_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    with jax.named_scope("embed"):
        x_BLD = scaled(lookup(params["embed"], token_BL, compute), cfg)
    angles = rope.by_kind(cfg, position_BL)

    def one(kind: str):
        def run(x_BLD, p):
            if compute.host_layers:
                p = jax.device_put(p, jax.memory.Space.Device)

            attend = functools.partial(
                attention.attend, segment_BL=segment_BL, backend=compute.attention, mesh=compute.mesh,
                **attention_of(cfg, kind),
            )  # fmt: skip

            def recur(*args):
                return linear.whole(args[0], p["conv"], *args[1:], cfg, segment_BL)[0]

            return layer(x_BLD, p, cfg, compute, angles.get(kind), recur if kind == "linear" else attend), None

        # layers that one body unrolls are made again one by one, each when its gradient has come
        return _remat(run, compute.remat, prevent_cse=cfg.period > 1)

    with jax.named_scope("layers"):
        x_BLD = _over_layers(one, x_BLD, params["layers"], cfg)
    return norm(x_BLD, params["final_norm"], cfg)


def _over_layers(one, x_BLD, stacked: dict, cfg: ModelConfig):
    """`one(kind)(x_BLD, p) -> (x_BLD, None)` of every layer in turn: a scan over periods of kinds, then the rest."""
    if cfg.period == 1:
        return jax.lax.scan(one(cfg.kinds[0]), x_BLD, stacked)[0]
    run = {kind: one(kind) for kind in dict.fromkeys(cfg.kinds)}
    periods, held = cfg.num_layers // cfg.period, layers_of(cfg)
    each = {name: sum(i < cfg.period for i in held[name.split("_lora_")[0]]) for name in stacked}  # layers of a period

    def body(x_BLD, p):
        for i in range(cfg.period):
            x_BLD, _ = run[cfg.kinds[i]](x_BLD, layer_slices(p, cfg, i))
        return x_BLD, None

    whole = {name: a[: periods * each[name]].reshape(periods, each[name], *a.shape[1:]) for name, a in stacked.items()}
    x_BLD, _ = jax.lax.scan(body, x_BLD, whole)
    for i in range(periods * cfg.period, cfg.num_layers):
        x_BLD, _ = run[cfg.kinds[i]](x_BLD, layer_slices(stacked, cfg, i))
    return x_BLD


def attention_of(cfg: ModelConfig, kind: str) -> dict:
    """What `attention.attend` is told of a kind of layer."""
    scale = None if cfg.query_scale is None else cfg.query_scale**-0.5
    return {"window": cfg.window if kind == "sliding" else 0, "scale": scale}


def scaled(x_BLD, cfg: ModelConfig):
    """Embeddings as the first layer takes them; the factor is rounded to their dtype, as the reference does."""
    return x_BLD * jnp.asarray(cfg.hidden_size**0.5, x_BLD.dtype) if cfg.scaled_embeddings else x_BLD


def lookup(embed, token_BL, compute: Compute):
    """Embeddings of the tokens; `embed` is [V, D], or [Y, V, D], a copy per shard of rows (replicas.py)."""

    def one(embed_VD, token_BL):  # cast after: the gradient adds up in the master's dtype
        return embed_VD[token_BL].astype(compute.dtype)

    if embed.ndim == 2:
        return one(embed, token_BL)
    Y, (B, L) = embed.shape[0], token_BL.shape
    x_BLD = jax.vmap(one)(embed, token_BL.reshape(Y, B // Y, L)).reshape(B, L, -1)
    return sharding.constrain(x_BLD, compute.mesh, sharding.ROWS)


def layer(x_BLD, p: dict, cfg: ModelConfig, compute: Compute, angles, attend):
    """One decoder layer; `attend(q_BLQH, k_BLKH, v_BLKH) -> out_BLQH` is the caller's (training, prefill, decode).

    Of a linear layer `attend` is what `linear.mix` calls `recur`, and there are no angles.
    """
    h_BLD = norm(x_BLD, p["attn_norm"], cfg)
    if "linear_qkv" in p:
        with jax.named_scope("linear"):
            y_BLD = linear.mix(h_BLD, p, cfg, lambda x, name, axes=1: project(x, p, name, compute, axes), attend)
    else:
        y_BLD = attention_part(h_BLD, p, cfg, compute, angles, attend)
    if cfg.post_norms:
        y_BLD = norm(y_BLD, p["attn_out_norm"], cfg)
    x_BLD += y_BLD
    with jax.named_scope("mlp"):
        y_BLD = mlp(norm(x_BLD, p["mlp_norm"], cfg), p, cfg, compute)
        return x_BLD + (norm(y_BLD, p["mlp_out_norm"], cfg) if cfg.post_norms else y_BLD)


def attention_part(h_BLD, p: dict, cfg: ModelConfig, compute: Compute, angles, attend):
    """Projections, attention, its gate, and the projection back."""
    q_BLQH, k_BLKH, v_BLKH, gate_BLQH = qkv(h_BLD, p, cfg, compute, angles)
    with jax.named_scope("attention"):
        out_BLQH = attend(q_BLQH, k_BLKH, v_BLKH)
        if cfg.attention_gate:
            out_BLQH *= jax.nn.sigmoid(gate_BLQH)
        y_BLD = project(out_BLQH, p, "o", compute, axes=2)
    return y_BLD + p["o_bias"].astype(compute.dtype)[None, None] if cfg.out_bias else y_BLD


def qkv(x_BLD, p: dict, cfg: ModelConfig, compute: Compute, angles):
    """Projections, biases, per-head norms and rotary embedding: (q_BLQH, k_BLKH, v_BLKH, gate_BLQH or None)."""
    with jax.named_scope("qkv"):
        q, k, v = (project(x_BLD, p, name, compute) for name in "qkv")
        gate = None
        if cfg.qkv_bias:
            q, k, v = (a + p[f"{n}_bias"].astype(compute.dtype)[None, None] for a, n in ((q, "q"), (k, "k"), (v, "v")))
        if cfg.attention_gate:
            q, gate = jnp.split(q, 2, axis=-1)
        if cfg.qk_norm:
            q, k = norm(q, p["q_norm"], cfg), norm(k, p["k_norm"], cfg)
        return rope.rotate(q, angles), rope.rotate(k, angles), v, gate


def project(x, p: dict, name: str, compute: Compute, axes: int = 1):
    """x W over the last `axes` axes of x and the first of W; where the layer carries an adapter of that name (lora.py),
    x W + (alpha / rank) (x A) B.

    The adapter's products are formed from x, so no merged W is, and none has a gradient but A and B.
    """

    def product(x, w, axes):
        return cpu.product(x, w.astype(compute.dtype), axes, compute.mesh)

    y = product(x, p[name], axes)
    if f"{name}_lora_a" not in p:
        return y
    if compute.lora_scale is None:
        raise ValueError("the layer carries adapters, and Compute.lora_scale is not set")
    low = product(x, p[f"{name}_lora_a"], axes)
    return y + product(compute.lora_scale * low, p[f"{name}_lora_b"], 1)


def mlp(x_BLD, p: dict, cfg: ModelConfig, compute: Compute):
    """A gated feed-forward, or the mixture of experts where the layer has a router."""
    if cfg.num_experts:
        return moe.experts(x_BLD, p, cfg, compute.dtype)
    gate_BLF, up_BLF = (project(x_BLD, p, name, compute) for name in ("gate", "up"))
    act = jax.nn.silu if cfg.activation == "silu" else jax.nn.gelu  # the latter by tanh
    return project(act(gate_BLF) * up_BLF, p, "down", compute)


def norm(x, w, cfg: ModelConfig):
    """`rms_norm` as the family has it: times w, or times 1 + w in float32."""
    if not cfg.zero_centred_norms:
        return rms_norm(x, w, cfg.norm_eps)
    return rms_norm(x.astype(jnp.float32), 1.0 + w.astype(jnp.float32), cfg.norm_eps).astype(x.dtype)


def rms_norm(x, scale, eps: float):
    """x / rms(x) * scale over the last axis, the variance in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return (y.astype(x.dtype)) * scale.astype(x.dtype).reshape(shape)


def unstack(params: dict, cfg: ModelConfig, dtype) -> dict:
    """Cast to `dtype`, `layers` as a list: for the sampler, once an iteration."""
    params = cast(params, dtype)
    return params | {"layers": [layer_slices(params["layers"], cfg, i) for i in range(cfg.num_layers)]}


def cast_layers(params: dict, dtype) -> dict:
    """`params` with the stacked layers in `dtype`: once in front of a pass, not once a layer, turn and micro-batch.

    A layer's leaf is used once a pass and in `dtype`: its gradient comes in that dtype, as its product does, and the
    sum over micro-batches belongs in the masters'.
    """
    return params | {"layers": cast(params["layers"], dtype)}


def _remat(body, name: str, prevent_cse: bool):
    keep = jax.checkpoint_policies
    policies = {
        "dots": keep.save_from_both_policies(keep.checkpoint_dots_with_no_batch_dims, attention.saved_by_kernel),
        "context": keep.save_from_both_policies(keep.save_only_these_names("context"), attention.saved_by_kernel),
        "full": keep.nothing_saveable,
    }
    return body if name == "none" else jax.checkpoint(body, policy=policies[name], prevent_cse=prevent_cse)
