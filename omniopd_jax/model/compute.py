"""How a run computes a model: what no config.json says."""

import dataclasses

import jax

from omniopd_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Compute:
    """Of one run. `Compute()` is float32 on the default device, with nothing rematerialised."""

    dtype: str = "float32"  # of activations and products; parameters keep their own
    remat: str = "none"  # none | dots | context | full: what the backward pass computes again
    attention: str = "xla"  # a name of attention.BACKENDS, resolved
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=sharding.default_mesh)
    lora_scale: float | None = None  # alpha / rank of the adapters that layers carry (lora.py); None: they carry none
    host_layers: bool = False  # the layers are stored in host memory; each is copied to the device for its turn
