"""`audit.span`: which tokens are thoughts, where chunks may start then, and how prompts and prefixes go together."""

import re

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_jax import audit, config, scheduler, span
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.hf import harmony, template, thoughts

BYTES = tiny.world.train_tokenizer(["a"], 259)  # every byte a token: a mark is many
MARKED = tiny.tokenizer()  # each mark is a token of its own, as in Qwen3's
MARKED.add_tokens(["<think>", "</think>"])
PIECES = ("<think>", "</think>", "so ", "7\n\n", "<", "think>")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt(tokenizer, text="Add.\n"):
    return Prompt("p", ({"role": "user", "content": "Add."},), token_ids=tuple(ids_of(tokenizer, text)))


def thought_mask(tokenizer, ids, inside):
    """Token by token: any of its characters is in a block, by a regular expression over the whole text."""
    front = "<think>" * inside
    text = front + tokenizer.decode(ids)
    blocks = [m.span() for m in re.finditer(r"<think>.*?(?:</think>|\Z)", text, re.DOTALL)]
    ends = [len(front) + len(tokenizer.decode(ids[:t])) for t in range(len(ids) + 1)]
    return [any(a < hi and lo < b for a, b in blocks) for lo, hi in zip(ends, ends[1:])]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.booleans(), st.sampled_from([1, 3, 6]))
@pytest.mark.parametrize("tokenizer", [BYTES, MARKED], ids=["bytes", "marked"])
def test_a_chunk_is_in_its_span_as_a_whole(tokenizer, text, inside, C):
    ids, asked = ids_of(tokenizer, text), prompt(tokenizer, "Add.\n<think>\n" if inside else "Add.\n")
    expected = thought_mask(tokenizer, ids, inside)
    c = config.default()
    for name, flip in (("thinking", False), ("answer", True), ("all", None)):
        c.update_from_flattened_dict({"audit.span": name, "audit.chunk_tokens": C})
        in_span = [True] * len(ids) if flip is None else [m != flip for m in expected]
        got = span.eligible([span.of_row(tokenizer, asked, ids, name)], len(ids) + 2, C)[0]
        assert got.tolist() == [all(in_span[t : t + C]) for t in range(len(ids))] + [False, False]


def test_peaks_of_a_span_equal_the_oracle():
    """The same equation on fewer positions; a row without an answer has no chunk."""
    text = "<think>3 + 4 is 7, times 2 is 14.</think>The answer is 14, as we said before."
    rows = [ids_of(MARKED, t) for t in (text, text.partition("</think>")[0])]
    T, C, M = len(rows[0]), 4, 3
    entropy = np.random.default_rng(0).random((2, T)).astype(np.float32)
    c = config.default()
    for name in ("thinking", "answer"):
        c.update_from_flattened_dict({"audit.span": name, "audit.chunk_tokens": C})
        eligible = span.eligible([span.of_row(MARKED, prompt(MARKED), row, name) for row in rows], T, C)
        length = np.array(list(map(len, rows)))
        got = np.asarray(
            scheduler.entropy_peaks(entropy, length, num_chunks=M, chunk_tokens=C, eligible_BT=jnp.asarray(eligible))
        )
        border = rows[0].index(MARKED.convert_tokens_to_ids("</think>")) + 1
        for b in range(2):
            thought = [t < border for t in range(T)]
            mine = [thought[t] == (name == "thinking") and thought[min(t + C, T) - 1] == thought[t] for t in range(T)]
            assert got[b].tolist() == oracle.entropy_peaks(entropy[b], length[b], M, C, mine), name
        assert (got[0] >= 0).any() and (name == "thinking") == (got[1] >= 0).any()


def test_the_teacher_is_told_of_thoughts_that_the_students_prompt_has_opened():
    """A cut inside them goes out verbatim, with the mark that is not among the student's own tokens."""
    c = config.default()
    c.audit.chunk_tokens = 3
    ids = ids_of(BYTES, "so it is 7</think>7.")
    for text, front in (("Add.\n<think>\n", "<think>\n"), ("Add.\n<think>\n\n</think>\n\n", ""), ("<think>?\n", "")):
        [a] = audit.plan(audit.Decoder(BYTES), [prompt(BYTES, text)], [ids], [[5]], ["s"], c)
        assert a.request.prefix == front + "so it"


@pytest.mark.parametrize(
    "rendered,prefix,joined",
    [
        ("A:\n", "<think>\nso", "A:\n<think>\nso"),
        ("A:\n<think>\n", "<think>\nso", "A:\n<think>\nso"),  # not opened twice
        ("A:\n<think>\n\n</think>\n\n", "<think>\nso", "A:\n<think>\nso"),  # nor closed over it
        ("A:\n<think>\n\n</think>\n\n", "so", "A:\n<think>\n\n</think>\n\nso"),
        ("A:\n<think>\n", "", "A:\n<think>\n"),
        ("A:\n", "<think>so</think>7", "A:\n<think>so</think>7"),
    ],
)
def test_a_block_is_neither_opened_twice_nor_closed(rendered, prefix, joined):
    assert thoughts.joined(rendered, prefix) == joined


HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_harmonys_channels_by_raw_completion(tmp_path):
    """gpt-oss: thoughts go on in the analysis channel, an answer in the final one; what is written comes back as ours."""
    (tmp_path / "harmony.jinja").write_text(HARMONY)
    made = template.make(None, template=str(tmp_path / "harmony.jinja"), setting="teacher")
    asked = ({"role": "user", "content": "Add."},)
    head = "<|start|>user<|message|>Add.<|end|><|start|>assistant"
    analysis, final = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
    for prefix, rest in (
        ("", final),
        ("It is", final + "It is"),
        ("<think>\nSo it", analysis + "So it"),
        ("<think>\nSo it is 7.\n</think>\n\nIt", f"{analysis}So it is 7.<|end|><|start|>assistant{final}It"),
    ):
        assert made.continued(asked, prefix) == head + rest
    marks = ("<think>", "</think>")
    assert harmony.thinking("<think>\nSo", *marks) and not harmony.thinking("<think>\nSo</think>7", *marks)
    for thinking, text, read in (
        (True, " is 7", (" is 7", False)),
        (True, f" is 7.<|end|><|start|>assistant{final}It is 7<|return|>", (" is 7.\n</think>\n\nIt is 7", True)),
        (True, " is 7.<|end|><|start|>assi", (" is 7.\n</think>\n\n", False)),
        (False, " is 7.<|return|>", (" is 7.", True)),
        (False, " is 7.<|end|>", (" is 7.", True)),
        (False, " is", (" is", False)),
    ):
        assert harmony.read(text, "</think>", thinking=thinking) == read
