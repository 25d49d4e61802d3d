"""The shapes that public array functions declare (jaxtyping) are those they take and give; a wrong one is told."""

import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import model, objective, rollout, scheduler, vocab

jaxtyping = pytest.importorskip("jaxtyping")
beartype = pytest.importorskip("beartype")
NAMES = ("Array", "Bool", "Float", "Int", "Key", "Num")
B, T, V, D = 3, 6, 38, 16


@pytest.fixture
def checked(monkeypatch):
    """checked(function) -> the same, its arguments and result compared with its annotations."""

    def one(function):
        function = inspect.unwrap(function)
        for name in NAMES:  # the package imports them for type checkers only
            monkeypatch.setattr(sys.modules[function.__module__], name, getattr(jaxtyping, name), raising=False)
        return jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)

    return one


def refused(function, *args, **kwargs) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        function(*args, **kwargs)


@pytest.fixture(scope="module")
def arrays():
    key = jax.random.key(0)
    return {
        "hidden": jax.random.normal(key, (B, T, D)),
        "head": jax.random.normal(key, (D, V)),
        "target": jnp.ones((B, T), jnp.int32),
        "weight": jnp.ones((B, T)),
        "length": jnp.array([6, 4, 0]),
    }


def test_peaks(checked, arrays):
    peaks = checked(scheduler.entropy_peaks)
    how = {"num_chunks": 2, "chunk_tokens": 2}
    assert peaks(arrays["weight"], arrays["length"], **how).shape == (B, 2)
    refused(peaks, arrays["weight"], arrays["length"][:2], **how)
    refused(peaks, arrays["weight"], arrays["length"], eligible_BT=jnp.ones((B, T + 1), bool), **how)


def test_targets(checked):
    target, a = checked(objective.smoothed_target), jnp.ones((B, 2))
    assert target(a, jnp.ones((B, 2), jnp.int32), -a, alpha=1.0).shape == (B, 2)
    refused(target, a, a[:1], -a, alpha=1.0)


def test_the_vocabulary_pass(checked, arrays):
    stats, loss = map(checked, (vocab.token_stats, vocab.weighted_nll_and_kl))
    h, head, y, w = (arrays[k] for k in ("hidden", "head", "target", "weight"))
    assert stats(h, head, y, block=4).entropy_BT.shape == (B, T)
    assert np.isfinite(loss(h, model.Head(head), h, head, y, w, w, beta=0.1, block=4)[0])
    wide = jnp.concatenate([h, h], axis=-1)
    other = vocab.Other(wide, jnp.concatenate([head, head]), w, "reverse")
    assert np.isfinite(loss(h, head, h, head, y, w, w, beta=0.1, block=4, other=other)[0])
    refused(stats, h, head.T, y, block=4)
    refused(stats, h, head, w, block=4)
    refused(loss, h, head, h, head, y, w, w[:, 1:], beta=0.1, block=4)


def test_the_model_and_the_sampler(checked, model_cfg, params):
    hidden, logits, sample = map(checked, (model.hidden, model.logits, rollout.sample))
    token = jnp.ones((B, T), jnp.int32)
    out = jax.eval_shape(lambda p: logits(p, model_cfg, hidden(p, model_cfg, token)), params)
    assert out.shape == (B, T, V)
    refused(hidden, params, model_cfg, token.astype(jnp.float32))
    refused(hidden, params, model_cfg, token, position_BL=token[:, 1:])
    keys = jax.random.split(jax.random.key(1), B)
    refused(sample, params, model_cfg, token, jnp.ones(B + 1, jnp.int32), keys, max_new_tokens=2)
    refused(sample, params, model_cfg, token, jnp.ones(B, jnp.int32), jnp.ones(B), max_new_tokens=2)
