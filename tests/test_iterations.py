"""Several updates a batch (`num_iterations`): GRPO's clipped surrogate, update by update, and a resume between
batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from omniopd_jax import config, graders, model, objective, optim, step, train
from omniopd_jax.errors import UserError
from omniopd_jax.graders import small_world
from omniopd_jax.parallel import sharding
from omniopd_jax.run import checkpoint, validation

B, P, T = 8, 5, 7
LENGTH = np.array([7, 5, 1, 7, 6, 0, 3, 4])
PROMPT = np.array([5, 2, 3, 1, 4, 5, 2, 3])
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5, 1.5, 2.0, -1.5, 0.0])
EPS = 0.2


@pytest.fixture(scope="module")
def batch() -> objective.Batch:
    """Rows with unequal prompts and responses, one of them empty; no chunks, rewards' advantages given."""
    i32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    token = np.random.default_rng(5).integers(1, 38, (B, P + T))
    none = np.zeros((B, 1))
    return objective.Batch(
        i32(token), i32(PROMPT), i32(LENGTH), i32(none - 1), jnp.asarray(none, jnp.float32), i32(none),
        advantage_B=jnp.asarray(ADVANTAGE, jnp.float32),
    )  # fmt: skip


def settings(make_cfg, iterations: int):
    return make_cfg(
        **{
            "objective.name": "grpo",
            "anchor.kl_coef": 0.0,
            "num_iterations": iterations,
            "num_steps": 4,
            "audit.num_chunks": 1,
            "objective.clip": EPS,
            "optimizer.learning_rate": 0.02,
            "optimizer.schedule": "linear",
        }
    )


def by_hand(params, model_cfg, batch, cfg):
    """(params, losses' clipped shares): autodiff of -mean min(r A, clip(r) A) on whole [B, L, V] logits, AdamW by
    optax."""
    place = PROMPT[:, None] + np.arange(T)[None]
    real = jnp.asarray(np.arange(T)[None] < LENGTH[:, None], jnp.float32)
    token = np.asarray(batch.token_BL)
    target = jnp.asarray(np.take_along_axis(token, np.minimum(place, P + T - 1), axis=1))
    A = jnp.asarray(ADVANTAGE, jnp.float32)[:, None]

    def logp(params):
        logits = model.logits(params, model_cfg, model.hidden(params, model_cfg, batch.token_BL))
        own = jax.nn.log_softmax(logits)[jnp.arange(B)[:, None], np.minimum(place - 1, P + T - 1)]
        return jnp.take_along_axis(own, target[..., None], axis=-1)[..., 0]

    old = jax.jit(logp)(params)

    def loss(params):
        ratio = jnp.exp(logp(params) - old)
        surrogate = jnp.minimum(ratio * A, jnp.clip(ratio, 1 - EPS, 1 + EPS) * A)
        out = jnp.where(A > 0, ratio > 1 + EPS, ratio < 1 - EPS) & (A != 0)  # of 0 there is nothing to clip
        return -(surrogate * real).sum() / (B * cfg.max_completion_length), (out * real).sum() / real.sum()

    optimizer, shares = optim.make_optimizer(cfg), []

    @jax.jit
    def update(params, opt_state):
        grads, share = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, share

    opt_state = jax.jit(optimizer.init)(params)
    for _ in range(cfg.num_iterations):
        params, opt_state, share = update(params, opt_state)
        shares.append(float(share))
    return params, shares


def take(params, model_cfg, batch, cfg):
    """(state, metrics) of the project's step."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tp": 1}, jax.devices()[:1])
    steps = step.make_steps(model_cfg, cfg, compute=model.Compute(mesh=mesh))
    state = step.create_state(jax.tree.map(jnp.copy, params), cfg, steps, jax.random.key(0))
    stats = steps.score_step(state.params, batch.token_BL, batch.prompt_length_B, T)
    return steps.train_step(state, params, batch, stats, None)[:2]


def test_three_updates_follow_the_clipped_surrogate(params, model_cfg, batch, make_cfg):
    cfg = settings(make_cfg, 3)
    want, shares = by_hand(params, model_cfg, batch, cfg)
    assert shares[0] == 0 and 0.05 < shares[-1] < 0.95, "the clip must act on some tokens and not on all"
    state, metrics = take(params, model_cfg, batch, cfg)
    for got, ref, start in zip(*map(jax.tree.leaves, (state.params, want, params)), strict=True):
        moved = np.linalg.norm(ref - start)
        assert np.linalg.norm(got - ref) < 0.01 * moved, (got.shape, moved)
    assert float(metrics["clip_fraction"]) == pytest.approx(np.mean(shares), abs=1e-5)


def test_the_step_counts_batches_and_the_schedule_updates(params, model_cfg, batch, make_cfg):
    """Four batches of three updates: a linear schedule from 0.02 to 0 in twelve."""
    cfg = settings(make_cfg, 3)
    state, metrics = take(params, model_cfg, batch, cfg)
    assert int(state.step) == 1
    counts = {int(a) for a in jax.tree.leaves(state.opt_state) if a.shape == () and a.dtype == jnp.int32}
    assert counts == {3}
    assert float(metrics["learning_rate"]) == pytest.approx(0.02 * (1 - np.arange(3) / 12).mean(), rel=1e-5)


def test_several_updates_are_for_grpo(make_cfg):
    c = config.default()
    c.num_iterations = 2
    with pytest.raises(UserError, match="num_iterations = 2 is for objective.name = 'grpo'"):
        validation.validate(c)


class EvenGrader(small_world.WorldGrader):
    """Right where the text's length is even: about half of what an untrained model writes."""

    def grade(self, text, answer):
        return len(text) % 2 == 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_between_batches(tmp_path, monkeypatch):
    """Stopped after two of four batches, two updates each: the same bits as never stopped."""
    real = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices=None: real(sizes, jax.devices()[:1]))
    monkeypatch.setitem(graders.GRADERS, "even", EvenGrader)
    student, teacher = tiny.make_folders(tmp_path)
    more = {
        "objective.name": "grpo",
        "anchor.kl_coef": 0.0,
        "num_iterations": 2,
        "reward.grader": "even",
        "num_generations": 4,
        "prompts_per_step": 2,
    }
    whole, parts = (tiny.recipe(student, teacher, tmp_path / name, **more) for name in ("whole", "parts"))
    whole.num_steps = 4
    train.train(whole)
    for end in (2, 4):
        parts.num_steps = end
        assert train.train(parts)["step"] == end
    a, b = (checkpoint.restore_params(tmp_path / name)[0] for name in ("whole", "parts"))
    assert tiny.same(a, b)
    rows = [tiny.lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    for key in ("loss", "grad_norm", "reward/mean", "clip_fraction"):
        assert [r[key] for r in rows[0]] == [r[key] for r in rows[1]], key
    assert max(r["grad_norm"] for r in rows[0]) > 0
