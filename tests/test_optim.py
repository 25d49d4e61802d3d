"""Schedules by their formula, clipping and AdamW against one step in NumPy, weight decay on matrices alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omniopd_jax import optim


def rates(make_cfg, count, **overrides):
    cfg = make_cfg(**{"num_steps": 10, "optimizer.learning_rate": 0.5} | overrides)
    schedule = optim.make_schedule(cfg)
    return [float(schedule(i)) for i in range(count)]


def test_constant(make_cfg):
    assert rates(make_cfg, 12) == [0.5] * 12


def test_linear_and_cosine_end_at_zero(make_cfg):
    got = rates(make_cfg, 12, **{"optimizer.schedule": "linear"})
    np.testing.assert_allclose(got, [0.5 * max(0, 1 - i / 10) for i in range(12)], atol=1e-7)
    got = rates(make_cfg, 12, **{"optimizer.schedule": "cosine"})
    np.testing.assert_allclose(got, [0.25 * (1 + np.cos(np.pi * min(i, 10) / 10)) for i in range(12)], atol=1e-7)


def test_warm_up_stay_and_decay_to_a_floor(make_cfg):
    how = {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 2, "optimizer.min_learning_rate": 0.1}
    got = rates(make_cfg, 13, **how | {"optimizer.decay_steps": 4})
    down = [0.5 - 0.1 * i for i in range(5)]
    np.testing.assert_allclose(got, [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, *down, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rates(make_cfg, 11, **how), [0.25, *[0.5] * 9, 0.1], rtol=1e-6)  # a tenth of 8, up
    for schedule, middle in (("linear", 0.3), ("cosine", 0.3)):
        got = rates(make_cfg, 12, **{"optimizer.schedule": schedule, "optimizer.min_learning_rate": 0.1})
        np.testing.assert_allclose([got[0], got[5], got[10], got[11]], [0.5, middle, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [1, 4])
def test_warm_up_rises_evenly_and_the_first_update_moves(make_cfg, schedule, warmup):
    got = rates(make_cfg, 11, **{"optimizer.schedule": schedule, "optimizer.warmup_steps": warmup})
    rising = [0.5 * min(1, (i + 1) / warmup) for i in range(warmup + 1)]
    np.testing.assert_allclose(got[: warmup + 1], rising, rtol=1e-6)
    after = np.arange(10 - warmup + 1) / (10 - warmup)
    want = {"constant": 0 * after + 0.5, "linear": 0.5 * (1 - after), "cosine": 0.25 * (1 + np.cos(np.pi * after))}
    np.testing.assert_allclose(got[warmup:], want[schedule], atol=1e-7)


def test_one_clipped_adamw_step(make_cfg):
    cfg = make_cfg(**{
        "optimizer.learning_rate": 0.1, "optimizer.max_grad_norm": 1.0, "optimizer.weight_decay": 0.3,
        "optimizer.b1": 0.8, "optimizer.b2": 0.9, "optimizer.eps": 0.5,
    })  # fmt: skip
    params = {"embed": jnp.array([[2.0, -1.0]]), "final_norm": jnp.array([1.5])}
    grads = {"embed": jnp.array([[3.0, 0.0]]), "final_norm": jnp.array([4.0])}  # global norm 5
    optimizer = optim.make_optimizer(cfg)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    got = optax.apply_updates(params, updates)
    # the first step's bias-corrected moments are the (clipped) gradient and its square
    np.testing.assert_allclose(got["embed"][0, 0], 2.0 - 0.1 * (0.6 / (0.6 + 0.5) + 0.3 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(got["embed"][0, 1], -1.0 - 0.1 * (0.0 + 0.3 * -1.0), rtol=1e-5)
    np.testing.assert_allclose(got["final_norm"][0], 1.5 - 0.1 * 0.8 / (0.8 + 0.5), rtol=1e-5)  # no decay


def adamw_in_numpy(params, grads, mu_dtype, o):
    """AdamW in float64, the first moment rounded to `mu_dtype` between updates: (parameters, first moment)."""
    p, mu, nu = params.astype(np.float64), np.zeros_like(params, np.float64), np.zeros_like(params, np.float64)
    for t, g in enumerate(grads.astype(np.float64), 1):
        mu, nu = o.b1 * mu + (1 - o.b1) * g, o.b2 * nu + (1 - o.b2) * g * g
        p = p - o.learning_rate * (mu / (1 - o.b1**t) / (np.sqrt(nu / (1 - o.b2**t)) + o.eps) + o.weight_decay * p)
        mu = mu.astype(mu_dtype).astype(np.float64)
    return p, mu


def test_a_bfloat16_first_moment(make_cfg):
    """Against NumPy; the second moment stays float32, and no more than the moment's own rounding reaches the
    parameters."""
    rng, o = np.random.default_rng(0), {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    start, grads = rng.normal(size=200), rng.normal(size=(6, 200))
    moved = {}
    for dtype in ("float32", "bfloat16"):
        cfg = make_cfg(**{f"optimizer.{k}": v for k, v in o.items()} | {
            "optimizer.max_grad_norm": 0.0, "optimizer.mu_dtype": dtype
        })  # fmt: skip
        optimizer = optim.make_optimizer(cfg)
        params = {"embed": jnp.asarray(start, jnp.float32)}
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update({"embed": jnp.asarray(g, jnp.float32)}, state, params)
            params = optax.apply_updates(params, updates)
        adam = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
        assert adam.mu["embed"].dtype == dtype and adam.nu["embed"].dtype == params["embed"].dtype == jnp.float32
        want, mu = adamw_in_numpy(start, grads, jnp.dtype(dtype), cfg.optimizer)
        ulp = 2.0**-8 if dtype == "bfloat16" else 1e-6  # half of bfloat16's last place, relative
        scale = np.abs(grads).max()  # what a moment is a mean of
        np.testing.assert_allclose(adam.mu["embed"].astype(jnp.float32), mu, atol=2 * ulp * scale)
        np.testing.assert_allclose(params["embed"], want, atol=12 * ulp * o["learning_rate"])
        moved[dtype] = np.asarray(params["embed"])
    assert np.abs(moved["bfloat16"] - moved["float32"]).max() > 1e-5


def test_clipping_only_shortens_and_can_be_off(make_cfg):
    params = {"embed": jnp.zeros(1)}

    def moved(gradient, max_norm):
        cfg = make_cfg(**{
            "optimizer.learning_rate": 1.0, "optimizer.max_grad_norm": max_norm, "optimizer.eps": 1.0
        })  # fmt: skip
        optimizer = optim.make_optimizer(cfg)
        return -float(optimizer.update({"embed": jnp.array([gradient])}, optimizer.init(params), params)[0]["embed"][0])

    assert moved(8.0, 2.0) == pytest.approx(2 / 3, rel=1e-5)
    assert moved(0.5, 2.0) == pytest.approx(0.5 / 1.5, rel=1e-5)
    assert moved(8.0, 0.0) == pytest.approx(8 / 9, rel=1e-5)


def test_decay_is_for_matrices(params):
    flags = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(optim.decayed(params))}
    assert {k for k, v in flags.items() if not v} == {
        "['final_norm']", *(f"['layers']['{n}']" for n in ("attn_norm", "mlp_norm", "q_norm", "k_norm"))
    }  # fmt: skip
    assert optim.decayed({"layers": {"q": 0, "q_bias": 0, "o_bias": 0}}) == {
        "layers": {"q": True, "q_bias": False, "o_bias": False}
    }
