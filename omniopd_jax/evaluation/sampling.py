"""Greedy answers of a student to prompts with known results: the accuracy that a run reports."""

import dataclasses
import functools
from collections import Counter

import jax
import numpy as np

from omniopd_jax import model, rollout
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.graders import Grader
from omniopd_jax.hf.template import Template
from omniopd_jax.parallel import processes, sharding


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
    params,
    model_cfg,
    prompts: list[Prompt],
    template: Template,
    end_ids,
    *,
    grader: Grader,
    max_new_tokens: int,
    rows=256,
    compute: model.Compute | None = None,
) -> Evaluation:
    """Greedy answers, graded.

    Args:
      params: the model's parameters, stacked or as `rollout.prepare` returns them.
      prompts: encoded, each with an answer. template: what rendered them; its stop strings end an answer too.
      rows: prompts a batch; the last batch is filled up, so that there is one shape. Each process of the mesh
        answers and grades its slice of every batch.
      compute: None: float32 on the default device.

    Returns:
      Evaluation, the same in every process.
    """
    compute = compute or model.Compute()
    mesh = compute.mesh
    if isinstance(params["layers"], dict):
        params = rollout.prepare(params, model_cfg, compute=compute)
    rank, count = (jax.process_index(), jax.process_count()) if mesh.is_multi_process else (0, 1)
    shards = sharding.row_shards(mesh)
    rows = -(-min(rows, len(prompts)) // shards) * shards
    own = rows // count
    width = rollout.bucket(max(len(p.token_ids) for p in prompts))
    batches = []
    for start in range(rank * own, len(prompts) + rank * own, rows):
        part = prompts[start : start + own]
        ids = [p.token_ids for p in part] + [(0,)] * (own - len(part))
        put = functools.partial(sharding.put_rows, mesh=mesh)
        padded, index_B = put(rollout.pad_rows(ids, width)), put(np.arange(own, dtype=np.uint32))
        out = rollout.sample(
            params, model_cfg, *padded, rollout.row_keys(_unused_key(), index_B), max_new_tokens=max_new_tokens,
            temperature=0.0, end_ids=end_ids, compute=compute,
        )  # fmt: skip
        arrays = [sharding.local_rows(a) for a in (out.token_BT, out.length_B, out.finished_B)]
        answers = [tokens[:n].tolist() for _, tokens, n in zip(part, *arrays[:2])]
        read = [template.read(tokens) for tokens in answers]
        grades = grader.grade_all([text for text, _, _ in read], [p.answer for p in part])
        answers = [
            [text, bool(grade), n, bool(done) or stopped, repeated_ngrams(tokens[:n])]
            for (text, n, stopped), grade, tokens, done in zip(read, grades, answers, arrays[2])
        ]
        batches.append(answers)
    parts = [batches] if count == 1 else processes.gather("evaluation", batches)
    answers = [a for batch in zip(*parts, strict=True) for piece in batch for a in piece]
    texts, correct, lengths, finished, repeats = zip(*answers, strict=True)
    means = [float(np.mean(a)) for a in (correct, lengths, finished, repeats)]
    return Evaluation(means[0], means[1], 1 - means[2], means[3], texts, correct)


def repeated_ngrams(tokens: list[int], n: int = 4) -> float:
    """Share of a response's n-grams that it has had before: what repetition loops push to 1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(Counter(grams)) / len(grams) if grams else 0.0


def _unused_key():
    """Greedy decoding draws nothing; the sampler still wants keys."""
    return jax.random.key(jax.device_put(np.uint32(0)))
