"""The pass over the vocabulary, in blocks of positions: log-prob, entropy and the exact KL to the reference.

No [T, V] array is ever alive, only [block, V]. The weights and the anchor mask are constants when the loss is taken, so
the gradients of hidden and head are formed in the forward pass, beside the loss, and the backward pass only scales them:
one walk over the vocabulary, not two. The head's gradient is accumulated in float32.

On CPU (`piece`) the sums over a block's logits and the head's gradient go through the vocabulary in pieces that stay in
the cache: the logits are read twice in all, and no product of the head's size exists beside its sum. Elsewhere the
compiler adds into the sum by itself, and a vocabulary that is split over devices must not be cut: there, one piece.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from omniopd_jax.model import attention

CPU_PIECE = 4_096  # vocabulary columns; 1,000 to 10,000 measured the same
FAR = -1e30  # a logit that counts nothing; its products with 0 stay 0, which those of -inf do not


@flax.struct.dataclass
class TokenStats:
    """logp_BT: log pi(y_t | x, y_<t), nats. entropy_BT: H_t of the distribution that produces y_t, nats, exact."""

    logp_BT: jax.Array
    entropy_BT: jax.Array


@flax.struct.dataclass
class LossStats:
    """Per-position values of the loss pass, without gradient: log-prob and KL(ref || student), nats; 0 off its mask."""

    logp_BT: jax.Array
    kl_BT: jax.Array


def token_stats(
    hidden_BTD, head_DV, target_BT, *, block: int, temperature=1.0, softcap=None, piece: int = 0, tied: bool = False
) -> TokenStats:  # fmt: skip
    """Log-prob of the targets and exact entropy, float32, full vocabulary, no gradient (method.md, section 2).

    Args:
      hidden_BTD: hidden state that *produces* each target: of row index prompt_length + t - 1 for y_t.
      head_DV: output projection; with `tied` the embedding itself, [V, D], which is then never transposed.
      target_BT: int32 tokens y_t.
      block: positions a block.
      temperature, softcap: logits = cap * tanh(raw / cap) / temperature.
      piece: vocabulary columns worked on at a time (`piece_on`); 0: all.
      tied: the layout of `head_DV`.
    """
    hidden_BTD, head_DV = jax.lax.stop_gradient((hidden_BTD, head_DV.astype(hidden_BTD.dtype)))
    blocks, T = _blocks(block, (hidden_BTD, target_BT))

    def body(_, xs):
        h, y = xs
        z_XV = _logits(h, head_DV, temperature, softcap, piece, tied)

        def add(sums, _, parts):
            (top, mass, moment), (z,) = sums, parts
            new, scale = _raise(top, z)
            e = jnp.exp(z - new[:, None])
            moment = (moment + mass * (top - new)) * scale + jnp.sum(e * (z - new[:, None]), axis=-1)
            return new, mass * scale + e.sum(-1), moment

        zero = jnp.zeros(z_XV.shape[0], jnp.float32)
        top, mass, moment = _fold(add, (zero + FAR, zero, zero), (z_XV,), piece)
        return None, ((_pick(z_XV, y) - top) - jnp.log(mass), jnp.log(mass) - moment / mass)

    with jax.named_scope("vocab_stats"):
        _, (logp, entropy) = jax.lax.scan(body, None, blocks)
    return TokenStats(*(a.reshape(-1)[:T].reshape(target_BT.shape) for a in (logp, entropy)))


def weighted_nll_and_kl(
    hidden, head, ref_hidden, ref_head, target, weight, anchor_mask, *, beta, block: int, temperature=1.0, softcap=None,
    head_grad: bool = True, piece: int = 0, tied: bool = False,
):  # fmt: skip
    """sum_t -weight_t * logp_t + beta * mask_t * KL(ref || student)_t, the KL exact over the vocabulary.

    Args:
      hidden: hidden_BTD that produces each target; carries gradient.
      head: head_DV; carries gradient.
      ref_hidden, ref_head: the same of the frozen reference; no gradient. None, None: no anchor term is computed.
      target: int32 target_BT.
      weight, anchor_mask: float32 [B, T], constants, already divided by their global counts.
      beta: coefficient of the KL (`anchor.kl_coef`).
      block, temperature, softcap, piece, tied: as in `token_stats`; `tied` holds for head, ref_head and the gradient.
      head_grad: False where the head is frozen: its gradient is zero, and neither formed nor held.

    Returns:
      (loss_sum, LossStats): the stats are without gradient and without beta.
    """
    if ref_hidden is None:
        ref_hidden, ref_head = hidden[..., :0], head[:, :0] if tied else head[:0]
    args = jax.lax.stop_gradient((ref_hidden, ref_head, weight.astype(jnp.float32), anchor_mask.astype(jnp.float32)))
    return _loss(hidden, head, *args, target, jnp.float32(beta), block, float(temperature), softcap, (head_grad, piece, tied))


def reverse_kl(
    hidden, head, teacher_hidden, teacher_head, weight, *, block: int, temperature=1.0, softcap=None, teacher_softcap=None,
    head_grad: bool = True, piece: int = 0, tied: bool = False,
):  # fmt: skip
    """sum_t weight_t * KL(student || teacher)_t, exact over the vocabulary: white-box OPD with the teacher in process.

    Args:
      hidden, head: of the student, carry gradient. teacher_hidden, teacher_head: of the teacher, no gradient; its width
        may differ, its vocabulary may not.
      weight: float32 [B, T], already normalised.
      head_grad, piece, tied: as in `weighted_nll_and_kl`; teacher_head is [D, V] all the same.

    Returns:
      (loss_sum, kl_BT): nats, the second without gradient.
    """
    rest = jax.lax.stop_gradient((teacher_hidden, teacher_head, weight.astype(jnp.float32)))
    caps = (softcap, teacher_softcap)
    return _reverse(hidden, head, *rest, block, float(temperature), caps, (head_grad, piece, tied))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _reverse(*args):
    return _reverse_walk(*args, with_grad=False)[0]


def _reverse_fwd(*args):
    return _reverse_walk(*args, with_grad=True)


def _reverse_bwd(block, temperature, caps, how, grads, cotangent):
    return (*_scaled(grads, cotangent[0]), None, None, None)


_reverse.defvjp(_reverse_fwd, _reverse_bwd)


def _reverse_walk(hidden, head, teacher_hidden, teacher_head, weight, block, temperature, caps, how, *, with_grad):
    head_grad, piece, tied = how
    blocks, T = _blocks(block, (hidden, teacher_hidden, weight))
    matrix, teacher_head = head.astype(hidden.dtype), teacher_head.astype(teacher_hidden.dtype)

    def body(carry, xs):
        loss, dhead_DV = carry
        h, th, w = xs
        z_XV = _logits(h, matrix, temperature, caps[0], piece, tied)
        other_XV = _logits(th, teacher_head, temperature, caps[1], piece, False)
        kl, (top, mass, gap), _ = _kl(z_XV, other_XV, piece)
        loss += jnp.sum(w * kl)
        if not with_grad:
            return (loss, dhead_DV), (kl, None)
        p_XV = jnp.exp(z_XV - top[:, None])
        dz_XV = (w / mass)[:, None] * p_XV * (z_XV - other_XV - gap[:, None])
        dz_XV *= _slope(z_XV, temperature, caps[0])
        dh, dhead_DV = _head_grads(h, matrix, dz_XV, dhead_DV, piece, tied)
        return (loss, dhead_DV), (kl, dh)

    dhead = jnp.zeros(head.shape, jnp.float32) if with_grad and head_grad else None
    with jax.named_scope("vocab_reverse_kl"):
        (loss, dhead), (kl, dh) = jax.lax.scan(body, (jnp.float32(0), dhead), blocks)
    B, T_, _ = hidden.shape
    out = (loss, kl.reshape(-1)[:T].reshape(B, T_))
    return out, _grads(dh, dhead, hidden, head) if with_grad else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def _loss(*args):
    return _walk(*args, with_grad=False)[0]


def _loss_fwd(*args):
    return _walk(*args, with_grad=True)


def _loss_bwd(block, temperature, softcap, how, grads, cotangent):
    # the cotangent of the loss; the stats carry none
    return (*_scaled(grads, cotangent[0]), None, None, None, None, None, None)


_loss.defvjp(_loss_fwd, _loss_bwd)


def _walk(
    hidden, head, ref_hidden, ref_head, weight, mask, target, beta, block, temperature, softcap, how, *, with_grad
):  # fmt: skip
    """Loss, stats and, in the same walk, d loss / d hidden and d loss / d head."""
    head_grad, piece, tied = how
    blocks, T = _blocks(block, (hidden, ref_hidden, target, weight, mask))
    anchored = ref_hidden.shape[-1] > 0
    matrix, ref_head = head.astype(hidden.dtype), ref_head.astype(ref_hidden.dtype)

    def body(carry, xs):
        loss, dhead_DV = carry
        h, rh, y, w, m = xs
        z_XV, ref_XV = _logits(h, matrix, temperature, softcap, piece, tied), None
        if anchored:
            ref_XV = _logits(rh, ref_head, temperature, softcap, piece, tied)
            kl, (ref_top, ref_mass, _), (top, mass) = _kl(ref_XV, z_XV, piece)
        else:
            top, mass = _sums(z_XV, piece)
            kl = jnp.zeros_like(top)
        logp = (_pick(z_XV, y) - top) - jnp.log(mass)
        loss += jnp.sum(-w * logp) + beta * jnp.sum(m * kl)
        if not with_grad:
            return (loss, dhead_DV), (logp, kl, None)
        # d/dz of -logp is p - onehot, of KL(ref || p) is p - ref; both in one array.
        coef = w + beta * m if anchored else w
        dz_XV = (coef / mass)[:, None] * jnp.exp(z_XV - top[:, None])
        if anchored:
            dz_XV -= (beta * m / ref_mass)[:, None] * jnp.exp(ref_XV - ref_top[:, None])
        dz_XV = jnp.where(jnp.arange(dz_XV.shape[1])[None] == y[:, None], dz_XV - w[:, None], dz_XV)
        dz_XV *= _slope(z_XV, temperature, softcap)
        dh, dhead_DV = _head_grads(h, matrix, dz_XV, dhead_DV, piece, tied)
        return (loss, dhead_DV), (logp, kl, dh)

    dhead = jnp.zeros(head.shape, jnp.float32) if with_grad and head_grad else None
    with jax.named_scope("vocab_loss"):
        (loss, dhead), (logp, kl, dh) = jax.lax.scan(body, (jnp.float32(0), dhead), blocks)
    B, T_, _ = hidden.shape
    stats = LossStats(*(a.reshape(-1)[:T].reshape(B, T_) for a in (logp, kl)))
    return (loss, stats), _grads(dh, dhead, hidden, head) if with_grad else None


def _logits(h_XD, head, temperature, softcap, piece, tied):
    """float32 logits of a block; `head` is in the dtype of h_XD already: cast before the walk, not once a block."""
    spec = "xd,vd->xv" if tied else "xd,dv->xv"
    z = jnp.einsum(spec, h_XD, head, preferred_element_type=jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    z = z / temperature
    # made once, or the compiler repeats the soft-cap, or keeps copies, for every use of it
    return jax.lax.optimization_barrier(z) if piece else z


def _slope(z_XV, temperature, softcap):
    """d logits / d raw, from the logits themselves."""
    if softcap is None:
        return 1 / temperature
    return (1 - jnp.square(z_XV * (temperature / softcap))) / temperature


def _raise(top_X, z_XV):
    """(the largest logit so far, the factor that sums relative to the old one take)."""
    new = jnp.maximum(top_X, z_XV.max(-1))
    return new, jnp.exp(top_X - new)


def _sums(z_XV, piece):
    """(largest logit, sum of exp(z - largest)), each [X]."""

    def add(sums, _, parts):
        (top, mass), (z,) = sums, parts
        new, scale = _raise(top, z)
        return new, mass * scale + jnp.exp(z - new[:, None]).sum(-1)

    zero = jnp.zeros(z_XV.shape[0], jnp.float32)
    return _fold(add, (zero + FAR, zero), (z_XV,), piece)


def _kl(p_XV, q_XV, piece):
    """Exact KL(p || q) a row from the logits of both.

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
    p_top, p_mass, gap, q_top, q_mass = _fold(add, (zero + FAR, zero, zero, zero + FAR, zero), (p_XV, q_XV), piece)
    gap /= p_mass
    kl = (gap - (p_top - q_top)) + (jnp.log(q_mass) - jnp.log(p_mass))
    return kl, (p_top, p_mass, gap), (q_top, q_mass)


def piece_on(mesh) -> int:
    """The `piece` for arrays on `mesh` (None: the default device)."""
    return CPU_PIECE if attention.platform(mesh) == "cpu" and (mesh is None or mesh.shape["tp"] == 1) else 0


def _fold(body, carry, arrays, piece, fill=FAR):
    """`body(carry, start, parts)` over pieces of the [X, V] arrays; `start` is the number of a part's first column.

    Where the pieces do not divide V the last one begins early; columns it repeats hold `fill`.
    """
    V = arrays[0].shape[1]
    count = -(-V // piece) if piece else 1
    count = next((n for n in range(count, 2 * count) if V % n == 0), count)
    size = -(-V // count)
    if count == 1:
        return body(carry, 0, arrays)

    def step(i, carry):
        start = jnp.minimum(i * size, V - size)
        parts = [jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in arrays]
        if count * size > V:
            new_V = start + jnp.arange(size) >= i * size
            parts = [jnp.where(new_V[None], a, jnp.asarray(fill, a.dtype)) for a in parts]
        return body(carry, start, jax.lax.optimization_barrier(parts))

    return jax.lax.fori_loop(0, count, step, carry)


def _head_grads(h_XD, head, dz_XV, dhead, piece, tied):
    """From d loss / d raw logits of a block: d / d hidden in its dtype, and d / d head added to `dhead` (None: frozen)."""
    dz_XV = dz_XV.astype(h_XD.dtype)
    if piece:
        dz_XV = jax.lax.optimization_barrier(dz_XV)
    spec = "xv,vd->xd" if tied else "xv,dv->xd"
    dh_XD = jnp.einsum(spec, dz_XV, head, preferred_element_type=jnp.float32).astype(h_XD.dtype)
    if dhead is None:
        return dh_XD, None
    axis, spec = (0, "dx,xv->vd") if tied else (1, "dx,xv->dv")
    h_DX = jax.lax.optimization_barrier(h_XD.T) if piece else h_XD.T

    def add(dhead, start, parts):
        part = jnp.einsum(spec, h_DX, parts[0], preferred_element_type=jnp.float32)
        if part.shape == dhead.shape:
            return dhead + part
        old = jax.lax.dynamic_slice_in_dim(dhead, start, part.shape[axis], axis)
        return jax.lax.dynamic_update_slice_in_dim(dhead, old + part, start, axis)

    return dh_XD, _fold(add, dhead, (dz_XV,), piece, fill=0)


def _grads(dh, dhead, hidden, head):
    """The blocks' gradients as those of hidden and head; a head that is frozen has none."""
    T = hidden.shape[0] * hidden.shape[1]
    dh = dh.reshape(-1, hidden.shape[-1])[:T].reshape(hidden.shape)
    return dh, None if dhead is None else dhead.astype(head.dtype)


def _scaled(grads, g):
    return (a if a is None else (g * a).astype(a.dtype) for a in grads)


def _pick(z_XV, y_X):
    """z of y by a masked sum: it stays local where the vocabulary is sharded, a gather need not."""
    return jnp.sum(jnp.where(jnp.arange(z_XV.shape[1])[None] == y_X[:, None], z_XV, 0.0), axis=-1)


def _blocks(block: int, arrays):
    """[B, T, ...] -> [blocks, block, ...], zero-padded; padding carries no weight. Also returns B * T."""
    flat = [a.reshape((a.shape[0] * a.shape[1], *a.shape[2:])) for a in arrays]
    T = flat[0].shape[0]
    block = min(block, T)
    pad = -T % block
    flat = [jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)) for a in flat]
    return [a.reshape(((T + pad) // block, block, *a.shape[1:])) for a in flat], T
