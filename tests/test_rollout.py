"""The sampler: what is drawn and how often, what is reported about it, and what must not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from omniopd_jax import model, rollout, step

TRUNCATIONS = [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.6, 0.8, 0), (1.0, 0.6, 0), (1.0, 1.0, 3), (0.8, 0.7, 5), (1.0, 0.9, 1)]


def sampler_distribution(logits_V, temperature, top_p, top_k):
    """NumPy: temperature, then top-k, then top-p, renormalised."""
    q_V = oracle.truncate(np.exp(oracle.log_softmax(np.asarray(logits_V) / temperature)), top_p, top_k)
    return q_V / q_V.sum()


def chi_square(tokens, q_V):
    """p-value of the counts, rare tokens pooled; 0 where a token of no mass was drawn."""
    count = np.bincount(np.asarray(tokens), minlength=len(q_V))
    if count[q_V == 0].any():
        return 0.0
    often = q_V * count.sum() >= 5
    observed = np.append(count[often], count[~often].sum())
    expected = np.append(q_V[often], q_V[~often].sum()) * count.sum()
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue if keep.sum() > 1 else 1.0


# --- one draw -------------------------------------------------------------------------------------------------------

draw = jax.jit(rollout.draw)


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
    np.testing.assert_array_equal(rollout.inverse_cdf(rows, middle), np.arange(200))
    np.testing.assert_array_equal(rollout.inverse_cdf(5.0 * rows, middle, block=7), np.arange(200))


def test_greedy_takes_the_largest():
    z = jnp.asarray(np.random.default_rng(2).normal(size=(6, 100)), jnp.float32)
    token, logp, sampler = draw(z, jnp.linspace(0, 0.999, 6), jnp.float32(0), jnp.float32(1), jnp.int32(0))
    np.testing.assert_array_equal(token, np.argmax(z, axis=1))
    np.testing.assert_allclose(logp, jax.nn.log_softmax(z).max(1), rtol=1e-5)
    np.testing.assert_array_equal(sampler, 0.0)


ROWS, WIDTH = 8, 130
inverse_cdf = jax.jit(rollout.inverse_cdf)
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


truncate = jax.jit(rollout.truncate)


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


# --- whole rows -----------------------------------------------------------------------------------------------------


def prompts(seed=0, count=4, width=8, least=1):
    """Right-padded prompts of unequal length and their lengths."""
    rng = np.random.default_rng(seed)
    length = rng.integers(least, width + 1, count)
    token = rng.integers(2, 38, (count, width)) * (np.arange(width)[None] < length[:, None])
    return jnp.asarray(token, jnp.int32), jnp.asarray(length, jnp.int32)


KEYS = rollout.row_keys(jax.random.key(11), range(4))
END = (7, 12)  # rows of the tiny model end after 4, 2, 12 (cut off) and 10 tokens


@pytest.fixture(scope="module")
def sample(params, model_cfg):
    return functools.partial(rollout.sample, rollout.prepare(params, model_cfg), model_cfg)


@pytest.fixture(scope="module")
def base(sample):
    """Four rows of at most 12 tokens."""
    return sample(*prompts(), KEYS, max_new_tokens=12, end_ids=END)


def all_logits(params, model_cfg, token_BL):
    """[B, L, V] by the training graph."""
    return np.asarray(jax.jit(lambda p, x: model.logits(p, model_cfg, model.hidden(p, model_cfg, x)))(params, token_BL))


def same_draws(got, want, rows=slice(None)):
    """The same tokens, and the same log-probs to rounding, over the shorter of the two widths."""
    T = min(got.token_BT.shape[1], want.token_BT.shape[1])
    np.testing.assert_array_equal(got.length_B, want.length_B[rows])
    np.testing.assert_array_equal(got.finished_B, want.finished_B[rows])
    np.testing.assert_array_equal(got.token_BT[:, :T], want.token_BT[rows, :T])
    for name in ("logp_model_BT", "logp_sampler_BT"):
        np.testing.assert_allclose(getattr(got, name)[:, :T], getattr(want, name)[rows, :T], atol=1e-4)


def test_rows_stop_at_end_tokens_and_padding_is_zero(base):
    length, token = np.asarray(base.length_B), np.asarray(base.token_BT)
    assert len(set(length.tolist())) > 1 and length.max() == 12 and length.min() < 12  # the case means something
    for b in range(4):
        ends = np.isin(token[b, : length[b]], END)
        assert not ends[:-1].any()
        assert ends[-1] == base.finished_B[b]  # the end token is counted; a row cut off has none
        assert base.finished_B[b] or length[b] == 12
        for name in ("token_BT", "logp_model_BT", "logp_sampler_BT"):
            np.testing.assert_array_equal(getattr(base, name)[b, length[b] :], 0)
        assert (np.asarray(base.logp_model_BT)[b, : length[b]] < 0).all()


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.8, 6)])
def test_logp_model_is_what_scoring_says(sample, params, model_cfg, temperature, top_p, top_k):
    """Decode with its cache against the training graph; logp under the sampler from the scored logits, in NumPy."""
    token, length = prompts()
    out = sample(token, length, KEYS, max_new_tokens=12, end_ids=END, temperature=temperature, top_p=top_p, top_k=top_k)
    rows = np.zeros((4, 8 + 12), np.int32)
    for b in range(4):
        rows[b, : length[b]] = token[b, : length[b]]
        rows[b, length[b] : length[b] + out.length_B[b]] = out.token_BT[b, : out.length_B[b]]
    score = functools.partial(step.score, T=12, model_cfg=model_cfg, block=16, micro_batches=1)
    got = jax.jit(score)(params, jnp.asarray(rows), length)
    logits = all_logits(params, model_cfg, rows)
    for b in range(4):
        for t in range(int(out.length_B[b])):
            assert float(out.logp_model_BT[b, t]) == pytest.approx(float(got.logp_BT[b, t]), abs=1e-4)
            q_V = sampler_distribution(logits[b, length[b] + t - 1], temperature, top_p, top_k)
            assert float(out.logp_sampler_BT[b, t]) == pytest.approx(np.log(q_V[out.token_BT[b, t]]), abs=1e-3)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.8, 5)])
def test_sampled_rows_follow_a_known_model(lookup, temperature, top_p, top_k):
    """4,000 completions of one prompt under a model with a known table: two tokens and what is reported of them."""
    table = np.random.default_rng(3).normal(size=(7, 7)) * 1.5
    cfg, params = lookup(table)
    keys = jax.random.split(jax.random.key(1), 4000)
    out = rollout.sample(
        params, cfg, jnp.array([[2, 5, 0]]), jnp.array([2]), keys, max_new_tokens=2, num_samples=4000,
        temperature=temperature, top_p=top_p, top_k=top_k,
    )  # fmt: skip
    first, second = np.asarray(out.token_BT)[:, 0], np.asarray(out.token_BT)[:, 1]
    assert chi_square(first, sampler_distribution(table[5], temperature, top_p, top_k)) > 1e-3
    for word in range(7):
        if (first == word).sum() > 100:
            q_V = sampler_distribution(table[word], temperature, top_p, top_k)
            assert chi_square(second[first == word], q_V) > 1e-3
    logp = np.array([oracle.log_softmax(row) for row in table])
    np.testing.assert_allclose(np.asarray(out.logp_model_BT)[:, 0], logp[5][first], atol=1e-4)
    np.testing.assert_allclose(np.asarray(out.logp_model_BT)[:, 1], logp[first, second], atol=1e-4)


def test_a_row_draws_the_same_alone_or_in_another_order(sample, base):
    token, length = prompts()
    order = np.array([2, 0, 3, 1])
    same_draws(sample(token[order], length[order], KEYS[order], max_new_tokens=12, end_ids=END), base, order)
    alone = slice(1, 2)
    same_draws(sample(token[alone], length[alone], KEYS[alone], max_new_tokens=12, end_ids=END), base, alone)


def test_a_row_draws_the_same_in_another_bucket(sample, base):
    token, length = prompts()
    wide = jnp.pad(token, ((0, 0), (0, 5)), constant_values=23)
    same_draws(sample(wide, length, KEYS, max_new_tokens=12, end_ids=END), base)


def test_a_row_draws_the_same_when_the_cache_grows(sample, base):
    got = sample(*prompts(), KEYS, max_new_tokens=12, end_ids=END, first_chunk=8)
    assert got.token_BT.shape == base.token_BT.shape == (4, 16)
    same_draws(got, base)


def test_growing_never_holds_two_whole_caches(monkeypatch):
    """The new cache and one old layer: at full size two caches would not fit a chip that the recipe fits."""
    layers, B, T = 6, 2, 8
    cache = [tuple(jnp.full((B, 2, 16, 4), float(2 * i + j)) for j in range(2)) for i in range(layers)]
    out = rollout.Rollout(
        jnp.ones((B, T), jnp.int32), jnp.full(B, T), jnp.zeros(B, bool), *(jnp.full((B, T), float(i)) for i in range(2))
    )
    whole, alive, real = sum(a.nbytes for layer in cache for a in layer), [], rollout._wider

    def watched(tree, **kw):
        got = real(tree, **kw)
        alive.append(sum(a.nbytes for a in jax.live_arrays() if a.ndim == 4 and a.shape[:2] == (B, 2)))
        return got

    monkeypatch.setattr(rollout, "_wider", watched)
    state = rollout.SamplerState(cache, jnp.zeros((B, 4)), jnp.ones(B), None, jnp.int32(T), out)
    grown = rollout._grow(state, S=24, T=16)
    new = 24 * whole // 16
    assert sum(a.nbytes for layer in grown.cache for a in layer) == new
    assert max(alive) <= new + whole // layers
    for i, layer in enumerate(grown.cache):
        for j, a in enumerate(layer):
            assert np.all(a[:, :, :16] == 2 * i + j) and not np.any(a[:, :, 16:])
    assert grown.out.token_BT.shape == (B, 16) and not np.any(grown.out.logp_sampler_BT[:, T:])
    assert np.all(grown.out.logp_sampler_BT[:, :T] == 1) and np.all(grown.out.length_B == T)


def test_the_length_cap_only_cuts(sample, base):
    same = sample(*prompts(), KEYS, max_new_tokens=5, end_ids=END)
    np.testing.assert_array_equal(same.length_B, np.minimum(base.length_B, 5))
    np.testing.assert_array_equal(same.token_BT[:, :5], base.token_BT[:, :5])
    np.testing.assert_array_equal(same.token_BT[:, 5:], 0)
    np.testing.assert_array_equal(same.finished_B, np.asarray(base.finished_B) & (np.asarray(base.length_B) <= 5))


def test_completions_of_a_prompt_are_those_of_the_prompt_repeated(sample):
    token, length = prompts(count=2)
    got = sample(token, length, KEYS, max_new_tokens=12, end_ids=END, num_samples=2)
    apart = sample(jnp.repeat(token, 2, axis=0), jnp.repeat(length, 2), KEYS, max_new_tokens=12, end_ids=END)
    same_draws(got, apart)
    assert not np.array_equal(got.token_BT[0], got.token_BT[1])


def test_greedy_follows_the_largest_logit_of_the_scoring_model(sample, params, model_cfg):
    token, length = prompts()
    out = sample(token, length, KEYS, max_new_tokens=8, temperature=0.0)
    rows = np.zeros((4, 16), np.int32)
    rows[:, :8] = token
    for b in range(4):
        rows[b, length[b] : length[b] + 8] = out.token_BT[b, :8]
    logits = all_logits(params, model_cfg, rows)
    for b in range(4):
        for t in range(8):
            z_V = logits[b, length[b] + t - 1]
            assert z_V[out.token_BT[b, t]] >= z_V.max() - 1e-3
    np.testing.assert_array_equal(out.logp_sampler_BT, 0.0)


def test_an_early_end_stops_the_decoding(sample):
    """Every token ends the row: one step, and the cache never grows to what a long answer would need."""
    out = sample(*prompts(), KEYS, max_new_tokens=4096, end_ids=tuple(range(38)), first_chunk=8)
    assert out.token_BT.shape == (4, 8)
    np.testing.assert_array_equal(out.length_B, 1)
    assert np.asarray(out.finished_B).all()


def test_decoding_stops_inside_a_chunk_when_all_rows_are_done(sample, model_cfg, monkeypatch):
    """The prompts of the two rows that end after 4 and 2 tokens, with room for 16: four steps are taken."""
    steps, decode = [], rollout._decode

    def spy(*args, **how):
        state, done = decode(*args, **how)
        steps.append(int(state.t))
        return state, done

    monkeypatch.setattr(rollout, "_decode", spy)
    token, length = prompts()
    two = np.array([0, 1, 0, 1])
    out = sample(token[two], length[two], KEYS[two], max_new_tokens=12, end_ids=END)
    assert out.length_B.tolist() == [4, 2, 4, 2] and steps == [4]


def test_settings_are_traced_and_not_compiled_in(sample, base):
    with jax.no_tracing():
        sample(*prompts(5), KEYS, max_new_tokens=11, end_ids=END, temperature=0.3, top_p=0.4, top_k=2)
        sample(*prompts(6), KEYS, max_new_tokens=10, end_ids=END, temperature=0.0)


def test_row_keys_depend_on_the_id_alone():
    ids = [5, 2**31, 7]
    got = jax.random.key_data(rollout.row_keys(jax.random.key(1), ids))
    np.testing.assert_array_equal(got[2:], jax.random.key_data(rollout.row_keys(jax.random.key(1), ids[2:])))
    assert len({tuple(k) for k in np.asarray(got).tolist()}) == 3


def test_buckets_hold_the_length_and_are_few():
    widths = [rollout.bucket(n) for n in range(1, 5000)]
    assert all(w >= n for n, w in enumerate(widths, 1)) and widths == sorted(widths)
    assert all(w <= max(16, n * 1.25 + 16) for n, w in enumerate(widths, 1))
    assert len(set(widths)) < 40
    assert all(rollout.bucket(w) == w for w in set(widths))


def test_pad_rows():
    token, length = rollout.pad_rows([[3, 4], [], [5]], 4)
    assert token.tolist() == [[3, 4, 0, 0], [0] * 4, [5, 0, 0, 0]] and length.tolist() == [2, 0, 1]
    assert token.dtype == length.dtype == np.int32
