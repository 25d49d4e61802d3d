"""One draw: which token comes out how often, and what is reported of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known import chi_square, sampler_distribution

from omniopd_jax import draw as drawing

TRUNCATIONS = [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.6, 0.8, 0), (1.0, 0.6, 0), (1.0, 1.0, 3), (0.8, 0.7, 5), (1.0, 0.9, 1)]

draw = jax.jit(drawing.draw)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), TRUNCATIONS)
def test_draw_follows_the_distribution(temperature, top_p, top_k):
    rows, V = 20_000, 150  # three blocks of 64, the last one padded
    z_V = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2
    u_B = jax.random.uniform(jax.random.key(4), (rows,))
    how = (jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))
    token, logp, sampler = map(np.asarray, draw(jnp.broadcast_to(z_V, (rows, V)), u_B, *how))
    q_V = sampler_distribution(z_V, temperature, top_p, top_k)
    assert chi_square(token, q_V) > 1e-3
    np.testing.assert_allclose(logp, oracle.log_softmax(z_V)[token], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sampler, np.log(q_V[token]), rtol=1e-4, atol=1e-5)


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    """Not only the frequencies: u between two partial sums gives the token between them, over several blocks."""
    q_V = np.random.default_rng(1).random(200)
    q_V /= q_V.sum()
    upper = np.cumsum(q_V)
    middle = jnp.asarray(upper - q_V / 2, jnp.float32)
    rows = jnp.broadcast_to(jnp.asarray(q_V, jnp.float32), (200, 200))
    np.testing.assert_array_equal(drawing.inverse_cdf(rows, middle), np.arange(200))
    np.testing.assert_array_equal(drawing.inverse_cdf(5.0 * rows, middle, block=7), np.arange(200))


def test_greedy_takes_the_largest():
    z = jnp.asarray(np.random.default_rng(2).normal(size=(6, 100)), jnp.float32)
    token, logp, sampler = draw(z, jnp.linspace(0, 0.999, 6), jnp.float32(0), jnp.float32(1), jnp.int32(0))
    np.testing.assert_array_equal(token, np.argmax(z, axis=1))
    np.testing.assert_allclose(logp, jax.nn.log_softmax(z).max(1), rtol=1e-5)
    np.testing.assert_array_equal(sampler, 0.0)


ROWS, WIDTH = 8, 130
inverse_cdf = jax.jit(drawing.inverse_cdf)
UNIFORMS = st.one_of(st.sampled_from([0.0, 2**-24, 0.5, 1 - 2**-24]), st.floats(0, 1 - 2**-24, width=32))


@settings(max_examples=200)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.3, 0.9]), st.sampled_from([1, 20]),
    st.lists(UNIFORMS, min_size=ROWS, max_size=ROWS),
)  # fmt: skip
def test_inverse_cdf_returns_a_token_with_mass(seed, share, spread, u):
    rng = np.random.default_rng(seed)
    q = (rng.random((ROWS, WIDTH)) ** spread * (rng.random((ROWS, WIDTH)) < share)).astype(np.float32)
    q[:, rng.integers(WIDTH)] += 1e-3
    token = np.asarray(inverse_cdf(q, jnp.asarray(u, jnp.float32)))
    assert (q[np.arange(ROWS), token] > 0).all()


def test_inverse_cdf_returns_a_token_with_mass_at_the_edge_of_a_block():
    """Tokens 3 and 70 alone have mass and u is just their border: neither 64, the next block's first, nor any other."""
    mass = np.random.default_rng(0).random((4000, 2)).astype(np.float32)
    q = np.zeros((4000, 128), np.float32)
    q[:, [3, 70]] = mass
    border = mass[:, 0] / mass.sum(1)
    for u in (border, np.nextafter(border, np.float32(0)), np.nextafter(border, np.float32(1))):
        assert set(np.asarray(inverse_cdf(q, jnp.asarray(u))).tolist()) <= {3, 70}


truncate = jax.jit(drawing.truncate)


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 0.83, 0.95]), st.integers(0, 12), st.booleans())
def test_truncate_equals_sorting(seed, top_p, top_k, ties):
    rng = np.random.default_rng(seed)
    q = rng.integers(1, 6, (4, 40)) / 8 if ties else rng.random((4, 40)) ** 3
    q = (q / q.sum(1, keepdims=True)).astype(np.float32)
    got = np.asarray(truncate(q, jnp.float32(top_p), jnp.int32(top_k)))
    for row, kept in zip(q, got):
        want = [oracle.truncate(row, p, top_k) > 0 for p in (top_p - 1e-5, top_p + 1e-5)]  # rounding at the edge
        assert any(((kept > 0) == w).all() for w in want)
        np.testing.assert_array_equal(kept[kept > 0], row[kept > 0])


def test_truncate_keeps_ties_and_switches_off():
    q = jnp.array([[0.1, 0.3, 0.3, 0.2, 0.1]])
    kept = functools.partial(np.flatnonzero)
    assert kept(truncate(q, 1.0, 1)[0]).tolist() == [1, 2]
    assert kept(truncate(q, 0.3, 0)[0]).tolist() == [1, 2]
    assert kept(truncate(q, 0.7, 0)[0]).tolist() == [1, 2, 3]
    assert kept(truncate(q, 1.0, 4)[0]).tolist() == [0, 1, 2, 3, 4]
    assert kept(truncate(q, 0.65, 3)[0]).tolist() == [1, 2]  # 0.65 of the 0.8 that top-k has left
    np.testing.assert_array_equal(truncate(q, 1.0, 0), q)
    np.testing.assert_array_equal(truncate(q, 1.0, 99), q)


def test_top_k_alone_keeps_a_token_of_tiny_mass():
    q = jnp.array([[1.0, 1e-9, 1e-12, 0.0]])
    assert np.flatnonzero(truncate(q, 1.0, 2)[0]).tolist() == [0, 1]
