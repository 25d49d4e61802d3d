"""The sampler: rows are decoded in slots, and a slot whose row has ended goes to the next row that waits.

Between turns of the decode loop (decode.py) the host looks which rows have ended, starts others in their slots
(slots.py) and hands on what is complete. A row's tokens follow from the parameters, its prompt and its key alone,
whatever its slot and its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import flax.struct
import jax
import numpy as np

from omniopd_jax import decode, model
from omniopd_jax.decode import prepare  # noqa: F401  called as rollout.prepare
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run.batching import bucket, pad_rows  # noqa: F401  called as rollout.bucket
from omniopd_jax.slots import Slots, padded, width

PAGE = 64  # positions of a page of the cache
PREFILL_TOKENS = 1 << 16  # positions of one prefill, at most, on each shard
LOOKS = 5  # turns within the mean length so far, at least, while rows wait
CPU_CACHE_GIB = 4.0
PATIENCE = 16  # one slot of so many may be idle before the next row is started in it

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


@dataclasses.dataclass(frozen=True)
class Ended:
    """A row that has ended. row: its place among this process's rows. The arrays are as long as it; see Rollout."""

    row: int
    tokens: np.ndarray
    logp_model: np.ndarray
    logp_sampler: np.ndarray
    finished: bool


@dataclasses.dataclass(frozen=True)
class How:
    """How rows are decoded; which tokens come out does not depend on it.

    Attributes:
      slots: rows decoded at a time, over all devices; 0: all, or as many as the cache's memory holds at half of their
        full length.
      cache_gib: memory of the cache on each device, at most; 0: `default_cache_gib`.
      turn: tokens between two looks of the host, at most; 0: a fifth of the mean length so far.
      cache_dtype: "" (the compute dtype) | int8, with a scale for each head and position.
    """

    slots: int = 0
    cache_gib: float = 0.0
    turn: int = 0
    cache_dtype: str = ""


DEFAULT = How()


@dataclasses.dataclass
class Spent:
    """What sampling took. slot_steps: steps of the decode loop times slots; tokens: of rows that ended; positions: of
    prefilled prompts, their filling included; gave_up: rows that had to start again, for want of pages."""

    slot_steps: int = 0
    tokens: int = 0
    turns: int = 0
    positions: int = 0
    gave_up: int = 0


def default_cache_gib(mesh) -> float:
    """GiB of cache on each device where no one says: a third of an accelerator's memory."""
    if sharding.platform(mesh) == "cpu":
        return CPU_CACHE_GIB
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 16 * 2**30) / 3 / 2**30


def page_bytes(cfg: model.ModelConfig, compute: model.Compute, cache_dtype: str = "") -> float:
    """Bytes of one page of all layers that have pages, on one device."""
    tp = compute.mesh.shape["tp"]
    heads = cfg.num_kv_heads // tp if cfg.num_kv_heads % tp == 0 else cfg.num_kv_heads
    one = cfg.head_dim + 4 if cache_dtype == "int8" else cfg.head_dim * np.dtype(compute.dtype).itemsize
    return 2.0 * sum(kind == "full" for kind in cfg.kinds) * heads * PAGE * one


def slot_bytes(cfg: model.ModelConfig, compute: model.Compute, positions: int) -> float:
    """Bytes of a slot on its device beside pages: the states of linear layers, the rings of sliding ones.

    Args:
      positions: that a row can have.
    """
    mesh = compute.mesh

    def one(a, spec):
        own = jax.sharding.NamedSharding(mesh, spec).shard_shape(a.shape)
        return math.prod(own) * a.dtype.itemsize

    states = decode.state_shapes(cfg, compute, sharding.row_shards(mesh), positions)
    return float(sum(jax.tree.leaves(jax.tree.map(one, states, decode.state_specs(cfg, mesh)))))


def sizes(cfg, compute, how: How, rows: int, positions: int) -> tuple[int, int]:
    """(slots, pages) of each shard of rows.

    Args:
      rows: of all shards; positions: of the longest prompt with the longest response.
    """
    shards, most = sharding.row_shards(compute.mesh), width(positions, PAGE)
    held = (how.cache_gib or default_cache_gib(compute.mesh)) * 2**30
    page, own = max(page_bytes(cfg, compute, how.cache_dtype), 1), slot_bytes(cfg, compute, most * PAGE)
    slots = -(-how.slots // shards) if how.slots else max(1, int(held / (page * most / 2 + own)))
    slots = min(slots, padded(-(-rows // shards)))
    room = int((held - slots * own) / page)
    return slots, 1 + min(slots * (most + 1), max(room, most + 1))


def stream(
    params: dict, cfg: model.ModelConfig, prompts: Sequence[Sequence[int]], key_B2: np.ndarray, *, max_new_tokens,
    temperature=1.0, top_p=1.0, top_k=0, num_samples=1, end_ids=(), part=0, how: How = DEFAULT,
    compute: model.Compute | None = None, spent: Spent | None = None,
) -> Iterator[list[Ended]]:  # fmt: skip
    """Samples `num_samples` rows of every prompt and yields them as they end. All processes must call and iterate.

    Args:
      params: as `prepare` returns them.
      prompts: this process's, token ids, at least one each; as many in every process.
      key_B2: uint32, the numbers of the rows' keys (`jax.random.key_data`); row b * num_samples + g is prompt b's.
      max_new_tokens: of every row, or of each.
      temperature, top_p, top_k, end_ids: as `sample` takes them.
      part: rows of one yield, sorted by row; the last has the rest. 0: all at once.
      spent: counts what was done.

    Yields:
      Rows of this process, as many in every process.
    """
    compute, spent = compute or model.Compute(), spent or Spent()
    limit_B = np.broadcast_to(np.asarray(max_new_tokens, np.int32), len(prompts) * num_samples)
    books = _books(cfg, compute, prompts, num_samples, int(limit_B.max()), how)
    own = _Own(prompts, key_B2, limit_B, books, frozenset(end_ids), compute.mesh)
    static, shards = {"cfg": cfg, "compute": compute}, len(books.shards)
    drawing = (np.float32(temperature), np.float32(top_p), np.int32(top_k), np.array(end_ids or (-1,), np.int32))
    drawing = jax.device_put(drawing, sharding.replicated(compute.mesh))
    pools = decode.empty_pools(pages=shards * books.pages, page=PAGE, dtype=how.cache_dtype or compute.dtype, **static)
    positions = books.width * PAGE
    slots, kept = decode.empty_slots(slots=shards * books.slots, entries=shards, positions=positions, **static)
    part, given = part or len(prompts) * num_samples, 0
    most_prompts = most_entries(max(books.prompt_length))
    while books.waits() or books.live():
        while filled := books.refill(decode.COLUMNS, most_prompts):
            entries = kept
            if filled.entries:
                new = own.prompts_of(filled)
                spent.positions += new[0].size
                pools, entries = decode.prefill(params, pools, kept, *own.put(new), **static)
            rows, copies = own.starts_of(filled)
            pools, slots, kept = decode.start(pools, slots, entries, own.put(rows), copies=copies, **static)
            del entries  # a ring or a state of each prompt
        if order := books.shrink():
            slots = decode.take_slots(slots, own.put(own.of(order)), **static)
        steps = _steps(books, how)
        own.forget(books.make_room(steps))
        least = _least(books)  # of the rows that have kept their places
        table = own.put((books.table(own.shards), books.live_mask(own.shards)))
        limits = jax.device_put((np.int32(steps), np.int32(least)), sharding.replicated(compute.mesh))
        pools, slots, got = decode.turn(params, pools, slots, *table, drawing, *limits, **static)
        while min(books.ended) - given >= part:  # handed on while the turn is computed
            yield own.take(part)
            given += part
        t_B, live_B = jax.device_get((got.t_B, got.live_B))
        moved = books.turned(t_B, live_B)
        spent.slot_steps += max(m.after - m.before for m in moved) * books.slots * shards
        spent.turns += 1
        own.add(moved, got)
    if sum(books.ended) != len(books.prompt_length) * num_samples:
        raise RuntimeError(f"{len(books.prompt_length) * num_samples} rows were asked for, {sum(books.ended)} ended")
    del pools, slots, kept, got  # the caller may want their memory before it asks for the last part
    spent.tokens, spent.gave_up = spent.tokens + books.tokens, spent.gave_up + books.gave_up
    while given < min(books.ended):
        yield own.take(part)
        given += part


def prefill_width(longest: int) -> int:
    """P of a prefill whose longest prompt has so many tokens: a power of two, so that shapes are few."""
    return max(16, 1 << (longest - 1).bit_length())


def most_entries(longest: int) -> int:
    """Prompts of one prefill on each shard, at most: a power of two, as a prefill's shape has it (`slots.padded`)."""
    return max(1, PREFILL_TOKENS // prefill_width(longest))


def _books(cfg, compute, prompts, num_samples: int, longest: int, how: How) -> Slots:
    """The books that all processes keep: they tell each other the lengths of their prompts, how long a
    row may become, and the memory of their devices."""
    own = [len(p) for p in prompts]
    mine = (own, longest, how.cache_gib or default_cache_gib(compute.mesh))
    told = processes.gather("rows to sample", mine) if compute.mesh.is_multi_process else [mine]
    lengths, longest = [n for n, *_ in told], max(most for _, most, _ in told)
    how = dataclasses.replace(how, cache_gib=min(gib for *_, gib in told))
    rows = sum(map(len, lengths)) * num_samples
    slots, pages = sizes(cfg, compute, how, rows, max(map(max, lengths)) + longest)
    by_shard = sharding.rows_map(compute.mesh, sharding.row_shards(compute.mesh))
    rank_of = {index: device.process_index for device, index in by_shard.items()}
    first = min(rank_of.values())  # a mesh of one process's devices, whichever it is
    ranks = [rank_of[index] - (first if len(lengths) == 1 else 0) for index in sorted(rank_of)]
    return Slots(lengths, num_samples, ranks=ranks, slots=slots, pages=pages, page=PAGE, longest=longest)


def _steps(books: Slots, how: How) -> int:
    """Of the next turn, at most."""
    return min(how.turn or max(8, int(books.mean_length() / LOOKS)), decode.COLUMNS)


def _least(books: Slots) -> int:
    """Live rows at which the next turn ends before."""
    if books.waits():
        return books.live() - max(1, books.slots * len(books.shards) // PATIENCE)
    half = books.half()  # which one full shard keeps from being done, whatever the others have
    return min(half * len(books.shards), books.live() - (books.fullest() - half)) if half else 0


class _Own:
    """This process's part of the books: what its shards are sent, and what comes back of its rows."""

    def __init__(self, prompts, key_B2, limit_B, books: Slots, end_ids: frozenset, mesh):
        self.prompts, self.key_B2, self.limit_B, self.books = prompts, key_B2, limit_B, books
        self.shards = sharding.own_shards(mesh)
        rank = books.shards[self.shards[0]].rank
        self.first_prompt = rank * len(prompts)
        self.first_row = rank * len(key_B2)
        self.end_ids = end_ids
        self.put = functools.partial(sharding.put_rows, mesh=mesh)
        self.sampled: dict[int, list] = {}  # by row: columns of each turn
        self.ended: list[Ended] = []

    def of(self, by_shard: list[list[int]]) -> np.ndarray:
        """The lists of its shards, one behind the other."""
        return np.array([i for s in self.shards for i in by_shard[s]], np.int32)

    def prompts_of(self, filled):
        """(prompt_EP, prompt_length_E, page_EW) of its shards."""
        length_of, page = self.books.prompt_length, self.books.page
        longest = max(length_of[p] for prompts in filled.prompts for p, _ in prompts)
        P = prefill_width(longest)
        rows, pages = [], []
        for s in self.shards:
            empty = filled.entries - len(filled.prompts[s])
            rows += [self.prompts[p - self.first_prompt] for p, _ in filled.prompts[s]] + [(0,)] * empty
            pages += [own for _, own in filled.prompts[s]] + [()] * empty
        return *pad_rows(rows, P), pad_rows(pages, -(-P // page))[0]

    def starts_of(self, filled) -> tuple[decode.Start, bool]:
        """The rows that start in its shards, and whether any shard copies a page."""
        X, out = filled.rows, []
        for s in self.shards:
            starts = filled.starts[s]
            for start in starts:
                b, length = start.row - self.first_row, self.books.prompt_length[start.prompt]
                out.append((start.slot, start.entry, b, length, start.copied, start.copy))
            out += [(-1, 0, 0, 0, 0, 0)] * (X - len(starts))
        slot, entry, b, length, copied, copy = np.array(out, np.int32).T
        keep = np.array([filled.keep[s] for s in self.shards], np.int32)
        rows = decode.Start(slot, entry, self.key_B2[b], self.limit_B[b], length, copied, copy, keep)
        return rows, any(start.copy for starts in filled.starts for start in starts)

    def forget(self, rows: list[int]) -> None:
        """Rows that start again."""
        for row in rows:
            self.sampled.pop(row, None)

    def add(self, moved, got: decode.Turn) -> None:
        """What a turn sampled of its rows."""
        slots = self.books.slots
        columns = [sharding.local_rows(a) for a in (got.token_BU, got.logp_model_BU, got.logp_sampler_BU)]
        at = {shard: n * slots for n, shard in enumerate(self.shards)}
        for m in moved:
            if m.place // slots not in at:
                continue
            b, count = at[m.place // slots] + m.place % slots, m.after - m.before
            self.sampled.setdefault(m.row, []).append([a[b, :count] for a in columns])
            if m.ended:
                token, *logps = (np.concatenate(a) for a in zip(*self.sampled.pop(m.row)))
                done = int(token[-1]) in self.end_ids
                self.ended.append(Ended(m.row - self.first_row, token, *logps, done))

    def take(self, count: int) -> list[Ended]:
        """The next rows that ended, sorted by row."""
        out, self.ended = self.ended[:count], self.ended[count:]
        return sorted(out, key=lambda ended: ended.row)


def sample(
    params: dict, cfg: model.ModelConfig, prompt_BP: Int[Array, "B P"], prompt_length_B: Int[Array, " B"],
    key_B: Key[Array, " samples"], *, max_new_tokens: int, temperature=1.0, top_p=1.0, top_k=0, num_samples=1,
    end_ids=(), how: How = DEFAULT, compute: model.Compute | None = None,
) -> Rollout:  # fmt: skip
    """Samples `num_samples` completions of every prompt.

    Args:
      params: as `prepare` returns them (stacked parameters are prepared here).
      cfg: static.
      prompt_BP: int32, right-padded; rows over data and fsdp on a mesh.
      prompt_length_B: int32, at least 1.
      key_B: one PRNG key a *completion* [B * num_samples]; row b's completions are b * num_samples + g. A row draws the
        same numbers in any batch, slot or host.
      max_new_tokens, temperature, top_p, top_k: traced; temperature 0 is greedy.
      end_ids: tokens that end a row.
      compute: static; None: float32 on the default device.

    Returns:
      Rollout with [B * num_samples, T] arrays, T the longest of them rounded up to 8.
    """
    compute = compute or model.Compute()
    if isinstance(params["layers"], dict):
        params = prepare(params, cfg, compute=compute)
    tokens, lengths = (
        sharding.local_rows(a) if isinstance(a, jax.Array) else np.asarray(a) for a in (prompt_BP, prompt_length_B)
    )
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    [rows] = stream(
        params, cfg, prompts, sharding.local_rows(jax.random.key_data(key_B)), max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, top_k=top_k, num_samples=num_samples, end_ids=end_ids, how=how,
        compute=compute,
    )  # fmt: skip
    longest = max(len(r.tokens) for r in rows)
    T = -(-(sharding.global_max(longest) if compute.mesh.is_multi_process else longest) // 8) * 8

    def wide(arrays):
        return np.stack([np.pad(a, (0, T - len(a))) for a in arrays])

    length_B = np.array([len(r.tokens) for r in rows], np.int32)
    finished_B = np.array([r.finished for r in rows])
    out = Rollout(
        wide([r.tokens for r in rows]), length_B, finished_B, wide([r.logp_model for r in rows]),
        wide([r.logp_sampler for r in rows]),
    )  # fmt: skip
    return sharding.put_rows(out, compute.mesh)


def key_data(key: jax.Array, ids) -> np.ndarray:
    """The numbers of one key a row (`row_keys`), on the host: what `stream` takes."""
    own = jax.device_put((jax.device_get(jax.random.key_data(key)), np.asarray(ids, np.uint32)))  # this process's alone
    return np.asarray(jax.device_get(_key_data(*own)))


@jax.jit
def _key_data(numbers, id_B):
    return jax.random.key_data(_row_keys(jax.random.wrap_key_data(numbers), id_B))


def row_keys(key: jax.Array, ids) -> jax.Array:
    """One key a row from integers that name the rows (their sample ids): independent of batch, order and host."""
    if not isinstance(ids, jax.Array):
        ids = jax.device_put(np.asarray(ids, np.uint32), sharding.replicated_like(key))
    return _row_keys(key, ids)


@jax.jit
def _row_keys(key, id_B):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(id_B)
