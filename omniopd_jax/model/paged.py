"""The sampler's cache: a pool of pages per layer, and attention of one query per row that reads only what a row holds.

A page has room for the keys and values of `page` neighbouring positions of one row. `table_BW` names the pages of each
row, in order; page 0 belongs to nobody: what has no row is written there. On a mesh every shard of rows has a pool of
its own and its rows name pages of that pool alone.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from omniopd_jax.parallel import sharding

CPU_BLOCK = 16  # rows of similar length whose pages are read together, at least; of 64 rows 8 and 32 measured slower
LANES = 128  # head widths of the TPU kernel
TPU_BLOCK, GPU_BLOCK = 512, 128  # positions that a kernel reads at a time; a GPU's shared memory holds no more


@flax.struct.dataclass
class Pool:
    """Keys and values of a layer: [pages, K, page, H], on accelerators [K, pages, page, H] as their kernels take it.

    Of an int8 pool `k_scale`, `v_scale` are float32 with a last axis of 1: a value is its integer times its scale.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


@flax.struct.dataclass
class Where:
    """Which positions each row holds.

    table_BW: int32, the pages of a row. length_B: int32, positions held; the next token is written at this position.
    """

    table_BW: jax.Array
    length_B: jax.Array


def pages_axis(mesh) -> int:
    """The axis of a pool that counts pages."""
    return 0 if sharding.platform(mesh) == "cpu" else 1


def kernel(mesh, head_dim: int, dtype) -> str:
    """tpu or gpu: JAX's paged attention, where it has a kernel for such a pool; else xla: products over gathered pages.

    The TPU's rounds float32 to bfloat16, and of int8 it would read a float32 scale for every value.
    """
    if sharding.platform(mesh) == "tpu":
        return "tpu" if head_dim % LANES == 0 and dtype == jnp.bfloat16 else "xla"
    return "gpu" if sharding.platform(mesh) in ("gpu", "cuda") else "xla"


def spec(mesh, num_kv_heads: int) -> P:
    """How a pool is laid out: pages by shard of rows, heads over tp where they divide."""
    one = heads(mesh, num_kv_heads)
    return P(one, sharding.ROWS) if pages_axis(mesh) else P(sharding.ROWS, one)


def shape(mesh, num_kv_heads: int, pages: int, page: int, head_dim: int) -> tuple[int, ...]:
    """Of `Pool.k`, `pages` over all shards."""
    front = (num_kv_heads, pages) if pages_axis(mesh) else (pages, num_kv_heads)
    return (*front, page, head_dim)


def empty(mesh, num_kv_heads: int, pages: int, page: int, head_dim: int, dtype) -> Pool:
    """A pool of zeros; to be called inside jit."""
    size = shape(mesh, num_kv_heads, pages, page, head_dim)
    layout = spec(mesh, num_kv_heads)

    def zeros(size, dtype):
        return sharding.constrain(jnp.zeros(size, dtype), mesh, *layout)

    scales = [None, None]
    if jnp.dtype(dtype) == jnp.int8:
        scales = [zeros((*size[:-1], 1), jnp.float32) for _ in "kv"]
    return Pool(zeros(size, dtype), zeros(size, dtype), *scales)


def quantize(a):
    """(int8 values, float32 scales [..., 1]) of each head's vector: the largest entry becomes 127."""
    scale = jnp.max(jnp.abs(a.astype(jnp.float32)), axis=-1, keepdims=True) / 127.0
    return jnp.round(a.astype(jnp.float32) / jnp.maximum(scale, 1e-30)).astype(jnp.int8), scale


def write_prompts(pool: Pool, k_BPKH, v_BPKH, page_BW, mesh) -> Pool:
    """Keys and values of whole prompts, position 0 first, into pages [B, P / page]; page 0 swallows what is padding."""
    axis = pages_axis(mesh)

    def put(held, a_BPKH, index_X):
        size, (_, length, K, _) = held.shape[2], a_BPKH.shape
        a = jnp.pad(a_BPKH, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
        a = a.reshape(-1, size, K, a.shape[-1]).transpose((2, 0, 1, 3) if axis else (0, 2, 1, 3))
        return _put(held, index_X, a, axis)

    def run(pool, k, v, page_BW):
        return _updated(pool, k, v, lambda held, a: put(held, a, page_BW.reshape(-1)))

    rows, layout = P(sharding.ROWS), _layout(pool, mesh)
    prompts = P(sharding.ROWS, None, heads(mesh, k_BPKH.shape[2]))
    return split(run, mesh, (layout, prompts, prompts, rows), layout)(pool, k_BPKH, v_BPKH, page_BW)


def copy_pages(pool: Pool, from_X, to_X, mesh) -> Pool:
    """Pages `from_X` of each shard's pool copied to its pages `to_X` (0 to 0: nothing)."""
    axis = pages_axis(mesh)

    def run(pool, from_X, to_X):
        return jax.tree.map(lambda held: _put(held, to_X, jnp.take(held, from_X, axis=axis, mode="clip"), axis), pool)

    rows, layout = P(sharding.ROWS), _layout(pool, mesh)
    return split(run, mesh, (layout, rows, rows), layout)(pool, from_X, to_X)


def _put(held, index_X, pages, axis: int):
    """`pages` into the pool at `index_X`.

    Heads and pages are one axis of the scatter: over the second of two axes the TPU's compiler copies the pool.
    """
    if not axis:
        return held.at[index_X].set(pages)
    K, N = held.shape[:2]
    place = (jnp.arange(K, dtype=jnp.int32)[:, None] * N + index_X[None]).reshape(-1)
    new = pages.reshape(-1, *pages.shape[2:])
    return held.reshape(-1, *held.shape[2:]).at[place].set(new).reshape(held.shape)


def _updated(pool: Pool, k, v, put) -> Pool:
    """`put(held, new)` of keys and values, quantized where the pool is."""
    if pool.k_scale is None:
        return Pool(put(pool.k, k.astype(pool.k.dtype)), put(pool.v, v.astype(pool.v.dtype)))
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    return Pool(put(pool.k, k), put(pool.v, v), put(pool.k_scale, k_scale), put(pool.v_scale, v_scale))


def _layout(pool: Pool, mesh) -> P:
    return spec(mesh, pool.k.shape[0 if pages_axis(mesh) else 1])


def heads(mesh, num_heads: int) -> str | None:
    """The mesh axis of the keys' heads; None where they do not divide."""
    axis = sharding.DECODE_RULES["kv_heads"]
    return axis if num_heads % mesh.shape[axis] == 0 else None


def split(run, mesh, in_specs, out_specs):
    """`run` by shard; as it is on one device."""
    if mesh.size == 1:
        return run
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def append_and_attend(q_B1QH, k_B1KH, v_B1KH, pool: Pool, where: Where, mesh, *, scale=None):
    """Writes one token of each row behind what it holds and attends to all of it.

    Returns:
      (out_B1QH, the pool).
    """
    rows, layout = sharding.ROWS, spec(mesh, k_B1KH.shape[2])
    token = P(rows, None, heads(mesh, k_B1KH.shape[2]))
    how = {"mesh": mesh, "scale": q_B1QH.shape[-1] ** -0.5 if scale is None else scale}
    run = split(
        functools.partial(_append_and_attend, **how),
        mesh,
        (token, token, token, layout, Where(P(rows), P(rows))),
        (token, layout),
    )
    return run(q_B1QH, k_B1KH, v_B1KH, pool, where)


def _append_and_attend(q_B1QH, k_B1KH, v_B1KH, pool: Pool, where: Where, *, mesh, scale: float):
    axis, page = pages_axis(mesh), pool.k.shape[2]
    page_B = jnp.take_along_axis(where.table_BW, where.length_B[:, None] // page, axis=1, mode="clip")[:, 0]
    slot_B = where.length_B % page

    def put(held, a_B1KH):
        a_BKH = a_B1KH[:, 0]
        if not axis:
            return held.at[page_B, :, slot_B].set(a_BKH)
        K, N, _, width = held.shape  # as in _put
        place = ((jnp.arange(K, dtype=jnp.int32)[:, None] * N + page_B[None]) * page + slot_B[None]).reshape(-1)
        new = a_BKH.swapaxes(0, 1).reshape(-1, width)
        return held.reshape(-1, width).at[place].set(new).reshape(held.shape)

    with jax.named_scope("append"):
        pool = _updated(pool, k_B1KH, v_B1KH, put)
    B, _, Q, H = q_B1QH.shape
    q_BQH, length_B = q_B1QH[:, 0], where.length_B + 1
    name = kernel(mesh, H, pool.k.dtype)
    if name == "tpu":
        out_BQH = _tpu(q_BQH * scale, pool, where.table_BW, length_B)
    elif name == "gpu":
        out_BQH = _gpu(q_BQH * scale, pool, where.table_BW, length_B)
    else:
        size = rows_at_a_time(B, mesh)
        out_BQH = _blocks(q_BQH * scale, pool, where.table_BW, length_B, axis=axis, size=size)
    return out_BQH.astype(q_B1QH.dtype)[:, None], pool


def rows_at_a_time(rows: int, mesh) -> int:
    """Rows whose pages are read together. Where there is more than one such block, rows should come by length."""
    if sharding.platform(mesh) != "cpu" or mesh.size > 1:
        return rows
    return next((rows // n for n in (8, 4, 2) if rows % n == 0 and rows // n >= CPU_BLOCK), rows)


def _blocks(q_BQH, pool: Pool, table_BW, length_B, *, axis: int, size: int):
    """Blocks of `size` rows, a page of every row at a time up to the longest; softmax is kept as a running sum."""
    B, Q, H = q_BQH.shape
    K, page = pool.k.shape[0 if axis else 1], pool.k.shape[2]
    q_BKJH = q_BQH.reshape(B, K, Q // K, H)
    place = jnp.arange(page, dtype=jnp.int32)[None]

    def take(held, scales, index_B):
        a = jnp.take(held, index_B, axis=axis, mode="clip")
        if scales is not None:
            a = a.astype(jnp.float32) * jnp.take(scales, index_B, axis=axis, mode="clip")
        return (a.swapaxes(0, 1) if axis else a).astype(q_BQH.dtype)

    def block(_, rows):
        q_BKJH, table_BW, length_B = rows

        def add(w, carry):
            most, total, out = carry
            index_B = jax.lax.dynamic_index_in_dim(table_BW, w, axis=1, keepdims=False)
            k_BKSH, v_BKSH = take(pool.k, pool.k_scale, index_B), take(pool.v, pool.v_scale, index_B)
            score = jnp.einsum("bkjh,bksh->bkjs", q_BKJH, k_BKSH, preferred_element_type=jnp.float32)
            seen_BS = w * page + place < length_B[:, None]
            score = jnp.where(seen_BS[:, None, None], score, -jnp.inf)
            new = jnp.maximum(most, score.max(-1))
            fade, p = jnp.exp(most - new), jnp.exp(score - new[..., None])
            part = jnp.einsum("bkjs,bksh->bkjh", p.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
            return new, total * fade + p.sum(-1), out * fade[..., None] + part

        lowest = jnp.finfo(jnp.float32).min  # not -inf: -inf less -inf is no number
        empty = jnp.zeros(q_BKJH.shape, jnp.float32)
        carry = (jnp.full(q_BKJH.shape[:-1], lowest), jnp.zeros(q_BKJH.shape[:-1]), empty)
        most, total, out = jax.lax.fori_loop(0, -(-jnp.max(length_B) // page), add, carry)
        return None, out / total[..., None]

    rows = jax.tree.map(lambda a: a.reshape(B // size, size, *a.shape[1:]), (q_BKJH, table_BW, length_B))
    if size == B:
        return block(None, (q_BKJH, table_BW, length_B))[1].reshape(B, Q, H)
    return jax.lax.scan(block, None, rows)[1].reshape(B, Q, H)


def _tpu(q_BQH, pool: Pool, table_BW, length_B):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    page, W = pool.k.shape[2], table_BW.shape[1]
    at_a_time = math.gcd(W, max(1, TPU_BLOCK // page))
    return paged_attention(q_BQH, pool.k, pool.v, length_B, table_BW, pages_per_compute_block=at_a_time)


def _gpu(q_BQH, pool: Pool, table_BW, length_B, interpret: bool = False):
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    page, W = pool.k.shape[2], table_BW.shape[1]
    scales = {}
    if pool.k_scale is not None:
        scales = {"k_scales_pages": pool.k_scale[..., 0], "v_scales_pages": pool.v_scale[..., 0]}
    at_a_time = math.gcd(W, max(1, GPU_BLOCK // page))
    how = {"pages_per_compute_block": at_a_time, "k_splits": math.gcd(W // at_a_time, 16), "interpret": interpret}
    return paged_attention(q_BQH, pool.k, pool.v, table_BW, length_B, **how, **scales)
