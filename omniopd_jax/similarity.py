"""phi: how much two pieces of text agree, in [0, 1]. `make(cfg)(student, teacher)` takes lists of equal length.

`edit` is the paper's default, in the form of the re-implementation (method.md, section 2, fork): one less the
Levenshtein distance over the longer length. The others' libraries are imported only when they are chosen.
"""

import contextlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from omniopd_jax.errors import UserError, one_of
from omniopd_jax.hf import hub

Similarity = Callable[[list[str], list[str]], np.ndarray]  # (student, teacher) -> float32 [K] in [0, 1]
MAX_CHARS = 4_000  # of each text; more is cut before comparing


def edit(student: list[str], teacher: list[str]) -> np.ndarray:
    """1 - Levenshtein / max(length) over characters; both empty 1, one empty 0 (rapidfuzz)."""
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

    if not student:
        return np.zeros(0, np.float32)
    cut = ([text[:MAX_CHARS] for text in texts] for texts in (student, teacher))
    return process.cpdist(*cut, scorer=Levenshtein.normalized_similarity, dtype=np.float32)


def words(text: str) -> list[str]:
    """Lower-case words and numbers: what the ROUGE similarities count."""
    return re.findall(r"\w+", text[:MAX_CHARS].lower())


def rouge1(student: list[str], teacher: list[str]) -> np.ndarray:
    """F1 of the clipped unigram overlap (Lin, 2004); without a word in both 1 if they are the same text, in one 0."""
    a, b = ([Counter(words(t)) for t in texts] for texts in (student, teacher))
    f1 = [_f1((x & y).total(), x.total(), y.total()) for x, y in zip(a, b, strict=True)]
    return _empty_cases(np.array(f1, np.float32), a, b, student, teacher)


def rouge_l(student: list[str], teacher: list[str]) -> np.ndarray:
    """F1 of the longest common subsequence of words, by tensorflow-text's `rouge_l` (alpha 0.5)."""
    import tensorflow as tf
    import tensorflow_text

    a, b = [words(t) for t in student], [words(t) for t in teacher]
    if not a:
        return np.zeros(0, np.float32)
    ragged = [tf.ragged.constant(x, dtype=tf.string, ragged_rank=1) for x in (a, b)]
    f1 = tensorflow_text.metrics.rouge_l(*ragged, alpha=0.5).f_measure.numpy()
    return _empty_cases(f1, a, b, student, teacher)


def make_rouge_l():
    """`rouge_l`, once its library is known to be there: importing it takes ten seconds, which the first texts pay.

    Raises:
      UserError: it is not installed.
    """
    _need("rougeL", "tensorflow_text", "; audit.similarity=rougeL_fast gives the same numbers without it")
    return rouge_l


def rouge_l_fast(student: list[str], teacher: list[str]) -> np.ndarray:
    """The same as `rouge_l` without TensorFlow, by rapidfuzz's LCS over words; tested equal."""
    from rapidfuzz.distance import LCSseq

    a, b = [words(t) for t in student], [words(t) for t in teacher]
    f1 = np.array([_f1(LCSseq.similarity(x, y), len(x), len(y)) for x, y in zip(a, b, strict=True)], np.float32)
    return _empty_cases(f1, a, b, student, teacher)


def make_embedding(name: str):
    """Cosine of sentence embeddings, negative values taken as 0. Each distinct text is encoded once per call.

    Raises:
      UserError: no model name, or a model that can't be loaded.
    """
    if not name:
        raise UserError(
            "audit.similarity = 'embedding' needs audit.embedding_model: a sentence-transformers folder or name"
        )
    _need("embedding", "sentence_transformers")
    from sentence_transformers import SentenceTransformer

    reachable = contextlib.nullcontext() if os.path.isdir(name) else hub.offline_unless_reachable(name, "model")
    try:
        with reachable:
            encoder = SentenceTransformer(name, device="cpu")
    except Exception as error:  # the library raises OSError, ValueError and hub errors alike
        raise UserError(f"audit.embedding_model = {name!r} can't be loaded: {str(error).splitlines()[0]}") from error

    def embedding(student: list[str], teacher: list[str]) -> np.ndarray:
        if not student:
            return np.zeros(0, np.float32)
        texts = sorted({t[:MAX_CHARS] for t in [*student, *teacher]})
        vectors = encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
        row = {t: i for i, t in enumerate(texts)}
        a, b = (vectors[[row[t[:MAX_CHARS]] for t in ts]] for ts in (student, teacher))
        cosine = np.clip((a * b).sum(-1), 0.0, 1.0).astype(np.float32)
        return _empty_cases(cosine, student, teacher, student, teacher)

    return embedding


SIMILARITIES = {  # name -> (cfg -> phi)
    "edit": lambda cfg: edit,
    "rouge1": lambda cfg: rouge1,
    "rougeL": lambda cfg: make_rouge_l(),
    "rougeL_fast": lambda cfg: rouge_l_fast,
    "embedding": lambda cfg: make_embedding(cfg.audit.embedding_model),
}


def make(cfg) -> Similarity:
    """The similarity that `audit.similarity` names: phi(list[str], list[str]) -> float32 [K] in [0, 1].

    Raises:
      UserError: unknown name, or a model that can't be loaded.
    """
    one_of(cfg.audit.similarity, SIMILARITIES, "audit.similarity")
    return SIMILARITIES[cfg.audit.similarity](cfg)


def _need(name: str, module: str, or_else: str = "") -> None:
    if importlib.util.find_spec(module) is None:
        package = module.replace("_", "-")
        raise UserError(f"audit.similarity = {name!r} needs {package}: pip install {package}{or_else}")


def _f1(both: int, a: int, b: int) -> float:
    return 1.0 if a == b == 0 else 2 * both / (a + b)


def _empty_cases(value: np.ndarray, a, b, student: list[str], teacher: list[str]) -> np.ndarray:
    """Where neither of `a`, `b` has anything to compare 1 for the same text, else 0, as where one has: whatever a
    library says of them."""
    none = np.array([(not x) + (not y) for x, y in zip(a, b, strict=True)])
    same = np.array([x.strip() == y.strip() for x, y in zip(student, teacher, strict=True)], bool)
    return np.where(none == 2, same, np.where(none == 1, 0.0, value)).astype(np.float32)
