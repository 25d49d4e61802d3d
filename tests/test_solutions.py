"""Whole solutions: from the prompts file without a teacher, and from a teacher once for all epochs."""

import json

import numpy as np
import pytest
import tiny

from omniopd_jax import experience, hf, solutions, train
from omniopd_jax.errors import UserError
from omniopd_jax.run import checkpoint, reporting


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    tiny.on_one_device(monkeypatch)


def recipe(models, folder, rows, **more):
    """A run of sft over a file of these rows."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "objective.name": "sft",
        "anchor.kl_coef": 0.0,
        "data.source": "jsonl",
        "data.name": "",
        "data.path": str(file),
        "data.num_prompts": 0,
        "num_generations": 1,
        "num_steps": 2,
        "teacher.provider": "openai",
        "teacher.model": "nobody",
        "teacher.base_url": "http://127.0.0.1:9/v1",
    }
    return tiny.recipe(*models, folder / "run", **settings | more)


ROWS = [{"prompt": f"Tom has {i} apples.", "solution": f"so {i}"} for i in range(6)]


def test_a_file_with_solutions_trains_without_a_teacher(models, tmp_path):
    """The server of the recipe does not exist, and nothing is asked of it; the rows are the file's own texts."""
    c = recipe(models, tmp_path, ROWS)
    out = train.train(c)
    assert out["exit_code"] == 0 and out.get("teacher/calls", 0) == 0
    tokenizer = hf.load_tokenizer(c.student.path)
    lengths = {len(tokenizer(r["solution"])["input_ids"]) + 1 for r in ROWS}
    rows = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert all(min(lengths) <= r["completions/mean_length"] <= max(lengths) for r in rows)
    assert all(r["completions/truncated_fraction"] == 0 and r["grad_norm"] > 0 for r in rows)
    start, _ = hf.load(c.student.path)
    assert not tiny.same(checkpoint.restore_params(c.run_dir)[0], start)


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        ([*ROWS, {"prompt": "Tom has none."}], {}, "1 of 7 prompts have no `solution`"),
        (ROWS, {"num_generations": 2}, "num_generations = 2 would train on each `solution`"),
    ],
)
def test_solutions_that_can_not_be_used_are_one_line(models, tmp_path, rows, more, words):
    with pytest.raises(UserError, match=words):
        train.train(recipe(models, tmp_path, rows, **more))


def test_a_solution_is_named_by_its_prompt_alone():
    """So a second epoch, another seed and another method find in the journal what was bought."""
    assert solutions.solution_id("7") == solutions.solution_id("7") != solutions.solution_id("8")


def test_the_share_of_truncated_rows_counts_rows_that_came():
    r = experience.Responses([], [], [[1, 2], [], [3], []], np.array([False, False, True, False]))
    assert reporting.truncated_fraction(r) == 0.5
    empty = experience.Responses([], [], [[], []], np.array([False, False]))
    assert reporting.truncated_fraction(empty) == 0.0


@pytest.mark.slow
def test_a_context_shows_the_files_own_solutions_without_a_teacher(models, tmp_path):
    """Several responses a prompt are welcome here: the solution is shown, not trained on."""
    more = {"objective.name": "context", "num_generations": 2, "context.template": "{solution} {prompt}"}
    out = train.train(recipe(models, tmp_path, ROWS, **more))
    assert out["exit_code"] == 0 and out.get("teacher/calls", 0) == 0
    rows = tiny.lines(tmp_path / "run" / "metrics.jsonl")
    assert all(r["divergence/kl_other_to_student_exact"] > 0 and r["context/left_out"] == 0 for r in rows)
