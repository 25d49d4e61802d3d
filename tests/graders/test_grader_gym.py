"""The grader of reasoning-gym's problems: each set's own answer is right, and no answer runs as code or without end."""

import os
import pathlib
import subprocess
import sys

import pytest

from omniopd_jax import graders
from omniopd_jax.errors import UserError

EVALUATING = (  # their rules evaluate the answer, as Python or through sympy
    "string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24", "polynomial_multiplication",
    "simple_integration", "intermediate_integration",
)  # fmt: skip
CANARY = "canary-in-the-environment"
SETTLED = """
import os, signal, socket, sys
from omniopd_jax.graders import gym_worker
gym_worker.settle()
folder = sys.argv[1]
for name, act in {
    "mkdir": lambda: os.mkdir(folder + "/d"), "open": lambda: open(folder + "/f", "w"), "append": lambda: open(sys.argv[2], "a"),
    "remove": lambda: os.remove(sys.argv[2]), "rename": lambda: os.rename(sys.argv[2], folder + "/g"),
    "socket": lambda: socket.socket(), "kill": lambda: os.kill(os.getppid(), 0), "exec": lambda: os.execv(sys.executable, ["x"]),
}.items():
    try:
        act()
    except PermissionError:
        print(name)
print(open(sys.argv[2]).read())
"""


@pytest.fixture(scope="module")
def grader():
    os.environ["OMNIOPD_CANARY"] = CANARY
    try:
        with graders.make("reasoning_gym", seconds=3, workers=1) as made:
            made.grade("1", "countdown:0:5:0")
            yield made
    finally:
        del os.environ["OMNIOPD_CANARY"]


@pytest.mark.parametrize("name", EVALUATING)
def test_own_answers_are_right_and_code_in_an_answer_does_not_run(grader, name, tmp_path):
    reference = f"{name}:0:5:1"
    own = graders.gym.dataset(name, 0, 5)[1]["answer"]
    assert grader.grade(own, reference) is True
    for code in (f"__import__('os').mkdir('{tmp_path}/made')", f"open('{tmp_path}/made', 'w')"):
        assert grader.grade(code, reference) is False
        assert grader.grade(f"\\boxed{{{code}}}", reference) is False
    assert list(tmp_path.iterdir()) == []


def test_thoughts_are_no_answer(grader):
    right = graders.gym.dataset("countdown", 0, 5)[0]["answer"]
    assert grader.grade(f"<think>hm, \\boxed{{17}}</think>\n{right}", "countdown:0:5:0") is True
    assert grader.grade(f"<think>maybe \\boxed{{{right}}}, no</think>\n17", "countdown:0:5:0") is False


def test_an_answer_without_end_is_wrong_and_the_next_is_graded(grader):
    assert grader.grade("\\boxed{9**9**8}", "countdown:0:5:0") is False
    assert grader.grade(graders.gym.dataset("countdown", 0, 5)[0]["answer"], "countdown:0:5:0") is True


def test_the_workers_see_no_key(grader):
    environment = pathlib.Path(f"/proc/{grader._pool._server.process.pid}/environ").read_bytes()
    assert b"PYTHONHASHSEED" in environment and CANARY.encode() not in environment


def test_only_literals_arithmetic_and_named_functions_are_evaluated():
    from omniopd_jax.graders.gym_worker import evaluate

    assert evaluate("[1, (2, 'a'), {3: -4 ** 2}]") == [1, (2, "a"), {3: -16}]
    for text in (
        "open('x')", "().__class__", "[x for x in (1,)]", "(lambda: 1)()", "f'{1}'", "__builtins__", "print", "[].append(1)",
        "Function('open')('x')", "Symbol('x').is_real", "exec('1')", "1 if 2 else 3", "(x := 1)",
    ):  # fmt: skip
        with pytest.raises((ValueError, NameError)):
            evaluate(text)


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="no call numbers of this machine")
def test_a_worker_that_is_settled_changes_nothing(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    done = subprocess.run(
        [sys.executable, "-c", SETTLED, str(tmp_path), str(kept)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )  # fmt: skip
    told = done.stdout.split()
    assert told == ["mkdir", "open", "append", "remove", "rename", "socket", "kill", "exec", "kept"], done


def test_impossible_settings_are_user_errors():
    for settings in ({"seconds": 0}, {"workers": 0}, {"memory_mb": 1}):
        with pytest.raises(UserError, match="reasoning_gym grader"):
            graders.make("reasoning_gym", **settings)
