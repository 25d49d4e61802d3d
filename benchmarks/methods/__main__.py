"""A first look at the other ways to learn, one seed each on the small world forks: curves, and the bias of adaptive N.

    python -m benchmarks.methods --method=continuation     # one run, a line in docs/results/methods.jsonl
    python -m benchmarks.methods --audits                  # 1,280 audits with N = 10, then replayed: adaptive N's bias
    python -m benchmarks.methods --table                   # the page, from what is there

Learning rates are those that benchmarks.small_world swept for the nearest method, not swept anew. The comparison of
methods at equal teacher tokens and over seeds is another page's.
"""

import argparse
import json
import pathlib
import shutil
import tempfile

import numpy as np

from benchmarks import sides
from benchmarks.small_world.__main__ import run
from benchmarks.small_world.cells import recipe
from omniopd_jax import adaptive, train
from omniopd_jax.run import cli

MEAN = {"objective.normalizer": "separate_means", "anchor.kl_coef": 0.0}
CUT = MEAN | {"objective.name": "continuation", "continuation.max_tokens": 48}
CONTEXT = MEAN | {
    "objective.name": "context",
    "context.template": "{prompt}\n{solution}",
}  # the world has no instructions
METHODS = {  # name -> (what, the method whose settings and swept rate it starts from, overrides)
    "sft": ("whole solutions", "sft", {}),
    "continuation": ("cuts anywhere in the response, one a response", "sft", CUT | {"continuation.cut": "uniform"}),
    "continuation_peak": ("cuts at the highest entropy", "sft", CUT | {"continuation.cut": "peak"}),
    "context": ("the frozen student scores, shown the teacher's solution; forward KL", "opd_exact", CONTEXT),
    "context_self": ("the student as it stands scores", "opd_exact", CONTEXT | {"context.model": "self"}),
    "mix": ("OmniOPD + 0.5 continuation", "default", CUT | {
        "objective.mix.omniopd": 1.0, "objective.mix.continuation": 0.5, "continuation.cut": "uniform",
        "objective.normalizer": "constant", "anchor.kl_coef": 0.1}),
    "n_10": ("OmniOPD with N = 10", "default", {"audit.num_continuations": 10}),
    "adaptive": ("the same, asked in rounds of 3", "default", {"audit.num_continuations": 10, "audit.adaptive": True}),
    "gate": ("OmniOPD, prompts that the teacher fails twice are not audited", "default", {
        "audit.gate": "graded", "audit.gate_attempts": 2}),
}  # fmt: skip


def config_of(method: str, seed: int = 0):
    """The small world's recipe of the nearest method, with this one's overrides."""
    _, near, overrides = METHODS[method]
    cfg = recipe(near, "forks", seed)
    cfg.update_from_flattened_dict(overrides)
    return cfg


def measure_bias(temperature: float) -> dict:
    """A run's audits, recorded in full and replayed with stops: mean similarity at the stop against that of all ten."""
    cfg = config_of("n_10")
    cfg.run_dir = tempfile.mkdtemp(prefix="methods_")
    cfg.teacher.temperature = temperature
    cfg.num_steps, cfg.eval.num_prompts, cfg.audit.log_per_step = 10, 0, 128
    try:
        train.train(cfg)
        lines = (pathlib.Path(cfg.run_dir) / "audits.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    finally:
        shutil.rmtree(cfg.run_dir, ignore_errors=True)
    audits = [a for a in map(json.loads, lines) if len(a["similarity"]) == cfg.audit.num_continuations]
    value_AN, step_A = np.array([a["similarity"] for a in audits]), np.array([a["step"] for a in audits])
    out = {"audits": len(audits), "n": cfg.audit.num_continuations, "temperature": temperature}
    out["spread"] = float(value_AN.std(1).mean())
    for name, uses in (("error alone", False), ("error or sign", True)):
        stopped, asked = [], []
        for step in sorted(set(step_A)):
            before = float(value_AN[step_A == step - 1].mean()) if uses and step else None
            mean_A, asked_A = adaptive.replay(value_AN[step_A == step], before, cfg)
            stopped, asked = [*stopped, *mean_A], [*asked, *asked_A]
        apart = np.array(stopped) - value_AN.mean(1)
        out[name] = {
            "bias": float(apart.mean()), "rms": float(np.sqrt(np.square(apart).mean())), "asked": float(np.mean(asked)),
            "in_full": float((np.array(asked) == value_AN.shape[1]).mean()),
        }  # fmt: skip
    return out


def write_table() -> None:
    """docs/results/methods.md."""
    lines = sides.read("methods")
    rows = []
    for method, (what, _, _) in METHODS.items():
        for line in (r for r in lines if r.get("method") == method):
            curve = ", ".join(f"{100 * a:.1f}" for _, a in line["curve"])
            rows.append(
                (method, what, f"{100 * line['before']:.1f}", curve, f"{100 * line['after']:.1f}",
                 f"{line['teacher_tokens']:,.0f}", f"{line['learning_rate']:g}")
            )  # fmt: skip
    head = ["method", "what", "before", "accuracy every 4 steps", "after", "teacher tokens", "lr"]
    text = sides.table(head, rows)
    rows = [
        (f"{line['temperature']:g}", f"{line['spread']:.3f}", name, f"{line['audits']:,}", f"{v['bias']:+.4f}",
         f"{v['rms']:.3f}", f"{v['asked']:.2f} of {line['n']}", f"{v['in_full']:.0%}")
        for line in lines if "audits" in line for name, v in line.items() if isinstance(v, dict)
    ]  # fmt: skip
    if rows:
        head = ["teacher's temperature", "spread in an audit", "settled by", "audits", "bias of the mean similarity"]
        text += "\n\nAdaptive N on recorded audits, against all ten continuations:\n\n"
        text += sides.table([*head, "rms", "asked", "asked in full"], rows)
    sides.write_page("methods", text)


def main():
    """Runs what is asked for and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--audits", action="store_true")
    parser.add_argument("--temperature", type=float, default=1.0, help="the teacher's, of --audits")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.method or args.audits:
        from absl import flags

        flags.FLAGS(["methods"])
        cli.setup_jax()
    if args.method:
        sides.append("methods", run(config_of(args.method), args.method, METHODS[args.method][2]))
    if args.audits:
        sides.append("methods", measure_bias(args.temperature))
    write_table()


if __name__ == "__main__":
    main()
