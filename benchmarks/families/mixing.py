"""What mixes the tokens of a layer, linear attention against quadratic; printed for docs/results/families.md.

python -m benchmarks.families.mixing                        # time and temporaries on this CPU
python -m benchmarks.families.mixing --topology v5e:2x2     # temporaries as compiled for it; H100:1 likewise
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sides
from omniopd_jax import model
from omniopd_jax.model import attention, linear
from omniopd_jax.run import topologies

MIB = 2.0**20


def mixing(topology: str) -> None:
    """Time and temporaries of forward and gradient of what mixes tokens in one layer, linear and quadratic.

    On this CPU float32 with 4 heads of 128 and 2 of 256, measured; for a topology bfloat16 with the heads of
    Qwen3.5-4B and the kernel that a run takes there, as compiled.
    """
    device = topologies.devices(topology)[0] if topology else jax.devices()[0]
    keys, values, heads, kv = (16, 32, 16, 4) if topology else (4, 4, 2, 1)
    dtype = jnp.bfloat16 if topology else jnp.float32
    chip = topology.partition(":")[0]
    on = "gpu" if chip in topologies.CARDS else "tpu" if chip else "cpu"
    kernel = attention.resolve("auto", str(jnp.dtype(dtype)), on=on, head_dim=256)
    cfg = model.ModelConfig(
        "qwen3_5", 8, 8, 8, 1, heads, kv, 256, layer_kinds=("linear",), linear_key_heads=keys,
        linear_value_heads=values, linear_key_dim=128, linear_value_dim=128, conv_width=4,
    )  # fmt: skip
    for L in (4_096, 16_384):
        channels = (keys, cfg.conv_channels // keys)
        recurrent = [((1, L, *channels), dtype), ((*channels, 4), dtype), *[((1, L, values), jnp.float32)] * 2]
        quadratic = [((1, L, n, 256), dtype) for n in (heads, kv, kv)]
        for name, shapes, run in (
            ("linear", recurrent, lambda *a: linear.whole(*a, cfg)[0]),
            ("quadratic", quadratic, lambda *a: attention.attend(*a, backend=kernel)),
        ):
            one = jax.sharding.SingleDeviceSharding(device)
            abstract = [jax.ShapeDtypeStruct(shape, kind, sharding=one) for shape, kind in shapes]
            total = jax.value_and_grad(
                lambda *a, run=run: run(*a).astype(jnp.float32).sum(), argnums=range(len(shapes))
            )
            compiled = jax.jit(total).lower(*abstract).compile()
            temporaries = compiled.memory_analysis().temp_size_in_bytes / MIB
            line = f"{topology or 'CPU'}, {L} tokens, {name}: temporaries {temporaries:,.0f} MiB"
            if not topology and temporaries < 3_000:
                rng = np.random.default_rng(0)
                signs = (1, 1, -1, 1)  # decays are negative
                args = [jnp.asarray(sign * rng.random(a.shape), a.dtype) for sign, a in zip(signs, abstract)]
                sides.timed(lambda c=compiled, a=args: jax.block_until_ready(c(*a)))
                times = [sides.timed(lambda c=compiled, a=args: jax.block_until_ready(c(*a))) for _ in range(3)]
                wall, cpu = (sides.median(column) / L * 1e6 for column in zip(*times))
                line += f", {wall:.0f} us a token ({cpu:.0f} of CPU)"
            print(line, flush=True)


def main():
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="", help="a slice or GPUs that are not there")
    topology = parser.parse_args().topology
    if topology:
        topologies.compile_only()
    mixing(topology)


if __name__ == "__main__":
    main()
