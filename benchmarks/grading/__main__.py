"""How fast the graders are: ordinary programs graded a second in the sandbox, and math answers compared a second.

    python -m benchmarks.grading [--programs 1000] [--workers 2] [--pairs 400]

Each program runs in namespaces of its own; half are graded on stdin and stdout, half by assert tests in a second
process. Prints a line for each kind with the rate, the CPU time of a program (all its processes) and how many passed:
all but the tenth that is made to fail. The bar is 20 programs a second on 2 cores; the load average says who else used
them.
"""

import argparse
import json
import os
import pathlib
import resource
import time

from omniopd_jax import graders

PAIRS = pathlib.Path(__file__).parents[1] / "tests/fixtures/math_pairs.jsonl"
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


def grade_programs(batch, workers):
    """Whether each passed, with the start and the end of the grader."""
    with graders.make("code", workers=workers) as code:
        return [verdict.passed for verdict in code.grade_batch(batch)]


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
        f"{name:24} {count:5} in {seconds:6.1f} s = {count / seconds:6.1f} a second; {used:5.1f} ms of CPU each; "
        f"passed {passed}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )


def main():
    """Runs the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=400)
    args = parser.parse_args()
    half = args.programs // 2
    for name, by_asserts in (("programs, stdin", False), ("programs, asserts", True)):
        report(name, half, lambda a=by_asserts: grade_programs(programs(half, a), args.workers), sum)
    pairs = [json.loads(line) for line in PAIRS.open()][: args.pairs]
    math = graders.make("math", workers=args.workers)
    math.grade_batch([("1", "1")] * args.workers)  # the imports

    def grade_texts():
        told = math.grade_batch([(pair["text"], pair["answer"]) for pair in pairs])
        math.close()
        return told

    report("math pairs and imports", len(pairs), grade_texts, sum)


if __name__ == "__main__":
    main()
