"""The divergence term of the vocabulary pass alone."""

import jax.numpy as jnp

from omniopd_jax import vocab


def divergence(kind, hidden, head, other_hidden, other_head, weight, *, clip=0.0, **how):
    """(sum_t weight_t * divergence_t, divergence_BT): no weight of -logp, no anchor."""
    zero = jnp.zeros_like(weight)
    other = vocab.Other(other_hidden, other_head, weight, kind, clip)
    loss, stats = vocab.weighted_nll_and_kl(
        hidden, head, None, None, zero.astype(jnp.int32), zero, zero, beta=0.0, other=other, **how
    )
    return loss, stats.divergence_BT
