"""The sampler's jitted parts: prefill of prompts, rows that start in slots, and turns of the decode loop.

A slot is a place in the decoded batch. Which row has which slot and which pages of the cache is the host's
(slots.py); here a slot is its pages, its position, its key and the hidden state that produces its next token.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from omniopd_jax import model
from omniopd_jax.draw import draw
from omniopd_jax.model import attention, linear, lora, paged, rope, window
from omniopd_jax.parallel import sharding

COLUMNS = 64  # tokens of a row that one turn can return


@flax.struct.dataclass
class Slots:
    """What is decoded, B slots. The pools of pages are apart, for they outlive a change of B.

    Attributes:
      hidden_BD: after the last norm; produces the next token. key_B2: the row's PRNG key, as numbers.
      t_B: int32, tokens sampled, of limit_B at most. length_B: int32, positions in the cache, prompt_length + t.
      states: of each layer without pages, its linear.State or window.Ring by slot.
    """

    hidden_BD: jax.Array
    key_B2: jax.Array
    t_B: jax.Array
    limit_B: jax.Array
    length_B: jax.Array
    states: list


@flax.struct.dataclass
class Prompts:
    """Prompts after their prefill, one entry each: what a row starts from beside the pages. The last entry of each
    shard is the prompt that was started in part."""

    hidden_ED: jax.Array
    states: list


@flax.struct.dataclass
class Turn:
    """What a turn sampled, U columns: column u of a row is its token t + u. Past a row's end there are zeros.

    `t_B` and `live_B` are the slots' own, on every device.
    """

    token_BU: jax.Array
    logp_model_BU: jax.Array
    logp_sampler_BU: jax.Array
    t_B: jax.Array
    live_B: jax.Array


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


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "pages", "page", "dtype"))
def empty_pools(*, cfg, compute, pages: int, page: int, dtype: str) -> list[paged.Pool]:
    """A pool for each layer that attends to all of a row; `pages` over all shards."""
    one = (compute.mesh, cfg.num_kv_heads, pages, page, cfg.head_dim, dtype)
    return [paged.empty(*one) for kind in cfg.kinds if kind == "full"]


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "slots", "entries", "positions"))
def empty_slots(*, cfg, compute, slots: int, entries: int, positions: int) -> tuple[Slots, Prompts]:
    """No row in any slot, and room for `entries` prompts, one for each shard of rows.

    Args:
      positions: that a row can have.
    """

    def states(rows: int):
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state_shapes(cfg, compute, rows, positions))

    def hidden(rows: int):
        return jnp.zeros((rows, cfg.hidden_size), compute.dtype)

    numbers = (jnp.zeros(slots, jnp.int32) for _ in range(3))
    made = Slots(hidden(slots), jnp.zeros((slots, 2), jnp.uint32), *numbers, states(slots))
    return _laid(made, cfg, compute), _laid(Prompts(hidden(entries), states(entries)), cfg, compute)


def state_shapes(cfg, compute, rows: int, positions: int) -> list:
    """Of the layers without pages, by row: the states of linear layers, the rings of sliding ones."""

    def one(kind: str):
        if kind == "sliding":
            ring = (rows, cfg.num_kv_heads, min(cfg.window, positions), cfg.head_dim)
            return window.Ring(*(jax.ShapeDtypeStruct(ring, compute.dtype) for _ in "kv"))
        K = cfg.linear_key_heads
        conv = (rows, cfg.conv_width - 1, K, cfg.conv_channels // K)
        memory = (rows, cfg.linear_value_heads, cfg.linear_key_dim, cfg.linear_value_dim)
        return linear.State(jax.ShapeDtypeStruct(conv, compute.dtype), jax.ShapeDtypeStruct(memory, jnp.float32))

    return [one(kind) for kind in cfg.kinds if kind != "full"]


def state_specs(cfg, mesh) -> list:
    """The PartitionSpec of each array of `state_shapes`: rows in front, heads over tp."""
    of_kind = {"sliding": window.spec(mesh, cfg.num_kv_heads), "linear": linear.spec()}
    return [of_kind[kind] for kind in cfg.kinds if kind != "full"]


def specs(held: Slots | Prompts, cfg, mesh):
    """The PartitionSpec of each of its arrays."""
    rest = jax.tree.map(lambda a: P(sharding.ROWS), held.replace(states=[]))
    return rest.replace(states=state_specs(cfg, mesh))


def _laid(held, cfg, compute):
    mesh = compute.mesh
    return jax.tree.map(lambda a, spec: sharding.constrain(a, mesh, *spec), held, specs(held, cfg, mesh))


def _rows(compute, a):
    return sharding.constrain(a, compute.mesh, sharding.ROWS)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"), donate_argnames=("pools",))
def prefill(params, pools, kept: Prompts, prompt_EP, prompt_length_E, page_EW, *, cfg, compute):
    """New prompts into their pages.

    Args:
      kept: what is kept of each shard's last prompt; prompt_EP: int32, right-padded; rows by shard.
      page_EW: int32, the pages of P positions; 0 behind the prompt's own.

    Returns:
      (pools, Prompts of each shard's new entries and behind them its kept one).
    """
    E, length = prompt_EP.shape
    position_EP = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (E, length))
    angles = rope.by_kind(cfg, position_EP)
    x_EPD = model.scaled(params["embed"][prompt_EP], cfg)
    pools, new, states = iter(pools), [], []
    ring = next((state.k for state in kept.states if isinstance(state, window.Ring)), None)
    for kind, p in zip(cfg.kinds, params["layers"], strict=True):

        def attend(q, k, v, kind=kind):
            if kind == "sliding":
                states.append(window.of_prompts(k, v, prompt_length_E, ring.shape[2]))
            else:
                new.append(paged.write_prompts(next(pools), k, v, page_EW, compute.mesh))
            how = {"backend": compute.attention, "mesh": compute.mesh} | model.attention_of(cfg, kind)
            return attention.attend(q, k, v, length_B=prompt_length_E, **how)

        def recur(qkv, decay, beta, p=p):
            out, state = linear.whole(qkv, p["conv"], decay, beta, cfg, length_B=prompt_length_E)
            states.append(state)
            return out

        x_EPD = _layer(x_EPD, p, cfg, compute, angles.get(kind), recur if kind == "linear" else attend)
    last_ED = jnp.take_along_axis(x_EPD, prompt_length_E[:, None, None] - 1, axis=1)[:, 0]
    last_ED = model.norm(last_ED, params["final_norm"], cfg)
    return new, _laid(_behind(Prompts(last_ED, states), kept), cfg, compute)


def _behind(new: Prompts, kept: Prompts) -> Prompts:
    """Each shard's kept entry behind its new ones."""
    shards = kept.hidden_ED.shape[0]

    def one(a, b):
        a = a.reshape(shards, -1, *a.shape[1:])
        both = jnp.concatenate([a, b[:, None].astype(a.dtype)], axis=1)
        return both.reshape(-1, *both.shape[2:])

    return jax.tree.map(one, new, kept)


@flax.struct.dataclass
class Start:
    """Rows that start, as many for each shard; what fills up a shard's names slot -1.

    slot_X: int32, the slot within the shard. entry_X: which of the shard's entries of Prompts. key_X2: the rows' keys.
    limit_X: the most tokens of each. length_X: prompt lengths. from_X, to_X: the page that holds the prompt's end, and
    the row's own copy of it. keep_Y: the entry of each shard that is kept.
    """

    slot_X: jax.Array
    entry_X: jax.Array
    key_X2: jax.Array
    limit_X: jax.Array
    length_X: jax.Array
    from_X: jax.Array
    to_X: jax.Array
    keep_Y: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "copies"), donate_argnames=("pools", "slots"))
def start(pools, slots: Slots, prompts: Prompts, rows: Start, *, cfg, compute, copies: bool):
    """Puts rows into slots. Returns (pools, slots, what is kept of each shard's last prompt).

    Args:
      copies: whether any row has a page copied.
    """
    if copies:
        pools = [paged.copy_pages(pool, rows.from_X, rows.to_X, compute.mesh) for pool in pools]
    shards = rows.keep_Y.shape[0]

    def by_shard(a):
        return a.reshape(shards, -1, *a.shape[1:])

    slot, entry = by_shard(rows.slot_X), by_shard(rows.entry_X)

    def put(held, new):
        """`new` [shards, x, ..] into the slots of each shard; slot -1 is out of bounds and dropped."""
        one = jax.vmap(lambda a, s, n: a.at[jnp.where(s < 0, a.shape[0], s)].set(n.astype(a.dtype), mode="drop"))
        return one(by_shard(held), slot, new).reshape(held.shape)

    def pick(a):
        return jax.vmap(lambda a, e: a[e])(by_shard(a), entry)

    length = by_shard(rows.length_X)
    slots = Slots(
        put(slots.hidden_BD, pick(prompts.hidden_ED)), put(slots.key_B2, by_shard(rows.key_X2)),
        put(slots.t_B, jnp.zeros_like(length)), put(slots.limit_B, by_shard(rows.limit_X)), put(slots.length_B, length),
        jax.tree.map(lambda held, a: put(held, pick(a)), slots.states, prompts.states),
    )  # fmt: skip
    kept = jax.tree.map(lambda a: jax.vmap(lambda a, k: a[k])(by_shard(a), rows.keep_Y), prompts)
    return pools, _laid(slots, cfg, compute), _laid(kept, cfg, compute)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def take_slots(slots: Slots, index_B, *, cfg, compute) -> Slots:
    """The slots of each shard at `index_B` (within the shard), in that order."""
    shards = sharding.row_shards(compute.mesh)

    def one(a):
        a = jax.vmap(lambda a, i: a[i])(a.reshape(shards, -1, *a.shape[1:]), index_B.reshape(shards, -1))
        return a.reshape(-1, *a.shape[2:])

    return _laid(jax.tree.map(one, slots), cfg, compute)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"), donate_argnames=("pools", "slots"))
def turn(params, pools, slots: Slots, table_BW, live_B, drawing, steps, least, *, cfg, compute):
    """Decodes until each row has `steps` more tokens (at most COLUMNS), or no more than `least` rows are live.

    Args:
      table_BW: int32, the pages of each slot's row. live_B: the slots that have a row.
      drawing: (temperature, top_p, top_k, end_ids), traced.

    Returns:
      (pools, slots, Turn).
    """
    temperature, top_p, top_k, end_ids = drawing
    slots = slots.replace(length_B=jnp.where(live_B, slots.length_B, 0))  # nothing is read for a slot without a row
    order_B = _by_length(slots.length_B, compute)
    slots, live_B, table_BW = jax.tree.map(lambda a: _at(a, order_B), (slots, live_B, table_BW))
    zeros = functools.partial(jnp.zeros, (live_B.shape[0], COLUMNS))
    out = (zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32))

    def cond(carry):
        u, _, _, live_B, _ = carry
        return (u < steps) & (jnp.sum(live_B) > least)

    def body(carry):
        u, pools, s, live_B, out = carry
        with jax.named_scope("draw"):
            z_BV = model.logits(params, cfg, s.hidden_BD)
            key_B = jax.random.wrap_key_data(s.key_B2)
            u_B = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t)))(key_B, s.t_B)
            drawn = draw(z_BV, u_B, temperature, top_p, top_k)
        token_B, *_ = drawn = [jnp.where(live_B, a, jnp.zeros_like(a)) for a in drawn]
        out = tuple(
            jax.lax.dynamic_update_slice_in_dim(a, x[:, None].astype(a.dtype), u, axis=1) for a, x in zip(out, drawn)
        )
        with jax.named_scope("decode"):
            where = paged.Where(table_BW, s.length_B)
            hidden_BD, pools, states = _one_token(params, cfg, compute, token_B, pools, s.states, where)
        t_B = s.t_B + live_B
        s = Slots(hidden_BD, s.key_B2, t_B, s.limit_B, s.length_B + live_B, states)
        live_B &= ~jnp.any(token_B[:, None] == end_ids[None], axis=1) & (t_B < s.limit_B)
        return u + 1, pools, _laid(s, cfg, compute), _rows(compute, live_B), out

    _, pools, slots, live_B, out = jax.lax.while_loop(cond, body, (jnp.int32(0), pools, slots, live_B, out))
    back_B = None if order_B is None else jnp.argsort(order_B)
    slots, live_B, out = jax.tree.map(lambda a: _at(a, back_B), (slots, live_B, out))
    known = (sharding.constrain(a, compute.mesh) for a in (slots.t_B, live_B))
    return pools, _laid(slots, cfg, compute), Turn(*(_rows(compute, a) for a in out), *known)


def _by_length(length_B, compute):
    """An order in which rows that are read together (paged.py) hold about as much; None: as they are."""
    if paged.rows_at_a_time(length_B.shape[0], compute.mesh) == length_B.shape[0]:
        return None
    return jnp.argsort(-length_B)


def _at(a, index_B):
    return a if index_B is None else a[index_B]


def _one_token(params, cfg, compute, token_B, pools, states, where: paged.Where):
    """One token of each row through all layers: (hidden_BD after the last norm, pools, states)."""
    position_B1 = where.length_B[:, None]
    angles = rope.by_kind(cfg, position_B1)
    x_B1D = model.scaled(params["embed"][token_B[:, None]], cfg)
    held, before, new_pools, new_states = iter(pools), iter(states), [], []
    for kind, p in zip(cfg.kinds, params["layers"], strict=True):

        def attend(q, k, v, kind=kind):
            scale = model.attention_of(cfg, kind)["scale"]
            if kind == "sliding":
                out, ring = window.append_and_attend(q, k, v, next(before), where.length_B, compute.mesh, scale=scale)
                new_states.append(ring)
            else:
                out, pool = paged.append_and_attend(q, k, v, next(held), where, compute.mesh, scale=scale)
                new_pools.append(pool)
            return out

        def recur(qkv, decay, beta, p=p):
            out, state = linear.step(qkv, p["conv"], decay, beta, cfg, next(before))
            new_states.append(state)
            return out

        x_B1D = _layer(x_B1D, p, cfg, compute, angles.get(kind), recur if kind == "linear" else attend)
    return model.norm(x_B1D[:, 0], params["final_norm"], cfg), new_pools, new_states
