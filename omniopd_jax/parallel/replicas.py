"""The vocabulary's two matrices on a mesh: gathered once a pass, their gradients reduced once a step.

Left to itself the compiler gathers a sharded head, or reduces its gradient, in every block of the vocabulary pass: a
collective of the head's size in a loop. Here every shard of rows gets a copy of its own in front of all loops, as one
array with the shards as its leading axis X; the pass runs on each shard's rows alone, and the copies' gradients add up
locally over blocks and micro-batches until `collapse` sums them.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniopd_jax import model
from omniopd_jax.parallel import sharding

MATRICES = {"embed": ("tp", None), "head": (None, "tp")}  # mesh axes of a copy


def spread(params: dict, mesh, dtype=None) -> dict:
    """`params` with its embedding and head as a copy a shard of rows, [X, ...]; cast to `dtype` before they travel.

    Without a mesh: `params` as they are.
    """
    if mesh is None:
        return params
    out = dict(params)
    for name, axes in MATRICES.items():
        if name in params:
            a = params[name] if dtype is None else params[name].astype(dtype)
            # gathered over fsdp first: the copies of one device are then a broadcast without traffic
            a = jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P(*axes)))
            a = jnp.broadcast_to(a[None], (_shards(mesh), *a.shape))
            out[name] = jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P(sharding.ROWS, *axes)))
    return out


def collapse(grads: dict, model_cfg: model.ModelConfig) -> dict:
    """Gradients of spread parameters -> of the parameters: the copies' sum, laid out as the parameter is."""
    if model_cfg.mesh is None:
        return grads
    where = model.param_shardings(model_cfg, model_cfg.mesh)
    out = dict(grads)
    for name in MATRICES:
        if name in grads:
            out[name] = jax.lax.with_sharding_constraint(grads[name].sum(0), where[name])
    return out


def head(params: dict) -> jax.Array:
    """The output projection [D, V], or [X, D, V] of spread parameters."""
    return params["head"] if "head" in params else jnp.swapaxes(params["embed"], -1, -2)


def head_as_it_lies(params: dict) -> jax.Array:
    """`head` without the transpose: with tied embeddings [V, D], or [X, V, D] (`tied` of the vocabulary pass)."""
    return params["head"] if "head" in params else params["embed"]


def over_rows(function, mesh, matrices, rows):
    """`function(matrices, rows) -> (sum, tree of rows)`, run on each shard's rows alone; the sums are added up.

    Args:
      function: sees [D, V] matrices, without X, and a shard's part of the rows.
      matrices: spread heads, or None.
      rows: a tree of arrays with rows in front. The tp axis stays with the compiler.
    """
    if mesh is None:
        return function(matrices, rows)

    def run(matrices, rows):
        total, out = function(jax.tree.map(lambda a: a[0], matrices), rows)
        return total[None], out

    axes = set(mesh.axis_names if mesh.shape["tp"] == 1 else sharding.ROWS)
    spec = P(sharding.ROWS)
    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False)
    total, out = run(matrices, rows)
    return total.sum(), out


def _shards(mesh) -> int:
    return math.prod(mesh.shape[a] for a in sharding.ROWS)
