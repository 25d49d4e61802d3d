"""How fast the graders are: ordinary programs graded per second in the sandbox, and math answers compared per second.

    python -m benchmarks.grading [--programs 1000] [--workers 2] [--pairs 400]

Each program runs in a box of its own; half are graded on stdin and stdout, half by assert tests in a second process.
Prints one line per kind with the rate, the CPU time of a program (all its processes) and how many passed: all but the
tenth that is made to fail. The bars are 20 programs and 200 math answers per second on 2 cores; the load average says
who else used them.
"""

import argparse
import json
import os
import pathlib
import resource
import time

from omniopd_jax import graders
from omniopd_jax.graders import sandbox

TESTS = pathlib.Path(__file__).parents[2] / "tests/graders"
BODIES = (
    "total = 0\nfor i in range(n):\n    total += i * i\n",
    "seen, a, b = set(), 0, 1\nwhile len(seen) < n:\n    seen.add(a)\n    a, b = b, a + b\ntotal = sum(seen)\n",
    "import math\ntotal = sum(math.gcd(i, n) for i in range(1, n + 1))\n",
    "from collections import Counter\ntotal = sum(Counter(str(i) for i in range(n)).values())\n",
    "import heapq\nheap = [(i * 7919) % 1009 for i in range(n)]\nheapq.heapify(heap)\ntotal = heapq.heappop(heap)\n",
)


def programs(count, by_asserts):
    """(program, tests) pairs; every tenth gives a wrong answer."""
    out = []
    for i in range(count):
        n, scope = 10 + i % 500, {}
        body = BODIES[i % len(BODIES)]
        exec(f"n = {n}\n{body}", scope)
        expected = scope["total"] + (i % 10 == 9)
        if by_asserts:
            program = "def f(n):\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "    return total\n"
            out.append((program, {"asserts": f"assert f({n}) == {expected}", "entry_point": "f"}))
        else:
            out.append((f"n = int(input())\n{body}print(total)\n", {"stdin": f"{n}\n", "stdout": f"{expected}\n"}))
    return out


def grade_programs(batch, workers, isolation):
    """Whether each passed, with the start and the end of the grader."""
    with graders.make("code", workers=workers, isolation=isolation) as code:
        return [verdict.passed for verdict in code.grade_all(*zip(*batch))]


def cpu_seconds():
    """CPU time of all processes that ended under this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(name, count, act, passed_of):
    """Times `act()` and prints one line."""
    cpu, start = cpu_seconds(), time.perf_counter()
    passed = passed_of(act())
    seconds = time.perf_counter() - start
    used = 1000 * (cpu_seconds() - cpu) / count
    print(
        f"{name:24} {count:5} in {seconds:6.1f} s = {count / seconds:6.1f} per second; {used:5.1f} ms of CPU each; "
        f"passed {passed}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )


def main():
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=400)
    args = parser.parse_args()
    half = args.programs // 2
    for isolation in sandbox.ISOLATIONS if sandbox.bwrap() else ("namespaces",):
        for kind, by_asserts in (("stdin", False), ("asserts", True)):
            batch = programs(half, by_asserts)
            report(f"{kind}, {isolation}", half, lambda b=batch, i=isolation: grade_programs(b, args.workers, i), sum)
    pairs = [json.loads(line) for line in (TESTS / "fixtures/math_pairs.jsonl").open()][: args.pairs]
    boxed = [json.loads(line) for line in (TESTS / "cases/boxed.jsonl").open()]
    boxed = [(case[key], case["answer"]) for case in boxed for key in ("solution", "perturbed")]
    with graders.make("math", workers=args.workers) as math:
        report("math, start", 1, lambda: math.grade_all(["1"], ["2"]), sum)
        for name, batch in (("math, hard pairs", [(p["text"], p["answer"]) for p in pairs]), ("math, boxed", boxed)):
            report(name, len(batch), lambda b=batch: math.grade_all(*zip(*b)), sum)


if __name__ == "__main__":
    main()
