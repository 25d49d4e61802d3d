"""A base student and a base teacher, neither with a chat template, through the whole loop."""

import shutil

import jax
import pytest
import tiny

from omniopd_jax import export, hf, model, train
from omniopd_jax.errors import UserError
from omniopd_jax.hf.published import PUBLISHED
from omniopd_jax.hf.tokenizer import positions
from omniopd_jax.parallel import sharding
from omniopd_jax.run import preflight
from omniopd_jax.run.host import AsyncThread


@pytest.fixture(scope="module")
def base_models(tmp_path_factory):
    """Student and teacher folders without chat templates."""
    folders = tiny.make_folders(tmp_path_factory.mktemp("base"))
    for folder in folders:
        (folder / "chat_template.jinja").unlink()
    return folders


def check(cfg):
    thread = AsyncThread()
    try:
        return preflight.check(cfg, thread)
    finally:
        thread.close()


def test_a_base_model_without_a_format_is_one_line_each(base_models, tmp_path):
    """Today's traceback; the student's and the teacher's alike, before a weight is read."""
    with pytest.raises(UserError) as caught:
        check(tiny.recipe(*base_models, tmp_path / "run"))
    lines = str(caught.value).split("\n")
    assert len(lines) == 2
    for who, line in zip(("student", "teacher"), lines):
        assert (
            line.startswith(f"the {who}'s tokenizer has no chat template") and f"set {who}.template = 'plain'" in line
        )


def test_positions_that_a_file_counts_stretched_are_not_stretched_again():
    llama = model.ModelConfig("llama", 8, 8, 8, 1, 1, 1, 8, rope_scaling=(("factor", 8.0), ("rope_type", "linear")))
    assert positions(llama) == 8 * llama.max_positions
    assert positions(PUBLISHED["google/gemma-3-4b-it"]) == 131_072


def test_lengths_and_tokenizers_that_do_not_go_with_a_model_are_found_before_its_weights(base_models, tmp_path):
    plain = {"student.template": "plain", "teacher.template": "plain"}
    with pytest.raises(UserError, match=r"student\.path: the model has 256 positions .* = 384"):
        check(tiny.recipe(*base_models, tmp_path / "run", **plain | {"max_prompt_length": 360}))
    student, teacher = base_models
    shutil.copytree(teacher, tmp_path / "teacher")
    tok = hf.load_tokenizer(teacher)
    tok.add_tokens(["<|new|>"])
    tok.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"teacher\.model: the tokenizer's token '<\|new\|>' has the id 320"):
        check(tiny.recipe(student, tmp_path / "teacher", tmp_path / "run", **plain))


@pytest.mark.slow  # compiles a whole step
def test_a_base_student_learns_from_a_base_teacher(base_models, tmp_path):
    """In the plain format, the teacher after worked examples: audits are made, and the export keeps what ends an
    answer."""
    cfg = tiny.recipe(
        *base_models,
        tmp_path / "run",
        num_steps=1,
        **{
            "student.template": "plain",
            "teacher.template": "plain",
            "student.stop_strings": ("e",),
            "prompts_per_step": 8,
            "num_generations": 1,
            "rollout.parts": 1,
            "teacher.preamble": "Question: 1 + 1?\nAnswer: 2",
            "checkpoint.every": 1,
        },
    )
    seen = []
    real = train.experience.sample

    def spy(*args):
        for part in real(*args):
            seen.append(part)
            yield part

    mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:  # one device compiles in a third of the time of eight
        patch.setattr(sharding, "make_mesh", lambda sizes, devices=None: mesh(sizes, devices or jax.devices()[:1]))
        patch.setattr(train.experience, "sample", spy)
        assert train.train(cfg)["exit_code"] == 0
    (responses,) = seen
    tok = hf.load_tokenizer(base_models[0])
    texts = [tok.decode(row) for row in responses.tokens]
    stopped = [t for t in texts if "e" in t]
    assert stopped and all("e" not in tok.decode(row[:-1]) for row in responses.tokens), (
        "cut at the token that completes it"
    )
    for row, text, finished in zip(responses.tokens, texts, responses.finished_B, strict=True):
        assert finished == ("e" in text or row[-1] == tok.eos_token_id)
    audits = tiny.lines(next((tmp_path / "run").glob("audits*.jsonl")))
    assert audits and all(a["chunk"] and "e" not in a["chunk"] for a in audits)
    assert not any("e" in c for a in audits for c in a["continuations"]) or cfg.teacher.stop_strings == ()
    out = export.export(tmp_path / "run", tmp_path / "out")
    assert hf.end_ids(out, hf.load_tokenizer(out)) == (tok.eos_token_id,)
    asked = [{"role": "user", "content": "1 + 1?"}]
    served = hf.load_tokenizer(out).apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert served == "Question: 1 + 1?\nAnswer:", "whoever serves it asks in the format that it was trained in"
