"""config.json -> ModelConfig: published files are understood, what is not implemented is refused by name."""

import dataclasses
import json
import pathlib

import hf_fixtures
import jax
import numpy as np
import pytest

from omniopd_jax import hf, model
from omniopd_jax.errors import UserError
from omniopd_jax.hf import config as hf_config
from omniopd_jax.hf.published import PUBLISHED

HERE = pathlib.Path(__file__).parent


def rows(name):
    return [json.loads(line) for line in (HERE / name).read_text().splitlines() if line]


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


@pytest.mark.parametrize("older", [{}, {"rope_theta": 5e5, "rope_local_base_freq": 2e4}], ids=["defaults", "older"])
@pytest.mark.parametrize("full", [{}, {"rope_type": "linear", "factor": 8.0}, {"rope_theta": 3e5}], ids=str)
def test_gemma_s_rope_parameters_are_completed_as_transformers_does(full, older):
    """What an entry leaves out is in the older fields, or a default that is not the other families'."""
    transformers = pytest.importorskip("transformers")
    gone = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    new = {k: v for k, v in GEMMA3.items() if k not in gone} | older
    new["rope_parameters"] = {"full_attention": full, "sliding_attention": None}
    theirs = transformers.Gemma3TextConfig.from_dict(json.loads(json.dumps(new))).rope_parameters
    cfg = hf.model_config(new, "f")
    assert cfg.rope_theta == theirs["full_attention"]["rope_theta"]
    assert cfg.local_rope_theta == theirs["sliding_attention"]["rope_theta"]
    assert dict(cfg.rope_scaling).get("factor") == theirs["full_attention"].get("factor")


def test_an_export_of_gemma_has_its_rope_in_the_form_of_transformers_4_too():
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 20_000.0}
    for base in (GEMMA3, GEMMA3 | scaled):
        cfg = hf.model_config(base, "f")
        written = hf_config.config_json(cfg, "bfloat16", {})
        assert {k: written[k] for k in scaled} == {k: base[k] for k in scaled}
        assert written["rope_theta"] == base["rope_theta"] and hf.model_config(written, "f") == cfg


def test_a_part_of_a_head_that_is_read_can_be_written():
    """52 x (30 / 52) is below 30, and readers round down."""
    rope = QWEN35["rope_parameters"] | {"partial_rotary_factor": 0.58}
    cfg = hf.model_config(QWEN35 | {"head_dim": 52, "rope_parameters": rope}, "f")
    assert cfg.rotary_dim == 30
    hf_config.config_json(cfg, "bfloat16", {})


def test_shapes_known_by_name_are_those_of_the_published_files():
    files = {"Qwen/Qwen3-0.6B": REAL["Qwen3-0.6B"][0]} | {r["name"]: r["config"] for r in rows("published.jsonl")}
    compared = [name for name in PUBLISHED if name in files]
    assert len(compared) == 5
    assert all(PUBLISHED[name] == hf.model_config(files[name], name) for name in compared)


QWEN, LLAMA, MOE = REAL["Qwen3-0.6B"][0], REAL["Llama-3.2-1B"][0], REAL["Qwen3-30B-A3B"][0]
GEMMA3 = next(r["config"] for r in rows("published.jsonl") if r["name"] == "google/gemma-3-1b-it")
QWEN35 = next(r["config"]["text_config"] for r in rows("published.jsonl") if r["name"] == "Qwen/Qwen3.5-0.8B")
BASES = {"QWEN": QWEN, "LLAMA": LLAMA, "MOE": MOE, "QWEN25": REAL["Qwen2.5-0.5B"][0]}
BASES["MISTRAL"] = next(r["config"] for r in rows("published.jsonl") if "Mistral" in r["name"])
OPEN = {k: v for k, v in BASES["MISTRAL"].items() if k != "sliding_window"}  # the window is a default


@pytest.mark.parametrize("base", [QWEN, GEMMA3, QWEN35], ids=["qwen3", "gemma3", "qwen3_5"])
def test_a_bias_has_an_entry_for_each_row_of_its_projection(base):
    """Of Qwen3.5's q_proj the gate's half too."""
    layers = model.table(hf.model_config(base | {"attention_bias": True}, "f"))["layers"]
    for name in "qkvo":
        assert layers[f"{name}_bias"].hf_shape == layers[name].hf_shape[:1], name


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
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        (QWEN, {"hidden_size": None}, "hidden_size is missing"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not implemented; only null"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not implemented; only null"),
        (OPEN, {"architectures": None}, "sliding_window is missing"),
        (OPEN, {"architectures": ["LlamaForCausalLM"]}, "sliding_window is missing"),  # transformers goes by model_type
        (GEMMA3, {"sliding_window": None}, "sliding_window = None is not implemented"),
        (GEMMA3, {"query_pre_attn_scalar": 100.5}, "query_pre_attn_scalar = 100.5 is no whole number"),
        (GEMMA3, {"rope_parameters": {"rope_type": "default"}}, "unknown field rope_type in rope_parameters"),
        (
            GEMMA3,
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_parameters and rope_scaling disagree",
        ),
        (QWEN35, {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype = 'bfloat16'"),
        (REAL["Qwen2.5-0.5B"][0], {"use_mrope": False, "attention_bias": False}, "attention_bias"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(base, change, message):
    with pytest.raises(UserError, match=f"^the file: .*{message}"):
        hf.model_config(base | change, "the file")


# --- what changes nothing, and the models that people ask for


@pytest.mark.parametrize("base", [QWEN, LLAMA, MOE], ids=["qwen3", "llama", "moe"])
def test_a_field_at_what_every_family_here_has_changes_nothing(base):
    inert = {"use_rms_norm": True, "position_embedding_type": "rope", "gated_mlp": True, "norm_type": "rmsnorm",
             "logits_to_keep": 0, "num_logits_to_keep": 1, "model_parallel": False, "scale_attn_weights": True,
             "scoring_func": "softmax", "moe_layer_freq": 1, "rms_norm_unit_offset": False}  # fmt: skip
    assert hf.model_config(base | inert, "f") == hf.model_config(base, "f")
    for key, value in {"use_rms_norm": False, "position_embedding_type": "alibi", "scoring_func": "sigmoid"}.items():
        with pytest.raises(UserError, match=f"unknown field {key}"):
            hf.model_config(base | {key: value}, "f")


@pytest.mark.parametrize("case", rows("cases.jsonl"), ids=lambda c: c["name"])
def test_a_published_field_that_changes_nothing_is_accepted(case):
    """Files that were refused once; what is read is what the same file says without such fields."""
    used = {
        k: v
        for k, v in case["config"].items()
        if k not in ("is_llama_config", "qkv_bias", "use_qk_norm", "pruned_heads")
    }
    assert hf.model_config(case["config"], "f") == hf.model_config(used, "f")


@pytest.mark.parametrize("row", rows("published.jsonl"), ids=lambda r: r["name"])
def test_a_published_model_is_read_or_refused_as_the_table_in_the_docs_says(row):
    """docs/students.md shows the count of parameters, or the error itself."""
    table = (HERE.parents[1] / "docs" / "students.md").read_text()
    try:
        cfg = hf.model_config(row["config"], "config.json")
        count = f"{model.num_params(cfg):,}"
        assert count.replace(",", "") == str(row["parameters"])
        said = f"read: {cfg.family}, {count} parameters"
    except UserError as error:
        assert not row["parameters"] and "\n" not in str(error) and len(str(error)) <= 300
        said = f"refused: {str(error).removeprefix('config.json: ')}"
    assert f"| {row['name']} | {said} |" in table


@pytest.mark.parametrize(
    ("base", "field"),
    [
        (base, field)
        for base in ("QWEN", "LLAMA", "MOE")
        for field in (
            {"image_token_id": 7},
            {"unk_token_id": 0},
            {"_commit_hash": "a"},
            {"trl_version": "0.9"},
            {"version": "1.1"},
            {"model_name": "x"},
            {"initializer_factor": 1.0},
            {"embedding_init_std": 0.1},
            {"transformers.js_config": {"a": 1}},
            {"anything_at_all": None},
            {"final_logit_softcapping": None},
            {"quantization_config": None},
            {"resid_pdrop": 0.0},
            {"hidden_dropout": 0},
            {"alibi": False},
            {"lm_head_bias": False},
            {"logits_scaling": 1.0},
            {"n_shared_experts": 0},
            {"auto_map": {"AutoModelForSequenceClassification": "m.C"}},
            {"hidden_act": "swish"},
            {"min_length": 0},
            {"attention_dropout": None},
            {"is_decoder": True},
            {"pruned_heads": {}},
        )
    ]
    + [
        ("QWEN", {"use_qk_norm": True}),
        ("MOE", {"qk_layernorm": True}),
        ("LLAMA", {"use_qk_norm": False}),
        ("QWEN", {"num_experts": 0}),
        ("QWEN", {"rope_scaling": {"rope_type": "default"}}),
        ("LLAMA", {"qkv_bias": False}),
        ("LLAMA", {"mlp_only_layers": []}),
        ("MOE", {"num_shared_experts": 0}),
        ("QWEN25", {"qkv_bias": True}),
        ("QWEN25", {"sliding_window": 131072}),
    ],
)
def test_names_token_ids_versions_nulls_and_what_is_off_change_nothing(base, field):
    assert hf.model_config(BASES[base] | field, "f") == hf.model_config(BASES[base], "f")


@pytest.mark.parametrize(
    ("base", "field"),
    [
        ("QWEN", {"use_qk_norm": False}),
        ("LLAMA", {"use_qk_norm": True}),
        ("LLAMA", {"qkv_bias": True}),
        ("QWEN25", {"qkv_bias": False}),
        ("LLAMA", {"rope_interleaved": True}),
        ("QWEN", {"alibi": True}),
        ("MOE", {"n_shared_experts": 1}),
        ("QWEN", {"num_experts": 8}),
        ("LLAMA", {"logits_scaling": 8.0}),
        ("LLAMA", {"embedding_multiplier": 12}),
        ("LLAMA", {"residual_multiplier": 0.22}),
        ("QWEN", {"resid_pdrop": 0.1}),
        ("LLAMA", {"no_rope_layers": [1, 1, 0, 1]}),
        ("QWEN", {"lm_head_bias": True}),
        ("QWEN", {"use_rope": False}),
        ("LLAMA", {"auto_map": {"AutoModelForCausalLM": "m.C"}}),
        ("LLAMA", {"pruned_heads": {"0": [1]}}),
        ("QWEN", {"dual_chunk_attention_config": {"chunk_size": 8}}),
        ("QWEN", {"attention_multiplier": 0.1}),
        ("LLAMA", {"quantization_config": {"quant_method": "fp8"}}),
        ("QWEN", {"layer_types": "sliding"}),
        ("QWEN", {"x" * 5000: {"y": "z" * 5000}}),
        ("LLAMA", {"hidden_size": 10**80}),
        ("QWEN", {"rope_theta": float("inf")}),
        ("QWEN", {"rms_norm_eps": float("nan")}),
        ("LLAMA", {"num_hidden_layers": 10**12}),
        ("QWEN", {"rope_theta": "1e6"}),
        ("LLAMA", {"rope_scaling": {"rope_type": ["llama3"]}}),
        ("MISTRAL", {"sliding_window": 4096}),
        ("LLAMA", {"model_type": {"a": 1}}),
        ("LLAMA", {"architectures": ["A\nB" * 900]}),
    ],
)
def test_what_changes_the_computation_is_one_short_line_that_names_it(base, field):
    where = "/a/long/path" * 30 + "/config.json"
    with pytest.raises(UserError) as error:
        hf.model_config(BASES[base] | field, where)
    message = str(error.value)
    assert len(message) <= 300 and "\n" not in message
    assert (
        next(iter(field))[:40].replace("architectures", "architecture") in message and "path/config.json: " in message
    )


def test_mistral_without_a_window_is_computed_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    sizes = hf_fixtures.SIZES | {"sliding_window": None}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).float().eval()
    theirs.save_pretrained(tmp_path)
    params, cfg = hf.load(tmp_path)
    token = np.arange(40)[None] % 90
    ours = jax.jit(lambda p, t: model.logits(p, cfg, model.hidden(p, cfg, t)))(params, token)
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(token)).logits, atol=2e-5)
    assert cfg.family == "llama" and dataclasses.asdict(cfg)["head_dim"] == sizes["head_dim"]
    left_out = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if k != "sliding_window"}
    with pytest.raises(UserError, match="sliding_window is missing"):
        hf_config.model_config(left_out, "f")
