"""What a run keeps of its texts, one JSON object per line: audits, whole responses, answers of an evaluation.

Pure functions from a step's data to records. Settings bound how many are kept and how long a text may be; what is left
out is counted, in the record where a text was cut and in the return value where whole records were not kept.
"""

import dataclasses

import numpy as np

from omniopd_jax.teachers.wire import instruct

PREFIX_CHARACTERS = 600  # of a prefix's end: what comes right before a chunk
ANSWER_CHARACTERS = 400  # of a right answer: a program's tests may be long
CHARACTER_TOKENS = 4  # at most this many make one character: its bytes in UTF-8
CONTEXT_TOKENS = 8  # decoded before a piece, for tokenizers whose first token drops its space


class Texts:
    """Cuts texts to a length and counts the characters that were cut."""

    def __init__(self, limit: int):
        self._limit, self.left_out = limit, 0

    def start(self, text: str, most: int | None = None) -> str:
        """The first characters."""
        most = min(self._limit, most or self._limit)
        self.left_out += max(0, len(text) - most)
        return text[:most]

    def end(self, text: str, most: int) -> str:
        """The last characters; the record says how long the whole was, so nothing is counted."""
        return text[max(0, len(text) - min(self._limit, most)) :]


def even(total: int, limit: int) -> list[int]:
    """At most `limit` of `total` places, spread evenly."""
    return list(range(total)) if total <= limit else [i * total // limit for i in range(limit)]


def question(messages) -> str:
    """The last message of the person who asks; other roles where there is none."""
    asked = [m for m in messages if m.get("role") == "user"] or list(messages)
    content = asked[-1]["content"] if asked else ""
    return content if isinstance(content, str) else str(content)


def grades(responses, rewards, grade_all, decoder, rows: list[int]) -> dict[int, bool | float]:
    """{row: task reward, or whether the answer is right}; rows without a right answer are left out.

    Args:
      responses: experience.Responses.
      rewards: float [B] where the step has them, else None.
      grade_all: (texts, answers) -> grades, or None where the run has no grader that may be asked for the log.
      rows: those that the records show.
    """
    if rewards is not None:
        return {b: _round(rewards[b]) for b in rows}
    if grade_all is None:
        return {}
    known = [b for b in rows if responses.prompts[b].answer is not None]
    texts = [decoder.text(responses.tokens[b]) for b in known]
    found = grade_all(texts, [responses.prompts[b].answer for b in known])
    return {b: bool(g) for b, g in zip(known, found, strict=True)}


def choose(feedback, rows: int, audit_limit: int, completion_limit: int) -> tuple[list, list[int], int, int]:
    """(audits, rows of whole responses, audits left out, responses left out).

    Responses are taken evenly over the batch; their audits come first, so that a person finds each audit in its
    response; the other audits are taken evenly too.
    """
    shown = even(rows, completion_limit)
    audits = [a for a in feedback.audits if a.request.peak >= 0]
    first = [a for a in audits if a.row in set(shown)][:audit_limit]
    taken = set(map(id, first))
    rest = [a for a in audits if id(a) not in taken]
    first += [rest[i] for i in even(len(rest), audit_limit - len(first))]
    first.sort(key=lambda a: (a.row, a.m))
    return first, shown, len(audits) - len(first), rows - len(shown)


def chance(phi, audits, pairs: int, cut=lambda i, texts: texts) -> dict[int, list[float]]:
    """{index of an audit: similarities of its chunk with another prompt's continuations}: what agreement is by chance.

    Args:
      phi: similarity.make(cfg).
      audits: those that are logged, with results.
      pairs: about this many comparisons in all; 0 = none.
      cut: (index of an audit, texts) -> the texts as they are compared with its chunk.
    """
    if not pairs or not audits:
        return {}
    each = max(1, pairs // len(audits))
    where, own, others = [], [], []
    for i in even(len(audits), pairs):
        texts = cut(i, _of_another_prompt(audits, i)[:each])
        where += [i] * len(texts)
        own += [audits[i].chunk] * len(texts)
        others += texts
    out: dict[int, list[float]] = {}
    for i, value in zip(where, phi(own, others), strict=True):
        out.setdefault(i, []).append(_round(value))
    return out


def _of_another_prompt(audits, i: int) -> list[str]:
    """The continuations of the next audit, half the list on, that another prompt has; none where all share one
    prompt."""
    n = len(audits)
    for k in range(n):
        other = audits[(i + n // 2 + k) % n]
        if other.request.messages != audits[i].request.messages and other.result.continuations:
            return [c.text for c in other.result.continuations]
    return []


@dataclasses.dataclass(frozen=True)
class Step:
    """What the records of a step are made from.

    Attributes:
      number: of the step. cfg: the config.
      responses: experience.Responses. scores: experience.Scores, or None where nothing was scored.
      peak_BM: int32, host. feedback: audit.Feedback.
      targets: objective.ChunkTargets, host arrays, or None for an objective without chunks.
      continued: audit.Audits of the teacher's texts behind prefixes that are trained on.
    """

    number: int
    cfg: object
    responses: object
    scores: object
    peak_BM: np.ndarray
    feedback: object
    targets: object
    continued: tuple = ()

    def entropy(self, b: int) -> np.ndarray:
        """Entropies of a row's tokens; empty where nothing was scored."""
        return np.zeros(0) if self.scores is None else self.scores.entropy_BT[b, : len(self.responses.tokens[b])]

    def chunk(self, b: int, m: int) -> dict:
        """What became of a chunk."""
        t = self.targets
        return {
            "k_sem": _round(self.feedback.k_sem_BM[b, m]),
            "n": int(self.feedback.n_BM[b, m]),
            "kept": bool(t.keep_BM[b, m]),
            "pi_bar": _round(t.pi_bar_BM[b, m]),
            "pi_hat": _round(t.pi_hat_BM[b, m]),
            "weight": _round(t.weight_BM[b, m]),
        }

    def about(self, b: int, texts: Texts, grade) -> dict:
        """Which response this is, of which question."""
        prompt = self.responses.prompts[b]
        answer = None if prompt.answer is None else texts.start(str(prompt.answer), ANSWER_CHARACTERS)
        return {
            "step": self.number,
            "prompt_id": prompt.id,
            "sample_id": self.responses.sample_ids[b],
            "response": b % self.cfg.num_generations,
            "question": texts.start(question(prompt.messages)),
            "answer": answer,
            "grade": grade,
        }


def audit_records(step: Step, audits, *, by_chance: dict, graded: dict) -> list[dict]:
    """One record per audit: question, place, texts, agreement, weight, cost.

    Args:
      audits: from `choose`. by_chance: from `chance`. graded: from `grades`.
    """
    return [_audit(step, a, by_chance.get(i), graded.get(a.row)) for i, a in enumerate(audits)]


def _audit(step: Step, a, by_chance, grade) -> dict:
    b, peak, texts = a.row, a.request.peak, Texts(step.cfg.log.text_characters)
    continuations, entropy_T = [c.text for c in a.result.continuations], step.entropy(b)
    record = step.about(b, texts, grade) | {
        "peak": peak,
        "response_tokens": len(step.responses.tokens[b]),
        "prefix_characters": len(a.request.prefix),
        "prefix_end": texts.end(a.request.prefix, PREFIX_CHARACTERS),
        "prefix_perplexity": _round(np.exp(-step.scores.logp_BT[b, :peak].mean())) if peak else None,
        "entropy": _round(entropy_T[peak]),
        "chunk_entropy": [_round(h) for h in entropy_T[peak : peak + min(8, a.request.max_tokens)]],
        "chunk": texts.start(a.chunk),
        "continuations": [texts.start(t) for t in continuations],
        "failures": [texts.start(f.error) for f in a.result.failures],
        "restarted": sum(restarts(a.request.prefix, t) for t in continuations),
        "explained": sum(explains(t) for t in continuations),
        "similarity": [_round(s) for s in a.similarity],
        **step.chunk(b, a.m),
        "latency_s": _round(a.result.latency_s),
        "cost_usd": a.result.usage.cost_usd,
    }
    if by_chance:
        record["chance"] = by_chance
    if a.request.teacher:
        record["teacher"] = a.request.teacher
    if texts.left_out:
        record["left_out_characters"] = texts.left_out
    return record


def completion_records(step: Step, rows: list[int], decoder, *, graded: dict) -> list[dict]:
    """One record a whole response: its tokens' texts and entropies, its chunks with what the teacher made of them.

    Args:
      rows: from `choose`. decoder: audit.Decoder. graded: from `grades`.
    """
    return [_completion(step, b, decoder, graded.get(b)) for b in rows]


def _completion(step: Step, b: int, decoder, grade) -> dict:
    tokens, texts, entropy_T = step.responses.tokens[b], Texts(step.cfg.log.text_characters), step.entropy(b)
    parts = pieces(decoder, tokens, step.cfg.log.text_characters)
    chunks = [] if step.targets is None else [(m, int(p)) for m, p in enumerate(step.peak_BM[b]) if p >= 0]
    record = step.about(b, texts, grade) | {
        "finished": bool(step.responses.finished_B[b]), "tokens": len(tokens),
        "mean_entropy": _round(entropy_T.mean()) if entropy_T.size else None, "text": "".join(parts), "pieces": parts,
        "entropy": [_round(h, 3) for h in entropy_T[: len(parts)]], "chunk_tokens": step.cfg.audit.chunk_tokens,
        "chunks": [{"peak": peak} | step.chunk(b, m) for m, peak in chunks],
    }  # fmt: skip
    if behind := [a for a in step.continued if a.row == b]:
        record["continued"] = [
            {"cut": a.request.peak} | {"text": texts.start(c.text), "finish": c.finish}
            for a in behind
            for c in a.result.continuations
        ]
    if len(parts) < len(tokens):
        record["left_out_tokens"] = len(tokens) - len(parts)
    if texts.left_out:
        record["left_out_characters"] = texts.left_out
    return record


def restarts(prefix: str, text: str) -> bool:
    """Whether a continuation begins with the words that the answer began with, in place of what comes next."""
    start = " ".join(prefix.split())[: instruct.MIN_RESTART]
    return len(start) == instruct.MIN_RESTART and " ".join(text.split()).startswith(start)


def explains(text: str) -> bool:
    """Whether a continuation says what it is about to do ("Sure! Here is ...") in place of doing it."""
    return bool(instruct.PREAMBLE.match(text) or instruct.ASSENT.match(text))


def pieces(decoder, tokens: list[int], limit: int) -> list[str]:
    """The text that each token adds; "" for all but the last token of a character that several share.

    Special tokens add nothing. Stops before the token with which the text would pass `limit` characters.
    """
    out, start, length = [], 0, 0
    for t in range(1, len(tokens) + 1):
        context = max(0, start - CONTEXT_TOKENS)
        before, both = decoder.text(tokens[context:start]), decoder.text(tokens[context:t])
        inside = both.endswith("\ufffd") and t - start < CHARACTER_TOKENS and t < len(tokens)
        if inside:  # the character may still be completed
            continue
        piece = both[len(before) :] if both.startswith(before) else decoder.text(tokens[start:t])
        length += len(piece)
        if length > limit:
            break
        out += [""] * (t - start - 1) + [piece]
        start = t
    return out


def evaluation_records(evaluation, prompts, step: int, cfg) -> tuple[list[dict], int]:
    """(one record an answer, how many were left out); the first ones, so that evaluations of a run show the same
    prompts.

    Args:
      evaluation: with `texts` and `correct`, one per prompt.
      step: updates made before it.
    """
    out = []
    for prompt, text, correct in zip(prompts, evaluation.texts, evaluation.correct, strict=True):
        if len(out) == cfg.log.evaluation_answers:
            break
        texts = Texts(cfg.log.text_characters)
        record = {
            "step": step,
            "prompt_id": prompt.id,
            "question": texts.start(question(prompt.messages)),
            "answer": texts.start(str(prompt.answer), ANSWER_CHARACTERS),
            "text": texts.start(text),
            "correct": bool(correct),
        }
        if texts.left_out:
            record["left_out_characters"] = texts.left_out
        out.append(record)
    return out, len(prompts) - len(out)


def _round(x, digits: int = 5) -> float:
    return round(float(x), digits)
