"""What a layer of a sliding window keeps of a row in the sampler: a ring of its last keys and values, by slot.

Position p is at place p % S, so a new token takes the place of the one that has just left the window. A ring is as
large whatever the row holds, and belongs to a slot as a linear layer's state does: it needs no pages.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from omniopd_jax.model import attention, paged
from omniopd_jax.parallel import sharding


class Ring(NamedTuple):
    """k, v: [B, K, S, H]; S positions are the window, or all that a row can have where that is less."""

    k: jax.Array
    v: jax.Array


def spec(mesh, num_kv_heads: int) -> Ring:
    """How it is laid out: rows, and heads over tp where they divide."""
    one = P(sharding.ROWS, paged.heads(mesh, num_kv_heads))
    return Ring(one, one)


def of_prompts(k_BPKH, v_BPKH, length_B, size: int) -> Ring:
    """The rings behind the last token of right-padded prompts; what lies in front of a prompt is not read."""
    last_B1 = length_B[:, None] - 1
    place_BS = last_B1 - (last_B1 - jnp.arange(size, dtype=jnp.int32)[None]) % size

    def one(a_BPKH):
        index = jnp.maximum(place_BS, 0)[..., None, None]
        return jnp.take_along_axis(a_BPKH, index, axis=1, mode="clip").swapaxes(1, 2)

    return Ring(one(k_BPKH), one(v_BPKH))


def append_and_attend(q_B1QH, k_B1KH, v_B1KH, ring: Ring, length_B, mesh, *, scale):
    """Writes one token of each row, which holds length_B positions, and attends to what the ring has.

    Returns:
      (out_B1QH, the ring).
    """
    layout = spec(mesh, k_B1KH.shape[2])
    token = P(sharding.ROWS, None, layout.k[1])
    run = functools.partial(_append_and_attend, scale=scale)
    run = paged.split(run, mesh, (token, token, token, layout, P(sharding.ROWS)), (token, layout))
    return run(q_B1QH, k_B1KH, v_B1KH, ring, length_B)


def _append_and_attend(q_B1QH, k_B1KH, v_B1KH, ring: Ring, length_B, *, scale):
    B, K, S, H = ring.k.shape
    row_BK = jnp.arange(B * K, dtype=jnp.int32).reshape(B, K)
    place = (row_BK * S + (length_B % S)[:, None]).reshape(-1)  # one index: over several a TPU's compiler copies

    def put(held, a_B1KH):
        return held.reshape(-1, H).at[place].set(a_B1KH.astype(held.dtype).reshape(-1, H)).reshape(held.shape)

    with jax.named_scope("append"):
        ring = Ring(put(ring.k, k_B1KH), put(ring.v, v_B1KH))
    seen_B1S = (jnp.arange(S, dtype=jnp.int32)[None] <= length_B[:, None])[:, None]
    return attention.grouped(q_B1QH, ring.k, ring.v, seen_B1S, scale), ring
