"""On a real GPU (`make test-gpu`): cuDNN's kernels against xla's, and every pass against the same on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import T, make_batch, weights

from omniopd_jax import model, rollout, step
from omniopd_jax.model import attention

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.fail("no GPU answers: run on a machine with one, JAX_PLATFORMS=cuda,cpu")
    with jax.default_matmul_precision("highest"):  # as cli.setup_jax sets it for float32
        yield


def relative(ours, want) -> float:
    ours, want = (np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(t)]) for t in (ours, want))
    return float(np.linalg.norm(ours - want) / np.linalg.norm(want))


@pytest.mark.parametrize(("L", "Q", "K", "H"), [(256, 16, 8, 128), (200, 4, 1, 64), (77, 4, 4, 32)])
def test_cudnn_equals_xla_forward_and_gradient(L, Q, K, H):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (2, L, n, H), jnp.bfloat16) for key, n in zip(keys, (Q, K, K, Q)))

    @functools.partial(jax.jit, static_argnames="backend")
    def run(q, k, v, g, backend):
        out, back = jax.vjp(functools.partial(attention.attend, backend=backend), q, k, v)
        return out, back(g)

    want = run(*(a.astype(jnp.float32) for a in (q, k, v, g)), backend="xla")
    ours = run(q, k, v, g, backend="cudnn")
    assert relative(ours[0], want[0]) < 0.01
    for a, b in zip(ours[1], want[1]):
        assert relative(a, b) < 0.01


def test_cudnn_with_lengths_leaves_real_tokens_as_they_are():
    q, k, v = (jax.random.normal(key, (2, 128, 4, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    whole = attention.attend(q, k, v, backend="cudnn")
    cut = attention.attend(q, k, v, length_B=jnp.array([128, 50]), backend="cudnn")
    assert relative(cut[0], whole[0]) < 1e-2 and relative(cut[1, :50], whole[1, :50]) < 1e-2
    assert not np.asarray(cut[1, 50:]).any()


@pytest.mark.parametrize(("remat", "kernels"), [("none", 1), ("dots", 1), ("context", 1), ("full", 2)])
def test_the_backward_pass_does_not_run_the_forward_kernel_again(remat, kernels):
    cfg = model.ModelConfig("qwen3", 512, 128, 256, 2, 4, 2, 64, qk_norm=True)
    compute = model.Compute("bfloat16", remat, "cudnn")
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), cfg)
    token = jnp.zeros((2, 128), jnp.int32)

    def total(params):
        return model.hidden(params, cfg, token, compute=compute).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total)).lower(params).compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == kernels
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1


@pytest.fixture(scope="module")
def both():
    """A tree's copies on GPU and CPU."""
    return lambda tree: [jax.device_put(tree, jax.devices(name)[0]) for name in ("gpu", "cpu")]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_update_in_float32_is_the_cpus(params, ref_params, model_cfg, make_cfg, both, remat):
    cfg, batch = make_cfg(**{"model.remat": remat, "micro_batches": 2}), make_batch()
    weight_BT, mask_BT = weights(batch, cfg)
    run = jax.jit(
        functools.partial(step.loss_and_grads, model_cfg=model_cfg, cfg=cfg, compute=model.Compute(remat=remat))
    )
    ours, want = (run(*args) for args in both((params, ref_params, batch, weight_BT, mask_BT)))
    assert abs(float(ours[0]) - float(want[0])) < 1e-5 * abs(float(want[0]))
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(want[1])):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-5 * np.linalg.norm(b) + 1e-9


def test_scores_in_float32_are_the_cpus(params, model_cfg, both):
    batch = make_batch()
    run = jax.jit(functools.partial(step.score, T=T, model_cfg=model_cfg, block=8, micro_batches=1))
    ours, want = (run(*args) for args in both((params, batch.token_BL, batch.prompt_length_B)))
    for b, n in enumerate(np.asarray(batch.length_B)):
        for name in ("logp_BT", "entropy_BT"):
            np.testing.assert_allclose(getattr(ours, name)[b, :n], getattr(want, name)[b, :n], atol=2e-5)


def test_sampling_in_float32_draws_the_cpus_tokens(params, model_cfg, both):
    prompt = np.random.default_rng(0).integers(1, 38, (4, 16)).astype(np.int32)
    length, keys = np.array([16, 3, 9, 12], np.int32), rollout.row_keys(jax.random.key(5), np.arange(8))
    outs = [
        rollout.sample(p, model_cfg, a, b, k, max_new_tokens=24, num_samples=2)
        for p, a, b, k in both((params, prompt, length, keys))
    ]
    np.testing.assert_array_equal(*(np.asarray(o.token_BT) for o in outs))
    np.testing.assert_allclose(*(np.asarray(o.logp_model_BT) for o in outs), atol=2e-5)
