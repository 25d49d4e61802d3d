"""What only a CPU needs: products and sums in the forms that its compiler and its caches handle well.

Each function is asked by the code that it serves (`project`, the vocabulary pass) and is the plain operation elsewhere.
"""

import math

import jax
import jax.numpy as jnp

from omniopd_jax.parallel import sharding

VOCAB_COLUMNS = 4_096  # vocabulary columns worked on at a time; 1,000 to 10,000 measured the same


def product(x, w, axes: int, mesh):
    """`jnp.tensordot(x, w, axes)`, on CPU as a product of two matrices.

    With more axes the CPU's compiler transposes the gradient for that of w element by element: 1.4 times the time.
    """
    if sharding.platform(mesh) != "cpu":
        return jnp.tensordot(x, w, axes)
    y = x.reshape(-1, math.prod(x.shape[-axes:])) @ w.reshape(math.prod(w.shape[:axes]), -1)
    return y.reshape(*x.shape[:-axes], *w.shape[axes:])


def vocab_columns(mesh) -> int:
    """Columns at a time of the vocabulary pass on `mesh`; 0, all at once, but on a CPU that holds the vocabulary whole.

    Elsewhere the compiler adds into a sum by itself, and a vocabulary that is split over devices must not be cut.
    """
    return VOCAB_COLUMNS if sharding.platform(mesh) == "cpu" and mesh.shape["tp"] == 1 else 0


def once(a, columns: int):
    """`a`, computed once and stored, where the vocabulary is walked in parts: else it is computed again for every
    part."""
    return jax.lax.optimization_barrier(a) if columns else a


def over_columns(body, carry, arrays, columns: int, fill):
    """`body(carry, start, parts)` over parts of the [X, V] arrays; `start` is the number of a part's first column.

    With parts that stay in the cache, the logits are read twice in all, and no product of the head's size exists beside
    its sum. Where the parts do not divide V the last one begins early; columns that it repeats are `fill`.

    Args:
      columns: at most, of a part; 0: one part.
    """
    V = arrays[0].shape[1]
    count = -(-V // columns) if columns else 1
    count = next((n for n in range(count, 2 * count) if V % n == 0), count)
    size = -(-V // count)
    if count == 1:
        return body(carry, 0, arrays)

    def step(i, carry):
        start = jnp.minimum(i * size, V - size)
        parts = [jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in arrays]
        if count * size > V:
            new_V = start + jnp.arange(size) >= i * size
            parts = [jnp.where(new_V[None], a, jnp.asarray(fill, a.dtype)) for a in parts]
        return body(carry, start, jax.lax.optimization_barrier(parts))

    return jax.lax.fori_loop(0, count, step, carry)
