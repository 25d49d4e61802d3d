"""config.json of families whose layers differ: Gemma 3 (sliding and full attention) and Qwen3.5 (linear and full).

Both come as a text model alone or as the text part of a model of images and text (`text_config`); of the latter the
text model is trained, and the rest is carried through to an export as it was (`CARRIED`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from omniopd_jax.errors import UserError
from omniopd_jax.model import ModelConfig

WRAPPERS = {"Gemma3ForConditionalGeneration": "gemma3", "Qwen3_5ForConditionalGeneration": "qwen3_5"}
PREFIX, WRAPPED_PREFIX = "model.", "model.language_model."  # of the text model's modules, alone and within a wrapper
GEMMA_PREFIX = "language_model.model."  # of its tensors in files of Gemma 3, Google's and transformers' own
CARRIED = (  # of no text parameter
    "model.visual.", "mtp.", "model.vision_tower.", "model.multi_modal_projector.", "vision_tower.",
    "multi_modal_projector.",
)  # fmt: skip
DEFAULTS = {  # what a config.json may leave out, as Gemma-3-4B's does, and means by it
    "gemma3": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
FOLDER = "_name_or_path"  # where the source was read from, on the machine that wrote it
KINDS = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear"}


class Read(NamedTuple):
    """How a config.json is read: what is taken is gone from `left`, what is not what it should be is a UserError.

    Attributes:
      left: its fields that nobody has read yet.
      take: (key, default) -> the value.
      size: (key, default) -> a positive whole number.
      number: (key, default) -> a positive float.
      entries: (key) -> an object, empty where there is none.
      rope: (an entry of RoPE, its base where the entry has none) -> (base, scaling).
      where: for errors.
    """

    left: dict
    take: Callable
    size: Callable
    number: Callable
    entries: Callable
    rope: Callable
    where: str


def gemma3(read: Read) -> dict:
    """ModelConfig's fields beyond the common ones, or otherwise."""
    left, where = read.left, read.where
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if (cap := left.pop(key, None)) is not None:
            raise UserError(f"{where}: {key} = {cap!r} is not implemented; only null is")
    if left.pop("use_bidirectional_attention", False):
        raise UserError(f"{where}: use_bidirectional_attention = True is not implemented; only False is")
    for key in ("hidden_activation", "hidden_act"):
        if (act := left.pop(key, None)) not in (None, "gelu_pytorch_tanh"):
            raise UserError(f"{where}: {key} = {act!r} is not implemented; only 'gelu_pytorch_tanh' is")
    pattern = read.size("sliding_window_pattern", 6)
    left.pop("_sliding_window_pattern", None)
    kinds = _kinds(read, ("full", "sliding"), lambda i: "full" if (i + 1) % pattern == 0 else "sliding")
    theta, scaling, local = _gemma_rope(read)
    if "sliding" in kinds and left.get("sliding_window", 0) is None:
        raise UserError(f"{where}: sliding_window = None is not implemented where layers have a window; write it out")
    query_scale = read.number("query_pre_attn_scalar", 256)
    if query_scale >= 1e9 or local >= 1e12:
        raise UserError(f"{where}: query_pre_attn_scalar or rope_local_base_freq is too large")
    if query_scale % 1:
        raise UserError(
            f"{where}: query_pre_attn_scalar = {query_scale} is no whole number, and transformers asks for one"
        )
    return {
        "head_dim": read.size("head_dim", 256), "rope_theta": theta, "rope_scaling": scaling, "layer_kinds": kinds,
        "window": read.size("sliding_window", 4096), "local_rope_theta": local, "query_scale": query_scale,
        "zero_centred_norms": True, "post_norms": True, "scaled_embeddings": True, "activation": "gelu_tanh",
        "qk_norm": True,
    }  # fmt: skip


def _gemma_rope(read: Read) -> tuple[float, tuple, float]:
    """(base, scaling, base of the sliding layers), as transformers finds them: in rope_parameters, an entry a kind of
    layer, else in the older fields, else its defaults.
    """
    top, local = read.take("rope_theta", 1_000_000.0), read.number("rope_local_base_freq", 10_000.0)
    nested, older = read.entries("rope_parameters"), read.entries("rope_scaling")
    if other := sorted(nested.keys() - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"{read.where}: unknown field {other[0][:60]} in rope_parameters, which has an entry a kind of layer"
        )
    theta, scaling = read.rope(nested.get("full_attention") or older, top)
    if older and read.rope(older, theta) != (theta, scaling):
        raise UserError(f"{read.where}: rope_parameters and rope_scaling disagree")
    local, local_scaling = read.rope(nested.get("sliding_attention") or {}, local)
    if local_scaling:
        raise UserError(f"{read.where}: rope_parameters.sliding_attention is scaled, which is not implemented")
    return theta, scaling, local


def qwen3_5(read: Read) -> dict:
    """As `gemma3`."""
    left, size = read.left, read.size
    interval = size("full_attention_interval", 4)
    kinds = _kinds(read, ("full", "linear"), lambda i: "full" if (i + 1) % interval == 0 else "linear")
    entry = read.entries("rope_parameters") or read.entries("rope_scaling")
    outer = left.pop("partial_rotary_factor", None)
    part = entry.pop("partial_rotary_factor", None) or outer or 0.25
    if not isinstance(part, float | int) or not 0 < part <= 1:
        raise UserError(f"{read.where}: partial_rotary_factor must be above 0 and at most 1")
    for key in ("mrope_section", "mrope_interleaved"):  # on text its three axes count alike
        entry.pop(key, None)
    if entry.get("rope_type") == "mrope":
        entry["rope_type"] = "default"
    theta, scaling = read.rope(entry, read.take("rope_theta", None))
    left.pop("attn_output_gate", None)
    for key, only in (("mamba_ssm_dtype", "float32"), ("output_gate_type", "swish")):
        if (value := left.pop(key, None)) not in (None, only):
            raise UserError(f"{read.where}: {key} = {str(value)[:60]!r} is not implemented; only {only!r} is")
    for key in [key for key in left if key.startswith("mtp_")]:  # of heads that are carried
        del left[key]
    head_dim = size("head_dim", 256)
    return {
        "head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling, "layer_kinds": kinds,
        "rotary_dim": int(head_dim * part), "zero_centred_norms": True, "attention_gate": True, "qk_norm": True,
        "linear_key_heads": size("linear_num_key_heads", 16), "linear_value_heads": size("linear_num_value_heads", 32),
        "linear_key_dim": size("linear_key_head_dim", 128), "linear_value_dim": size("linear_value_head_dim", 128),
        "conv_width": size("linear_conv_kernel_dim", 4),
    }  # fmt: skip


MOST_LAYERS = 10_000  # whose kinds are written out before any tensor has been seen

FAMILIES = {"gemma3": gemma3, "qwen3_5": qwen3_5}


def _kinds(read: Read, known: tuple[str, ...], default: Callable[[int], str]) -> tuple[str, ...]:
    left, where = read.left, read.where
    layers, found = left.get("num_hidden_layers"), left.pop("layer_types", None)
    if found is None:
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise UserError(
                f"{where}: num_hidden_layers = {layers} without layer_types; at most {MOST_LAYERS} are read"
            )
        return tuple(map(default, range(layers))) if isinstance(layers, int) else ()
    if not isinstance(found, list) or len(found) != layers or any(KINDS.get(str(k)) not in known for k in found):
        raise UserError(
            f"{where}: layer_types must name one of {', '.join(k for k in KINDS if KINDS[k] in known)} per layer"
        )
    return tuple(KINDS[k] for k in found)


def config_json(cfg: ModelConfig) -> dict:
    """What a config.json of these families holds beyond the common fields, or otherwise."""
    names = {kind: name for name, kind in KINDS.items()}
    scaling = dict(cfg.rope_scaling) or {"rope_type": "default"}
    out = {"model_type": f"{cfg.family}_text", "layer_types": [names[kind] for kind in cfg.kinds]}
    if cfg.family == "gemma3":
        return out | {
            "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": int(cfg.query_scale),
            "sliding_window": cfg.window, "rope_local_base_freq": cfg.local_rope_theta,
            "rope_scaling": dict(cfg.rope_scaling) or None,
            "rope_parameters": {
                "full_attention": {"rope_theta": cfg.rope_theta} | scaling,
                "sliding_attention": {"rope_theta": cfg.local_rope_theta, "rope_type": "default"},
            },
            "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
        }  # fmt: skip
    part = cfg.rotary_dim / cfg.head_dim
    if int(cfg.head_dim * part) < cfg.rotary_dim:  # a reader rounds down
        part = math.nextafter(part, 1)
    return out | {
        "rope_theta": None, "rope_scaling": None,
        "rope_parameters": scaling | {"rope_theta": cfg.rope_theta, "partial_rotary_factor": part},
        "linear_num_key_heads": cfg.linear_key_heads, "linear_num_value_heads": cfg.linear_value_heads,
        "linear_key_head_dim": cfg.linear_key_dim, "linear_value_head_dim": cfg.linear_value_dim,
        "linear_conv_kernel_dim": cfg.conv_width,
    }  # fmt: skip


def in_file(cfg: ModelConfig, tensors) -> ModelConfig:
    """`cfg` with the prefix that its text model has among these names of tensors."""
    older = cfg.prefix == WRAPPED_PREFIX and f"{GEMMA_PREFIX}embed_tokens.weight" in tensors
    return dataclasses.replace(cfg, prefix=GEMMA_PREFIX) if older else cfg


def around(ours: dict, source: dict) -> dict:
    """The config.json `ours` with what the source's says beside the text model; in a wrapper, in place of its text."""
    text = source.get("text_config")
    if not isinstance(text, dict):
        return {key: value for key, value in (source | ours).items() if key != FOLDER}
    named = {key: value for key, value in ours.items() if key not in ("architectures",)}
    out = source | {"text_config": text | named, "dtype": ours["dtype"]}
    out.pop(FOLDER, None)
    out["text_config"].pop(FOLDER, None)
    if source.get("eos_token_id") is not None and ours.get("eos_token_id") is not None:
        out["eos_token_id"] = ours["eos_token_id"]  # which readers prefer to the text model's
    return out
