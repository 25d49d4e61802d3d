"""Hugging Face folders: bit-exact round trips, sharded loading, one clear error for each broken file."""

import dataclasses
import json
import socket
import subprocess
import sys

import hf_fixtures
import jax
import numpy as np
import pytest
from hf_params import BASE, random_params, same_bits
from safetensors.numpy import load_file, save_file

from omniopd_jax import hf, model
from omniopd_jax.errors import UserError
from omniopd_jax.hf import safetensors
from omniopd_jax.parallel import sharding

LLAMA3 = tuple(sorted({k: v for k, v in hf_fixtures.ROPE["llama3"].items() if k != "rope_theta"}.items()))
FAMILIES = {
    "qwen3": BASE,
    "qwen2": dataclasses.replace(BASE, family="qwen2", qk_norm=False, qkv_bias=True, tied=False),
    "llama": dataclasses.replace(
        BASE, family="llama", qk_norm=False, qkv_bias=True, out_bias=True, rope_scaling=LLAMA3
    ),
    "qwen3_moe": dataclasses.replace(
        BASE, family="qwen3_moe", tied=False, num_experts=4, experts_per_token=2, expert_size=6, normalize_experts=False
    ),
}


def edit(folder, change, file=safetensors.SINGLE):
    """Rewrites a safetensors file with `change(tensors)` applied."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- round trips


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_load_export_load_is_bit_exact(family, dtype, tmp_path):
    cfg = FAMILIES[family]
    hf.save(tmp_path / "a", random_params(cfg), cfg, dtype=dtype)
    params, loaded = hf.load(tmp_path / "a")
    assert loaded == cfg and all(a.dtype == np.float32 for a in jax.tree.leaves(params))
    hf.save(tmp_path / "b", params, loaded, dtype=dtype)
    assert hf_fixtures.files(tmp_path / "a") == hf_fixtures.files(tmp_path / "b")
    again, _ = hf.load(tmp_path / "b")
    assert same_bits(params, again)
    if dtype == "float32":
        assert same_bits(jax.tree.map(np.asarray, params), random_params(cfg))


def test_the_layout_is_the_tables(folder):
    """One tensor by hand: rows of q_proj are head-major, and the leaf is [layer, D, N, H]."""
    raw = load_file(folder / safetensors.SINGLE)
    params, cfg = hf.load(folder)
    q = raw["model.layers.1.self_attn.q_proj.weight"]
    N, H = cfg.num_heads, cfg.head_dim
    np.testing.assert_array_equal(params["layers"]["q"][1][:, 2, 3], q[2 * H + 3])
    o = raw["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["o"][0][1, 5], o[:, 1 * H + 5])
    assert params["layers"]["q"].shape == (2, 16, N, H) and "lm_head.weight" not in raw


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_shards_with_an_index(family, tmp_path):
    cfg = FAMILIES[family]
    hf.save(tmp_path / "one", random_params(cfg), cfg)
    hf.save(tmp_path / "many", random_params(cfg), cfg, shard_bytes=3000)
    index = json.loads((tmp_path / "many" / safetensors.INDEX).read_text())
    files = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 2 * model.num_params(cfg)
    assert same_bits(hf.load(tmp_path / "one")[0], hf.load(tmp_path / "many")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mesh_reads_each_part_once_and_holds_the_same(family, tmp_path, monkeypatch):
    cfg = FAMILIES[family]
    hf.save(tmp_path / "m", random_params(cfg), cfg)
    whole, _ = hf.load(tmp_path / "m")
    read, true_read = [], safetensors.read
    monkeypatch.setattr(safetensors, "read", lambda *a, **k: read.append(true_read(*a, **k)) or read[-1])
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tp": 2})
    with jax.transfer_guard("disallow"):
        params, _ = hf.load(tmp_path / "m", mesh=mesh)
    assert sum(a.size for a in read) == model.num_params(cfg)
    wanted = model.param_shardings(cfg, mesh)
    assert all(a.sharding == s for a, s in zip(jax.tree.leaves(params), jax.tree.leaves(wanted)))
    assert same_bits(whole, params)
    with jax.transfer_guard("disallow"):
        hf.save(tmp_path / "again", params, cfg)  # from the mesh
    assert hf_fixtures.files(tmp_path / "m") == hf_fixtures.files(tmp_path / "again")


def test_dtype_of_the_parameters(folder):
    params, _ = hf.load(folder, dtype="bfloat16")
    assert {str(a.dtype) for a in jax.tree.leaves(params)} == {"bfloat16"}


def test_loading_needs_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from omniopd_jax import hf; hf.load(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'tensorflow') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=hf_fixtures.CHILD_ENV)
    assert done.stdout.strip() == "[]", done.stderr


# --- broken checkpoints: one clear error, and no tensor read


@pytest.fixture
def refused(monkeypatch):
    """refused(folder, *patterns): loading is a UserError of one line that matches all, before any tensor was read."""

    def check(folder, *patterns):
        monkeypatch.setattr(safetensors, "read", lambda *a, **k: pytest.fail("a tensor was read"))
        with pytest.raises(UserError) as error:
            hf.load(folder)
        assert "\n" not in str(error.value)
        for pattern in patterns:
            assert pattern in str(error.value), str(error.value)

    return check


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor(folder, refused):
    edit(folder, lambda t: t.pop(K_PROJ))
    refused(folder, str(folder), K_PROJ, "missing")


def test_an_extra_tensor(folder, refused):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.extra.bias": np.zeros(3, np.float32)}))
    refused(folder, safetensors.SINGLE, "model.layers.0.self_attn.extra.bias", "no parameter")


def test_a_tensor_of_the_wrong_shape(folder, refused):
    edit(folder, lambda t: t.update({K_PROJ: t[K_PROJ].T.copy()[:, :8]}))
    refused(folder, safetensors.SINGLE, K_PROJ, "[16, 8]", "[16, 16]")


def test_a_layer_too_many_in_the_config(folder, refused):
    edit_config(folder, num_hidden_layers=3)
    refused(folder, "model.layers.2.")


def test_a_layer_too_few_in_the_config(folder, refused):
    edit_config(folder, num_hidden_layers=1)
    refused(folder, "model.layers.1.", "no parameter", "more:")


@pytest.mark.parametrize("keep", [0.9, 0.3])
def test_a_truncated_file(folder, refused, keep):
    content = (folder / safetensors.SINGLE).read_bytes()
    (folder / safetensors.SINGLE).write_bytes(content[: int(len(content) * keep)])
    refused(folder, str(folder / safetensors.SINGLE), "truncated", "tensor model.")


def test_a_file_cut_inside_its_header(folder, refused):
    content = (folder / safetensors.SINGLE).read_bytes()
    (folder / safetensors.SINGLE).write_bytes(content[:100])
    refused(folder, str(folder / safetensors.SINGLE), "truncated")
    (folder / safetensors.SINGLE).write_bytes(b"")
    refused(folder, str(folder / safetensors.SINGLE), "truncated")


def test_garbage_and_a_changed_header(folder, refused):
    content = (folder / safetensors.SINGLE).read_bytes()
    (folder / safetensors.SINGLE).write_bytes(content.replace(b'"F32"', b'"F16"', 1))
    refused(folder, safetensors.SINGLE, "do not fit")
    (folder / safetensors.SINGLE).write_bytes(content + b"tail")
    refused(folder, safetensors.SINGLE, "4 bytes after")
    (folder / safetensors.SINGLE).write_bytes(b"\x08" + 7 * b"\0" + b"not json")
    refused(folder, safetensors.SINGLE, "header cannot be read")


def test_a_number_format_that_is_not_read(folder, refused):
    edit(folder, lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.float64)}))
    refused(folder, safetensors.SINGLE, K_PROJ, "F64")


def test_pickles_adapters_and_nothing(folder, refused):
    (folder / safetensors.SINGLE).unlink()
    refused(folder, str(folder), "neither model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "PEFT adapter")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(folder, str(folder / "pytorch_model.bin"), "pickle")


def test_a_tied_head_may_be_stored_twice_only_if_it_is_the_same(folder, refused):
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    hf.load(folder)

    def change(t):
        t["lm_head.weight"][-1, -1] += 1

    edit(folder, change)
    refused(folder, "lm_head.weight differs", "tie_word_embeddings")


def test_shards_that_do_not_match_their_index(tmp_path, refused):
    here = tmp_path / "m"
    hf.save(here, random_params(BASE), BASE, shard_bytes=3000)
    index = json.loads((here / safetensors.INDEX).read_text())
    file = index["weight_map"][K_PROJ]
    tensors = load_file(here / file)
    save_file({k: v for k, v in tensors.items() if k != K_PROJ}, here / file)
    refused(here, file, K_PROJ, "missing")
    save_file(tensors | {"stray": np.zeros(1, np.float32)}, here / file)
    refused(here, file, "stray")
    (here / file).unlink()
    refused(here, safetensors.INDEX, file)
    (here / safetensors.INDEX).write_text("[")
    refused(here, safetensors.INDEX, "not JSON")


def test_no_config_and_no_folder(folder, tmp_path):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
        hf.load(folder)
    with pytest.raises(UserError, match="teacher.model = .*no such folder"):
        hf.load(tmp_path / "nowhere", setting="teacher.model")
    with pytest.raises(UserError, match="is a file"):
        hf.load(folder / safetensors.SINGLE)
    with pytest.raises(UserError, match="student.path is empty"):
        hf.read_config("")


def test_a_hub_name_out_of_reach(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("Name or service not known\nat length")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"'Qwen/Qwen3-0.6B'.*not known\); set student.path to a local folder"):
        hf.read_config("Qwen/Qwen3-0.6B")


# --- saving


def test_saving_replaces_an_export_and_nothing_else(folder, tmp_path):
    other = random_params(BASE, seed=1)
    hf.save(folder, other, BASE, dtype="float32")
    assert same_bits(jax.tree.map(np.asarray, hf.load(folder)[0]), other)
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no Hugging Face folder"):
        hf.save(busy, other, BASE)
    with pytest.raises(UserError, match="dtype = 'int8'"):
        hf.save(folder, other, BASE, dtype="int8")


def test_a_save_that_fails_leaves_all_as_it_was(folder):
    class Broken:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, folder):
            raise OSError("disk full")

    before = hf_fixtures.files(folder)
    with pytest.raises(OSError, match="disk full"):
        hf.save(folder, random_params(BASE, seed=1), BASE, Broken())
    assert hf_fixtures.files(folder) == before
    assert [f.name for f in folder.parent.iterdir()] == ["m"]


def test_how_a_run_computes_is_not_saved(folder):
    facts, ways = ({f.name for f in dataclasses.fields(c)} for c in (model.ModelConfig, model.Compute))
    assert not facts & ways
    hf.save(folder, random_params(BASE), BASE)
    assert hf.read_config(folder) == BASE
    with pytest.raises(ValueError, match="no config.json"):
        hf.save(folder, random_params(BASE), dataclasses.replace(BASE, qk_norm=False))


def test_tokenizer_chat_template_and_generation_config(folder):
    tokenizer = hf_fixtures.tokenizer()
    with pytest.raises(UserError, match="no tokenizer"):
        hf.load_tokenizer(folder)
    hf.save(
        folder, random_params(BASE), BASE, tokenizer, generation_config={"temperature": 0.6, "eos_token_id": [2, 7]}
    )
    again = hf.load_tokenizer(folder)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert again("The answer").input_ids == tokenizer("The answer").input_ids
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "eos_token_id": [2, 7]}, "nothing is added"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [2, 7]
    assert hf.end_ids(folder, again) == (2, 7)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        hf.load_tokenizer(folder)


# --- transformers opens what we write


@pytest.mark.parametrize(
    ("family", "rope"), [("qwen3", "yarn"), ("qwen2", "linear"), ("llama", "llama3"), ("qwen3_moe", "none")]
)
def test_transformers_opens_the_export_with_equal_logits(family, rope, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    reference = hf_fixtures.torch_checkpoint(tmp_path / "theirs", family, rope=rope, tie_word_embeddings=rope == "yarn")
    params, cfg = hf.load(tmp_path / "theirs")
    hf.save(tmp_path / "ours", params, cfg, dtype="float32", shard_bytes=20_000)
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert opened.config.rope_parameters == reference.config.rope_parameters
    token = torch.arange(100)[None] % 90
    with torch.no_grad():
        assert torch.equal(opened(token).logits, reference(token).logits)


# --- several processes

TWO = """
import os, sys
os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")
import jax
from omniopd_jax import hf, model
from omniopd_jax.hf import safetensors
from omniopd_jax.parallel import sharding
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
read, true_read = [], safetensors.read
safetensors.read = lambda *a, **k: read.append(true_read(*a, **k)) or read[-1]
mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tp": 2})  # fsdp lies across the two processes
params, cfg = hf.load(sys.argv[3], mesh=mesh)
print("share", sum(a.size for a in read) / model.num_params(cfg))
hf.save(sys.argv[4], params, cfg, dtype="float32", shard_bytes=10_000)
print("there", os.path.isfile(os.path.join(sys.argv[4], "config.json")))
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_read_their_part_and_write_one_folder(folder, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    args = [port, "{}", str(folder), str(tmp_path / "out")]
    commands = [[sys.executable, "-c", TWO, *(a.format(i) for a in args)] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": hf_fixtures.CHILD_ENV}
    runs = [subprocess.Popen(command, **pipes) for command in commands]
    for run in runs:
        out, err = run.communicate(timeout=180)
        assert run.returncode == 0, err
        shares = [float(line.split()[1]) for line in out.splitlines() if line.startswith("share")]
        assert shares[0] < 0.6, out  # half of it, and the norms whole
        assert "there True" in out
    assert same_bits(hf.load(folder)[0], hf.load(tmp_path / "out")[0])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m", "out"]
