"""Which row is decoded in which slot, and which pages of the cache it holds: the sampler's bookkeeping, on the host.

Every process keeps the same books for all shards. They follow from the prompts' lengths, known to all before the first
turn, and from how far each slot is after a turn, which every device returns: nothing else has to be agreed.

A row that ends gives its slot to the next one that waits. Rows of one prompt share the pages that its prompt fills and
have the page where it ends each for itself. Where a pool has no page left, the row with the fewest tokens gives up its
place and starts again later; it draws the same tokens, for they follow from its key.
"""

import dataclasses
from collections import Counter, deque
from typing import NamedTuple

import numpy as np

from omniopd_jax.run.batching import bucket

SMALLEST = 8  # slots of a shard below which the batch is not made smaller


@dataclasses.dataclass
class Held:
    """A row in a slot. pages: in order of position; length: positions held; t: tokens sampled."""

    row: int
    prompt: int
    length: int
    pages: list[int]
    t: int = 0


@dataclasses.dataclass
class Open:
    """A prompt whose rows have not all started: its pages, and the entry of the prefill that it has."""

    prompt: int
    rows: deque[int]
    pages: list[int]
    entry: int


@dataclasses.dataclass
class Shard:
    """The slots and the pool of one shard of rows. rank: the process that has it. uses: owners of each page."""

    rank: int
    slots: list[Held | None]
    free: list[int]
    uses: Counter = dataclasses.field(default_factory=Counter)
    open: Open | None = None

    def live(self) -> list[Held]:
        """Its rows."""
        return [held for held in self.slots if held is not None]


class Start(NamedTuple):
    """A row that starts. entry: which prefilled prompt of its shard it goes on from. copied, copy: the page that holds
    the prompt's end and the row's own copy of it, or 0 and 0."""

    slot: int
    entry: int
    row: int
    prompt: int
    copied: int
    copy: int


@dataclasses.dataclass(frozen=True)
class Refill:
    """What starts now, by shard: `prompts` to prefill, with their pages; `starts`; and the entry that is kept.
    `entries`, `rows`: how many each shard's arrays have room for; entry number `entries` is what was kept before."""

    prompts: list[list[tuple[int, list[int]]]]
    starts: list[list[Start]]
    keep: list[int]
    entries: int
    rows: int


class Moved(NamedTuple):
    """What a turn did in a slot: `place` among all slots, the row, its tokens before and after, whether it ended."""

    place: int
    row: int
    before: int
    after: int
    ended: bool


def padded(count: int) -> int:
    """How many an array has room for, so that shapes are few: powers of two up to 8, then buckets."""
    return bucket(count, 8) if count > 8 else 1 << (count - 1).bit_length() if count else 0


def width(positions: int, page: int) -> int:
    """Columns of the table of pages for rows of so many positions."""
    return bucket(-(-positions // page), 2)


class Slots:
    """See the module.

    Args:
      prompt_lengths: of each process, the lengths of its prompts; all have as many.
      per_prompt: rows of each prompt; rows are numbered by process, prompt and sample.
      ranks: the process of each shard.
      slots, pages: of one shard; page 0 is never given out. page: positions of a page.
      longest: tokens that a row may have.
    """

    def __init__(self, prompt_lengths, per_prompt: int, *, ranks, slots: int, pages: int, page: int, longest: int):
        self.page, self.longest, self.pages = page, longest, pages
        self.prompt_length = [n for lengths in prompt_lengths for n in lengths]
        self.width = width(max(self.prompt_length) + longest, page)
        if pages - 1 < self._pages_for(max(self.prompt_length) + longest):
            raise ValueError(f"a pool of {pages} pages of {page} does not hold one row of full length")
        self.shards = [Shard(rank, [None] * slots, list(range(pages - 1, 0, -1))) for rank in ranks]
        self.waiting: list[deque[tuple[int, deque[int]]]] = []  # by process: (prompt, its rows)
        first = 0
        for lengths in prompt_lengths:
            rows = [(p, deque(range(p * per_prompt, (p + 1) * per_prompt))) for p in range(first, first + len(lengths))]
            self.waiting.append(deque(rows))
            first += len(lengths)
        self.ended = [0] * len(prompt_lengths)  # rows, by process
        self.tokens = self.started = self.gave_up = 0  # sampled and kept; rows in slots or ended; rows given up

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page)

    @property
    def slots(self) -> int:
        """Of one shard."""
        return len(self.shards[0].slots)

    def live(self) -> int:
        """Rows in slots, over all shards."""
        return sum(len(s.live()) for s in self.shards)

    def fullest(self) -> int:
        """Rows in the slots of the shard that has most."""
        return max(len(s.live()) for s in self.shards)

    def waits(self) -> bool:
        """Whether any row has not started."""
        return any(self.waiting) or any(s.open for s in self.shards)

    def mean_length(self) -> float:
        """Tokens sampled so far over rows started so far."""
        return self.tokens / max(1, self.started)

    def refill(self, ahead: int, most_prompts: int) -> Refill | None:
        """Gives free slots to rows that wait; None where nothing starts.

        Args:
          ahead: positions of the next turn, for which every live row must find room.
          most_prompts: prompts of one prefill, at most, for each shard.
        """
        limit = max((self._could_start(s) for s in self.shards), default=0)
        if self.started and limit:  # later prefills hold a power of two, so that none is filled up for its shape
            limit = 1 << (limit.bit_length() - 1)
        made = [self._fill(s, ahead, min(limit, most_prompts)) for s in self.shards]
        if not any(prompts or starts for prompts, starts in made):
            return None
        entries = padded(max(len(prompts) for prompts, _ in made))
        all_starts, keep = [], []
        for shard, (_, starts) in zip(self.shards, made):
            all_starts.append([s._replace(entry=entries) if s.entry < 0 else s for s in starts])
            entry = shard.open.entry if shard.open else 0
            keep.append(entries if entry < 0 else entry)
            if shard.open:
                shard.open.entry = -1
        return Refill([p for p, _ in made], all_starts, keep, entries, padded(max(1, *map(len, all_starts))))

    def _could_start(self, shard: Shard) -> int:
        """New prompts that its free slots could take."""
        free = shard.slots.count(None) - (len(shard.open.rows) if shard.open else 0)
        count = 0
        for _, rows in self.waiting[shard.rank]:
            if free <= 0:
                break
            free, count = free - len(rows), count + 1
        return count

    def _fill(self, shard: Shard, ahead: int, limit: int):
        """Rows into free slots while pages are left beside what the live rows `need` in the next turn; a first row has
        none to yield to."""
        prompts, starts = [], []
        live = shard.live()
        need = sum(self._lacks(held, ahead) for held in live) if live else None
        for slot in [i for i, held in enumerate(shard.slots) if held is None]:
            if shard.open is None:
                if not self.waiting[shard.rank] or len(prompts) == limit:
                    break
                prompt, rows = self.waiting[shard.rank][0]
                count = self._pages_for(self.prompt_length[prompt])
                if need is not None and len(shard.free) - count - 2 < need:
                    break
                self.waiting[shard.rank].popleft()
                pages = self._take(shard, count)
                shard.open = Open(prompt, rows, pages, len(prompts))
                prompts.append((prompt, pages))
            if need is not None and len(shard.free) - 2 < need:
                break
            starts.append(self._start(shard, slot))
            need = (need or 0) + self._lacks(shard.slots[slot], ahead)
        return prompts, starts

    def _lacks(self, held: Held, ahead: int) -> int:
        return self._pages_for(held.length + min(ahead, self.longest - held.t)) - len(held.pages)

    def _take(self, shard: Shard, count: int) -> list[int]:
        pages = [shard.free.pop() for _ in range(count)]
        shard.uses.update(pages)
        return pages

    def _drop(self, shard: Shard, pages: list[int]) -> None:
        for page in pages:
            shard.uses[page] -= 1
            if not shard.uses[page]:
                del shard.uses[page]
                shard.free.append(page)

    def _start(self, shard: Shard, slot: int):
        """The next row of the shard's open prompt, into `slot`."""
        open_, length = shard.open, self.prompt_length[shard.open.prompt]
        row, pages, copied, copy = open_.rows.popleft(), list(open_.pages), 0, 0
        if open_.rows:  # another row will want the page where the prompt ends
            whole = length // self.page
            shard.uses.update(pages[:whole])
            if whole < len(pages):
                copied, [copy] = pages[whole], self._take(shard, 1)
                pages[whole] = copy
        else:
            shard.open = None  # the last one has the prompt's own
        shard.slots[slot] = Held(row, open_.prompt, length, pages)
        self.started += 1
        return Start(slot, open_.entry, row, open_.prompt, copied, copy)

    def make_room(self, steps: int) -> list[int]:
        """Pages for `steps` more tokens of every row; returns the rows that gave up their places for it."""
        gave_up = []
        for shard in self.shards:
            while sum(self._lacks(held, steps) for held in shard.live()) > len(shard.free):
                gave_up += self._give_up(shard)
            for held in shard.live():
                held.pages += self._take(shard, max(0, self._lacks(held, steps)))
        return gave_up

    def _give_up(self, shard: Shard) -> list[int]:
        if shard.open:  # its pages come first: nothing was sampled from them yet
            self.waiting[shard.rank].appendleft((shard.open.prompt, shard.open.rows))
            self._drop(shard, shard.open.pages)
            shard.open = None
            return []
        slot, held = min(
            ((i, h) for i, h in enumerate(shard.slots) if h is not None), key=lambda pair: (pair[1].t, -pair[1].row)
        )
        shard.slots[slot] = None
        self._drop(shard, held.pages)
        self.waiting[shard.rank].appendleft((held.prompt, deque([held.row])))
        self.tokens, self.started, self.gave_up = self.tokens - held.t, self.started - 1, self.gave_up + 1
        return [held.row]

    def table(self, shards) -> np.ndarray:
        """The pages of the slots of some shards: int32 [slots, width], 0 where there is none."""
        out = np.zeros((len(shards) * self.slots, self.width), np.int32)
        for n, index in enumerate(shards):
            for slot, held in enumerate(self.shards[index].slots):
                if held is not None:
                    out[n * self.slots + slot, : len(held.pages)] = held.pages
        return out

    def live_mask(self, shards) -> np.ndarray:
        """Whether each slot of some shards has a row."""
        return np.array([held is not None for index in shards for held in self.shards[index].slots])

    def turned(self, t_B, live_B) -> list[Moved]:
        """Takes up what a turn did: t_B, live_B of all slots, shard by shard."""
        moved, place = [], -1
        for shard in self.shards:
            for slot, held in enumerate(shard.slots):
                place += 1
                if held is None:
                    continue
                before, held.t = held.t, int(t_B[place])
                held.length, self.tokens = held.length + held.t - before, self.tokens + held.t - before
                moved.append(Moved(place, held.row, before, held.t, not live_B[place]))
                if not live_B[place]:
                    self._drop(shard, held.pages)
                    shard.slots[slot] = None
                    self.ended[shard.rank] += 1
        return moved

    def half(self) -> int:
        """Slots of a shard after the next halving; 0 where rows wait or there are too few to be halved."""
        return 0 if self.waits() or self.slots // 2 < SMALLEST else self.slots // 2

    def shrink(self) -> list[list[int]] | None:
        """Half the slots, or fewer, where nothing waits and the rest have room: which of each shard go on, in order;
        None: as many as before."""
        count = before = self.slots
        while self.half() and count // 2 >= max(self.fullest(), SMALLEST):
            count //= 2
        if count == before:
            return None
        kept = []
        for shard in self.shards:
            order = sorted(range(before), key=lambda i: shard.slots[i] is None)[:count]
            kept.append(order)
            shard.slots = [shard.slots[i] for i in order]
        return kept
