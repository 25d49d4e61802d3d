"""Adaptive N: when a chunk is settled, rounds against plain Python, what counts as too few, the gate's closed prompts."""

import asyncio
import math

import numpy as np
import pytest

from omniopd_jax import adaptive, audit, config, solutions
from omniopd_jax.data.prompts import Prompt
from omniopd_jax.teachers import Continuation, ContinuationRequest
from omniopd_jax.teachers.simulated import SimulatedTeacher


def settings(**more):
    c = config.default()
    c.update_from_flattened_dict({f"audit.{k}": v for k, v in ({"adaptive": True} | more).items()})
    return c


def error_of(values) -> float:
    """Standard error with two samples' worth of variance 1/16 pulled in, in plain Python."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) + 2 / 16
    return math.sqrt(spread / (len(values) + 1) / len(values))


def test_settled_by_the_error_or_by_the_sign():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        values, before = rng.random(rng.integers(2, 9)), rng.random()
        c = settings(adaptive_error=float(rng.random() * 0.2), adaptive_sign=float(rng.random() * 4))
        small = error_of(values) <= c.audit.adaptive_error
        far = abs(values.mean() - before) > c.audit.adaptive_sign * error_of(values)
        assert adaptive.settled(values, before, c) == (small or far)
        assert adaptive.settled(values, None, c) == small
        seen.add((small, far))
    assert len(seen) == 4
    assert not adaptive.settled(np.array([1.0]), None, settings(adaptive_error=1.0)), "one sample says nothing"
    assert not adaptive.settled(np.ones(3), None, settings()), "three equal texts are not known to 0.06"


class Asked(SimulatedTeacher):
    def __init__(self, fails=None):
        self.rounds = []
        super().__init__(
            lambda r: ([r.sample_id] if r.sample_id == "same" else [r.sample_id, "other"], None), fails=fails
        )

    async def continue_text(self, request):
        self.rounds.append((request.sample_id, request.indices))
        return await super().continue_text(request)


def audits_of(ids, n):
    return [
        audit.Audit(
            i, 0, ContinuationRequest(name, 3, ({"role": "user", "content": name},), "so", tuple(range(n)), 8), name
        )
        for i, name in enumerate(ids)
    ]


def phi(a, b):
    return np.array([float(x == y) for x, y in zip(a, b)], np.float32)


def test_rounds_stop_where_a_chunk_is_settled_and_give_what_one_call_would_have():
    c = settings(adaptive_first=3, adaptive_error=0.1)
    teacher, audits = Asked(), audits_of(["same", "x", "y"], 8)
    asyncio.run(adaptive.ask(teacher, audits, lambda some: audit.similarities(phi, some, c, trim=False), None, c))
    whole = audits_of(["same", "x", "y"], 8)
    asyncio.run(audit.ask(Asked(), whole))
    counts = []
    for got, want in zip(audits, whole):
        n = len(got.request.indices)
        texts = [[x.text for x in sorted(a.result.continuations, key=lambda x: x.index)] for a in (got, want)]
        assert texts[0] == texts[1][:n] and got.request.indices == tuple(range(n))
        values = [float(t == want.chunk) for t in texts[1]]
        expect = next((k for k in (3, 6) if error_of(values[:k]) <= 0.1), 8)
        assert n == expect
        counts.append(n)
    assert counts[0] == 6 and 8 in counts, "all equal: settled after two rounds; torn ones are asked in full"
    assert [i for who, i in teacher.rounds if who == "x"][:2] == [(0, 1, 2), (3, 4, 5)]
    replayed = adaptive.replay(np.array([[1.0] * 8]), None, c)
    assert replayed[0].tolist() == [1.0] and replayed[1].tolist() == [6]


def test_too_few_is_counted_against_what_was_asked():
    """Of 10, half; of the 3 that a settled chunk was asked, 2: a failed call lowers n and may drop the audit."""
    c = settings()
    assert [audit.fewest(c, asked) for asked in (10, 6, 3, 1)] == [5, 3, 2, 1]
    teacher, audits = Asked(fails=lambda r, i: i in (0, 1)), audits_of(["same"], 10)
    asyncio.run(adaptive.ask(teacher, audits, lambda some: audit.similarities(phi, some, c, trim=False), None, c))
    (a,) = audits
    assert len(a.result.failures) == 2 and len(a.result.continuations) + 2 == len(a.request.indices)


def test_the_bias_of_stopping_is_small_on_drawn_audits():
    """Beta-distributed similarities of many shapes: mean at the stop against the mean of all ten, below 0.01."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.3, 6, (2, 4000, 1))
    values = rng.beta(a, b, (4000, 10))
    for before in (None, float(values.mean())):
        mean, asked = adaptive.replay(values, before, settings())
        assert abs(float((mean - values.mean(1)).mean())) < 0.01
        assert asked.min() >= 3 and (before is None or asked.mean() < 9)


def test_the_gate_closes_prompts_whose_solutions_are_all_wrong():
    prompts = [Prompt(n, (), answer) for n, answer in (("a", "1"), ("b", "2"), ("c", None), ("d", "4"))]
    found = [
        {0: Continuation(0, "1", "stop"), 1: Continuation(1, "9", "stop")},
        {0: Continuation(0, "1", "stop")},
        {},
        {},
    ]
    graded = []

    def grade_all(texts, answers):
        graded.extend(zip(texts, answers))
        return [t == a for t, a in graded]

    found[0] = dict(reversed(found[0].items()))
    gate = solutions.closed(prompts, found, 4, grade_all)
    counts = gate.counts
    assert gate.shut == {"b", "d"}, "without an answer a prompt is open; without a text nothing is known to be right"
    assert graded == [("1", "1"), ("9", "1"), ("1", "2")]
    assert counts == {"gate_prompts": 4, "gate_closed": 2, "gate_graded": 3, "gate_right": 1}


def test_the_gate_grades_its_own_attempts_alone_where_others_ask_for_more_solutions():
    found = [{i: Continuation(i, text, "stop") for i, text in enumerate("9919")}]
    for attempts, shut in ((1, {"a"}), (2, {"a"}), (3, set()), (9, set())):
        gate = solutions.closed(
            [Prompt("a", (), "1")], found, attempts, lambda texts, answers: [t == a for t, a in zip(texts, answers)]
        )
        assert gate.shut == shut and gate.counts["gate_graded"] == min(attempts, 4)
        right = None if shut else 2
        assert gate.right.get("a") == right, "which is the one that a privileged prompt shows"
        assert solutions.shown(found[0], right).text == ("9" if shut else "1")
    assert solutions.shown({1: found[0][1]}, None) is found[0][1] and solutions.shown({}, None) is None


@pytest.mark.parametrize("name,want", [("omniopd", 4), ("sft", 4), ("context", 4)])
def test_solutions_are_asked_once_for_all_who_read_them(name, want):
    c = settings(gate="graded", gate_attempts=4)
    c.objective.name, c.num_generations = name, 2
    assert solutions.wanted(c) == want and solutions.bought(c)["solutions"] == want
    c.audit.gate = "none"
    assert solutions.wanted(c) == {"omniopd": 0, "sft": 2, "context": 1}[name]
