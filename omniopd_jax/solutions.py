"""Whole solutions by the teacher: asked once per prompt, whoever reads them (method.md, section 5).

`sft` and `cut = zero` train on them, `context` shows one to the student, the gate (TGOPD, arXiv 2609.02998) grades them
before anything more is bought for their prompt. A solution is identified by its prompt, its
index and the teacher's settings alone, so that epochs and methods share what was bought.
"""

import dataclasses

import numpy as np

from omniopd_jax import objective
from omniopd_jax.audit import Audit
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.hf import thoughts
from omniopd_jax.hf.template import Template
from omniopd_jax.teachers.protocol import Continuation, ContinuationRequest, stable_hash

GATES = {"none": False, "graded": True}


def solution_id(prompt_id: str) -> str:
    """Who asks for a whole solution: the prompt alone."""
    return f"{stable_hash('solution', prompt_id):016x}"


def wanted(cfg) -> int:
    """Solutions per prompt that a step needs: one per generation where they are trained on, one to show."""
    counts = [cfg.audit.gate_attempts if gated(cfg) else 0]
    for _, part in objective.parts(cfg):
        own = objective.of(part)
        if "solutions" in own.asks:
            counts.append(1 if own.samples else cfg.num_generations)
    return max(counts)


def gated(cfg) -> bool:
    """Whether the teacher's own solutions decide which prompts are bought further (`audit.gate`)."""
    return GATES[cfg.audit.gate]


@dataclasses.dataclass(frozen=True)
class Gate:
    """What the gate found: `shut` are ids of the prompts that are not bought further, `right` the first right attempt
    by prompt id, `counts` those of prompts and grades."""

    shut: frozenset[str] = frozenset()
    right: dict[str, int] = dataclasses.field(default_factory=dict)
    counts: dict[str, float] = dataclasses.field(default_factory=dict)


def shown(attempts: dict[int, Continuation], right: int | None) -> Continuation | None:
    """The solution that a privileged prompt shows: the first that the gate found right, else the first that came."""
    return attempts.get(min(attempts, default=-1) if right is None else right)


def closed(prompts: list[Prompt], found: list[dict[int, Continuation]], attempts: int, grade_all) -> Gate:
    """Shuts the prompts that the teacher fails: none of its attempts is right.

    A prompt without an answer to grade by is open; one whose attempts all failed to come is closed.

    Args:
      attempts: so many solutions of a prompt are graded, the first ones; others may have asked for more of them.
      grade_all: (texts, answers) -> grades.
    """
    asked = [
        (p, i, got[i].text)
        for p, got in zip(prompts, found, strict=True)
        for i in sorted(got)
        if i < attempts and p.answer is not None
    ]
    grades = grade_all([text for *_, text in asked], [p.answer for p, *_ in asked])
    right: dict[str, int] = {}
    for (p, i, _), grade in zip(asked, grades, strict=True):
        if grade:
            right.setdefault(p.id, i)
    shut = frozenset(p.id for p in prompts if p.answer is not None and p.id not in right)
    counts = {"gate_prompts": len(prompts), "gate_closed": sum(p.id in shut for p in prompts)}
    return Gate(shut, right, counts | {"gate_graded": len(asked), "gate_right": int(sum(map(bool, grades)))})


def bought(cfg) -> dict[str, int]:
    """{what a teacher is asked for (`Objective.asks`): texts of it per prompt or per response}, for the estimate."""
    asks = dict.fromkeys(sorted(objective.of(cfg).asks), 1)
    if count := wanted(cfg):
        asks["solutions"] = count
    return asks


def are_given(prompts: list[Prompt]) -> bool:
    """Whether the prompts bring solutions of their own, all or none of them (preflight)."""
    return prompts[0].solution is not None


def plan(prompts: list[Prompt], count: int, cfg) -> list[Audit]:
    """The requests of a step, one per prompt."""
    requests = {
        p.id: ContinuationRequest(
            solution_id(p.id), -1, tuple(p.messages), "", tuple(range(count)), cfg.max_completion_length,
            cfg.teacher.temperature, cfg.teacher.top_p, p.teacher,
        )
        for p in prompts
    }  # fmt: skip
    return [Audit(b, 0, r, "", similarity=np.zeros(0)) for b, r in enumerate(requests.values())]


def texts(prompts: list[Prompt], audits: list[Audit]) -> list[dict[int, Continuation]]:
    """Of each prompt its solutions by index; one that failed is missing."""
    if not audits and are_given(prompts):
        return [{0: Continuation(0, p.solution or "", "stop")} for p in prompts]
    answered = {a.request.sample_id: a.result.continuations for a in audits if a.result is not None}
    return [{c.index: c for c in answered[solution_id(p.id)]} for p in prompts]


def rows(
    prompts: list[Prompt],
    found: list[dict[int, Continuation]],
    count: int,
    template: Template,
    most: int,
    opened=lambda prompt: "",
) -> tuple[list[list[int]], list[bool]]:
    """The first `count` solutions of each prompt in the student's tokens, and whether each is whole.

    One that failed is an empty row: it weighs nothing. One cut at the cap is kept, without an end token.

    Args:
      most: tokens of a row; longer ones are cut. opened: the mark of thoughts that a prompt leaves open.
    """
    tokens, finished = [], []
    for prompt, got in zip(prompts, found, strict=True):
        for i in range(count):
            text = thoughts.after_mark(got[i].text, opened=bool(opened(prompt))) if i in got else ""
            ids = template.follow(prompt.token_ids, text, begins=True)
            row, whole = template.answer_ids(ids, i in got and got[i].finish == "stop", most)
            tokens.append(row)
            finished.append(whole)
    return tokens, finished
