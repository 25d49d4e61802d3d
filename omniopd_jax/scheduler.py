"""The peak-entropy scheduler: where to audit (method.md, section 2, agreed).

Kept: the score is the exact entropy at the chunk's first token; chunks start at their peak, do not overlap and end
inside the response. Ours: ties go to the later position (fork), and a position inside a UTF-8 character is not
eligible.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax.errors import NumberError

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@functools.partial(jax.jit, static_argnames=("num_chunks", "chunk_tokens"))
def entropy_peaks(
    entropy_BT: Float[Array, "B T"],
    length_B: Int[Array, " B"],
    *,
    num_chunks: int,
    chunk_tokens: int,
    eligible_BT: Bool[Array, "B T"] | None = None,
) -> Int[Array, "B M"]:
    """The M largest entropies, greedily, subject to t + C <= T_b and |t - t'| >= C for every peak already taken.

    Args:
      entropy_BT: H_t of the distribution that produces response token t, nats.
      length_B: int32, response tokens, a sampled end token counted.
      num_chunks: M.
      chunk_tokens: C.
      eligible_BT: bool; positions that may start a chunk. None: all.

    Returns:
      peak_BM: int32, ascending, -1 at the end where fewer than M fit.

    Raises:
      NumberError is not raised inside jit: a NaN entropy makes its row's peaks -2, which `check_peaks` refuses.
    """
    B, T = entropy_BT.shape
    t = jnp.arange(T, dtype=jnp.int32)[None]
    fits = t + chunk_tokens <= length_B[:, None]
    open_BT = fits if eligible_BT is None else fits & eligible_BT
    bad_B = jnp.any(jnp.isnan(entropy_BT) & (t < length_B[:, None]), axis=1)

    def take(_, carry):
        open_BT, taken_BT = carry
        score = jnp.where(open_BT, entropy_BT, -jnp.inf)
        best = jnp.max(score, axis=1, keepdims=True)
        peak_B1 = jnp.max(jnp.where(open_BT & (score == best), t, -1), axis=1, keepdims=True)
        some_B1 = peak_B1 >= 0
        far = jnp.abs(t - peak_B1) >= chunk_tokens
        return open_BT & (far | ~some_B1), taken_BT | ((t == peak_B1) & some_B1)

    _, taken_BT = jax.lax.fori_loop(0, num_chunks, take, (open_BT, jnp.zeros((B, T), bool)))
    late = jnp.where(taken_BT, t, T + num_chunks)
    late = jnp.pad(late, ((0, 0), (0, max(0, num_chunks - T))), constant_values=T + num_chunks)
    peak_BM = jnp.sort(late, axis=1)[:, :num_chunks]
    peak_BM = jnp.where(peak_BM >= T, -1, peak_BM)
    return jnp.where(bad_B[:, None], -2, peak_BM).astype(jnp.int32)


def check_peaks(peak_BM) -> None:
    """Raises NumberError where `entropy_peaks` met a NaN entropy: never fall back in silence."""
    if (peak_BM == -2).any():
        raise _no_entropy(sorted({int(b) for b in np.argwhere(np.asarray(peak_BM) == -2)[:, 0]}))


def check_entropy(entropy_BT, tokens) -> None:
    """Raises NumberError where the entropy of a row's own tokens is NaN; `tokens`: those of each row."""
    if rows := [b for b, row in enumerate(tokens) if np.isnan(entropy_BT[b, : len(row)]).any()]:
        raise _no_entropy(rows)


def _no_entropy(rows: list[int]) -> NumberError:
    return NumberError(
        f"entropy is NaN in row(s) {rows} of the batch: the run has diverged (set a lower optimizer.learning_rate "
        "and another run_dir), or student.path holds weights that are no numbers"
    )


def chunk_mask(peak_BM, keep_BM, chunk_tokens: int, T: int):
    """Which kept chunk holds each position: int32 chunk_BT, -1 where none does (chunks never overlap)."""
    t = jnp.arange(T, dtype=jnp.int32)[None, None]
    inside = (t >= peak_BM[..., None]) & (t < peak_BM[..., None] + chunk_tokens)
    inside = inside & ((peak_BM >= 0) & keep_BM)[..., None]
    return jnp.where(inside.any(1), jnp.argmax(inside, axis=1), -1).astype(jnp.int32)
