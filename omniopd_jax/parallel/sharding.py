"""The mesh, and the one place that says which logical axis is split over which mesh axis."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from omniopd_jax.errors import UserError
from omniopd_jax.parallel import processes

AXES = ("data", "fsdp", "tp")
ROWS = ("data", "fsdp")  # rows of a batch are split over both
RULES = {  # training: parameters and optimizer state
    "vocab": "tp",
    "embed": "fsdp",
    "embed_norm": None,
    "heads": "tp",
    "kv_heads": "tp",
    "linear_heads": "tp",  # of linear attention, by its keys' heads
    "ff": "tp",
    "experts": None,
    "layers": None,
    "rank": None,
    None: None,
}
DECODE_RULES = RULES | {"embed": None}  # the sampler gathers the fsdp axis once an iteration


def make_mesh(sizes: dict[str, int], devices=None) -> jax.sharding.Mesh:
    """Mesh over (data, fsdp, tp); one size may be -1 and takes what is left. A tp group is one host's, where that can
    be.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes[a]) for a in AXES]
    rest = int(np.prod([s for s in shape if s != -1]))
    if shape.count(-1) > 1 or len(devices) % rest or (-1 not in shape and rest != len(devices)):
        raise UserError(f"mesh {dict(zip(AXES, shape))} does not fit {len(devices)} device(s); one axis may be -1")
    shape = [len(devices) // rest if s == -1 else s for s in shape]
    types = (AxisType.Auto,) * 3
    try:
        mesh = jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        if all(len({d.process_index for d in group}) == 1 for group in mesh.devices.reshape(-1, shape[2])):
            return mesh
    except NotImplementedError:  # sizes that no rings of the slice make
        pass
    # jax lays an axis along a ring of the slice, which may run through hosts; the rows of a tp group must be one host's
    by_host = sorted(devices, key=lambda d: (d.process_index, d.id))
    return jax.sharding.Mesh(np.array(by_host).reshape(shape), AXES, axis_types=types)


def default_mesh() -> jax.sharding.Mesh:
    """The mesh of the default device alone: what computes where no mesh is given."""
    return _one_device(jax.config.jax_default_device or jax.local_devices()[0])


@functools.cache
def _one_device(device) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array([device]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def platform(mesh) -> str:
    """What the arrays on `mesh` are stored on: cpu, gpu or tpu, also where it is only described (ahead-of-time)."""
    return mesh.devices.flat[0].platform


def constrain(a, mesh, *axes):
    """`a` laid out over the mesh inside jit, an entry of mesh axes per axis of `a`; on one device it is as it is."""
    return a if mesh.size == 1 else jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P(*axes)))


def state_shardings(tree, params: dict, shardings: dict, mesh):
    """Shardings for an optimizer state: leaves shaped and named like a parameter are placed as it is, the rest
    replicated."""
    by_path = {jax.tree_util.keystr(k): (p.shape, s) for (k, p), s in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings))}  # fmt: skip

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        for key, (shape, sharding) in by_path.items():
            if name.endswith(key) and shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, tree)


def row_shards(mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows(mesh) -> NamedSharding:
    """Sharding of an array with rows in front."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh) -> NamedSharding:
    """Sharding of a value that every device holds."""
    return NamedSharding(mesh, P())


def replicated_like(a: jax.Array) -> NamedSharding | None:
    """Every device that holds a part of `a`; None, the default device, where that is no mesh."""
    return replicated(a.sharding.mesh) if isinstance(a.sharding, NamedSharding) else None


def put_rows(tree, mesh):
    """Host arrays with this process's rows -> global arrays, rows over data and fsdp, one explicit transfer."""
    sharding = rows(mesh)
    with jax.transfer_guard("allow"):  # over several processes it counts this explicit transfer as an implicit one
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree)


def rows_map(mesh, shards: int) -> dict:
    """{device: index of the row shard that it holds}."""
    return {d: (i[0].start or 0) for d, i in rows(mesh).devices_indices_map((shards,)).items()}


def own_shards(mesh) -> list[int]:
    """The row shards that this process holds, ascending: its rows are theirs, one shard's after the other's."""
    held = rows_map(mesh, row_shards(mesh))
    return sorted({index for device, index in held.items() if device.process_index == jax.process_index()})


def local_rows(array) -> np.ndarray:
    """This process's rows of a global array, in order: the inverse of `put_rows`."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    shards = {s.index[0].start or 0: s for s in array.addressable_shards}
    return np.concatenate([np.asarray(shards[k].data) for k in sorted(shards)])


def global_max(value: int) -> int:
    """The largest of the processes' values: what all must agree on to compile the same shapes."""
    return max(processes.gather("largest", int(value)))
