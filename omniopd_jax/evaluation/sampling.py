"""Greedy answers of a student to prompts with known results: the accuracy that a run reports."""

import dataclasses
from collections import Counter

import jax
import numpy as np

from omniopd_jax import model, rollout
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.graders import Grader
from omniopd_jax.hf.template import Template
from omniopd_jax.parallel import processes


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """accuracy in [0, 1]; mean length in tokens; share of responses cut at the cap; share of repeated 4-grams."""

    accuracy: float
    mean_length: float
    truncated_fraction: float
    repeated_fraction: float
    texts: tuple[str, ...]
    correct: tuple[bool, ...]


def greedy(
    params, model_cfg, prompts: list[Prompt], template: Template, end_ids, *, grader: Grader, max_new_tokens: int,
    how: rollout.How = rollout.DEFAULT, compute: model.Compute | None = None,
) -> Evaluation:  # fmt: skip
    """Greedy answers, graded. Each process of the mesh answers and grades its part of the prompts.

    Args:
      params: the model's parameters, stacked or as `rollout.prepare` returns them.
      prompts: encoded, each with an answer. template: what rendered them; its stop strings end an answer too.
      how: the sampler's settings.
      compute: None: float32 on the default device.

    Returns:
      Evaluation, the same in every process.
    """
    compute = compute or model.Compute()
    if isinstance(params["layers"], dict):
        params = rollout.prepare(params, model_cfg, compute=compute)
    rank, count = (jax.process_index(), jax.process_count()) if compute.mesh.is_multi_process else (0, 1)
    own = -(-len(prompts) // count)
    part = prompts[rank * own : (rank + 1) * own]
    filling = own - len(part)  # every process has as many rows
    rows = rollout.stream(
        params, model_cfg, [p.token_ids for p in part] + [(0,)] * filling, np.zeros((own, 2), np.uint32),
        max_new_tokens=np.array([max_new_tokens] * len(part) + [1] * filling), temperature=0.0, end_ids=end_ids,
        how=how, compute=compute,
    )  # fmt: skip
    [rows] = rows
    answers = [r.tokens.tolist() for r in rows[: len(part)]]
    read = [template.read(tokens) for tokens in answers]
    grades = grader.grade_all([text for text, _, _ in read], [p.answer for p in part]) if part else []
    answers = [
        [text, bool(grade), n, row.finished or stopped, repeated_ngrams(tokens[:n])]
        for (text, n, stopped), grade, tokens, row in zip(read, grades, answers, rows)
    ]
    parts = [answers] if count == 1 else processes.gather("evaluation", answers)
    texts, correct, lengths, finished, repeats = zip(*(a for part in parts for a in part), strict=True)
    means = [float(np.mean(a)) for a in (correct, lengths, finished, repeats)]
    return Evaluation(means[0], means[1], 1 - means[2], means[3], texts, correct)


def repeated_ngrams(tokens: list[int], n: int = 4) -> float:
    """Share of a response's n-grams that it has had before: what repetition loops push to 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(Counter(grams)) / len(grams) if grams else 0.0
