"""The sampler's ring of a sliding window: prompts of any length, then tokens, against plain NumPy."""

import functools
import math

import jax
import numpy as np
import pytest
from oracle import last_query

from omniopd_jax.model import window
from omniopd_jax.parallel import sharding

P, K, J, H = 12, 2, 2, 4


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
@pytest.mark.parametrize("size", [5, 32])
def test_a_ring_has_the_last_positions(shape, size):
    """Prompts shorter than the window, as long and longer, padded with what must not be read; seven tokens each. In
    the larger ring nothing is overwritten."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)), jax.devices()[: math.prod(shape)])
    rng, length = np.random.default_rng(0), np.array([1, 4, 5, 6, 12, 3, 9, 2], np.int32)
    B, new = len(length), 7
    kv = [rng.normal(size=(B, P, K, H)).astype(np.float32) for _ in "kv"]
    token = [rng.normal(size=(new, B, 1, n, H)).astype(np.float32) for n in (K * J, K, K)]
    put = functools.partial(sharding.put_rows, mesh=mesh)

    @jax.jit
    def run(k, v, length_B, tokens):
        ring, out = window.of_prompts(k, v, length_B, size), []
        for t, (q1, k1, v1) in enumerate(tokens):
            one, ring = window.append_and_attend(q1, k1, v1, ring, length_B + t, mesh, scale=None)
            out.append(one)
        return out

    got = run(*put(kv), put(length), [put(one) for one in zip(*token)])
    whole = [np.zeros((B, P + new, K, H), np.float32) for _ in "kv"]
    for held, prompt, added in zip(whole, kv, token[1:]):
        for b, n in enumerate(length):
            held[b, :n], held[b, n : n + new] = prompt[b, :n], added[:, b, 0]
    for t in range(new):
        want = last_query(token[0][t][:, 0], *whole, length + t + 1, window=size)
        np.testing.assert_allclose(sharding.local_rows(got[t])[:, 0], want, atol=2e-5)
