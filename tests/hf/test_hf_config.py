"""config.json -> ModelConfig: published files are understood, what is not implemented is refused by name."""

import pytest

from omniopd_jax import hf, model
from omniopd_jax.errors import UserError

REAL = {  # config.json files of published checkpoints
    "Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
         "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
         "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
         "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
        596_049_920,
    ),
    "Qwen2.5-0.5B": (
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
         "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
         "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
         "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
         "vocab_size": 151936},
        494_032_768,
    ),
    "Llama-3.2-1B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
         "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
         "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
         "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256},
        1_235_814_400,
    ),
    "Qwen3-30B-A3B": (
        {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
         "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
         "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
         "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
         "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
         "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
        30_532_122_624,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_known_and_count_their_parameters(name):
    config, count = REAL[name]
    if name == "Qwen2.5-0.5B":  # a key that some of its repositories carry: known, and refused where it is in use
        with pytest.raises(UserError, match="use_mrope"):
            hf.model_config(config | {"use_mrope": True}, name)
    cfg = hf.model_config(config, name)
    assert model.num_params(cfg) == count
    assert cfg.rope_theta == config["rope_theta"]


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Llama-3.2-1B"])
def test_both_forms_of_rope_mean_the_same(name):
    old, _ = REAL[name]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"dtype": "bfloat16"}
    new["rope_parameters"] = (old["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": old["rope_theta"]}
    assert hf.model_config(new, "new") == hf.model_config(old, "old")


QWEN, LLAMA, MOE = REAL["Qwen3-0.6B"][0], REAL["Llama-3.2-1B"][0], REAL["Qwen3-30B-A3B"][0]


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QWEN, {"architectures": ["GemmaForCausalLM"]}, "architecture 'GemmaForCausalLM' is unknown; known: Qwen3For"),
        (QWEN, {"architectures": None, "model_type": "mamba"}, "'mamba' is unknown"),
        (QWEN, {"model_type": "llama"}, "model_type = 'llama'"),
        (QWEN, {"final_logit_softcapping": 30.0}, "unknown field final_logit_softcapping"),
        (QWEN, {"quantization_config": {"bits": 4}}, "quantization_config.*quantised"),
        (QWEN, {"decoder_sparse_step": 1}, "unknown field decoder_sparse_step"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window = 4096"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = True"),
        (QWEN, {"attention_dropout": 0.1}, "attention_dropout"),
        (QWEN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (QWEN, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        (QWEN, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (QWEN, {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": 1}}, "unknown field mrope_sect"),
        (QWEN, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta = 5.0 disagrees"),
        (MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (MOE, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (MOE, {"num_local_experts": 64}, "num_experts"),
        (MOE, {"shared_expert_intermediate_size": 5}, "unknown field shared_expert_intermediate_size"),
        (QWEN, {"num_key_value_heads": 3}, "16 attention heads are no multiple of 3"),
        (QWEN, {"hidden_size": "1024"}, "hidden_size = '1024'"),
        (LLAMA, {"hidden_size": "2048"}, "hidden_size = '2048' is not a positive whole number"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tied = 'yes'"),
        (QWEN, {"hidden_size": None}, "hidden_size is missing"),
        (REAL["Qwen2.5-0.5B"][0], {"use_mrope": False, "attention_bias": False}, "attention_bias"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(base, change, message):
    with pytest.raises(UserError, match=f"^the file: .*{message}"):
        hf.model_config(base | change, "the file")
