"""The vocabulary's two matrices on a mesh: gathered once per pass, their gradients reduced once per step.

Left to itself the compiler gathers a sharded head, or reduces its gradient, in every block of the vocabulary pass: a
collective of the head's size in a loop. Here every shard of rows gets a copy of its own in front of all loops, as one
array with the shards as its leading axis Y; the pass runs on each shard's rows alone, and the copies' gradients add up
locally over blocks and micro-batches until `sum_replicas` adds them. On one device there are no copies: each function
here is then the plain one.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from omniopd_jax.parallel import sharding

MATRICES = {"embed": ("tp", None), "head": (None, "tp")}  # mesh axes of a copy


def replicate(params: dict, mesh, dtype=None) -> dict:
    """`params` with its embedding and head as a copy per shard of rows, [Y, ...]; cast to `dtype` before they
    travel."""
    if mesh.size == 1:
        return params
    out = dict(params)
    for name, axes in MATRICES.items():
        if name in params:
            a = params[name] if dtype is None else params[name].astype(dtype)
            # gathered over fsdp first: the copies of one device are then a broadcast without traffic
            a = sharding.constrain(a, mesh, *axes)
            a = jnp.broadcast_to(a[None], (math.prod(mesh.shape[axis] for axis in sharding.ROWS), *a.shape))
            out[name] = sharding.constrain(a, mesh, sharding.ROWS, *axes)
    return out


def sum_replicas(grads: dict, where: dict, mesh) -> dict:
    """Gradients of replicated parameters -> of the parameters: the copies' sum, laid out as `where` says."""
    if mesh.size == 1:
        return grads
    out = dict(grads)
    for name in MATRICES:
        if name in grads:
            out[name] = jax.lax.with_sharding_constraint(grads[name].sum(0), where[name])
    return out


def over_rows(function, mesh, matrices, rows):
    """`function(matrices, rows) -> (sum, tree of rows)`, run on each shard's rows alone; the sums are added up.

    Args:
      function: sees matrices without Y, and a shard's part of the rows.
      matrices: a tree of replicated heads (`model.stored_head`).
      rows: a tree of arrays with rows in front. The tp axis is left to the compiler.
    """
    if mesh.size == 1:
        return function(matrices, rows)

    def run(matrices, rows):
        total, out = function(jax.tree.map(lambda a: a[0], matrices), rows)
        return total[None], out

    axes = set(mesh.axis_names if mesh.shape["tp"] == 1 else sharding.ROWS)
    spec = P(sharding.ROWS)
    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False)
    total, out = run(matrices, rows)
    return total.sum(), out
