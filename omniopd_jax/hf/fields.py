"""What a config.json may hold besides the architecture: fields that change nothing, and why others are refused.

A field is passed over for one of four reasons: it is null; its name says that it is no part of the computation
(versions, token ids, initial values, sampling defaults, switches of a program); it has the value that means "off"
or "as this family is"; or the family never reads it. Everything else is an error that names it.
"""

import re


def _words(text: str) -> list[str]:
    """The words of a text, without what follows a # in a line."""
    return [word for line in text.splitlines() for word in line.split("#")[0].split()]


NAMES = re.compile(  # by form: private bookkeeping, versions, token ids, and how weights were first drawn
    r"_.*|.*_version|.*_token_ids?|.*_token_index|(summary|classifier|wandb|trainer)_.*|transformers\.js_config|transformers_js_config"
    r"|(.*_)?init(ializer)?_(range|std|stddev|factor|cutoff_factor|method|scale|gain|device|fn)"
)
IGNORED = frozenset(
    _words("""
    # what it is called, and where it comes from
    name name_or_path model_name version base_model base_model_name_or_path library_name license license_link author tags
    language description date is_llama_config tokenizer_class prefix unsloth_fixed unsloth_tuned torch_dtype dtype
    datasets pipeline_tag model_name_or_path is_mistral_config is_qwen_config
    # switches of a program: how it computes, not what
    use_cache output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript
    chunk_size_feed_forward pretraining_tp use_bfloat16 tf_legacy_loss attn_implementation gradient_checkpointing
    gradient_checkpointing_kwargs use_flash_attn use_flash_attention use_flash_attention_2 flash_attn flash_attention
    logits_to_keep num_logits_to_keep model_parallel fp16 bf16 fp32 fused_mlp fused_qkv is_decoder bos_token eos_token pad_token unk_token cache_implementation
    # sampling defaults, which the run's own settings replace
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    max_length min_length max_new_tokens penalty_alpha epsilon_cutoff eta_cutoff renormalize_logits low_memory
    generation_config stop_strings chat_template
    # classification heads and label maps, which a language model has not
    id2label label2id problem_type finetuning_task task_specific_params num_labels
    # lengths of training; max_position_embeddings is what counts
    max_sequence_length max_seq_len max_seq_length seq_length model_max_length n_ctx n_positions training_seq_len
    max_window_layers sliding_window  # inert without use_sliding_window, which is checked; Llama's is checked before
    output_router_logits router_aux_loss_coef router_z_loss_coef router_jitter_noise
    """)
)
DROPOUT = re.compile(r".*dropout.*|.*_pdrop")  # off at 0: nothing is dropped
OFF = {  # at these values a field says that the model has not got what the field is for
    **dict.fromkeys(
        _words("""
            rope_interleaved interleaved_rope rotary_interleaved use_bias bias lm_head_bias head_bias
            add_bias_linear use_alibi alibi use_parallel_residual parallel_residual parallel_attn
            use_parallel_attention cross_attention tie_encoder_decoder use_mrope use_attention_sinks
            attention_sinks use_moe is_moe use_logit_softcapping scale_embedding scale_embeddings
            normalize_embedding use_dynamic_ntk use_logn_attn attn_output_gate use_post_norm post_norm
            rms_norm_unit_offset add_unit_offset sandwich_norm use_sliding_window_attention use_mla use_mtp head_qk_norm query_pre_attn_scaling
        """),
        (False, 0),
    ),
    **dict.fromkeys(
        _words("""
            shared_expert_intermediate_size num_shared_experts n_shared_experts
            moe_shared_expert_intermediate_size num_nextn_predict_layers num_mtp_layers
            final_logit_softcapping attn_logit_softcapping num_hash_layers first_k_dense_replace
            no_rope_layer_interval attention_chunk_size num_memory_tokens final_logits_softcap
            attn_logits_softcap logit_softcap
        """),
        (0, False),
    ),
    **dict.fromkeys(
        _words("""
            logit_scale logits_scaling embedding_multiplier residual_multiplier embedding_scale rotary_pct
            rotary_percent rope_scaling_factor residual_scale lm_head_multiplier routed_scaling_factor n_group
            topk_group
        """),
        (1,),
    ),
    **dict.fromkeys(  # what every family here has
        _words("""
            use_rms_norm use_rmsnorm rms_norm rmsnorm use_rope rope use_rotary use_rotary_embeddings gated_mlp
            use_gated_mlp swiglu use_swiglu scale_attn_weights
        """),
        (True,),
    ),
    **dict.fromkeys(("position_embedding_type", "pos_embedding_type", "position_encoding_type"), ("rope", "rotary")),
    **dict.fromkeys(("norm_type", "normalization", "norm_class"), ("rms", "rmsnorm", "rms_norm", "RMSNorm")),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "moe_layer_freq": (1,),
    "pruned_heads": ({}, []),
    "auto_map": ({},),
    "quantization_config": ({},),
    "mlp_only_layers": ([],),
}
DENSE_OFF = {  # the same of a family without experts
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"), (0,)
    ),
    "norm_topk_prob": (False, True),  # nothing to normalise
}
QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm", "attn_qk_norm")
BIAS = ("qkv_bias", "use_qkv_bias", "attn_bias", "attention_qkv_bias", "add_qkv_bias")
REASONS = {  # of refused fields whose name does not say it
    "quantization_config": "; quantised weights are not read",
    "auto_map": "; the model brings code of its own, which is not run",
    "dual_chunk_attention_config": "; attention in chunks is not implemented: take the field out to train within one chunk",
}
ARCHITECTURES = {  # published models that are often asked for, and what of them is not implemented; also by model_type
    "SmolLM3ForCausalLM": "SmolLM3's every fourth layer goes without RoPE",
    "Olmo2ForCausalLM": "OLMo-2 norms what attention and feed-forward give, and q and k over all heads at once",
    "Olmo3ForCausalLM": "OLMo-3 norms what attention and feed-forward give, and has sliding windows",
    "Phi3ForCausalLM": "Phi-3 and Phi-4-mini store q, k, v and gate, up in one tensor each, and rotate a part of each head",
    "GraniteForCausalLM": "Granite scales embeddings, attention, residuals and logits by factors of its own",
    "GraniteMoeForCausalLM": "Granite scales embeddings, attention, residuals and logits by factors of its own",
    "Gemma2ForCausalLM": "Gemma 2 has norms after each part, soft-capped logits and sliding windows",
    "MixtralForCausalLM": "Mixtral's experts are named and routed otherwise than Qwen3's",
    "Qwen2MoeForCausalLM": "Qwen2-MoE has a shared expert beside the routed ones",
    "Qwen3NextForCausalLM": "Qwen3-Next has linear attention in three of four layers",
    "Qwen2_5_VLForConditionalGeneration": "a model of images and text; text models are trained here",
    "Qwen3VLForConditionalGeneration": "a model of images and text; text models are trained here",
    "Mistral3ForConditionalGeneration": "a model of images and text; text models are trained here",
    "Llama4ForConditionalGeneration": "Llama 4 has layers without RoPE, attention in chunks and a shared expert",
    "DeepseekV3ForCausalLM": "DeepSeek-V3 has latent attention and shared experts",
    "GptOssForCausalLM": "gpt-oss has attention sinks, sliding windows and experts in MXFP4",
    "Glm4ForCausalLM": "GLM-4 has norms after each part and rotates a half of each head",
    "Cohere2ForCausalLM": "Command has parallel layers, LayerNorm and sliding windows",
    "StableLmForCausalLM": "StableLM has LayerNorm and rotates a part of each head",
    "FalconForCausalLM": "Falcon has parallel layers and LayerNorm",
    "GPT2LMHeadModel": "GPT-2 has learned positions and LayerNorm",
    "GPTNeoXForCausalLM": "GPT-NeoX has parallel layers, LayerNorm and rotates a part of each head",
    "PhiForCausalLM": "Phi has parallel layers and LayerNorm",
    "smollm3": "SmolLM3's every fourth layer goes without RoPE",
    "olmo2": "OLMo-2 norms what attention and feed-forward give, and q and k over all heads at once",
    "phi3": "Phi-3 and Phi-4-mini store q, k, v and gate, up in one tensor each, and rotate a part of each head",
    "granite": "Granite scales embeddings, attention, residuals and logits by factors of its own",
}


def inert(key: str, value, family: str) -> bool:
    """Whether a field that the reader has no use for changes nothing in a model of that family."""
    if value is None or key in IGNORED or NAMES.fullmatch(key):
        return True
    if key in QK_NORM:
        return value is (family in ("qwen3", "qwen3_moe", "gemma3", "qwen3_5"))
    if key in BIAS:
        return value is (family == "qwen2")
    if key == "auto_map":  # code of its own for the model; for a classifier or a tokenizer it changes nothing here
        return isinstance(value, dict) and not {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} & set(value)
    if DROPOUT.fullmatch(key):
        return _among(value, (0, False))
    off = OFF if family == "qwen3_moe" else OFF | DENSE_OFF
    return key in off and _among(value, off[key])


def _among(value, allowed) -> bool:
    """Equal to one of them and of its kind: 1 is no True, [] no 0."""
    return any(value == a and (isinstance(value, bool) == isinstance(a, bool)) for a in allowed)
