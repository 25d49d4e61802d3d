"""Reads a compiled program's text: which collectives it holds, how large, and which of them run in loops."""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}  # else 4
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) )?.*\{$")
_OP = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program text. Sizes are a device's: `dims` of its largest array, `bytes` of all that it
    joins.

    `times` is how often it runs: the product of the known trip counts of the loops around it (1 where one is unknown);
    `loops` how many loops are around it; `group` the devices that take part.
    """

    kind: str
    dims: tuple[int, ...]
    bytes: float
    group: int
    loops: int
    times: int

    @property
    def moved(self) -> float:
        """Bytes that a device sends in one run, by the ring algorithms."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled module's text, with the loops around it.

    One that the compiler spread over other work, even over the turns of a loop that began after it, appears in many
    pieces with one channel: it counts once, at its outermost piece.
    """
    bodies = _computations(text)
    around = _loops(bodies)
    found: dict = {}
    for name, lines in bodies.items():
        if name not in around:
            continue
        loops, times = around[name]
        for line in lines:
            op = _OP.match(line)
            if not op:
                continue
            group = _group(line)
            dims, size = _whole(op.group(2), bool(op.group(3)), op.group(1), group)
            one = Collective(op.group(2), dims, size, group, loops, times)
            channel = _CHANNEL.search(line)
            key = (one.kind, channel.group(1)) if channel else len(found)
            if key not in found or (found[key].loops, found[key].times) > (loops, times):
                found[key] = one
    return list(found.values())


def _computations(text: str) -> dict[str, list[str]]:
    bodies, current = {}, None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            current = bodies.setdefault(head.group(1), [])
            if line.startswith("ENTRY"):
                bodies["ENTRY"] = current
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return bodies


def _loops(bodies) -> dict[str, tuple[int, int]]:
    """{computation: (loops around it, product of their trip counts)} of all that the entry reaches, by the deepest
    place."""
    around, stack = {}, [("ENTRY", 0, 1)]
    while stack:
        name, loops, times = stack.pop()
        if name in around and around[name] >= (loops, times):
            continue
        around[name] = (loops, times)
        for line in bodies.get(name, ()):
            loop = _WHILE.search(line)
            trips = _trips(line, bodies.get(loop.group(1), ())) if loop else 1
            named = set(_CALLED.findall(line))
            for group in _BRANCHES.findall(line):
                named |= {n.strip().lstrip("%") for n in group.split(",")}
            for called in named & bodies.keys():
                inside = loop and called == loop.group(2)
                stack.append((called, loops + bool(inside), times * (trips if inside else 1)))
    entry = next(name for name, lines in bodies.items() if name != "ENTRY" and lines is bodies["ENTRY"])
    around.pop("ENTRY")
    return around | {entry: (0, 1)}


def _trips(line: str, condition) -> int:
    """How often a loop turns: annotated, or the one number that its condition compares with; 1 where neither says."""
    if known := _TRIPS.search(line):
        return int(known.group(1))
    numbers = {int(n) for li in condition for n in _CONSTANT.findall(li)}
    return numbers.pop() if len(numbers) == 1 else 1


def _whole(kind: str, start: bool, shapes: str, group: int) -> tuple[tuple[int, ...], float]:
    """(dims of the largest array, bytes of all) on the side where they are whole: what an all-gather gives, what a
    reduce-scatter takes (dims of a plain one: what it gives, which is all that its text shows).

    A compiler may join several arrays in one collective; the start of an asynchronous one shows what goes in, what
    comes out, and on a TPU two counters, a plain one what comes out.
    """
    sizes = [_size(*array) for array in _ARRAY.findall(shapes)]
    if start and kind != "all-reduce":
        sizes = [s for s in sizes if s[0]]
        half = len(sizes) // 2
        sizes = sizes[:half] if kind == "reduce-scatter" else sizes[half:]
    total = sum(size for _, size in sizes)
    dims, _ = max(sizes, default=((), 0.0), key=lambda s: s[1])
    return dims, total * group if kind == "reduce-scatter" and not start else total


def _size(kind: str, dims: str) -> tuple[tuple[int, ...], float]:
    shape = tuple(int(d) for d in dims.split(",") if d)
    return shape, math.prod(shape) * ITEM.get(kind, 1 if kind.startswith("f8") else 4)


def _group(line: str) -> int:
    if new := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(new.group(2))
    if old := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(old.group(1).split(","))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", named.group(2)) if a in sizes)
    return 2
