"""The mixture of experts of an MLP layer: A of E experts a token."""

import jax
import jax.numpy as jnp

from omniopd_jax.model.table import ModelConfig


def experts(x_BLD, p: dict, cfg: ModelConfig, dtype):
    """Top-k experts a token by sorting tokens to their experts and one ragged product each for gate, up, down.

    Args:
      p: the layer's parameters: router [D, E], gate and up [E, D, F], down [E, F, D].
      dtype: of the products.
    """
    B, L, D = x_BLD.shape
    x_XD = x_BLD.reshape(B * L, D)
    router_XE = jnp.einsum("xd,de->xe", x_XD, p["router"].astype(dtype), preferred_element_type=jnp.float32)
    weight_XA, expert_XA = jax.lax.top_k(jax.nn.softmax(router_XE, axis=-1), cfg.experts_per_token)
    if cfg.normalize_experts:
        weight_XA /= weight_XA.sum(-1, keepdims=True)
    order = jnp.argsort(expert_XA.reshape(-1), stable=True)
    sizes_E = jnp.bincount(expert_XA.reshape(-1), length=cfg.num_experts).astype(jnp.int32)
    rows = x_XD[order // cfg.experts_per_token]
    gate = jax.lax.ragged_dot(rows, p["gate"].astype(dtype), sizes_E)
    up = jax.lax.ragged_dot(rows, p["up"].astype(dtype), sizes_E)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, p["down"].astype(dtype), sizes_E)
    out = out * weight_XA.reshape(-1)[order][:, None].astype(dtype)
    return jnp.zeros_like(x_XD).at[order // cfg.experts_per_token].add(out).reshape(B, L, D)
