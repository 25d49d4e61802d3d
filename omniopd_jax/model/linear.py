"""Linear attention by the gated delta rule (Qwen3.5; arXiv 2412.06464): whole rows in chunks, decoding by a state.

A head keeps a matrix S, keys to values. A token decays it by exp(decay), then writes what its key does not give yet:
S <- exp(decay) S + beta k (v - exp(decay) S^T k)^T, and reads S^T q. Queries, keys and values come through a causal
convolution of `conv_width` tokens. Whole rows are computed in chunks of `CHUNK` tokens, whose writes are one triangular
system each; only the state goes from chunk to chunk. States and sums are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from omniopd_jax.model.table import ModelConfig

CHUNK = 64  # tokens


class State(NamedTuple):
    """What a layer keeps of a row between tokens: `conv` [B, conv_width - 1, key heads, channels of one], the
    convolution's last inputs; `memory` [B, O, key width, value width], float32.
    """

    conv: jax.Array
    memory: jax.Array


def mix(x_BLD, p: dict, cfg: ModelConfig, project, recur):
    """The layer's part in place of attention.

    Args:
      project: (x, leaf's name) -> x W, with the layer's adapters.
      recur: (inputs of the convolution [B, L, key heads, channels of one], decay_BLO, beta_BLO)
        -> [B, L, O, value width], float32: the caller's (`whole`, `step`).
    """

    def of_values(name):  # [B, L, O], key head by key head
        y = project(x_BLD, name)
        return y.reshape(*y.shape[:2], -1).astype(jnp.float32)

    rate, bias = (p[name].astype(jnp.float32)[None, None] for name in ("a_log", "dt_bias"))
    decay = -jnp.exp(rate) * jax.nn.softplus(of_values("linear_a") + bias)
    out = recur(project(x_BLD, "linear_qkv"), decay, jax.nn.sigmoid(of_values("linear_b")))
    z = project(x_BLD, "linear_z")
    gate = z.reshape(out.shape).astype(jnp.float32)
    out = out * jax.lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + cfg.norm_eps)
    out = p["linear_norm"].astype(x_BLD.dtype)[None, None, None] * out.astype(x_BLD.dtype)
    out = (out * jax.nn.silu(gate)).astype(x_BLD.dtype)
    return project(out.reshape(z.shape), "linear_out", axes=2)


def whole(qkv, conv, decay, beta, cfg: ModelConfig, segment_BL=None, length_B=None):
    """Whole rows from an empty state: ([B, L, O, value width], the state behind the last token of each row).

    Args:
      segment_BL: a token sees nothing of another segment, neither by the state nor by the convolution.
      length_B: real tokens of right-padded rows: what comes behind changes no state.
    """
    mixed = _convolve(qkv, conv, segment_BL)
    q, k, v = _heads(mixed, cfg)
    if length_B is not None:
        real_BL1 = (jnp.arange(qkv.shape[1])[None] < length_B[:, None])[..., None]
        decay, beta = jnp.where(real_BL1, decay, 0.0), jnp.where(real_BL1, beta, 0.0)
    out, memory = _chunks(q, k, v, decay, beta, segment_BL)
    return out, State(_last(qkv, cfg.conv_width - 1, length_B), memory)


def step(qkv, conv, decay, beta, cfg: ModelConfig, state: State):
    """One token of each row: ([B, 1, O, value width], the next state)."""
    window = jnp.concatenate([state.conv, qkv], axis=1)
    taps = jnp.moveaxis(conv, -1, 0).astype(jnp.float32)[None]
    mixed = jax.nn.silu((window.astype(jnp.float32) * taps).sum(1, keepdims=True))
    q, k, v = (a.swapaxes(1, 2) for a in _heads(mixed.astype(qkv.dtype), cfg))  # [B, O, 1, width]
    decay, beta = (a.swapaxes(1, 2)[..., None] for a in (decay, beta))  # [B, O, 1, 1]
    memory = state.memory * jnp.exp(decay)
    memory += k.swapaxes(2, 3) * (beta * (v - k @ memory))
    return (q @ memory).swapaxes(1, 2), State(window[:, 1:], memory)


def _convolve(x, conv, segment_BL):
    """Causal, each channel by itself, then SiLU."""
    L, width = x.shape[1], conv.shape[-1]
    out = 0.0
    for back in range(min(width, L)):
        earlier = jnp.pad(x.astype(jnp.float32), ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :L]
        part = earlier * conv[None, None, ..., width - 1 - back].astype(jnp.float32)
        if segment_BL is not None and back:
            before_BL = jnp.pad(segment_BL, ((0, 0), (back, 0)), constant_values=-1)[:, :L]
            part = jnp.where((before_BL == segment_BL)[..., None, None], part, 0.0)
        out += part
    return jax.nn.silu(out).astype(x.dtype)


def _last(x, count: int, length_B):
    """The last `count` real inputs of each row, zeros in front of its first."""
    padded = jnp.pad(x, ((0, 0), (count, 0), (0, 0), (0, 0)))
    if length_B is None:
        return padded[:, x.shape[1] :]
    at = length_B[:, None] + jnp.arange(count, dtype=length_B.dtype)[None]
    return jnp.take_along_axis(padded, at[..., None, None], axis=1)


def _heads(mixed, cfg: ModelConfig):
    """q, k, v as [B, L, O, width], float32: q and k of unit length, each for several values' heads, q scaled."""
    B, L, K, _ = mixed.shape
    width = cfg.linear_key_dim
    q, k, v = jnp.split(mixed.astype(jnp.float32), (width, 2 * width), axis=-1)
    q, k = (a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + 1e-6) for a in (q, k))
    shape = (B, L, K, cfg.linear_value_heads // K, width)
    q, k = (jnp.broadcast_to(a[:, :, :, None], shape).reshape(B, L, -1, width) for a in (q * width**-0.5, k))
    return q, k, v.reshape(B, L, cfg.linear_value_heads, cfg.linear_value_dim)


def _inverse(system):
    """The inverse of unit lower triangular matrices [..., I, I], by blocks that double: products alone, no solver.

    As exact as forward substitution, and it fits accelerators. On a CPU jax 0.10.2's triangular_solve hangs now and
    then where it is called within a scan.
    """
    size, pad = 1, (1 << (system.shape[-1] - 1).bit_length()) - system.shape[-1]
    whole = jnp.pad(system, ((0, 0),) * (system.ndim - 2) + ((0, pad), (0, pad)))
    width, lead = whole.shape[-1], whole.shape[:-2]
    out = jnp.ones((*lead, width, 1, 1), system.dtype)  # [..., blocks, size, size]
    while size < width:
        count = width // (2 * size)
        blocks = jnp.diagonal(whole.reshape(*lead, count, 2 * size, count, 2 * size), axis1=-4, axis2=-2)
        below = jnp.moveaxis(blocks, -1, -3)[..., size:, :size]
        first, second = out[..., 0::2, :, :], out[..., 1::2, :, :]
        left = -second @ (below @ first)
        out = jnp.block([[first, jnp.zeros_like(first)], [left, second]])
        size *= 2
    return out[..., 0, : system.shape[-1], : system.shape[-1]]


def _chunks(q, k, v, decay, beta, segment_BL):
    """The delta rule over whole rows: ([B, L, O, value width], the last memory)."""
    B, L, heads, _ = k.shape
    size = min(CHUNK, L)
    pad = -L % size
    segment_BL = jnp.zeros((B, L), jnp.int32) if segment_BL is None else segment_BL

    def chunked(a, mode="constant"):  # [B, L, O, ...] -> [chunks, B, O, I, ...]; padding writes nothing
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2), mode=mode)
        a = a.reshape(B, (L + pad) // size, size, *a.shape[2:]).swapaxes(0, 1)
        return a.swapaxes(2, 3) if a.ndim > 3 else a

    segment = chunked(segment_BL, mode="edge")
    lower_II = jnp.tril(jnp.ones((size, size), bool))
    eye_II = jnp.eye(size, dtype=jnp.float32)

    def one(carry, chunk):
        memory, before_B = carry  # the state, and the segment that it belongs to
        q, k, v, decay, beta, segment_BI = chunk
        total = jnp.cumsum(decay, axis=-1)  # [B, O, I]
        same_BII = (segment_BI[:, :, None] == segment_BI[:, None, :]) & lower_II[None]
        gap = jnp.where(same_BII[:, None], total[..., :, None] - total[..., None, :], -jnp.inf)
        within = jnp.exp(gap)  # [B, O, I, I]
        carried = jnp.where((segment_BI == before_B[:, None])[:, None], jnp.exp(total), 0.0)
        system = jnp.where(eye_II[None, None] > 0, 1.0, within * ((beta[..., None] * k) @ k.mT))
        write = jnp.concatenate([v, k * carried[..., None]], axis=-1) * beta[..., None]
        write = _inverse(system) @ write
        new = write[..., : v.shape[-1]] - write[..., v.shape[-1] :] @ memory
        out = (q * carried[..., None]) @ memory + (within * (q @ k.mT)) @ new
        memory = memory * carried[..., -1][..., None, None] + (k * within[..., -1, :, None]).mT @ new
        return (memory, segment_BI[:, -1]), out

    first = (jnp.zeros((B, heads, k.shape[-1], v.shape[-1]), jnp.float32), segment_BL[:, 0])
    # the backward pass makes a chunk's products again: kept, they are a dozen times what the states between chunks take
    one = jax.checkpoint(one, prevent_cse=False)
    (memory, _), out = jax.lax.scan(one, first, (*map(chunked, (q, k, v, decay, beta)), segment))
    out = out.swapaxes(2, 3).swapaxes(0, 1).reshape(B, L + pad, heads, -1)
    return out[:, :L], memory
