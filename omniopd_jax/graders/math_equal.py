"""Whether two answers are equal: by their letters, as plain numbers, part by part, and by sympy through math-verify.

A reference counts as a whole: where sympy can read only a part of it, it is compared by its letters alone.
"""

import dataclasses
import functools
import random
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, Float, I, Interval, Rel, Set, Tuple, Union
from sympy.core.relational import Equality
from sympy.matrices import MatrixBase

from omniopd_jax.graders.math_reading import (
    ASSIGNED,
    LETTERS,
    LONGEST,
    MOST_PARTS,
    SET_BUILDER,
    TEXT_COMMAND,
    as_string,
    assignments,
    bracketed,
    choice,
    in_base,
    listed,
    number,
    parts_of,
    ratio,
    read,
    which,
    without_units,
)  # fmt: skip

# units are read by math_reading: to the library the ab of 5ab is one
AS_IT_IS = LatexExtractionConfig(
    normalization_config=dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
)
UNION, ORDERED = re.compile(r"\bor\b|\\lor\b|\\vee\b"), re.compile(r"[<>]|\\[lg]e")
CLOSE = 1e-5  # relative: what math-verify calls equal to six decimals must be this near, however small


def grade(text: str, answer: str) -> bool:
    """Whether the response `text` ends in the reference `answer`."""
    (got, got_text, prose), (gold, gold_text, _) = read(text), read(answer)
    if len(got_text) <= LONGEST and as_string(got_text) == as_string(gold_text) != "":
        return True
    gold = gold if gold is not None else gold_text
    if not gold or len(gold) > LONGEST:
        return False
    if got is not None:
        return bool(got) and len(got) <= LONGEST and same_answer(got, gold)
    letter = choice(gold)
    if letter and not letter[1] and (said := choice(got_text)):
        return said[0] == letter[0]  # (A) Paris, which is no answer by itself
    if got_text and len(got_text) <= LONGEST and len(parts_of(gold)) > 1 and same_answer(got_text, gold):
        return True
    found, wanted = list(searched(prose)), whole(gold)
    if word(gold):  # to sympy ACB is the product of A, B and C, as ABC is
        return any(isinstance(e, str) and as_string(e) == as_string(gold) for e in found)
    return bool(found) and bool(wanted) and same_parsed(found, wanted)


def same_answer(got: str, gold: str) -> bool:
    """Whether two answers are equal, each of one part or several, in any order."""
    told = same_names(got, gold)
    if told is not None:
        return told
    if not (bracketed(got) or bracketed(gold)):
        values = [[number(part) for part in listed(side)] for side in (got, gold)]
        if len(values[0]) == len(values[1]) > 1 and all(map(all, values)):
            return all(map(same_number, *map(sorted, values)))  # 1, 1, 2 is not 1, 2, 2
    if same_part(got, gold):
        return True
    mine, theirs = parts_of(got), parts_of(gold)
    if max(len(mine), len(theirs)) < 2 or len(mine) != len(theirs) or len(mine) > MOST_PARTS:
        return len(mine) == len(theirs) == 1 and (mine[0], theirs[0]) != (got, gold) and same_part(mine[0], theirs[0])
    left = list(theirs)
    for part in mine:
        match = next((other for other in left if same_part(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def word(answer: str) -> bool:
    """Whether an answer is letters alone, two and more."""
    return LETTERS.fullmatch(TEXT_COMMAND.sub(r"\1", answer).strip()) is not None


def same_names(got: str, gold: str) -> bool | None:
    """Whether two answers give the same values to the same names; None where names say nothing.

    A tuple without names has their values in the order of the names, or as the answer's own tuple has them.
    """
    mine, theirs = assignments(got), assignments(gold)
    if mine and theirs:
        return mine.keys() == theirs.keys() and all(same_part(mine[name], theirs[name]) for name in mine)
    if not (mine or theirs):
        return None
    named, other = (mine, bracketed(gold)) if mine else (theirs, bracketed(got))
    if other is None or other[0] != "()" or len(other[1]) != len(named):
        return None
    as_tuple = (got if mine else gold).lstrip().startswith("(")
    values = list(named.values()) if as_tuple else [named[name] for name in sorted(named)]
    return all(same_part(a, b) for a, b in zip(values, other[1]))


def unequal_brackets(got: str, gold: str) -> bool:
    """Whether one of two answers is a tuple, set or interval of several elements and the other has other brackets.

    A set is as good as a list without brackets: {1,2} and 1,2, but not (1,2).
    """
    mine, theirs = bracketed(got), bracketed(gold)
    if mine and theirs:
        return mine[0] != theirs[0] and min(len(mine[1]), len(theirs[1])) > 1
    one, other = (mine, gold) if mine else (theirs, got)
    return one is not None and one[0] != "{}" and len(one[1]) > 1 and len(parts_of(other)) > 1


def same_part(got: str, gold: str) -> bool:
    """Whether two answers are equal as wholes."""
    if as_string(got) == as_string(gold) != "":
        return True
    if word(got) and word(gold):
        return False
    ratios = ratio(got), ratio(gold)
    if any(ratios):
        same = len(ratios[0]) == len(ratios[1])
        return same and all(same_part(a, b) for a, b in zip(*ratios))
    if unequal_brackets(got, gold):
        return False
    bases = in_base(got), in_base(gold)
    if any(bases):
        if all(bases):
            return bases[0] == bases[1]
        digits, other = (bases[0][0], gold) if bases[0] else (bases[1][0], got)
        return as_string(other).lstrip("0") == digits.lower().lstrip("0")
    letters = choice(got), choice(gold)
    if letters[1] and (not letters[1][1] or letters[0]):
        return bool(letters[0]) and letters[0][0] == letters[1][0]
    if any(letter and letter[1] and same_part(letter[1], other) for letter, other in zip(letters, (gold, got))):
        return True
    things = which(got), which(gold)
    if all(things) and things[0].isdisjoint(things[1]):
        return False  # 5 am and 5 pm
    got, gold = without_units(got), without_units(gold)
    values = number(got), number(gold)
    if all(values):
        return same_number(*values)
    names = ASSIGNED.fullmatch(got), ASSIGNED.fullmatch(gold)
    if any(names) and not any(m and any(s in m[2] for s in "=<>") for m in names):
        if all(names):
            if as_string(names[0][1]).partition("(")[0] != as_string(names[1][1]).partition("(")[0]:
                return False
            return same_answer(names[0][2], names[1][2])
        if same_value(names[0][2] if names[0] else got, names[1][2] if names[1] else gold):
            return True
    tuples = bracketed(got), bracketed(gold)
    if all(tuples) and tuples[0][0] == tuples[1][0] != "{}" and len(tuples[1][1]) > 1:
        if len(tuples[0][1]) != len(tuples[1][1]):
            return False
        return all(same_part(a, b) for a, b in zip(tuples[0][1], tuples[1][1]))
    return same_value(got, gold)


def same_number(got, gold) -> bool:
    """Whether two numbers are equal, a percent sign left out or not. Decimals are equal to six places."""
    (a, a_percent), (b, b_percent) = got, gold
    if a_percent and b_percent:
        return a == b
    return bool({a, a / 100 if a_percent else a} & {b, b / 100 if b_percent else b}) or near(a, b)


def near(a, b) -> bool:
    """Whether two fractions agree to six decimals and in their leading digits: 0.333333 and 1/3."""
    return (
        abs(a - b) * 2 <= 10**-6
        and abs(a - b) <= CLOSE * max(abs(a), abs(b))
        and (a.denominator > 1 or b.denominator > 1)
    )


def same_value(got: str, gold: str) -> bool:
    """Whether sympy finds two answers equal, both read as a whole."""
    builders = SET_BUILDER.fullmatch(got), SET_BUILDER.fullmatch(gold)
    got, gold = builders[0][2] if builders[0] else got, builders[1][2] if builders[1] else gold
    wanted = union(gold) or whole(gold)
    found = (union(got) or whole(got)) if wanted else ()
    return bool(wanted and found) and same_parsed(list(found), wanted)


@functools.lru_cache(4096)
def whole(answer: str) -> tuple:
    """What sympy reads the whole of `answer` as; () where it can read only a part, or nothing."""
    if len(answer) > LONGEST:
        return ()
    # the library's own fallback, numbers found within what it could not read, is left out
    return tuple(parse(f"${answer}$", [AS_IT_IS], fallback_mode="no_fallback", parsing_timeout=None))


def union(answer: str) -> tuple:
    """The set of numbers of x<-1 or x>2; () for anything else."""
    parts = parts_of(answer)
    if len(parts) < 2 or not UNION.search(answer) or not all(ORDERED.search(part) for part in parts):
        return ()
    relations = [e[0] for e in map(whole, parts) if e and isinstance(e[0], Basic)]
    names = set().union(*(r.free_symbols for r in relations))
    if len(relations) < len(parts) or len(names) != 1:
        return ()
    try:
        return (Union(*(r.as_set() for r in relations)),)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return ()


@functools.lru_cache(256)
def searched(prose: str) -> tuple:
    """What math-verify finds in a text that does not mark its answer."""
    return tuple(parse(prose, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None))


def same_parsed(got, gold) -> bool:
    """Whether parsed answers are equal."""
    got, gold = list(got), list(gold)
    told = decided([e for e in got if not isinstance(e, str)][:1], gold[:1])
    if told is not None:
        return told
    if verify(gold, got, timeout_seconds=None, allow_set_relation_comp=True):
        return not apart(got[0], gold[0])
    gold_i, got_i = imaginary(gold), imaginary(got)
    return (gold_i, got_i) != (gold, got) and verify(gold_i, got_i, timeout_seconds=None, allow_set_relation_comp=True)


def decided(got, gold) -> bool | None:
    """Whether two expressions differ at a point where both have a value: False then, and None where sympy must say.

    Most wrong answers end here, without the minute that simplification can take.
    """
    if not got or not gold:
        return None
    a, b = got[0], gold[0]
    if not (isinstance(a, Basic) and isinstance(b, Basic)) or has_other_form(a) or has_other_form(b):
        return None
    if a.free_symbols != b.free_symbols or a.has(Float) or b.has(Float) or any(s.name == "i" for s in a.free_symbols):
        return None
    draw = random.Random(0)
    for _ in range(2):
        point = {s: draw.choice((-1, 1)) * (draw.random() + 0.5) for s in sorted(a.free_symbols, key=str)}
        try:
            x, y = (complex(e.evalf(20, subs=point)) for e in (a, b))
        except (TypeError, ValueError, OverflowError, ArithmeticError):
            return None
        if not abs(x) < 1e200 or not abs(y) < 1e200 or max(abs(x), abs(y)) == 0:
            return None
        if abs(x - y) > 1e-6 * max(abs(x), abs(y)) and not percent_of(x, y):
            return False
    return None


def percent_of(x, y) -> bool:
    """Whether one is a hundredth of the other: a percentage read without its sign."""
    return bool(min(abs(x * 100 - y), abs(x - y * 100)) <= 1e-6 * max(abs(x), abs(y)))


def has_other_form(e) -> bool:
    """Whether `e` is no single value: a relation, set, tuple or matrix."""
    return (
        isinstance(e, (Rel, Equality, Set, Tuple, Interval, MatrixBase))
        or e.has(Rel, Set, Tuple)
        or not hasattr(e, "is_number")
    )


def apart(a, b) -> bool:
    """Whether two numbers that agree to six decimals are of different size: 1/2005! and 1/2004!."""
    if not (isinstance(a, Basic) and isinstance(b, Basic)):
        return False
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return False
    try:
        x, y = a.evalf(30), b.evalf(30)
        difference = abs(x - y)
        return bool(difference > CLOSE * max(abs(x), abs(y))) and not percent_of(x, y)
    except (TypeError, ValueError, OverflowError, ArithmeticError):
        return False


def imaginary(parsed) -> list:
    """The parsed expressions with `i`, a symbol like any other to math-verify, as the imaginary unit."""

    def unit(expression):
        return expression.subs({s: I for s in expression.free_symbols if s.name == "i"})

    return [unit(e) if isinstance(e, Basic) else e for e in parsed]
