"""Random small checkpoints of Gemma 3 and Qwen3.5, made by transformers; import it where torch is there."""

import numpy as np
import safetensors.torch
import torch
import transformers

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "num_hidden_layers": 4, "sliding_window": 20, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    }),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {
        "num_hidden_layers": 4, "tie_word_embeddings": False, "full_attention_interval": 3, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }),
}  # fmt: skip
LENGTHS = (150, 100, 131)  # over several chunks of linear attention and several windows


def torch_model(family: str):
    """Random, with norms, decays, gates and convolutions that matter."""
    config, kind, more = FAMILIES[family]
    out = getattr(transformers, kind)(getattr(transformers, config)(**SIZES | more))
    rng = torch.Generator().manual_seed(0)
    for name, p in out.named_parameters():
        draw = torch.randn(p.shape, generator=rng)
        if name.endswith("linear_attn.norm.weight"):
            p.data = 1 + 0.3 * draw
        elif any(part in name for part in ("norm", "A_log", "dt_bias")):
            p.data = 0.3 * draw  # a slow decay makes transformers' own logits move by 1e-4 with an ulp of the weights
        elif "conv1d" in name:
            p.data = 1.5 * draw  # smaller, queries and keys of almost no length are common, whose direction is rounding
        elif "embed_tokens" in name or "lm_head" in name:
            p.data = draw * 3.5 * SIZES["hidden_size"] ** -0.5
        else:
            p.data = draw * p.shape[-1] ** -0.5
    return out.float().eval()


def batch():
    rng, L = np.random.default_rng(0), max(LENGTHS)
    token = rng.integers(0, SIZES["vocab_size"], (len(LENGTHS), L)).astype(np.int32)
    right = np.arange(L)[None] < np.array(LENGTHS)[:, None]
    left = right[:, ::-1]
    return token, right, left, np.where(left, np.cumsum(left, axis=1) - 1, 0).astype(np.int32)


def gap(ours, theirs) -> float:
    """The largest difference over the reference's standard deviation."""
    return float(np.abs(ours - theirs).max() / theirs.std())


def wrapped(family: str, folder):
    """A checkpoint of images and text in `folder`: transformers' model."""
    text = SIZES | FAMILIES[family][2] | {"tie_word_embeddings": True}
    small = {"hidden_size": 16, "intermediate_size": 8}
    if family == "gemma3":
        vision = small | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        reference = transformers.Gemma3ForConditionalGeneration(config)
    else:
        vision = small | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4}
        config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
        reference = transformers.Qwen3_5ForConditionalGeneration(config)
    reference.float().eval().save_pretrained(folder)
    return reference


def tensors_of(folder) -> dict:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found
