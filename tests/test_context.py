"""Privileged context: who scores, where, and in which direction, against plain logits; packed rows; forward and
reverse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from divergence import divergence

from omniopd_jax import context, measures, model, objective, step
from omniopd_jax.parallel import packing

T = 7
LENGTH = np.array([7, 3, 6, 0])
PROMPT, BEHIND = np.array([4, 2, 3, 4]), np.array([9, 6, 4, 11])
GIVEN = np.array([1.0, 1.0, 0.0, 1.0])  # the third row has no solution


@functools.cache
def rows():
    """(rows behind the prompt, rows behind the privileged one) of four responses."""
    rng = np.random.default_rng(0)
    responses = [rng.integers(1, 38, n).tolist() for n in LENGTH]
    plain, shown = ([rng.integers(1, 38, n).tolist() for n in lengths] for lengths in (PROMPT, BEHIND))
    return [p + r for p, r in zip(plain, responses)], [p + r for p, r in zip(shown, responses)]


def padded(some, width):
    return jnp.asarray([r + [0] * (width - len(r)) for r in some], jnp.int32)


def make_batch(*, packed: bool = False, same: bool = False) -> objective.Batch:
    """`same`: the privileged prompt is the prompt (the identity template)."""
    own, behind = rows()
    behind, before = (own, PROMPT) if same else (behind, BEHIND)
    i32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    none = jnp.full((4, 1), -1, jnp.int32)
    tokens, shown = padded(own, 11), padded(behind, 18)
    pack = pack_behind = None
    if packed:
        how = {"most": 40, "shards": [0], "micro_batches": 2}
        pack = packing.make(own, PROMPT, **how)
        laid = packing.Laid(pack.first_B, pack.owner_ZX.shape[1])
        pack_behind = packing.make(behind, before, like=laid, **how)
        assert (pack.owner_ZX == pack_behind.owner_ZX).all() and (pack.time_ZX == pack_behind.time_ZX).all()
        tokens = shown = None
    beside = context.ContextRows(shown, i32(before), jnp.asarray(GIVEN, jnp.float32), pack_behind)
    return objective.Batch(
        tokens, i32(PROMPT), i32(LENGTH), none, jnp.zeros((4, 1)), 0 * none, context=beside, packed=pack, width=T
    )


def plain_logits(params, model_cfg, some, before):
    """Row by row, what produces each response token: [4, T, V]."""
    logits = model.logits(params, model_cfg, model.hidden(params, model_cfg, padded(some, 18)))
    at = jnp.asarray(before)[:, None] + jnp.arange(T)[None] - 1
    return jnp.take_along_axis(logits, jnp.minimum(at, 17)[..., None], axis=1)


def settings(make_cfg, **more):
    return make_cfg(**{"objective.name": "context", "anchor.kl_coef": 0.0, "micro_batches": 2} | more)


def ours(params, ref_params, batch, model_cfg, cfg, average=None):
    zero = jnp.zeros((4, T))
    got = objective.token_weights(zero, batch, objective.parts(cfg))
    return step.loss_and_grads(
        params, ref_params, batch, got.weight_BT, got.mask_BT, model_cfg=model_cfg, cfg=cfg,
        divergence_BT=got.divergence_BT, average=average,
    )  # fmt: skip


@pytest.mark.parametrize(
    "who,kind,packed", [("reference", "forward", False), ("reference", "reverse", True), ("self", "forward", True),
                        ("ema", "reverse", False)]
)  # fmt: skip
def test_loss_and_gradient_are_those_of_plain_logits(params, ref_params, model_cfg, make_cfg, who, kind, packed):
    """KL by token in float64 from logits of whole rows; the gradient against JAX's own of the same expression."""
    average = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, params, ref_params)
    cfg = settings(make_cfg, **{"context.model": who, "context.divergence": kind})
    scorer = {"reference": ref_params, "self": params, "ema": average}[who]
    own, behind = rows()
    z = 4 * cfg.max_completion_length
    real = (np.arange(T)[None] < LENGTH[:, None]) * GIVEN[:, None]

    def naive(params):
        logp = jax.nn.log_softmax(plain_logits(params, model_cfg, own, PROMPT))
        other = jax.nn.log_softmax(plain_logits(jax.lax.stop_gradient(scorer), model_cfg, behind, BEHIND))
        a, b = (other, logp) if kind == "forward" else (logp, other)
        return (jnp.asarray(real, jnp.float32) * (jnp.exp(a) * (a - b)).sum(-1)).sum() / z

    loss, grads, stats = ours(params, ref_params, make_batch(packed=packed), model_cfg, cfg, average)
    student, other = (
        np.asarray(plain_logits(p, model_cfg, some, before), np.float64)
        for p, some, before in ((params, own, PROMPT), (scorer, behind, BEHIND))
    )
    want = np.array(
        [[oracle.kl(*((o, s) if kind == "forward" else (s, o))) for s, o in zip(*r)] for r in zip(student, other)]
    )
    assert float(loss) == pytest.approx((want * real).sum() / z, rel=1e-4)
    np.testing.assert_allclose(np.asarray(stats.divergence_BT) * real, want * real, rtol=1e-3, atol=1e-6)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(jax.jit(jax.grad(naive))(params))):
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-6 * float(np.abs(wanted).max() + 1))


def test_self_with_the_identity_template_has_nothing_to_learn(params, ref_params, model_cfg, make_cfg):
    cfg = settings(make_cfg, **{"context.model": "self"})
    norms = []
    for same in (True, False):
        _, grads, stats = ours(params, ref_params, make_batch(same=same), model_cfg, cfg)
        norms.append(float(np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))))
        if same:
            assert float(jnp.abs(stats.divergence_BT).max()) < 1e-6
    assert norms[0] < 1e-5 * norms[1]


def test_a_clipped_token_has_no_gradient_and_is_counted(params, ref_params, model_cfg, make_cfg):
    batch = make_batch()
    cfg = settings(make_cfg)
    _, _, stats = ours(params, ref_params, batch, model_cfg, cfg)
    real = (np.arange(T)[None] < LENGTH[:, None]) * GIVEN[:, None]
    clip = float(np.median(np.asarray(stats.divergence_BT)[real > 0]))
    loss, grads, _ = ours(params, ref_params, batch, model_cfg, settings(make_cfg, **{"context.clip": clip}))
    values = np.asarray(stats.divergence_BT, np.float64)
    assert float(loss) == pytest.approx((np.minimum(values, clip) * real).sum() / 80, rel=1e-4)
    below = jnp.asarray(real * (values < clip), jnp.float32) / 80
    zero = jnp.zeros((4, T))
    _, wanted, _ = step.loss_and_grads(
        params, ref_params, batch, zero, zero, model_cfg=model_cfg, cfg=cfg, divergence_BT=below
    )
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    cfg = settings(make_cfg, **{"context.clip": clip})
    got = measures.divergence(stats.divergence_BT, jnp.asarray(real), objective.of(cfg), cfg)
    assert float(got["divergence/clipped_fraction"]) == pytest.approx((values >= clip)[real > 0].mean())


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_forward_covers_and_reverse_seeks_on_an_enumerable_toy(kind):
    """A student of one number a over five words, logits -(w - a)^2, a teacher of two modes: descent as in float64 with
    central differences; forward KL ends between the modes, reverse KL at one of them."""
    target = np.log([0.45, 0.05, 0.02, 0.03, 0.45])
    words = np.arange(5.0)

    def logits(a):
        return -((words - a) ** 2)

    def value(a):
        pair = (target, logits(a)) if kind == "forward" else (logits(a), target)
        return oracle.kl(*pair)

    a, plain, eye = jnp.float32(2.6), 2.6, jnp.eye(5)

    @jax.jit
    @jax.grad
    def slope(a):
        hidden = -jnp.square(jnp.arange(5.0) - a)[None, None]
        return divergence(
            kind, hidden, eye, jnp.asarray(target, jnp.float32)[None, None], eye, jnp.ones((1, 1)), block=1
        )[0]

    for _ in range(400):
        a -= 0.02 * slope(a)
        plain -= 0.02 * (value(plain + 1e-5) - value(plain - 1e-5)) / 2e-5
    assert float(a) == pytest.approx(plain, abs=1e-3)
    assert abs(float(a) - 2) < 0.1 if kind == "forward" else float(a) > 3.5


def test_the_privileged_prompt_holds_texts_as_they_are():
    told = ({"role": "system", "content": "s"}, {"role": "user", "content": "what is {solution}?"})
    got = context.messages(told, "it is {prompt}", "Q: {prompt} A: {solution} !")
    assert got == (told[0], {"role": "user", "content": "Q: what is {solution}? A: it is {prompt} !"})
    assert context.messages(told, "x", "{prompt}") == told


def test_the_average_follows_what_is_trained(params, ref_params, model_cfg, make_cfg):
    """One update: average = d * average + (1 - d) * new; the state without `ema` has none."""
    cfg = settings(make_cfg, **{"context.model": "ema", "context.ema_decay": 0.75, "optimizer.learning_rate": 0.01})
    state = step.new_state(params, cfg, jax.random.key(0))
    assert step.new_state(params, settings(make_cfg), jax.random.key(0)).average is None
    moved = dataclasses.replace(state, average=ref_params)
    new, metrics, _ = step.update(moved, ref_params, make_batch(), None, model_cfg=model_cfg, cfg=cfg)
    for got, old, now in zip(*map(jax.tree.leaves, (new.average, ref_params, new.params))):
        np.testing.assert_allclose(got, 0.75 * old + 0.25 * now, rtol=1e-5, atol=1e-6)
    assert float(metrics["divergence/kl_other_to_student_exact"]) > 0
