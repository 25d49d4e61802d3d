"""Peaks -> prefixes -> continuations -> k_sem and n: the only place where text, tokens and positions meet.

The student's chunk is text(y_c) = decode(y_<t+C) with its prefix decode(y_<t) cut off, special tokens left out; the
teacher is handed the prompt's messages and that raw prefix, never the audited tokens (method.md, section 2).
"""

import codecs
import dataclasses
import os

import numpy as np

from omniopd_jax import span
from omniopd_jax.config import min_continuations
from omniopd_jax.errors import NumberError, UserError
from omniopd_jax.parallel import processes
from omniopd_jax.teachers.protocol import ContinuationRequest, ContinuationResult, Teacher, gather_all


@dataclasses.dataclass
class Audit:
    """One chunk and what came of it. `row` and `m` place it in the batch; `similarity` is one phi a continuation."""

    row: int
    m: int
    request: ContinuationRequest
    chunk: str
    result: ContinuationResult | None = None
    similarity: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Feedback:
    """k_sem_BM float32, n_BM int32 (0 where nothing was asked or nothing arrived), and the audits behind them."""

    k_sem_BM: np.ndarray
    n_BM: np.ndarray
    audits: list[Audit]


class Decoder:
    """Text of token prefixes, special tokens and what comes from a stop string on left out; and where a chunk may
    start.

    Byte-level tokenizers write a character as soon as its bytes are there. Tokenizers with byte fallback (Llama 2,
    Mistral 0.1) decode neighbouring bytes at once: where one of them is bad, all turn into replacement marks, the whole
    characters before it too. A special token writes nothing, and leaves the character before it open.
    """

    def __init__(self, tokenizer, stop_strings: tuple[str, ...] = ()):
        self._tokenizer, self._stops = tokenizer, stop_strings
        self._bytes = _fallback_bytes(tokenizer)  # token -> its byte; empty: a byte-level tokenizer
        self._space = next((t for t, byte in self._bytes.items() if byte == 0x20), None)
        self._special = set(tokenizer.all_special_ids)
        self._lengths: dict[int, int | None] = {}

    def text(self, token_ids) -> str:
        """decode(token_ids), special tokens left out, up to the first stop string, nothing else changed."""
        text = self._raw(token_ids)
        found = [i for s in self._stops if (i := text.find(s)) >= 0]
        return text[: min(found)] if found else text

    def eligible(self, token_ids: list[int], chunk_tokens: int) -> np.ndarray:
        """bool [len]: a chunk may start at t (method.md, section 2).

        Neither border of the chunk is inside a character: decode(y_<t) and decode(y_<t+C) are right on their own, and
        the first is a prefix of the second. No more than half of the chunk's text is replacement marks. Positions whose
        chunk does not fit are judged by the tokens that there are.
        """
        T = len(token_ids)
        end = np.minimum(np.arange(T) + chunk_tokens, T)
        whole, length, marks = self._fallback_prefixes(token_ids) if self._bytes else self._utf8_prefixes(token_ids)
        readable = 2 * (marks[end] - marks[:T]) <= length[end] - length[:T]
        out = whole[:T] & whole[end] & readable & self._stays(token_ids, whole, end)
        return out & self._before_stop(token_ids) if self._stops else out

    def borders(self, token_ids: list[int]) -> np.ndarray:
        """bool [len + 1]: y_<t decodes on its own: it ends at the end of a character and reaches into no stop
        string."""
        whole = (self._fallback_prefixes(token_ids) if self._bytes else self._utf8_prefixes(token_ids))[0]
        if self._stops:
            whole[:-1] &= self._before_stop(token_ids)
            whole[-1] &= self.text(token_ids) == self._raw(token_ids)
        return whole

    def chunk(self, token_ids: list[int], peak: int, chunk_tokens: int) -> tuple[str, str]:
        """(prefix, chunk): decode(y_<t) and what decode(y_<t+C) adds to it.

        At a position that is not eligible the second may be no continuation of the first: then from where they differ.
        """
        prefix, whole = self._raw(token_ids[:peak]), self._raw(token_ids[: peak + chunk_tokens])
        if self._stops:
            kept = len(self.text(token_ids))  # a chunk may end within the stop string
            prefix, whole = prefix[:kept], whole[:kept]
        same = len(prefix) if whole.startswith(prefix) else len(os.path.commonprefix([prefix, whole]))
        return prefix, whole[same:]

    def opened(self, prompt) -> str:
        """The mark of thoughts that the student's prompt leaves open; "" where it leaves none."""
        return span.opened(self._tokenizer, prompt)

    def _length(self, token: int) -> int | None:
        """Characters that a token adds to a text; None where that depends on its neighbours (an open token)."""
        if token not in self._lengths:
            one, two = self._raw([token]), self._raw([token, token])  # some leave out the space that begins a text
            closed = two and "\ufffd" not in one + two and token not in self._bytes
            self._lengths[token] = len(two) - len(one) if closed else None
        return self._lengths[token]

    def _utf8_prefixes(self, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each y_<t, [len + 1]: whether it ends at the end of a character; its characters, its replacement marks
        there."""
        whole = np.ones(len(token_ids) + 1, bool)
        length, marks = np.zeros((2, len(token_ids) + 1), np.int64)
        start = 0  # the last position whose prefix is known to be whole
        for t, token in enumerate(token_ids, 1):
            size = self._length(token) if start == t - 1 else None
            text = self._raw(token_ids[start:t]) if size is None else ""
            whole[t] = not text.endswith("\ufffd")
            length[t] = length[start] + (len(text) if size is None else size)
            marks[t] = marks[start] + text.count("\ufffd")
            start = t if whole[t] else start
        return whole, length, marks

    def _fallback_prefixes(self, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of a tokenizer with byte fallback: a run of bytes is all characters, or all marks."""
        whole = np.ones(len(token_ids) + 1, bool)
        length, marks = np.zeros((2, len(token_ids) + 1), np.int64)
        run, at, first = None, 0, True  # the bytes before t, the position where they begin, nothing is written yet
        for t, token in enumerate(token_ids, 1):
            length[t], marks[t], whole[t] = length[t - 1], marks[t - 1], whole[t - 1]
            if token in self._special:
                continue
            if token in self._bytes:
                if run is None:
                    run, at = _Utf8(), t - 1
                    stripped = int(first and token == self._space and not self._raw([token]))
                run.add(self._bytes[token])
                whole[t] = run.whole
                length[t] = length[at] + (run.characters - stripped if run.whole else run.bytes)
                marks[t] = marks[at] + (0 if run.whole else run.bytes)
            else:
                run, size = None, self._length(token)
                text = self._raw([token]) if size is None or first else ""
                length[t] += len(text) if size is None or first else size
                marks[t] += text.count("\ufffd")
                whole[t] = not text.endswith("\ufffd")
            first = False
        return whole, length, marks

    def _stays(self, token_ids: list[int], whole: np.ndarray, end: np.ndarray) -> np.ndarray:
        """bool [len]: y_<end still has the text of y_<t: no bad byte after t turned a character before it into a
        mark."""
        T = len(token_ids)
        out = np.ones(T, bool)
        if not self._bytes:
            return out
        run_end, begun = np.full(T + 1, T), False  # of the run of bytes that t is in; whether a byte of it is before t
        for t in reversed(range(T)):
            inside = token_ids[t] in self._bytes or token_ids[t] in self._special
            run_end[t] = run_end[t + 1] if inside else t
        for t in range(1, T):
            before = token_ids[t - 1]
            begun = before in self._bytes or (begun and before in self._special)
            out[t] = not begun or whole[min(end[t], run_end[t])]
        return out

    def _before_stop(self, token_ids: list[int]) -> np.ndarray:
        """bool [len]: y_<t does not reach into a stop string."""
        whole = self._raw(token_ids)
        kept = len(self.text(token_ids))
        if kept == len(whole):
            return np.ones(len(token_ids), bool)
        low, high = 0, len(token_ids)  # the largest prefix that ends before the string
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self._raw(token_ids[:middle])) <= kept else (low, middle - 1)
        return np.arange(len(token_ids)) <= low

    def _raw(self, token_ids) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Utf8:
    """A run of bytes read as UTF-8, one by one. `whole`: they are characters to the last, `characters` of them."""

    def __init__(self):
        self._reader = codecs.getincrementaldecoder("utf-8")()
        self.bytes, self.characters, self.whole, self._broken = 0, 0, True, False

    def add(self, byte: int) -> None:
        """The next byte."""
        self.bytes += 1
        if not self._broken:
            try:
                self.characters += len(self._reader.decode(bytes([byte])))
            except UnicodeDecodeError:
                self._broken = True
        self.whole = not self._broken and not self._reader.getstate()[0]


def _fallback_bytes(tokenizer) -> dict[int, int]:
    """{token: its byte} where the tokenizer decodes tokens such as <0xE6> as bytes; empty where they are text like
    others."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = tokenizer.get_vocab()
    if not all(name in vocab for name in names):
        return {}
    sun = [vocab[f"<0x{byte:02X}>"] for byte in "\u65e5".encode()]
    if "\u65e5" not in tokenizer.decode(sun, clean_up_tokenization_spaces=False):
        return {}
    return {vocab[name]: byte for byte, name in enumerate(names)}


def eligible_positions(decoder: Decoder, tokens: list[list[int]], T: int, chunk_tokens: int) -> np.ndarray:
    """bool [B, T] from each row's response tokens; False past its end."""
    out = np.zeros((len(tokens), T), bool)
    for b, row in enumerate(tokens):
        out[b, : len(row)] = decoder.eligible(row, chunk_tokens)
    return out


def plan(decoder: Decoder, prompts, tokens, peak_BM, sample_ids, cfg, num_continuations: int = 0) -> list[Audit]:
    """The audits of a batch: one a peak, rows in order, peaks of a row ascending.

    Args:
      num_continuations: N, where a budget lowered it; 0: the config's.
      prompts: a data.Prompt a row.
      tokens: response tokens of each row.
      peak_BM: int32, -1 where none.
      sample_ids: a row.
    """
    N = num_continuations or cfg.audit.num_continuations
    audits = []
    for b, peaks in enumerate(np.asarray(peak_BM)):
        opened = decoder.opened(prompts[b])  # what the student's own prompt wrote of the answer
        for m, peak in enumerate(int(p) for p in peaks if p >= 0):
            prefix, chunk = decoder.chunk(tokens[b], peak, cfg.audit.chunk_tokens)
            request = ContinuationRequest(
                sample_ids[b], peak, tuple(prompts[b].messages), opened + prefix, tuple(range(N)),
                cfg.audit.chunk_tokens, cfg.teacher.temperature, cfg.teacher.top_p, prompts[b].teacher,
            )  # fmt: skip
            audits.append(Audit(b, m, request, chunk))
    return audits


async def ask(teacher: Teacher, audits: list[Audit]) -> None:
    """Sends every audit's request and waits for all answers; results land in the audits.

    Raises:
      TeacherStopped: after the calls under way have ended, so that nothing paid for is lost.
    """

    async def one(audit: Audit):
        audit.result = await teacher.continue_text(audit.request)
        _check_complete(audit)

    await gather_all(one(a) for a in audits)


def compare(phi, audits: list[Audit], shape: tuple[int, int], cfg, *, trim: bool | list[bool]) -> Feedback:
    """k_sem = sum_i phi(text(y_c), text(z_i)) over the continuations that arrived.

    Args:
      phi: similarity.make(cfg).
      shape: (B, M).
      trim: cut each continuation to the student chunk's length in characters first (foreign tokenizers; ours); of all
        audits, or one bool an audit.
    """
    k_sem_BM, n_BM = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for audit, value_N in zip(audits, similarities(phi, audits, cfg, trim=trim), strict=True):
        audit.similarity = value_N
        k_sem_BM[audit.row, audit.m] = value_N.sum(dtype=np.float64)
        n_BM[audit.row, audit.m] = len(value_N)
    return Feedback(k_sem_BM, n_BM, audits)


def similarities(phi, audits: list[Audit], cfg, *, trim: bool) -> list[np.ndarray]:
    """phi of each audit's chunk with each of its continuations that arrived; arguments as in `compare`."""
    texts = [[c.text for c in a.result.continuations] for a in audits]
    if cfg.audit.shuffle_texts:
        texts = _of_another_prompt(audits, texts)
    trim_A = np.broadcast_to(trim, len(audits))
    texts = [trimmed(a.chunk, ts) if cut else ts for a, ts, cut in zip(audits, texts, trim_A, strict=True)]
    value = phi([a.chunk for a, ts in zip(audits, texts, strict=True) for _ in ts], [t for ts in texts for t in ts])
    if not (np.isfinite(value).all() and (value >= 0).all() and (value <= 1 + 1e-6).all()):
        raise NumberError(
            f"audit.similarity = {cfg.audit.similarity!r} gave values outside [0, 1]: take another, or another "
            "audit.embedding_model"
        )
    ends = np.cumsum([len(ts) for ts in texts])
    return np.split(np.asarray(value), ends[:-1]) if audits else []


def trimmed(chunk: str, texts: list[str]) -> list[str]:
    """Texts cut to a chunk's length in characters; a chunk of special tokens alone has none to cut them to."""
    return [text[: len(chunk)] for text in texts] if chunk else texts


def fewest(cfg, asked: int) -> int:
    """n_min of an audit for which `asked` continuations were asked: the config's, or half of what a budget left of
    N."""
    return (
        min_continuations(cfg) if asked >= cfg.audit.num_continuations else min(min_continuations(cfg), -(-asked // 2))
    )


def metrics(feedback: Feedback, cfg) -> dict:
    """How the similarities of a step's audits are distributed, and how many audits came too short."""
    own = {  # of this process; quantiles need every process's values
        "short": sum(0 < len(a.similarity) < fewest(cfg, len(a.request.indices)) for a in feedback.audits),
        "similarity": [float(s) for a in feedback.audits for s in a.similarity],
    }
    parts = processes.gather("audits", own)
    similarity = np.array([s for p in parts for s in p["similarity"]])
    out = {"audit/short": sum(p["short"] for p in parts)}
    for q in (10, 50, 90):
        out[f"audit/similarity_p{q}"] = float(np.quantile(similarity, q / 100)) if similarity.size else 0.0
    return out


def _check_complete(audit: Audit) -> None:
    """Every wanted index came back once, as a text or as a failure: a teacher that loses one must not go unseen."""
    r = audit.result
    got = sorted([c.index for c in r.continuations] + [f.index for f in r.failures])
    if got != sorted(audit.request.indices):
        raise RuntimeError(f"teacher answered indices {got} of {sorted(audit.request.indices)}")


def _of_another_prompt(audits: list[Audit], texts: list[list[str]]) -> list[list[str]]:
    """The control of shuffled texts: audit i gets the answers of the next audit, half a batch on, of another prompt.

    Raises:
      UserError: a step whose audits are all of one prompt.
    """
    out = []
    for i, audit in enumerate(audits):
        order = ((i + len(audits) // 2 + k) % len(audits) for k in range(len(audits)))
        other = next((j for j in order if audits[j].request.messages != audit.request.messages), None)
        if other is None:
            raise UserError("audit.shuffle_texts needs at least two different prompts with an audit in each step")
        out.append(texts[other])
    return out
