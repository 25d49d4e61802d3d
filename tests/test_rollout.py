"""The sampler: which rows come out, what is reported about them, and what must not change them."""

import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known import chi_square, sampler_distribution

from omniopd_jax import decode, draw, model, rollout, step
from omniopd_jax.parallel import sharding
from omniopd_jax.slots import Slots


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


# --- slots ----------------------------------------------------------------------------------------------------------

MOST = 80  # a page and a bit


def without_cache(params, model_cfg):
    """Rows as the training graph gives them: run(prompts, key_B2, limit_B, ...) -> tokens of each."""
    forward = jax.jit(lambda p, x_BL: model.logits(p, model_cfg, model.hidden(p, model_cfg, x_BL)))
    one = jax.jit(draw.draw)

    def run(prompts, key_B2, limit_B, temperature=1.0, top_p=1.0, top_k=0, end_ids=END):
        B, L = len(prompts), 96
        token_BL = rollout.pad_rows(prompts, L)[0]
        length = np.array(list(map(len, prompts)))
        live, out = np.ones(B, bool), [[] for _ in prompts]
        keys = jax.random.wrap_key_data(jnp.asarray(key_B2))
        for t in range(int(max(limit_B))):
            z_BV = np.asarray(forward(params, token_BL))[np.arange(B), length + t - 1]
            u_B = jax.vmap(lambda k, t=t: jax.random.uniform(jax.random.fold_in(k, t)))(keys)
            drawn = np.asarray(one(z_BV, u_B, jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))[0])
            for b in np.flatnonzero(live):
                out[b].append(int(drawn[b]))
                token_BL[b, length[b] + t] = drawn[b]
                live[b] = drawn[b] not in end_ids and t + 1 < limit_B[b]
            if not live.any():
                return out
        return out

    return run


@pytest.fixture(scope="module")
def naive(params, model_cfg):
    return without_cache(params, model_cfg)


def streamed(params, model_cfg, prompts, key_B2, limit_B, **how):
    """All rows of `rollout.stream`, by row, and what was spent."""
    spent = rollout.Spent()
    settings = how.pop("how", rollout.DEFAULT)
    parts = list(
        rollout.stream(params, model_cfg, prompts, key_B2, max_new_tokens=limit_B, how=settings, spent=spent, **how)
    )
    rows = sum(parts, [])
    assert sorted(r.row for r in rows) == list(range(len(key_B2)))
    return sorted(rows, key=lambda r: r.row), parts, spent


LENGTHS = {
    "mixed": [3, 1, 2, 9, 4, 1, 12, 2, 5, 1, 3],
    "all end in the same step": [4] * 11,
    "all end in their first token": [1] * 11,
    "one never ends": [1, 1, 1, 1, 12, 1, 1, 1, 1, 1, 1],
    "longest first": list(range(12, 1, -1)),
}


@pytest.fixture(scope="module")
def eleven():
    """Prompts of 1 to 14 tokens, and keys."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(2, 38, n).tolist() for n in (1, 14, 3, 3, 9, 1, 6, 2, 12, 1, 5)]
    return prompts, rollout.key_data(jax.random.key(3), np.arange(11))


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("slots", [1, 2, 8, 16])
def test_a_row_is_the_same_in_any_slot_and_order_of_lengths(params, model_cfg, naive, eleven, case, slots):
    prompts, keys = eleven
    want = naive(prompts, keys, LENGTHS[case], end_ids=())
    prepared = rollout.prepare(params, model_cfg)
    got, _, spent = streamed(prepared, model_cfg, prompts, keys, LENGTHS[case], how=rollout.How(slots=slots))
    assert [r.tokens.tolist() for r in got] == want
    assert spent.tokens == sum(LENGTHS[case]) and spent.slot_steps >= spent.tokens
    assert all(len(r.logp_model) == len(r.logp_sampler) == len(r.tokens) and not r.finished for r in got)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 8]), st.sampled_from([1, 3]), st.integers(0, 5),
       st.sampled_from([(1.0, 1.0, 0), (0.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 5)]))  # fmt: skip
def test_any_slots_turn_and_part_give_the_rows_of_the_training_graph(
    params, model_cfg, naive, eleven, seed, slots, samples, turn, drawing
):
    prompts, _ = eleven
    rng = np.random.default_rng(seed)
    keys = rollout.key_data(jax.random.key(seed), np.arange(11 * samples))
    limit = rng.integers(1, 13, 11 * samples)
    temperature, top_p, top_k = drawing
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "end_ids": END}
    want = naive([p for p in prompts for _ in range(samples)], keys, limit, **how)
    prepared, part = rollout.prepare(params, model_cfg), int(rng.integers(1, 11 * samples + 1))
    got, parts, _ = streamed(
        prepared, model_cfg, prompts, keys, limit, how=rollout.How(slots=slots, turn=turn), part=part,
        num_samples=samples, **how,
    )  # fmt: skip
    assert [r.tokens.tolist() for r in got] == want
    assert [r.finished for r in got] == [row[-1] in END for row in want]
    assert [len(p) for p in parts[:-1]] == [part] * (len(parts) - 1) and 0 < len(parts[-1]) <= part
    assert all(p == sorted(p, key=lambda r: r.row) for p in parts)


@pytest.mark.parametrize(
    "long", [range(24, 32), *(pytest.param(rows, marks=pytest.mark.slow) for rows in (range(12), [3, 20, 25, 29]))]
)
def test_shards_whose_rows_end_at_different_times(params, model_cfg, long, monkeypatch):
    """Slots are halved for all shards alike: the fullest one decides, and no row of another is lost."""
    turns, real = iter(range(50)), decode.turn
    monkeypatch.setattr(decode, "turn", lambda *args, **how: (next(turns), real(*args, **how))[1])
    keys, limit = rollout.key_data(jax.random.key(3), np.arange(32)), [20 if b in long else 2 for b in range(32)]
    got = []
    for shards in (1, 2):
        mesh = sharding.make_mesh({"data": shards, "fsdp": 1, "tp": 1}, jax.devices()[:shards])
        compute = model.Compute(mesh=mesh)
        prepared = rollout.prepare(
            jax.device_put(params, model.param_shardings(model_cfg, mesh)), model_cfg, compute=compute
        )
        rows, _, spent = streamed(prepared, model_cfg, [[2, 3]] * 32, keys, limit, compute=compute)
        got.append([r.tokens.tolist() for r in rows])
        assert [len(r.tokens) for r in rows] == limit and spent.tokens == sum(limit)
    assert got[0] == got[1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_books_of_any_shards_end_every_row(data):
    """Turns are played without a model: each makes progress, rows reach their lengths, and all pages come back."""

    def pick(*choices):
        return data.draw(st.sampled_from(choices))

    shards, ranks, slots, per_prompt = pick(1, 2, 3), pick(1, 2), pick(1, 3, 8, 16, 32), pick(1, 2, 8)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    prompts = [rng.integers(1, 200, pick(1, 4, 12)).tolist()]
    lengths, longest = prompts * ranks, int(rng.integers(1, 300))
    rows = ranks * len(prompts[0]) * per_prompt
    limit = np.where(rng.random(rows) < 0.3, longest, rng.integers(1, min(longest, 5) + 1, rows))
    full = -(-(max(prompts[0]) + longest) // 64) + 1
    pages = 1 + int(rng.integers(full, slots * full + 1))
    ranks = [rank for rank in range(ranks) for _ in range(shards)]
    books = Slots(lengths, per_prompt, ranks=ranks, slots=slots, pages=pages, page=64, longest=longest)
    done, how = {}, rollout.How(turn=pick(0, 1, 7))
    while books.waits() or books.live():
        while books.refill(decode.COLUMNS, pick(1, 1000)):
            pass
        books.shrink()
        steps = rollout._steps(books, how)
        for row in books.make_room(steps):
            done.pop(row, None)
        least, held = rollout._least(books), [h for s in books.shards for h in s.slots]
        t, live = [h.t if h else 0 for h in held], [h is not None for h in held]
        assert sum(live) > least, "a turn without a step"
        for _ in range(steps):
            if sum(live) > least:
                t = [n + on for n, on in zip(t, live)]
                live = [on and t[i] < limit[held[i].row] for i, on in enumerate(live)]
        done |= {moved.row: moved.after for moved in books.turned(t, live)}
    assert [done[row] for row in range(rows)] == limit.tolist()
    assert all(len(s.free) == pages - 1 for s in books.shards) and sum(books.ended) == rows


def test_rows_that_fill_pages_and_share_their_prompt(params, model_cfg, naive):
    """Prompts of a page, one less and one more: rows of one prompt share its pages and write behind them."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(2, 38, n).tolist() for n in (64, 63, 65)]
    keys, limit = rollout.key_data(jax.random.key(5), np.arange(9)), [9, 3, 12, 1, 7, 12, 5, 12, 2]
    want = naive([p for p in prompts for _ in range(3)], keys, limit, end_ids=())
    prepared = rollout.prepare(params, model_cfg)
    for slots in (2, 16):
        got, _, _ = streamed(prepared, model_cfg, prompts, keys, limit, num_samples=3, how=rollout.How(slots=slots))
        assert [r.tokens.tolist() for r in got] == want


def test_a_pool_too_small_for_all_slots_gives_the_same_rows(params, model_cfg, naive, eleven):
    """Room for two rows of full length, six slots: some wait, some give up their place, none changes."""
    prompts, keys = eleven
    limit, page = [80] * 11, rollout.page_bytes(model_cfg, model.Compute())
    want = naive(prompts, keys, limit, end_ids=())
    how = rollout.How(slots=6, cache_gib=5 * page / 2**30)
    got, _, spent = streamed(rollout.prepare(params, model_cfg), model_cfg, prompts, keys, limit, how=how)
    assert [r.tokens.tolist() for r in got] == want
    assert rollout.sizes(model_cfg, model.Compute(), how, 11, 94)[1] == 6


@pytest.mark.slow
@pytest.mark.parametrize("slots", [3, 16])
def test_layers_of_all_kinds_keep_what_is_theirs(model_cfg, eleven, slots):
    """A sliding window shorter than most rows, a linear layer and a full one; slots are refilled, halved and reordered,
    prompts shared and, in the small pool of three slots, begun again."""
    cfg = dataclasses.replace(
        model_cfg, num_layers=3, layer_kinds=("sliding", "linear", "full"), window=6, linear_key_heads=2,
        linear_value_heads=4, linear_key_dim=6, linear_value_dim=4, conv_width=3,
    )  # fmt: skip
    params = model.init(jax.random.key(2), cfg)
    prompts, _ = eleven
    keys = rollout.key_data(jax.random.key(6), np.arange(22))
    limit = [*range(1, 20), 70, 12, 66]
    want = without_cache(params, cfg)([p for p in prompts for _ in "ab"], keys, limit)
    own = rollout.slot_bytes(cfg, model.Compute(), 128)
    assert own == 4 * (2 * cfg.num_kv_heads * 6 * cfg.head_dim + 2 * 2 * (2 * 6 + 2 * 4) + 4 * 6 * 4)
    small = (3 * own + 4 * rollout.page_bytes(cfg, model.Compute())) / 2**30
    how = rollout.How(slots=3, turn=5, cache_gib=small) if slots == 3 else rollout.How(slots=slots)
    got, _, _ = streamed(rollout.prepare(params, cfg), cfg, prompts, keys, limit, num_samples=2, how=how, end_ids=END)
    assert [r.tokens.tolist() for r in got] == want
    assert rollout.sizes(cfg, model.Compute(), how, 22, 84)[1] == (5 if slots == 3 else 1 + 16 * 3)


def test_a_prefill_is_no_larger_than_it_may_be_and_is_given_back(params, model_cfg, monkeypatch):
    """Prompts of 33 tokens are padded to 64; the turns and the caller go on without what was kept of each."""
    shapes, kept, real, turn = [], [], decode.prefill, decode.turn

    def prefill(*args, **how):
        pools, entries = real(*args, **how)
        shapes.append(args[3].shape)
        kept.extend(weakref.ref(a) for a in jax.tree.leaves(entries))
        return pools, entries

    def checked(*args, **how):
        assert kept and not any(ref() is not None for ref in kept)
        return turn(*args, **how)

    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 256)
    monkeypatch.setattr(decode, "prefill", prefill)
    monkeypatch.setattr(decode, "turn", checked)
    keys = rollout.key_data(jax.random.key(6), np.arange(11))
    streamed(rollout.prepare(params, model_cfg), model_cfg, [[3] * 33] * 11, keys, [4] * 11, how=rollout.How(slots=16))
    assert shapes[0] == (4, 64) and max(E * P for E, P in shapes) == 256
    for longest in (1, 16, 17, 520, 1030, 2100, 70_000):
        most = rollout.most_entries(longest)
        assert rollout.padded(most) == most and (most == 1 or most * rollout.prefill_width(longest) <= 256)


def test_an_int8_cache_changes_log_probs_little(params, model_cfg, eleven):
    prompts, keys = eleven
    prepared = rollout.prepare(params, model_cfg)
    exact, coarse = (
        streamed(prepared, model_cfg, prompts, keys, [12] * 11, how=rollout.How(cache_dtype=d))[0] for d in ("", "int8")
    )
    gap = [np.abs(a.logp_model - b.logp_model).max() for a, b in zip(exact, coarse) if (a.tokens == b.tokens).all()]
    assert len(gap) >= 6 and 0 < max(gap) < 0.2


def test_an_early_end_stops_the_decoding(sample, params, model_cfg, eleven):
    """Every token ends its row: one step."""
    prompts, keys = eleven
    prepared = rollout.prepare(params, model_cfg)
    got, _, spent = streamed(prepared, model_cfg, prompts, keys, [4096] * 11, end_ids=tuple(range(38)))
    assert all(len(r.tokens) == 1 and r.finished for r in got)
    assert spent.turns == 1 and spent.slot_steps == 16


def test_nothing_of_the_vocabularys_size_times_a_turn_is_in_the_decode_loop(params, model_cfg):
    """The largest array of a turn is a pool or [B, V]; nothing copies a pool within the loop's body."""
    cfg = model_cfg
    how = {"cfg": cfg, "compute": model.Compute()}
    prepared = jax.eval_shape(lambda p: rollout.prepare(p, cfg), params)
    pools = jax.eval_shape(functools.partial(decode.empty_pools, pages=33, page=64, dtype="float32", **how))
    slots, _ = jax.eval_shape(functools.partial(decode.empty_slots, slots=16, entries=1, positions=128, **how))
    i32, f32 = (functools.partial(jax.ShapeDtypeStruct, dtype=d) for d in (jnp.int32, jnp.float32))
    drawing = (f32(()), f32(()), i32(()), i32((2,)))
    live = jax.ShapeDtypeStruct((16,), bool)
    lowered = decode.turn.lower(prepared, pools, slots, i32((16, 2)), live, drawing, i32(()), i32(()), **how)
    memory = lowered.compile().memory_analysis()
    pool_bytes = sum(np.prod(a.shape) * 4 for a in jax.tree.leaves(pools))
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes
