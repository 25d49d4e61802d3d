"""Slices and cards that are not there: their devices for ahead-of-time compilation, and published shapes of models."""

import importlib.util
import os
import pathlib
import re

import jax
from jax.experimental import topologies

from omniopd_jax import hf, model
from omniopd_jax.errors import UserError, one_of
from omniopd_jax.hf.published import PUBLISHED
from omniopd_jax.run import flops

COMPILE_ONLY = {  # what the TPU compiler reads when it is loaded: no chip here, and others may compile at the same time
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def compile_only() -> None:
    """Keeps this process off any accelerator that the machine may have. Before the first computation."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices can't be read back


def model_config(path: str) -> model.ModelConfig:
    """Of a local folder, or of a published name whose shape is known (`hf.published`), so that no hub is needed.

    Raises:
      UserError: neither.
    """
    known = None if pathlib.Path(path).is_dir() else PUBLISHED.get(path)
    return known or hf.read_config(path)


def devices(topology: str):
    """The devices of a slice, or of nodes of GPUs, that are not there.

    Raises:
      UserError: no compiler for them, or no such topology.
    """
    chip, _, shape = topology.partition(":")
    one_of(chip, flops.CHIPS, "--topology's chip")
    if chip in CARDS:
        nodes = _nodes(topology, shape)
        how = {"platform": "cuda", "topology_name": nodes, "topology": nodes, "target_config": _card(chip)}
        package, install = "jax_cuda13_plugin", "pip install -r requirements-gpu.txt"
    else:
        how = {"platform": "tpu", "topology_name": topology}
        package, install = "libtpu", "pip install -r requirements-tpu.txt"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"no compiler for {chip} is installed: {install}")
    os.environ.update(COMPILE_ONLY)
    try:
        return topologies.get_topology_desc(**how).devices
    except Exception as error:  # whatever the plug-in makes of a name
        raise UserError(f"--topology = {topology!r}: {str(error).splitlines()[0][:200]}") from error


def _nodes(topology: str, shape: str) -> str:
    """'8' or '2x8', nodes and GPUs of each, as XLA counts them: partitions x hosts x devices of a host."""
    if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
        raise UserError(f"--topology = {topology!r}: GPUs are counted as H100:8, or as H100:2x8 for two nodes of eight")
    return f"1x{shape}" if "x" in shape else f"1x1x{shape}"


# What XLA's compiler asks of a card, from its makers' tables (openxla/xla, xla/backends/gpu/target_config/specs):
# capability, processors, float32 units each, clock in GHz, L2 and memory in bytes, shared memory of a processor and a
# block. The verdict goes by flops.CHIPS, whose memory is the makers' round figure, a little less.
CARDS = {
    "H100": ((9, 0), 132, 128, 1.98, 52_428_800, 84_942_979_072, 233_472, 232_448),
    "H200": ((9, 0), 132, 128, 1.98, 52_428_800, 151_397_597_184, 233_472, 232_448),
    "A100": ((8, 0), 108, 64, 1.41, 41_943_040, 85_100_068_864, 167_936, 166_912),
    "A100-40GB": ((8, 0), 108, 64, 1.41, 41_943_040, 42_331_013_120, 167_936, 166_912),
}


def _card(name: str) -> str:
    """A card's description in the form that XLA reads (GpuTargetConfigProto, as text)."""
    (major, minor), cores, units, clock, cache, memory, shared, block = CARDS[name]
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {cache}
          device_memory_size: {memory} memory_bandwidth: {flops.CHIPS[name].bandwidth:.0f}
          shared_memory_per_core: {shared} shared_memory_per_block_optin: {block} shared_memory_per_block: 49152
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536 name: "NVIDIA {name}"
          driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version:
          "9.10.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "NVIDIA {name}"
    """
