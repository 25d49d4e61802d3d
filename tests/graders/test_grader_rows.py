"""Rows in the published formats of the benchmarks, with reference solutions in the styles that models answer in.

cases/humaneval.jsonl, mbpp.jsonl and livecodebench.jsonl were written for these tests; cases/{math,code,extract}.jsonl
are inputs that earlier versions got wrong; cases/boxed.jsonl has solutions with their answers in boxes, and the same
perturbed.
"""

import ast
import json
import pathlib
import re
import textwrap

import pytest

from omniopd_jax import graders
from omniopd_jax.data import benchmarks
from omniopd_jax.graders import code_tests
from omniopd_jax.graders.program_text import candidates, extract_program

CASES = pathlib.Path(__file__).parent / "cases"
CODE = ("humaneval", "mbpp", "livecodebench")


def rows(name):
    return [json.loads(line) for line in (CASES / f"{name}.jsonl").open()]


@pytest.fixture(scope="module")
def code():
    with graders.make("code", workers=2, isolation="namespaces") as grader:
        yield grader


@pytest.fixture(scope="module")
def math():
    with graders.make("math", workers=2, seconds=20) as grader:
        yield grader


def asked_of(name):
    """(row, tests) of each row, by the benchmark's own reader."""
    source = benchmarks.SUITES[name]
    return [(row, source.read(row)[1]) for row in rows(name)]


def whole(name, row):
    """The reference solution as a whole program."""
    return {"humaneval": lambda: row["prompt"] + row["canonical_solution"], "mbpp": lambda: row["code"]}.get(
        name, lambda: row["solution"]
    )()


def definition(program, name):
    """(lines of the function `name` or method of Solution, lines of its body) in `program`."""
    tree = ast.parse(program)
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    lines = program.splitlines()
    first = found.body[1] if ast.get_docstring(found) else found.body[0]
    start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))])
    return "\n".join(lines[found.lineno - 1 : found.end_lineno]), "\n".join(lines[start - 1 : found.end_lineno])


def styles(name, row):
    """style -> response."""
    program = whole(name, row)
    chat = (
        f"Sure! Here is a solution.\n\n```python\n{program}```\n\nFor example:\n\n```python\nprint('example')\n```\n\n"
    )
    out = {
        "whole program": program,
        "chat with example and output": chat + "Output:\n```\nexample\n```\nHope it helps.",
    }
    if name == "livecodebench" and row["metadata"] == "{}":
        return out | {"chat alone": f"<think>\n```python\nprint(0)\n```\n</think>\n~~~python\n{program}~~~"}
    entry = row.get("entry_point") or json.loads(row.get("metadata", "{}")).get("func_name")
    entry = entry or re.match(r"assert (?:not )?(?:math\.isclose\()?(\w+)\(", row["test_list"][0])[1]
    function, body = definition(program, entry)
    if "class Node" not in program:
        out["function alone"] = function
        out["body alone"] = body
        out["body alone, without its first indent"] = body.strip()
        out["body alone, in a block"] = f"```python\n{textwrap.dedent(body)}\n```"
    return out


@pytest.mark.parametrize("name", CODE)
def test_reference_solutions_are_right_in_every_style(code, name):
    cases = [(row, style, text, tests) for row, tests in asked_of(name) for style, text in styles(name, row).items()]
    assert len({row.get("task_id", row.get("question_id")) for row, *_ in cases}) >= 8
    told = code.grade_all([text for _, _, text, _ in cases], [tests for *_, tests in cases])
    wrong = [(style, text, verdict) for (_, style, text, _), verdict in zip(cases, told) if not verdict]
    assert not wrong


@pytest.mark.parametrize("name", CODE)
def test_solutions_that_return_nothing_are_wrong(code, name):
    pairs = [(re.sub(r"\breturn\b.*", "return None", whole(name, row)), tests) for row, tests in asked_of(name)]
    told = code.grade_all(*zip(*pairs))
    assert not [(program, verdict) for (program, _), verdict in zip(pairs, told) if verdict]


@pytest.mark.parametrize("name", ("code", "extract"))
def test_earlier_mistakes_of_the_code_grader(code, name):
    cases = rows(name)
    told = code.grade_all([case.get("program", case.get("text")) for case in cases], [case["tests"] for case in cases])
    assert [(case["name"], bool(v)) for case, v in zip(cases, told)] == [
        (case["name"], case["expected"]) for case in cases
    ]


def test_earlier_mistakes_of_the_math_grader(math):
    cases = rows("math")
    told = math.grade_all([case["text"] for case in cases], [case["answer"] for case in cases])
    assert not [case for case, right in zip(cases, told) if right is not case["expected"]]


def test_boxed_solutions_are_right_and_perturbed_ones_wrong(math):
    cases = rows("boxed")
    assert len(cases) == 100 and all(case["solution"] != case["perturbed"] for case in cases)
    answers = [case["answer"] for case in cases]
    right = math.grade_all([case["solution"] for case in cases], answers)
    wrong = math.grade_all([case["perturbed"] for case in cases], answers)
    assert not [case for case, told in zip(cases, right) if not told]
    assert not [case for case, told in zip(cases, wrong) if told]


# -- tests that never run


RIGHT, WRONG = "def f(x):\n    return x * x\n", "def f(x):\n    return 7\n"
STOPS = "def f(x):\n    raise StopIteration\n"
FORMS = {
    "pytest functions": "def test_a():\n    assert f(3) == 9\n\ndef test_b():\n    assert f(5) == 25\n",
    "pytest class": "class TestF:\n    def test_a(self):\n        assert f(3) == 9\n",
    "unittest case": "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(3), 9)\n",
    "unittest under a guard": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(3), 9)\n"
        "if __name__ == '__main__':\n    unittest.main()\n"
    ),
    "main guard": "if __name__ == '__main__':\n    assert f(3) == 9\n",
    "main function": "def main():\n    assert f(3) == 9\nif __name__ == '__main__':\n    main()\n",
    "loop over map": "for got, want in zip(map(f, [3, 5]), [9, 25]):\n    assert got == want\n",
    "raises": "if f(3) != 9:\n    raise ValueError('wrong')\n",
    "exception that is wanted": "try:\n    f('a')\nexcept TypeError:\n    pass\nelse:\n    assert False\n",
    "exit code": "import sys\nok = f(3) == 9\nassert isinstance(ok, bool)\nsys.exit(0 if ok else 1)\n",
}
NEVER = {
    "nobody calls": "def helper():\n    assert f(3) == 9\n",
    "an empty loop": "for x in []:\n    assert f(x) == 9\n",
    "nothing asked": "assert 1 + 1 == 2\n",
    "a loop over what it returns": "for x in f(3) or []:\n    assert x\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_tests_is_run(code, form):
    right, wrong, stops = code.grade_all([RIGHT, WRONG, STOPS], [{"asserts": FORMS[form]}] * 3)
    assert right and not wrong and not stops, (right, wrong, stops)


@pytest.mark.parametrize("form", NEVER)
def test_tests_that_evaluate_no_assertion_pass_nothing(code, form):
    verdict = code.grade("def f(x):\n    return []\n" if "returns" in form else RIGHT, {"asserts": NEVER[form]})
    assert not verdict and verdict.reason == "error" and "error of the data" in verdict.detail, verdict


# -- answers of the wrong form


@pytest.mark.parametrize(
    "name, answer, says",
    [
        ("code", None, "null"),
        ("code", 3, "int 3"),
        ("code", "3", "int 3"),
        ("code", "null", "null"),
        ("code", "x = 1", "no JSON"),
        ("code", {"asserts": 5}, "'asserts'"),
        ("code", {"asserts": ""}, "no assertion"),
        ("code", [], "list"),
        ("code", {"asserts": "assert True"}, "no assertion"),
        ("code", {"asserts": "assert f("}, "can't be read"),
        ("code", {"asserts": "def check(candidate):\n    assert candidate(1)"}, "entry_point"),
        ("code", {"stdin": "1"}, "stdin"),
        ("code", {"stdin": ["1"], "stdout": [2]}, "'stdout'"),
        ("code", {"stdin": ["1"], "stdout": ["1", "2"]}, "1 inputs"),
        ("math", None, "null"),
        ("math", True, "bool"),
        ("math", {"a": 1}, "dict"),
        ("math", "  ", "empty"),
        ("reasoning_gym", "gsm", "DATASET"),
        ("reasoning_gym", None, "None"),
        ("reasoning_gym", "nosuch:0:5:1", "no data set 'nosuch'"),
        ("world", 3, "3"),
    ],
)
def test_answers_of_the_wrong_form_are_named(name, answer, says):
    with pytest.raises(graders.code.UserError, match=re.escape(says)):
        graders.make(name).check_answer(answer)


def test_answers_of_the_right_form_are_taken():
    tests = {"asserts": ["assert f(1) == 1"]}
    for name, answer in (("code", tests), ("code", json.dumps(tests)), ("math", "1/2"), ("math", 3), ("world", "7")):
        graders.make(name).check_answer(answer)


# -- programs in responses


CODE_BLOCK, OTHER = "def f(x):\n    return x\n", "print(f(1))\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{CODE_BLOCK}```",
        f"~~~python\n{CODE_BLOCK}~~~",
        f"Sure:\n```python\n{CODE_BLOCK}",
        f"```\n{CODE_BLOCK}```",
        f"```python\n{CODE_BLOCK}```\n```python\n{OTHER}```",
        f"```\n1\n```\n```Python3\n{CODE_BLOCK}```\n```\n2\n```",
        f"```py\n{CODE_BLOCK.rstrip()}```\nDone.",
        f"1. So:\n   ```python\n{textwrap.indent(CODE_BLOCK, '   ')}   ```\n",
        f"````python\n{CODE_BLOCK}````",
        f"```python title=a.py\n{CODE_BLOCK}```\n```text\n{OTHER}```",
        CODE_BLOCK,
        f"<think>```python\ndef f(x):\n    return 0\n```</think>\n```python\n{CODE_BLOCK}```",
        f"> ```python\n> {CODE_BLOCK}> ```",
        f"```{{python}}\n{CODE_BLOCK}```",
        f"```bash\npip install x\n```\n```python\n{CODE_BLOCK}```\n```json\n{{}}\n```",
    ],
)
def test_the_program_is_the_last_block_that_defines_what_is_asked(text):
    program = extract_program(text, ("f",))
    assert "return x" in program and "print" not in program and "`" not in program and "~" not in program


@pytest.mark.parametrize("lead", ["Here is the code: ", "1. ", "**Solution**:"])
def test_a_fence_behind_prose_opens_a_block(lead):
    assert extract_program(f"{lead}```python\n{CODE_BLOCK}```\nDone.", ("f",)) == CODE_BLOCK
    assert extract_program(f"{lead}```python\nprint(input())\n```\n") == "print(input())\n"


def test_a_fence_behind_prose_that_nothing_closes_is_none():
    program = "n = input()\n# usage: ```python\nprint(n)\n"
    assert extract_program(program) == program
    said = "\nIt can be rewritten in ```python\nas before, with print(n) and input()."
    assert extract_program(f"```\nn = input()\nprint(n)\n```{said}") == "n = input()\nprint(n)\n"


@pytest.mark.parametrize(
    "lead",
    ["    # Approach\n\n", " # Solution\n\nHere:\n\n", "    pass\n", "    return None\n\nOops, the right one:\n"],
)
def test_an_indented_lead_does_not_displace_the_block_that_defines_what_is_asked(lead):
    prompt = 'def f(x):\n    """Doubles."""\n'
    assert candidates(f"{lead}```python\n{CODE_BLOCK}```", ("f",), prompt)[0].endswith(CODE_BLOCK)


AFTER = {
    "a fence that nothing opened": "```\nThis squares.", "prose": "This squares it.\n", "nothing": "",
    "another function": "\ndef g(y):\n    for i in range(y", "a guard": "\nif __name__ == '__main__",
    "a class": "\nclass Foo:\n    def bar(self", "a second block": "```\n\n```python\nprint(f(3))\n```\n",
    "a call": "\nprint(f(3",
}  # fmt: skip


@pytest.mark.parametrize("after", AFTER)
def test_a_base_model_that_writes_on_has_answered(after):
    """The benchmarks' harnesses stop it at the next line at the left edge; here it writes until it is cut off."""
    prompt, body = 'def f(x):\n    """Square."""\n', "    return x * x\n"
    for text in (body + AFTER[after], f"def f(x):\n{body}{AFTER[after]}"):
        first = next(p for p in candidates(text, ("f",), prompt) if compiles(p))
        scope = {}
        exec(first, scope)
        assert scope["f"](3) == 9, first


def compiles(program):
    try:
        return bool(compile(program, "", "exec"))
    except (SyntaxError, ValueError):
        return False


def test_a_program_on_stdin_is_the_block_that_says_python():
    program = "n = int(input())\nprint(n + 1)\n"
    for after in ("```\n3\n```", "```python\nassert 1 + 1 == 2\n```", "```text\n3\n```", ""):
        assert extract_program(f"```python\n{program}```\nOutput:\n{after}") == program


def test_a_fence_within_a_string_is_no_block():
    program = 'def f(x):\n    """Example:\n    ```\n    f(1)\n    ```\n    """\n    return x\n'
    assert candidates(program, ("f",))[0] == program


def test_only_the_preamble_that_a_program_names_is_imported():
    lines = code_tests.preamble("d = deque([inf])\nx = sum(d)").splitlines()
    assert lines[:-1] == ["from collections import deque", "from math import inf"] and "50000" in lines[-1]
