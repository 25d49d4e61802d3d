"""Accuracy before and after a run, from the answers that it kept, with intervals."""

import json
import pathlib

from omniopd_jax.evaluation import scores


def evaluations(run_dir: str) -> dict[int, dict[str, bool]]:
    """{updates made before it: {prompt id: right}} of a run's evaluations, from evaluations.jsonl."""
    path = pathlib.Path(run_dir) / "evaluations.jsonl"
    out: dict[int, dict[str, bool]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        out.setdefault(record["step"], {})[record["prompt_id"]] = record["correct"]
    return out


def gain(before: dict[str, bool], after: dict[str, bool]) -> tuple[float, float, float]:
    """(change of accuracy, low, high): the 95% bootstrap interval is over the problems, paired."""
    change = [float(after[name]) - float(before[name]) for name in before]
    return sum(change) / len(change), *scores.interval(change)


def table(run_dir: str, last: int) -> str:
    """Accuracy before and after with intervals, or what is not there yet."""
    found = evaluations(run_dir)
    if 0 not in found or last not in found:
        return f"{run_dir}: not done; the same command goes on with it"
    lines = []
    for what, right in (("before", found[0]), ("after", found[last])):
        values = [float(v) for v in right.values()]
        low, high = scores.interval(values)
        lines.append(f"accuracy {what:<8} {sum(values) / len(values):6.1%}  [{low:.1%}, {high:.1%}]")
    mean, low, high = gain(found[0], found[last])
    lines.append(f"paired gain       {100 * mean:+.1f} points  [{100 * low:+.1f}, {100 * high:+.1f}]")
    return "\n".join([f"{len(found[0])} held-out problems, 95% intervals over problems", *lines])
