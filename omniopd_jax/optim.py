"""The optax chain: global-norm clipping, AdamW, a schedule."""

import jax
import optax


def make_schedule(cfg):
    """Learning rate by update: linear warm-up over `warmup_steps`, then constant, linear or cosine to
    `min_learning_rate`, or `wsd`: constant, and linear over the last `decay_steps`.

    A batch makes `num_iterations` updates, and each of them counts.
    """
    o = cfg.optimizer
    left = max(1, cfg.num_steps * cfg.num_iterations - o.warmup_steps)
    decay = min(left, o.decay_steps or -(-left // 10))
    after = {
        "constant": optax.constant_schedule(o.learning_rate),
        "linear": optax.linear_schedule(o.learning_rate, o.min_learning_rate, left),
        "cosine": optax.cosine_decay_schedule(
            o.learning_rate, left, alpha=o.min_learning_rate / (o.learning_rate or 1)
        ),
        "wsd": optax.linear_schedule(o.learning_rate, o.min_learning_rate, decay, left - decay),
    }[o.schedule]
    if not o.warmup_steps:
        return after
    # The first update already moves: a rate of exactly 0 would pay for a batch and throw it away.
    warmup = optax.linear_schedule(o.learning_rate / o.warmup_steps, o.learning_rate, max(1, o.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [o.warmup_steps])


def make_optimizer(cfg) -> optax.GradientTransformation:
    """Clipping by global norm (`max_grad_norm`, 0 = off), then AdamW; no weight decay on norms, biases and `a_log`.

    `mu_dtype` is what the first moment is kept in between updates; gradients and second moment stay float32.
    """
    o = cfg.optimizer
    clip = optax.clip_by_global_norm(o.max_grad_norm) if o.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(cfg),
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        mask=decayed,
        mu_dtype=o.mu_dtype,
    )
    return optax.chain(clip, adamw)


def decayed(params: dict) -> dict:
    """True on matrices, False on norms, biases and the decays of linear attention, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(w in jax.tree_util.keystr(path) for w in ("norm", "bias", "a_log")), params
    )
