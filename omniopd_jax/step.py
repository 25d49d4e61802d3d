"""The two jitted passes of a step: `score_step` (no gradient) and `train_step` (the update).

Both are pure. The hidden state that produces response token t is at index prompt_length + t - 1 of its row; one
function owns that index (`response_hidden`), here and nowhere else.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from omniopd_jax import measures, model, objective, optim, vocab
from omniopd_jax.model import cpu, lora
from omniopd_jax.parallel import packing, replicas, sharding
from omniopd_jax.run import batching
from omniopd_jax.run.state import TrainState


def response_places(prompt_length_B, T: int):
    """at_BT: y_t is at prompt_length + t of its row."""
    return prompt_length_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]


def response_hidden(hidden_RLD, at_ZX):
    """hidden_ZXD: the states whose distributions produce the tokens at `at_ZX`: each is one place before its token.

    Places are counted along a row (Z = R, X = T), or along R / Z packed rows laid end to end (packing.py).
    """
    return _gather(hidden_RLD, at_ZX - 1)


def response_tokens(token_RL, at_ZX):
    """target_ZX: the tokens y_t themselves; places past the end repeat the last token."""
    return _gather(token_RL, at_ZX)


def _gather(a_RL, index_ZX):
    a_ZL = a_RL.reshape(index_ZX.shape[0], -1, *a_RL.shape[2:])
    index_ZX = jnp.minimum(index_ZX, a_ZL.shape[1] - 1)
    return jnp.take_along_axis(a_ZL, index_ZX.reshape(*index_ZX.shape, *(1,) * (a_ZL.ndim - 2)), axis=1)


def score(
    params: dict, tokens, prompt_length_B, T: int, *, model_cfg, block: int, micro_batches: int,
    compute: model.Compute | None = None,
):  # fmt: skip
    """Log-prob and entropy of every response token under `params`, by the training graph (method.md, section 2).

    Args:
      tokens: token_BL, or the `packing.Packed` of the same responses; prompt_length_B: both as in `objective.Batch`.
      T: response positions to score.
      block: positions of a block of the vocabulary pass.
      micro_batches: rows are scored in as many parts.
      compute: None: float32 on the default device.

    Returns:
      vocab.TokenStats, [B, T], float32; what is past a row's length means nothing.
    """
    compute = compute or model.Compute()
    mesh, columns = compute.mesh, cpu.vocab_columns(compute.mesh)
    params = model.cast_layers(replicas.replicate(params, mesh, compute.dtype), compute.dtype)

    def one(rows):
        token, segment, position, at = rows
        hidden_RLD = model.hidden(params, model_cfg, token, position_BL=position, segment_BL=segment, compute=compute)
        hidden_ZXD, target_ZX = response_hidden(hidden_RLD, at), response_tokens(token, at)

        def stats(head, rows):
            return jnp.float32(0), vocab.token_stats(rows[0], head, rows[1], block=block, columns=columns)

        return replicas.over_rows(stats, mesh, model.stored_head(params), (hidden_ZXD, target_ZX))[1]

    stats = jax.lax.map(one, _rows(tokens, prompt_length_B, T, micro_batches, mesh))
    return _in_place(stats, tokens, T, mesh)


def loss_and_grads(
    params,
    ref_params,
    batch: objective.Batch,
    weight_BT,
    mask_BT,
    *,
    model_cfg,
    cfg,
    compute: model.Compute | None = None,
    teacher_params=None,
    teacher_cfg=None,
    divergence_BT=None,
    average=None,
):
    """The loss and its gradient, summed over micro-batches: weight and mask are already divided by global counts.

    `params` are what is trained (`TrainState.params`), `ref_params` the frozen reference, with LoRA the base of both
    passes. `divergence_BT` weighs the divergence from another distribution; None: there is none. That is the white-box
    teacher's (`teacher_params`, with the student's tokenizer), or where the objective has a scorer, one of the
    student's own under `batch.context`: of the reference, of the `average` (`TrainState.average`), or of the student as
    it stands, which takes no second copy of the weights.

    Returns:
      (loss, grads, vocab.LossStats [B, T]).
    """
    compute = compute or model.Compute()
    T, mesh, dtype = weight_BT.shape[1], compute.mesh, compute.dtype
    own = objective.of(cfg)
    scorer = own.scorer if divergence_BT is not None else None
    ref_compute = dataclasses.replace(compute, host_layers=cfg.anchor.ref_offload)
    frozen = _frozen(ref_params, cfg, mesh, dtype)
    ref = frozen if cfg.anchor.kl_coef else None
    if not cfg.lora.rank:
        params = replicas.replicate(params, mesh)
    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))  # of the masters: micro-batches add up in float32
    params = model.cast_layers(params, dtype)
    other, other_cfg, other_compute = None, model_cfg, compute  # None: the student as it stands, if there is a scorer
    if divergence_BT is not None and scorer is None:
        other, other_cfg = _constant(teacher_params, mesh, dtype), teacher_cfg
    elif scorer is not None and scorer.averaged:
        other = policy(_constant(average, mesh, dtype, whole=not cfg.lora.rank), frozen, cfg)
    elif scorer is not None and scorer.reference:
        other, other_compute = frozen, ref_compute
    settings = {"block": cfg.vocab_block, "columns": cpu.vocab_columns(mesh), "head_grad": not cfg.lora.rank}

    def over_vocabulary(heads, rows):
        head, ref_head, other_head = heads
        h, ref_h, other_h, target, weight, mask, apart = rows
        other = None
        if apart is not None:
            other = vocab.Other(other_h, other_head, apart, own.divergence, cfg.context.clip if scorer else 0.0)
        return vocab.weighted_nll_and_kl(
            h, head, ref_h, ref_head, target, weight, mask, beta=cfg.anchor.kl_coef, other=other, **settings
        )

    def micro_loss(params, rows):
        (*place, weight, mask, apart), context_place = rows

        def hidden(p, p_cfg, p_compute, place):
            if p is None:
                return None
            token, segment, position, at = place
            states = model.hidden(p, p_cfg, token, position_BL=position, segment_BL=segment, compute=p_compute)
            return response_hidden(states, at)

        student = policy(params, frozen, cfg)
        h = hidden(student, model_cfg, compute, place)
        with jax.named_scope("reference"):
            ref_h = hidden(ref, model_cfg, ref_compute, place)
        beside = jax.lax.stop_gradient(student) if scorer and other is None else other
        with jax.named_scope("context" if scorer else "teacher"):
            other_h = hidden(beside, other_cfg, other_compute, context_place or place)
        heads = tuple(None if p is None else model.stored_head(p) for p in (student, ref, beside))
        rows = (h, ref_h, other_h, response_tokens(place[0], place[3]), weight, mask, apart)
        return replicas.over_rows(over_vocabulary, mesh, heads, rows)

    def add(carry, rows):
        (loss, stats), grads = jax.value_and_grad(micro_loss, has_aux=True)(params, rows)
        grads = jax.tree.map(lambda total, g: total + g.astype(total.dtype), carry[1], grads)
        return (carry[0] + loss, grads), stats

    tokens = batch.token_BL if batch.packed is None else batch.packed
    rows = _rows(tokens, batch.prompt_length_B, T, cfg.micro_batches, mesh, weight_BT, mask_BT, divergence_BT)
    context = None
    if scorer is not None:
        behind = batch.context
        assert behind is not None, "a scorer needs the responses behind their privileged prompts"
        context = _rows(behind.tokens, behind.prompt_length_B, T, cfg.micro_batches, mesh)
    rows = (rows, context)
    (loss, grads), stats = jax.lax.scan(add, zero, rows)
    return (
        loss,
        replicas.sum_replicas(grads, model.param_shardings(model_cfg, mesh), mesh),
        _in_place(stats, tokens, T, mesh),
    )


def _constant(params: dict, mesh, dtype, *, whole: bool = True) -> dict:
    """Parameters without gradient, as a pass takes them; `whole`: with an embedding and a head, not adapters."""
    params = jax.lax.stop_gradient(params)
    return model.cast_layers(replicas.replicate(params, mesh, dtype) if whole else params, dtype)


def _frozen(ref_params: dict | None, cfg, mesh, dtype) -> dict | None:
    """The reference as a pass takes it; with `anchor.ref_offload` its layers are cast as they arrive."""
    if not holds_reference(cfg):
        return None
    assert ref_params is not None, "this update reads the reference"
    frozen = replicas.replicate(jax.lax.stop_gradient(ref_params), mesh, dtype)
    return frozen if cfg.anchor.ref_offload else model.cast_layers(frozen, dtype)


def policy(params: dict, ref_params: dict | None, cfg) -> dict:
    """The whole model that `params` (`TrainState.params`) stand for: themselves, or with LoRA the base with them
    attached."""
    if not cfg.lora.rank:
        return params
    assert ref_params is not None, "adapters need their base"
    return lora.attach(ref_params, params)


def update(
    state: TrainState,
    ref_params,
    batch: objective.Batch,
    stats: vocab.TokenStats | None,
    teacher_params=None,
    *,
    model_cfg,
    cfg,
    compute: model.Compute | None = None,
    teacher_cfg=None,
):
    """One optimizer update from one scored and audited batch.

    Args:
      state: donated.
      ref_params: the frozen initial student (`holds_reference`); else it is not looked at.
      batch: the global batch with its feedback.
      stats: what `score` returned for it with `policy(state.params, ..)`: the one that sampled it. None: the objective
        reads none (`objective.needs_scores`), and the batch says its width.

    Returns:
      (state, metrics of scalars, objective.ChunkTargets for the audit log; None where nothing is audited).
    """
    loss, grads = jnp.float32(0), None
    found = []  # of each part of a mix that has rows of its own, the first being the batch's own
    for rows, group in zip((batch, *batch.more), objective.row_groups(cfg), strict=True):
        unscored = jnp.zeros((len(rows.length_B), rows.width), jnp.float32)
        logp_BT = stats.logp_BT if stats is not None and rows is batch else unscored
        weights = objective.token_weights(logp_BT, rows, group)
        part, grad, loss_stats = loss_and_grads(
            state.params, ref_params, rows, weights.weight_BT, weights.mask_BT, model_cfg=model_cfg, cfg=cfg,
            compute=compute, teacher_params=teacher_params, teacher_cfg=teacher_cfg,
            divergence_BT=weights.divergence_BT, average=state.average,
        )  # fmt: skip
        loss, grads = loss + part, grad if grads is None else jax.tree.map(jnp.add, grads, grad)
        found.append((logp_BT, weights, loss_stats))
    logp_BT, weights, loss_stats = found[0]
    with jax.named_scope("optimizer"):
        updates, opt_state = optim.make_optimizer(cfg).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    own = objective.of(cfg)
    targets = objective.chunk_targets(logp_BT, batch, cfg) if own.audited else None
    real_BT = objective.response_mask(batch.length_B, logp_BT.shape[1])
    metrics = {
        "loss": loss,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": jnp.float32(optim.make_schedule(cfg)(state.step)),
    } | measures.of_batch(batch, targets, None if stats is None else stats.entropy_BT, cfg)
    for rows, group in zip(batch.more, objective.row_groups(cfg)[1:], strict=True):
        metrics |= measures.lengths(rows, "continuation" if objective.of(group[0][1]).samples else "solutions")
    if stats is not None:
        metrics["score/update_logp_gap"] = (jnp.abs(loss_stats.logp_BT - stats.logp_BT) * real_BT).max()
    if cfg.num_iterations > 1:
        clipped_BT = objective.clipped(logp_BT, batch, cfg) * real_BT
        metrics["clip_fraction"] = clipped_BT.sum() / jnp.maximum(real_BT.sum(), 1.0)
    if cfg.anchor.kl_coef:
        metrics["anchor/kl_ref_to_student_exact"] = anchored_mean(loss_stats.kl_BT, weights.mask_BT)
    if weights.divergence_BT is not None:
        metrics |= measures.divergence(loss_stats.divergence_BT, weights.divergence_BT, own, cfg)
    average = state.average
    if average is not None:
        keep = cfg.context.ema_decay
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, params)
    new = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1, average=average)
    return new, metrics, targets


def updates(
    state: TrainState, ref_params, batch: objective.Batch, stats: vocab.TokenStats | None, teacher_params=None, *,
    model_cfg, cfg, compute: model.Compute | None = None, teacher_cfg=None,
):  # fmt: skip
    """`num_iterations` updates from one batch, as `update`; the ratio is to the policy that sampled (arXiv 2402.03300).

    Every update but the first scores the batch anew. `state.step` counts batches, so that it stays the data position.

    Returns:
      (state, metrics, means over the updates; objective.ChunkTargets of the last).
    """
    one = functools.partial(update, model_cfg=model_cfg, cfg=cfg, compute=compute, teacher_cfg=teacher_cfg)
    if cfg.num_iterations == 1:
        return one(state, ref_params, batch, stats, teacher_params)
    assert stats is not None, "a ratio needs the scores of the policy that sampled"
    first, T = state.step, stats.logp_BT.shape[1]
    batch = dataclasses.replace(batch, old_logp_BT=stats.logp_BT)

    def rescore(params):
        tokens = batch.token_BL if batch.packed is None else batch.packed
        return score(
            policy(params, ref_params, cfg),
            tokens,
            batch.prompt_length_B,
            T,
            model_cfg=model_cfg,
            block=cfg.vocab_block,
            micro_batches=cfg.micro_batches,
            compute=compute,
        )

    def body(carry, i):
        state, stats = carry
        rate = optim.make_schedule(cfg)(first * cfg.num_iterations + i)
        state, metrics, targets = one(state, ref_params, batch, stats, teacher_params)
        last = i + 1 == cfg.num_iterations
        stats = jax.lax.cond(last, lambda params: stats, rescore, state.params)
        return (state, stats), (metrics | {"learning_rate": jnp.float32(rate)}, targets)

    count = jnp.arange(cfg.num_iterations, dtype=jnp.int32)
    (state, _), (metrics, targets) = jax.lax.scan(body, (state, stats), count)
    metrics = jax.tree.map(lambda a: a.astype(jnp.float32).mean(0), metrics)
    return dataclasses.replace(state, step=first + 1), metrics, jax.tree.map(lambda a: a[-1], targets)


def anchored_mean(kl_BT, mask_BT):
    """Mean KL over the anchor's tokens, without its coefficient; 0 where there are none."""
    on_BT = (mask_BT > 0).astype(jnp.float32)
    return (kl_BT * on_BT).sum() / jnp.maximum(on_BT.sum(), 1.0)


@flax.struct.dataclass
class Steps:
    """The jitted passes, with their shardings; built once a run by `make_steps`."""

    score_step: object = flax.struct.field(pytree_node=False)
    train_step: object = flax.struct.field(pytree_node=False)
    state_shardings: TrainState = flax.struct.field(pytree_node=False)
    reference_shardings: dict | None = flax.struct.field(pytree_node=False)


def make_steps(model_cfg: model.ModelConfig, cfg, *, compute: model.Compute | None = None, teacher_cfg=None) -> Steps:
    """Jits `score` and `updates` for `compute.mesh`: rows over (data, fsdp), parameters and optimizer state by their
    rules.

    `cfg` must be hashable (ml_collections.FrozenConfigDict). The state is donated: the caller's old one is gone.
    """
    compute = compute or model.Compute()
    mesh = compute.mesh
    rows, all_ = sharding.rows(mesh), sharding.replicated(mesh)
    state, reference = state_shardings(model_cfg, cfg, mesh), reference_shardings(model_cfg, cfg, mesh)
    teacher = model.param_shardings(teacher_cfg, mesh) if teacher_cfg else None

    def score_rows(params, tokens, prompt_length_B, T: int):
        count = batching.micro_batches(cfg, len(prompt_length_B))
        how = {"model_cfg": model_cfg, "block": cfg.vocab_block, "micro_batches": count, "compute": compute}
        return score(params, tokens, prompt_length_B, T, **how)

    score_step = jax.jit(
        score_rows,
        static_argnums=(3,),
        in_shardings=(policy(state.params, reference, cfg), rows, rows),
        out_shardings=rows,
    )
    train_step = jax.jit(
        functools.partial(updates, model_cfg=model_cfg, cfg=cfg, compute=compute, teacher_cfg=teacher_cfg),
        in_shardings=(state, reference, rows, rows, teacher),
        out_shardings=(state, all_, rows),
        donate_argnums=(0,),
    )
    return Steps(score_step, train_step, state, reference)


def trained(model_cfg, cfg) -> dict:
    """`model.Param`s of what is trained: of the whole model, or of the adapters."""
    return lora.trained_table(model_cfg, cfg.lora)


def abstract_state(model_cfg, cfg) -> TrainState:
    """TrainState of ShapeDtypeStructs."""
    table = trained(model_cfg, cfg)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), table, is_leaf=model.is_param)
    return jax.eval_shape(lambda p: new_state(p, cfg, jax.random.key(0)), params)


def state_shardings(model_cfg, cfg, mesh) -> TrainState:
    """The sharding of every leaf of the state: eval_shape -> shardings -> created already sharded."""
    shape = abstract_state(model_cfg, cfg)
    params = model.table_shardings(trained(model_cfg, cfg), mesh)
    all_ = sharding.replicated(mesh)
    opt = sharding.state_shardings(shape.opt_state, shape.params, params, mesh)
    average = None if shape.average is None else params
    return TrainState(params, opt, all_, all_, average)  # type: ignore[arg-type]  # shardings in place of arrays


def holds_reference(cfg) -> bool:
    """Whether an update reads the frozen model: for the anchor, as the adapters' base, or to score with a context."""
    scorer = objective.of(cfg).scorer
    return bool(cfg.anchor.kl_coef or cfg.lora.rank or (scorer and scorer.reference))


def reference_shardings(model_cfg, cfg, mesh) -> dict | None:
    """Shardings of the frozen reference: as the parameters'; with `anchor.ref_offload` its layers' matrices in host
    memory.

    Embedding and head are needed whole at once, and a stack of vectors stays too: TPU cannot cut one bfloat16 row out
    of it in host memory. None: none is held.
    """
    if not holds_reference(cfg):
        return None
    where = model.param_shardings(model_cfg, mesh)
    if not cfg.anchor.ref_offload:
        return where

    def one(p: model.Param, s):
        return s.with_memory_kind("pinned_host") if len(p.hf_shape) > 1 else s

    layers = jax.tree.map(one, model.table(model_cfg)["layers"], where["layers"], is_leaf=model.is_param)
    return where | {"layers": layers}


def abstract_reference(model_cfg, cfg, mesh) -> dict | None:
    """The reference as sharded ShapeDtypeStructs, in `anchor.ref_dtype`."""
    where = reference_shardings(model_cfg, cfg, mesh)
    return where and jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, jnp.dtype(cfg.anchor.ref_dtype), sharding=s),
        model.table(model_cfg), where, is_leaf=model.is_param,
    )  # fmt: skip


def new_state(params: dict, cfg, key: jax.Array) -> TrainState:
    """The state before the first update. `params` are float32, what is trained; `key` is the run's."""
    scorer = objective.of(cfg).scorer
    average = jax.tree.map(lambda a: a + 0, params) if scorer and scorer.averaged else None
    return TrainState(params, optim.make_optimizer(cfg).init(params), jnp.int32(0), key, average)


def create_state(params: dict, cfg, steps: Steps, key: jax.Array) -> TrainState:
    """`new_state`, jitted with its output already sharded."""
    return jax.jit(functools.partial(new_state, cfg=cfg), out_shardings=steps.state_shardings)(params, key=key)


def _rows(tokens, prompt_length_B, T: int, n: int, mesh, *values_BT):
    """(tokens, segments, positions, places of the responses, *values) of each of n micro-batches, in front."""
    if not isinstance(tokens, packing.Packed):
        return _split((tokens, None, None, response_places(prompt_length_B, T), *values_BT), n)
    some_BT, tree = jax.tree.flatten(values_BT)  # without those that are None
    values_ZX = jax.tree.unflatten(tree, packing.pack_values(tokens, some_BT, mesh))
    return _split((tokens.token_RL, tokens.segment_RL, tokens.position_RL, tokens.place_ZX, *values_ZX), n)


def _in_place(stats, tokens, T: int, mesh):
    """The micro-batches' stats as [B, T], in the batch's own order."""
    stats = _join(stats)
    if not isinstance(tokens, packing.Packed):
        return stats
    values_ZX, tree = jax.tree.flatten(stats)
    return jax.tree.unflatten(tree, packing.unpack_values(tokens, values_ZX, T, mesh))


def _split(tree, n: int):
    """[B, ...] -> [n, B/n, ...] so that no row changes its device: micro-batch i takes every n-th row."""
    return jax.tree.map(lambda a: a.reshape((a.shape[0] // n, n, *a.shape[1:])).swapaxes(0, 1), tree)


def _join(tree):
    """The inverse of `_split`."""
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape((-1, *a.shape[2:])), tree)
