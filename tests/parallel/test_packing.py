"""Packed rows: the losses, gradients and scores of a row each, the packer's promises, and a whole run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_step import close

from omniopd_jax import config, hf, model, objective, step, teachers, train
from omniopd_jax.errors import UserError
from omniopd_jax.model import attention
from omniopd_jax.parallel import packing, sharding
from omniopd_jax.run import validation

B, P, T, M = 32, 6, 10, 3
MOST = 2 * (P + T)


@functools.cache
def batch() -> objective.Batch:
    """Thirty-two responses of 0 to 10 tokens, most of them short; one without tokens at all, chunks in most."""
    rng = np.random.default_rng(5)
    prompt_length, length = rng.integers(1, P + 1, B), np.minimum(T, rng.geometric(0.25, B))
    length[[3, 9]], (prompt_length[3], length[7]) = [0, T], (0, T)
    token = np.zeros((B, P + T), np.int32)
    for b in range(B):
        token[b, : prompt_length[b] + length[b]] = rng.integers(1, 38, prompt_length[b] + length[b])
    peak = np.where(length[:, None] >= 4 * np.arange(1, M + 1), 4 * np.arange(M)[None], -1)
    n = np.where(peak >= 0, rng.integers(1, 5, (B, M)), 0)
    i32 = functools.partial(np.asarray, dtype=np.int32)
    return objective.Batch(
        token, i32(prompt_length), i32(length), i32(peak), (rng.random((B, M)) * n).astype(np.float32), i32(n)
    )


def rows_of(b: objective.Batch) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(b.token_BL, b.prompt_length_B + b.length_B)]


def packed_batch(shards: int, micro_batches: int) -> objective.Batch:
    b = batch()
    packed = packing.make(
        rows_of(b), b.prompt_length_B, most=MOST, shards=list(range(shards)), micro_batches=micro_batches
    )
    assert packed.token_RL.size < 0.8 * b.token_BL.size and packed.owner_ZX.size < B * T
    assert packed.segment_RL.max() > 1
    return b.replace(token_BL=None, packed=packed)


def tokens_of(b: objective.Batch):
    return b.token_BL if b.packed is None else b.packed


@functools.cache
def model_of(kind: str, model_cfg):
    """(config, student, reference), the logits' scale about 2."""
    if kind == "moe":
        model_cfg = dataclasses.replace(
            model_cfg, family="qwen3_moe", num_experts=4, experts_per_token=2, expert_size=12
        )
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(1), model_cfg)
    params["embed"] *= 25.0
    ref = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    return model_cfg, params, ref


def everything(params, ref, b, cfg, model_cfg, compute=None):
    """Score, weights, loss and gradient of one update: (stats, loss, gradients, loss stats)."""
    stats = step.score(
        params,
        tokens_of(b),
        b.prompt_length_B,
        T,
        model_cfg=model_cfg,
        block=8,
        micro_batches=cfg.micro_batches,
        compute=compute,
    )
    weight, mask = objective.weights(stats.logp_BT, b, cfg)
    return stats, *step.loss_and_grads(params, ref, b, weight, mask, model_cfg=model_cfg, cfg=cfg, compute=compute)


run = jax.jit(everything, static_argnames=("cfg", "model_cfg", "compute"))


@functools.cache
def unpacked(kind, model_cfg, cfg):
    """What a row each gives, in one piece on one device; test_step.py holds it against the oracle."""
    model_cfg, params, ref = model_of(kind, model_cfg)
    return jax.device_get(run(params, ref, batch(), cfg=cfg, model_cfg=model_cfg))


def assert_equal(got, want, tolerance=1e-5):
    """Every real token's log-prob, entropy and KL, the loss, and every gradient leaf."""
    real = np.arange(T)[None] < batch().length_B[:, None]
    for name, a, b in (
        ("logp", got[0].logp_BT, want[0].logp_BT), ("entropy", got[0].entropy_BT, want[0].entropy_BT),
        ("update's logp", got[3].logp_BT, want[3].logp_BT), ("kl", got[3].kl_BT, want[3].kl_BT),
    ):  # fmt: skip
        np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=2e-5, err_msg=name)
    assert float(got[1]) == pytest.approx(float(want[1]), rel=tolerance)
    assert all(np.linalg.norm(g) > 0 for g in jax.tree.leaves(want[2]))
    close(got[2], want[2], tolerance)


def settings(make_cfg, **more):
    return make_cfg(**{"objective.advantage": "batch_mean", "objective.normalizer": "separate_means"} | more)


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [("dense", 1), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("dense", 2), ("moe", 1), ("moe", 2)))],
)
def test_packed_equals_unpacked(model_cfg, make_cfg, kind, micro_batches):
    want = unpacked(kind, model_cfg, settings(make_cfg))
    own_cfg, params, ref = model_of(kind, model_cfg)
    cfg = settings(make_cfg, micro_batches=micro_batches)
    assert_equal(run(params, ref, packed_batch(1, micro_batches), cfg=cfg, model_cfg=own_cfg), want)


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [("dense", 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("dense", 1), ("moe", 2)))],
)
def test_packed_on_eight_devices_equals_unpacked_on_one(model_cfg, make_cfg, kind, micro_batches):
    want = unpacked(kind, model_cfg, settings(make_cfg))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tp": 2})
    own_cfg, params, ref = model_of(kind, model_cfg)
    cfg = settings(make_cfg, micro_batches=micro_batches)
    assert sharding.own_shards(mesh) == [0, 1, 2, 3]
    b = sharding.put_rows(packed_batch(4, micro_batches), mesh)
    where, rows = model.param_shardings(own_cfg, mesh), sharding.rows(mesh)
    many = jax.jit(
        functools.partial(everything, cfg=cfg, model_cfg=own_cfg, compute=model.Compute(mesh=mesh)),
        in_shardings=(where, where, rows),
        out_shardings=(rows, sharding.replicated(mesh), where, rows),
    )
    assert_equal(many(params, ref, b), want)


# --- what the comparison sees
# -------------------------------------------------------------------------------------------


def one_late(hidden_RLD, at_ZX):
    return step._gather(hidden_RLD, at_ZX)


SABOTAGE = {
    "no segments": lambda p: p.replace(segment_RL=np.ones_like(p.segment_RL)),
    "a segment too long": lambda p: p.replace(segment_RL=np.roll(p.segment_RL, 1, axis=1)),
    "starts shifted": lambda p: p.replace(place_ZX=p.place_ZX + 1),
    "weights of the next token": lambda p: p.replace(time_ZX=np.maximum(p.time_ZX - 1, 0)),
    "stats given back elsewhere": lambda p: p.replace(first_B=p.first_B + 1),
    "another response's weights": lambda p: p.replace(owner_ZX=np.where(p.owner_ZX < 0, -1, (p.owner_ZX + 1) % B)),
}


@pytest.mark.parametrize("how", SABOTAGE)
def test_a_wrong_layout_is_seen(model_cfg, make_cfg, how):
    want = unpacked("dense", model_cfg, settings(make_cfg))
    _, params, ref = model_of("dense", model_cfg)
    b = packed_batch(1, 1)
    wrong = b.replace(packed=SABOTAGE[how](b.packed))
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(wrong), jax.tree.leaves(b)))
    with pytest.raises(AssertionError):
        assert_equal(run(params, ref, wrong, cfg=settings(make_cfg), model_cfg=model_cfg), want)


@pytest.mark.parametrize("late", [False, True])
def test_a_shifted_index_is_seen(model_cfg, make_cfg, monkeypatch, late):
    """The states one place later: scoring alone, since the update takes them by the same function."""
    want, (_, params, _) = unpacked("dense", model_cfg, settings(make_cfg))[0], model_of("dense", model_cfg)
    b, real = packed_batch(1, 1), np.arange(T)[None] < batch().length_B[:, None]
    if late:
        monkeypatch.setattr(step, "response_hidden", one_late)
    how = {"T": T, "model_cfg": model_cfg, "block": 8, "micro_batches": 1}
    got = jax.jit(functools.partial(step.score, **how))(params, b.packed, b.prompt_length_B)
    for name in ("logp_BT", "entropy_BT"):
        gap = np.abs(np.asarray(getattr(got, name)) - getattr(want, name))[real].max()
        assert gap > 0.3 if late else gap < 2e-5, name


# --- splash
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_splash_with_packed_rows_equals_xla(model_cfg, make_cfg):
    want = unpacked("dense", model_cfg, settings(make_cfg))
    own_cfg, params, ref = model_of("dense", model_cfg)
    how = {"cfg": settings(make_cfg), "model_cfg": own_cfg, "compute": model.Compute(attention="splash_interpret")}
    assert_equal(run(params, ref, packed_batch(1, 1), **how), want, 2e-5)


# --- the packer
# -----------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """(prompt lengths, response lengths, most, shards, micro-batches)."""
    shards, micro_batches = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = shards * micro_batches * draw(st.integers(1, 6))
    lengths = st.lists(st.integers(0, 40), min_size=count, max_size=count)
    prompt, response = draw(lengths), draw(lengths)
    longest = max(p + r for p, r in zip(prompt, response))
    return prompt, response, draw(st.integers(max(longest, 1), 300)), shards, micro_batches


@given(cases())
def test_every_response_lies_in_one_place_and_no_row_is_over_its_width(case):
    prompt, response, most, shards, n = case
    count = len(prompt)
    rows = [[1000 * b + i + 1 for i in range(p + r)] for b, (p, r) in enumerate(zip(prompt, response))]
    how = {"most": most, "shards": list(range(shards)), "micro_batches": n}
    packed = packing.make(rows, prompt, **how)
    again = packing.make(rows, prompt, **how)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(again)))

    (R, W), (Z, X) = packed.token_RL.shape, packed.owner_ZX.shape
    assert shards * n == Z and R % Z == 0
    assert max(R - count, W - most, X - R // Z * W) <= 0
    # a row holds whole responses, once each, counted from 0; no two share a segment
    found = []
    for token, segment, position in zip(packed.token_RL, packed.segment_RL, packed.position_RL):
        for k in range(1, segment.max(initial=0) + 1):
            (at,) = np.nonzero(segment == k)
            b = (token[at[0]] - 1) // 1000
            assert token[at].tolist() == rows[b]
            assert position[at].tolist() == list(range(len(at)))
            found.append(b)
        assert not token[segment == 0].any() and (segment[: (segment > 0).sum()] > 0).all()
    assert sorted(found) == [b for b in range(count) if rows[b]]

    # every response position once, and its place is that of its token
    token_ZL = step._split(packed.token_RL, n).reshape(n, shards, -1).swapaxes(0, 1).reshape(Z, -1)
    seen = []
    for z, x in zip(*np.nonzero(packed.owner_ZX >= 0)):
        b, t = packed.owner_ZX[z, x], packed.time_ZX[z, x]
        assert token_ZL[z, packed.place_ZX[z, x]] == rows[b][prompt[b] + t]
        assert packed.first_B[b] + t == z * X + x
        seen.append((b, t))
    assert sorted(seen) == [(b, t) for b in range(count) for t in range(response[b])]


def test_a_process_speaks_of_the_global_batch():
    """Two processes with shards (0, 2) and (1, 3): rows and positions are counted over both."""
    b, n = batch(), 2
    own = {0: [0, 2], 1: [1, 3]}
    share, rows, length = B // 4, rows_of(b), b.prompt_length_B + b.length_B
    at = {r: np.concatenate([np.arange(s * share, (s + 1) * share) for s in own[r]]) for r in own}
    plans = {r: packing.make_plan(length[at[r]], b.length_B[at[r]], MOST, 2 * n) for r in own}
    count, X = (max(getattr(p, name) for p in plans.values()) for name in ("rows", "positions"))
    plans = {r: dataclasses.replace(p, rows=count, positions=X) for r, p in plans.items()}  # what they agree on
    parts = {
        r: packing.fill(plans[r], [rows[i] for i in at[r]], b.prompt_length_B[at[r]], MOST, own[r], n) for r in own
    }
    owner, time = (np.zeros((4 * n, X), int) for _ in range(2))
    for r, p in parts.items():
        assert set(p.owner_ZX.ravel()) - {-1} == {i for i in at[r] if b.length_B[i]}
        for local, shard in enumerate(own[r]):
            owner[shard * n : shard * n + n] = p.owner_ZX[local * n : local * n + n]
            time[shard * n : shard * n + n] = p.time_ZX[local * n : local * n + n]
    for r, p in parts.items():
        for k, i in enumerate(at[r]):
            for t in range(b.length_B[i]):
                place = divmod(p.first_B[k] + t, X)
                assert (owner[place], time[place]) == (i, t)
                assert place[0] // n in own[r]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(30, 90))
def test_first_fit_wastes_at_most_half(lengths, width):
    bins = packing.first_fit(lengths, width)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert max(loads) <= width
    assert len(bins) <= max(1, 2 * sum(lengths) / width + 1)  # two rows never fit into one


def test_what_goes_out_comes_back():
    """`pack_values` and `unpack_values` are inverse on real tokens, whatever the shards and micro-batches."""
    values_BT = np.random.default_rng(0).normal(size=(2, B, T)).astype(np.float32)
    real, mesh = np.arange(T)[None] < batch().length_B[:, None], sharding.default_mesh()
    for shards, n in ((1, 1), (1, 4), (4, 2)):
        packed = jax.tree.map(jnp.asarray, packed_batch(shards, n).packed)
        values_ZX = packing.pack_values(packed, list(map(jnp.asarray, values_BT)), mesh)
        back_BT = packing.unpack_values(packed, values_ZX, T, mesh)
        for a_BT, a_ZX, again_BT in zip(values_BT, values_ZX, back_BT, strict=True):
            np.testing.assert_array_equal(np.asarray(again_BT)[real], a_BT[real])
            assert float(np.abs(a_ZX).sum()) == pytest.approx(np.abs(a_BT[real]).sum(), rel=1e-5)


def test_rows_are_full_and_shapes_few():
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(20):
        length = np.minimum(7168, rng.lognormal(6.5, 0.8, 256).astype(int) + 1) + 120
        length[0] = 7288  # one that was cut is nearly always among them
        width, rows = packing.choose_width(length, 16384, 8)
        shapes.add((width, rows))
        assert width * rows * 8 <= 1.2 * length.sum()
    assert len(shapes) <= 5
    assert packing.choose_width(np.array([20, 20, 9, 8]), 8192, 1) == (32, 2)
    assert packing.choose_width(np.array([20, 20, 20, 8]), 8192, 1) == (80, 1)
    with pytest.raises(ValueError, match="does not fit a packed row of 16"):
        packing.choose_width(np.array([20, 20]), 16, 1)


# --- settings
# -------------------------------------------------------------------------------------------------------------


def test_cudnn_with_packing_is_refused_before_anything_loads(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"cudnn takes right-padded rows only.*model\.attention=xla, or packing\.length=0"
    ):
        attention.resolve("cudnn", "bfloat16", packed=True)
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="cudnn"):
        attention.resolve("auto", "bfloat16", packed=True)
    assert attention.resolve("auto", "float32", packed=True) == "xla"
    monkeypatch.undo()
    c = tiny.recipe(tmp_path / "no student", tmp_path / "no teacher", tmp_path / "run")
    c.update_from_flattened_dict({"packing.length": 512, "model.attention": "cudnn", "compute_dtype": "bfloat16"})
    monkeypatch.setattr(hf, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr(teachers, "make", lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(UserError, match="packing.length=0"):
        train.train(c)


def test_a_row_too_short_for_the_longest_response_is_refused():
    c = config.default()
    c.packing.length = c.max_prompt_length + c.max_completion_length - 1
    with pytest.raises(UserError, match=r"packing\.length = 8191.*at least.*8192, or 0"):
        validation.validate(c)


@pytest.mark.slow
def test_a_packed_run_takes_the_steps_of_an_unpacked_one(tmp_path, monkeypatch):
    """Two whole runs: the first step's figures to rounding, and fewer padded tokens."""
    real = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: real(sizes, jax.devices()[:1]))
    models = tiny.make_folders(tmp_path / "models")
    more = {"prompts_per_step": 8, "num_generations": 1, "checkpoint.every": 9}
    plain = tiny.recipe(*models, tmp_path / "plain", **more)
    packed = tiny.recipe(*models, tmp_path / "packed", **more, **{"packing.length": 384, "micro_batches": 2})
    for c in (plain, packed):
        train.train(c)
    rows = [tiny.lines(f"{c.run_dir}/metrics.jsonl") for c in (plain, packed)]
    for name in ("loss", "grad_norm", "entropy", "audit/k_sem_mean", "audit/pi_hat_mean", "audit/entropy_at_peak"):
        assert rows[1][0][name] == pytest.approx(rows[0][0][name], rel=1e-5), name
        assert rows[1][1][name] == pytest.approx(rows[0][1][name], rel=1e-3), name
    assert all(0 < b["perf/padding_fraction"] < a["perf/padding_fraction"] < 1 for a, b in zip(*rows))
    assert all(b["score/update_logp_gap"] < 1e-4 and b["rollout/score_logp_gap"] < 1e-4 for b in rows[1])
