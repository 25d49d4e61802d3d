"""The sampler: prefill once a prompt, decode with a cache that grows, stop early.

Slots: prompts are right-padded to P, token t of every row is written at slot P + t (one slot for the whole batch), and
a mask hides the gap between a row's prompt and P. RoPE goes by the true position, prompt_length + t. The cache is one
array a layer, heads before time (docs/design notes: every other layout costs a copy of the cache).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import model
from omniopd_jax.model import attention, linear, lora, rope
from omniopd_jax.parallel import sharding
from omniopd_jax.run.batching import bucket, pad_rows  # noqa: F401  called as rollout.bucket

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Key


@flax.struct.dataclass
class Rollout:
    """What was sampled. Positions past `length_B` hold token 0 and zeros.

    Attributes:
      token_BT: int32; length_B: sampled tokens, the end token counted; finished_B: an end token was sampled.
      logp_model_BT: log-prob under the model itself (temperature 1, untruncated), nats.
      logp_sampler_BT: log-prob under the distribution drawn from (temperature, top-k, top-p), nats.
    """

    token_BT: jax.Array
    length_B: jax.Array
    finished_B: jax.Array
    logp_model_BT: jax.Array
    logp_sampler_BT: jax.Array


@flax.struct.dataclass
class SamplerState:
    """Carry of the decode loop. hidden_BD produces the next token; cache: (k_BKSH, v_BKSH) or linear.State by layer."""

    cache: list
    hidden_BD: jax.Array
    prompt_length_B: jax.Array
    key_B: jax.Array
    t: jax.Array
    out: Rollout


def prepare(params: dict, cfg: model.ModelConfig, *, compute: model.Compute | None = None) -> dict:
    """The sampler's copy of the parameters, once an iteration: adapters merged, cast to `compute.dtype`, gathered over
    fsdp, layers unstacked.

    The projections of q, k and v are matrices [D, Q * H] in it: as [D, Q, H] the decode loop keeps a copy of each in
    the layout that it multiplies by, 1 GiB at 4 B parameters.
    """
    return _prepare(params, cfg=cfg, compute=compute or model.Compute())


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def _prepare(params, *, cfg, compute):
    if lora.attached(params):
        params = lora.merge(params, compute.lora_scale, compute.dtype)
    else:
        params = model.cast(params, compute.dtype)
    if compute.mesh.size > 1:
        where = model.param_shardings(cfg, compute.mesh, sharding.DECODE_RULES)
        params = jax.lax.with_sharding_constraint(params, where)
    params = model.unstack(params, cfg, compute.dtype)
    return params | {"layers": [p | {n: _matrix(p[n]) for n in "qkv" if n in p} for p in params["layers"]]}


def _matrix(w_DQH):
    return w_DQH.reshape(w_DQH.shape[0], -1)


def _layer(x_BLD, p: dict, cfg: model.ModelConfig, compute: model.Compute, angles, attend):
    """`model.layer` with a layer of prepared parameters."""
    number = {"q": cfg.num_heads, "k": cfg.num_kv_heads, "v": cfg.num_kv_heads}
    heads = {name: p[name].reshape(p[name].shape[0], n, -1) for name, n in number.items() if name in p}
    return model.layer(x_BLD, p | heads, cfg, compute, angles, attend)


def sample(
    params: dict, cfg: model.ModelConfig, prompt_BP: Int[Array, "B P"], prompt_length_B: Int[Array, " B"],
    key_B: Key[Array, " samples"], *, max_new_tokens: int, temperature=1.0, top_p=1.0, top_k=0, num_samples=1,
    end_ids=(), first_chunk=256, compute: model.Compute | None = None,
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
    angles = {kind: rope.tables(cfg, position_BP, kind) for kind in dict.fromkeys(cfg.kinds) if kind != "linear"}
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
    angles = {kind: rope.tables(cfg, position_B1, kind) for kind in dict.fromkeys(cfg.kinds) if kind != "linear"}
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


def draw(z_BV, u_B, temperature, top_p, top_k):
    """Draws a token a row from logits by one uniform each.

    Returns:
      (token_B, logp under the model, logp under the sampler), all [B].
    """
    z_BV -= z_BV.max(-1, keepdims=True)
    p_BV = jnp.exp(z_BV)  # not normalised: one array of V, and sums of it
    blocks = _blocks(p_BV)
    mass_B = blocks[2][:, -1]

    def logp(token_B):
        return _at(z_BV, token_B) - jnp.log(mass_B)

    def plain():
        token_B = _invert(p_BV, blocks, u_B)
        logp_B = logp(token_B)
        return token_B, logp_B, logp_B

    def shaped():
        q_BV = jnp.exp(z_BV / jnp.maximum(temperature, 1e-6))
        q_BV = jax.lax.cond((top_p < 1.0) | (top_k > 0), lambda: truncate(q_BV, top_p, top_k), lambda: q_BV)
        token_B = jnp.where(temperature > 0, inverse_cdf(q_BV, u_B), jnp.argmax(z_BV, axis=-1)).astype(jnp.int32)
        sampler_B = jnp.where(temperature > 0, jnp.log(_at(q_BV, token_B) / q_BV.sum(-1)), 0.0)
        return token_B, logp(token_B), sampler_B

    # the branches give [B] arrays only: whatever is [B, V] stays inside
    return jax.lax.cond((temperature == 1.0) & (top_p >= 1.0) & (top_k <= 0), plain, shaped)


def truncate(q_BV, top_p, top_k):
    """Zeroes what top-k, then top-p, leave out (ties kept), by bisection over thresholds: no sort. Not renormalised."""
    k = jnp.where(top_k > 0, top_k, q_BV.shape[1]).astype(jnp.float32)
    q_BV = _at_least(q_BV, jnp.ones_like, k)
    # at 1 a token too small to change the sum in float32 would fall out
    return jnp.where(top_p < 1, _at_least(q_BV, lambda q: q, top_p * q_BV.sum(-1)), q_BV)


def _at_least(q_BV, measure, wanted):
    """Keeps q >= the largest threshold at which the kept entries measure at least `wanted`, found bit by bit.

    Non-negative floats are ordered like their bits, so 31 halvings find the threshold exactly.
    """

    def kept(bits_B):
        return q_BV >= jax.lax.bitcast_convert_type(bits_B, jnp.float32)[:, None]

    def halve(_, lo_hi):
        lo, hi = lo_hi
        mid = lo + (hi - lo + 1) // 2
        enough = jnp.sum(jnp.where(kept(mid), measure(q_BV), 0.0), axis=-1) >= wanted
        return jnp.where(enough, mid, lo), jnp.where(enough, hi, mid - 1)

    hi = jax.lax.bitcast_convert_type(q_BV.max(-1), jnp.int32)
    lo, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(hi), hi))
    return jnp.where(kept(lo), q_BV, 0.0)


def inverse_cdf(q_BV, u_B, block: int = 0):
    """The token at which the cumulative mass of q passes u, in two levels: block sums, then inside one block.

    q need not sum to one. A token of zero mass is never returned.
    """
    return _invert(q_BV, _blocks(q_BV, block), u_B)


def _blocks(q_BV, block: int = 0):
    """(block, sums of q over blocks of the vocabulary [B, W], their cumulative sums)."""
    B, V = q_BV.shape
    block = block or next((n for n in (512, 256, 128) if V % n == 0), 512 if V > 16_384 else 64)
    sum_BW = jnp.pad(q_BV, ((0, 0), (0, -V % block))).reshape(B, -1, block).sum(-1)
    return block, sum_BW, jnp.cumsum(sum_BW, axis=-1)


def _invert(q_BV, blocks, u_B):
    """`inverse_cdf` from what `_blocks` returns."""
    V, (block, sum_BW, cum_BW) = q_BV.shape[1], blocks
    aim_B = u_B * cum_BW[:, -1]
    w_B = _first_past(cum_BW, sum_BW, aim_B)
    before_B = jnp.where(w_B > 0, _at(cum_BW, jnp.maximum(w_B - 1, 0)), 0.0)
    index_BU = w_B[:, None] * block + jnp.arange(block, dtype=jnp.int32)[None]
    q_BU = jnp.where(index_BU < V, jnp.take_along_axis(q_BV, jnp.minimum(index_BU, V - 1), axis=1), 0.0)
    return w_B * block + _first_past(jnp.cumsum(q_BU, axis=-1), q_BU, aim_B - before_B)


def _at(a_BV, index_B):
    return jnp.take_along_axis(a_BV, index_B[:, None], axis=1)[:, 0]


def _first_past(cum, mass, aim_B):
    """First index with mass whose cumulative mass exceeds the aim; the last one with mass where rounding leaves none.

    Asking for mass as well makes it right whatever the sums' rounding: a prefix sum need not be flat across zeros, and
    the compiler may sum twice, in two orders.
    """
    index = jnp.arange(mass.shape[1], dtype=jnp.int32)[None]
    last_B = jnp.max(jnp.where(mass > 0, index, 0), axis=-1)
    return jnp.min(jnp.where((cum > aim_B[:, None]) & (mass > 0), index, last_B[:, None]), axis=-1)


def row_keys(key: jax.Array, ids) -> jax.Array:
    """One key a row from integers that name the rows (their sample ids): independent of batch, order and host."""
    if not isinstance(ids, jax.Array):
        ids = jax.device_put(np.asarray(ids, np.uint32), sharding.replicated_like(key))
    return _row_keys(key, ids)


@jax.jit
def _row_keys(key, id_B):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(id_B)
