"""Feedback -> weights and mask -> loss, against the float64 oracle; and the estimator's own properties."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from omniopd_jax import measures, objective, vocab

B, T, V, M = 5, 13, 7, 3


def logits_case(seed: int, chunk_tokens: int):
    """Random logits a position (the 'parameters'), tokens, peaks from the oracle (ties among the entropies), feedback.

    Row 0 is full, row 1 empty, row 2 shorter than a chunk, row 4 has an audit with n = 0.
    """
    rng = np.random.default_rng(seed)
    logits, ref_logits = rng.normal(size=(2, B, T, V)) * 2
    logits[0, 5:9] = logits[0, 4]  # ties
    target = rng.integers(0, V, (B, T))
    any_length, audited_length = rng.integers(1, T + 1), rng.integers(min(chunk_tokens, T), T + 1)
    length = np.array([T, 0, min(chunk_tokens - 1, T), any_length, audited_length])
    entropy = [[oracle.entropy(z) for z in row] for row in logits]
    peak = np.array([oracle.entropy_peaks(entropy[b], length[b], M, chunk_tokens) for b in range(B)])
    n = rng.integers(0, 5, (B, M))
    n[0] = (4, 1, 3)
    n[4, 0] = 0
    k_sem = rng.random((B, M)) * n
    return logits, ref_logits, target, length, peak, k_sem, n


def as_batch(target, length, peak, k_sem, n) -> objective.Batch:
    """The objective reads no prompt: rows of the response alone."""
    i32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    return objective.Batch(
        i32(target), jnp.zeros(len(target), jnp.int32), i32(length), i32(peak), jnp.asarray(k_sem, jnp.float32), i32(n)
    )


@functools.partial(jax.jit, static_argnames="cfg")
def whole_loss(logits_BTV, ref_logits_BTV, batch, cfg):
    """The chain of the step with logits for hidden states and the identity for a head: loss and d loss / d logits."""
    eye = jnp.eye(logits_BTV.shape[-1])
    target_BT = batch.token_BL

    def loss(logits_BTV):
        logp_BT = vocab.token_stats(logits_BTV, eye, target_BT, block=8).logp_BT
        weight_BT, mask_BT = objective.weights(logp_BT, batch, cfg)
        value, _ = vocab.weighted_nll_and_kl(
            logits_BTV, eye, ref_logits_BTV, eye, target_BT, weight_BT, mask_BT, beta=cfg.anchor.kl_coef, block=8
        )
        return value, (weight_BT, mask_BT)

    return jax.value_and_grad(loss, has_aux=True)(logits_BTV)


CASES = {  # name -> (chunk tokens, alpha, beta, n_min setting, advantage, normalizer, scope)
    "published": (4, 1.0, 0.1, 0, "none", "constant", "unaudited"),
    "no smoothing": (4, 0.0, 0.1, 1, "none", "constant", "unaudited"),
    "strong prior": (3, 5.0, 1.0, 4, "none", "separate_means", "all"),
    "batch mean": (4, 1.0, 0.1, 0, "batch_mean", "separate_means", "unaudited"),
    "leave one out": (2, 0.5, 0.3, 3, "leave_one_out", "constant", "all"),
    "no anchor": (4, 1.0, 0.0, 0, "leave_one_out", "separate_means", "unaudited"),
    "no chunk fits": (14, 1.0, 0.1, 0, "batch_mean", "separate_means", "unaudited"),
    "one token": (1, 1.0, 0.1, 2, "none", "constant", "unaudited"),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_the_oracle(make_cfg, name):
    C, alpha, beta, n_min, advantage, normalizer, scope = CASES[name]
    cfg = make_cfg(**{
        "audit.num_chunks": M, "audit.chunk_tokens": C, "audit.min_continuations": n_min, "prior.alpha": alpha,
        "anchor.kl_coef": beta, "objective.advantage": advantage, "objective.normalizer": normalizer,
        "anchor.scope": scope, "max_completion_length": 17,
    })  # fmt: skip
    for seed in range(4):
        logits, ref_logits, target, length, peak, k_sem, n = logits_case(seed, C)
        (loss, (weight, mask)), grad = whole_loss(
            jnp.asarray(logits, jnp.float32), jnp.asarray(ref_logits, jnp.float32),
            as_batch(target, length, peak, k_sem, n), cfg,
        )  # fmt: skip
        logp = np.array([[oracle.log_softmax(logits[b, t])[target[b, t]] for t in range(T)] for b in range(B)])
        want_weight, audited, want_mask = oracle.weights_and_mask(
            logp, length, peak, k_sem, n,
            chunk_tokens=C, n_min=n_min or 2, alpha=alpha, advantage=advantage, scope=scope,
        )  # fmt: skip
        assert audited.any() == (name != "no chunk fits")
        want_weight, want_mask = oracle.normalized(
            want_weight, audited, want_mask, normalizer=normalizer, max_completion_length=17
        )
        np.testing.assert_allclose(weight, want_weight, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(mask, want_mask, rtol=1e-6)
        want, want_grad = oracle.weighted_loss(logits, ref_logits, target, want_weight, want_mask, beta)
        assert float(loss) == pytest.approx(want, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)


def test_the_oracles_own_gradient_is_a_difference_quotient():
    logits, ref_logits, target, *_ = logits_case(0, 4)
    rng = np.random.default_rng(0)
    how = (ref_logits, target, rng.normal(size=(B, T)), rng.random((B, T)), 0.3)
    _, grad = oracle.weighted_loss(logits, *how)
    direction = rng.normal(size=logits.shape)
    up, down = (oracle.weighted_loss(logits + e * direction, *how)[0] for e in (1e-5, -1e-5))
    assert (up - down) / 2e-5 == pytest.approx((grad * direction).sum(), rel=1e-6)


# --- by hand --------------------------------------------------------------------------------------------------------


omniopd = jax.jit(objective.omniopd, static_argnames="cfg")
baseline = jax.jit(objective.baseline, static_argnames="advantage")


def test_smoothed_target_by_hand():
    got = objective.smoothed_target(jnp.array([3.0, 0.0, 10.0]), jnp.array([10.0, 4.0, 10.0]), jnp.log(0.5), alpha=2.0)
    np.testing.assert_allclose(got, [4 / 12, 1 / 6, 11 / 12], rtol=1e-6)
    got = objective.smoothed_target(jnp.array([3.0]), jnp.array([10.0]), jnp.array([-1.0]), alpha=0.0)
    np.testing.assert_allclose(got, [0.3], rtol=1e-6)


def test_mean_chunk_logp_is_the_geometric_mean_over_the_chunk_alone():
    logp = -jnp.arange(10.0)[None]
    got = objective.mean_chunk_logp(logp, jnp.array([[0, 3, 7, -1]]), 3)
    np.testing.assert_allclose(got, [[-1.0, -4.0, -8.0, 0.0]])


def test_baselines():
    pi_hat = jnp.array([[0.2, 0.6, 9.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]])
    keep = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
    np.testing.assert_array_equal(baseline(pi_hat, keep, "none"), 0.0)
    np.testing.assert_allclose(baseline(pi_hat, keep, "batch_mean"), np.full((3, 3), 1.3 / 3), rtol=1e-6)
    got = baseline(pi_hat, keep, "leave_one_out")
    np.testing.assert_allclose(got[:2, 0], [0.5, 0.4], rtol=1e-6)
    # a response whose chunks are the only ones has nothing to be compared with
    alone = baseline(pi_hat[:1], keep[:1], "leave_one_out")
    np.testing.assert_array_equal(alone, 0.0)
    # no chunk at all: no division by zero
    for name in ("batch_mean", "leave_one_out"):
        np.testing.assert_array_equal(baseline(pi_hat[2:], keep[2:], name), 0.0)


def test_a_dropped_audit_goes_back_to_the_anchor(make_cfg):
    cfg = make_cfg(**{"audit.min_continuations": 3, "objective.advantage": "batch_mean"})
    logp = jnp.full((1, 12), -0.5)
    both = as_batch([[0] * 12], [11], [[1, 6, -1]], [[2.0, 2.5, 0.0]], [[2, 3, 0]])
    weight, mask = omniopd(logp, both, cfg)
    assert np.asarray(mask)[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0]
    assert np.asarray(weight)[0, :6].tolist() == [0.0] * 6
    # the dropped one's k_sem does not reach the mean either: the kept one, alone, has advantage zero
    np.testing.assert_allclose(weight, 0.0, atol=1e-7)
    poisoned = both.replace(k_sem_BM=jnp.array([[jnp.nan, 2.5, jnp.nan]]))
    assert np.isfinite(np.asarray(omniopd(logp, poisoned, cfg)[0])).all()


def test_the_default_n_min_is_half_of_n_rounded_up(make_cfg):
    cfg = make_cfg(**{"audit.num_continuations": 5})
    batch = as_batch([[0] * 12], [12], [[0, 4, 8]], [[1.0, 1.0, 1.0]], [[2, 3, 5]])
    keep = objective.chunk_targets(jnp.zeros((1, 12)), batch, cfg).keep_BM
    assert np.asarray(keep)[0].tolist() == [False, True, True]


def test_weights_carry_no_gradient(make_cfg):
    batch = as_batch([[0] * 12], [12], [[0, 5, -1]], [[1.0, 3.0, 0.0]], [[4, 4, 0]])
    for advantage in ("none", "batch_mean", "leave_one_out"):
        cfg = make_cfg(**{"objective.advantage": advantage, "prior.alpha": 2.0})
        grad = jax.grad(lambda x, cfg=cfg: (omniopd(x, batch, cfg)[0] ** 2).sum())(jnp.full((1, 12), -0.7))
        np.testing.assert_array_equal(grad, 0.0)
    slope = jax.grad(lambda x: objective.smoothed_target(1.0, 4.0, x, alpha=2.0))(-0.7)
    assert float(slope) == 0.0


# --- the estimator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_chunk_term_is_reinforce_with_reward_pi_hat(make_cfg, alpha):
    """Two tokens of a two-word vocabulary: all four responses enumerated.

    E_y[gradient of the chunk term] = - d/dtheta sum_y pi_theta(y) * R(y), the reward R = pi_hat held fixed.
    """
    cfg = make_cfg(**{
        "audit.num_chunks": 1, "audit.chunk_tokens": 2, "prior.alpha": alpha, "anchor.kl_coef": 0.0,
        "max_completion_length": 2,
    })  # fmt: skip
    theta = np.array([[0.3, -0.2], [-0.9, 0.4], [1.1, 0.5]])  # logits [state, word]; states: start, after 0, after 1
    responses = list(itertools.product((0, 1), repeat=2))
    similarity = np.array([0.9, 0.1, 0.35, 0.6])  # k_sem / n of each response

    def logp_tokens(theta):
        start, *after = map(oracle.log_softmax, theta)
        return np.array([[start[a], after[a][b]] for a, b in responses])

    reward = (4 * similarity + alpha * np.exp(logp_tokens(theta).mean(1))) / (4 + alpha)

    def expected_reward(theta):
        return (np.exp(logp_tokens(theta).sum(1)) * reward).sum()

    want = np.zeros_like(theta)
    for i in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[i] = 1e-6
        want[i] = -(expected_reward(theta + step) - expected_reward(theta - step)) / 2e-6

    batch = as_batch(responses, [2] * 4, [[0]] * 4, 4 * similarity[:, None], [[4]] * 4)
    hidden = jnp.array([[np.eye(3)[0], np.eye(3)[1 + a]] for a, _ in responses], jnp.float32)
    prob_B1 = jnp.asarray(np.exp(logp_tokens(theta).sum(1))[:, None], jnp.float32)

    def chunk_term(head):
        logp = vocab.token_stats(hidden, head, batch.token_BL, block=8).logp_BT
        weight, mask = objective.omniopd(logp, batch, cfg)
        return vocab.weighted_nll_and_kl(
            hidden, head, None, None, batch.token_BL, weight * prob_B1, mask, beta=0.0, block=8
        )[0]

    got = jax.jit(jax.grad(chunk_term))(jnp.asarray(theta, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.abs(want).max() > 0.01


@pytest.mark.parametrize(("n", "alpha"), [(10, 0.0), (10, 1.0), (10, 5.0), (4, 1.0), (40, 2.0)])
def test_variance_of_pi_hat_is_what_the_posterior_predicts(n, alpha):
    """Var(pi_hat) = Var(phi) / n * (n / (n + alpha))^2 at a fixed pi_bar; its mean is pulled to pi_bar by the prior."""
    draws, pi_bar = 20_000, 0.6
    phi = np.random.default_rng(7).beta(0.5, 1.5, (draws, n))  # mean 1/4, variance 1/16
    k_sem, count = jnp.asarray(phi.sum(1), jnp.float32), jnp.full(draws, float(n))
    mean_logp = jnp.full(draws, np.log(pi_bar))
    pi_hat = np.asarray(objective.smoothed_target(k_sem, count, mean_logp, alpha=alpha), np.float64)
    predicted = (1 / 16) / n * (n / (n + alpha)) ** 2
    assert pi_hat.var() == pytest.approx(predicted, rel=0.05)  # standard error of a variance: about 1%
    mean = (n / 4 + alpha * pi_bar) / (n + alpha)
    assert abs(pi_hat.mean() - mean) < 4 * (predicted / draws) ** 0.5


def test_metrics_over_kept_chunks(make_cfg):
    alpha = 1.5
    cfg = make_cfg(**{"prior.alpha": alpha, "objective.advantage": "batch_mean"})
    rng = np.random.default_rng(1)
    logp = -rng.random((3, 14)) * 3
    entropy = rng.random((3, 14))
    length, peak = [14, 9, 3], [[0, 4, 9], [5, -1, -1], [-1, -1, -1]]
    k_sem = np.array([[0.1, 2.0, 3.9], [1.3, 0, 0], [0, 0, 0]])
    full = as_batch(np.zeros((3, 14)), length, peak, k_sem, np.full((3, 3), 4))

    @jax.jit
    def compute(batch):
        targets = objective.chunk_targets(jnp.asarray(logp, jnp.float32), batch, cfg)
        return measures.of_batch(batch, targets, jnp.asarray(entropy, jnp.float32), cfg)

    def metrics(batch):
        return {k: float(v) for k, v in compute(batch).items()}

    got = metrics(full)
    assert got["audit/k_sem_mean"] == pytest.approx(7.3 / 4, rel=1e-5)
    pi_bar = [np.exp(logp[b, t : t + 4].mean()) for b, t in ((0, 0), (0, 4), (0, 9), (1, 5))]
    assert got["audit/pi_bar_mean"] == pytest.approx(np.mean(pi_bar), rel=1e-5)
    # the identity of method.md, section 5, when every audit is full
    assert got["audit/pi_hat_mean"] == pytest.approx(
        (got["audit/k_sem_mean"] + alpha * got["audit/pi_bar_mean"]) / (4 + alpha), rel=1e-5
    )
    pi_hat = [(k + alpha * p) / (4 + alpha) for k, p in zip((0.1, 2.0, 3.9, 1.3), pi_bar)]
    assert got["audit/pi_hat_var"] == pytest.approx(np.var(pi_hat), rel=1e-4)
    assert got["audit/midband_fraction"] == pytest.approx(2 / 4)  # 0.1 / 4 and 3.9 / 4 lie outside (0.05, 0.95)
    assert got["audit/n_eff"] == 4 and got["audit/chunks"] == 4 and got["audit/dropped"] == 0
    assert got["audit/token_fraction"] == pytest.approx(16 / 26)
    assert got["audit/entropy_at_peak"] == pytest.approx(np.mean(entropy[[0, 0, 0, 1], [0, 4, 9, 5]]), rel=1e-5)
    real = np.concatenate([row[:n] for row, n in zip(entropy, length)])
    assert got["entropy"] == pytest.approx(real.mean(), rel=1e-5)
    assert got["completions/max_length"] == 14 and got["completions/mean_length"] == pytest.approx(26 / 3)
    empty = metrics(full.replace(length_B=full.length_B.at[2].set(0)))  # a text that never came has no length
    assert empty["completions/mean_length"] == pytest.approx(empty["completions/max_length"] / 2 + int(length[1]) / 2)
    # one audit short of n_min: it counts as dropped and leaves every mean
    got = metrics(full.replace(n_BM=full.n_BM.at[0, 1].set(1)))
    assert got["audit/dropped"] == 1 and got["audit/chunks"] == 3
    assert got["audit/k_sem_mean"] == pytest.approx(5.3 / 3, rel=1e-5)
    # no audit at all: zeros, not NaN
    none = metrics(full.replace(peak_BM=jnp.full((3, 3), -1)))
    assert all(np.isfinite(v) for v in none.values()) and none["audit/pi_hat_mean"] == 0
