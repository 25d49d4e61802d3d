"""Thoughts in an answer: `<think> ... </think>`, where they are in text and in tokens, and how an answer goes on there.

Three kinds of prompt begin an answer: one that leaves the mark open (`<think>` at its end: the answer begins inside the
thoughts), one that closes an empty block (thinking is switched off), and one that writes neither (the model opens the
block by itself, or has none).
"""

import re

import numpy as np

from omniopd_jax.hf import harmony

OPEN, CLOSE = "<think>", "</think>"
_LEFT_OPEN = re.compile(rf"{OPEN}\s*\Z")
_EMPTY_BLOCK = re.compile(rf"{OPEN}\s*{CLOSE}\s*\Z")


def left_open(prompt: str) -> str:
    """The end of a prompt that leaves thoughts open, from the mark on; "" of any other prompt."""
    found = _LEFT_OPEN.search(prompt)
    return found[0] if found else ""


def closed(prompt: str) -> bool:
    """Whether a prompt ends in an empty block: thinking is switched off."""
    return bool(_EMPTY_BLOCK.search(prompt))


def joined(prompt: str, prefix: str) -> str:
    """A prompt and an unfinished answer behind it, as one raw text.

    An answer that brings its own mark takes the place of the one that the prompt left open, or of its empty block: the
    block is neither opened twice nor closed over it. gpt-oss's prompt gets the channel that the answer is in.
    """
    if prompt.endswith(harmony.BEGINS):
        return prompt + harmony.written(prefix, OPEN, CLOSE)
    if prefix.lstrip().startswith(OPEN):
        prompt = _LEFT_OPEN.sub("", _EMPTY_BLOCK.sub("", prompt))
    return prompt + prefix


def after_mark(text: str, *, opened: bool) -> str:
    """A whole answer as it follows its prompt: without its own first mark where the prompt has one already."""
    return text.lstrip().removeprefix(OPEN).lstrip("\n") if opened and text.lstrip().startswith(OPEN) else text


def spans(text: str, *, inside: bool) -> list[tuple[int, int]]:
    """[(start, end) in characters] of the thoughts of an answer, their marks included; without an end, up to the last.

    Args:
      inside: the prompt left the thoughts open.
    """
    out, at = [], 0
    while True:
        start = at if inside else text.find(OPEN, at)
        if start < 0 or (start == len(text) and not inside):
            return out
        end = text.find(CLOSE, start)
        if end < 0:
            return [*out, (start, len(text))]
        at, inside = end + len(CLOSE), False
        out.append((start, at))


def token_mask(tokenizer, token_ids: list[int], *, inside: bool) -> np.ndarray:
    """bool [len]: the token is part of the thoughts; a mark's tokens are.

    Args:
      inside: the prompt left the thoughts open.
    """
    out = np.zeros(len(token_ids), bool)
    text = _text(tokenizer, token_ids)
    found = spans(text, inside=inside)
    if not found:
        return out
    if (places := _by_id(tokenizer, token_ids, text)) is not None:
        for start, end in spans("".join(places), inside=inside):
            out[_count(places, start) : _count(places, end)] = True
        return out
    for start, end in found:
        first = 0 if start == 0 else _tokens_of(tokenizer, token_ids, start + 1) - 1
        out[first : _tokens_of(tokenizer, token_ids, end)] = True
    return out


def _by_id(tokenizer, token_ids: list[int], text: str) -> list[str] | None:
    """One text a token, where each mark is a token of its own: the mark, or "." for any other; None: they are not."""
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in (OPEN, CLOSE)}  # of another text where it has none
    marks = {i: mark for mark, i in ids.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == mark}
    places = [marks.get(t, ".") for t in token_ids]
    same = all(text.count(mark) == places.count(mark) for mark in (OPEN, CLOSE))
    return places if same else None


def _count(places: list[str], characters: int) -> int:
    """How many of the places make up so many characters."""
    return int(np.searchsorted(np.cumsum([0, *map(len, places)]), characters))


def _tokens_of(tokenizer, token_ids: list[int], characters: int) -> int:
    """The fewest first tokens whose text has so many characters."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_text(tokenizer, token_ids[:middle])) >= characters else (middle + 1, high)
    return low


def _text(tokenizer, token_ids) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
