"""What a run says of its steps: metrics, records of texts, health warnings, the progress display, the end table."""

import dataclasses
import json
import shlex

import jax
import numpy as np
from ml_collections import ConfigDict

from omniopd_jax import audit, config, experience, graders, objective, solutions, teaching
from omniopd_jax.errors import NumberError
from omniopd_jax.evaluation.sampling import Evaluation, repeated_ngrams
from omniopd_jax.parallel import processes, sharding
from omniopd_jax.run import estimate, flops, health, host, identity, logging, records, terminal
from omniopd_jax.run.setup import Run
from omniopd_jax.teachers import by_row
from omniopd_jax.teachers.journal import Spent
from omniopd_jax.teachers.protocol import Counts, Teacher

PROGRAMS = ("code", "code_unsafe")  # graders that run programs: not asked for the log alone
SPENT = {"teacher/calls": "calls", "teacher/tokens_in": "tokens_in", "teacher/tokens_out": "tokens_out",
         "teacher/cost_usd": "usd"}  # fmt: skip
ADDED_UP = (*SPENT, "teacher/failed")


class Reports:
    """Keeps a step's device metrics until the next one is dispatched, then reads, checks and writes them.

    Args:
      totals: running totals of the run, changed in place; they are saved with each checkpoint.
      start: the first step; lines of later steps, of a run that was cut off, are dropped.
      evaluated: whether the run goes on behind the evaluation at `start`, whose answers are then kept.
    """

    def __init__(self, run: Run, totals: dict, start: int, evaluated: bool):
        self.totals, self._start = totals, start
        self._run, self._pending, self._next = run, None, {}
        cfg, flat = run.cfg, config.flat(run.cfg)
        public = config.flat(ConfigDict(json.loads(identity.as_json(cfg))))  # as in config.json: no key of an address
        log = {"tensorboard": cfg.log.tensorboard, "trackers": cfg.log.trackers, "config": public}
        self._writer = logging.Writer(config.local_folder(cfg), start_step=start, evaluated=evaluated, **log)
        recent = [self._writer.lines(kind, after=start - 1 - health.WINDOW) for kind in ("audits", "completions")]
        self._health = health.Watch(flat, self._writer.lines("metrics"), *recent, jax.process_count())
        self._price = estimate.price_state(cfg, bool(solutions.bought(cfg)))
        self._progress = terminal.Progress(cfg.num_steps, start)
        run.timer.entered = self._progress.enter

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *_) -> None:
        self.close()
        self._writer.close()

    def close(self) -> None:
        """Ends the display: what is said from here on has the terminal for itself."""
        self._run.timer.entered = lambda name: None
        self._progress.close()

    def add(self, t: int, values: dict, targets, got: experience.Experience, own: dict) -> None:
        """Takes step t's device metrics; `own` are the host's: times."""
        teacher = self._run.teacher
        service = Counts().take() | (teacher.metrics() if teacher else {})
        self._pending = (t, values, targets, got, own | self._next, service)
        self._next = {}

    def evaluation(self, updates: int, found: Evaluation, sets: dict[str, float]) -> dict[str, float]:
        """Takes an evaluation after this many updates: for the line of the next step, which has made them.

        Line 0 holds the accuracy before the first update, as `eval/accuracy_before` too: one after it may follow. The
        last evaluation is made when its step is written and saved, and is added to that line; so is one that a resumed
        run makes first.

        Args:
          sets: {name: accuracy} of `eval.sets`.

        Returns:
          The accuracies by their metrics' names.
        """
        answers, left_out = records.evaluation_records(found, self._run.held_out.prompts, updates, self._run.cfg)
        accuracies = {"eval/accuracy": found.accuracy} | {f"eval/accuracy/{name}": a for name, a in sets.items()}
        counts = {"eval/num_prompts": len(found.correct), "eval/log_left_out": left_out}
        values = accuracies | {"eval/updates": updates} | counts
        if not updates:
            values["eval/accuracy_before"] = found.accuracy
        if updates and updates in (self._start, self._run.cfg.num_steps):
            warns, new = self._health.amended(updates - 1, values)
            self._writer.amend(updates - 1, values | ({} if warns is None else health.metrics(warns)))
            for finding in new:
                self._progress.say(finding.line())
        else:
            self._next |= values
        self._writer.evaluations(answers)
        self._progress.accuracy(found.accuracy)
        return accuracies

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
                raise NumberError(
                    f"{key} is {values[key]} at step {t}: the run has diverged, and nothing after the last checkpoint "
                    "is kept; set a lower optimizer.learning_rate and another run_dir"
                )
        asked = audit.metrics(got.feedback, cfg)
        asked |= logging.total(processes.gather("teacher's own counts", service), self._run.disks)
        if cfg.teachers:
            asked |= by_row.agreement(got.feedback.audits, processes.gather)
        for key in ADDED_UP:
            totals[key] = totals.get(key, 0) + asked[key]
        for key, seconds in own.items():
            if key.startswith("time/"):
                totals[key] = totals.get(key, 0.0) + seconds
        values |= (
            asked | own | {"teacher/cost_usd_total": asked.get("teacher/cost_usd_total", totals["teacher/cost_usd"])}
        )
        if self._price in (estimate.KNOWN, estimate.UNKNOWN):
            known = int(self._price == estimate.KNOWN)  # the teacher's own says 0 too where another model answered
            values["teacher/price_known"] = min(known, values.get("teacher/price_known", 1))
        audits, completions, left_out = self._records(t, targets, got)
        hosts = self._of_all_hosts(got, left_out, own) | teaching.note_metrics(got.notes)
        values |= {key: value for key, value in hosts.items() if key not in values}
        found, new = self._health.step({"step": t} | values, audits, completions)
        values |= health.metrics(found)
        self._writer.metrics(t, values)
        self._writer.audits(audits)
        self._writer.completions(completions)
        self._progress.step(t + 1, values)
        for finding in new:
            self._progress.say(finding.line())

    def _records(self, t: int, targets, got: experience.Experience) -> tuple[list[dict], list[dict], dict]:
        """This process's part of the step's audits and whole responses, and how many of each were left out."""
        run, log = self._run, self._run.cfg.log
        share = jax.process_count()
        targets = None if targets is None else jax.tree.map(sharding.local_rows, targets)
        peak_BM = sharding.local_rows(got.batch.peak_BM)
        step = records.Step(t, run.cfg, got.responses, got.scores, peak_BM, got.feedback, targets, tuple(got.continued))
        limits = (-(-run.cfg.audit.log_per_step // share), -(-log.completions_per_step // share))
        audits, rows, *left = records.choose(got.feedback, len(got.responses.tokens), *limits)
        audits = audits if targets is not None else []
        wanted = run.held_out is not None and run.cfg.eval.grader not in PROGRAMS
        grade_all = graders.shared(run.cfg.eval.grader).grade_all if wanted else None
        shown, decoder = sorted({*rows, *(a.row for a in audits)}), run.student.decoder
        graded = records.grades(got.responses, got.rewards, grade_all, decoder, shown)
        trims = experience.trims(run.cfg, run.teacher, audits)

        def cut(i, texts):
            return audit.trimmed(audits[i].chunk, texts) if trims[i] else texts

        by_chance = records.chance(run.similarity, audits, log.chance_pairs // share, cut)
        return (
            records.audit_records(step, audits, by_chance=by_chance, graded=graded),
            records.completion_records(step, rows, decoder, graded=graded),
            {"audit/log_left_out": left[0], "completions/log_left_out": left[1]},
        )

    def _of_all_hosts(self, got: experience.Experience, left_out: dict, own: dict) -> dict:
        """What the hosts must put together: shares of responses, lengths, speed."""
        run, responses = self._run, got.responses
        here = {
            "completions/truncated_fraction": truncated_fraction(responses),
            "completions/repeated_fraction": repeated_fraction(responses),
        }
        if (gap := experience.sampler_gap(responses, got.scores)) is not None:
            here["rollout/score_logp_gap"] = gap
        if run.cfg.audit.span != "all" and objective.of(run.cfg).chunks:
            in_span = responses.in_span(run.student.template.tokenizer, run.cfg.audit.span)
            here["audit/span_fraction"] = sum(int(s.sum()) for s in in_span) / max(1, sum(map(len, in_span)))
        if got.rewards is not None:
            here["reward/mean"] = float(got.rewards.mean())
        batches = [got.batch, *got.batch.more]
        lengths = [lengths_of([responses]), lengths_of(got.trained), lengths_behind(batches, got.trained)]
        parts = processes.gather("host metrics", [here, left_out, *lengths])  # every process has as many rows
        out = {k: float(np.mean([part[0][k] for part in parts])) for k in here}
        out |= {key: sum(part[1][key] for part in parts) for key in left_out}
        sampled, trained, behind = ([sum((part[i][k] for part in parts), []) for k in (0, 1)] for i in (2, 3, 4))
        tokens = sampled[1]
        written = sum(tokens) if objective.of(run.cfg).samples else 0
        self.totals["student_tokens"] = self.totals.get("student_tokens", 0) + written
        out |= {"completions/mean_length": float(np.mean(tokens)), "completions/max_length": max(tokens)}
        computed = sum(b.token_BL.size if b.packed is None else b.packed.token_RL.size for b in batches)
        out["perf/padding_fraction"] = 1 - sum(map(sum, trained)) / computed
        mesh, chip = run.student.mesh, flops.chip()
        cfgs = (run.cfg, run.student.model_cfg, run.teacher_cfg)
        how = {"trained": trained, "behind": behind, "scored": got.scores is not None}
        return out | flops.metrics(*cfgs, *sampled, own, mesh, chip, **how)


def lengths_of(rows: list[experience.Responses]) -> list[list[int]]:
    """[tokens of what precedes each row, tokens of each row] of all of them."""
    return [[len(p.token_ids) for r in rows for p in r.prompts], [len(t) for r in rows for t in r.tokens]]


def lengths_behind(batches, rows: list[experience.Responses]) -> list[list[int]]:
    """As `lengths_of`, of the rows of each batch that the update sees once more behind a privileged prompt."""
    pairs = [
        (sharding.local_rows(b.context.prompt_length_B), r.tokens)
        for b, r in zip(batches, rows, strict=True)
        if b.context
    ]
    return [[int(n) for prompts, _ in pairs for n in prompts], [len(t) for _, tokens in pairs for t in tokens]]


def truncated_fraction(responses: experience.Responses) -> float:
    """Share of the responses that were cut at the cap; rows that never came (a solution that failed) do not count."""
    there_B = np.array([len(r) > 0 for r in responses.tokens])
    return float((there_B & ~responses.finished_B).sum() / max(1, there_B.sum()))


def repeated_fraction(responses: experience.Responses) -> float:
    """The mean share of repeated 4-grams of the responses; rows that never came do not count."""
    return float(np.mean([repeated_ngrams(r) for r in responses.tokens if r] or [0.0]))


def spent_by_all(run: Run) -> Spent | None:
    """What the run's processes have spent over all its starts, each disk's journal once; None: nothing is counted."""
    here = run.teacher.spent() if run.teacher else None
    parts = processes.gather("spent", None if here is None else dataclasses.astuple(here))
    found = [Spent(*part) for part in processes.once_a_disk(parts, run.disks) if part]
    return sum(found, Spent()) if found else None


def cost(teacher: Teacher | None, usd: float | None) -> str:
    """What the run has cost, for the table at its end; None: nothing was counted."""
    if usd is None:
        return "none"
    return f"${usd:.2f}" if teacher.price.known else "unknown: set teacher.price_input and teacher.price_output"


def summary(run: Run, step: int, totals: dict, after: float | None) -> dict:
    """What the run came to; printed as a table and written to summary.json."""
    before = totals.get("accuracy_before")
    out = {"step": step, "accuracy_before": before, "accuracy_after": after} | totals
    # the journal's: also what was paid between a checkpoint and a crash; the steps' where it lacks what they counted
    # (of a local teacher beside a paid one; of a run whose folder was moved)
    spent = spent_by_all(run)
    for key, name in SPENT.items() if spent else ():
        out[key] = max(getattr(spent, name), totals.get(key, 0))
    rows = [("steps", str(step))]
    if after is not None:
        gain = "" if before is None else f"  ({100 * (after - before):+.1f} points)"
        rows += [] if before is None else [("accuracy before", f"{before:.1%}")]
        rows += [("accuracy after", f"{after:.1%}{gain}")]
    rows += [
        ("teacher calls", f"{out.get('teacher/calls', 0):,.0f}  ({totals.get('teacher/failed', 0):,.0f} failed)"),
        ("  a call is", "one request; it may bring several continuations"),
        (
            "teacher tokens in / out",
            f"{out.get('teacher/tokens_in', 0):,.0f} / {out.get('teacher/tokens_out', 0):,.0f}",
        ),
        ("teacher cost", cost(run.teacher, None if spent is None else out["teacher/cost_usd"])),
        ("student tokens", f"{totals.get('student_tokens', 0):,}"),
    ]
    phases = {k[5:]: v for k, v in totals.items() if k.startswith("time/") and k != "time/step"}
    evaluation = phases.pop("eval", 0.0)
    rows += [(f"time, {name}", f"{v:.1f} s") for name, v in phases.items()]
    rows += [("time, evaluation", f"{evaluation:.1f} s")]
    terminal.say(terminal.table(rows, f"{objective.title(run.cfg)} in {run.cfg.run_dir}"))
    to = " --out=report.html" if config.is_bucket(run.cfg.run_dir) else ""
    terminal.say(f"see it: python -m omniopd_jax.report {shlex.quote(run.cfg.run_dir)}{to}")
    if jax.process_index() == 0:
        host.write_whole(config.local_folder(run.cfg) / "summary.json", json.dumps(out, indent=1) + "\n")
    return out
