"""Metrics of an update's rows, made on the devices beside the update: lengths, entropy, chunks, a divergence."""

import dataclasses

import jax.numpy as jnp

from omniopd_jax import objective
from omniopd_jax.objective import Batch, ChunkTargets


def divergence(divergence_BT, weight_BT, own: objective.Objective, cfg) -> dict:
    """The mean divergence from the other distribution over the tokens that it counts on, its direction in the name."""
    on_BT = (weight_BT > 0).astype(jnp.float32)
    tokens = jnp.maximum(on_BT.sum(), 1.0)
    name = {"forward": "kl_other_to_student_exact", "reverse": "kl_student_to_other_exact"}[own.divergence]
    out = {f"divergence/{name}": (divergence_BT * on_BT).sum() / tokens}
    if own.scorer and cfg.context.clip:
        out["divergence/clipped_fraction"] = ((divergence_BT >= cfg.context.clip) * on_BT).sum() / tokens
    return out


def lengths(batch: Batch, name: str) -> dict:
    """Tokens of a batch's rows, without those that never came: device scalars."""
    length_B = batch.length_B
    rows = jnp.maximum((length_B > 0).sum(), 1)
    return {f"{name}/mean_length": length_B.sum() / rows, f"{name}/max_length": length_B.max()}


def of_batch(batch: Batch, targets: ChunkTargets | None, entropy_BT, cfg) -> dict:
    """What a step's responses and chunks looked like: device scalars, means over kept chunks unless the name says
    otherwise.

    Args:
      targets: `chunk_targets` of an audited objective; None: `audit/*` is left out, but for what all chunks have.
      entropy_BT: None where the batch was not scored; then `entropy` is left out.
    """
    out = lengths(
        batch, "completions" if objective.of(cfg).cut is None or not objective.of(cfg).samples else "continuation"
    )
    if entropy_BT is None:
        return out
    real_BT = objective.response_mask(batch.length_B, entropy_BT.shape[1])
    tokens = jnp.maximum(real_BT.sum(), 1.0)
    out["entropy"] = (entropy_BT * real_BT).sum() / tokens
    if not objective.of(cfg).chunks:
        return out
    keep = objective.kept(batch, cfg).astype(jnp.float32)
    enough_BM = objective.kept(dataclasses.replace(batch, ratio_BM=None), cfg)
    count = jnp.maximum(keep.sum(), 1.0)
    at_peak_BM = jnp.take_along_axis(entropy_BT, jnp.clip(batch.peak_BM, 0, entropy_BT.shape[1] - 1), axis=1)

    def mean(x):
        return (x * keep).sum() / count

    out |= {
        "audit/chunks": keep.sum(),
        "audit/dropped": (batch.peak_BM >= 0).sum() - enough_BM.sum(),
        "audit/token_fraction": keep.sum() * cfg.audit.chunk_tokens / tokens,
        "audit/entropy_at_peak": mean(at_peak_BM),
    }
    if targets is None:
        return out
    pi_hat = mean(targets.pi_hat_BM)
    share_BM = batch.k_sem_BM / jnp.maximum(batch.n_BM, 1)
    if batch.ratio_BM is not None:
        out["audit/stale_dropped"] = (enough_BM & ~targets.keep_BM).sum()
        out["audit/ratio_mean"] = mean(jnp.where(targets.keep_BM, batch.ratio_BM, 0.0))
    return out | {
        "audit/k_sem_mean": mean(jnp.where(targets.keep_BM, batch.k_sem_BM, 0.0)),
        "audit/n_eff": mean(batch.n_BM.astype(jnp.float32)),
        "audit/pi_hat_mean": pi_hat,
        "audit/pi_hat_var": mean(jnp.square(targets.pi_hat_BM - pi_hat)),
        "audit/pi_bar_mean": mean(targets.pi_bar_BM),
        "audit/midband_fraction": mean(((share_BM > 0.05) & (share_BM < 0.95)).astype(jnp.float32)),
    }
