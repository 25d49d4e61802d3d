"""A served model's greedy accuracy on the real problems: what a teacher is worth.

python -m benchmarks.real.measure --model=teacher [--split=test] [--problems=256]
python -m benchmarks.real.measure --variant=gemma_tuned  # the teacher of a variant of configs/smollm2.py
"""

import argparse
import concurrent.futures
import json
import sys

from benchmarks.real import prepare, server
from configs import smollm2
from omniopd_jax import graders, hf
from omniopd_jax.evaluation import scores
from omniopd_jax.hf.template import Template, of_teacher


def answer(url: str, model: str, prompt: str, template: Template | None) -> str:
    """The model's greedy answer; without a template by its own chat template."""
    body = {"model": model, "max_tokens": 96, "temperature": 0.0}
    messages = [{"role": "user", "content": prompt}]
    if template is None:
        return server.texts(url, "chat/completions", body | {"messages": messages})[0]
    return template.cut(server.texts(url, "completions", body | {"prompt": template.render(messages)})[0])[0]


def main() -> int:
    """Prints accuracy with its interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="teacher", help="a folder of the cache: smollm2 | teacher")
    parser.add_argument("--variant", default="", help="a teacher in the place of --model: gemma | gemma_tuned")
    parser.add_argument("--split", default="test")
    parser.add_argument("--problems", type=int, default=256)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (prepare.data() / f"{args.split}.jsonl").read_text().splitlines()]
    rows, template = rows[: args.problems], None
    if args.variant:
        cfg = smollm2.get_config(args.variant)
        args.model = cfg.teacher.model
        prepare.TEACHERS[args.model]()
        template = of_teacher(cfg, hf.load_tokenizer(cfg.teacher.tokenizer))
    with (
        server.ended_by_signals(),
        server.vllm(prepare.ROOT / args.model, name=args.model) as served,
        concurrent.futures.ThreadPoolExecutor(64) as pool,
    ):
        texts = list(pool.map(lambda row: answer(served.url, args.model, row["prompt"], template), rows))
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
