"""The embedded small world: word problems with worked solutions, for students that train on a CPU in minutes.

A *fork* is the place in a solution where a student is torn between two strategies that lead to different text
(design.md, 'The embedded small world'). Every kind of problem has one, right after the solution's first word. All texts
are pure functions of the arguments: randomness comes from integer seeds and a stable hash. Everything in this package
is ours; the paper has no such world.

Three worlds share the problems and differ in the corpora:

  forks   the student's corpus mixes right and wrong strategies; the teacher's is right
  slips   the student's strategy is right, its arithmetic forgets carries and borrows: one wrong digit, carried on
  style   as forks, but most of the teacher's solutions skip the steps
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Mapping

import numpy as np

from omniopd_jax.errors import UserError, one_of
from omniopd_jax.world.forks import KINDS, NAMES, THINGS, UNIT_WORDS, Step, skip_to_last, slipped_result, work
from omniopd_jax.world.tokenizer import CHAT_TEMPLATE, SPECIALS, train_tokenizer

__all__ = [
    "CHAT_TEMPLATE", "FORKS", "ROLES", "SLIP_SHARE", "SPECIALS", "SPLITS", "TERSE_SHARE", "WORLDS", "WRONG_SHARE",
    "Problem", "capacity", "corpus", "extract_answer", "grade", "problems", "slipped_result", "split_of",
    "train_tokenizer", "work",
]  # fmt: skip

WORLDS = ("forks", "slips", "style")
SPLITS = {"train": 80, "validation": 7, "test": 13}  # percent of the numeric contents
ROLES = ("student", "teacher")

# Share of the student's traces that take the wrong strategy. Greedy decoding follows the majority: a kind above 0.5 is
# mostly wrong, one below mostly right. With four of six above, a student that learned its corpus scores about a third.
WRONG_SHARE = {"order": 0.65, "quantity": 0.3, "units": 0.68, "compare": 0.65, "left": 0.68, "times": 0.3}
SLIP_SHARE = 0.65  # world slips: how often the student gets a hard fact wrong (forks.slipped_result); easy ones never
TERSE_SHARE = 0.8  # world style: teacher's traces that skip the steps; the rest teach it to continue a worked one
FORKS = tuple(KINDS)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One word problem. `right`, `wrong`, `slipped` and `terse` are whole solutions that end in 'The answer is N.'"""

    id: str
    prompt: str
    answer: str
    fork: str  # a member of FORKS
    numbers: tuple[int | str, ...]  # the content, which alone decides the split
    right: str  # worked out with the right strategy
    wrong: str  # worked out with the wrong strategy, its arithmetic in order
    slipped: str  # world slips: the right strategy with every hard fact wrong; equal to `right` where there is none
    terse: str  # world style: one line, all steps but the last skipped
    steps: tuple[Step, ...]  # the right strategy


def split_of(fork: str, numbers: tuple) -> str:
    """The split that a content belongs to, by a stable hash: every telling of the same numbers is on the same side."""
    at = int.from_bytes(hashlib.blake2b(f"{fork}:{numbers}".encode(), digest_size=8).digest(), "big") % 100
    for split, share in SPLITS.items():
        if at < share:
            return split
        at -= share
    raise AssertionError("SPLITS must add up to 100")


@functools.cache
def _contents(fork: str, split: str) -> tuple[tuple, ...]:
    """The contents of a kind in a split; those whose two strategies agree are no forks and left out."""
    kind = KINDS[fork]
    kept = []
    for numbers in kind.contents():
        right, wrong = kind.solve(*numbers)
        if work(right)[1] != work(wrong)[1] and split_of(fork, numbers) == split:
            kept.append(numbers)
    return tuple(kept)


@functools.cache
def _tellings(fork: str) -> tuple[tuple[str, dict[str, str]], ...]:
    """All ways to tell a content: template and words. A word that the template lacks is not varied: no text twice."""
    out = []
    for template in KINDS[fork].templates:
        for i, n in enumerate(NAMES):
            others = [m for m in NAMES if m != n] if "{m}" in template else [NAMES[i - 1]]
            things = THINGS if "{o}" in template else [THINGS[0]]
            for m, (j, o) in itertools.product(others, enumerate(things)):
                for q in (THINGS[j - 1], THINGS[j - 3]) if "{q}" in template else [""]:
                    out.append((template, {"n": n, "m": m, "o": o, "q": q}))
    return tuple(out)


def _problem(world: str, fork: str, numbers: tuple, telling: int) -> Problem:
    template, words = _tellings(fork)[telling]
    if fork == "units":
        words = words | dict(zip("uv", UNIT_WORDS[numbers[0]]))
    right, wrong = KINDS[fork].solve(*numbers)
    right_text, answer = work(right)
    return Problem(
        id=f"{world}/{fork}/{'-'.join(map(str, numbers))}/{telling}",
        prompt=template.format(*numbers, **words),
        answer=str(answer),
        fork=fork,
        numbers=numbers,
        right=right_text,
        wrong=work(wrong)[0],
        slipped=work(right, lambda: True)[0],
        terse=skip_to_last(right),
        steps=tuple(right),
    )


def capacity(split: str) -> int:
    """How many distinct prompts `problems` can give for a split, the kinds in turn."""
    one_of(split, SPLITS, "split")
    return len(FORKS) * min(len(_contents(fork, split)) * len(_tellings(fork)) for fork in FORKS)


def problems(world: str, split: str, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` problems of a seeded order of a split: all prompts distinct, the kinds in turn.

    A smaller count gives a prefix of a larger one. The worlds differ in ids and corpora, not in problems.

    Raises:
      UserError: an unknown world or split, a negative seed, or a count that the split cannot give.
    """
    one_of(world, WORLDS, "world")
    one_of(split, SPLITS, "split")
    if not 0 <= count <= capacity(split):
        raise UserError(f"count = {count} problems of split {split!r}; allowed: 0 to {capacity(split)}")
    return [_problem(world, *draw) for draw in _draws(split, count, seed, 0)]


def _draws(split: str, count: int, seed: int, stream: int) -> list[tuple[str, tuple, int]]:
    """(fork, content, telling), no two alike: each kind goes round its contents, with another telling every round."""
    orders = []
    for i, fork in enumerate(FORKS):
        rng = _rng(seed, stream, list(SPLITS).index(split), i)
        contents, tellings = _contents(fork, split), len(_tellings(fork))
        start = rng.integers(tellings, size=len(contents))
        orders.append((rng.permutation(len(contents)), start, rng.permutation(tellings)))
    draws = []
    for at in range(count):
        fork, (order, start, shuffled) = FORKS[at % len(FORKS)], orders[at % len(FORKS)]
        turn, i = divmod(at // len(FORKS), len(order))
        telling = shuffled[(start[i] + turn) % len(shuffled)]
        draws.append((fork, _contents(fork, split)[order[i]], int(telling)))
    return draws


def _rng(seed: int, *stream: int) -> np.random.Generator:
    if seed < 0:
        raise UserError(f"seed = {seed}; allowed: 0 and up")
    return np.random.default_rng([seed, *stream])


def corpus(
    world: str,
    role: str,
    count: int,
    seed: int,
    *,
    wrong_share: Mapping[str, float] = WRONG_SHARE,
    slip_share: float = SLIP_SHARE,
    terse_share: float = TERSE_SHARE,
) -> list[tuple[str, str]]:
    """Training texts from the train split as (prompt, solution), the solution of the kind that `role` writes.

    Args:
      world: one of WORLDS.
      role: 'student' (mixes strategies, or slips) or 'teacher' (right; in world style mostly terse).
      count: how many, all prompts distinct.
      seed: of the choice of problems and of the mixture.
      wrong_share: worlds forks and style, student: share of wrong strategies by kind.
      slip_share: world slips, student: how often a hard fact goes wrong.
      terse_share: world style, teacher: share of solutions that skip the steps.

    Raises:
      UserError: an unknown world or role, a kind missing from `wrong_share`, a negative seed, or too large a count.
    """
    one_of(world, WORLDS, "world")
    one_of(role, ROLES, "role")
    if missing := [fork for fork in FORKS if fork not in wrong_share]:
        raise UserError(f"wrong_share lacks {', '.join(missing)}; it must name every kind: {', '.join(FORKS)}")
    if not 0 <= count <= capacity("train"):
        raise UserError(f"count = {count} texts of the train split; allowed: 0 to {capacity('train')}")
    stream = 1 + ROLES.index(role)
    rng = _rng(seed, stream)
    texts = []
    for draw in _draws("train", count, seed, stream):
        p = _problem(world, *draw)
        if role == "teacher":
            solution = p.terse if world == "style" and rng.random() < terse_share else p.right
        elif world == "slips":
            solution = work(p.steps, lambda: rng.random() < slip_share)[0]
        else:
            solution = p.wrong if rng.random() < wrong_share[p.fork] else p.right
        texts.append((p.prompt, solution))
    return texts


ANSWER_MARK = "The answer is"
_NUMBER = re.compile(r"\s*(-?[0-9]+(?:\.[0-9]+)?)")  # ASCII digits only: no other digit is an answer here


def extract_answer(text: str) -> str | None:
    """The number right after the last 'The answer is', as written; None where there is none."""
    at = text.rfind(ANSWER_MARK)
    found = _NUMBER.match(text, at + len(ANSWER_MARK)) if at >= 0 else None
    return found[1] if found else None


def grade(text: str, answer: str) -> bool:
    """Whether the text's final answer is `answer`. Compared as text, so that a number of any length is harmless."""
    found = extract_answer(text)
    return found is not None and _plain(found) == _plain(answer.strip())


def _plain(number: str) -> str:
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    digits = digits.lstrip("0") or "0"
    return digits if digits == "0" else sign + digits
