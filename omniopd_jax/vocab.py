"""The pass over the vocabulary, in blocks of positions: log-prob, entropy and the exact KL to the reference.

No [T, V] array is ever alive, only [block, V]. The weights and the anchor mask are constants when the loss is taken, so
the gradients of hidden and head are formed in the forward pass, beside the loss, and the backward pass only scales them:
one walk over the vocabulary, not two. The head's gradient is accumulated in float32.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp


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


def token_stats(hidden_BTD, head_DV, target_BT, *, block: int, temperature=1.0, softcap=None) -> TokenStats:
    """Log-prob of the targets and exact entropy, float32, full vocabulary, no gradient (method.md, section 2).

    Args:
      hidden_BTD: hidden state that *produces* each target: of row index prompt_length + t - 1 for y_t.
      head_DV: output projection.
      target_BT: int32 tokens y_t.
      block: positions a block.
      temperature, softcap: logits = cap * tanh(raw / cap) / temperature.
    """
    blocks, T = _blocks(block, (hidden_BTD, target_BT))

    def body(_, xs):
        h, y = xs
        logp_XV, _ = _log_softmax(h, head_DV, temperature, softcap)
        entropy = -jnp.sum(jnp.exp(logp_XV) * logp_XV, axis=-1)
        return None, (_pick(logp_XV, y), entropy)

    with jax.named_scope("vocab_stats"):
        _, (logp, entropy) = jax.lax.scan(body, None, blocks)
    shape = target_BT.shape
    return TokenStats(*(jax.lax.stop_gradient(a.reshape(-1)[:T].reshape(shape)) for a in (logp, entropy)))


def weighted_nll_and_kl(
    hidden, head, ref_hidden, ref_head, target, weight, anchor_mask, *, beta, block: int, temperature=1.0, softcap=None,
    head_grad: bool = True,
):  # fmt: skip
    """sum_t -weight_t * logp_t + beta * mask_t * KL(ref || student)_t, the KL exact over the vocabulary.

    Args:
      hidden: hidden_BTD that produces each target; carries gradient.
      head: head_DV; carries gradient.
      ref_hidden, ref_head: the same of the frozen reference; no gradient. None, None: no anchor term is computed.
      target: int32 target_BT.
      weight, anchor_mask: float32 [B, T], constants, already divided by their global counts.
      beta: coefficient of the KL (`anchor.kl_coef`).
      block, temperature, softcap: as in `token_stats`.
      head_grad: False where the head is frozen: its gradient is zero, and neither formed nor held.

    Returns:
      (loss_sum, LossStats): the stats are without gradient and without beta.
    """
    if ref_hidden is None:
        ref_hidden, ref_head = hidden[..., :0], head[:0]
    args = jax.lax.stop_gradient((ref_hidden, ref_head, weight.astype(jnp.float32), anchor_mask.astype(jnp.float32)))
    return _loss(hidden, head, *args, target, jnp.float32(beta), block, float(temperature), softcap, head_grad)


def reverse_kl(
    hidden, head, teacher_hidden, teacher_head, weight, *, block: int, temperature=1.0, softcap=None, teacher_softcap=None,
    head_grad: bool = True,
):  # fmt: skip
    """sum_t weight_t * KL(student || teacher)_t, exact over the vocabulary: white-box OPD with the teacher in process.

    Args:
      hidden, head: of the student, carry gradient. teacher_hidden, teacher_head: of the teacher, no gradient; its width
        may differ, its vocabulary may not.
      weight: float32 [B, T], already normalised.
      head_grad: as in `weighted_nll_and_kl`.

    Returns:
      (loss_sum, kl_BT): nats, the second without gradient.
    """
    rest = jax.lax.stop_gradient((teacher_hidden, teacher_head, weight.astype(jnp.float32)))
    caps = (softcap, teacher_softcap)
    return _reverse(hidden, head, *rest, block, float(temperature), caps, head_grad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _reverse(*args):
    return _reverse_walk(*args, with_grad=False)[0]


def _reverse_fwd(*args):
    return _reverse_walk(*args, with_grad=True)


def _reverse_bwd(block, temperature, caps, head_grad, grads, cotangent):
    return (*_scaled(grads, cotangent[0]), None, None, None)


_reverse.defvjp(_reverse_fwd, _reverse_bwd)


def _reverse_walk(hidden, head, teacher_hidden, teacher_head, weight, block, temperature, caps, head_grad, *, with_grad):
    blocks, T = _blocks(block, (hidden, teacher_hidden, weight))

    def body(carry, xs):
        loss, dhead_DV = carry
        h, th, w = xs
        logp_XV, slope_XV = _log_softmax(h, head, temperature, caps[0])
        gap_XV = logp_XV - _log_softmax(th, teacher_head, temperature, caps[1])[0]
        p_XV = jnp.exp(logp_XV)
        kl = jnp.sum(p_XV * gap_XV, axis=-1)
        loss += jnp.sum(w * kl)
        if not with_grad:
            return (loss, dhead_DV), (kl, None)
        dz_XV = w[:, None] * p_XV * (gap_XV - kl[:, None])
        dh, dhead_DV = _head_grads(h, head, dz_XV, slope_XV, temperature, dhead_DV)
        return (loss, dhead_DV), (kl, dh)

    dhead = jnp.zeros(head.shape, jnp.float32) if with_grad and head_grad else None
    with jax.named_scope("vocab_reverse_kl"):
        (loss, dhead), (kl, dh) = jax.lax.scan(body, (jnp.float32(0), dhead), blocks)
    B, T_, D = hidden.shape
    out = (loss, kl.reshape(-1)[:T].reshape(B, T_))
    return out, _grads(dh, dhead, hidden, head) if with_grad else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def _loss(*args):
    return _walk(*args, with_grad=False)[0]


def _loss_fwd(*args):
    return _walk(*args, with_grad=True)


def _loss_bwd(block, temperature, softcap, head_grad, grads, cotangent):
    # the cotangent of the loss; the stats carry none
    return (*_scaled(grads, cotangent[0]), None, None, None, None, None, None)


_loss.defvjp(_loss_fwd, _loss_bwd)


def _walk(
    hidden, head, ref_hidden, ref_head, weight, mask, target, beta, block, temperature, softcap, head_grad, *, with_grad
):
    """Loss, stats and, in the same walk, d loss / d hidden and d loss / d head."""
    blocks, T = _blocks(block, (hidden, ref_hidden, target, weight, mask))
    anchored = ref_hidden.shape[-1] > 0

    def body(carry, xs):
        loss, dhead_DV = carry
        h, rh, y, w, m = xs
        logp_XV, slope_XV = _log_softmax(h, head, temperature, softcap)
        logp = _pick(logp_XV, y)
        kl = jnp.zeros_like(logp)
        if anchored:
            ref_logp_XV, _ = _log_softmax(rh, ref_head, temperature, softcap)
            ref_p_XV = jnp.exp(ref_logp_XV)
            kl = jnp.sum(ref_p_XV * (ref_logp_XV - logp_XV), axis=-1)
        loss += jnp.sum(-w * logp) + beta * jnp.sum(m * kl)
        if not with_grad:
            return (loss, dhead_DV), (logp, kl, None)
        # d/dz of -logp is p - onehot, of KL(ref || p) is p - ref; both in one array.
        coef = w + beta * m if anchored else w
        dz_XV = coef[:, None] * jnp.exp(logp_XV)
        if anchored:
            dz_XV -= (beta * m)[:, None] * ref_p_XV
        dz_XV = jnp.where(jnp.arange(dz_XV.shape[1])[None] == y[:, None], dz_XV - w[:, None], dz_XV)
        dh, dhead_DV = _head_grads(h, head, dz_XV, slope_XV, temperature, dhead_DV)
        return (loss, dhead_DV), (logp, kl, dh)

    dhead = jnp.zeros(head.shape, jnp.float32) if with_grad and head_grad else None
    with jax.named_scope("vocab_loss"):
        (loss, dhead), (logp, kl, dh) = jax.lax.scan(body, (jnp.float32(0), dhead), blocks)
    B, T_, D = hidden.shape
    stats = LossStats(*(a.reshape(-1)[:T].reshape(B, T_) for a in (logp, kl)))
    return (loss, stats), _grads(dh, dhead, hidden, head) if with_grad else None


def _log_softmax(h_XD, head_DV, temperature, softcap):
    """float32 log-probs of a block, and the soft-cap's slope (None without one)."""
    z = jnp.einsum("xd,dv->xv", h_XD, head_DV.astype(h_XD.dtype), preferred_element_type=jnp.float32)
    slope = None
    if softcap is not None:
        t = jnp.tanh(z / softcap)
        z, slope = softcap * t, 1 - t * t
    return jax.nn.log_softmax(z / temperature, axis=-1), slope


def _head_grads(h_XD, head_DV, dz_XV, slope_XV, temperature, dhead_DV):
    """From d loss / d logits of a block: d / d hidden in its dtype, and d / d head added to `dhead_DV` (None: frozen)."""
    dz_XV = (dz_XV if slope_XV is None else dz_XV * slope_XV) / temperature
    dz_XV = dz_XV.astype(h_XD.dtype)
    dh = jnp.einsum("xv,dv->xd", dz_XV, head_DV.astype(h_XD.dtype), preferred_element_type=jnp.float32)
    if dhead_DV is not None:
        dhead_DV += jnp.einsum("xd,xv->dv", h_XD, dz_XV, preferred_element_type=jnp.float32)
    return dh.astype(h_XD.dtype), dhead_DV


def _grads(dh, dhead, hidden, head):
    """The blocks' gradients as those of hidden and head; a head that is frozen has none."""
    T = hidden.shape[0] * hidden.shape[1]
    dh = dh.reshape(-1, hidden.shape[-1])[:T].reshape(hidden.shape)
    return dh, None if dhead is None else dhead.astype(head.dtype)


def _scaled(grads, g):
    return (a if a is None else (g * a).astype(a.dtype) for a in grads)


def _pick(logp_XV, y_X):
    """logp of y by a masked sum: it stays local where the vocabulary is sharded, a gather need not."""
    return jnp.sum(jnp.where(jnp.arange(logp_XV.shape[1])[None] == y_X[:, None], logp_XV, 0.0), axis=-1)


def _blocks(block: int, arrays):
    """[B, T, ...] -> [blocks, block, ...], zero-padded; padding carries no weight. Also returns B * T."""
    flat = [a.reshape((a.shape[0] * a.shape[1], *a.shape[2:])) for a in arrays]
    T = flat[0].shape[0]
    block = min(block, T)
    pad = -T % block
    flat = [jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)) for a in flat]
    return [a.reshape(((T + pad) // block, block, *a.shape[1:])) for a in flat], T
