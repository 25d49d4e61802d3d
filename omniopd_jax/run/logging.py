"""A run's files: JSON lines and trackers; time by phase. What a person sees at the terminal: terminal.py."""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Iterable

import jax

from omniopd_jax.parallel import processes
from omniopd_jax.run.host import write_whole
from omniopd_jax.run.terminal import say
from omniopd_jax.run.trackers import Trackers


class PhaseTimer:
    """Seconds by phase of the current step, and over the run. `entered` is called with each phase's name, "" at its
    end."""

    def __init__(self):
        self.total: dict[str, float] = {}
        self.entered = lambda name: None
        self._step: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Adds the block's wall time to `name`."""
        start = time.perf_counter()
        self.entered(name)
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self.entered("")
            self.add(name, time.perf_counter() - start)

    def each(self, name: str, items: Iterable):
        """The items of an iterator; the wall time until each comes is added to `name`."""
        items = iter(items)
        while True:
            with self.phase(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds measured elsewhere."""
        self._step[name] = self._step.get(name, 0.0) + seconds
        self.total[name] = self.total.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The step's `time/*` metrics; starts the next step."""
        now = time.perf_counter()
        out = {f"time/{k}": v for k, v in self._step.items()} | {"time/step": now - self._since}
        self._step, self._since = {}, now
        return out


class Writer:
    """Appends JSON lines under a run's folder and hands them to the trackers; on resume, later steps' lines are cut.

    Process 0 writes metrics.jsonl and evaluations.jsonl and has the trackers; each process its own audits and whole
    responses: audits.jsonl, audits-1.jsonl, ..., completions.jsonl, ...

    Args:
      start_step: the run's next step. evaluated: an evaluation's step counts the updates before it: whether the one
        at `start_step` is kept.
      tensorboard, trackers: which trackers there are. config: {dotted key: value}, for them.
    """

    def __init__(
        self, run_dir, *, start_step: int, tensorboard: bool, trackers=(), config=None, rank: int | None = None,
        evaluated: bool = True,
    ):  # fmt: skip
        rank = jax.process_index() if rank is None else rank
        self._folder, self._files, self._suffix = pathlib.Path(run_dir), {}, f"-{rank}" if rank else ""
        if rank == 0:
            for path in sorted(self._folder.glob("*-*.jsonl")):  # of processes that the run no longer has
                kind, _, number = path.stem.partition("-")
                own = kind in ("audits", "completions") and number.isdigit() and len(number) < 9
                if own and int(number) >= jax.process_count():
                    cut_after(path, start_step)
        names = {f"audits{self._suffix}": start_step, f"completions{self._suffix}": start_step}
        names |= {} if rank else {"metrics": start_step, "evaluations": start_step + int(evaluated)}
        for name, first in names.items():
            path = self._folder / f"{name}.jsonl"
            cut_after(path, first)
            # half a surrogate pair, which a teacher may send, becomes the escape that JSON knows
            self._files[name] = path.open("a", encoding="utf-8", errors="backslashreplace")
        wanted = dict.fromkeys([*(["tensorboard"] if tensorboard else []), *trackers]) if rank == 0 else ()
        self._trackers = Trackers(wanted, self._folder, config or {}, start_step, say)

    def metrics(self, step: int, values: dict) -> None:
        """One line, flushed."""
        if "metrics" in self._files:
            values = {k: _number(v) for k, v in values.items()}
            self._write("metrics", [{"step": step} | values])
            self._trackers.metrics(step, values)

    def amend(self, step: int, values: dict) -> None:
        """Adds values to the last line, if that is `step`'s."""
        rows = self.lines("metrics") if "metrics" in self._files else []
        if not rows or rows[-1]["step"] != step:
            return
        values = {k: _number(v) for k, v in values.items()}
        path = self._folder / "metrics.jsonl"
        self._files["metrics"].close()
        write_whole(path, "".join(json.dumps(row) + "\n" for row in [*rows[:-1], rows[-1] | values]))
        self._files["metrics"] = path.open("a", encoding="utf-8")
        self._trackers.metrics(step, values)

    def lines(self, kind: str, *, after: int = -1) -> list[dict]:
        """This process's records of a kind so far, of steps later than `after`: what a resumed run has to go on
        from."""
        name = kind if kind == "metrics" else kind + self._suffix
        text = (self._folder / f"{name}.jsonl").read_bytes() if name in self._files else b""
        return [r for line in text.split(b"\n") if line and (r := json.loads(line))["step"] > after]

    def audits(self, records: list[dict]) -> None:
        """One line a finished audit."""
        self._table("audits", records, self._suffix)

    def completions(self, records: list[dict]) -> None:
        """One line a whole response."""
        self._table("completions", records, self._suffix)

    def evaluations(self, records: list[dict]) -> None:
        """One line an answer of an evaluation; from process 0."""
        if "evaluations" in self._files:
            self._table("evaluations", records, "")

    def close(self) -> None:
        """Flushes and closes everything."""
        for file in self._files.values():
            file.close()
        self._trackers.close()

    def _table(self, kind: str, records: list[dict], suffix: str) -> None:
        if records:
            self._write(kind + suffix, records)
            self._trackers.table(kind, records[0]["step"], records)

    def _write(self, name: str, records: list[dict]) -> None:
        file = self._files[name]
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()


def cut_after(path: pathlib.Path, start_step: int) -> None:
    """Drops the lines of steps that a resumed run will write again, and lines that are no record of a step: cut off, or
    written by someone else. How many those were is said."""
    if not path.is_file():
        return
    temporary, foreign = path.with_suffix(".tmp"), 0
    with path.open("rb") as file, temporary.open("wb") as kept:
        for line in file:
            step = step_of(line)
            foreign += step is None and bool(line.strip())
            if step is not None and step < start_step:
                kept.write(line.rstrip(b"\n") + b"\n")
    temporary.replace(path)
    if foreign:
        said = f"{path}: {foreign} lines were cut off or are no record of a step; they are left out"
        print(said, file=sys.stderr, flush=True)


def step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl or audits.jsonl; None where it is no record of one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def total(parts: list[dict], disks: list[int]) -> dict:
    """What the processes' teachers counted, as one: counts add up, the slowest host's 95th percentile is the run's.

    Args:
      parts: `teacher/*` a process.
      disks: for each process the lowest one that shares its journal, whose total they then all have counted.
    """
    out = {}
    for key in parts[0]:
        values = [p[key] for p in parts]
        if key.endswith("cost_usd_total"):
            out[key] = sum(processes.once_a_disk(values, disks))
        elif key.endswith("price_known"):
            out[key] = min(values)
        elif key.endswith("_p95"):
            out[key] = max(values)
        elif key.endswith(("_p50", "_rate", "_mean", "_fraction")):
            out[key] = sum(values) / len(values)
        else:
            out[key] = sum(values)
    return out


def _number(value):
    value = float(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
