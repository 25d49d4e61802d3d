"""The sampler's passes as a run would compile them, for a model and a mesh that need not be there (fit.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniopd_jax import decode, model, rollout
from omniopd_jax.model import paged
from omniopd_jax.parallel import sharding
from omniopd_jax.run import flops


class Sampler:
    """One use of the sampler: its sizes, and abstract arguments of its passes.

    Args:
      rows, prompts: of a call. longest_prompt, longest: tokens of a prompt, and of a response.
    """

    def __init__(
        self, model_cfg, compute: model.Compute, how: rollout.How, rows: int, prompts: int, longest_prompt: int,
        longest: int,
    ):  # fmt: skip
        self.model_cfg, self.compute, self.how, self.mesh = model_cfg, compute, how, compute.mesh
        self.shards, positions = sharding.row_shards(self.mesh), longest_prompt + longest
        slots, pages = rollout.sizes(model_cfg, compute, how, rows, positions)
        self.slots, self.pages = slots * self.shards, pages * self.shards
        self.width = rollout.width(positions, rollout.PAGE)
        self.P = rollout.prefill_width(longest_prompt)
        at_once = min(prompts, -(-slots // max(1, rows // prompts)))  # whose rows find slots
        self.entries = min(rollout.most_entries(longest_prompt), rollout.padded(at_once)) * self.shards

    def row(self, *shape, dtype=jnp.float32, rows: int = 0):
        """An abstract array with the slots in front, or so many rows."""
        return jax.ShapeDtypeStruct((rows or self.slots, *shape), dtype, sharding=sharding.rows(self.mesh))

    def params(self):
        """As `rollout.prepare` leaves them."""
        where = model.param_shardings(self.model_cfg, self.mesh, sharding.DECODE_RULES)
        stacked = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, self.compute.dtype, sharding=s),
            model.table(self.model_cfg), where, is_leaf=model.is_param,
        )  # fmt: skip

        def layer(name, a):
            shape, spec = a.shape[1:], a.sharding.spec[1:]
            if name in ("q", "k", "v"):  # the heads and their width as one axis
                shape, spec = (shape[0], shape[1] * shape[2]), spec[:2]
            dtype = jnp.float32 if name in model.FLOAT32 else a.dtype
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, P(*spec)))

        one, held = {name: layer(name, a) for name, a in stacked["layers"].items()}, model.layers_of(self.model_cfg)
        layers = [{name: a for name, a in one.items() if i in held[name]} for i in range(self.model_cfg.num_layers)]
        return stacked | {"layers": layers}

    def state(self):
        """What the decode loop carries: (pools, slots, and what is kept of each shard's last prompt)."""
        how = {"cfg": self.model_cfg, "compute": self.compute}
        dtype = self.how.cache_dtype or self.compute.dtype
        pools = jax.eval_shape(
            functools.partial(decode.empty_pools, pages=self.pages, page=rollout.PAGE, dtype=dtype, **how)
        )
        slots, kept = jax.eval_shape(
            functools.partial(
                decode.empty_slots, slots=self.slots, entries=self.shards, positions=self.width * rollout.PAGE, **how
            )
        )

        def laid(a, spec):
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(self.mesh, spec))

        pools = jax.tree.map(lambda a: laid(a, paged.spec(self.mesh, self.model_cfg.num_kv_heads)), pools)
        by_slot = (jax.tree.map(laid, held, decode.specs(held, self.model_cfg, self.mesh)) for held in (slots, kept))
        return pools, *by_slot

    def cache_bytes(self) -> float:
        """Of the pools and of the slots' own states (rings, linear layers), on each device."""
        pools, slots, _ = self.state()
        return local_bytes(pools) + local_bytes(slots.states)

    def lower(self, name: str):
        """prefill, start or decode, lowered, and the bytes a chip that it is donated."""
        (pools, slots, kept), params = self.state(), self.params()
        how, i32 = {"cfg": self.model_cfg, "compute": self.compute}, functools.partial(self.row, dtype=jnp.int32)
        if name == "prefill":
            E = self.entries
            prompt = i32(self.P, rows=E), i32(rows=E), i32(-(-self.P // rollout.PAGE), rows=E)
            return decode.prefill.lower(params, pools, kept, *prompt, **how), local_bytes(pools)
        if name == "start":
            rows = self.entries + self.shards
            both = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype, sharding=a.sharding), kept
            )
            one, key = i32(), self.row(2, dtype=jnp.uint32)
            rows = decode.Start(one, one, key, one, one, one, one, i32(rows=self.shards))
            lowered = decode.start.lower(pools, slots, both, rows, copies=True, **how)
            return lowered, local_bytes((pools, slots))
        whole = sharding.replicated(self.mesh)
        scalars = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in (
            ((), jnp.float32), ((), jnp.float32), ((), jnp.int32), ((2,), jnp.int32), ((), jnp.int32), ((), jnp.int32))
        ]  # fmt: skip
        table = i32(self.width), self.row(dtype=bool)
        lowered = decode.turn.lower(params, pools, slots, *table, tuple(scalars[:4]), *scalars[4:], **how)
        return lowered, local_bytes((pools, slots))

    def work(self, name: str) -> tuple[float, float]:
        """(FLOPs, bytes of memory read) a chip of one run of the pass; decode: of one token a row at the full
        length."""
        if name == "prefill":
            lengths, n = [self.P] * self.entries, self.mesh.size
            return flops.forward(self.model_cfg, lengths, [0] * self.entries) / n, local_bytes(self.params())
        if name == "start":
            pools, slots, _ = self.state()  # a page of each slot and its states, read and written
            return 0.0, 2.0 * (local_bytes(pools) * self.slots / self.pages + local_bytes(slots.states))
        (layers, head), item = flops.matmul_params(self.model_cfg), np.dtype(self.compute.dtype).itemsize
        together = self.slots / self.shards  # rows of one device, or of its tp group
        read = item * (flops.read_params(self.model_cfg, together) + head) / self.mesh.shape["tp"] + self.cache_bytes()
        return 2.0 * (layers + head) * self.slots / self.mesh.size, read


def local_bytes(tree) -> float:
    """Bytes that one device holds of a tree of sharded shapes; what is in host memory is not on it."""

    def one(a):
        if a.sharding.memory_kind == "pinned_host":
            return 0.0
        item = 8 if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.dtype(a.dtype).itemsize
        return float(np.prod(a.sharding.shard_shape(a.shape))) * item

    return sum(map(one, jax.tree.leaves(tree)))
