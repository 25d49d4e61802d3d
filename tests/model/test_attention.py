"""Kernels against the xla reference: splash (its Pallas kernel, interpreted here) and what cudnn refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import model
from omniopd_jax.errors import UserError
from omniopd_jax.model import attention
from omniopd_jax.parallel import sharding

LENGTH = 130  # not a multiple of the kernel's 128 lanes
SEGMENTS = {
    "whole": None,
    "mixed": np.repeat([[1, 2, 3], [0, 1, 1], [1, 1, 0]], [40, 50, 40], axis=1),  # packed, left- and right-padded rows
}


def qkvg(B=2, L=LENGTH, Q=4, K=2, H=16, dtype=jnp.float32):
    """q (larger, so that the softmax is sharp), k, v and a cotangent of the output."""
    shapes = ((B, L, Q, H), (B, L, K, H), (B, L, K, H), (B, L, Q, H))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes))
    return 3 * q, k, v, g


def value_and_grads(q, k, v, g, segment, **kwargs):
    def run(q, k, v):
        out = attention.attend(q, k, v, segment_BL=segment, **kwargs)
        return (out * g).sum(), out

    grads, out = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return {"out": out, **dict(zip(("dq", "dk", "dv"), grads))}


def assert_same(ours, reference, tolerance=2e-6):
    for name, want in reference.items():
        gap = np.abs(np.asarray(ours[name], np.float64) - np.asarray(want, np.float64)).max()
        assert gap <= tolerance * np.abs(want).max(), f"{name}: {gap}"


@pytest.mark.parametrize("kind", [pytest.param("whole", marks=pytest.mark.slow), "mixed"])
def test_splash_equals_xla_forward_and_gradient(kind):
    segment = SEGMENTS[kind]
    segment = None if segment is None else jnp.asarray(segment, jnp.int32)
    args = qkvg(B=3)
    reference = value_and_grads(*args, segment, backend="xla")
    assert_same(value_and_grads(*args, segment, backend="splash_interpret"), reference)
    if segment is not None:  # the comparison sees segments
        with pytest.raises(AssertionError):
            assert_same(value_and_grads(*args, None, backend="xla"), reference)


@pytest.mark.parametrize(
    "rows", [4, pytest.param(3, marks=pytest.mark.slow)]
)  # 3 rows do not lie over four devices: they are computed on each
def test_splash_over_a_mesh(rows):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tp": 2})
    args = qkvg(B=rows, L=20)
    segment = jnp.asarray(np.repeat([[1, 2]], [9, 11], axis=1).repeat(rows, 0), jnp.int32)
    reference = value_and_grads(*args, segment, backend="xla")
    assert_same(value_and_grads(*args, segment, backend="splash_interpret", mesh=mesh), reference)


@pytest.mark.slow
@pytest.mark.parametrize(("Q", "K"), [(4, 4), (6, 1), (6, 3)])
@pytest.mark.parametrize("L", [128, 513, 700])
def test_splash_of_more_shapes(Q, K, L):
    segment = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, L)), axis=1), jnp.int32)
    args = qkvg(L=L, Q=Q, K=K, H=32)
    reference = value_and_grads(*args, segment, backend="xla")
    assert_same(value_and_grads(*args, segment, backend="splash_interpret"), reference)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "context"])
def test_a_model_with_splash_has_the_gradient_of_xla(params, model_cfg, remat):
    token = jax.random.randint(jax.random.key(3), (2, 9), 0, model_cfg.vocab_size)
    g = jax.random.normal(jax.random.key(4), (2, 9, model_cfg.hidden_size))

    def grads(backend):
        compute = model.Compute(attention=backend, remat=remat)
        return jax.jit(jax.grad(lambda p: (g * model.hidden(p, model_cfg, token, compute=compute)).sum()))(params)

    for want, ours in zip(jax.tree.leaves(grads("xla")), jax.tree.leaves(grads("splash_interpret"))):
        np.testing.assert_allclose(ours, want, atol=2e-5 * float(jnp.abs(want).max()), rtol=0)


def test_segments_equal_rows_of_their_own():
    q, k, v, _ = qkvg(B=1, L=24)
    segment = jnp.asarray(np.repeat([[1, 2]], [10, 14], axis=1), jnp.int32)
    packed = attention.attend(q, k, v, segment_BL=segment, backend="xla")
    for part in (slice(0, 10), slice(10, 24)):
        alone = attention.attend(q[:, part], k[:, part], v[:, part], backend="xla")
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


@pytest.mark.parametrize("L", [7, 150, 600])  # whole; in blocks; in as many as there may be
def test_xla_equals_the_textbook(L):
    """NumPy float64, grouped heads, two segments and padding behind them."""
    q, k, v, _ = qkvg(B=1, L=L, Q=4, K=2, H=4)
    segment = np.repeat([[1, 2, 0]], [L // 3, L // 2, L - L // 3 - L // 2], axis=1).astype(np.int32)
    out = np.zeros(q.shape)
    seen = np.tril(segment[0][:, None] == segment[0][None])
    for n in range(4):
        score = np.asarray(q, np.float64)[0, :, n] @ np.asarray(k, np.float64)[0, :, n // 2].T / 2.0
        p = np.where(seen, np.exp(score - score.max(-1, keepdims=True)), 0)
        out[0, :, n] = p / p.sum(-1, keepdims=True) @ np.asarray(v, np.float64)[0, :, n // 2]
    got = jax.jit(functools.partial(attention.attend, backend="xla"))(q, k, v, segment_BL=segment)
    np.testing.assert_allclose(got, out, atol=1e-5)


def test_cudnn_refuses_segments_and_float32():
    q, k, v, _ = qkvg(L=8)
    with pytest.raises(UserError, match=r"model\.attention = cudnn.*segments"):
        attention.attend(q, k, v, segment_BL=jnp.ones((2, 8), jnp.int32), backend="cudnn")
    with pytest.raises(UserError, match="no float32 kernel"):
        attention.resolve("cudnn", "float32")
    assert attention.resolve("cudnn", "bfloat16") == "cudnn"


def test_cudnn_is_asked_for_with_lengths_and_never_replaced(monkeypatch):
    asked = {}

    def fake(q, k, v, **kwargs):
        asked.update(kwargs)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    q, k, v, _ = qkvg(L=8, dtype=jnp.bfloat16)
    attention.attend(q, k, v, length_B=jnp.array([8, 5]), backend="cudnn")
    assert asked["implementation"] == "cudnn" and asked["is_causal"] and asked["scale"] == 0.25
    np.testing.assert_array_equal(asked["key_value_seq_lengths"], [8, 5])


def test_a_kernel_is_chosen_for_the_devices_and_refused_on_others():
    chosen = {on: attention.resolve("auto", "bfloat16", on=on) for on in ("tpu", "gpu", "cpu")}
    assert chosen == {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
    for name, on in (("splash", "gpu"), ("cudnn", "tpu")):
        with pytest.raises(UserError, match=f"{name} has no kernel for a {on}.*auto"):
            attention.resolve(name, "bfloat16", on=on)
    assert attention.resolve("xla", "bfloat16", on="gpu") == "xla"
    assert attention.resolve("auto", "bfloat16", on="gpu", head_dim=256) == "xla"  # Gemma 3, Qwen3.5
    assert attention.resolve("auto", "bfloat16", on="gpu", head_dim=128) == "cudnn"


def test_odd_rows_are_padded_for_cudnn(monkeypatch):
    def fake(q, k, v, *, implementation, **kwargs):
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        return plain(q, k, v, **kwargs)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    q, k, v, _ = qkvg(L=7)
    ours = attention.attend(q, k, v, backend="cudnn")
    np.testing.assert_allclose(ours, attention.attend(q, k, v, backend="xla"), atol=1e-5)


def test_auto_is_xla_here_and_an_unresolved_name_is_an_error():
    assert attention.resolve("auto") == "xla"
    q, k, v, _ = qkvg(L=4)
    with pytest.raises(ValueError, match="auto"):
        attention.attend(q, k, v, backend="auto")
