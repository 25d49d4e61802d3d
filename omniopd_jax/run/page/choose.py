"""Which records go onto the page, by a stated rule, and the compact form in which they do."""

import itertools

TEXT = 4_000  # characters of any text on the page; longer ones are cut and counted
PIECES = 4_000  # tokens of a response
CONTINUATIONS = 16  # of an audit


class Chosen:
    """Records in compact form: texts are indices into one table, so that what repeats is stored once.

    Attributes:
      texts: the table. audits, completions, evaluations: dicts for the page.
      left_out: {what: how many}.
    """

    def __init__(self, folder, audits: int, completions: int, evaluations: int):
        self.texts, self._index, self.left_out = [], {}, {}
        shown = _per_step(folder.completions, completions)
        whole = {c["sample_id"] for c in shown}
        taken = _per_step(folder.audits, audits, first=lambda a: a["sample_id"] in whole)
        answers = _answers(folder.evaluations, evaluations)
        self._count("audits", folder.audits, taken)
        self._count("responses", folder.completions, shown)
        self._count("evaluation answers", folder.evaluations, answers)
        place = {c["sample_id"]: i for i, c in enumerate(shown)}
        self.completions = [self._completion(c) for c in shown]
        self.audits = [self._audit(a, place.get(a["sample_id"], -1)) for a in taken]
        self.evaluations = [self._answer(e) for e in answers]

    def _count(self, what: str, before: list, after: list) -> None:
        if len(after) < len(before):
            self.left_out[what] = len(before) - len(after)

    def _text(self, text) -> int:
        """Its index in the table; -1 for None."""
        if text is None:
            return -1
        text = text if isinstance(text, str) else str(text)
        if len(text) > TEXT:
            self.left_out["characters"] = self.left_out.get("characters", 0) + len(text) - TEXT
            text = text[:TEXT]
        if text not in self._index:
            self._index[text] = len(self.texts)
            self.texts.append(text)
        return self._index[text]

    def _audit(self, a: dict, place: int) -> dict:
        plain = (
            "step",
            "prompt_id",
            "sample_id",
            "response",
            "peak",
            "response_tokens",
            "prefix_characters",
            "prefix_perplexity",
            "entropy",
            "similarity",
            "k_sem",
            "n",
            "kept",
            "pi_bar",
            "pi_hat",
            "weight",
            "latency_s",
            "cost_usd",
            "grade",
            "chance",
        )
        out = {key: a[key] for key in plain if a.get(key) is not None}
        for key in ("prompt_id", "sample_id"):
            out[key] = str(out[key])[:200]
        out |= {
            key: self._text(a[key]) for key in ("question", "answer", "prefix_end", "chunk") if a.get(key) is not None
        }
        out["continuations"] = [self._text(t) for t in a["continuations"][:CONTINUATIONS]]
        out["failures"] = len(a.get("failures") or ())
        return out | {"whole": place}

    def _completion(self, c: dict) -> dict:
        plain = ("step", "response", "grade", "finished", "tokens", "mean_entropy", "chunk_tokens", "chunks")
        out = {key: c[key] for key in plain if c.get(key) is not None}
        out |= {key: self._text(c[key]) for key in ("question", "answer") if c.get(key) is not None}
        pieces, entropy, length = [], [], 0
        for piece, h in itertools.zip_longest(c["pieces"][:PIECES], c["entropy"][:PIECES], fillvalue=0.0):
            length += len(piece)
            if length > 4 * PIECES:
                break
            pieces.append(piece)
            entropy.append(round(h, 2))
        if len(pieces) < c.get("tokens", 0):
            out["hidden_tokens"] = c["tokens"] - len(pieces)
        names = {key: str(c.get(key, ""))[:200] for key in ("prompt_id", "sample_id")}
        return out | names | {"pieces": pieces, "entropy": entropy}

    def _answer(self, e: dict) -> dict:
        texts = {key: self._text(e.get(key)) for key in ("question", "answer", "text")}
        return {
            "step": e["step"],
            "prompt_id": str(e.get("prompt_id"))[:200],
            "correct": bool(e.get("correct")),
        } | texts


def _per_step(records: list[dict], limit: int, first=lambda r: False) -> list[dict]:
    """At most `limit`, each step its equal part: within a step those of `first`, then evenly; steps in order.

    What a step doesn't use goes to the steps after it.
    """
    steps: dict[int, list] = {}
    for r in records:
        steps.setdefault(r["step"], []).append(r)
    out, left = [], limit
    for i, step in enumerate(sorted(steps)):
        share = left // (len(steps) - i)
        wanted = [r for r in steps[step] if first(r)][:share]
        rest = [r for r in steps[step] if not first(r)]
        room = min(len(rest), share - len(wanted))
        wanted += [rest[j * len(rest) // room] for j in range(room)]
        out += wanted
        left -= len(wanted)
    return out


def _answers(records: list[dict], limit: int) -> list[dict]:
    """The same prompts of the first and the last evaluation: what changed."""
    steps = sorted({r["step"] for r in records})
    ends = {steps[0], steps[-1]} if steps else set()
    each = limit // max(1, len(ends))
    out = []
    for step in sorted(ends):
        out += [r for r in records if r["step"] == step][:each]
    return out


RULE = (
    "Each step has an equal share. Within a step, audits of the responses that are shown whole come first, the others "
    "are "
    "taken evenly over the step; of the evaluations' answers, the same prompts before and after."
)
