"""config.json <-> ModelConfig, strictly: what changes the computation and is not known here is refused by name, never
approximated; what changes nothing (names, versions, token ids, fields that are null or at "off") is passed over
(`fields`).
"""

import dataclasses
import sys
from typing import Any

from omniopd_jax.errors import UserError
from omniopd_jax.hf import fields, layered
from omniopd_jax.model import ModelConfig

ARCHITECTURES = {  # config.json's name -> our family; the first of a family is what an export is called
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",  # without its sliding window the same computation, tensor for tensor
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3",
    "Qwen3_5ForCausalLM": "qwen3_5",
} | layered.WRAPPERS
MODEL_TYPES = {
    "qwen3": ("qwen3",), "qwen2": ("qwen2",), "llama": ("llama", "mistral"), "qwen3_moe": ("qwen3_moe",),
    "gemma3": ("gemma3_text", "gemma3"), "qwen3_5": ("qwen3_5_text", "qwen3_5"),
}  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LONGEST = 300  # characters of an error here
MOST = 2**31 - 1  # of any size
ONLY = {  # implemented for these values alone
    "hidden_act": ("silu", "swish", None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "per_layer_config": (None, {}),
}
ROPE = {  # rope_type -> (keys it must have, keys it may have)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    ),
}
MOE_ONLY = ("decoder_sparse_step", "mlp_only_layers")
_REQUIRED = object()


def model_config(config_json: dict, where: str) -> ModelConfig:
    """ModelConfig of a config.json, in the form of transformers 5 or an older one.

    Args:
      config_json: the parsed file.
      where: its path, for the errors.

    Raises:
      UserError: an unknown architecture or field, a missing one, or a value that the decoder does not implement; one
        line of at most `LONGEST` characters.
    """
    try:
        return _model_config(config_json, where)
    except UserError as e:
        raise UserError(_short(str(e), where)) from None


def _short(message: str, where: str) -> str:
    """The message in at most `LONGEST` characters: of a long path its end, of long words their beginning."""
    if len(message) > LONGEST and len(where) > 100:
        message = message.replace(where, f"...{where[-97:]}", 1)
    return message if len(message) <= LONGEST else message[: LONGEST - 3] + "..."


def _model_config(config_json: dict, where: str) -> ModelConfig:
    left = dict(config_json)
    family = _family(left, where)
    moe = family == "qwen3_moe"
    inner = config_json.get("text_config") if family in layered.FAMILIES else None
    if isinstance(inner, dict):  # the text part of a model of images and text; what is around it is carried, not read
        tied = {k: config_json[k] for k in ("tie_word_embeddings",) if k in config_json}
        left = tied | {k: v for k, v in inner.items() if k not in ("model_type", "architectures")}

    for key, value in layered.DEFAULTS.get(family, {}).items():
        left.setdefault(key, value)

    def take(key: str, default: Any = _REQUIRED):
        value = left.pop(key, None)
        if value is None and default is _REQUIRED:
            raise UserError(f"{where}: {key} is missing")
        return default if value is None else value

    def size(key: str, default: Any = _REQUIRED) -> int:
        value = take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST:
            raise UserError(f"{where}: {key} = {_shown(value)} is not a positive whole number that a model could have")
        return value

    def number(key: str, default: float) -> float:
        return float(_number(take(key, default), f"{where}: {key}"))

    D, Q = size("hidden_size"), size("num_attention_heads")
    bias = {"qwen2": True}.get(family, False)
    asked_bias = take("attention_bias", bias)
    if family == "qwen2" and asked_bias is not True:
        raise UserError(f"{where}: attention_bias = {asked_bias} is not implemented: Qwen2's q, k, v have biases")
    special = {}  # of families whose layers differ: what overrides the common fields
    if family in layered.FAMILIES:
        positions = left.get("max_position_embeddings")

        def entries(key: str) -> dict:
            return _object(take(key, None) or {}, f"{where}: {key}")

        def rope(entry, base=None):
            what = f"{where}: rope_parameters"
            return _rope_entry({"rope_theta": base} | _object(entry, what), None, positions, what)

        read = layered.Read(left, take, size, number, entries, rope, where)
        prefix = layered.WRAPPED_PREFIX if isinstance(inner, dict) else layered.PREFIX
        special = {"prefix": prefix} | layered.FAMILIES[family](read)
    for key, allowed in ONLY.items():
        if key in left and (moe or key not in MOE_ONLY) and (value := left.pop(key)) not in allowed:
            raise UserError(f"{where}: {key} = {_shown(value)} is not implemented; only {_either(allowed)} is")
    kinds = left.pop("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise UserError(f"{where}: layer_types = {_shown(kinds)} is not implemented; only full_attention is")
    positions = size("max_position_embeddings")
    theta, scaling = (None, ()) if special else _rope(left, positions, where)
    if family == "llama" and (window := left.pop("sliding_window", None)) is not None:
        raise UserError(f"{where}: sliding_window = {_shown(window)} is not implemented; only null is")
    common = dict(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=D,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=Q,
        num_kv_heads=size("num_key_value_heads", Q if family == "llama" else _REQUIRED),
        head_dim=special.get("head_dim") or size("head_dim", _REQUIRED if family == "qwen3" else D // Q),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=take("rms_norm_eps", 1e-6),
        tied=take("tie_word_embeddings", family == "gemma3"),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=asked_bias,
        out_bias=asked_bias and family != "qwen2",
        max_positions=positions,
        **(_experts(left, take, size, where) if moe else {}),
    )
    cfg = ModelConfig(**common | special)
    unknown = sorted(k for k, v in left.items() if not fields.inert(k, v, family))
    if unknown:
        reason = fields.REASONS.get(unknown[0], "")
        more = f" (and {len(unknown) - 1} more: {', '.join(k[:40] for k in unknown[1:4])})" if len(unknown) > 1 else ""
        raise UserError(
            f"{where}: unknown field {unknown[0][:60]} = {_shown(left[unknown[0]])} for {family}{reason}{more}"
        )
    _check(cfg, where)
    return cfg


def config_json(cfg: ModelConfig, dtype: str, token_ids: dict) -> dict:
    """The config.json of an export: opened by transformers 4 and 5 alike, so RoPE and dtype stand in both forms.

    Args:
      dtype: of the tensors, a name.
      token_ids: holds `TOKEN_IDS` as far as they are known; other entries are passed over.
    """
    scaling = dict(cfg.rope_scaling) or {"rope_type": "default"}
    out = {
        "architectures": [next(a for a, f in ARCHITECTURES.items() if f == cfg.family)],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_theta": cfg.rope_theta} | scaling,
        "tie_word_embeddings": cfg.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if cfg.rope_scaling:
        out["rope_scaling"] = scaling
    if cfg.family == "llama":
        out["mlp_bias"] = False
    else:
        out["use_sliding_window"] = False
    if cfg.family != "qwen2":
        out["attention_bias"] = cfg.qkv_bias
    if cfg.family == "qwen3_moe":
        out |= {
            "num_experts": cfg.num_experts,
            "num_experts_per_tok": cfg.experts_per_token,
            "moe_intermediate_size": cfg.expert_size,
            "norm_topk_prob": cfg.normalize_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if cfg.family in layered.FAMILIES:
        out |= layered.config_json(cfg)
        out = {k: v for k, v in out.items() if k != "use_sliding_window"}
    if model_config(out, "export") != dataclasses.replace(cfg, prefix=layered.PREFIX):
        raise ValueError(f"this model has no config.json: {cfg}")
    return out | {k: token_ids.get(k) for k in TOKEN_IDS}


def _family(left: dict, where: str) -> str:
    kind, names = left.pop("model_type", None), left.pop("architectures", None)
    if not names:
        names = [name for name, family in ARCHITECTURES.items() if kind in MODEL_TYPES[family]][:1]
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        said = _shown(name or kind)
        known = f"known: {', '.join(ARCHITECTURES)}"
        reason = fields.ARCHITECTURES.get(name if isinstance(name, str) else "") or fields.ARCHITECTURES.get(str(kind))
        raise UserError(
            f"{where}: architecture {said} is " + (f"not implemented: {reason}" if reason else f"unknown; {known}")
        )
    family = ARCHITECTURES[name]
    # transformers goes by model_type; Mistral's defaults for a field that is left out are a window, and 8 heads
    if name == "MistralForCausalLM" or kind == "mistral":
        for key in ("sliding_window", "num_key_value_heads"):
            if key not in left:
                raise UserError(
                    f"{where}: {key} is missing, and Mistral's default for it is not implemented; write it out"
                )
    if kind is not None and kind not in MODEL_TYPES[family]:
        raise UserError(f"{where}: model_type = {_shown(kind)} does not belong to {name}")
    return family


def _rope(left: dict, positions: int, where: str) -> tuple[float, tuple]:
    """(rope_theta, scaling items) of rope_parameters (transformers 5) or rope_theta and rope_scaling (older)."""
    top = _number(left.pop("rope_theta", None), f"{where}: rope_theta")
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        entry = left.pop(key, None)
        if not entry:
            continue
        found.append(_rope_entry(_object(entry, f"{where}: {key}"), top, positions, f"{where}: {key}"))
    if len(set(found)) > 1:
        raise UserError(
            f"{where}: rope_parameters and rope_scaling disagree: {_shown(found[0])} and {_shown(found[1])}"
        )
    return found[0] if found else (float(top or 10_000.0), ())


def _rope_entry(entry: dict, top, positions: int, where: str) -> tuple[float, tuple]:
    theta = _number(entry.pop("rope_theta", None), f"{where}: rope_theta") or top or 10_000.0
    if top is not None and float(theta) != float(top):
        raise UserError(f"{where}: rope_theta = {theta} disagrees with the field of that name, {top}")
    kinds = [v for k in ("rope_type", "type") if (v := entry.pop(k, None)) is not None] or ["default"]
    kind = next((k for k in kinds if not isinstance(k, str) or k not in ROPE or k != kinds[0]), kinds[0])
    if not isinstance(kind, str) or kind not in ROPE or kind != kinds[0]:
        raise UserError(f"{where}: rope_type = {_shown(kind)} is not implemented; known: {', '.join(ROPE)}")
    if (part := entry.pop("partial_rotary_factor", None)) not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor = {part} is not implemented; only 1 is")
    entry = {k: v for k, v in entry.items() if v is not None and not k.startswith("_")}
    must, may = ROPE[kind]
    if "original_max_position_embeddings" in must:
        entry.setdefault("original_max_position_embeddings", positions)
    for key in must:
        if key not in entry:
            raise UserError(f"{where}: {key} is missing for rope_type {kind!r}")
    for key, value in entry.items():
        if key not in must + may:
            raise UserError(f"{where}: unknown field {key[:60]} = {_shown(value)} for rope_type {kind!r}")
        if key != "truncate":
            _number(value, f"{where}: {key}")
    return float(theta), () if kind == "default" else tuple(sorted((entry | {"rope_type": kind}).items()))


def _experts(left: dict, take, size, where: str) -> dict:
    given = [k for k in ("num_experts", "num_local_experts") if left.get(k) is not None]  # transformers 4 and 5
    if len({left[k] for k in given}) > 1:
        raise UserError(f"{where}: num_experts = {left[given[0]]} and num_local_experts = {left[given[1]]} disagree")
    counts = [size(k) for k in given or ("num_experts",)]
    return {
        "num_experts": counts[0],
        "experts_per_token": size("num_experts_per_tok"),
        "expert_size": size("moe_intermediate_size"),
        "normalize_experts": take("norm_topk_prob", False),
    }


def _check(cfg: ModelConfig, where: str) -> None:
    """Types, and sizes against each other."""
    named = {"norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings", "normalize_experts": "norm_topk_prob"}
    for f in dataclasses.fields(ModelConfig):
        value, what = getattr(cfg, f.name), f"{where}: {named.get(f.name, f.name)}"
        if f.type is bool and not isinstance(value, bool):
            raise UserError(f"{what} = {_shown(value)} is not true or false")
        if f.type is float:
            _number(value, what)
    if cfg.num_heads % cfg.num_kv_heads:
        raise UserError(
            f"{where}: {cfg.num_heads} attention heads are no multiple of {cfg.num_kv_heads} key/value heads"
        )
    if cfg.head_dim % 2:
        raise UserError(f"{where}: head_dim = {cfg.head_dim} is not even, which RoPE needs")
    if cfg.linear_value_heads % max(cfg.linear_key_heads, 1):
        raise UserError(
            f"{where}: linear_num_value_heads = {cfg.linear_value_heads} is no multiple of linear_num_key_heads"
        )
    if cfg.num_experts and cfg.experts_per_token > cfg.num_experts:
        raise UserError(f"{where}: num_experts_per_tok = {cfg.experts_per_token} of num_experts = {cfg.num_experts}")


def _object(value, what: str) -> dict:
    """A copy of a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{what} = {_shown(value)} is not an object")
    return dict(value)


def _number(value, what: str):
    """A positive, finite number, or None as it is."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{what} = {_shown(value)} is not a positive number")
    return value


def _shown(value) -> str:
    """A value as an error shows it: one line, not too long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _either(values) -> str:
    return " or ".join(repr(v) for v in values if v is not None)
