"""The random Qwen3 checkpoint of the sampling and update benchmarks, made by transformers and read by both sides."""

SIZES = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 768, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def make(folder, vocab_size: int, seed: int = 0):
    """Saves the checkpoint in `folder` and returns transformers' float32 model of it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(vocab_size=vocab_size, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    return model
