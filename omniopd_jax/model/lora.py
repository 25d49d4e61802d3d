"""LoRA: low-rank adapters beside frozen projections (Hu et al., arXiv 2106.09685), initialised and named as PEFT does.

A projection becomes x W + (alpha / rank) (x A) B; A starts uniform, B zero, so a run starts at the base model. Only A
and B are trained, saved and given optimizer state. The model without them is the anchor's reference: no second copy is
held.
"""

import math
import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from omniopd_jax import model
from omniopd_jax.errors import UserError

LEAVES = {  # PEFT's name of a module -> (its leaf in model.table, axes of its input)
    "q_proj": ("q", 1),
    "k_proj": ("k", 1),
    "v_proj": ("v", 1),
    "o_proj": ("o", 2),
    "gate_proj": ("gate", 1),
    "up_proj": ("up", 1),
    "down_proj": ("down", 1),
    "in_proj_qkv": ("linear_qkv", 1),
    "in_proj_z": ("linear_z", 1),
    "in_proj_b": ("linear_b", 1),
    "in_proj_a": ("linear_a", 1),
    "out_proj": ("linear_out", 2),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def trained_table(model_cfg: model.ModelConfig, settings) -> dict:
    """`model.Param`s of what is trained: the adapters, or without a rank the whole model."""
    return table(model_cfg, settings) if settings.rank else model.table(model_cfg)


def table(model_cfg: model.ModelConfig, settings) -> dict:
    """The adapters' `model.Param`s, keyed as their projections are in `model.table`: all that a run trains.

    Args:
      settings: the config's `lora` section.

    Raises:
      UserError: a target that takes no adapter.
    """
    if model_cfg.num_experts and (experts := [t for t in settings.targets if t not in ATTENTION]):
        raise UserError(
            f"lora.targets: {', '.join(experts)} of a mixture of experts take no adapter; choose among "
            f"{', '.join(ATTENTION)}"
        )
    base, layers = model.table(model_cfg)["layers"], {}
    for target in settings.targets:
        name, inputs = LEAVES[target]
        if name not in base:
            raise UserError(f"lora.targets: {model_cfg.family} has no {target}")
        layers |= _pair(name, base[name], inputs, settings.rank)
    return {"layers": layers}


def settings_of(run_config: dict) -> ConfigDict:
    """The `lora` section of a run's config.json; off where the run is older than the section."""
    return ConfigDict(run_config.get("lora", {"rank": 0}))


def _pair(name: str, p: model.Param, inputs: int, rank: int) -> dict:
    """A and B of a stacked projection."""
    layers, into, out = p.shape[0], p.shape[1 : 1 + inputs], p.shape[1 + inputs :]
    into_axes, out_axes = p.axes[1 : 1 + inputs], p.axes[1 + inputs :]
    stem = "base_model.model." + p.hf.removesuffix(".weight")
    a = model.Param(
        (layers, *into, rank), ("layers", *into_axes, "rank"), f"{stem}.lora_A.weight", (rank, math.prod(into)),
        (rank, *into), (*range(1, 1 + len(into)), 0), "uniform", math.prod(into), p.layers,
    )  # fmt: skip
    b = model.Param(
        (layers, rank, *out), ("layers", "rank", *out_axes), f"{stem}.lora_B.weight", (math.prod(out), rank),
        (*out, rank), (len(out), *range(len(out))), "zeros", 0, p.layers, parts=p.parts,
    )  # fmt: skip
    return {f"{name}_lora_a": a, f"{name}_lora_b": b}


def init(key: jax.Array, model_cfg: model.ModelConfig, settings) -> dict:
    """Float32 adapters: A uniform in +-fan_in**-0.5 (PEFT's kaiming_uniform_ with a = sqrt(5)), B zero."""
    leaves, tree = jax.tree.flatten(table(model_cfg, settings), is_leaf=model.is_param)

    def one(key, p: model.Param):
        if p.init == "zeros":
            return jnp.zeros(p.shape, jnp.float32)
        bound = p.fan_in**-0.5
        return jax.random.uniform(key, p.shape, jnp.float32, -bound, bound)

    return tree.unflatten([one(k, p) for k, p in zip(jax.random.split(key, len(leaves)), leaves)])


def scale(settings) -> float | None:
    """`Compute.lora_scale` of the config's `lora` section: alpha / rank; None where LoRA is off."""
    return settings.alpha / settings.rank if settings.rank else None


def peft_config(settings, base, prefix: str = "model.") -> dict:
    """PEFT's adapter_config.json for adapters beside the model `base`, a folder or a hub name.

    Args:
      prefix: of the text model's modules. In a model of images and text the names alone would also be found in its
        eye, and a reader that takes the text model alone would find no adapter of it, with a warning at most: a pattern
        that holds the prefix makes PEFT refuse that.
    """
    targets = list(settings.targets)
    if prefix != "model.":
        targets = rf"{re.escape(prefix)}layers\.\d+\..*\b({'|'.join(targets)})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def attach(base: dict, adapters: dict) -> dict:
    """The whole model as `model.hidden` takes it: the base with the adapters among its layers' leaves. Copies
    nothing."""
    return base | {"layers": base["layers"] | adapters["layers"]}


def attached(params: dict) -> bool:
    """Whether `params` carry adapters."""
    return any(name.endswith("_lora_a") for name in params["layers"])


def merge(params: dict, scale: float, dtype) -> dict:
    """W + scale A B in float32, then cast to `dtype`, for the sampler and for export: parameters without adapters.

    A layer at a time, so that no float32 copy of a stack is made.
    """

    def whole(w, a, b):
        return (w.astype(jnp.float32) + scale * jnp.tensordot(a, b, axes=1, precision="highest")).astype(dtype)

    layers = params["layers"]
    merged = {
        name: jax.lax.map(lambda wab: whole(*wab), (w, layers[f"{name}_lora_a"], layers[f"{name}_lora_b"]))
        for name, w in layers.items()
        if f"{name}_lora_a" in layers
    }
    kept = {name: w for name, w in layers.items() if "_lora_" not in name and name not in merged}
    rest = {name: a for name, a in params.items() if name != "layers"}
    return model.cast(rest, dtype) | {"layers": model.cast(kept, dtype) | merged}
