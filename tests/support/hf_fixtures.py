"""Random Hugging Face checkpoints for the tests: made by transformers and torch, or by hf.save without either."""

import os
from pathlib import Path

CHILD_ENV = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}  # of processes that tests start
SIZES = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
ROPE = {  # every branch of each kind is reached at head_dim 16: pairs kept, blended and slowed down
    "none": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 8.0, "beta_slow": 1.0,
    },
}  # fmt: skip
CLASSES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "qwen3_moe": "Qwen3Moe"}


def torch_model(family: str, *, rope: str = "none", seed: int = 0, logit_std: float = 3.5, **over):
    """A float32 transformers model whose logits spread by `logit_std`, with norms, biases and routers that matter."""
    import torch
    import transformers

    kind = getattr(transformers, f"{CLASSES[family]}Config")
    sizes = SIZES | (MOE if family == "qwen3_moe" else {}) | over
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes, rope_parameters=dict(ROPE[rope])))
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        draw = torch.randn(p.shape, generator=rng)
        if "norm" in name:
            p.data = 1 + 0.3 * draw
        elif name.endswith("bias"):
            p.data = 0.5 * draw
        elif "embed_tokens" in name or "lm_head" in name:
            p.data = draw * logit_std * sizes["hidden_size"] ** -0.5
        else:
            p.data = draw * 1.4 * p.shape[-1] ** -0.5
    return model.float().eval()


def torch_checkpoint(folder, family: str, **kwargs):
    """Saves `torch_model(family, **kwargs)` as transformers does; returns the model."""
    model = torch_model(family, **kwargs)
    model.save_pretrained(folder)
    return model


def tokenizer(vocab_size: int = 300):
    """A byte-level BPE tokenizer with a chat template, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["What is 2 + 2? The answer is 4."] * 4, trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>")
    out.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return out


def files(folder) -> dict[str, bytes]:
    """{name: content} of a folder, to see that nothing changed."""
    return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}
