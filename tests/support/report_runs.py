"""Run folders made on the spot for the report's tests: the files that a run writes, of any size and in any state."""

import json
import pathlib

from omniopd_jax import config
from omniopd_jax.run import health

WORDS = (
    "First",
    "find",
    "how",
    "many",
    "are",
    "left",
    ",",
    "then",
    "add",
    "the",
    "rest",
    ":",
    "12",
    "-",
    "5",
    "=",
    "7",
    "so",
    "there",
    "are",
    "7",
    "in",
    "all",
)


def _config(**changed):
    c = config.default()
    small = {
        "num_steps": 20, "prompts_per_step": 8, "num_generations": 2, "audit.num_chunks": 2, "audit.chunk_tokens": 4,
        "audit.num_continuations": 4, "eval.num_prompts": 64, "student.path": "student", "teacher.model": "teacher",
    }  # fmt: skip
    c.update_from_flattened_dict(small | changed)
    return c


def settings(**changed) -> dict:
    """A run's config.json."""
    return _config(**changed).to_dict()


def flat(**changed) -> dict:
    """The same as {dotted key: value}."""
    return config.flat(_config(**changed))


def row(step: int, **changed) -> dict:
    """One line of metrics.jsonl of a healthy run."""
    values = {
        "step": step,
        "loss": -0.001 * step,
        "grad_norm": 0.1,
        "entropy": 0.5,
        "audit/entropy_at_peak": 1.1,
        "audit/chunks": 32,
        "audit/k_sem_mean": 2 + 0.02 * step,
        "audit/n_eff": 4,
        "audit/pi_hat_mean": 0.5 + 0.01 * step,
        "audit/pi_hat_var": 0.04,
        "audit/pi_bar_mean": 0.6,
        "audit/midband_fraction": 0.7,
        "audit/dropped": 0,
        "audit/short": 0,
        "audit/token_fraction": 0.3,
        "anchor/kl_ref_to_student_exact": 0.001 * step,
        "completions/mean_length": 30.0,
        "completions/max_length": 44,
        "completions/truncated_fraction": 0.01,
        "completions/repeated_fraction": 0.02,
        "rollout/score_logp_gap": 1e-6,
        "teacher/calls": 32,
        "teacher/failed": 0,
        "teacher/tokens_in": 4000,
        "teacher/tokens_out": 600,
        "teacher/cost_usd": 0.02,
        "teacher/cost_usd_total": 0.02 * (step + 1),
        "teacher/latency_p50": 0.5,
        "teacher/latency_p95": 1.5,
        "time/rollout": 1.0,
        "time/score": 0.5,
        "time/teacher_wait": 3.0,
        "time/update": 1.5,
        "time/step": 6.0,
    }
    return values | changed


def audit(step: int, i: int, **changed) -> dict:
    """One line of audits.jsonl; two of one response, samples that differ, right and wrong answers."""
    response, text = i // 2, " " + " ".join(WORDS[(i + k) % len(WORDS)] for k in range(5))
    others = [text if k == i % 4 else f"{text[:-3]} {WORDS[(i * 7 + k) % len(WORDS)]}" for k in range(4)]
    similarity = [round(0.4 + 0.13 * ((i + k) % 5), 3) if t != text else 1.0 for k, t in enumerate(others)]
    k_sem = sum(similarity)
    return {
        "step": step,
        "prompt_id": f"p{response}",
        "sample_id": f"s{step}-{response}",
        "response": response % 2,
        "question": f"Problem {response}: Ann has 12 apples and gives {response} away. How many are left?",
        "answer": "7",
        "grade": response % 3 == 0,
        "peak": 2 + 9 * (i % 2),
        "response_tokens": 24,
        "prefix_characters": 12,
        "prefix_end": "So first of ",
        "prefix_perplexity": 1.2,
        "entropy": 0.3 + 0.01 * (i % 70),
        "chunk_entropy": [0.5],
        "chunk": text,
        "continuations": others,
        "failures": [],
        "restarted": 0,
        "explained": 0,
        "similarity": similarity,
        "chance": [round(0.15 + 0.02 * (i % 7), 3)],
        "k_sem": round(k_sem, 4),
        "n": 4,
        "kept": True,
        "pi_bar": 0.6,
        "pi_hat": round((k_sem + 0.6) / 5, 4),
        "weight": round((k_sem + 0.6) / 5 - 0.6, 4),
        "latency_s": 0.4,
        "cost_usd": 0.001,
    } | changed


def completion(step: int, response: int, tokens: int = 24, **changed) -> dict:
    """One line of completions.jsonl, the response that `audit` shows chunks of."""
    pieces = [" " + WORDS[(response + t) % len(WORDS)] for t in range(tokens)]
    return {
        "step": step,
        "prompt_id": f"p{response}",
        "sample_id": f"s{step}-{response}",
        "response": response % 2,
        "question": f"Problem {response}: Ann has 12 apples and gives {response} away. How many are left?",
        "answer": "7",
        "grade": response % 3 == 0,
        "finished": True,
        "tokens": tokens,
        "mean_entropy": 0.4,
        "text": "".join(pieces),
        "pieces": pieces,
        "entropy": [round(0.02 + 0.9 * ((t * 5) % 11 == 2), 3) for t in range(tokens)],
        "chunk_tokens": 4,
        "chunks": [
            {"peak": p, "k_sem": 2.5, "n": 4, "kept": True, "pi_bar": 0.6, "pi_hat": 0.6, "weight": 0.1 - 0.2 * (p > 5)}
            for p in (2, 11)
        ],
    } | changed


def evaluation(step: int, i: int, **changed) -> dict:
    """One line of evaluations.jsonl: problems 0 to 2 of 8 right before, 0 to 5 after."""
    correct = i % 8 < (3 if step == 0 else 6)
    return {
        "step": step,
        "prompt_id": f"e{i}",
        "question": f"Test problem {i}",
        "answer": "7",
        "text": f"So there are {7 if correct else 8} left.",
        "correct": correct,
    } | changed


def write(
    folder,
    steps: int = 20,
    audits: int = 32,
    completions: int = 4,
    *,
    cfg=None,
    rows=None,
    summary: bool = True,
    **changed,
) -> pathlib.Path:
    """Writes a run's folder; `changed` goes to every audit."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings(num_steps=20) if cfg is None else cfg))
    rows = [row(t) for t in range(steps)] if rows is None else rows
    if rows:
        rows[0] |= {
            "eval/accuracy": 24 / 64,
            "eval/accuracy_before": 24 / 64,
            "eval/updates": 0,
            "eval/num_prompts": 64,
        }
        if summary:
            rows[-1] |= {"eval/accuracy": 48 / 64, "eval/updates": steps, "eval/num_prompts": 64}
    lines(folder / "metrics.jsonl", rows)
    lines(folder / "audits.jsonl", [audit(t, i, **changed) for t in range(steps) for i in range(audits)])
    lines(folder / "completions.jsonl", [completion(t, r) for t in range(steps) for r in range(completions)])
    lines(folder / "evaluations.jsonl", [evaluation(s, i) for s in (0, steps) for i in range(64)])
    if summary:
        told = {"step": steps, "accuracy_before": 24 / 64, "accuracy_after": 48 / 64}
        told["teacher/cost_usd"] = sum(r.get("teacher/cost_usd", 0) for r in rows)
        (folder / "summary.json").write_text(json.dumps(told))
    return folder


def lines(path, records) -> None:
    """Writes JSON Lines, lone surrogates as escapes."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def checks(rows=None, audits=None, completions=(), **cfg) -> set[str]:
    """Names of the checks that trip."""
    rows = [row(t) for t in range(20)] if rows is None else rows
    audits = [audit(t, i) for t in range(20) for i in range(32)] if audits is None else audits
    return {f.check for f in health.check(rows, audits, list(completions), flat(**cfg))}
