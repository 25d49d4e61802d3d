"""Sequence packing: several responses, each behind its own prompt, in one row of scoring and update.

Only the passes that make hidden states see packed rows. The vocabulary pass gets the states of real response tokens,
gathered, and everything per response keeps its [B, T] shape and its place: `pack_values` and `unpack_values` convert
between the two. A process packs its own responses and deals the rows evenly to its devices and to their micro-batches,
the Z parts of a batch. So a response may be computed on another device than the one that holds its row of [B, T]; what
crosses is a few numbers a token, no state. X are the response positions of one part.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax.parallel import processes, sharding

NEAR = 1.05  # of the fewest tokens: a narrower row costs less attention, so it wins within this


@flax.struct.dataclass
class Packed:
    """Packed rows, and where each response is in them. The rows of a part are counted laid end to end.

    Attributes:
      token_RL: int32, prompts directly followed by their responses, one after the other, 0 behind the last.
      segment_RL: int32, 1, 2, .. along a row; 0 is padding. position_RL: int32, from 0 in each segment.
      first_B: int32, where a response's y_0 is among all Z X response positions.
      owner_ZX: int32, the response that a position belongs to, -1 for none; time_ZX: its t.
      place_ZX: int32, where that y_t is among the rows of its part; 1 where there is none.
    """

    token_RL: jax.Array
    segment_RL: jax.Array
    position_RL: jax.Array
    first_B: jax.Array
    owner_ZX: jax.Array
    time_ZX: jax.Array
    place_ZX: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each response of a process goes: which part, which of its rows, first column; and the fewest rows and
    positions."""

    rows: int  # of each part
    positions: int  # X
    part_B: np.ndarray
    row_B: np.ndarray
    column_B: np.ndarray


class Laid(NamedTuple):
    """Where responses are among all Z X positions: `first_B` of this process, on the host, and X."""

    first_B: np.ndarray
    positions: int


# --- on the host ------------------------------------------------------------------------------------------------------


def make(
    rows: list[list[int]], prompt_length_B, *, most: int, shards: list[int], micro_batches: int,
    like: Laid | None = None,
) -> Packed:  # fmt: skip
    """Packs a process's rows, in shapes that all processes share and that are few: width, rows and X are rounded up.

    Args:
      rows: tokens of prompt and response; B of them.
      prompt_length_B: tokens of each one's prompt.
      most: widest packed row (`packing.length`), at least the longest of `rows`.
      shards: those that this process holds, ascending (`sharding.own_shards`); B must divide by shards x micro_batches.
      micro_batches: of each shard.
      like: where the same responses lie behind other prompts: each one's positions are then in the same place among
        all Z X, so that states of both can be compared where they are.

    Returns:
      NumPy arrays, as `sharding.put_rows` takes them.
    """
    length_B, prompt_length_B = np.array(list(map(len, rows)), np.int32), np.asarray(prompt_length_B, np.int32)
    parts = len(shards) * micro_batches
    part_B = None if like is None else parts_of(like, shards, micro_batches)
    width, count = choose_width(length_B, most, parts, part_B)
    plan = make_plan(length_B, length_B - prompt_length_B, width, parts, part_B)
    if like is None:
        positions = min(_round(sharding.global_max(plan.positions)), count * width)
    else:
        positions = like.positions
    plan = dataclasses.replace(plan, rows=count, positions=positions)
    return fill(plan, rows, prompt_length_B, width, shards, micro_batches)


def parts_of(laid: Laid, shards: list[int], micro_batches: int) -> np.ndarray:
    """The part of this process that each response is in."""
    shard_B, part_B = np.divmod(laid.first_B // laid.positions, micro_batches)
    return np.searchsorted(shards, shard_B) * micro_batches + part_B


def choose_width(length_B, most: int, parts: int, part_B=None) -> tuple[int, int]:
    """(tokens of a row, rows of each part): the fewest tokens, of the widths from the longest row's to `most`.

    `part_B`: the part of each response, where that is given.
    """
    longest = sharding.global_max(int(length_B.max()))
    if longest > most:
        raise ValueError(f"a response of {longest} tokens with its prompt does not fit a packed row of {most}")
    widths = [min(_round(longest), most)]
    while widths[-1] < most:
        widths.append(min(_round(widths[-1] + 1), most))
    if part_B is None:
        own, top = [-(-len(first_fit(length_B, w)) // parts) for w in widths], len(length_B) // parts
    else:
        own = [max(len(first_fit(length_B[part_B == z], w)) for z in range(parts)) for w in widths]
        top = len(length_B)
    counts = [max(of) for of in zip(*processes.gather("packed rows", own))]
    counts = [min(_round(c, least=1), top) for c in counts]
    fewest = min(w * c for w, c in zip(widths, counts))
    return next((w, c) for w, c in zip(widths, counts) if w * c <= NEAR * fewest)


def _round(length: int, least: int = 16) -> int:
    """Up to a multiple of `least`, or of an eighth of the power of two below."""
    step = max(least, 1 << max(0, (max(length, 1) - 1).bit_length() - 4))
    return -(-max(length, 1) // step) * step


def first_fit(lengths, width: int) -> list[list[int]]:
    """First-fit decreasing: indices by row, no row over `width` tokens. Ties go to the smaller index."""
    bins, room = [], np.full(len(lengths), width)
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        if lengths[i] > width:
            raise ValueError(f"{lengths[i]} tokens do not fit a row of {width}")
        k = int(np.argmax(room >= lengths[i]))  # at most one row per response: there always is one
        room[k] -= lengths[i]
        if k == len(bins):
            bins.append([])
        bins[k].append(i)
    return bins


def make_plan(length_B, response_length_B, width: int, parts: int, part_B=None) -> Plan:
    """First-fit decreasing, the rows then dealt to the parts, evenly in response tokens; deterministic.

    Args:
      length_B: tokens of prompt and response. response_length_B: of the response alone.
      width: tokens of a row.
      parts: shards x micro-batches; each gets as many rows, give or take an empty one.
      part_B: the part of each response, where that is given.
    """
    if part_B is not None:
        return _plan_within(length_B, response_length_B, width, parts, part_B)
    part_B, row_B, column_B = (np.zeros(len(length_B), np.int32) for _ in range(3))
    bins = [np.array(b) for b in first_fit(length_B, width)]
    most, held, tokens = -(-len(bins) // parts), np.zeros(parts, int), np.zeros(parts, int)
    for b in sorted(bins, key=lambda b: (-int(response_length_B[b].sum()), int(b[0]))):
        z = int(np.argmin(np.where(held < most, tokens, np.iinfo(int).max)))
        part_B[b], row_B[b], column_B[b] = z, held[z], np.cumsum(length_B[b]) - length_B[b]
        held[z] += 1
        tokens[z] += response_length_B[b].sum()
    return Plan(most, max(1, int(tokens.max())), part_B, row_B, column_B)


def _plan_within(length_B, response_length_B, width: int, parts: int, part_B) -> Plan:
    """First-fit decreasing in each part."""
    row_B, column_B = np.zeros((2, len(length_B)), np.int32)
    most, tokens = 0, [1]
    for z in range(parts):
        own = np.flatnonzero(part_B == z)
        bins = [own[b] for b in first_fit(length_B[own], width)]
        for i, b in enumerate(bins):
            row_B[b], column_B[b] = i, np.cumsum(length_B[b]) - length_B[b]
        most = max(most, len(bins))
        tokens.append(int(response_length_B[own].sum()))
    return Plan(most, max(tokens), part_B, row_B, column_B)


def fill(plan: Plan, rows, prompt_length_B, width: int, shards: list[int], micro_batches: int) -> Packed:
    """The plan's arrays. Row k of micro-batch i of a shard is its row k n + i: `step._split` takes every n-th."""
    Z, n, X, share = len(shards) * micro_batches, micro_batches, plan.positions, len(rows) // len(shards)
    token, segment, position = (np.zeros((Z * plan.rows, width), np.int32) for _ in range(3))
    owner, used = np.full((Z, X), -1, np.int32), np.zeros(Z, int)
    time, place = np.zeros((Z, X), np.int32), np.ones((Z, X), np.int32)
    first_B = np.zeros(len(rows), np.int32)
    for b, row in enumerate(rows):
        z, column, T = plan.part_B[b], plan.column_B[b], len(row) - prompt_length_B[b]
        s, i = divmod(z, n)
        at = (s * n * plan.rows + plan.row_B[b] * n + i, slice(column, column + len(row)))
        token[at], position[at] = row, np.arange(len(row))
        segment[at] = segment[at[0]].max() + 1
        here = slice(used[z], used[z] + T)
        owner[z, here], time[z, here] = shards[b // share] * share + b % share, np.arange(T)
        place[z, here] = plan.row_B[b] * width + column + prompt_length_B[b] + np.arange(T)
        first_B[b] = (shards[s] * n + i) * X + used[z]
        used[z] += T
    return Packed(token, segment, position, first_B, owner, time, place)


# --- inside jit -------------------------------------------------------------------------------------------------------


def pack_values(packed: Packed, values_BT, mesh) -> list:
    """a_ZX of each a_BT, 0 where a position belongs to no response."""
    if not values_BT:
        return []
    index_ZX = jnp.maximum(packed.owner_ZX, 0) * values_BT[0].shape[1] + packed.time_ZX
    return [jnp.where(packed.owner_ZX >= 0, a_ZX, 0) for a_ZX in _pick(values_BT, index_ZX, mesh)]


def unpack_values(packed: Packed, values_ZX, T: int, mesh) -> list:
    """a_BT of each a_ZX; what is past a response means nothing."""
    return list(_pick(values_ZX, packed.first_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None], mesh))


def _pick(values, index, mesh):
    """Elements of each of `values`, on whatever device: they are gathered whole, a number a token, so that the indices
    stay in place. Together: of several collectives that do not wait for each other, each CPU process picks its own
    first.
    """
    whole = sharding.constrain(jnp.stack(values), mesh)
    return jnp.take(whole.reshape(len(values), -1), index, axis=1, mode="clip")
