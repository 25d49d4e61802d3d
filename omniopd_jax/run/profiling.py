"""Where the time goes: a profiler's trace of some steps, its phases named, and a warning for late compilations."""

import contextlib
import logging

import jax

from omniopd_jax import config
from omniopd_jax.errors import UserError

COMPILER_LOG = "jax._src.interpreters.pxla"  # says "Compiling NAME with global shapes and types [...]" at DEBUG
QUIET_STEPS = 2  # steps of a process in which compiling is expected
SHAPES = 300  # characters of a warning's shapes


def window(text: str) -> range:
    """'5:8' -> steps 5, 6, 7 (counted from 0, as in metrics.jsonl); '' -> none.

    Raises:
      UserError: not of that form.
    """
    if not text:
        return range(0)
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise UserError(f"profile.steps = {text!r} is not FIRST:END, e.g. 5:8 for the steps 5, 6 and 7")
    return range(int(first), int(end))


class Profiler:
    """Writes `run_dir`/profile, which TensorBoard (its XProf plug-in) opens, from process 0 alone."""

    def __init__(self, cfg):
        self._steps = window(cfg.profile.steps)
        self._folder = config.local_folder(cfg).absolute() / "profile"
        self._on = False

    @contextlib.contextmanager
    def step(self, t: int):
        """Around step t: starts and stops the trace, and gives the step its name and number in it."""
        if t in self._steps and not self._on and jax.process_index() == 0:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a million Python calls per step would hide the phases and double the time
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._on = True
        try:
            with jax.profiler.StepTraceAnnotation("step", step_num=t):
                yield
        finally:
            if self._on and t + 1 not in self._steps:
                self.close()

    def close(self) -> None:
        """Ends the trace, if one is being written."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


class Recompilations(logging.Handler):
    """Counts compilations and reports late ones with their shapes: the time of a step that compiles measures nothing.

    A response or prompt longer than any before is a normal reason (shapes come in buckets); the same function at every
    step is not.
    """

    def __init__(self, say):
        super().__init__(logging.DEBUG)
        self._say, self._quiet, self.count = say, True, 0
        self._log = logging.getLogger(COMPILER_LOG)
        self._before = (self._log.level, self._log.propagate)

    def __enter__(self):
        self._log.addHandler(self)
        self._log.setLevel(logging.DEBUG)
        self._log.propagate = False  # else its DEBUG lines would reach the root's handlers
        return self

    def __exit__(self, *_):
        self._log.removeHandler(self)
        self._log.setLevel(self._before[0])
        self._log.propagate = self._before[1]

    def step_done(self, steps: int) -> None:
        """`steps` steps of this process are done."""
        self._quiet = steps < QUIET_STEPS

    @contextlib.contextmanager
    def expected(self):
        """Compilations inside are expected (an evaluation, a first checkpoint): they are not reported."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def emit(self, record: logging.LogRecord) -> None:
        """One line of the compiler's log."""
        if not str(record.msg).startswith("Compiling "):
            if record.levelno >= logging.WARNING:
                logging.getLogger().handle(record)
            return
        self.count += 1
        if not self._quiet:
            name, shapes = record.args[0], " ".join(str(record.args[1]).replace("ShapedArray", "").split())
            cut = f"{shapes[:SHAPES]} ..." if len(shapes) > SHAPES else shapes
            self._say(f"warning: compiled again after the first steps: {name} for {cut}")
