"""The pass over the vocabulary, in blocks of positions: log-prob, entropy and exact divergences.

No [T, V] array is ever alive, only [block, V]. The weights and the anchor mask are constants when the loss is taken, so
the gradients of hidden and head are formed in the forward pass, beside the loss, and the backward pass only scales
them: one pass over the vocabulary, not two. The head's gradient is accumulated in float32.

Sums over a block's logits are running sums, relative to the largest logit so far: all columns at once, or on a CPU some
thousand `columns` at a time (model/cpu.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from omniopd_jax.model import Head, cpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

LOWEST = -1e30  # a logit that counts nothing; its products with 0 stay 0, which those of -inf do not


@flax.struct.dataclass
class TokenStats:
    """logp_BT: log pi(y_t | x, y_<t), nats. entropy_BT: H_t of the distribution that produces y_t, nats, exact."""

    logp_BT: jax.Array
    entropy_BT: jax.Array


@flax.struct.dataclass
class LossStats:
    """Per-position values of the loss pass, without gradient: log-prob, KL(ref || student) and the divergence from the
    other distribution, nats; 0 where there is no reference or no other."""

    logp_BT: jax.Array
    kl_BT: jax.Array
    divergence_BT: jax.Array


class Other(NamedTuple):
    """A distribution beside the reference that the student is drawn to: a teacher in process, a privileged context.

    Attributes:
      hidden, head: as the reference's; no gradient. Its width may differ from the student's, its vocabulary may not.
      weight: float32 [B, T], already normalised.
      kind: a key of DIVERGENCES.
      clip: nats; a token whose divergence is above counts as this much and has no gradient. 0: off.
    """

    hidden: jax.Array
    head: jax.Array | Head
    weight: jax.Array
    kind: str
    clip: float = 0.0


class Pass(NamedTuple):
    """How the vocabulary is passed over.

    Attributes:
      block: positions of a block.
      columns: vocabulary columns worked on at a time (`cpu.vocab_columns`); 0: all.
      head_grad: False where the head is frozen: its gradient is zero, and neither formed nor held.
      divergence: a key of DIVERGENCES, where there is an `Other`.
    """

    block: int
    columns: int = 0
    head_grad: bool = True
    divergence: str = ""


def token_stats(
    hidden_BTD: Float[Array, "B T D"],
    head: Float[Array, "D V"] | Head,
    target_BT: Int[Array, "B T"],
    *,
    block: int,
    columns: int = 0,
) -> TokenStats:
    """Log-prob of the targets and exact entropy, float32, full vocabulary, no gradient (method.md, section 2).

    Args:
      hidden_BTD: hidden state that *produces* each target: of row index prompt_length + t - 1 for y_t.
      head: head_DV, or a `model.Head`.
      target_BT: int32 tokens y_t.
      block, columns: as in `Pass`.
    """
    hidden_BTD, head = jax.lax.stop_gradient((hidden_BTD, _head(head, hidden_BTD.dtype)))
    rows, count = _blocks(block, (hidden_BTD, target_BT))

    def body(_, rows):
        h_XD, y_X = rows
        z_XV = _logits(h_XD, head, columns)

        def add(sums, _, parts):
            (top, mass, moment), (z,) = sums, parts
            new, scale = _raise(top, z)
            e = jnp.exp(z - new[:, None])
            moment = (moment + mass * (top - new)) * scale + jnp.sum(e * (z - new[:, None]), axis=-1)
            return new, mass * scale + e.sum(-1), moment

        zero = jnp.zeros(z_XV.shape[0], jnp.float32)
        top, mass, moment = cpu.over_columns(add, (zero + LOWEST, zero, zero), (z_XV,), columns, LOWEST)
        return None, ((_pick(z_XV, y_X) - top) - jnp.log(mass), jnp.log(mass) - moment / mass)

    with jax.named_scope("vocab_stats"):
        _, stats = jax.lax.scan(body, None, rows)
    return TokenStats(*_unblocked(stats, count, target_BT.shape))


def weighted_nll_and_kl(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"] | Head,
    ref_hidden: Float[Array, "B T D"] | None,
    ref_head: Float[Array, "D V"] | Head | None,
    target: Int[Array, "B T"],
    weight: Float[Array, "B T"],
    anchor_mask: Float[Array, "B T"],
    *,
    beta,
    block: int,
    columns: int = 0,
    head_grad: bool = True,
    other: Other | None = None,
) -> tuple[Float[Array, ""], LossStats]:
    """sum_t -weight_t * logp_t + beta * mask_t * KL(ref || student)_t + d_t * divergence_t, exact over the vocabulary.

    Args:
      hidden: hidden_BTD that produces each target; carries gradient.
      head: head_DV, or a `model.Head`; carries gradient.
      ref_hidden, ref_head: the same of the frozen reference; no gradient. None, None: no anchor term is computed.
      target: int32 target_BT.
      weight, anchor_mask: float32 [B, T], constants, already divided by their global counts.
      beta: coefficient of the KL (`anchor.kl_coef`).
      block, columns, head_grad: as in `Pass`.
      other: whose divergence is added, d its weight; None: there is no such term.

    Returns:
      (loss_sum, LossStats): the stats are without gradient and without beta.
    """
    ref_head = None if ref_hidden is None else _head(ref_head, ref_hidden.dtype)
    settings = Pass(block, columns, head_grad)
    terms: tuple = (None, None, None, None)
    if other is not None:
        settings = settings._replace(divergence=other.kind)
        own = _head(other.head, other.hidden.dtype)
        terms = (other.hidden, other.weight.astype(jnp.float32), own, jnp.float32(other.clip))
    rows = (ref_hidden, target, weight.astype(jnp.float32), anchor_mask.astype(jnp.float32), *terms[:2])
    constants = jax.lax.stop_gradient((rows, (ref_head, jnp.float32(beta), *terms[2:])))
    loss, stats = _loss(settings, hidden, _head(head), *constants)
    return loss, LossStats(*stats)


# --- the loss of one block -------------------------------------------------------------------------------------------


def _token_loss(z_XV, rows, shared, settings: Pass):
    """(loss, (logp, KL, divergence) [X], () -> d loss / d z_XV) of a block; `shared` is the same for every block."""
    ref_h_XD, y_X, w_X, m_X, other_h_XD, d_X = rows
    ref_head, beta, other_head, clip = shared
    columns = settings.columns
    if ref_head is None:
        top, mass = _sums(z_XV, columns)
        kl_X = jnp.zeros_like(top)
    else:
        ref_XV = _logits(ref_h_XD, ref_head, columns)
        kl_X, (ref_top, ref_mass, _), (top, mass) = _kl(ref_XV, z_XV, columns)
    logp_X = (_pick(z_XV, y_X) - top) - jnp.log(mass)
    apart_X, far = jnp.zeros_like(top), None
    if other_head is not None:
        apart_X, far = DIVERGENCES[settings.divergence](z_XV, _logits(other_h_XD, other_head, columns), columns)
        inside_X = (clip <= 0) | (apart_X < clip)

    def gradient():
        """d/dz of -logp is p - onehot, of KL(ref || p) is p - ref; both in one array."""
        coef = w_X if ref_head is None else w_X + beta * m_X
        dz_XV = (coef / mass)[:, None] * jnp.exp(z_XV - top[:, None])
        if ref_head is not None:
            dz_XV -= (beta * m_X / ref_mass)[:, None] * jnp.exp(ref_XV - ref_top[:, None])
        if far is not None:
            dz_XV += far(jnp.where(inside_X, d_X, 0.0))
        return jnp.where(jnp.arange(dz_XV.shape[1])[None] == y_X[:, None], dz_XV - w_X[:, None], dz_XV)

    loss = jnp.sum(-w_X * logp_X) + beta * jnp.sum(m_X * kl_X)
    if far is not None:
        loss += jnp.sum(d_X * jnp.where(inside_X, apart_X, clip))
    return loss, (logp_X, kl_X, apart_X), gradient


def _forward_kl(z_XV, other_XV, columns):
    """KL(other || student), and its d/dz times a weight a position: p - other."""
    kl_X, (other_top, other_mass, _), (top, mass) = _kl(other_XV, z_XV, columns)

    def gradient(d_X):
        p_XV = (d_X / mass)[:, None] * jnp.exp(z_XV - top[:, None])
        return p_XV - (d_X / other_mass)[:, None] * jnp.exp(other_XV - other_top[:, None])

    return kl_X, gradient


def _reverse_kl(z_XV, other_XV, columns):
    """KL(student || other), and its d/dz times a weight: p (z - z_other - their mean difference under p)."""
    kl_X, (top, mass, gap), _ = _kl(z_XV, other_XV, columns)

    def gradient(d_X):
        p_XV = jnp.exp(z_XV - top[:, None])
        return (d_X / mass)[:, None] * p_XV * (z_XV - other_XV - gap[:, None])

    return kl_X, gradient


DIVERGENCES = {"forward": _forward_kl, "reverse": _reverse_kl}  # (z, other's z, columns) -> (KL [X], weight -> d/dz)


# --- the pass, with its gradient -------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(settings: Pass, hidden, head: Head, rows, shared):
    """(loss, statistics [B, T]); `rows` are [B, T, ...] arrays, `shared` is the same for every block."""
    return _pass(settings, hidden, head, rows, shared, with_grad=False)[0]


def _forward(*args):
    return _pass(*args, with_grad=True)


def _backward(settings, grads, cotangent):
    scaled = jax.tree.map(lambda a: (cotangent[0] * a).astype(a.dtype), grads)  # the statistics carry no cotangent
    return *scaled, None, None


_loss.defvjp(_forward, _backward)


def _pass(settings: Pass, hidden, head: Head, rows, shared, *, with_grad: bool):
    """Loss, statistics and, in the same pass, d loss / d hidden and d loss / d head (None: frozen)."""
    blocks, count = _blocks(settings.block, (hidden, rows))
    cast = _head(head, hidden.dtype)

    def body(carry, rows):
        loss, dhead = carry
        h_XD, rows = rows
        z_XV = _logits(h_XD, cast, settings.columns)
        part, stats, gradient = _token_loss(z_XV, rows, shared, settings)
        if not with_grad:
            return (loss + part, None), (stats, None)
        dh_XD, dhead = _head_grads(h_XD, cast, gradient(), dhead, settings.columns)
        return (loss + part, dhead), (stats, dh_XD)

    dhead = jnp.zeros(head.matrix.shape, jnp.float32) if with_grad and settings.head_grad else None
    with jax.named_scope("vocab_loss"):
        (loss, dhead), (stats, dh) = jax.lax.scan(body, (jnp.float32(0), dhead), blocks)
    out = loss, _unblocked(stats, count, hidden.shape[:2])
    if not with_grad:
        return out, None
    head_grad = None if dhead is None else dataclasses.replace(head, matrix=dhead.astype(head.matrix.dtype))
    return out, (*_unblocked((dh,), count, hidden.shape), head_grad)


def _head(head, dtype=None) -> Head:
    """A bare head_DV, or a Head; cast before the pass, not once a block."""
    head = head if isinstance(head, Head) else Head(head)
    return head if dtype is None else dataclasses.replace(head, matrix=head.matrix.astype(dtype))


def _logits(h_XD, head: Head, columns):
    """float32 logits of a block."""
    spec = "xd,vd->xv" if head.tied else "xd,dv->xv"
    return cpu.once(jnp.einsum(spec, h_XD, head.matrix, preferred_element_type=jnp.float32), columns)


def _head_grads(h_XD, head: Head, dz_XV, dhead, columns):
    """From d loss / d logits of a block: d / d hidden in its dtype, and d / d head added to `dhead` (None: frozen)."""
    dz_XV = cpu.once(dz_XV.astype(h_XD.dtype), columns)
    spec = "xv,vd->xd" if head.tied else "xv,dv->xd"
    dh_XD = jnp.einsum(spec, dz_XV, head.matrix, preferred_element_type=jnp.float32).astype(h_XD.dtype)
    if dhead is None:
        return dh_XD, None
    axis, spec = (0, "dx,xv->vd") if head.tied else (1, "dx,xv->dv")
    h_DX = cpu.once(h_XD.T, columns)

    def add(dhead, start, parts):
        part = jnp.einsum(spec, h_DX, parts[0], preferred_element_type=jnp.float32)
        if part.shape == dhead.shape:
            return dhead + part
        old = jax.lax.dynamic_slice_in_dim(dhead, start, part.shape[axis], axis)
        return jax.lax.dynamic_update_slice_in_dim(dhead, old + part, start, axis)

    return dh_XD, cpu.over_columns(add, dhead, (dz_XV,), columns, 0)


# --- sums over a block's logits --------------------------------------------------------------------------------------


def _raise(top_X, z_XV):
    """(the largest logit so far, the factor that sums relative to the old one take)."""
    new = jnp.maximum(top_X, z_XV.max(-1))
    return new, jnp.exp(top_X - new)


def _sums(z_XV, columns):
    """(largest logit, sum of exp(z - largest)), each [X]."""

    def add(sums, _, parts):
        (top, mass), (z,) = sums, parts
        new, scale = _raise(top, z)
        return new, mass * scale + jnp.exp(z - new[:, None]).sum(-1)

    zero = jnp.zeros(z_XV.shape[0], jnp.float32)
    return cpu.over_columns(add, (zero + LOWEST, zero), (z_XV,), columns, LOWEST)


def _kl(p_XV, q_XV, columns):
    """Exact KL(p || q) of each row from the logits of both.

    Returns:
      (kl, (largest of p, its mass, mean of p's logit less q's under p), (largest of q, its mass)).
    """

    def add(sums, _, parts):
        (p_top, p_mass, gap, q_top, q_mass), (p, q) = sums, parts
        p_new, p_scale = _raise(p_top, p)
        q_new, q_scale = _raise(q_top, q)
        e = jnp.exp(p - p_new[:, None])
        gap = gap * p_scale + jnp.sum(e * (p - q), axis=-1)
        return p_new, p_mass * p_scale + e.sum(-1), gap, q_new, q_mass * q_scale + jnp.exp(q - q_new[:, None]).sum(-1)

    zero = jnp.zeros(p_XV.shape[0], jnp.float32)
    sums = (zero + LOWEST, zero, zero, zero + LOWEST, zero)
    p_top, p_mass, gap, q_top, q_mass = cpu.over_columns(add, sums, (p_XV, q_XV), columns, LOWEST)
    gap /= p_mass
    kl = (gap - (p_top - q_top)) + (jnp.log(q_mass) - jnp.log(p_mass))
    return kl, (p_top, p_mass, gap), (q_top, q_mass)


def _pick(z_XV, y_X):
    """z of y by a masked sum: it stays local where the vocabulary is sharded, a gather need not."""
    return jnp.sum(jnp.where(jnp.arange(z_XV.shape[1])[None] == y_X[:, None], z_XV, 0.0), axis=-1)


# --- blocks of positions ---------------------------------------------------------------------------------------------


def _blocks(block: int, tree):
    """[B, T, ...] -> [blocks, block, ...], zero-padded; padding carries no weight. Also returns B * T."""
    B, T = jax.tree.leaves(tree)[0].shape[:2]
    block = min(block, B * T)

    def one(a):
        flat = a.reshape((B * T, *a.shape[2:]))
        flat = jnp.pad(flat, ((0, -(B * T) % block),) + ((0, 0),) * (flat.ndim - 1))
        return flat.reshape((-1, block, *a.shape[2:]))

    return jax.tree.map(one, tree), B * T


def _unblocked(arrays, count: int, shape) -> tuple:
    """The inverse of `_blocks`, of arrays that have become [blocks, block, ...]: each of `shape`."""
    return tuple(a.reshape((-1, *shape[2:]))[:count].reshape(shape) for a in arrays)
