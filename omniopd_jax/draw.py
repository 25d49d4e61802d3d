"""One draw per row: a token from logits by one uniform number, and what is reported of it."""

import jax
import jax.numpy as jnp


def draw(z_BV, u_B, temperature, top_p, top_k):
    """Draws a token a row from logits by one uniform each.

    Returns:
      (token_B, logp under the model, logp under the sampler), all [B].
    """
    z_BV -= z_BV.max(-1, keepdims=True)
    p_BV = jnp.exp(z_BV)  # not normalised: one array of V, and sums of it
    blocks = _blocks(p_BV)
    mass_B = blocks[2][:, -1]

    def logp(token_B):
        return _at(z_BV, token_B) - jnp.log(mass_B)

    def plain():
        token_B = _invert(p_BV, blocks, u_B)
        logp_B = logp(token_B)
        return token_B, logp_B, logp_B

    def shaped():
        q_BV = jnp.exp(z_BV / jnp.maximum(temperature, 1e-6))
        q_BV = jax.lax.cond((top_p < 1.0) | (top_k > 0), lambda: truncate(q_BV, top_p, top_k), lambda: q_BV)
        token_B = jnp.where(temperature > 0, inverse_cdf(q_BV, u_B), jnp.argmax(z_BV, axis=-1)).astype(jnp.int32)
        sampler_B = jnp.where(temperature > 0, jnp.log(_at(q_BV, token_B) / q_BV.sum(-1)), 0.0)
        return token_B, logp(token_B), sampler_B

    # the branches give [B] arrays only: whatever is [B, V] stays inside
    return jax.lax.cond((temperature == 1.0) & (top_p >= 1.0) & (top_k <= 0), plain, shaped)


def truncate(q_BV, top_p, top_k):
    """Zeroes what top-k, then top-p, leave out (ties kept), by bisection over thresholds: no sort. Not renormalised."""
    k = jnp.where(top_k > 0, top_k, q_BV.shape[1]).astype(jnp.float32)
    q_BV = _at_least(q_BV, jnp.ones_like, k)
    # at 1 a token too small to change the sum in float32 would fall out
    return jnp.where(top_p < 1, _at_least(q_BV, lambda q: q, top_p * q_BV.sum(-1)), q_BV)


def _at_least(q_BV, measure, wanted):
    """Keeps q >= the largest threshold at which the kept entries measure at least `wanted`, found bit by bit.

    Non-negative floats are ordered like their bits, so 31 halvings find the threshold exactly.
    """

    def kept(bits_B):
        return q_BV >= jax.lax.bitcast_convert_type(bits_B, jnp.float32)[:, None]

    def halve(_, lo_hi):
        lo, hi = lo_hi
        mid = lo + (hi - lo + 1) // 2
        enough = jnp.sum(jnp.where(kept(mid), measure(q_BV), 0.0), axis=-1) >= wanted
        return jnp.where(enough, mid, lo), jnp.where(enough, hi, mid - 1)

    hi = jax.lax.bitcast_convert_type(q_BV.max(-1), jnp.int32)
    lo, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(hi), hi))
    return jnp.where(kept(lo), q_BV, 0.0)


def inverse_cdf(q_BV, u_B, block: int = 0):
    """The token at which the cumulative mass of q passes u, in two levels: block sums, then inside one block.

    q need not sum to one. A token of zero mass is never returned.
    """
    return _invert(q_BV, _blocks(q_BV, block), u_B)


def _blocks(q_BV, block: int = 0):
    """(block, sums of q over blocks of the vocabulary [B, W], their cumulative sums)."""
    B, V = q_BV.shape
    block = block or next((n for n in (512, 256, 128) if V % n == 0), 512 if V > 16_384 else 64)
    sum_BW = jnp.pad(q_BV, ((0, 0), (0, -V % block))).reshape(B, -1, block).sum(-1)
    return block, sum_BW, jnp.cumsum(sum_BW, axis=-1)


def _invert(q_BV, blocks, u_B):
    """`inverse_cdf` from what `_blocks` returns."""
    V, (block, sum_BW, cum_BW) = q_BV.shape[1], blocks
    aim_B = u_B * cum_BW[:, -1]
    w_B = _first_past(cum_BW, sum_BW, aim_B)
    before_B = jnp.where(w_B > 0, _at(cum_BW, jnp.maximum(w_B - 1, 0)), 0.0)
    index_BU = w_B[:, None] * block + jnp.arange(block, dtype=jnp.int32)[None]
    q_BU = jnp.where(index_BU < V, jnp.take_along_axis(q_BV, jnp.minimum(index_BU, V - 1), axis=1), 0.0)
    return w_B * block + _first_past(jnp.cumsum(q_BU, axis=-1), q_BU, aim_B - before_B)


def _at(a_BV, index_B):
    return jnp.take_along_axis(a_BV, index_B[:, None], axis=1)[:, 0]


def _first_past(cum, mass, aim_B):
    """First index with mass whose cumulative mass exceeds the aim; the last one with mass where rounding leaves none.

    Asking for mass as well makes it right whatever the sums' rounding: a prefix sum need not be flat across zeros, and
    the compiler may sum twice, in two orders.
    """
    index = jnp.arange(mass.shape[1], dtype=jnp.int32)[None]
    last_B = jnp.max(jnp.where(mass > 0, index, 0), axis=-1)
    return jnp.min(jnp.where((cum > aim_B[:, None]) & (mass > 0), index, last_B[:, None]), axis=-1)
