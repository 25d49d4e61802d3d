"""A served model's greedy accuracy on the real problems: what a teacher is worth.

python -m benchmarks.real.measure --model=teacher [--split=test] [--problems=256]
"""

import argparse
import concurrent.futures
import json
import sys

from benchmarks.real import prepare, server
from omniopd_jax import graders
from omniopd_jax.evaluation import scores


def answer(url: str, model: str, prompt: str) -> str:
    """The model's greedy answer, by its own chat template."""
    body = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 96, "temperature": 0.0,
    }  # fmt: skip
    return server.texts(url, "chat/completions", body)[0]


def main() -> int:
    """Prints accuracy with its interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="teacher", help="a folder of the cache: smollm2 | teacher")
    parser.add_argument("--split", default="test")
    parser.add_argument("--problems", type=int, default=256)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (prepare.data() / f"{args.split}.jsonl").read_text().splitlines()]
    rows = rows[: args.problems]
    with (
        server.ended_by_signals(),
        server.vllm(prepare.ROOT / args.model, name=args.model) as served,
        concurrent.futures.ThreadPoolExecutor(64) as pool,
    ):
        texts = list(pool.map(lambda row: answer(served.url, args.model, row["prompt"]), rows))
    with graders.make("math") as grader:
        right = [float(r) for r in grader.grade_all(texts, [row["answer"] for row in rows])]
    for row, text, r in list(zip(rows, texts, right, strict=True))[:5]:
        print(int(r), row["prompt"], "->", repr(text))
    low, high = scores.interval(right)
    print(
        f"{args.model}: {sum(right) / len(right):.1%} [{low:.1%}, {high:.1%}] of {len(right)} problems ({args.split})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
