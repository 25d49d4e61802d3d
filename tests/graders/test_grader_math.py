"""The math grader on pairs written for it, and on answers made to hang or break it."""

import json
import pathlib
import signal
import threading
import time

import pytest

from omniopd_jax import graders
from omniopd_jax.errors import UserError

PAIRS = [json.loads(line) for line in (pathlib.Path(__file__).parent / "fixtures/math_pairs.jsonl").open()]
SECONDS = 1.0

HARD = {
    "nested_braces": "\\boxed{" + "{" * 20000 + "1" + "}" * 20000 + "}",
    "open_braces": "\\boxed{" * 20000,
    "close_braces": "\\boxed{1" + "}" * 50000,
    "nested_boxes": "\\boxed{" * 500 + "1" + "}" * 500,
    "nested_fractions": "\\boxed{" + "\\frac{1}{1+" * 150 + "x" + "}" * 150 + "}",
    "nested_roots": "\\boxed{" + "\\sqrt{" * 200 + "2" + "}" * 200 + "}",
    "nested_parentheses": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "tower": "\\boxed{10^{10^{10}}}",
    "plain_tower": "the answer is 10^10^10",
    "tower_of_nines": "\\boxed{9^{9^{9^{9}}}}",
    "factorial": "\\boxed{(10^9)!}",
    "factorial_of_factorial": "\\boxed{100!!!!}",
    "huge_binomial": "\\boxed{\\binom{10^9}{5 \\cdot 10^8}}",
    "long_number": "\\boxed{" + "7" * 1500 + "}",
    "very_long_number": "the answer is " + "7" * 100000,
    "huge_sum": "\\boxed{\\sum_{n=1}^{10^{12}} \\frac{1}{n^3}}",
    "hard_integral": "\\boxed{\\int_0^1 \\sin(\\cos(\\tan(x^x))) e^{x^x} dx}",
    "expand": "\\boxed{(a+b+c+d+e+f+g)^{300}}",
    "many_terms": "\\boxed{" + "+".join(f"\\sqrt{{{n}}}" for n in range(2, 200)) + "}",
    "unicode_digits": "\\boxed{１２３٤٥۶๗௨}",
    "mathematical_letters": "\\boxed{𝟙𝟚+𝑥²½⅐↉①}",
    "surrogates": "\\boxed{\ud800\udfff\x00\u202e}",
    "control_characters": "".join(map(chr, range(32))) + "\\boxed{\x00}",
    "a_megabyte": "x = 1 + " * 125000,
    "a_megabyte_of_dollars": "$" * 1000000,
    "a_megabyte_of_backslashes": "\\" * 1000000,
    "a_megabyte_boxed": "\\boxed{" + "1+" * 500000 + "1}",
    "many_boxes": "\\boxed{1}, " * 50000,
    "many_answers": "the answer is " * 50000,
    "spaces": "answer" + " " * 100000 + "5",
    "code": "\\boxed{__import__('os').system('false')}",
    "code_in_text": "the answer is __import__('os')._exit(0)",
    "unfinished": "\\boxed{\\frac{1}{",
    "nothing": "",
    "nan": "\\boxed{nan}",
    "division_by_zero": "\\boxed{\\frac{1}{0}}",
    "zero_to_zero": "\\boxed{0^0}",
    "infinite_loop_of_equations": "\\boxed{x=x=x=x=y=y=z^{x^{y^z}}}",
    "matrix": "\\boxed{\\begin{pmatrix}" + "1 & 2 \\\\ " * 500 + "\\end{pmatrix}}",
    "ragged_matrix": "\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 \\end{pmatrix}}",
}


@pytest.fixture(scope="module")
def grader():
    with graders.make("math", seconds=15, workers=2) as g:
        yield g


@pytest.fixture(scope="module")
def strict():
    with graders.make("math", seconds=SECONDS, workers=1) as g:
        yield g


def test_pairs_are_judged_right(grader):
    got = grader.grade_all([pair["text"] for pair in PAIRS], [pair["answer"] for pair in PAIRS])
    wrong = [pair for pair, result in zip(PAIRS, got) if result != pair["equal"]]
    assert len(PAIRS) >= 200 and min(sum(p["equal"] is e for p in PAIRS) for e in (True, False)) >= 80
    assert len(wrong) <= 0.01 * len(PAIRS) and not [p for p in wrong if p["kind"] in ("near", "form")], wrong


def test_every_number_is_itself_and_no_other(grader):
    numbers = range(-9, 10, 3)
    assert grader.grade_all([f"\\boxed{{{n}}}" for n in numbers], map(str, numbers)) == [True] * 7
    assert grader.grade_all([f"\\boxed{{{n}}}" for n in numbers], [str(n + 1) for n in numbers]) == [False] * 7


@pytest.mark.parametrize("name", HARD)
def test_hard_answers_neither_hang_nor_raise(strict, name):
    strict.grade("1", "1")  # the imports of a worker that the case before ended are not this case's time
    start = time.monotonic()
    assert strict.grade(HARD[name], "123456") is False
    assert time.monotonic() - start < SECONDS + 3


def test_hard_references_neither_hang_nor_raise(strict):
    names = ("nested_braces", "surrogates", "unfinished", "a_megabyte", "division_by_zero", "code")
    assert strict.grade_all(["\\boxed{7}"] * len(names), [HARD[name] for name in names]) == [False] * len(names)


def test_it_works_after_the_attack_and_in_any_thread(strict):
    told = []
    threads = [threading.Thread(target=lambda: told.append(strict.grade("\\boxed{1/2}", "0.5"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [True] * 4


def test_equal_towers_are_equal_by_their_letters(grader):
    assert grader.grade(HARD["tower"], "$10^{10^{10}}$")


def test_a_long_response_keeps_its_box(grader):
    assert grader.grade("We get \\boxed{42}. " + "And so on. " * 10000, "42")
    assert grader.grade("word " * 100000 + "The answer is 42.", "42")


@pytest.mark.parametrize("words", [1, 20_000])
def test_a_box_in_the_thoughts_is_no_answer(grader, words):
    text = "<think>try \\boxed{4}, " + "wrong. " * words + "</think>\nThe answer is 5."
    assert grader.grade(text, "5") and not grader.grade(text, "4")
    assert grader.extract(text) == "5"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{42}.", "42"), ("3 + 4 = 7\n#### 7", "7"), ("The answer is 5.", "5"), ("12", "12"),
        ("First 3, then 4, so he has 1,200 apples left", "1,200"), ("I do not know", None),
        ("7" * 5000 + " million", None),
    ],
)  # fmt: skip
def test_an_answer_is_voted_by_wherever_it_stands(grader, text, answer):
    """A wrong one that had no vote as it has no box would leave the majority to the one that is right."""
    assert grader.extract(text) == answer


def test_a_worker_that_dies_is_replaced(strict):
    strict.grade("1", "1")
    worker = strict._pool.idle.get()
    signal.pidfd_send_signal(worker.process, signal.SIGKILL)
    strict._pool.idle.put(worker)
    assert [strict.grade("1", "1") for _ in range(2)] == [False, True]


def test_a_worker_that_hangs_is_replaced(strict):
    strict.grade("1", "1")
    worker = strict._pool.idle.get()
    signal.pidfd_send_signal(worker.process, signal.SIGSTOP)
    strict._pool.idle.put(worker)
    start = time.monotonic()
    assert strict.grade("1", "1") is False
    assert time.monotonic() - start < SECONDS + 3
    assert strict.grade(1, 1) is True


def test_impossible_settings_are_user_errors():
    for settings in ({"seconds": 0}, {"workers": 0}, {"memory_mb": 1}):
        with pytest.raises(UserError, match="math grader"):
            graders.make("math", **settings)
