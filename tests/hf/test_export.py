"""A run's checkpoint as a Hugging Face folder: parameters read alone, every end token, files that other readers
open."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from pathlib import Path

import hf_fixtures
import jax
import numpy as np
import pytest
from hf_params import BASE, random_params, same_bits
from ml_collections import FrozenConfigDict
from tokenizers import processors

from omniopd_jax import config, export, hf, model, step
from omniopd_jax.errors import UserError
from omniopd_jax.hf import layered, placed
from omniopd_jax.hf.template import of_student
from omniopd_jax.model import lora
from omniopd_jax.parallel import sharding
from omniopd_jax.run import identity
from omniopd_jax.run import trained as trained_run
from omniopd_jax.run.checkpoint import Checkpoints

# --- the command


def test_export_names_a_run_or_one_of_its_steps(tmp_path):
    assert trained_run.locate(tmp_path) == (tmp_path, None)
    assert trained_run.locate(tmp_path / "checkpoints") == (tmp_path, None)
    assert trained_run.locate(tmp_path / "checkpoints" / "12") == (tmp_path, 12)


def run_of(folder, trained, tmp_path, **student):
    """A run directory with one checkpoint, of the student in `folder`."""
    checkpoints = Checkpoints(tmp_path / "run", keep=5)
    state = step.new_state(trained, FrozenConfigDict(config.default()), jax.random.key(0))
    checkpoints.save(state.replace(step=jax.numpy.int32(7)), {})
    checkpoints.close()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"student": {"path": str(folder)} | student}))
    return tmp_path / "run"


def test_export_of_a_checkpoint(folder, tmp_path):
    """A student whose template ends a turn with a token that its own files do not name, and no generation_config."""
    tokenizer = hf_fixtures.tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    hf.save(folder, random_params(BASE), BASE, tokenizer)
    trained = jax.tree.map(jax.numpy.asarray, random_params(BASE, seed=3))
    run = run_of(folder, trained, tmp_path)
    umask = os.umask(0o077)
    try:
        out = export.export(run / "checkpoints" / "7", tmp_path / "out", dtype="float32")
    finally:
        os.umask(umask)
    assert same_bits(hf.load(out)[0], trained)
    assert {oct(f.stat().st_mode)[-3:] for f in out.iterdir()} == {"644"} and oct(out.stat().st_mode)[-3:] == "755"
    assert not (out / "generation_config.json").exists()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [0, 2]
    assert hf.end_ids(out, hf.load_tokenizer(out)) == (0, 2)
    again = hf.load_tokenizer(out)
    assert again.chat_template == tokenizer.chat_template and "<|extra|>" in again.all_special_tokens
    assert again("a<|extra|>b").input_ids == tokenizer("a<|extra|>b").input_ids
    written = json.loads((out / "tokenizer_config.json").read_text())  # as transformers 4 reads it
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and written["additional_special_tokens"] == [
        "<|extra|>"
    ]
    assert not {"extra_special_tokens", "backend"} & written.keys()
    wider = dataclasses.replace(BASE, hidden_size=32)
    hf.save(folder, random_params(wider), wider, tokenizer)
    with pytest.raises(UserError, match="not trained from the model in"):
        export.export(run, tmp_path / "out2")


def test_generation_defaults_are_the_students_with_every_end_token(folder, tmp_path):
    generation = {"temperature": 0.6, "eos_token_id": 0}
    hf.save(folder, random_params(BASE), BASE, hf_fixtures.tokenizer(), generation_config=generation)
    run = run_of(folder, random_params(BASE), tmp_path, template="plain")
    out = export.export(run, tmp_path / "out")
    assert hf.generation_config(out) == {"temperature": 0.6, "eos_token_id": [0, 2]}
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')  # whose reader would never stop
    assert hf.generation_config(export.export(run, out)) == {"temperature": 0.6, "eos_token_id": [0, 2]}


def test_end_tokens_of_a_wrapper_s_text_model_count_and_its_own_are_replaced(folder):
    hf.save(folder, random_params(BASE), BASE)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1, "text_config": {"eos_token_id": [5, 7]}}))
    assert hf.end_ids(folder) == (1, 5, 7)
    source = json.loads((folder / "config.json").read_text())
    around = layered.around({"eos_token_id": [1, 9], "dtype": "float32"}, source)
    assert around["eos_token_id"] == around["text_config"]["eos_token_id"] == [1, 9]


def test_an_adapter_s_tokenizer_opens_in_transformers_4_too(tmp_path):
    hf.save_adapters(tmp_path / "out", {}, {}, {}, hf_fixtures.tokenizer())
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_reading_a_checkpoint_reads_its_parameters_alone(tmp_path):
    """On the host as numpy, or each device its part; of the bytes a third, for the rest are the optimizer's moments."""
    rng = np.random.default_rng(0)
    cfg = dataclasses.replace(BASE, vocab_size=20_000, hidden_size=64)
    trained = jax.tree.map(
        lambda p: rng.standard_normal(p.shape).astype(np.float32), model.table(cfg), is_leaf=model.is_param
    )
    state = step.new_state(
        jax.tree.map(jax.numpy.asarray, trained), FrozenConfigDict(config.default()), jax.random.key(0)
    )
    noise = jax.tree.map(lambda a: jax.numpy.asarray(rng.standard_normal(a.shape).astype(a.dtype)), state.opt_state)
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, keep=1)
    checkpoints.save(state.replace(opt_state=noise, step=jax.numpy.int32(1)), {})
    checkpoints.close()
    hf.save(tmp_path / "m", trained, cfg)
    (run / "config.json").write_text(json.dumps({"student": {"path": str(tmp_path / "m")}}))

    def read_bytes():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_bytes()
    got = trained_run.read(run, None)
    assert read_bytes() - before < 1.5 * 4 * model.num_params(cfg)
    assert all(type(a) is np.ndarray for a in jax.tree.leaves(got.params)) and same_bits(got.whole(), trained)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tp": 2})
    params = trained_run.read(run, 1, mesh).whole(mesh)
    assert same_bits(params, trained)
    wanted = model.param_shardings(cfg, mesh)
    assert all(a.sharding == s for a, s in zip(jax.tree.leaves(params), jax.tree.leaves(wanted)))


def test_the_export_command_on_a_run_of_two_checkpoints(folder, tmp_path, params, model_cfg, make_cfg):
    """The real Orbax files; the newest step unless one is named; a wrong call is one line and exit code 2."""
    hf.save(folder, params, model_cfg, hf_fixtures.tokenizer())
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, keep=5)
    for number in (3, 5):
        grown = jax.tree.map(lambda a, number=number: a * number, params)
        state = step.new_state(grown, make_cfg(), jax.random.key(0))
        checkpoints.save(state.replace(step=jax.numpy.int32(number)), {})
    checkpoints.close()
    (run / "config.json").write_text(json.dumps({"student": {"path": str(folder)}}))
    for source, number in ((run, 5), (run / "checkpoints" / "3", 3)):
        export.export(source, tmp_path / "out", dtype="float32")
        assert same_bits(hf.load(tmp_path / "out")[0], jax.tree.map(lambda a, number=number: a * number, params))
    with pytest.raises(UserError, match="no step 4"):
        export.export(run / "checkpoints" / "4", tmp_path / "out")


# --- what an export needs to be used

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": " 2 + 2?"}]  # fmt: skip
TEMPLATE = (
    "  {% for m in messages %}\n<<{{ m['role'] }}>>{{ m['content'] }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}<<assistant>>{{ mood }}{% endif %}"
)


@pytest.mark.parametrize("start", [False, True], ids=["", "with a start token"])
@pytest.mark.parametrize("student", [
    {"template": "plain"}, {"template": "my.jinja"}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"template": "my.jinja", "chat_template_kwargs": {"mood": "it's \n fine", "n": [1, None, True]}},
], ids=["plain", "a file", "kwargs", "a file with kwargs"])  # fmt: skip
def test_an_export_s_template_is_the_one_that_the_run_was_trained_with(folder, tmp_path, student, start, monkeypatch):
    """As transformers renders it, told nothing of the run; the Jinja file is gone by then, its text the run's."""
    tokenizer = hf_fixtures.tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    if start:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    thinks = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    tokenizer.chat_template += thinks
    hf.save(folder, random_params(BASE), BASE, tokenizer)
    run = run_of(folder, random_params(BASE), tmp_path, **student)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("my.jinja").write_text(TEMPLATE)
    c = config.default()
    c.student.update(student)
    trained_with = of_student(c, hf.load_tokenizer(folder))
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"student_template": TEMPLATE}))
    pathlib.Path("my.jinja").unlink()
    again = hf.load_tokenizer(export.export(run, tmp_path / "out"))
    wanted = trained_with.render(TALK)
    assert again.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == wanted
    assert again.chat_template != tokenizer.chat_template
    told = again.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert (told == wanted) == ("enable_thinking" not in student.get("chat_template_kwargs", {}))


def test_a_run_keeps_its_template_s_text(tmp_path):
    c, file = config.default(), tmp_path / "config.json"
    for template, kept in (("chat", None), ("plain", None), ("my.jinja", TEMPLATE)):
        c.student.template = template
        identity.write(c, {}, file, TEMPLATE)
        assert json.loads(file.read_text()).get("student_template") == kept
        identity.check_same_run(c, {}, file)


def test_an_export_has_the_licence_and_a_wrapper_what_its_images_need(folder, tmp_path):
    hf.save(folder, random_params(BASE), BASE, hf_fixtures.tokenizer())
    (folder / "LICENSE.md").write_text("terms")
    (folder / "preprocessor_config.json").write_text("{}")
    out = export.export(run_of(folder, random_params(BASE), tmp_path), tmp_path / "out")
    assert (out / "LICENSE.md").read_text() == "terms" and not (out / "preprocessor_config.json").exists()


def test_a_hub_model_comes_with_its_licence_and_stays_the_same_without(folder, monkeypatch):
    """Licences were not downloaded once: a run from then goes on."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(how) or str(folder))
    hf.save(folder, random_params(BASE), BASE)
    before = identity.folder_digest("Owner/Model")
    (folder / "LICENSE").write_text("terms")
    assert identity.folder_digest("Owner/Model") == before != ""
    assert any(pathlib.PurePath("LICENSE").match(name) for name in asked[0]["allow_patterns"])
    (folder / "config.json").write_text("{}")
    assert identity.folder_digest("Owner/Model") != before


# --- what an export may replace


def test_an_export_never_replaces_its_run_or_a_model_that_the_run_names(folder, tmp_path):
    hf.save(folder, random_params(BASE), BASE, hf_fixtures.tokenizer())
    run = run_of(folder, random_params(BASE), tmp_path)
    config_file = run / "config.json"
    teacher = tmp_path / "teacher"
    hf.save(teacher, random_params(BASE), BASE)
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"teacher": {"model": str(teacher)}}))
    (run / placed.MARK).touch()  # nor where it looks like an export
    (tmp_path / placed.MARK).touch()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(folder)
    for out in (run, run / "..", folder, teacher, link, run / "checkpoints"):
        with pytest.raises(UserError, match="give an empty or a new one"):
            export.export(run, out)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", placed.OF_A_RUN)
def test_a_run_is_never_replaced(name, folder, tmp_path):
    """Another run than the source, whatever else stands in its folder."""
    (folder / name).mkdir()
    with pytest.raises(UserError, match=f"holds a run \\({name}\\)"):
        hf.save(folder, random_params(BASE), BASE)
    assert (folder / "model.safetensors").is_file()


def test_exports_from_before_the_mark_are_replaced_and_other_models_are_not(folder, tmp_path):
    """`folder` as an earlier version left it; then with what no export ever held."""
    (folder / placed.MARK).unlink()
    hf.save(folder, random_params(BASE, seed=1), BASE, hf_fixtures.tokenizer())
    assert (folder / placed.MARK).is_file()
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_model.safetensors").touch()
    settings = config.default().lora
    (adapters / "adapter_config.json").write_text(json.dumps(lora.peft_config(settings, "base")))
    placed.check(adapters)
    theirs = lora.peft_config(settings, "base") | {"peft_version": "0.18.0"}
    (adapters / "adapter_config.json").write_text(json.dumps(theirs))
    with pytest.raises(UserError, match="no Hugging Face folder that omniopd_jax exported"):
        placed.check(adapters)
    (folder / placed.MARK).unlink()
    for name in ("LICENSE", "my_notes.txt"):
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match="no Hugging Face folder that omniopd_jax exported"):
            hf.save(folder, random_params(BASE), BASE)
        (folder / name).unlink()
    config_file = folder / "config.json"
    by_transformers = {k: v for k, v in json.loads(config_file.read_text()).items() if k != "torch_dtype"}
    config_file.write_text(json.dumps(by_transformers))
    with pytest.raises(UserError, match="no Hugging Face folder that omniopd_jax exported"):
        hf.save(folder, random_params(BASE), BASE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "--checkpoint is missing"), (["--checkpoint=x", "--out=y"], "not a run"), (["--chekpoint=x"], "chekpoint")],
)
def test_a_wrong_export_command_is_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "omniopd_jax.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=hf_fixtures.CHILD_ENV)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
