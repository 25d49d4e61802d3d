"""The sampler as it was before slots: a whole batch runs until its longest row is done. For comparison alone.

Slots of its cache: prompts are right-padded to P, token t of every row is written at place P + t, and a mask hides the
gap. Finished rows keep their place, their share of every product and their cache.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import model
from omniopd_jax.decode import _layer, prepare
from omniopd_jax.draw import draw
from omniopd_jax.model import attention, linear, rope
from omniopd_jax.parallel import sharding
from omniopd_jax.rollout import Rollout


@flax.struct.dataclass
class SamplerState:
    """Carry of the decode loop. hidden_BD produces the next token; cache: (k_BKSH, v_BKSH) or linear.State by layer."""

    cache: list
    hidden_BD: jax.Array
    prompt_length_B: jax.Array
    key_B: jax.Array
    t: jax.Array
    out: Rollout


def sample(
    params: dict, cfg: model.ModelConfig, prompt_BP, prompt_length_B, key_B, *, max_new_tokens: int, temperature=1.0,
    top_p=1.0, top_k=0, num_samples=1, end_ids=(), first_chunk=256, compute: model.Compute | None = None,
) -> Rollout:  # fmt: skip
    """Samples `num_samples` completions of every prompt.

    Args:
      params: as `prepare` returns them (stacked parameters are prepared here).
      cfg: static.
      prompt_BP: int32, right-padded to a bucket (`bucket`), so that shapes stay few.
      prompt_length_B: int32, at least 1.
      key_B: one PRNG key a *completion* [B * num_samples]; row b's completions are b * num_samples + g. A row draws the
        same numbers in any batch, bucket or host.
      max_new_tokens, temperature, top_p, top_k: traced; temperature 0 is greedy.
      end_ids: tokens that end a row.
      first_chunk: response tokens the cache has room for at first; it doubles while rows go on.
      compute: static; None: float32 on the default device.

    Returns:
      Rollout with [B * num_samples, T] arrays, T <= max_new_tokens rounded up to a chunk.
    """
    compute = compute or model.Compute()
    if isinstance(params["layers"], dict):
        params = prepare(params, cfg, compute=compute)
    where = sharding.replicated_like(jax.tree.leaves(params)[0])
    settings = jax.device_put(
        (np.float32(temperature), np.float32(top_p), np.int32(top_k), np.array(end_ids or (-1,), np.int32)), where
    )
    T = min(first_chunk, -(-max_new_tokens // 8) * 8)
    state = _prefill(params, prompt_BP, prompt_length_B, key_B, cfg=cfg, compute=compute, num_samples=num_samples, T=T)
    while True:
        limit = min(T, max_new_tokens)
        until = jax.device_put(np.int32(limit), where)
        state, done = _decode(params, state, until, *settings, cfg=cfg, compute=compute, P=prompt_BP.shape[1])
        if limit == max_new_tokens or bool(jax.device_get(done)):
            return state.out
        T = min(2 * T, -(-max_new_tokens // 8) * 8)
        state = _grow(state, S=prompt_BP.shape[1] + T, T=T)


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "num_samples", "T"))
def _prefill(params, prompt_BP, prompt_length_B, key_B, *, cfg, compute, num_samples: int, T: int) -> SamplerState:
    B, P = prompt_BP.shape
    position_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    angles = rope.by_kind(cfg, position_BP)
    x_BPD = model.scaled(params["embed"][prompt_BP], cfg)
    cache = []
    for kind, p in zip(cfg.kinds, params["layers"], strict=True):

        def attend(q, k, v, kind=kind):
            cache.append(tuple(jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, T), (0, 0))) for a in (k, v)))
            how = {"backend": compute.attention, "mesh": compute.mesh} | model.attention_of(cfg, kind)
            return attention.attend(q, k, v, length_B=prompt_length_B, **how)

        def recur(qkv, decay, beta, p=p):
            out, state = linear.whole(qkv, p["conv"], decay, beta, cfg, length_B=prompt_length_B)
            cache.append(state)
            return out

        x_BPD = _layer(x_BPD, p, cfg, compute, angles.get(kind), recur if kind == "linear" else attend)
    last_BD = jnp.take_along_axis(x_BPD, prompt_length_B[:, None, None] - 1, axis=1)[:, 0]
    last_BD = model.norm(last_BD, params["final_norm"], cfg)
    cache, last_BD, length_B = jax.tree.map(
        lambda a: jnp.repeat(a, num_samples, axis=0), (cache, last_BD, prompt_length_B)
    )
    R = B * num_samples
    zeros = functools.partial(jnp.zeros, (R, T), jnp.float32)
    out = Rollout(jnp.zeros((R, T), jnp.int32), jnp.zeros(R, jnp.int32), jnp.zeros(R, bool), zeros(), zeros())
    return _constrain(SamplerState(cache, last_BD, length_B, key_B, jnp.int32(0), out), compute.mesh)


def _constrain(state: SamplerState, mesh) -> SamplerState:
    """The state on the mesh: rows over data and fsdp, the cache's heads over tp, whatever the compiler would choose."""

    def put(a, *axes):
        return sharding.constrain(a, mesh, sharding.ROWS, *axes)

    heads = sharding.DECODE_RULES["kv_heads"]
    cache = [
        jax.tree.map(put if isinstance(layer, linear.State) else lambda a: put(a, heads), layer)
        for layer in state.cache
    ]
    return state.replace(
        cache=cache, hidden_BD=put(state.hidden_BD), prompt_length_B=put(state.prompt_length_B),
        out=jax.tree.map(put, state.out),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "P"), donate_argnames=("state",))
def _decode(params, state: SamplerState, limit, temperature, top_p, top_k, end_ids, *, cfg, compute, P: int):
    """Decodes until `limit` tokens or all rows are done. Returns (state, all rows done)."""
    S = next(layer[0].shape[2] for layer in state.cache if not isinstance(layer, linear.State))
    slot_1S = jnp.arange(S, dtype=jnp.int32)[None]

    def cond(s: SamplerState):
        return (s.t < limit) & ~jnp.all(s.out.finished_B)

    def body(s: SamplerState) -> SamplerState:
        with jax.named_scope("draw"):
            z_BV = model.logits(params, cfg, s.hidden_BD)
            u_B = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, s.t)))(s.key_B)
            drawn = draw(z_BV, u_B, temperature, top_p, top_k)
        out = _write(s.out, s.t, drawn, end_ids)
        token_B = jax.lax.dynamic_slice_in_dim(out.token_BT, s.t, 1, axis=1)
        seen_BS = (slot_1S < s.prompt_length_B[:, None]) | ((slot_1S >= P) & (slot_1S <= P + s.t))
        seen = {"full": seen_BS}
        if cfg.window:
            back_BS = jnp.where(slot_1S < P, s.prompt_length_B[:, None] + s.t - slot_1S, P + s.t - slot_1S)
            seen["sliding"] = seen_BS & (back_BS < cfg.window)
        with jax.named_scope("decode"):
            position_B1 = (s.prompt_length_B + s.t)[:, None]
            hidden_BD, cache = _one_token(params, cfg, compute, token_B, position_B1, s.cache, P + s.t, seen)
        return _constrain(s.replace(cache=cache, hidden_BD=hidden_BD, t=s.t + 1, out=out), compute.mesh)

    state = jax.lax.while_loop(cond, body, state)
    return state, jnp.all(state.out.finished_B)


def _one_token(params, cfg, compute, token_B1, position_B1, cache, slot, seen: dict):
    """One token a row through all layers: (hidden_BD after the last norm, the cache with its slot written).

    Args:
      seen: of a kind of layer, the slots [B, S] that it attends to.
    """
    angles = rope.by_kind(cfg, position_B1)
    x_B1D = model.scaled(params["embed"][token_B1], cfg)
    new = []
    for kind, p, held in zip(cfg.kinds, params["layers"], cache, strict=True):

        def attend(q, k, v, held=held, kind=kind):
            k_BKSH = jax.lax.dynamic_update_slice_in_dim(held[0], k.swapaxes(1, 2), slot, axis=2)
            v_BKSH = jax.lax.dynamic_update_slice_in_dim(held[1], v.swapaxes(1, 2), slot, axis=2)
            new.append((k_BKSH, v_BKSH))
            return attention.grouped(q, k_BKSH, v_BKSH, seen[kind][:, None], model.attention_of(cfg, kind)["scale"])

        def recur(qkv, decay, beta, held=held, p=p):
            out, state = linear.step(qkv, p["conv"], decay, beta, cfg, held)
            new.append(state)
            return out

        x_B1D = _layer(x_B1D, p, cfg, compute, angles.get(kind), recur if kind == "linear" else attend)
    return model.norm(x_B1D[:, 0], params["final_norm"], cfg), new


def _write(out: Rollout, t, drawn, end_ids) -> Rollout:
    """Column t of the live rows; rows that are done keep zeros."""
    token_B, logp_B, sampler_B = drawn
    live_B = ~out.finished_B

    def put(a_BT, x_B):
        column = jnp.where(live_B, x_B, jnp.zeros_like(x_B))[:, None]
        return jax.lax.dynamic_update_slice_in_dim(a_BT, column.astype(a_BT.dtype), t, axis=1)

    ended_B = live_B & jnp.any(token_B[:, None] == end_ids[None], axis=1)
    return Rollout(
        put(out.token_BT, token_B), out.length_B + live_B.astype(jnp.int32), out.finished_B | ended_B,
        put(out.logp_model_BT, logp_B), put(out.logp_sampler_BT, sampler_B),
    )  # fmt: skip


def _grow(state: SamplerState, *, S: int, T: int) -> SamplerState:
    """The same state with a cache of S slots and room for T tokens. The caller's is used up.

    A layer at a time, so that never two whole caches are alive.
    """
    for i, layer in enumerate(state.cache):
        if isinstance(layer, linear.State):
            continue  # as large as it was
        state.cache[i] = jax.block_until_ready(_wider(layer, axis=2, size=S))
    out = {name: getattr(state.out, name) for name in ("token_BT", "logp_model_BT", "logp_sampler_BT")}
    return state.replace(out=state.out.replace(**_wider(out, axis=1, size=T)))


@functools.partial(jax.jit, static_argnames=("axis", "size"))
def _wider(tree, *, axis: int, size: int):
    """Zeros behind every array, up to `size` along `axis`."""

    def one(a):
        return jnp.pad(a, [(0, size - n if i == axis else 0) for i, n in enumerate(a.shape)])

    return jax.tree.map(one, tree)
