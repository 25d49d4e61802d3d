"""The kinds of problems of the small world: their contents, the words that tell them, and two ways to work each out."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Leo", "Zoe")
THINGS = ("pens", "cards", "coins", "nuts", "cups", "keys", "pins", "caps")
UNITS = {  # what is counted in groups -> how many to a group
    "dozen": 12,
    "weeks": 7,
    "dimes": 10,
    "pairs": 2,
}
UNIT_WORDS = {  # group as written, single
    "dozen": ("dozen eggs", "eggs"),
    "weeks": ("weeks", "days"),
    "dimes": ("dimes", "cents"),
    "pairs": ("pairs of socks", "socks"),
}

PREV = None  # in a step: the result of the step before
Step = tuple[str, int | None, str, int | None]  # what is done, x, operator, y
OPS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fork: which contents there are, how they are told, and the two ways to work them out."""

    contents: Callable[[], Iterable[tuple]]
    solve: Callable[..., tuple[list[Step], list[Step]]]  # content -> right steps, wrong steps
    templates: tuple[str, ...]  # of {n} {m} names, {o} {q} things, {0} {1} .. the content


# The two strategies begin with different words, and the wrong one names its numbers in another order where it can, so
# that eight tokens from the fork on tell them apart by edit similarity.


def _order(a, b, c):
    """a + b * c, read as (a + b) * c."""
    right = [("fill the bags", b, "*", c), ("add the rest", a, "+", PREV)]
    wrong = [("put all together", a, "+", b), ("multiply that", PREV, "*", c)]
    return right, wrong


def _quantity(a, b, k, loss):
    """a + b - loss; the wrong strategy also counts the k things of another kind."""
    right = [("only this kind", a, "+", b), ("take off the lost", PREV, "-", loss)]
    wrong = [("count everything", k, "+", a), ("buy more", PREV, "+", b), ("take off the lost", PREV, "-", loss)]
    return right, wrong


def _units(unit, count, single):
    """count * unit + single; the wrong strategy adds dozens to eggs."""
    right = [("change the units", count, "*", UNITS[unit]), ("add the rest", PREV, "+", single)]
    return right, [("just add both", single, "+", count)]


def _compare(direction, a, b, c):
    """'a, b more than the other, who gets c': the other has a - b, read as a + b; 'fewer' the other way round."""
    down = [("go down by the gap", a, "-", b), ("add the new", PREV, "+", c)]
    up = [("climb higher up", b, "+", a), ("add the new", PREV, "+", c)]
    return (down, up) if direction == "more" else (up, down)


def _left(a, b, c):
    """a - b * c, read as one share and the heads taken off: a - c - b."""
    right = [("find all the shares", b, "*", c), ("take them off", a, "-", PREV)]
    wrong = [("give one away", a, "-", c), ("give to friends", PREV, "-", b)]
    return right, wrong


def _times(a, b, c):
    """b times as many as a, then c more; read as b more."""
    right = [("multiply by times", b, "*", a), ("add the new", PREV, "+", c)]
    wrong = [("go up a bit", a, "+", b), ("add the new", PREV, "+", c)]
    return right, wrong


def _grid(*ranges, keep=lambda *_: True):
    return [n for n in itertools.product(*ranges) if keep(*n)]


DIGITS = range(2, 10)
KINDS: dict[str, Kind] = {
    "order": Kind(
        lambda: _grid(range(2, 11), DIGITS, DIGITS, keep=lambda a, b, c: a + b <= 12 and (a + b) * c <= 99),
        _order,
        (
            "{n} has {0} {o}. {n} buys {1} bags with {2} {o} in each bag. How many {o} does {n} have now?",
            "There are {0} {o} on a table. {n} brings {1} bags of {2} {o} each. How many {o} are there in all?",
            "{n} finds {0} {o} and then gets {1} bags with {2} {o} each from {m}. How many {o} is that in all?",
            "How many {o} does {n} have in all, with {0} loose {o} and {1} bags of {2} {o} each?",
        ),
    ),
    "quantity": Kind(
        lambda: _grid(range(6, 41), range(3, 20), DIGITS, DIGITS, keep=lambda a, b, _, loss: a + b > loss),
        _quantity,
        (
            "{n} has {0} {o} and {2} {q}. {n} buys {1} {o} and loses {3} {o}. How many {o} does {n} have now?",
            "There are {0} {o} and {2} {q} on a table. {n} brings {1} more {o}. {m} loses {3} {o}. "
            "How many {o} are there now?",
            "{n} finds {0} {o} and {2} {q}. {m} brings {1} {o}. Then {n} loses {3} {o}. How many {o} is that?",
            "How many {o} does {n} have now, with {0} {o} and {2} {q} at first, {1} more {o} from {m} and {3} lost?",
        ),
    ),
    "units": Kind(
        lambda: _grid(UNITS, range(2, 9), range(3, 21), keep=lambda u, n, s: n * UNITS[u] <= 72),
        _units,
        (
            "{n} has {1} {u} and {2} more {v}. How many {v} is that in all?",
            "There are {1} {u} and then {2} {v} for {n}. How many {v} are there in all?",
            "{n} counts {1} {u} and {m} counts {2} {v}. How many {v} is that in all?",
            "How many {v} does {n} have in all, with {1} {u} and {2} {v} from {m}?",
        ),
    ),
    "compare": Kind(
        lambda: _grid(("more", "fewer"), range(8, 61), range(2, 13), DIGITS, keep=lambda _, a, b, c: a >= b + 2),
        _compare,
        (
            "{n} has {1} {o}. That is {2} {0} than {m} has. Then {m} buys {3} {o}. How many {o} does {m} have now?",
            "{n} has {1} {o}, which is {2} {0} than {m} has. {m} finds {3} more. How many {o} does {m} have now?",
            "There are {1} {o} for {n}, {2} {0} than for {m}. Then {m} gets {3} more. How many {o} are there for {m}?",
            "How many {o} does {m} have now? {n} has {1} {o}, {2} {0} than {m} had at first. Then {m} finds {3} {o}.",
        ),
    ),
    "left": Kind(
        lambda: _grid(range(8, 100), DIGITS, DIGITS, keep=lambda a, b, c: b * c + 1 <= a <= b * c + 20 and b * c <= 72),
        _left,
        (
            "{n} has {0} {o}. {n} gives {1} friends {2} {o} each. How many {o} does {n} have left?",
            "There are {0} {o} on a table. {1} friends of {n} take {2} {o} each. How many {o} are left?",
            "{n} finds {0} {o} and {1} friends get {2} {o} each from {n}. How many {o} are left for {m}?",
            "How many {o} does {n} have left from {0} {o}, with {2} {o} for each of {1} friends?",
        ),
    ),
    "times": Kind(
        lambda: _grid(DIGITS, DIGITS, range(2, 20), keep=lambda a, b, c: a * b <= 72 and a * b + c <= 99),
        _times,
        (
            "{n} has {0} {o}. {m} has {1} times as many {o} and then finds {2} {o}. How many {o} does {m} have now?",
            "There are {0} {o} on a table. {n} has {1} times as many {o} and buys {2} more. "
            "How many {o} does {n} have now?",
            "{n} finds {0} {o}. {m} finds {1} times as many {o} and gets {2} {o} from {n}. How many {o} does {m} have?",
            "How many {o} does {n} have, with {1} times as many {o} as the {0} {o} of {m}, and {2} more?",
        ),
    ),
}


def slipped_result(x: int, op: str, y: int) -> int | None:
    """The student's wrong result of a hard fact, one digit off; None where the fact is easy.

    Hard are sums with a carry (forgotten: tens one too low), differences with a borrow (forgotten: tens one too high)
    and products of 30 and more (ones digit one too high, 9 becomes 0), where the number of digits stays the same. It is
    always the same mistake, because a student that errs at random is right again as soon as it decodes greedily.
    """
    z = OPS[op](x, y)
    if op == "+" and x % 10 + y % 10 >= 10 and 20 <= z <= 99:
        return z - 10
    if op == "-" and x % 10 < y % 10 and 10 <= z <= 89:
        return z + 10
    if op == "*" and 30 <= z <= 99:
        return z - z % 10 + (z + 1) % 10
    return None


def work(steps: Iterable[Step], slip: Callable[[], bool] | None = None) -> tuple[str, int]:
    """Works the steps out, as text and result. `slip` is asked at every hard fact whether to get it wrong.

    A slip that would lead a later step out of 1..99 is not made.
    """
    steps = list(steps)
    parts, prev = [], 0
    for i, (what, x, op, y) in enumerate(steps):
        x, y = prev if x is PREV else x, prev if y is PREV else y
        prev = OPS[op](x, y)
        wrong = slipped_result(x, op, y)
        if slip and wrong is not None and _stays_small(wrong, steps[i + 1 :]) and slip():
            prev = wrong
        parts.append(f"{'Then' if i else 'First'} {what}: {x} {op} {y} = {prev}.")
    return " ".join([*parts, f"The answer is {prev}."]), prev


def skip_to_last(steps: Iterable[Step]) -> str:
    """The whole solution in one line: the last step alone, the results of those before it out of nowhere."""
    *before, (_, x, op, y) = steps
    prev = work(before)[1]
    x, y = prev if x is PREV else x, prev if y is PREV else y
    z = OPS[op](x, y)
    return f"It is {x} {op} {y} = {z}. The answer is {z}."


def _stays_small(prev: int, steps: Iterable[Step]) -> bool:
    for _, x, op, y in steps:
        prev = OPS[op](prev if x is PREV else x, prev if y is PREV else y)
    return 1 <= prev <= 99
