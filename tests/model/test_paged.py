"""Pages of the sampler's cache: what is written where, and attention over it by each kernel against plain NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from oracle import last_query

from omniopd_jax.model import paged
from omniopd_jax.parallel import sharding

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.02, "int8": 0.05}
PAGE, WIDTH, K, J, H = 16, 4, 2, 2, 128
LENGTHS = [1, 16, 17, 40, 64, 33]


@pytest.fixture(scope="module")
def case():
    """Random keys and values of six rows, scattered over pages: (q_BQH, k_BSKH, v_BSKH, table_BW)."""
    rng = np.random.default_rng(0)
    B, S = len(LENGTHS), PAGE * WIDTH
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, K * J, H), (B, S, K, H), (B, S, K, H)))
    table = 1 + rng.permutation(B * WIDTH).reshape(B, WIDTH).astype(np.int32)
    return q, k, v, table


def pool_of(case, heads_first: bool) -> paged.Pool:
    """The case's pages as the pool of a device holds them."""
    _, k, v, table = case
    out = []
    for a in (k, v):
        pool = np.full((1 + table.size, K, PAGE, H), 7.0, np.float32)
        pool[table] = a.reshape(len(a), WIDTH, PAGE, K, H).swapaxes(2, 3)
        out.append(jnp.asarray(pool.swapaxes(0, 1) if heads_first else pool))
    return paged.Pool(*out)


def coarse(pool: paged.Pool) -> paged.Pool:
    """The same in int8."""
    (k, k_scale), (v, v_scale) = paged.quantize(pool.k), paged.quantize(pool.v)
    return paged.Pool(k, v, k_scale, v_scale)


def tpu(*args):
    """The TPU kernel in its interpreter."""
    with pltpu.force_tpu_interpret_mode():
        return paged._tpu(*args)


RUNS = {
    "pages first": (False, lambda *a: paged._blocks(*a, axis=0, size=2)),
    "heads first": (True, lambda *a: paged._blocks(*a, axis=1, size=6)),
    "tpu": (True, tpu),
    "gpu": (True, functools.partial(paged._gpu, interpret=True)),
}


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in RUNS for d in TOLERANCE if n != "tpu" or d == "bfloat16"])
def test_attention_reads_what_a_row_holds(case, name, dtype):
    """The kernels of TPUs and GPUs in their interpreters."""
    q, k, v, table = case
    want = last_query(q, k, v, LENGTHS)
    heads_first, run = RUNS[name]
    pool = pool_of(case, heads_first)
    pool = coarse(pool) if dtype == "int8" else jax.tree.map(lambda a: a.astype(dtype), pool)
    q = jnp.asarray(q, "bfloat16" if dtype == "bfloat16" else "float32") * H**-0.5
    got = run(q, pool, jnp.asarray(table), jnp.asarray(LENGTHS, jnp.int32))
    np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_prompts_copies_and_tokens_are_where_the_table_says(shape):
    """Rows of a prompt over a page, one with a copy of its last page, then a token each: on one device and on a mesh,
    where each shard of rows has a pool of its own."""
    sizes = dict(zip(sharding.AXES, shape))
    mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(shape)])
    shards = sharding.row_shards(mesh)
    rng, pages, B = np.random.default_rng(1), 8, 2
    kv = [rng.normal(size=(shards * B, 20, K, H)).astype(np.float32) for _ in "kv"]
    token = [rng.normal(size=(shards * B, 1, n, H)).astype(np.float32) for n in (K * J, K, K)]
    page_BW = np.tile(np.array([[1, 2], [5, 3]], np.int32), (shards, 1))  # within each shard's own pool
    table = np.tile(np.array([[1, 6, 0, 0], [5, 3, 0, 0]], np.int32), (shards, 1))  # row 0 goes on in a copy
    put = functools.partial(sharding.put_rows, mesh=mesh)

    @jax.jit
    def run(k, v, page_BW, table_BW, length_B, q1, k1, v1, from_X, to_X):
        pool = paged.empty(mesh, K, shards * pages, PAGE, H, "float32")
        pool = paged.write_prompts(pool, k, v, page_BW, mesh)
        pool = paged.copy_pages(pool, from_X, to_X, mesh)
        return paged.append_and_attend(q1, k1, v1, pool, paged.Where(table_BW, length_B), mesh)

    moves = (np.array([2] * shards, np.int32), np.array([6] * shards, np.int32))
    lengths = np.full(shards * B, 20, np.int32)
    out, pool = run(*put(kv), *put((page_BW, table, lengths)), *put(token), *put(moves))
    whole = [np.concatenate([a, b], axis=1) for a, b in zip(kv, token[1:])]
    want = last_query(token[0][:, 0], *whole, [21] * (shards * B))
    np.testing.assert_allclose(sharding.local_rows(out)[:, 0], want, atol=2e-5)
    held = sharding.local_rows(pool.k).reshape(shards, pages, K, PAGE, H)
    np.testing.assert_array_equal(held[:, 2, :, :4], held[:, 6, :, :4])
    assert not held[:, 2, :, 4:].any() and held[:, 6, :, 4].any()  # the prompt's own page is as it was
    assert not held[:, [4, 7]].any()


def test_int8_is_within_half_a_step():
    a = np.random.default_rng(2).normal(size=(3, 5, 64)).astype(np.float32) * 10.0 ** np.arange(-2, 3)[:, None]
    a[0, 0] = 0
    value, scale = paged.quantize(jnp.asarray(a))
    assert value.dtype == jnp.int8 and scale.shape == (3, 5, 1)
    assert (np.abs(np.asarray(value) * np.asarray(scale) - a) <= np.asarray(scale) / 2 * 1.0001).all()
