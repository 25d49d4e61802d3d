"""Linear attention by the gated delta rule (Qwen3.5; arXiv 2412.06464): whole rows in chunks, decoding by a state.

A head keeps a matrix S, keys to values. A token decays it by exp(decay), then writes what its key does not give yet:
S <- exp(decay) S + beta k (v - exp(decay) S^T k)^T, and reads S^T q. Queries, keys and values come through a causal
convolution of `conv_width` tokens. Whole rows are computed in chunks of `CHUNK` tokens, whose writes are one triangular
system each; only the state goes from chunk to chunk. States and sums are float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from omniopd_jax.model.table import ModelConfig
from omniopd_jax.parallel import sharding

CHUNK = 64  # tokens
GROUPED = 16  # chunks from which on they are grouped


class State(NamedTuple):
    """What a layer keeps of a row between tokens: `conv` [B, conv_width - 1, key heads, channels of one], the
    convolution's last inputs; `memory` [B, O, key width, value width], float32.
    """

    conv: jax.Array
    memory: jax.Array


def spec() -> State:
    """How it is laid out: rows, and the keys' heads, whose values come one behind the other, as the parameters are."""
    axis = sharding.DECODE_RULES["linear_heads"]
    return State(P(sharding.ROWS, None, axis), P(sharding.ROWS, axis))


def mix(x_BLD, p: dict, cfg: ModelConfig, project, recur):
    """The layer's part in place of attention.

    Args:
      project: (x, leaf's name) -> x W, with the layer's adapters.
      recur: (inputs of the convolution [B, L, key heads, channels of one], decay_BLO, beta_BLO)
        -> [B, L, O, value width]: the caller's (`whole`, `step`).
    """

    def of_values(name):  # [B, L, O], key head by key head
        y = project(x_BLD, name)
        return y.reshape(*y.shape[:2], -1).astype(jnp.float32)

    rate, bias = (p[name].astype(jnp.float32)[None, None] for name in ("a_log", "dt_bias"))
    decay = -jnp.exp(rate) * jax.nn.softplus(of_values("linear_a") + bias)
    out = recur(project(x_BLD, "linear_qkv"), decay, jax.nn.sigmoid(of_values("linear_b"))).astype(jnp.float32)
    z = project(x_BLD, "linear_z")
    gate = z.reshape(out.shape).astype(jnp.float32)
    out = out * jax.lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + cfg.norm_eps)
    out = p["linear_norm"].astype(x_BLD.dtype)[None, None, None] * out.astype(x_BLD.dtype)
    out = (out * jax.nn.silu(gate)).astype(x_BLD.dtype)
    return project(out.reshape(z.shape), "linear_out", axes=2)


def whole(qkv, conv, decay, beta, cfg: ModelConfig, segment_BL=None, length_B=None):
    """Whole rows from an empty state: ([B, L, O, value width] in the dtype of qkv, the state behind each row's last
    token).

    Args:
      segment_BL: a token sees nothing of another segment, neither by the state nor by the convolution.
      length_B: real tokens of right-padded rows: what comes behind changes no state.
    """
    if length_B is not None:
        real_BL1 = (jnp.arange(qkv.shape[1])[None] < length_B[:, None])[..., None]
        decay, beta = jnp.where(real_BL1, decay, 0.0), jnp.where(real_BL1, beta, 0.0)
    out, memory = _chunks(qkv, conv, decay, beta, cfg, segment_BL)
    return out, State(_last(qkv, cfg.conv_width - 1, length_B), memory)


def step(qkv, conv, decay, beta, cfg: ModelConfig, state: State):
    """One token of each row: ([B, 1, O, value width] in the dtype of qkv, the next state)."""
    window = jnp.concatenate([state.conv, qkv], axis=1)
    taps = jnp.moveaxis(conv, -1, 0).astype(jnp.float32)[None]
    mixed = jax.nn.silu((window.astype(jnp.float32) * taps).sum(1, keepdims=True))
    q, k, v = (a.swapaxes(1, 2) for a in _heads(mixed.astype(qkv.dtype), cfg))  # [B, O, 1, width]
    decay, beta = (a.swapaxes(1, 2)[..., None] for a in (decay, beta))  # [B, O, 1, 1]
    memory = state.memory * jnp.exp(decay)
    memory += k.swapaxes(2, 3) * (beta * (v - k @ memory))
    return (q @ memory).swapaxes(1, 2).astype(qkv.dtype), State(window[:, 1:], memory)


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


def _chunks(qkv, conv, decay, beta, cfg: ModelConfig, segment_BL):
    """The convolution and the delta rule over whole rows: ([B, L, O, value width], the last memory).

    Nothing but the inputs, in their dtype, and the output is as long as the row: queries, keys and values in float32, a
    copy for each value's head, are made a chunk at a time.
    """
    (B, L), back = qkv.shape[:2], cfg.conv_width - 1
    size = min(CHUNK, L)
    count = -(-L // size)
    of_group = _group(count)
    segmented = segment_BL is not None
    segment_BL = segment_BL if segmented else jnp.zeros((B, L), jnp.int32)

    def chunked(a, mode="constant"):  # [B, L, ...] -> [groups, chunks of one, B, I, ...]; padding writes nothing
        a = jnp.pad(a, ((0, 0), (0, count * size - L)) + ((0, 0),) * (a.ndim - 2), mode=mode)
        return jnp.moveaxis(a.reshape(B, -1, of_group, size, *a.shape[2:]), 0, 2)

    def one(carry, chunk):
        memory, earlier, before = carry  # the state; the convolution's inputs in front of the chunk, and their segments
        qkv, decay, beta, segment_BI = chunk
        inputs, segments = (jnp.concatenate(pair, axis=1) for pair in ((earlier, qkv), (before, segment_BI)))
        mixed = _convolve(inputs, conv, segments if segmented else None)[:, back:]
        q, k, v = (a.swapaxes(1, 2) for a in _heads(mixed, cfg))  # [B, O, I, width]
        decay, beta = decay.swapaxes(1, 2), beta.swapaxes(1, 2)
        out, memory = _delta(memory, before[:, -1], q, k, v, decay, beta, segment_BI)
        return (memory, inputs[:, size:], segments[:, size:]), out.swapaxes(1, 2).astype(qkv.dtype)

    heads, widths = cfg.linear_value_heads, (cfg.linear_key_dim, cfg.linear_value_dim)
    first = (
        jnp.zeros((B, heads, *widths), jnp.float32), jnp.zeros((B, back, *qkv.shape[2:]), qkv.dtype),
        jnp.broadcast_to(segment_BL[:, :1], (B, back)),
    )  # fmt: skip
    # the backward pass makes a chunk's products again: kept, they are a dozen times what the states between chunks
    # take; and a group's states again from the one in front of it, for those of all chunks are as much as the inputs
    run = jax.checkpoint(one, prevent_cse=False)
    if of_group > 1:
        run = jax.checkpoint(functools.partial(jax.lax.scan, jax.checkpoint(one, prevent_cse=False)), prevent_cse=False)
    chunks = (chunked(qkv), chunked(decay), chunked(beta), chunked(segment_BL, mode="edge"))
    if of_group == 1:
        chunks = jax.tree.map(lambda a: a[:, 0], chunks)
    (memory, *_), out = jax.lax.scan(run, first, chunks)
    out = jnp.moveaxis(out.reshape(count, *out.shape[-4:]), 1, 0).reshape(B, count * size, heads, -1)
    return out[:, :L], memory


def _group(count: int) -> int:
    """Chunks of a group: the largest divisor of their number up to its root; 1 where they are few."""
    return max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0) if count >= GROUPED else 1


def _delta(memory, before_B, q, k, v, decay, beta, segment_BI):
    """One chunk of the delta rule: (out [B, O, I, value width], the next memory).

    Args:
      memory: the state, of a row whose last token's segment was before_B.
      q, k, v: [B, O, I, width]; decay, beta: [B, O, I].
    """
    size = q.shape[2]
    lower_II = jnp.tril(jnp.ones((size, size), bool))
    total = jnp.cumsum(decay, axis=-1)  # [B, O, I]
    same_BII = (segment_BI[:, :, None] == segment_BI[:, None, :]) & lower_II[None]
    gap = jnp.where(same_BII[:, None], total[..., :, None] - total[..., None, :], -jnp.inf)
    within = jnp.exp(gap)  # [B, O, I, I]
    carried = jnp.where((segment_BI == before_B[:, None])[:, None], jnp.exp(total), 0.0)
    system = jnp.where(jnp.eye(size, dtype=bool)[None, None], 1.0, within * ((beta[..., None] * k) @ k.mT))
    write = jnp.concatenate([v, k * carried[..., None]], axis=-1) * beta[..., None]
    write = _inverse(system) @ write
    new = write[..., : v.shape[-1]] - write[..., v.shape[-1] :] @ memory
    out = (q * carried[..., None]) @ memory + (within * (q @ k.mT)) @ new
    return out, memory * carried[..., -1][..., None, None] + (k * within[..., -1, :, None]).mT @ new
