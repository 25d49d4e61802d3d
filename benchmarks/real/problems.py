"""Word problems of one or two steps with worked solutions: the real student's task, made from a seed.

A start (a number of things, or groups of them), then one or two changes, numbers mostly below 30: hard enough that
SmolLM2-135M-Instruct is right in about a quarter of them. Solutions are in the words that the student itself uses, and
their last number is the answer. They end without a formula such as `The answer is: 7`: with one in its solutions, a
teacher writes it after whatever looks finished, and what a student then learns is to get there without computing
(docs/log.md). The three splits share no question.
"""

import dataclasses
import random

NAMES = {
    "Tom": "he", "Anna": "she", "Maria": "she", "Ben": "he", "Lily": "she", "Omar": "he", "Nina": "she", "Jack": "he",
    "Ruth": "she", "Ivan": "he", "Sara": "she", "Paul": "he", "Emma": "she", "Leo": "he", "Julia": "she", "Karim": "he",
    "Olga": "she", "Peter": "he", "Mei": "she", "David": "he",
}  # fmt: skip
THINGS = (
    "apples", "books", "marbles", "stamps", "cards", "pencils", "shells", "cookies", "coins", "balloons", "stickers",
    "eggs", "flowers", "candles", "buttons", "oranges", "toys", "nuts",
)  # fmt: skip
GROUPS = ("boxes", "bags", "baskets", "packs", "jars", "rows")
MORE = {"buys": "buys {k} more", "finds": "finds {k} more", "gets": "gets {k} more from {other}"}
LESS = {"gives": "gives {k} to {other}", "loses": "loses {k}", "sells": "sells {k}"}
SPLITS = {"train": 4096, "validation": 256, "test": 512}


@dataclasses.dataclass
class Story:
    """A problem as it grows: what was told, the solution's sentences, and how many things there are now."""

    name: str
    thing: str
    told: list[str]
    steps: list[str]
    number: int


def _start(rng: random.Random, name: str, thing: str) -> Story:
    """One number of things, or groups of equal size."""
    if rng.random() < 0.6:
        n = rng.randint(3, 20)
        told = f"{name} has {n} {thing}"
        return Story(name, thing, [told + "."], [], n)
    groups, each, box = rng.randint(2, 5), rng.randint(2, 6), rng.choice(GROUPS)
    told = f"{name} has {groups} {box} with {each} {thing} each"
    return Story(
        name, thing, [told + "."], [f"{told}, which is {groups} x {each} = {groups * each} {thing}."], groups * each
    )


def _change(rng: random.Random, story: Story) -> None:
    """Adds a change and its step: more, or fewer where there are enough."""
    other = rng.choice([n for n in NAMES if n != story.name])
    fewer = story.number >= 6 and rng.random() < 0.5
    k = rng.randint(2, min(12, story.number - 2)) if fewer else rng.randint(2, 12)
    what = rng.choice(list((LESS if fewer else MORE).values())).format(k=k, other=other)
    pronoun = NAMES[story.name]
    old, story.number = story.number, story.number + (-k if fewer else k)
    sum_ = f"so {pronoun} now has {old} {'-' if fewer else '+'} {k} = {story.number} {story.thing}."
    if not story.steps:
        story.steps.append(story.told[0])
    story.steps.append(f"{pronoun.capitalize()} {what}, {sum_}")
    story.told.append(f"{pronoun.capitalize()} {what}.")


def problem(rng: random.Random) -> dict[str, str]:
    """One row: `prompt`, `solution`, `answer`."""
    story = _start(rng, rng.choice(list(NAMES)), rng.choice(THINGS))
    changes = rng.choice((0, 1)) if story.steps else rng.choice((1, 2))
    for _ in range(changes):
        _change(rng, story)
    question = f"How many {story.thing} does {story.name} have{' now' if changes else ''}?"
    return {
        "prompt": " ".join([*story.told, question]),
        "solution": " ".join(story.steps),
        "answer": str(story.number),
    }


def splits(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """{split: rows}, `SPLITS` of each; no question twice, in whatever split."""
    rng, seen, out = random.Random(seed), set(), {}
    for name, count in SPLITS.items():
        rows = []
        while len(rows) < count:
            row = problem(rng)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row | {"id": f"{name}-{len(rows)}"})
        out[name] = rows
    return out
