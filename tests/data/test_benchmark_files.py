"""Benchmarks read from other people's files: their field names, their endings, their choices."""

import gzip
import json

import pytest

from omniopd_jax import graders
from omniopd_jax.data import benchmarks
from omniopd_jax.errors import UserError


def load(tmp_path, rows, name="", file="rows.jsonl", form="lines"):
    path = tmp_path / file
    text = "\n".join(map(json.dumps, rows)) if form == "lines" else json.dumps(rows if form == "list" else {form: rows})
    path.write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())
    return benchmarks.load(f"{name}={path}" if name else str(path))


@pytest.mark.parametrize(
    "name, row, text, answer",
    [
        ("amc23", {"problem": "How many?", "answer": 27.0}, "How many?", "27.0"),
        ("amc23", {"question": "How many?", "answer": "27"}, "How many?", "27"),
        ("aime24", {"Problem": "Find it.", "Answer": 33}, "Find it.", "33"),
        ("math500", {"question": "Find it.", "solution": r"So \boxed{\frac12}."}, "Find it.", r"\frac12"),
        ("olympiadbench", {"question": "Q", "final_answer": ["1,2"], "context": "C"}, "C\nQ", "1,2"),
        ("olympiadbench", {"problem": "Q", "answer": "3"}, "Q", "3"),
        ("gsm8k", {"question": "Q", "answer": "so\n#### 1,234"}, "Q", "1234"),
        ("gsm8k", {"problem": "Q", "answer": "18"}, "Q", "18"),
        ("", {"prompt": "Q", "ground_truth": "5"}, "Q", "5"),
    ],
)
def test_field_names_of_other_copies(tmp_path, name, row, text, answer):
    (prompt,) = load(tmp_path, [row], name).prompts
    assert prompt.messages[0]["content"] == text and prompt.answer == answer


def test_mbpp_as_it_was_first_published(tmp_path):
    row = {
        "text": "Write a function.",
        "code": "def f(n):\n    return n.v",
        "task_id": 1,
        "test_setup_code": "n = Node(1)",
        "test_list": ["assert f(n) == 1"],
        "challenge_test_list": [],
    }
    (prompt,) = load(tmp_path, [row], "mbpp").prompts
    assert json.loads(prompt.answer) == {"asserts": ["n = Node(1)", "assert f(n) == 1"], "prompt": "def f(n):\n"}
    assert prompt.messages[0]["content"].startswith("Write a function.")


@pytest.mark.parametrize(
    "choices",
    [["red", "blue"], {"A": "red", "B": "blue"}, {"label": ["A", "B"], "text": ["red", "blue"]}, ["A) red", "B) blue"]],
)
def test_choices_are_part_of_the_problem(tmp_path, choices):
    (prompt,) = load(tmp_path, [{"question": "Which colour?", "choices": choices, "answer": 1}]).prompts
    content = prompt.messages[0]["content"]
    assert "red\n" in content and "blue" in content and ("(B) blue" in content or "B) blue" in content)
    assert prompt.answer == "B"


@pytest.mark.parametrize(
    "file, form",
    [
        ("a.jsonl", "lines"),
        ("a.json", "list"),
        ("a.json", "data"),
        ("a.json", "lines"),
        ("a.jsonl.gz", "lines"),
        ("a.json.gz", "list"),
    ],
)
def test_endings(tmp_path, file, form):
    suite = load(tmp_path, [{"problem": "P", "answer": "1"}, {"problem": "Q", "answer": "2"}], file=file, form=form)
    assert (suite.name, [p.answer for p in suite.prompts]) == ("a", ["1", "2"])


@pytest.mark.parametrize(
    "row, says",
    [
        ({"problem": "P", "answer": None}, "row 0"),
        ({"problem": "P", "choices": {"label": 5, "text": ["a"]}, "answer": "A"}, "row 0"),
        ({"answer": "1"}, "problem"),
        ({"problem": "P", "answer": True}, "row 0"),
        ({"problem": "P", "answer": float("nan")}, "row 0"),
        ({"problem": "P", "choices": ["a", "b"], "answer": -1}, "answer -1 is none of the choices 0 to 1"),
        ({"problem": "P", "choices": ["a", "b"], "answer": 2}, "answer 2 is none of the choices 0 to 1"),
        ({"prompt": [{"role": "user", "content": "P"}], "answer": "1"}, "a problem is text, not"),
        ({"problem": "half a pair: \ud83d", "answer": "1"}, "half a surrogate pair"),
        ({"problem": "P", "answer": "x", "grader": "code"}, "no JSON"),
        ({"problem": "P", "answer": {"asserts": "f(1)"}, "grader": "code"}, "no assertion"),
    ],
)
def test_rows_that_cannot_be_graded_are_named(tmp_path, row, says):
    with pytest.raises(UserError, match=says):
        load(tmp_path, [row])


def test_a_broken_archive_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="can't be read"):
        benchmarks.load(str(tmp_path / "a.jsonl.gz"))


def test_an_answer_that_is_a_choice_may_be_given_by_its_letter(tmp_path):
    rows = [{"problem": "Where?", "choices": ["Paris", "Rome"], "answer": "Paris"}]
    (prompt,) = load(tmp_path, rows).prompts
    assert prompt.answer == "(A) Paris"
    said = {"\\boxed{A}": True, "\\boxed{Paris}": True, "\\boxed{\\text{(A) Paris}}": True, "\\boxed{B}": False}
    with graders.make("math", workers=1) as grader:
        assert {text: grader.grade(text, prompt.answer) for text in said} == said
    (prompt,) = load(tmp_path, [{"problem": "Where?", "choices": ["Paris", "Rome"], "answer": "B"}]).prompts
    assert prompt.answer == "B"


@pytest.mark.parametrize(
    ("question", "added"),
    [
        ("Which is the largest of 3, 5 and 7?", True),  # the numbers are there, their letters are not
        ("Which is the largest? A. 3 B. 5 C. 7", False),
        ("Which is the largest?\n(A) 3\n(B) 5\n(C) 7", False),
    ],
)
def test_choices_are_added_unless_they_stand_behind_their_letters(tmp_path, question, added):
    (prompt,) = load(tmp_path, [{"question": question, "choices": ["3", "5", "7"], "answer": 2}]).prompts
    assert prompt.messages[0]["content"] == question + ("\n\n(A) 3\n(B) 5\n(C) 7" if added else "")
    assert prompt.answer == "C"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_is_nested_too_deep_is_one_line(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=name):
        benchmarks.load(str(tmp_path / name))
