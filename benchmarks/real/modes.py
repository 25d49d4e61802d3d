"""True continuation against the instruction fallback, on a real chat model: the same prefixes, the same server.

    python -m benchmarks.real.modes RUN [--model=teacher] [--audits=300]   # asks; adds to docs/results/real_modes.jsonl
    python -m benchmarks.real.modes --table                                # the tables of continuation_modes.md
    python -m benchmarks.real.modes --blind=30 --seed=0                    # texts without their mode, to label by hand

RUN is a run of configs/smollm2.py (`make real`): its audits give the prefixes, evenly over its steps. Each is asked for
N texts of C tokens by `completion` (the rendered prompt and the prefix), by `instruct` (teachers/wire/instruct.py) and
by two other wordings of it, straight over HTTP, so that what the model wrote is kept beside what the rules make of it.
Labels are given by `label` from question, prefix and text alone.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import re
import sys

import numpy as np
from scipy import stats

from benchmarks import sides
from benchmarks.real import prepare, server
from benchmarks.real.similarity import area
from omniopd_jax import config, hf, similarity
from omniopd_jax.hf.template import make as make_template
from omniopd_jax.run import records
from omniopd_jax.teachers.wire import instruct

MODES = ("completion", "instruct", "tail", "one_turn")
LABELS = ("continues", "anew", "repeats", "restarts", "explains", "empty", "no continuation")
N, TOKENS = 4, 10
WORD = re.compile(r"[a-z]+|\d+")
BY_HAND = sides.RESULTS / "real_modes_by_hand.json"
TALKS = re.compile(r"\b(continu(?:e|ing|ation)|next words|instruction|interrupted|cut off|apologi[sz]e)\b", re.I)


def label(question: str, prefix: str, text: str | None) -> str:
    """What a text does with an unfinished answer; the first rule that holds.

    `no continuation`: the rules of `instruct` gave it up. `empty`: white space. `explains`: announces itself, or speaks
    of continuing, of the instruction or of having been cut off. `restarts`: begins with the answer's or the question's
    first 24 characters or 4 words. `repeats`: begins with the prefix's last 12 characters or more, on a word's edge.
    `anew`: begins a sentence with a word that the question does not hold, where the prefix stops inside one; or has
    three words or more, and of those of four letters and more and the numbers none that question or prefix holds.
    """
    if text is None:
        return "no continuation"
    words = " ".join(text.split())
    if not words:
        return "empty"
    if records.explains(text) or TALKS.search(words) or instruct.ABOUT_ITSELF.match(text):
        return "explains"
    said = WORD.findall(words.lower())
    starts = [WORD.findall(start.lower())[:4] for start in (question, prefix)]
    if records.restarts(prefix, text) or any(len(start) == 4 and said[:4] == start for start in starts):
        return "restarts"
    old = " ".join(prefix.split())
    sizes = range(min(len(old), len(words)), instruct.MIN_OVERLAP - 1, -1)
    if any(old.endswith(words[:size]) and " " in words[:size].strip() for size in sizes):
        return "repeats"
    inside = bool(old) and old[-1] not in ".!?:" and not prefix.endswith("\n")
    first = re.match(r"[A-Z][a-z']*", words)
    if inside and first and first.group() not in question.split() and first.group() not in ("I", "A"):
        return "anew"
    known = set(WORD.findall(f"{question} {prefix}".lower()))
    if len(said) > 2 and not any(w in known for w in said if len(w) > 3 or w.isdigit()):
        return "anew"
    return "continues"


def chats(prompt: list[dict], prefix: str) -> dict[str, list[dict]]:
    """{mode: the chat that asks for the next words}: ours; ours with the last words named; everything in one turn."""
    own = instruct.messages(prompt, prefix, TOKENS)
    tail = " ".join(prefix.split()[-5:])
    named = f"{own[-1]['content']} Your answer stops after these words: {tail}"
    question = prompt[-1]["content"]
    one = (f"Question: {question}\n\nSomebody has begun to answer it. Write the next words of the answer, and nothing "
           f"else.\n\nThe answer so far: {prefix}")  # fmt: skip
    return {"instruct": own, "tail": [*own[:-1], {"role": "user", "content": named}],
            "one_turn": [{"role": "user", "content": one}]}  # fmt: skip


def asked(url: str, model: str, template, audit: dict, seed: int) -> dict:
    """The audit with the texts that every mode gave."""
    prompt, prefix = [{"role": "user", "content": audit["question"]}], audit["prefix_end"]
    how = {"model": model, "n": N, "max_tokens": TOKENS, "temperature": 1.0, "seed": seed}
    raw = {"prompt": template.continued(prompt, prefix), "add_special_tokens": False}
    texts = {"completion": server.texts(url, "completions", how | raw)}
    for mode, messages in chats(prompt, prefix).items():
        texts[mode] = server.texts(url, "chat/completions", how | {"messages": messages})
    return {"model": model, "question": audit["question"], "prefix": prefix, "chunk": audit["chunk"],
            "right": audit["grade"], "texts": texts}  # fmt: skip


def kept(line: dict, mode: str) -> list[str | None]:
    """What is made of a mode's texts; None: no continuation."""
    return [t if mode == "completion" else instruct.cut(line["prefix"], t) for t in line["texts"][mode]]


def agreement(lines: list[dict], mode: str) -> np.ndarray:
    """[lines]: k_sem / n of each, by ROUGE-1; NaN where no text was kept."""
    cfg = config.default()
    cfg.audit.similarity = "rouge1"
    own = [[t for t in kept(line, mode) if t is not None] for line in lines]
    pairs = [(line["chunk"], text) for line, texts in zip(lines, own, strict=True) for text in texts]
    values = iter(similarity.make(cfg)(*map(list, zip(*pairs, strict=True))))
    return np.array([np.mean([next(values) for _ in texts]) if texts else np.nan for texts in own])


def ranked(values: np.ndarray) -> np.ndarray:
    """The place of each value in their order; equal ones share the mean of theirs."""
    return stats.rankdata(values) - 0.5


def tables() -> str:
    """Labels by mode, and agreement by mode with its correlation."""
    every, rows, agreed = sides.read("real_modes"), [], []
    for model in dict.fromkeys(line["model"] for line in every):
        lines = [line for line in every if line["model"] == model]
        right = np.array([bool(line["right"]) for line in lines])
        for mode in MODES:
            sides_of = {"": kept} if mode == "completion" else {", as written": lambda x, m: x["texts"][m], "": kept}
            for words, texts in sides_of.items():
                found = [label(x["question"], x["prefix"], text) for x in lines for text in texts(x, mode)]
                shares = [f"{found.count(name) / len(found):.1%}" for name in LABELS]
                rows.append((model, f"{mode}{words}", len(lines), *shares))
        by_completion = agreement(lines, "completion")
        for mode in MODES[1:]:
            values = agreement(lines, mode)
            both = ~np.isnan(by_completion + values)
            pair = np.stack([by_completion[both], values[both]])
            ranks = [ranked(v) for v in pair]
            areas = [area(v[right[both]], v[~right[both]]) for v in pair]
            agreed.append((model, mode, int(both.sum()), *(f"{v.mean():.3f} +- {v.std():.3f}" for v in pair),
                           f"{np.corrcoef(pair)[0, 1]:.2f}", f"{np.corrcoef(ranks)[0, 1]:.2f}",
                           *(f"{a:.2f}" for a in areas)))  # fmt: skip
    head = ["model", "mode", "audits with texts", "k_sem / n, completion", "the mode's", "correlation", "of ranks",
            "area, completion", "area, mode"]  # fmt: skip
    return (
        sides.table(["model", "texts by", "audits", *LABELS], rows)
        + "\n\n"
        + sides.table(head, agreed)
        + "\n\n"
        + checked()
    )


def checked() -> str:
    """How often the rules and a person, who saw neither mode nor rule, say the same of a text as it was written."""
    lines = sides.read("real_modes")
    pairs = []
    for place, hand in json.loads(BY_HAND.read_text()).items():
        i, mode, j = map(int, place.split("."))
        line = lines[i]
        ruled = label(line["question"], line["prefix"], line["texts"][MODES[mode]][j])
        pairs.append((mode > 0, hand, ruled))
    same = [hand == ruled for _, hand, ruled in pairs]
    wrong = sum(asked and ruled == "continues" != hand for asked, hand, ruled in pairs)
    said = sum(asked and ruled == "continues" for asked, _, ruled in pairs)
    return (
        f"{len(pairs)} texts of all modes labelled by hand, blind: {sum(same)} have the rules' label. Of {said} texts "
        f"by instruction that the rules call `continues`, {wrong} do not continue."
    )


def blind(count: int, seed: int) -> None:
    """Prints texts of all modes, shuffled, without their mode; their places in the file in front."""
    lines = sides.read("real_modes")
    places = [(i, mode, j) for i, line in enumerate(lines) for mode in MODES for j in range(len(line["texts"][mode]))]
    for i, mode, j in random.Random(seed).sample(places, count):
        line = lines[i]
        print(f"[{i}.{MODES.index(mode)}.{j}] Q: {line['question']}\n  {line['prefix'][-200:]!r}\n"
              f"  -> {line['texts'][mode][j]!r}")  # fmt: skip


def main() -> int:
    """Asks, and writes the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--model", default="teacher", help="a folder of the cache: smollm2 | teacher")
    parser.add_argument("--audits", type=int, default=300)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--blind", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.blind:
        blind(args.blind, args.seed)
        return 0
    if args.run:
        text = (pathlib.Path(args.run) / "audits.jsonl").read_text(encoding="utf-8")
        audits = [json.loads(s) for s in text.split("\n") if s]
        audits = [a for a in audits if a["prefix_end"] and a["prefix_characters"] == len(a["prefix_end"])]
        audits = [audits[i] for i in records.even(len(audits), args.audits)]
        template = make_template(hf.load_tokenizer(prepare.student()))
        with (
            server.ended_by_signals(),
            server.vllm(prepare.ROOT / args.model, name=args.model) as served,
            concurrent.futures.ThreadPoolExecutor(16) as pool,
        ):
            for line in pool.map(lambda i: asked(served.url, args.model, template, audits[i], i), range(len(audits))):
                sides.append("real_modes", line)
    sides.write_page("continuation_modes", tables(), "real.modes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
