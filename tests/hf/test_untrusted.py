"""Files that somebody else made: each is one line within bounds of time and memory, whatever is in it."""

import json
import resource
import time

import pytest
import tiny

from omniopd_jax import hf
from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded, safetensors

SECONDS = 10.0
ROOM = 1_000_000  # kB that a case may add to the process's peak


def header(value, **more) -> bytes:
    raw = value if isinstance(value, bytes) else json.dumps(value, **more).encode()
    return len(raw).to_bytes(8, "little") + raw


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


HEADERS = {
    "an empty file": b"",
    "seven bytes": b"\0" * 7,
    "a length past the end": (2**63).to_bytes(8, "little") + b"{}",
    "nested": header(b"[" * 1_000_000),
    "nested objects": header(b'{"a":' * 500_000),
    "digits": header(b'{"a": ' + b"9" * 1_000_000 + b"}"),
    "no JSON": header(b"\xff\xfe\x00"),
    "a list": header([1]),
    "a text": header('"x"'),
    "a null": header(None),
    "an entry that is none": header({"a": 3}),
    "an entry without a type": header({"a": {"shape": [1], "data_offsets": [0, 4]}}),
    "a type that is none": header(entry(dtype=["F32"])) + b"\0" * 4,
    "an unknown type": header(entry(dtype="F4")) + b"\0" * 4,
    "a shape that is none": header(entry(shape={"x": 1})) + b"\0" * 4,
    "a shape of floats": header(entry(shape=[1.5])) + b"\0" * 4,
    "an infinite shape": header(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}') + b"\0" * 4,
    "a shape of nothing": header(entry(shape=[0, 2**59])) + b"\0" * 4,
    "a negative shape": header(entry(shape=[-1])) + b"\0" * 4,
    "a truth as a size": header(entry(shape=[True])) + b"\0" * 4,
    "a million dimensions": header(entry(shape=[2] * 1_000_000)) + b"\0" * 4,
    "a size of 4,000 digits": header(
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 4]}}'
    ),
    "offsets past the end": header(entry(data_offsets=[0, 2**40], shape=[2**38])),
    "three offsets": header(entry(data_offsets=[0, 4, 8])),
    "overlapping": header(entry() | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
    "a gap": header(entry(data_offsets=[4, 8])) + b"\0" * 8,
}


def one_line_within_bounds(call, *said):
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert time.perf_counter() - begun < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ROOM
    for text in said:
        assert text in message, message


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_a_safetensors_header(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    one_line_within_bounds(lambda: safetensors.header(file), str(file))


def test_a_header_larger_than_the_format_allows(tmp_path):
    """The file has that many bytes: a sparse one costs its maker nothing, and us no reading."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as f:
        f.write((50 << 30).to_bytes(8, "little") + b"{")
        f.truncate(51 << 30)
    one_line_within_bounds(lambda: safetensors.header(file), "a header of 53,687,091,200 bytes", "100,000,000")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted") / "m"
    hf.save(folder, *tiny.random_model(tiny.VOCAB, 0), tiny.tokenizer())
    hf.load_tokenizer(folder)  # imports what takes seconds, outside the bounds
    return folder


@pytest.fixture
def edited(student, tmp_path):
    """edited(file, content) -> the student's folder with that file's content changed."""
    import shutil

    def edit(name, content):
        shutil.copytree(student, tmp_path / "m")
        if isinstance(content, dict):
            content = json.dumps(json.loads((tmp_path / "m" / name).read_text()) | content).encode()
        (tmp_path / "m" / name).write_bytes(content)
        return tmp_path / "m"

    return edit


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2**31 - 1},
        {"hidden_size": 2**30, "num_attention_heads": 2**20},
        {"vocab_size": 2**31 - 1},
        {"intermediate_size": 2**31 - 1},
        {"head_dim": 2**30},
        {"num_hidden_layers": 10**40},
        {"vocab_size": 10**4000},
        {"num_hidden_layers": 0},
        {"hidden_size": -1},
    ],
    ids=str,
)
def test_layers_and_widths_against_the_files_real_size(edited, fields):
    """A billion layers are not enumerated, and nothing of that size is made."""
    folder = edited("config.json", fields)
    one_line_within_bounds(lambda: hf.load(folder), str(folder))


def test_a_billion_experts(tmp_path):
    import dataclasses

    from omniopd_jax import model

    cfg = dataclasses.replace(
        tiny.random_model(tiny.VOCAB, 0)[1], family="qwen3_moe", num_experts=10**9, experts_per_token=2, expert_size=8
    )
    tensors = {"model.embed_tokens.weight": safetensors.Tensor(tmp_path, None, None, (tiny.VOCAB, 32), 0)}
    one_line_within_bounds(lambda: safetensors.check(tensors, model.table(cfg), cfg, tmp_path), "not one model")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"[" * 500_000, "nested too deep"),
        ("config.json", b'{"hidden_size": ' + b"9" * 100_000 + b"}", "not JSON"),
        ("config.json", b"\xff\xfe{\0}\0", "not UTF-8"),
        ("config.json", b"[1]", "not a JSON object"),
        ("config.json", b'{"architectures": {"a": 1}}', "architecture"),
        ("config.json", b'{"architectures": ["Qwen3ForCausalLM"], "hidden_size": {"a": 1}}', "hidden_size"),
        ("config.json", {"rope_scaling": {"rope_type": {"a": 1}}}, "rope_type"),
        ("config.json", {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor"),
        ("config.json", {"rope_theta": 1e400}, "rope_theta"),
        ("tokenizer.json", b"{" * 100_000, "cannot read the tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "cannot read the tokenizer"),
        ("tokenizer_config.json", b"[" * 100_000, "cannot read the tokenizer"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_students_small_files(edited, name, content, said):
    folder = edited(name, content)
    one_line_within_bounds(lambda: (hf.load(folder), hf.load_tokenizer(folder)), said)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../../etc/passwd"}}, {"weight_map": {"a": 3}}, {"weight_map": []}, {},
        {"weight_map": {"a": "/dev/zero"}}, {"weight_map": {"a": "model\x00.safetensors"}},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_that_points_elsewhere(tmp_path, index):
    (tmp_path / safetensors.INDEX).write_text(json.dumps(index))
    one_line_within_bounds(lambda: safetensors.find(tmp_path), safetensors.INDEX)


def test_a_json_file_that_is_larger_than_such_a_file_is(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as f:
        f.truncate(20 << 30)
    one_line_within_bounds(lambda: bounded.read_json(file, 1_000_000), "larger than 1,000,000 bytes")
    one_line_within_bounds(lambda: bounded.read_json(tmp_path), "cannot be read")


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window_pattern": 0, "full_attention_interval": 0},
        {"rope_parameters": 5},
        {"rope_parameters": {"full_attention": 3}, "rope_scaling": "x"},
        {"rope_scaling": "x"},
        {"query_pre_attn_scalar": "x", "partial_rotary_factor": "x"},
        {"query_pre_attn_scalar": 0, "partial_rotary_factor": float("nan")},
        {"rope_local_base_freq": "x", "partial_rotary_factor": 2},
        {"num_hidden_layers": 10**9},
        {"layer_types": [[1]] * 4},
    ],
    ids=str,
)
def test_what_families_of_several_layer_kinds_read_is_checked(fields, family):
    names = {"gemma3": "Gemma3ForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM"}
    plain = {
        "architectures": [names[family]], "model_type": f"{family}_text", "vocab_size": 99, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    assert hf.model_config(plain, "here").family == family
    one_line_within_bounds(lambda: hf.model_config(plain | fields, "here"), "here")
