"""A run's folder as the page needs it, whatever state it is in: killed, of an earlier version, without audits."""

import json
import pathlib
import re

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.objective import OBJECTIVES, Objective
from omniopd_jax.run import health

KINDS = ("metrics", "audits", "completions", "evaluations")
CONFIG_CHARACTERS = 300  # of a config value on the page


class Folder:
    """What a run wrote.

    Attributes:
      name, path: for the page.
      rows: metrics, by step. audits, completions, evaluations: records.
      config: {dotted key: value}; summary: dict, empty where the run has not ended.
      notes: what is missing or damaged, in words.

    Raises:
      UserError: no folder, or one in which no run has written anything.
    """

    def __init__(self, path):
        self.path = config.expanded(path)
        self.name, self.notes = self.path.name or str(path), []
        if not self.path.is_dir():
            raise UserError(f"{str(path)!r}: no such run folder")
        files = {kind: sorted(self.path.glob(f"{kind}*.jsonl"), key=_process) for kind in KINDS}
        config_file = self.path / "config.json"
        if not any(files.values()) and not config_file.is_file():
            raise UserError(
                f"{str(path)!r} holds no run: neither config.json nor metrics.jsonl; a run's folder is its run_dir"
            )
        self.config = _flat(
            {k: v for k, v in self._object(config_file).items() if k not in ("digests", "student_template")}
        )
        self.summary = self._object(self.path / "summary.json", must=False)
        read = {kind: [r for file in files[kind] for r in self._lines(file)] for kind in KINDS}
        self.rows = sorted({r["step"]: r for r in read["metrics"]}.values(), key=lambda r: r["step"])
        ended = self.summary.get("step")
        if isinstance(ended, int) and ended < self.steps:  # of an end from which the run went on
            self.summary = {}
        forms = {"audits": _is_audit, "completions": _is_completion, "evaluations": _is_answer}
        self.audits, self.completions, self.evaluations = (
            self._known(kind, read[kind], f) for kind, f in forms.items()
        )
        health.count_evaluated(self.rows, self.evaluations)
        self._notes()

    def state(self) -> str:
        """In words, how far the run came."""
        total, done = self.config.get("num_steps"), self.steps
        ended = self.summary.get("step")
        if isinstance(ended, int) and total and ended >= total:  # more where num_steps was lowered
            return f"finished: {ended} steps"
        if ended and self.summary.get("stopped_early"):
            return f"ended early: {ended} of {total or '?'} steps"
        if not done:
            return "no finished step yet"
        return f"{done} of {total or '?'} steps: still running, or stopped"

    @property
    def steps(self) -> int:
        """Finished updates."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    @property
    def objective(self) -> str:
        """The config's, the parts of a mix, or "?"."""
        return " + ".join(self.parts)

    @property
    def parts(self) -> dict[str, Objective | None]:
        """The records by their names: one, or those of a mix; None: not of this version."""
        mix = sorted(k.removeprefix("objective.mix.") for k in self.config if k.startswith("objective.mix."))
        return {name: OBJECTIVES.get(name) for name in mix or [str(self.config.get("objective.name", "?"))]}

    def _notes(self) -> None:
        if not self.rows:
            self.notes.append("metrics.jsonl is missing or empty: there are no curves")
        if not self.audits:
            unaudited = all(own is not None and not own.audited for own in self.parts.values())
            why = f"the objective {self.objective} asks for none" if unaudited else "none was written"
            self.notes.append(f"no audits: {why}")
        elif not any("question" in a for a in self.audits):
            self.notes.append(
                "written by an earlier version: its audits hold no question, prefix or place in the response"
            )
        if not self.completions:
            self.notes.append("no whole responses were kept (completions.jsonl)")
        if not self.evaluations and self.config.get("eval.num_prompts"):
            self.notes.append("the evaluations' answers were not kept (evaluations.jsonl)")

    def _known(self, kind: str, records: list[dict], form) -> list[dict]:
        known = [r for r in records if form(r)]
        if odd := len(records) - len(known):
            self.notes.append(f"{kind}: {odd} record{'s' * (odd > 1)} of an unknown form were left out")
        return known

    def _object(self, path: pathlib.Path, must: bool = True) -> dict:
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
                if isinstance(found, dict):
                    return found
            except ValueError:
                pass
            self.notes.append(f"{path.name} is damaged and was left out")
        elif must:
            self.notes.append(f"{path.name} is missing")
        return {}

    def _lines(self, path: pathlib.Path) -> list[dict]:
        out, bad = [], 0
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line, parse_constant=lambda name: None)  # NaN and infinity are no figures
                    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                        raise ValueError
                    out.append(record)
                except (ValueError, RecursionError):
                    whole = line.endswith(b"\n") or (self.path / "summary.json").is_file()
                    bad += bool(line.strip()) and whole  # else it is being written
        if bad:
            self.notes.append(f"{path.name}: {bad} line{'s' * (bad > 1)} could not be read and were left out")
        return out


def stamp(path) -> float:
    """Changes whenever the run in this folder writes."""
    folder = config.expanded(path)
    files = [folder / "summary.json", *folder.glob("*.jsonl")]
    return sum(f.stat().st_mtime + f.stat().st_size for f in files if f.is_file())


def _process(path: pathlib.Path) -> int:
    found = re.search(r"-(\d+)$", path.stem)
    return int(found[1]) if found else 0


def _is_audit(a: dict) -> bool:
    texts, numbers = a.get("continuations"), a.get("similarity")
    if not (isinstance(texts, list) and isinstance(numbers, list) and isinstance(a.get("chunk"), str)):
        return False
    if not all(isinstance(t, str) for t in texts):
        return False
    figures = [*numbers, *(a.get(key, 0) for key in ("peak", "k_sem", "n", "pi_hat", "weight", "entropy"))]
    return "sample_id" in a and all(isinstance(x, (int, float)) for x in figures)


def _is_completion(c: dict) -> bool:
    pieces, entropy, chunks = (c.get(key) for key in ("pieces", "entropy", "chunks"))
    if not all(isinstance(part, list) for part in (pieces, entropy, chunks)) or not isinstance(c.get("text"), str):
        return False
    figures = [
        *entropy,
        c.get("tokens"),
        c.get("chunk_tokens"),
        *(k.get("peak") for k in chunks if isinstance(k, dict)),
    ]
    return (
        all(isinstance(p, str) for p in pieces)
        and all(isinstance(x, (int, float)) for x in figures)
        and "sample_id" in c
    )


def _is_answer(e: dict) -> bool:
    return isinstance(e.get("text"), str) and "prompt_id" in e


def _flat(config: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in config.items():
        if isinstance(value, dict) and key != "chat_template_kwargs":
            out |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float, bool)):
            out[prefix + key] = value
        else:
            out[prefix + key] = (value if isinstance(value, str) else json.dumps(value, default=str))[
                :CONFIG_CHARACTERS
            ]
    return out
