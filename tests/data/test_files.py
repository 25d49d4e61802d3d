"""Rows as other people's files have them: their fields, their forms, and files that hurt."""

import gzip
import json
import pathlib
import time

import pytest
from data_files import load, small, write

from omniopd_jax import graders
from omniopd_jax.data import prompts as data
from omniopd_jax.errors import UserError

CASES_FILE = pathlib.Path(__file__).with_name("cases.jsonl")
GOOD = {"prompt": "a question"}


# --- what other people's rows hold
# ----------------------------------------------------------------------------------------

CASES = {json.loads(line)["name"]: json.loads(line)["row"] for line in CASES_FILE.read_text().splitlines() if line}
TAKEN = {  # name -> (the settings that it names, the prompt that it is)
    "dapo-processed, as JSONL with data.fields.answer=solution": ({"answer": "solution"}, ("1+1?", "2", None)),
    "gsm8k, with data.fields.prompt=question": ({"prompt": "question"}, ("1+1?", "2", None)),
    "content parts": ({}, ("1+1?", None, None)),
    "code tests as an object: accepted, then JSONDecodeError at the first reward": (
        {}, ("Write f.", '{"asserts": ["assert f(1) == 2"]}', None)
    ),
}  # fmt: skip
REFUSED = {
    "numina": r"no field `prompt`; the row's fields: problem, solution, messages; set data\.fields\.prompt",
    "sharegpt": r"no field `prompt`; the row's fields: conversations; set data\.fields\.prompt",
    "whole conversation: accepted, though the prompt ends in an answer": "`prompt` ends in the assistant's answer",
}


def with_fields(path, check=None, **fields):
    c = small(**{f"data.fields.{k}": v for k, v in fields.items()})
    return data.load(c, source="jsonl", split="", path=path, count=0, check=check)


def read_one(folder, row, **fields):
    (prompt,) = with_fields(write(folder, row), **fields).prompts
    return prompt.messages[0]["content"], prompt.answer, prompt.solution


@pytest.mark.parametrize("name", CASES)
def test_published_rows_are_taken_as_they_are_meant_or_one_line_says_what_to_set(tmp_path, name):
    assert CASES.keys() == TAKEN.keys() | REFUSED.keys()
    if name in TAKEN:
        fields, wanted = TAKEN[name]
        assert read_one(tmp_path, CASES[name], **fields) == wanted
        return
    with pytest.raises(UserError, match=f"line 1: .*{REFUSED[name]}") as caught:
        read_one(tmp_path, CASES[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fields", "wanted"),
    [
        ({"problem": "1+1?", "solution": "It is 2."}, {"prompt": "problem"}, ("1+1?", None, "It is 2.")),
        ({"prompt": "1+1?", "reward": {"ground_truth": "2"}}, {"answer": "reward.ground_truth"}, ("1+1?", "2", None)),
        ({"conversations": [{"from": "human", "value": "1+1?"}]}, {"prompt": "conversations"}, ("1+1?", None, None)),
        ({"prompt": "a", "answer": 7.5}, {}, ("a", "7.5", None)),
        ({"prompt": "a", "answer": ["1", "2"]}, {}, ("a", '["1", "2"]', None)),
        ({"prompt": "a", "answer": None, "solution": None}, {}, ("a", None, None)),
        ({"prompt": "a", "answer": float("nan"), "solution": float("nan")}, {}, ("a", None, None)),  # of a table
        ({"prompt": "a", "answer": "1", "solution": " "}, {}, ("a", "1", None)),
        ({"prompt": "a", "a.b": "x"}, {"answer": "a.b"}, ("a", "x", None)),
        ({"prompt": [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]}, {}, ("ab", None, None)),
        ({"prompt": [{"role": "Human", "content": "1+1?"}]}, {}, ("1+1?", None, None)),
    ],
)  # fmt: skip
def test_rows_of_other_forms(tmp_path, row, fields, wanted):
    assert read_one(tmp_path, row, **fields) == wanted


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        ({"prompt": "a", "answer": {"ground_truth": "7"}}, {}, r"set data\.fields\.answer = 'answer\.ground_truth'"),
        ({"prompt": "a", "answer": True}, {}, "`answer` = true is no answer"),
        ({"prompt": "a", "solution": {"x": 1}}, {}, r"`solution` is no text; set data\.fields\.solution"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"prompt": "conversations"},
            "`conversations` ends in the assistant's answer",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            {},
            "and `content`, a text",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "GPT", "content": "b"}]},
            {},
            "`prompt` ends in the assistant's answer",
        ),
        ({"prompt": [{"from": 3, "value": "a"}]}, {}, "`role` and `content`, a text"),
        (
            {"question": "a"},
            {"prompt": "questions"},
            r"no field `questions`; the row's fields: question; set data\.fields",
        ),
    ],
)
def test_rows_that_cannot_be_meant_so_are_one_line(tmp_path, row, fields, said):
    path = write(tmp_path, {fields.get("prompt", "prompt"): "a good one"}, "", row)
    with pytest.raises(UserError, match=f"line 3: .*{said}") as caught:
        with_fields(path, **fields)
    assert "\n" not in str(caught.value)


def test_answers_are_checked_where_they_are_read(tmp_path):
    """By the grader that will read them, with the line: not in step 40, when row 300 is drawn."""
    path = write(tmp_path, {"prompt": "a", "answer": 7}, {"prompt": "b", "answer": None})
    with pytest.raises(UserError, match=r"line 2: no answer; set data\.fields\.answer"):
        with_fields(path, check=graders.make("math").check_answer)
    path = write(tmp_path, {"prompt": "a", "answer": 7}, {"prompt": "b", "answer": ["7"]})
    with pytest.raises(UserError, match="line 2: an answer for the math grader is text or a number; this is list"):
        with_fields(path, check=graders.make("math").check_answer)
    assert [p.answer for p in with_fields(path).prompts] == ["7", '["7"]']
    path = write(tmp_path, {"prompt": "a", "answer": {"asserts": ["assert f(1) == 2"]}})
    assert len(with_fields(path, check=graders.make("code").check_answer)) == 1


def test_an_empty_cell_says_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer,solution,id\na,1,,\nb,2,,\n")
    found = with_fields(str(tmp_path / "a.csv")).prompts
    assert [(p.id, p.solution) for p in found] == [("000002", None), ("000003", None)]


def rows_of(folder, name, content: bytes):
    (folder / name).write_bytes(content)
    return [(p.id, p.messages[0]["content"], p.answer) for p in load(str(folder / name)).prompts]


ROWS = [{"prompt": 'a, "b"\nc', "answer": "1"}, {"prompt": "é", "answer": "2"}]
WANTED = [('a, "b"\nc', "1"), ("é", "2")]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", b"\xef\xbb\xbf" + LINES),
        ("p.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("p.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("p.json", json.dumps(ROWS, indent=1).encode()),
        ("p.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode()),
        ("p.json", LINES),
        ("p.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("p.csv", b'\xef\xbb\xbfprompt,answer\r\n"a, ""b""\nc",1\r\n\xc3\xa9,2\r\n'),
        ("P.CSV", b'prompt,answer\n"a, ""b""\nc",1\n\xc3\xa9,2\n'),
    ],
)
def test_the_forms_that_a_prompts_file_has(tmp_path, name, content):
    assert [row[1:] for row in rows_of(tmp_path, name, content)] == WANTED


def test_bytes_within_an_answer_are_one_line(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": [b"1"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="row 1: `answer` is binary; write it as a text"):
        with_fields(str(tmp_path / "b.parquet"))
    parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": [{"x": b"1"}]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 1: `answer` holds what is no JSON"):
        with_fields(str(tmp_path / "a.parquet"))


def test_a_parquet_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert [row[1:] for row in rows_of(tmp_path, "p.parquet", (tmp_path / "p.parquet").read_bytes())] == WANTED
    with pytest.raises(UserError, match="not a parquet file"):
        rows_of(tmp_path, "q.parquet", b"PAR1 nonsense")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8 text.*save it as UTF-8"),
        ("p.jsonl", b'{"prompt": ' + b"[" * 200_000, "line 1: JSON that is nested too deep"),
        ("p.jsonl", b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "line 1 is not JSON: Exceeds the limit"),
        ("p.jsonl", b'{"prompt": "a", "answer": ' + b"[" * 600 + b"]" * 600 + b"}", None),
        ("p.jsonl", b'{"prompt": "' + b"a" * 16_000_000 + b'"}', "line 1: longer than 16,000,000 bytes"),
        ("p.jsonl.gz", gzip.compress(b"\n" * 60_000_000, mtime=0), "line 100001: more than 100,000 blank lines"),
        (
            "p.jsonl.gz",
            gzip.compress(b'{"prompt": "q", "x": "%s"}\n' % (b"a" * 4_000_000) * 8, mtime=0),
            "200 times its size",
        ),
        ("p.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "cannot be read"),
        ("p.jsonl.gz", b"not gzip", "cannot be read"),
        ("p.json", b"[" * 200_000, "nested too deep"),
        ("p.json", b'[{"prompt": "a"}, 3]', "row 2: expected an object"),
        ("p.csv", b"prompt,answer\na,1,2\n", "line 2: not as many fields"),
        ("p.csv", b"prompt,answer\na\n", "line 2: not as many fields"),
        ("p.csv", b'prompt,answer\na,1\nb,"4\nc,6\nd,8\n', "begins in line 3 is not CSV .unexpected end of data"),
        ("p.csv", b'prompt,answer\n"is "x"?",2\n', "begins in line 2 is not CSV"),
        ("p.csv", b"prompt,answer,answer\na,1,2\n", "line 1: the header names 'answer' more than once"),
        ("p.csv", b"question\na\n", "line 2: no field `prompt`; the row's fields: question"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_files_that_hurt_are_one_line_within_bounds(tmp_path, name, content, said):
    begun = time.perf_counter()
    if said is None:
        assert len(rows_of(tmp_path, name, content)) == 1
        return
    with pytest.raises(UserError, match=said) as caught:
        rows_of(tmp_path, name, content)
    assert "\n" not in str(caught.value) and time.perf_counter() - begun < 10
