"""Experiment trackers beside the JSON lines: TensorBoard, Weights & Biases, Trackio, each an optional package.

All get the same names: the scalars of metrics.jsonl, the tables `audits`, `completions` and `evaluations`, the resolved
config. A tracker that fails is reported once and left out; the run goes on. Keys and hosts come from the trackers' own
environment variables (WANDB_MODE=offline needs neither).
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import secrets

from omniopd_jax.errors import UserError, one_of

QUEUE = 32_767  # events of TensorBoard that may wait to be written: what a semaphore counts everywhere
LAST = "trackers.json"  # in the run's folder: {tracker: the last step that it got}
TABLE_ROWS = 64  # of a table in a step: trackers are for looking; the JSON lines hold the rest
CELL_CHARACTERS = 500  # of a text in a table
COLUMNS = {
    "audits": ("prompt_id", "peak", "entropy", "k_sem", "pi_bar", "pi_hat", "weight", "kept", "chunk", "continuations"),
    "completions": ("prompt_id", "tokens", "mean_entropy", "grade", "finished", "question", "text"),
    "evaluations": ("prompt_id", "correct", "answer", "question", "text"),
}


class TensorBoard:
    """Scalars, tables as Markdown text, the config as text, in <run_dir>/tensorboard."""

    def __init__(self, folder: pathlib.Path, config: dict, start_step: int):
        from tensorboardX import SummaryWriter

        # its thread writes what waits; where that has died, a queue that is full would wait for ever
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step, max_queue=QUEUE)
        self._board.add_text("config", "\n".join(f"    {k} = {v}" for k, v in _texts(config).items()), start_step)

    def metrics(self, step: int, values: dict) -> None:
        """One point a metric."""
        self._check()
        for key, value in values.items():
            self._board.add_scalar(key, float(value), step)

    def table(self, name: str, step: int, records: list[dict]) -> None:
        """The rows as a Markdown table."""
        self._check()
        rows = [list(COLUMNS[name]), ["---"] * len(COLUMNS[name]), *_cells(name, records)]
        text = "\n".join(
            "| " + " | ".join(("" if c is None else str(c)).replace("|", "\\|").replace("\n", " ") for c in row) + " |"
            for row in rows
        )
        self._board.add_text(name, text, step)

    def close(self) -> None:
        """Writes what is waiting."""
        self._check()
        self._board.close()

    def _check(self) -> None:
        writer = self._board.file_writer.event_writer
        if not writer._worker.is_alive():
            writer._event_queue.cancel_join_thread()
            raise OSError("its file can't be written: is the disk full?")


class Wandb:
    """A run of Weights & Biases under <run_dir>/wandb; the project is WANDB_PROJECT or omniopd.

    Offline unless WANDB_MODE or WANDB_API_KEY is set: without a key the library would ask for one at the terminal.
    """

    def __init__(self, folder: pathlib.Path, config: dict, start_step: int):
        import wandb

        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        name, own = _plain(folder.name)[:64], folder / "wandb_id.txt"
        # offline each start is a run of its own: the library resumes none
        self.keeps = mode == "online" and own.is_file()
        if mode == "online" and not own.is_file():
            own.write_text(secrets.token_hex(4))
        again = {"id": own.read_text().strip(), "resume": "allow"} if mode == "online" else {}
        self._run = wandb.init(
            **again,
            project=os.environ.get("WANDB_PROJECT", "omniopd"),
            name=name,
            dir=str(folder),
            config=_texts(config),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run goes back: its own steps may not

    def metrics(self, step: int, values: dict) -> None:
        """One row of its history."""
        self._run.log({"step": step} | values)

    def table(self, name: str, step: int, records: list[dict]) -> None:
        """One table per step."""
        table = self._wandb.Table(columns=list(COLUMNS[name]), data=_cells(name, records))
        self._run.log({"step": step, name: table})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Trackio:
    """A run of Trackio; the project is TRACKIO_PROJECT or omniopd, the database where TRACKIO_DIR says."""

    keeps = True

    def __init__(self, folder: pathlib.Path, config: dict, start_step: int):
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "omniopd"),
            name=_plain(folder.name)[:64],
            config=_texts(config),
            resume="allow",
            embed=False,
        )

    def metrics(self, step: int, values: dict) -> None:
        """One row of its history."""
        self._run.log(dict(values), step=step)

    def table(self, name: str, step: int, records: list[dict]) -> None:
        """One table per step."""
        import pandas

        frame = pandas.DataFrame(_cells(name, records), columns=list(COLUMNS[name]))
        self._run.log({name: self._trackio.Table(dataframe=frame)}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}  # name -> (folder, config, start_step)


class Trackers:
    """All trackers of a run. `say(text)` reports the first failure of each; after that it gets nothing more. Where a
    table alone failed, it gets no more tables.

    Args:
      start_step: the first step that comes. Those that an earlier start logged are not given once more to a tracker
        that keeps them (`keeps`) and can take none back.
    """

    def __init__(self, names, folder, config: dict, start_step: int, say):
        self._say, self._live, self._bare, self._start = say, {}, set(), start_step
        self._file, self._got = pathlib.Path(folder) / LAST, {}
        with contextlib.suppress(OSError, ValueError, AttributeError):  # none yet, or cut off
            found = json.loads(self._file.read_text())
            self._got = {name: step for name, step in found.items() if isinstance(step, int)}
        self._before = dict(self._got)
        for name in names:
            self._guard(
                name, lambda n=name: self._live.update({n: TRACKERS[n](pathlib.Path(folder), config, start_step)})
            )

    def metrics(self, step: int, values: dict) -> None:
        """One step's scalars."""
        for name, tracker in self._for(step):
            self._guard(name, lambda t=tracker: t.metrics(step, values))
        kept = {n: max(step, self._got.get(n, -1)) for n, t in self._live.items() if getattr(t, "keeps", False)}
        if kept and kept != self._got:
            self._got = kept
            with contextlib.suppress(OSError):  # a full disk: the run's own files will say so
                self._file.write_text(json.dumps(kept))

    def table(self, table: str, step: int, records: list[dict]) -> None:
        """One step's records, at most TABLE_ROWS of them."""
        if not records:
            return
        for name, tracker in self._for(step):
            if name not in self._bare:
                self._guard(name, lambda t=tracker: t.table(table, step, records[:TABLE_ROWS]), of_tables=True)

    def close(self) -> None:
        """Ends all."""
        for name, tracker in list(self._live.items()):
            self._guard(name, tracker.close)
        self._live.clear()

    def _for(self, step: int) -> list:
        return [
            (name, tracker)
            for name, tracker in self._live.items()
            if not (getattr(tracker, "keeps", False) and self._start <= step <= self._before.get(name, -1))
        ]

    def _guard(self, name: str, call, *, of_tables: bool = False) -> None:
        try:
            call()
        except Exception as error:  # trackers raise whatever their transports do; none may end a run
            first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            if of_tables and not isinstance(error, OSError):  # a row that it refuses, not a server that is gone
                self._bare.add(name)
                self._say(f"warning: tracker {name} takes no more tables: {first}")
                return
            self._live.pop(name, None)
            self._say(f"warning: tracker {name} failed and is left out: {first}")


def check(names) -> None:
    """Names of trackers, and that their packages are installed.

    Raises:
      UserError: before anything is loaded.
    """
    for name in names:
        one_of(name, TRACKERS, "log.trackers")
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        if importlib.util.find_spec(package) is None:
            raise UserError(f"log.trackers has {name!r}, whose package is not installed: pip install {package}")


def _cells(name: str, records: list[dict]) -> list[list]:
    return [[_cell(record.get(column)) for column in COLUMNS[name]] for record in records]


def _cell(value):
    if value is None or isinstance(value, (int, float, bool)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _plain(text[:CELL_CHARACTERS])


def _plain(text: str) -> str:
    """Without lone surrogates and control characters, which trackers' own formats refuse."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def _texts(config: dict) -> dict:
    return {k: v if isinstance(v, (int, float, bool)) else _plain(str(v)) for k, v in config.items()}
