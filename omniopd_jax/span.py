"""Which part of a response is audited (`audit.span`): all of it, the answer, or the thoughts before it (ours).

A chunk must be in the span as a whole, as it must end inside the response: no weight falls on the other part. What is
not audited stays in U, with the anchor; the equation is the same.
"""

import numpy as np

from omniopd_jax.hf import thoughts

TAIL = 32  # tokens of a prompt that are looked at for an open mark


def eligible(in_span: list[np.ndarray], T: int, chunk_tokens: int) -> np.ndarray:
    """bool [B, T]: a chunk of `chunk_tokens` that starts at t is in the span; False past a row's end.

    Args:
      in_span: `of_row` of each row.
    """
    out = np.zeros((len(in_span), T), bool)
    for b, in_span_T in enumerate(in_span):
        out[b, : len(in_span_T)] = inside(in_span_T, chunk_tokens)
    return out


def of_row(tokenizer, prompt, row: list[int], span: str) -> np.ndarray:
    """bool [len]: the response's tokens that are in `span`.

    A response whose thoughts are never closed has no answer; one that never opens any is all answer.

    Args:
      tokenizer: the student's. prompt: a data.Prompt.
    """
    if span == "all":
        return np.ones(len(row), bool)
    thought_T = thoughts.token_mask(tokenizer, row, inside=bool(opened(tokenizer, prompt)))
    return thought_T if span == "thinking" else ~thought_T


def inside(in_span_T: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """bool [T]: all of the `chunk_tokens` tokens from t on, or those that there are, are in the span."""
    T = len(in_span_T)
    outside = np.concatenate([[0], np.cumsum(~in_span_T)])
    return outside[np.minimum(np.arange(T) + chunk_tokens, T)] == outside[:T]


def opened(tokenizer, prompt) -> str:
    """What a prompt writes of the answer itself: the open mark at its end, "" where there is none."""
    tail = tokenizer.decode(
        list(prompt.token_ids[-TAIL:]), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return thoughts.left_open(tail)
