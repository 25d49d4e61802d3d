"""`attend()`: causal attention over whole rows, by one of several kernels. Decoding has paged.py, window.py."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from omniopd_jax.errors import UserError
from omniopd_jax.parallel import sharding

BACKENDS = ("xla", "splash", "cudnn", "splash_interpret")  # the last: splash's kernel on any device, slowly, for tests
KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # what `auto` takes; elsewhere xla
LANES = 128  # rows of the splash kernel are padded to a multiple
CUDNN_PACKED = (
    "model.attention = cudnn takes right-padded rows only: packed or left-padded rows need segments, which its public "
    "call "
    "lacks"
)
CUDNN_WIDTH = 128  # of a head, at most (jax 0.10.2)
# xla: queries a block, at least; blocks, at most (each is compiled; two are not worth it)
XLA_BLOCK, XLA_BLOCKS = 64, 8
SPLASH_BLOCK = 512  # query and key positions a tile of it, where the row is that long


def resolve(name: str, dtype: str | None = None, *, packed: bool = False, on: str = "", head_dim: int = 0) -> str:
    """The kernel for `auto`: splash on TPU, cudnn on GPU, xla elsewhere. Resolved once, at start-up, and printed.

    Args:
      name: `auto` or a name of `BACKENDS`.
      dtype: of the computation; cuDNN has no float32 kernel, so `auto` gives xla there.
      packed: whether several responses share a row (`packing.length`).
      head_dim: of the model; cuDNN takes at most CUDNN_WIDTH, so `auto` gives xla above it. 0: not known.
      on: tpu, gpu or cpu, whose kernel it must be; empty: `auto` goes by the default device, and a name is not checked.

    Raises:
      UserError: a kernel that the devices `on` do not have; cudnn asked for by name with float32; cudnn, asked for or
      by
        `auto`, with packed rows.
    """
    auto = name == "auto"
    if auto:
        name = KERNELS.get(on or jax.default_backend(), "xla")
    if auto and name == "cudnn" and head_dim > CUDNN_WIDTH:
        return "xla"
    if name == "cudnn" and dtype == "float32":
        if not auto:
            raise UserError(
                "model.attention = cudnn has no float32 kernel: set compute_dtype=bfloat16, or attention=xla"
            )
        return "xla"
    if name == "cudnn" and packed:
        raise UserError(f"{CUDNN_PACKED}; set model.attention=xla, or packing.length=0")
    if on and name in KERNELS.values() and KERNELS.get(on) != name:
        raise UserError(f"model.attention = {name} has no kernel for a {on}: set model.attention=auto")
    return name


def attend(
    q_BLQH, k_BLKH, v_BLKH, *, segment_BL=None, length_B=None, window: int = 0, scale: float | None = None,
    backend: str, mesh=None,
):  # fmt: skip
    """Causal attention with grouped heads, softmax in float32.

    Args:
      q_BLQH, k_BLKH, v_BLKH: Q a multiple of K.
      segment_BL: int32; a token sees only its own segment. None: the whole row, causal.
      length_B: int32, real tokens of right-padded rows. The outputs at real tokens do not depend on it (attention is
        causal); cudnn skips what is beyond, and returns zeros there.
      window: tokens that a token sees, itself included; 0: all before it.
      scale: of the scores; None: H**-0.5.
      backend: a name of `BACKENDS`.
      mesh: the mesh whose rows and heads splash must split by hand; None: one device. xla and cudnn split themselves.

    Returns:
      out_BLQH in the dtype of q; the remat policy `context` keeps it.

    Raises:
      UserError: cudnn with segments (its public call knows lengths alone), or with heads wider than `CUDNN_WIDTH`.
    """
    if backend in ("splash", "splash_interpret"):
        run = functools.partial(_splash, window=window, scale=scale, interpret=backend == "splash_interpret")
        return _split(run, q_BLQH, k_BLKH, v_BLKH, segment_BL, mesh or sharding.default_mesh())
    if backend == "cudnn":  # not named: its output is kept with the kernel's other results (`saved_by_kernel`), once
        return _cudnn(q_BLQH, k_BLKH, v_BLKH, segment_BL, length_B, window, scale)
    if backend != "xla":
        raise ValueError(f"attention backend {backend!r} is not one of {BACKENDS}; resolve() comes first")
    out_BLQH = _causal(q_BLQH, k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2), segment_BL, window, scale)
    return checkpoint_name(out_BLQH, "context")


def _causal(q_BLQH, k_BKLH, v_BKLH, segment_BL, window: int, scale):
    """Causal attention a block of queries at a time, each over the keys up to its end: most of what is masked is not
    made."""
    L = q_BLQH.shape[1]
    size = max(XLA_BLOCK, -(-L // XLA_BLOCKS)) if L > 2 * XLA_BLOCK else L
    out = []
    for start in range(0, L, size):
        S, first = min(start + size, L), max(0, start + 1 - window) if window else 0
        query, key = jnp.arange(start, S)[:, None], jnp.arange(first, S)[None]
        mask = (key <= query)[None]
        if window:
            mask = mask & (query - key < window)[None]
        if segment_BL is not None:
            mask = mask & (segment_BL[:, start:S, None] == segment_BL[:, None, first:S])
        out.append(grouped(q_BLQH[:, start:S], k_BKLH[:, :, first:S], v_BKLH[:, :, first:S], mask, scale))
    return jnp.concatenate(out, axis=1)


def grouped(q_BLQH, k_BKSH, v_BKSH, mask_BLS, scale: float | None = None):
    """The product itself over keys [B, K, S, H] (the cache's layout); `mask_BLS` says who sees whom, B may be 1.

    The queries of a group are rows of one product (J = Q / K * L): as axes of their own the CPU takes three times as
    long.
    """
    B, L, Q, H = q_BLQH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKJH = q_BLQH.reshape(B, L, K, Q // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    score = jnp.einsum("bkjh,bksh->bkjs", q_BKJH, k_BKSH, preferred_element_type=jnp.float32)
    score *= H**-0.5 if scale is None else scale
    score = score.reshape(B, K, Q // K, L, S)
    score = jnp.where(mask_BLS[:, None, None], score, jnp.finfo(jnp.float32).min)
    p_BKJS = jax.nn.softmax(score, axis=-1).astype(v_BKSH.dtype).reshape(B, K, -1, S)
    out_BKJH = jnp.einsum("bkjs,bksh->bkjh", p_BKJS, v_BKSH)
    return out_BKJH.reshape(B, K, Q // K, L, H).transpose(0, 3, 1, 2, 4).reshape(B, L, Q, H)


def saved_by_kernel(primitive, *_, **__) -> bool:
    """Remat policy: keeps what cuDNN's forward kernel leaves for its backward (output and log-sum), which carries no
    name.

    Without it the backward pass runs the forward kernel again.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


def _cudnn(q_BLQH, k_BLKH, v_BLKH, segment_BL, length_B, window: int, scale):
    if segment_BL is not None:
        raise UserError(f"{CUDNN_PACKED}; set model.attention=xla, or do not pack")
    if q_BLQH.shape[-1] > CUDNN_WIDTH:
        raise UserError(
            f"heads of {q_BLQH.shape[-1]}: cuDNN's attention takes at most {CUDNN_WIDTH}; set model.attention=xla"
        )
    lengths = None if length_B is None else length_B.astype(jnp.int32)
    L = q_BLQH.shape[1]
    # its backward kernel takes even lengths alone; causal, so no real token sees what is added on the right
    q, k, v = (jnp.pad(a, ((0, 0), (0, L % 2), (0, 0), (0, 0))) for a in (q_BLQH, k_BLKH, v_BLKH))
    out_BLQH = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=q_BLQH.shape[-1] ** -0.5 if scale is None else scale, implementation="cudnn",
        local_window_size=(window - 1, 0) if window else None,
        query_seq_lengths=lengths, key_value_seq_lengths=lengths,
    )  # fmt: skip
    return out_BLQH[:, :L]


def _split(run, q_BLQH, k_BLKH, v_BLKH, segment_BL, mesh):
    """`run` with rows over (data, fsdp) and heads over tp: the compiler does not split a Pallas kernel by itself."""
    if mesh.size == 1:
        return run(q_BLQH, k_BLKH, v_BLKH, segment_BL)
    whole_rows = q_BLQH.shape[0] % math.prod(mesh.shape[a] for a in sharding.ROWS) == 0
    heads = sharding.RULES["kv_heads"]
    rows = sharding.ROWS if whole_rows else None
    spec = P(rows, None, heads if k_BLKH.shape[2] % mesh.shape[heads] == 0 else None)
    in_specs = (spec, spec, spec, None if segment_BL is None else P(rows))
    split = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return split(q_BLQH, k_BLKH, v_BLKH, segment_BL)


def _splash(q_BLQH, k_BLKH, v_BLKH, segment_BL, *, window: int, scale, interpret: bool):
    """The Pallas TPU kernel: grouped heads share their keys in it, whole blocks above the diagonal are skipped."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, L, Q, H = q_BLQH.shape
    block = SPLASH_BLOCK if L >= SPLASH_BLOCK else L + -L % LANES
    pad = -L % block  # on the right: causal, so no real token sees it
    shape = (L + pad, L + pad)
    one = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    mask = masks.MultiHeadMask([one] * Q)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    run = kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="context", interpret=interpret
    )
    q = (q_BLQH.astype(jnp.float32) * (H**-0.5 if scale is None else scale)).astype(
        q_BLQH.dtype
    )  # the kernel does not scale
    q, k, v = (jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for a in (q, k_BLKH, v_BLKH))
    if segment_BL is None:
        out_BQLH = jax.vmap(run)(q, k, v)
    else:
        ids = jnp.pad(segment_BL.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-1)
        out_BQLH = jax.vmap(run)(q, k, v, kernel.SegmentIds(ids, ids))
    return out_BQLH[:, :, :L].swapaxes(1, 2)
