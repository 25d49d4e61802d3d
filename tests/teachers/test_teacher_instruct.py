"""What chat models add to "only the next words", and what is cut away."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from omniopd_jax.teachers.wire import instruct
from omniopd_jax.teachers.wire.instruct import cut

ANSWER = "First we add 3 and 4, which gives 7. Then we multiply the sum by 2"
NEXT = " to get 14, so the result is 14."


@pytest.mark.parametrize(
    "text",
    [
        NEXT,
        NEXT.strip(),  # the leading space is swallowed
        "..." + NEXT.strip(),
        "…" + NEXT,
        f'"{NEXT.strip()}"',
        f"“{NEXT.strip()}”",
        f"```\n{NEXT.strip()}\n```",
        "Sure! Here is the continuation:\n\n" + NEXT.strip(),
        "Here's what comes next: " + NEXT.strip(),
        "Continuing from where it stopped:\n" + NEXT.strip(),
        'Certainly. Here are the next words: "' + NEXT.strip() + '"',
        "Of course!\n\n" + NEXT.strip(),
        "multiply the sum by 2" + NEXT,  # the last words again
        "Then we multiply the sum by 2" + NEXT,
        ANSWER + NEXT,  # from the start, and past the prefix
        ANSWER.replace(" ", "\n") + NEXT,
        f'"...multiply the sum by 2{NEXT}"',
    ],
)
def test_the_same_continuation_comes_out(text):
    assert cut(ANSWER, text) == NEXT


@pytest.mark.parametrize(
    "text",
    [
        "First we add 3 and 4, which gives 7. Now double it",  # starts over, another way
        "First we add 3 and 4, which",  # starts over, and the tokens ran out
        "Sure! Here is the full answer: First we add 3 and 4, which gives",
    ],
)
def test_starting_over_is_no_continuation(text):
    assert cut(ANSWER, text) is None


@pytest.mark.parametrize(  # the first two of each kind as a chat model of 135 M parameters wrote them
    "text",
    [
        "Your answer above was cut off by accident. You", "Your answer was cut off by accident. Write only",
        "I'm sorry for any confusion, but I completely", "I'm sorry I cut off, but I completely", "I apologize, but",
        "My answer above was cut off by accident and I", "I'm ready to help. What can I assist",
        "You are a helpful AI named SmolLM,", "As an AI language model I cannot",
    ],
)  # fmt: skip
def test_speaking_of_itself_is_no_continuation(text):
    assert cut(ANSWER, text) is None
    assert cut("I'm sorry, Dave", " I'm sorry, Tom") is not None  # of an answer that speaks so too
    assert cut(ANSWER, "Your answer is 7") is not None and cut(ANSWER, "You are left with 7") is not None


@pytest.mark.parametrize(
    "prefix,text,expect",
    [
        ("We multi", "multiply by 2", "ply by 2"),  # the word it stopped inside, from its start
        ("We multi", "ply by 2", " ply by 2"),  # nobody can tell this from a new word
        ("Ben", "Ben has 14 eggs", " has 14 eggs"),  # the whole answer so far, though it is short
        ("Ben", "Benjamin has 14", "jamin has 14"),
        ("1", "1 + 1", "1 + 1"),  # digits are left as they stand
        ("The total is 1", "2 apples", "2 apples"),
        ("The total is", "12 apples", " 12 apples"),
        ("Pi is 3.", "14159", "14159"),
        ("It costs 1,", "000 in all", "000 in all"),
        ("It is 7.", "Then", " Then"),
        ("今天天气", "很好", "很好"),
        ("それは", "りんご", "りんご"),
        ("그것은", "사과", " 사과"),
        ("let us find the", "then we add", " then we add"),  # not "the" again
        ("Here is the code:\n", "```python\nprint(1)\n```", "```python\nprint(1)\n```"),  # it may be meant
        ("so", "Here is a triangle, so the ratio 3:4:5 holds", " Here is a triangle, so the ratio 3:4:5 holds"),
        ("so", "Here are the factors of 12: 1, 2, 3", " Here are the factors of 12: 1, 2, 3"),
        ("so", "Sure! Here are the factors:\n1, 2, 3", " 1, 2, 3"),
        ("so", "Here is the rest of the answer: 7", " 7"),
        ("so. ", "The remainder when 17 is divided by 5 is: 2", "The remainder when 17 is divided by 5 is: 2"),
        ("So ", "the full answer is: 42", "the full answer is: 42"),
        ("gives the ", "rest of the marbles to Ann: 7.", "rest of the marbles to Ann: 7."),
        ("so", "the rest…", " the rest…"),
        ("x = 1", " + 2", " + 2"),
        ("x = 1 + ", " 2", "2"),
        ("x = 1 + ", "2", "2"),
        ("the sum is", ": 7", ": 7"),
        ("1 + 1 + 1 +", " 1 + 1 + 1 = 6", " 1 + 1 + 1 = 6"),  # too short a repeat to be told from the real thing
        ('He said "I will', 'go home" and left', ' go home" and left'),
        ('He said "I will', '"go"', '"go"'),  # a quotation is open
        ("```python\nx =", "```\ndone\n```", "```\ndone\n```"),  # so is a fence
        ("So it goes on...", "...and on", "...and on"),
        ("so", "", ""),
        ("Here we go", "Surely it is 7", " Surely it is 7"),
        ("I think", "I will continue to add: 3", " I will continue to add: 3"),
        ("I think", "I will continue from there: 3", " 3"),
        ("La suma de 3 y 4", "Here is la respuesta", " Here is la respuesta"),
    ],
)
def test_corners(prefix, text, expect):
    assert cut(prefix, text) == expect


words = st.lists(st.text("abcdefgh", min_size=1, max_size=7), min_size=8, max_size=20)
new = st.lists(st.text("stuvwxyz", min_size=1, max_size=7), min_size=1, max_size=12)
decoration = st.sampled_from(
    ["{}", '"{}"', "...{}", "…{}", "Sure! Here is the continuation: {}", "```\n{}\n```", "“{}”"]
)


@given(words, new, decoration, st.sampled_from(["", "tail", "all"]))
@example(["a"] * 8, ["z"], "{}", "all")
def test_whatever_is_added_is_taken_off(old, fresh, form, repeat):
    prefix, rest = " ".join(old), " ".join(fresh)
    tail = " ".join(old[-4:])
    assume(repeat != "tail" or len(tail) >= instruct.MIN_OVERLAP)
    assume(repeat != "all" or len(prefix) >= instruct.MIN_OVERLAP)
    said = {"": rest, "tail": f"{tail} {rest}", "all": f"{prefix} {rest}"}[repeat]
    assert cut(prefix, form.format(said)) == " " + rest


@given(st.text(max_size=80), st.text(max_size=80))
def test_nothing_is_made_up(prefix, text):
    out = cut(prefix, text)
    assert out is None or out in text or (out[0] == " " and out[1:] in text)
    assert out is None or len(out) <= len(text) + 1


@given(words, new)
def test_a_clean_continuation_is_left_as_it_is(old, fresh):
    prefix, rest = " ".join(old), " " + " ".join(fresh)
    assert cut(prefix, rest) == rest
    assert cut(prefix + " ", rest) == rest.strip()


def test_the_prompt_keeps_the_answer_whole_and_ends_with_the_instruction():
    out = instruct.messages(({"role": "user", "content": "q"},), "so far", 50)
    assert [m["role"] for m in out] == ["user", "assistant", "user"] and out[1]["content"] == "so far"
    assert "33 words" in out[2]["content"]
