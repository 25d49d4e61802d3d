"""The best checkpoint by evaluation, and when a run has seen enough (`checkpoint.best_metric`, `eval.patience`,
`eval.stop_below`).

RUN/best is a run's folder of its own, with config.json and one checkpoint, so that `export` and `evaluate` take it like
any other. What was seen so far is in the run's totals, which every checkpoint holds: a resumed run goes on from there.
"""

import contextlib
from collections.abc import Iterator

import jax

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import processes
from omniopd_jax.run import files
from omniopd_jax.run.checkpoint import Checkpoints, fingerprint
from omniopd_jax.run.state import TrainState

FOLDER = "best"
DEFAULT = "eval/accuracy"  # what patience and stop_below go by, where no best_metric is set
# keys of the totals; LAST is the accuracy of the evaluation that ended the run, VALUE what that run went by
BEST, STEP, WAITED, STOPPED, LAST = "best/value", "best/step", "best/waited", "stopped_early", "accuracy_at_stop"
METRIC, VALUE = "best/metric", "value_at_stop"


class Best:
    """Takes a run's evaluations; `totals` are the run's, changed in place. `start`: the step that the run goes on from.

    A run that had ended early goes on where `eval.patience` and `eval.stop_below` would not end it now.
    """

    def __init__(self, cfg, totals: dict, start: int = 0):
        self._cfg, self._totals = cfg, totals
        self._metric = cfg.checkpoint.best_metric or DEFAULT
        self._folder = files.place(cfg.run_dir) / FOLDER
        self._checkpoints = Checkpoints(self._folder, keep=1) if cfg.checkpoint.best_metric else None
        if totals.get(METRIC, self._metric) != self._metric:  # values of two metrics are not compared
            for key in (BEST, STEP, WAITED):
                totals.pop(key, None)
        self._take_up(start)
        totals[METRIC] = self._metric
        if totals.get(STOPPED) and not self._reason(totals.get(VALUE, totals.get(LAST, 0.0))):
            for key in (STOPPED, LAST, VALUE):
                totals.pop(key, None)

    def _take_up(self, start: int) -> None:
        """The evaluation at a run's end comes after its last checkpoint: what it found best is in RUN/best alone, and
        would be forgotten where the run goes on."""
        if self._checkpoints is None or not start or self._checkpoints.latest() != start:
            return
        kept = processes.first("best before", self._checkpoints.meta(start))
        if kept.get(STEP) == start and kept.get(METRIC, self._metric) == self._metric and BEST in kept:
            self._totals |= {BEST: kept[BEST], STEP: start, WAITED: 0}

    def take(self, state: TrainState, values: dict[str, float]) -> str:
        """Keeps the state where its evaluation is better than any before; returns why the run should end, or "".

        All processes must call, with the same values.

        Raises:
          UserError: the metric is none of the run's evaluations.
        """
        if self._metric not in values:
            raise UserError(
                f"checkpoint.best_metric = {self._metric!r} is no metric of this run's evaluations: {', '.join(values)}"
            )
        value, totals, step = values[self._metric], self._totals, int(jax.device_get(state.step))
        if step <= totals.get(STEP, -1):
            return totals.get(STOPPED, "")  # evaluated again after a resume
        better = BEST not in totals or value > totals[BEST]
        if better:
            totals |= {BEST: value, STEP: step, WAITED: 0}
            self._save(state)
        else:
            totals[WAITED] = totals.get(WAITED, 0) + 1
        why = self._reason(value)
        if why and step:
            totals |= {STOPPED: why, LAST: values[DEFAULT], VALUE: value}
        return why if step else ""

    def _reason(self, value: float) -> str:
        """Why a run whose newest evaluation is `value` should end, or ""."""
        patience, floor, totals = self._cfg.eval.patience, self._cfg.eval.stop_below, self._totals
        if value < floor:
            return f"{self._metric} = {value:.4g} is below eval.stop_below = {floor:g}"
        if patience and totals.get(WAITED, 0) >= patience:
            return f"{self._metric} has not risen above {totals[BEST]:.4g} for {patience} evaluations (eval.patience)"
        return ""

    def _save(self, state: TrainState) -> None:
        if self._checkpoints is None:
            return
        if jax.process_index() == 0:
            own = config.local_folder(self._cfg) / "config.json"
            (self._folder / "config.json").write_bytes(own.read_bytes())
        processes.barrier("best config copied")
        step = self._totals[STEP]
        if self._checkpoints.latest() == step and self._checkpoints.meta(step).get("fingerprint") == fingerprint(state):
            return
        self._checkpoints.drop_after(step - 1)  # of a run that was cut off and has gone another way
        self._checkpoints.save(state, dict(self._totals))

    def wait(self) -> None:
        """Until what was kept is on disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def close(self) -> None:
        """Waits for a save under way."""
        if self._checkpoints is not None:
            self._checkpoints.close()


@contextlib.contextmanager
def watched(cfg, totals: dict, start: int) -> Iterator[Best]:
    """The run's `Best`, closed at the end."""
    best = Best(cfg, totals, start)
    try:
        yield best
    finally:
        best.close()
