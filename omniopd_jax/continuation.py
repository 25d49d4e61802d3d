"""Continuation fine-tuning (OLIVE, arXiv 2609.36246; method.md, section 6): the teacher goes on from a prefix of the
student's own answer, and the student is trained by cross-entropy on the teacher's tokens alone.

Kept: one text per prefix, prompt and prefix masked, no KL unless `anchor.kl_coef` asks for one. Ours: several cuts per
response, the rules `uniform` and `peak`, and what is left out: an answer that ended before its cut has none.
"""

import dataclasses

import numpy as np

from omniopd_jax import cuts, objective, scheduler
from omniopd_jax.audit import Audit, Decoder
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.hf.template import Template
from omniopd_jax.teachers.protocol import ContinuationRequest, stable_hash


@dataclasses.dataclass(frozen=True)
class Taught:
    """Rows that are the teacher's texts, `per` of them for each response.

    Attributes:
      prompts: what precedes each text: the prompt, and the student's prefix among its `token_ids`.
      tokens: the text in the student's tokens; empty where there was no cut or no text. finished: with its end.
      cut: tokens of the prefix, -1 where there was no place to cut.
    """

    prompts: list[Prompt]
    sample_ids: list[str]
    tokens: list[list[int]]
    finished: list[bool]
    cut: list[int]


def open_places(decoder: Decoder, tokens: list[int], finished: bool) -> np.ndarray:
    """bool: where a response may be cut: y_<t decodes on its own and ends before the answer does."""
    whole = decoder.borders(tokens)
    return whole[: len(tokens)] if finished else whole


def plan(decoder: Decoder, rule: cuts.Cut, responses, entropy_BT, cfg) -> list[Audit]:
    """One request per cut: rows in order, the cuts of a row ascending, as a prefix cache wants them.

    Args:
      responses: with `prompts`, `tokens`, `sample_ids` and `finished_B`, one per row.
      entropy_BT: None where the rule does not read it.

    Raises:
      NumberError: an entropy is NaN; a search for the largest would find no place to cut.
    """
    if entropy_BT is not None:
        scheduler.check_entropy(entropy_BT, responses.tokens)
    out, audited = [], objective.of(cfg).audited
    for b, tokens in enumerate(responses.tokens):
        asks = responses.sample_ids[b]
        if audited:  # of a mix: an audit of the same place would draw the same numbers
            asks = f"{stable_hash(asks, 'continuation'):016x}"
        entropy_T = np.zeros(0) if entropy_BT is None else entropy_BT[b, : len(tokens)]
        open_T = open_places(decoder, tokens, bool(responses.finished_B[b]))
        seed, prompt = stable_hash(responses.sample_ids[b], "cut"), responses.prompts[b]
        for m, t in enumerate(rule.places(open_T, entropy_T, seed, cfg)):
            prefix, _ = decoder.chunk(tokens, t, 1)
            request = ContinuationRequest(
                asks, t, tuple(prompt.messages), decoder.opened(prompt) + prefix, (0,),
                cuts.most_tokens(cfg), cfg.teacher.temperature, cfg.teacher.top_p, prompt.teacher,
            )  # fmt: skip
            out.append(Audit(b, m, request, "", similarity=np.zeros(0)))
    return out


def rows(audits: list[Audit], responses, template: Template, cfg) -> Taught:
    """What the answered requests of `plan` teach, `continuation.cuts` rows for each response.

    The prefix stays the ids that the student sampled. A text that the teacher ended gets the student's end of a turn;
    one cut at E does not. A call that failed leaves its row empty.
    """
    asked, per, most = {(a.row, a.m): a for a in audits}, cfg.continuation.cuts, cuts.most_tokens(cfg)
    out = []
    for b, tokens in enumerate(responses.tokens):
        for m in range(per):
            a, prompt, row, whole, cut = asked.get((b, m)), responses.prompts[b], [], False, -1
            if a is not None:
                cut = a.request.peak
                prefix = tuple(tokens[:cut])
                for text in a.result.continuations:
                    ids = template.follow([*prompt.token_ids, *prefix], text.text, begins=not prefix)
                    row, whole = template.answer_ids(ids, text.finish == "stop", most)
                prompt = dataclasses.replace(prompt, token_ids=prompt.token_ids + prefix)
            out.append((prompt, responses.sample_ids[b], row, whole, cut))
    return Taught(*map(list, zip(*out, strict=True)))


def metrics(taught: Taught, failed: int, closed: int = 0) -> dict[str, float]:
    """What a step's cuts and texts looked like, of this process: sums and counts, for `rates`.

    `closed`: rows that a gate has closed; they were not cut, whatever places they had.
    """
    cut = np.array(taught.cut)
    return {
        "rows": len(cut) - closed,
        "uncut": int((cut < 0).sum()) - closed,
        "failed": failed,
        "cut": int(cut[cut >= 0].sum()),
        "texts": sum(map(bool, taught.tokens)),
        "ended": sum(taught.finished),
    }


def rates(total: dict[str, float]) -> dict[str, float]:
    """`continuation/*`, from the sums of all processes."""
    return {
        "continuation/cut_mean": total["cut"] / max(1, total["rows"] - total["uncut"]),
        "continuation/uncut": total["uncut"],
        "continuation/failed": total["failed"],
        "continuation/ended_fraction": total["ended"] / max(1, total["texts"]),
    }
