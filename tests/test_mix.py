"""Several ways to learn in one step: the update is the sum of what each would do alone; what can't be mixed is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from omniopd_jax import config, objective, optim, step, vocab
from omniopd_jax.errors import UserError
from omniopd_jax.run import objectives

B, T, M = 4, 10, 2


def mixed(make_cfg, mix: dict, **more) -> FrozenConfigDict:
    c = ConfigDict(make_cfg(**{"audit.num_chunks": M, "audit.chunk_tokens": 3, "anchor.kl_coef": 0.2} | more).to_dict())
    c.objective.mix = mix
    return FrozenConfigDict(c)


def rows(seed: int, length) -> objective.Batch:
    rng = np.random.default_rng(seed)
    before = np.array([3, 5, 2, 4])
    token = np.zeros((B, 16), np.int32)
    for b in range(B):
        token[b, : before[b] + length[b]] = rng.integers(1, 38, before[b] + length[b])
    none = jnp.full((B, M), -1, jnp.int32)
    i32 = jnp.int32
    return objective.Batch(
        jnp.asarray(token),
        jnp.asarray(before, i32),
        jnp.asarray(length, i32),
        none,
        jnp.zeros((B, M)),
        0 * none,
        width=T,
    )


def batch() -> objective.Batch:
    """Two kept audits and one with too few texts; advantages."""
    peak = jnp.asarray([[0, 5], [2, -1], [1, -1], [-1, -1]], jnp.int32)
    n = jnp.asarray([[4, 4], [4, 0], [1, 0], [0, 0]], jnp.int32)
    own = rows(0, [10, 7, 5, 0])
    return own.replace(
        peak_BM=peak, n_BM=n, k_sem_BM=n * 0.4, advantage_B=jnp.asarray([1.0, -1.0, 0.5, 2.0], jnp.float32)
    )


@pytest.mark.parametrize(
    "mix,normalizer",
    [
        ({"sft": 0.5, "continuation": 2.0}, "constant"),
        *(
            pytest.param(mix, how, marks=pytest.mark.slow)
            for mix in ({"omniopd": 1.0, "grpo": 0.3}, {"omniopd": 0.7, "continuation": 0.5, "sft": 0.25})
            for how in ("constant", "separate_means")
        ),
    ],
)
def test_an_update_is_the_sum_of_its_parts(params, ref_params, model_cfg, make_cfg, monkeypatch, mix, normalizer):
    """Gradient and loss: SGD of rate 1 shows the gradient itself. Parts with rows of their own bring a batch each."""
    monkeypatch.setattr(optim, "make_optimizer", lambda cfg: optax.sgd(1.0))
    own_rows = {"continuation": rows(1, [4, 0, 9, 2]), "sft": rows(2, [8, 8, 1, 3])}
    scored = {"objective.normalizer": normalizer, "objective.advantage": "batch_mean"}
    logp = -np.random.default_rng(3).random((B, T)).astype(np.float32)
    stats = vocab.TokenStats(jnp.asarray(logp), jnp.ones((B, T)))

    def take(cfg, batch, stats):
        state = step.new_state(params, cfg, jax.random.key(0))
        new, metrics, _ = jax.jit(lambda s, r, b, t: step.update(s, r, b, t, model_cfg=model_cfg, cfg=cfg))(
            state, ref_params, batch, stats
        )
        return jax.tree.map(lambda a, b: a - b, params, new.params), float(metrics["loss"])

    cfg = mixed(make_cfg, mix, **scored)
    groups = objective.row_groups(cfg)
    shared = [name for name in mix if name not in own_rows]
    named = [[part.objective.name for _, part in group] for group in groups]
    assert named == ([sorted(shared)] if shared else []) + [[name] for name in sorted(own_rows) if name in mix]
    batches = ([batch()] if shared else []) + [own_rows[name] for name in sorted(own_rows) if name in mix]
    first = batches[0].replace(more=tuple(batches[1:]))
    grads, loss = take(cfg, first, stats if shared else None)

    want, want_loss = jax.tree.map(jnp.zeros_like, params), 0.0
    for name, weight in mix.items():
        alone = make_cfg(**scored | {
            "objective.name": name, "audit.num_chunks": M, "audit.chunk_tokens": 3, "anchor.kl_coef": 0.2,
        })  # fmt: skip
        part = own_rows.get(name)
        grad, value = take(alone, batch() if part is None else part, stats if part is None else None)
        want = jax.tree.map(lambda a, g, w=weight: a + w * g, want, grad)
        want_loss += weight * value
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(want)):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["constant", "separate_means"])
def test_parts_that_share_rows_add_up_each_with_its_own_counts(make_cfg, normalizer):
    """Weight and anchor of a token: the sum of the parts', each normalised by itself."""
    how = {"objective.normalizer": normalizer, "objective.advantage": "batch_mean"}
    logp = -jnp.asarray(np.random.default_rng(3).random((B, T)), jnp.float32)
    got = objective.weights(logp, batch(), mixed(make_cfg, {"omniopd": 0.7, "grpo": 0.3}, **how))
    sizes = {"audit.num_chunks": M, "audit.chunk_tokens": 3, "anchor.kl_coef": 0.2}
    parts = [
        objective.weights(logp, batch(), make_cfg(**how | sizes | {"objective.name": name}))
        for name in ("omniopd", "grpo")
    ]
    for mine, a, b in zip(got, *parts):
        np.testing.assert_allclose(mine, 0.7 * a + 0.3 * b, rtol=1e-6, atol=1e-8)


def test_a_mix_of_one_is_that_one(make_cfg):
    cfg = mixed(make_cfg, {"omniopd": 1.0})
    logp = -jnp.ones((B, T))
    for a, b in zip(objective.weights(logp, batch(), cfg), objective.weights(logp, batch(), make_cfg(**{
        "audit.num_chunks": M, "audit.chunk_tokens": 3, "anchor.kl_coef": 0.2,
    }))):  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_what_the_loop_reads_of_a_mix(make_cfg):
    """Everything that a part needs; the student answers if any part wants answers."""
    own = objective.of(mixed(make_cfg, {"omniopd": 1.0, "grpo": 0.3, "continuation": 0.5}))
    assert own.asks == {"continuations", "prefixes"} and own.audited and own.needs_reward and own.samples
    assert own.cut is None and not own.clips
    assert not objective.of(mixed(make_cfg, {"sft": 1.0})).samples
    assert objective.of(mixed(make_cfg, {"sft": 1.0, "continuation": 1.0})).samples
    assert objective.title(mixed(make_cfg, {"omniopd": 1.0, "grpo": 0.3})) == "0.3 grpo + 1 omniopd"


REFUSED = {
    "a second reference": ({"opd_exact": 1.0, "context": 1.0}, {}, "'context' and 'opd_exact' each need a second ref"),
    "two kinds of teacher": ({"opd": 1.0, "omniopd": 1.0}, {}, "'opd' needs a teacher's log-probs and 'omniopd'"),
    "an unknown part": ({"omniopd": 1.0, "ppo": 1.0}, {}, "objective.mix.*'ppo'"),
    "no weight": ({"omniopd": 1.0, "grpo": 0.0}, {}, "objective.mix.grpo = 0.0 must be a number above 0"),
    "a reward beside": ({"omniopd": 1.0, "sft": 1.0}, {"reward.coef": 0.1}, "objective.mix.grpo"),
    "a gate for nothing": ({"grpo": 1.0, "sft": 1.0}, {"audit.gate": "graded"}, "audit.gate = 'graded' saves audits"),
    "rounds for nothing": ({"grpo": 1.0, "sft": 1.0}, {"audit.adaptive": True}, "audit.adaptive asks for continuations"),
    "a cut past the end": (
        {}, {"objective.name": "continuation", "max_completion_length": 20}, "continuation.cut_tokens = 4096 is more",
    ),
    "a template without a solution": ({}, {"objective.name": "context", "context.template": "{prompt}"}, "no {solution}"),
    "a reward beside solutions": ({}, {"objective.name": "sft", "reward.coef": 1.0}, "set objective.mix"),
    "a reward beside whole texts": (
        {}, {"objective.name": "continuation", "continuation.cut": "zero", "reward.coef": 1.0}, "set objective.mix"),
    "parts of what is not sampled": ({}, {"objective.name": "sft", "rollout.parts": 2}, "samples nothing"),
    "a template without the prompt": ({}, {"objective.name": "context", "context.template": "{solution}"}, "no {prompt}"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_is_refused_by_name(case):
    mix, more, words = REFUSED[case]
    c = config.default()
    c.update_from_flattened_dict(more)
    c.objective.mix = mix
    with pytest.raises(UserError, match=words):
        objectives.check(c)


def test_records_are_frozen_and_their_asks_a_set():
    own = objective.OBJECTIVES["omniopd"]
    assert own.asks == {"continuations"} == dataclasses.replace(own).asks
