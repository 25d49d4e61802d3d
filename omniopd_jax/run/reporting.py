"""What a run says of its steps: the lines of metrics.jsonl and audits.jsonl, the progress display, the end table."""

import json
import pathlib

import jax
import numpy as np

from omniopd_jax import audit, experience
from omniopd_jax.evaluation.sampling import repeated_ngrams
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import flops, host, logging
from omniopd_jax.run.setup import Run

ADDED_UP = ("teacher/calls", "teacher/tokens_in", "teacher/tokens_out", "teacher/cost_usd", "teacher/failed")


class Reports:
    """Keeps a step's device metrics until the next one is dispatched, then reads, checks and writes them.

    Args:
      totals: running totals of the run, changed in place; they are saved with each checkpoint.
      start: the first step; lines of later steps, of a run that was cut off, are dropped.
    """

    def __init__(self, run: Run, totals: dict, start: int):
        self.totals = totals
        self._run, self._pending = run, None
        self._writer = logging.Writer(run.cfg.run_dir, start_step=start, tensorboard=run.cfg.log.tensorboard)
        self._progress = logging.Progress(run.cfg.num_steps, start)

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *_) -> None:
        self._progress.close()
        self._writer.close()

    def add(self, t: int, values: dict, targets, got: experience.Experience, own: dict) -> None:
        """Takes step t's device metrics; `own` are the host's: times, an evaluation."""
        service = self._run.teacher.metrics() if hasattr(self._run.teacher, "metrics") else {}
        self._pending = (t, values, targets, got, own, service)

    def flush(self) -> None:
        """Writes the step that waits, if one does."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._write(*pending)

    def say(self, text: str) -> None:
        """A line that stays on the terminal."""
        self._progress.say(text)

    def _write(self, t, values, targets, got: experience.Experience, own: dict, service: dict) -> None:
        cfg, totals = self._run.cfg, self.totals
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        for key in ("loss", "grad_norm"):
            if not np.isfinite(values[key]):
                raise FloatingPointError(f"{key} is {values[key]} at step {t}; nothing after the last checkpoint is kept")
        asked = audit.metrics(got.feedback, cfg)
        asked |= logging.total(processes.gather("teacher's own counts", service), self._run.disks)
        for key in ADDED_UP:
            totals[key] = totals.get(key, 0) + asked[key]
        for key, seconds in own.items():
            if key.startswith("time/"):
                totals[key] = totals.get(key, 0.0) + seconds
        records, left_out = [], 0
        if targets is not None:
            limit = -(-cfg.audit.log_per_step // jax.process_count())
            targets = jax.tree.map(sharding.local_rows, targets)
            entropy_BT = got.scores.entropy_BT
            records, left_out = audit.records(got.feedback, t, got.responses.prompts, entropy_BT, targets, limit)
        values |= asked | own | {"teacher/cost_usd_total": asked.get("teacher/cost_usd_total", totals["teacher/cost_usd"])}
        values |= self._of_all_hosts(got, left_out, own)
        self._writer.metrics(t, values)
        self._writer.audits(records)
        self._progress.step(t + 1, values)

    def _of_all_hosts(self, got: experience.Experience, left_out: int, own: dict) -> dict:
        """What the hosts must put together: shares of responses, lengths, speed."""
        run, responses = self._run, got.responses
        here = {
            "completions/truncated_fraction": float(1 - responses.finished_B.mean()),
            "completions/repeated_fraction": float(np.mean([repeated_ngrams(r) for r in responses.tokens])),
        }
        if (gap := experience.sampler_gap(responses, got.scores)) is not None:
            here["rollout/score_logp_gap"] = gap
        if got.rewards is not None:
            here["reward/mean"] = float(got.rewards.mean())
        lengths = [[len(p.token_ids) for p in responses.prompts], list(map(len, responses.tokens))]
        parts = processes.gather("host metrics", [here, left_out, *lengths])  # every process has as many rows
        out = {k: float(np.mean([part[0][k] for part in parts])) for k in here}
        out["audit/log_left_out"] = sum(part[1] for part in parts)
        prompts, tokens = (sum((part[i] for part in parts), []) for i in (2, 3))
        self.totals["student_tokens"] = self.totals.get("student_tokens", 0) + sum(tokens)
        computed = got.batch.token_BL.size if got.batch.packed is None else got.batch.packed.token_RL.size
        out["perf/padding_fraction"] = 1 - (sum(prompts) + sum(tokens)) / computed
        mesh, chip = run.student.mesh, flops.chip()
        return out | flops.metrics(run.cfg, run.student.model_cfg, run.teacher_cfg, prompts, tokens, own, mesh, chip)


def summary(run: Run, step: int, totals: dict, after: float | None) -> dict:
    """What the run came to; printed as a table and written to summary.json."""
    before = totals.get("accuracy_before")
    out = {"step": step, "accuracy_before": before, "accuracy_after": after} | totals
    rows = [("steps", str(step))]
    if before is not None and after is not None:
        gain = f"{100 * (after - before):+.1f} points"
        rows += [("accuracy before", f"{before:.1%}"), ("accuracy after", f"{after:.1%}  ({gain})")]
    rows += [
        ("teacher calls", f"{totals.get('teacher/calls', 0):,.0f}  ({totals.get('teacher/failed', 0):,.0f} failed)"),
        ("teacher tokens in / out", f"{totals.get('teacher/tokens_in', 0):,.0f} / {totals.get('teacher/tokens_out', 0):,.0f}"),
        ("teacher cost", f"${totals.get('teacher/cost_usd', 0):.2f}"),
        ("student tokens", f"{totals.get('student_tokens', 0):,}"),
    ]
    rows += [(f"time, {k[5:]}", f"{v:.1f} s") for k, v in totals.items() if k.startswith("time/") and k != "time/step"]
    rows += [("time, evaluation", f"{run.timer.total.get('eval', 0):.1f} s")]
    logging.say(logging.table(rows, f"{run.cfg.objective.name} in {run.cfg.run_dir}"))
    if jax.process_index() == 0:
        host.write_whole(pathlib.Path(run.cfg.run_dir) / "summary.json", json.dumps(out, indent=1) + "\n")
    return out
