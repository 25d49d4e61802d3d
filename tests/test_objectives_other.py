"""sft, opd, opd_exact, grpo, constant and the task reward, against NumPy float64 written loop by loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from divergence import divergence

from omniopd_jax import objective, teachers, vocab
from omniopd_jax.errors import UserError

B, T, V, M, C, LONGEST = 6, 9, 7, 2, 3, 12
LENGTH = np.array([9, 0, 4, 7, 9, 1])  # an empty row, one of a single token
PEAK = np.array([[0, 5], [-1, -1], [1, -1], [2, -1], [-1, -1], [-1, -1]])
ADVANTAGE = np.array([0.7, -1.2, 1.5, 0.0, -0.4, 2.0])
KINDS = sorted(objective.OBJECTIVES)


@functools.cache
def case():
    """Random logits of student, reference and teacher [B, T, V], tokens, and the student's log-probs some updates
    ago."""
    rng = np.random.default_rng(0)
    logits, ref_logits, teacher_logits = rng.normal(size=(3, B, T, V)) * 1.5
    target = rng.integers(0, V, (B, T))
    old = picked(logits + 0.3 * rng.normal(size=logits.shape), target)
    return logits, ref_logits, teacher_logits, target, old


def picked(logits, target):
    """log softmax(logits) at the targets, [B, T]."""
    return np.array([[oracle.log_softmax(z)[y] for z, y in zip(*row)] for row in zip(logits, target)])


def make_batch(*, old=False) -> objective.Batch:
    """The objectives read no prompt: rows of the response alone. No text teacher has answered: n = 0."""
    _, _, teacher_logits, target, old_logp = case()
    i32, f32 = (functools.partial(jnp.asarray, dtype=d) for d in (jnp.int32, jnp.float32))
    return objective.Batch(
        i32(target), jnp.zeros(B, jnp.int32), i32(LENGTH), i32(PEAK), jnp.zeros((B, M)), jnp.zeros((B, M), jnp.int32),
        advantage_B=f32(ADVANTAGE), old_logp_BT=f32(old_logp) if old else None,
        teacher_logp_BT=f32(picked(teacher_logits, target)),
    )  # fmt: skip


def real():
    """[B, T]: 1 on response tokens."""
    return np.array([[float(t < n) for t in range(T)] for n in LENGTH])


def in_chunk():
    """[B, T]: 1 on the tokens of chunks."""
    out = np.zeros((B, T))
    for b, t in itertools.product(range(B), range(M)):
        if PEAK[b, t] >= 0:
            out[b, PEAK[b, t] : PEAK[b, t] + C] = 1
    return out


@functools.partial(jax.jit, static_argnames="cfg")
def loss_and_gradient(logits_BTV, ref_logits_BTV, batch, cfg):
    """The step's chain with logits for hidden states and the identity for a head."""
    eye = jnp.eye(V)

    def loss(logits_BTV):
        logp_BT = vocab.token_stats(logits_BTV, eye, batch.token_BL, block=8).logp_BT
        weight_BT, mask_BT = objective.weights(logp_BT, batch, cfg)
        value, _ = vocab.weighted_nll_and_kl(
            logits_BTV, eye, ref_logits_BTV, eye, batch.token_BL, weight_BT, mask_BT, beta=cfg.anchor.kl_coef, block=8
        )
        return value, (weight_BT, mask_BT)

    return jax.value_and_grad(loss, has_aux=True)(logits_BTV)


def settings(make_cfg, name, **more):
    small = {"audit.num_chunks": M, "audit.chunk_tokens": C, "max_completion_length": LONGEST, "anchor.kl_coef": 0.0}
    return make_cfg(**small | {"objective.name": name} | more)


def take(cfg, *, old=False):
    """(loss, weight, mask, gradient) of the case."""
    logits, ref_logits, *_ = case()
    arrays = (jnp.asarray(a, jnp.float32) for a in (logits, ref_logits))
    (loss, (weight, mask)), grad = loss_and_gradient(*arrays, make_batch(old=old), cfg)
    return float(loss), np.asarray(weight), np.asarray(mask), np.asarray(grad)


def check(cfg, want_weight, want_mask, *, old=False):
    """Weight, mask, loss and d loss / d logits against the oracle."""
    logits, ref_logits, _, target, _ = case()
    loss, weight, mask, grad = take(cfg, old=old)
    np.testing.assert_allclose(weight, want_weight, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(mask, want_mask, rtol=1e-6)
    want, want_grad = oracle.weighted_loss(logits, ref_logits, target, want_weight, want_mask, cfg.anchor.kl_coef)
    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)


# --- sft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["constant", "separate_means"])
def test_sft_is_cross_entropy(make_cfg, normalizer):
    """d/dz of -log softmax(z)_y is softmax(z) - onehot(y), a token; nothing where there is no token."""
    logits, _, _, target, _ = case()
    z = B * LONGEST if normalizer == "constant" else LENGTH.sum()
    want = np.zeros((B, T, V))
    value = 0.0
    for b in range(B):
        for t in range(LENGTH[b]):
            logp = oracle.log_softmax(logits[b, t])
            want[b, t] = np.exp(logp) - np.eye(V)[target[b, t]]
            value -= logp[target[b, t]]
    loss, _, _, grad = take(settings(make_cfg, "sft", **{"objective.normalizer": normalizer}))
    assert loss == pytest.approx(value / z, rel=1e-5)
    np.testing.assert_allclose(grad, want / z, rtol=1e-4, atol=1e-7)


# --- constant -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, -0.2])
@pytest.mark.parametrize("scope", ["unaudited", "all"])
def test_constant_weighs_every_chunk_alike_and_asks_nobody(make_cfg, value, scope):
    """The chunks count though no continuation has come (n = 0); the anchor holds what the scope says."""
    cfg = settings(make_cfg, "constant", **{"objective.constant": value, "anchor.scope": scope, "anchor.kl_coef": 0.3})
    z = B * LONGEST
    anchor = real() if scope == "all" else real() - in_chunk()
    check(cfg, value * in_chunk() / z, anchor / z)


# --- opd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["constant", "separate_means"])
def test_opd_weights_are_the_log_ratio_of_teacher_and_student(make_cfg, normalizer):
    logits, _, teacher_logits, target, _ = case()
    z = B * LONGEST if normalizer == "constant" else LENGTH.sum()
    ratio = (picked(teacher_logits, target) - picked(logits, target)) * real()
    cfg = settings(make_cfg, "opd", **{"objective.normalizer": normalizer, "anchor.kl_coef": 0.2})
    check(cfg, ratio / z, real() / z)


TOY = 3  # words; states: start, after 0, after 1, after 2


def toy():
    """Student and teacher as tables [state, word], all responses of two words, the states that they pass."""
    theta, teacher = np.random.default_rng(3).normal(size=(2, TOY + 1, TOY))
    teacher = 3 * teacher  # sure of itself: then the states that a response passes matter
    responses = list(itertools.product(range(TOY), repeat=2))
    return theta, teacher, responses, [(0, 1 + a) for a, _ in responses]


def toy_logp(table, responses, states):
    rows = [oracle.log_softmax(z) for z in table]
    return np.array([[rows[s][y] for s, y in zip(*pair)] for pair in zip(states, responses)])


def toy_kl(theta, teacher, prob_S):
    """sum over states of prob * KL(student || teacher)."""
    total = 0.0
    for p, z, q in zip(prob_S, theta, teacher):
        logp = oracle.log_softmax(z)
        total += p * (np.exp(logp) * (logp - oracle.log_softmax(q))).sum()
    return total


def slope(function, theta):
    """Central differences."""
    out = np.zeros_like(theta)
    for i in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[i] = 1e-6
        out[i] = (function(theta + step) - function(theta - step)) / 2e-6
    return out


def visits(theta):
    """How likely a response passes each state."""
    return np.concatenate([[1.0], np.exp(oracle.log_softmax(theta[0]))])


@pytest.mark.parametrize("spoil", [None, "not detached", "wrong sign"])
def test_opd_by_the_sampled_token_is_unbiased_with_prefixes_held_fixed(make_cfg, spoil):
    """E over all responses of the estimator = grad sum_s P(s) KL(pi_s || q_s), P held fixed. Spoiled ones are told
    apart."""
    theta, teacher, responses, states = toy()
    logp = toy_logp(theta, responses, states)
    want = slope(lambda th: toy_kl(th, teacher, visits(theta)), theta)
    whole = slope(lambda th: toy_kl(th, teacher, visits(th)), theta)
    assert np.abs(want - whole).max() > 0.05, "the toy must tell the two readings apart"

    i32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    R = len(responses)
    batch = objective.Batch(
        i32(responses),
        jnp.zeros(R, jnp.int32),
        i32([2] * R),
        i32([[-1]] * R),
        jnp.zeros((R, 1)),
        jnp.zeros((R, 1), jnp.int32),
        teacher_logp_BT=jnp.asarray(toy_logp(teacher, responses, states), jnp.float32),
    )
    hidden = jnp.asarray(np.eye(TOY + 1)[np.array(states)], jnp.float32)
    prob_B1 = jnp.asarray(np.exp(logp.sum(1))[:, None], jnp.float32)
    cfg = settings(make_cfg, "opd")

    def estimate(head):
        logp_BT = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head))
        logp_BT = jnp.take_along_axis(logp_BT, batch.token_BL[..., None], axis=2)[..., 0]
        weight, _ = objective.opd(logp_BT, batch, cfg)
        if spoil == "not detached":
            weight = batch.teacher_logp_BT - logp_BT
        if spoil == "wrong sign":
            weight = -weight
        return -jnp.sum(prob_B1 * weight * logp_BT)

    error = np.abs(np.asarray(jax.grad(estimate)(jnp.asarray(theta, jnp.float32))) - want).max()
    assert (error < 1e-5) == (spoil is None)


def test_opd_exact_is_the_same_gradient_without_the_sampling():
    theta, teacher, *_ = toy()
    want = slope(lambda th: toy_kl(th, teacher, visits(theta)), theta)
    states = jnp.eye(TOY + 1)[None]
    weight = jnp.asarray(visits(theta), jnp.float32)[None]

    def exact(head):
        return divergence("reverse", states, head, states, jnp.asarray(teacher, jnp.float32), weight, block=2)[0]

    np.testing.assert_allclose(jax.grad(exact)(jnp.asarray(theta, jnp.float32)), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("block", [1, 4, 5, 64])
def test_divergences_against_float64(block, kind):
    """Value, KL a position and both gradients; D = 5, the teacher 3 wide."""
    rng = np.random.default_rng(1)
    hidden, teacher_hidden = rng.normal(size=(2, 4, 5)), rng.normal(size=(2, 4, 3))
    head, teacher_head, weight = rng.normal(size=(5, V)), rng.normal(size=(3, V)), rng.random((2, 4))
    weight[1, 2:] = 0

    kl, dhidden, dhead = np.zeros((2, 4)), np.zeros_like(hidden), np.zeros_like(head)
    for b, t in itertools.product(range(2), range(4)):
        logp = oracle.log_softmax(hidden[b, t] @ head)
        teacher_logp = oracle.log_softmax(teacher_hidden[b, t] @ teacher_head)
        gap = logp - teacher_logp
        if kind == "reverse":
            kl[b, t] = (np.exp(logp) * gap).sum()
            dz = weight[b, t] * np.exp(logp) * (gap - kl[b, t])
        else:
            kl[b, t] = (np.exp(teacher_logp) * -gap).sum()
            dz = weight[b, t] * (np.exp(logp) - np.exp(teacher_logp))
        dhidden[b, t] = head @ dz
        dhead += np.outer(hidden[b, t], dz)

    def ours(hidden, head):
        return divergence(
            kind, hidden, head, jnp.asarray(teacher_hidden, jnp.float32), jnp.asarray(teacher_head, jnp.float32),
            jnp.asarray(weight, jnp.float32), block=block,
        )  # fmt: skip

    arrays = (jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))
    (loss, got_kl), grads = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(*arrays)
    assert float(loss) == pytest.approx((weight * kl).sum(), rel=1e-5)
    np.testing.assert_allclose(got_kl, kl, rtol=1e-4, atol=1e-6)
    for got, want in zip(grads, (dhidden, dhead)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name,provider", [("opd", "anthropic"), ("opd", "simulated"), ("opd_exact", "openai"), ("opd_exact", "gemini")]
)
def test_a_teacher_without_log_probs_is_refused_at_the_start(make_cfg, name, provider):
    with pytest.raises(UserError, match=f"'{name}' needs a teacher's token log-probs.*'{provider}'.*set one of: local"):
        teachers.make(settings(make_cfg, name, **{"teacher.provider": provider}))


@pytest.mark.parametrize("name", ["anthropic", "gemini", "simulated"])
def test_what_a_teacher_gives_beside_text_is_written_at_its_name(make_cfg, name):
    assert {n for n, p in teachers.TEACHERS.items() if p.white_box} == {"local", "openai"}
    c = settings(make_cfg, "omniopd", **{"teacher.provider": name})
    with pytest.raises(UserError, match=f"token log-probs.*'{name}'"):
        teachers.make(c, teachers.LOGP)


# --- grpo -----------------------------------------------------------------------------------------------------------


def test_group_advantage_by_hand():
    reward = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1], np.float32)
    want = []
    for group in reward.reshape(3, 4).astype(np.float64):
        want += [(r - group.mean()) / (np.sqrt(((group - group.mean()) ** 2).mean()) + 1e-4) for r in group]
    got = np.asarray(objective.group_advantage(jnp.asarray(reward), 4))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[4:8], 0)  # equal rewards say nothing
    np.testing.assert_allclose(got.reshape(3, 4).sum(1), 0, atol=1e-5)
    np.testing.assert_array_equal(objective.group_advantage(jnp.asarray(reward), 1), 0)


@pytest.mark.parametrize("normalizer", ["constant", "separate_means"])
def test_grpo_with_one_update_is_its_closed_form(make_cfg, normalizer):
    """-A_b log pi(y) on every response token and KL(ref || student) on the same: no ratio, no clip."""
    z = B * LONGEST if normalizer == "constant" else LENGTH.sum()
    cfg = settings(make_cfg, "grpo", **{"objective.normalizer": normalizer, "anchor.kl_coef": 0.05})
    check(cfg, ADVANTAGE[:, None] * real() / z, real() / z)


def test_clipping_is_the_gradient_of_the_clipped_surrogate(make_cfg):
    """weight * grad logp = grad min(r A, clip(r, 1 - eps, 1 + eps) A), by central differences in float64."""
    eps = 0.2
    logits, _, _, target, old = case()
    logp = picked(logits, target)
    ratio = np.exp(logp - old)
    assert ((ratio > 1 + eps).any(), (ratio < 1 - eps).any(), ((ratio < 1.1) & (ratio > 0.9)).any()) == (
        True,
        True,
        True,
    )

    def surrogate(logp):
        r, a = np.exp(logp - old), ADVANTAGE[:, None]
        return np.minimum(r * a, np.clip(r, 1 - eps, 1 + eps) * a)

    want = (surrogate(logp + 1e-6) - surrogate(logp - 1e-6)) / 2e-6
    cfg = settings(make_cfg, "grpo", **{"objective.clip": eps})
    z = B * LONGEST
    check(cfg, want * real() / z, real() / z, old=True)


def test_an_advantage_of_0_is_clipped_nowhere(make_cfg):
    """A group of equal rewards pushes no token, so that none of its ratios can be cut off."""
    old = jnp.zeros((3, 1))
    batch = objective.Batch(
        token_BL=None, prompt_length_B=None, length_B=jnp.ones(3, int), peak_BM=None, k_sem_BM=None, n_BM=None,
        advantage_B=jnp.array([-1.0, 0.0, 1.0]), old_logp_BT=old,
    )  # fmt: skip
    cfg = settings(make_cfg, "grpo", **{"objective.clip": 0.2})
    for ratio, there in ((0.7, [True, False, False]), (1.0, [False] * 3), (1.3, [False, False, True])):
        assert objective.clipped(old + np.log(ratio), batch, cfg)[:, 0].tolist() == there


# --- what all share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["constant", "separate_means"])
@pytest.mark.parametrize("name", KINDS)
def test_a_task_reward_adds_its_group_advantage_to_any_objective(make_cfg, name, normalizer):
    """By the normaliser's own count of response tokens; the anchor stays; grpo has it already."""
    how = {"objective.normalizer": normalizer}
    plain, with_reward = (take(settings(make_cfg, name, **how, **{"reward.coef": coef})) for coef in (0.0, 0.5))
    z = B * LONGEST if normalizer == "constant" else LENGTH.sum()
    want = 0.0 if name == "grpo" else 0.5 * ADVANTAGE[:, None] * real() / z
    np.testing.assert_allclose(with_reward[1] - plain[1], want + np.zeros((B, T)), atol=1e-7)
    np.testing.assert_array_equal(with_reward[2], plain[2])


@pytest.mark.parametrize("name", KINDS)
def test_normalisers_divide_each_term_by_its_own_count(make_cfg, name):
    """constant: rows (the empty one included) x max_completion_length. separate_means: tokens weighed, tokens
    anchored."""
    logits, _, _, target, _ = case()
    logp = jnp.asarray(picked(logits, target), jnp.float32)
    weight, mask = (np.asarray(a) for a in objective.OBJECTIVES[name](logp, make_batch(), settings(make_cfg, name)))
    assert mask.sum() > 0
    weighed = in_chunk().sum() if name == "constant" else 0 if name == "omniopd" else LENGTH.sum()  # n = 0: no audit
    for normalizer, z_weight, z_mask in (
        ("constant", B * LONGEST, B * LONGEST),
        ("separate_means", max(weighed, 1), mask.sum()),
    ):
        _, got_weight, got_mask, _ = take(settings(make_cfg, name, **{"objective.normalizer": normalizer}))
        np.testing.assert_allclose(got_weight, weight / z_weight, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(got_mask, mask / z_mask, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_no_weight_off_the_response_and_none_with_a_gradient(make_cfg, name):
    logits, _, _, target, _ = case()
    cfg = settings(make_cfg, name, **{"reward.coef": 0.0 if name == "grpo" else 1.0})

    def total(logp_BT):
        return sum(a.sum() for a in objective.weights(logp_BT, make_batch(old=True), cfg))

    logp = jnp.asarray(picked(logits, target), jnp.float32)
    np.testing.assert_array_equal(jax.grad(total)(logp), 0.0)
    for a in objective.weights(logp, make_batch(), cfg):
        np.testing.assert_array_equal(np.asarray(a)[real() == 0], 0.0)
