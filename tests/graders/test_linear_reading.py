"""What reads a student's text takes time linear in it: 200,000 characters of one kind are read within a grader's limit.

The readers run in the process that trains, or in the math worker before anything is compared. Each text is read in a
child process with a budget of CPU seconds, the math grader's limit, and the child is ended where it needs more.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).parents[2]
LENGTH = {
    "programs": 200_000,
    "printed": 200_000,
    "answers": 200_000,
    "mathematics": 40_000,
}  # a math worker gets no more
FILL = {
    "spaces": " ", "tabs": "\t", "newlines": "\n", "letters": "a", "capitals": "A", "digits": "1", "backticks": "`",
    "tildes": "~", "quotes": "> ", "dots": ".", "commas": ",", "thousands": ",234", "opening": "[", "closing": ")",
    "braces": "{", "closing braces": "}", "dollars": "$", "backslashes": "\\", "words": "word ", "boxes": "\\boxed{",
    "texts": "\\text{a", "ands": " and ", "equals": "x=",
}  # fmt: skip
AROUND = {
    "programs": [
        ("", "x"), ("```", "x"), ("```python ", "`"), ("~~~", "`"), ("import os\n", "\nx"),
    ],
    "printed": [("", "x"), ("1.", "x")],
    "answers": [("", "x"), ("\\boxed{", "}"), ("\\boxed", "x"), ("The answer is ", "x")],
    "mathematics": [("", "!"), ("\\boxed{12 ", " !}"), ("$$1$$", "x"), ("\\boxed{1", "\\text{a}x}")],
}  # fmt: skip
READERS = {
    "programs": """
from omniopd_jax.graders.program_text import candidates
def read(text):
    candidates(text)
    candidates(text, ("Solution",), "class Solution:\\n    def f(self):\\n")
""",
    "printed": """
from omniopd_jax.graders import code
def read(text):
    code._difference(text, "1.5")
""",
    "answers": """
from omniopd_jax import graders
extract = [graders.make(name).extract for name in graders.GRADERS]
def read(text):
    for one in extract:
        one and one(text)
""",
    "mathematics": """
from omniopd_jax.graders import math_reading as m
def read(text):
    m.read(text)
    inner = text.partition("{")[2] or text
    for one in (
        m.tidy, m.number, m.without_units, m.without_text, m.as_string, m.choice, m.in_base, m.bracketed, m.is_bare,
        m.parts_of, m.assignments, m.ratio, m.ASSIGNED.fullmatch, m.SET_BUILDER.fullmatch,
    ):
        one(inner)
""",
}
CHILD = """
import json, signal, sys
order = json.load(sys.stdin)
exec(order["reader"])
read("1")
for before, after in order["around"]:
    for name, fill in order["fill"].items():
        print(repr(before), name, repr(after), flush=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, order["seconds"])
        read(before + (fill * order["length"])[:order["length"]] + after)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
"""


@pytest.mark.parametrize("reader", READERS)
def test_long_degenerate_texts_are_read_in_time(reader):
    order = {
        "reader": READERS[reader], "around": AROUND[reader], "fill": FILL, "length": LENGTH[reader], "seconds": 5.0,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(order), capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    told = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} at {told[-1:]}: {done.stderr[-500:]}"
    assert len(told) == len(FILL) * len(AROUND[reader])
