"""What the person sees: metrics.jsonl, audits.jsonl, TensorBoard, a live progress display, time by phase."""

import contextlib
import json
import pathlib
import sys
import time

import jax


class PhaseTimer:
    """Seconds by phase of the current step, and over the run."""

    def __init__(self):
        self.total: dict[str, float] = {}
        self._step: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Adds the block's wall time to `name`."""
        start = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self.add(name, time.perf_counter() - start)

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
    """Appends JSON lines (and TensorBoard scalars) under a run's folder; on resume, lines past the checkpoint are cut.

    Process 0 writes metrics.jsonl and TensorBoard; each process its own audits: audits.jsonl, audits-1.jsonl, ...
    """

    def __init__(self, run_dir, *, start_step: int, tensorboard: bool, rank: int | None = None):
        rank = _rank() if rank is None else rank
        self._folder = pathlib.Path(run_dir)
        self._audits = f"audits-{rank}.jsonl" if rank else "audits.jsonl"
        self._files = {}
        if rank == 0:  # of processes that the run no longer has
            for path in sorted(self._folder.glob("audits-*.jsonl")):
                number = path.stem.removeprefix("audits-")
                if number.isdigit() and len(number) < 9 and int(number) >= jax.process_count():
                    cut_after(path, start_step)
        for name in (self._audits,) if rank else ("metrics.jsonl", self._audits):
            cut_after(self._folder / name, start_step)
            # half a surrogate pair, which a teacher may send, becomes the escape that JSON knows
            self._files[name] = (self._folder / name).open("a", encoding="utf-8", errors="backslashreplace")
        self._board = None
        if tensorboard and rank == 0:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start_step or None)

    def metrics(self, step: int, values: dict) -> None:
        """One line a step, flushed."""
        if "metrics.jsonl" not in self._files:
            return
        self._line("metrics.jsonl", {"step": step} | {k: _number(v) for k, v in values.items()})
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(key, float(value), step)

    def audits(self, records: list[dict]) -> None:
        """One line a finished audit."""
        for record in records:
            self._line(self._audits, record)

    def close(self) -> None:
        """Flushes and closes everything."""
        for file in self._files.values():
            file.close()
        if self._board:
            self._board.close()

    def _line(self, name: str, record: dict) -> None:
        file = self._files[name]
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
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


def say(text: str) -> None:
    """A line for the person at the terminal, from process 0."""
    if _rank() == 0:
        print(text, flush=True)


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
            out[key] = sum(v for rank, v in enumerate(values) if disks[rank] == rank)
        elif key.endswith("_p95"):
            out[key] = max(values)
        elif key.endswith(("_p50", "_rate", "_mean", "_fraction")):
            out[key] = sum(values) / len(values)
        else:
            out[key] = sum(values)
    return out


def _rank() -> int:
    return jax.process_index()


class Progress:
    """A live bar in a terminal (rich), plain lines elsewhere."""

    def __init__(self, total: int, start: int, *, terminal: bool | None = None):
        self._terminal = sys.stdout.isatty() and _rank() == 0 if terminal is None else terminal
        self._total = total
        self._bar = None
        if self._terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            )
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def step(self, step: int, values: dict) -> None:
        """Shows a finished step (counted from 1) and its main figures."""
        keys = (
            ("loss", "loss"), ("entropy", "H"), ("audit/pi_hat_mean", "pi_hat"), ("anchor/kl_ref_to_student_exact", "KL"),
            ("completions/mean_length", "len"), ("teacher/cost_usd_total", "$"),
        )  # fmt: skip
        shown = [(name, values[key]) for key, name in keys if key in values and (name != "$" or values[key])]
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in shown)
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        else:
            say(f"step {step}/{self._total}  {text}  {values.get('time/step', 0):.1f} s")

    def say(self, text: str) -> None:
        """A line that stays."""
        (self._bar.console.print if self._bar else say)(text)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()


def table(rows: list[tuple[str, str]], title: str) -> str:
    """Two columns of text under a title, for the end of a run."""
    wide = max(len(a) for a, _ in rows)
    lines = [title, "-" * max(len(title), wide + 2 + max(len(b) for _, b in rows))]
    return "\n".join(lines + [f"{a:<{wide}}  {b}" for a, b in rows])


def _number(value):
    value = float(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
