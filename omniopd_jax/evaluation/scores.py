"""Scores of graded completions: avg@k, pass@k, maj@k, and bootstrap intervals over problems. Plain NumPy."""

import math
from collections import Counter, defaultdict

import numpy as np

RESAMPLES = 2000


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n completions, drawn without putting back, hold a right one (arXiv 2107.03374, unbiased).

    Raises:
      ValueError: k is not in [1, n], or correct not in [0, n].
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@k of n = {n}, correct = {correct}, k = {k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: list[str | None], correct: list[bool]) -> float:
    """1 where the most frequent answer is right, 0 where it is wrong; a tie counts the share of right ones among its
    leaders.

    All right answers are one, however written; wrong ones are compared as text, so that a wrong answer written in two
    ways loses votes: slightly above what a vote by value gives. A completion without an answer has no vote.
    """
    votes = Counter("right" if good else ("wrong", "".join(answer.split()))
                    for answer, good in zip(answers, correct, strict=True) if good or answer is not None)  # fmt: skip
    leaders = [v for v, n in votes.items() if n == max(votes.values())]
    return leaders.count("right") / len(leaders) if leaders else 0.0


def interval(values, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% bootstrap interval of the mean, by percentiles, over resampled problems."""
    values = np.asarray(values, np.float64)
    index = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[index].mean(1), (0.025, 0.975))
    return float(low), float(high)


def of(completions: list[dict], *, vote: bool) -> dict:
    """The scores of one benchmark.

    Args:
      completions: dicts with `id`, `correct`, `answer`, `finish`, `tokens`, `repeated`; as many of each problem.
      vote: whether answers can be compared, for maj@k.

    Returns:
      {"avg@16": {"mean", "low", "high"}, "pass@1": ..., "maj@16": ..., "problems": count, ...}.
    """
    by_id = defaultdict(list)
    for c in completions:
        by_id[c["id"]].append(c)
    counts = {len(own) for own in by_id.values()}
    if len(counts) != 1:
        raise ValueError(f"problems have {sorted(counts)} completions: need as many of each")
    n = counts.pop()
    right = [sum(c["correct"] for c in own) for own in by_id.values()]
    values = {f"avg@{n}": [r / n for r in right]}
    values |= {f"pass@{k}": [pass_at_k(n, r, k) for r in right] for k in _ks(n)}
    if vote:
        values[f"maj@{n}"] = [
            majority([c["answer"] for c in own], [c["correct"] for c in own]) for own in by_id.values()
        ]
    out = {}
    for name, each in values.items():
        low, high = interval(each)
        out[name] = {"mean": float(np.mean(each)), "low": low, "high": high}
    return out | {
        "problems": len(by_id),
        "samples": n,
        "mean_length": float(np.mean([c["tokens"] for c in completions])),
        "truncated_fraction": float(np.mean([c["finish"] == "length" for c in completions])),
        "repeated_fraction": float(np.mean([c["repeated"] for c in completions])),
    }


def _ks(n: int) -> list[int]:
    """1, 2, 4 .. and n."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def table(results: dict[str, dict]) -> str:
    """A Markdown table: one row a benchmark, percent with 95% intervals, and the plain mean of avg@k over
    benchmarks."""
    names = list(dict.fromkeys(k for r in results.values() for k, v in r.items() if isinstance(v, dict)))
    out = ["| benchmark | problems | " + " | ".join(names) + " | tokens | truncated | repeated |"]
    out.append("| --- " * (len(names) + 5) + "|")
    for benchmark, r in results.items():
        cells = [_cell(r.get(name)) for name in names]
        tail = f"{r['mean_length']:.0f} | {100 * r['truncated_fraction']:.1f} | {100 * r['repeated_fraction']:.1f}"
        out.append(f"| {benchmark} | {r['problems']} | " + " | ".join(cells) + f" | {tail} |")
    if len(results) > 1:
        means = [r[next(k for k in r if k.startswith("avg@"))]["mean"] for r in results.values()]
        out.append(f"| mean of avg@k | | {100 * np.mean(means):.1f} " + "| " * (len(names) + 2) + "|")
    return "\n".join(out)


def _cell(score) -> str:
    return "" if score is None else f"{100 * score['mean']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"
