"""What a person sees at the terminal: a status line that fits its width, warnings, the end table."""

import sys
import time

import jax

SHOWN = (  # metric, name, in the order in which a narrow line drops them from the end
    ("loss", "loss"), ("audit/pi_hat_mean", "pi_hat"), ("reward/mean", "reward"), ("entropy", "H"),
    ("anchor/kl_ref_to_student_exact", "KL"), ("completions/mean_length", "len"),
)  # fmt: skip
PHASES = {  # a timer's phase -> what the line says meanwhile
    "rollout": "sampling", "score": "scoring", "teacher_wait": "asking the teacher", "similarity": "comparing texts",
    "update": "updating", "reward": "grading", "eval": "evaluating", "checkpoint": "saving",
}  # fmt: skip


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters and direction marks are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """A line for the person at the terminal, from process 0."""
    if jax.process_index() == 0:
        print(printable(text), flush=True)


def duration(seconds: float) -> str:
    """7 s, 12 min, 3 h 20 min."""
    minutes = int(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


class Status:
    """What the status line says; a pure function of what it was given.

    Step, time left, dollars and the last accuracy come first and are never cut; the other figures fill what is left.
    """

    def __init__(self, total: int, start: int, *, clock=time.monotonic):
        self.total, self.done, self._clock = total, start, clock
        # (steps done, when): the first step compiles, so it is only a start
        self._finished: list[tuple[int, float]] = []
        self.phase, self.accuracy, self.values = "", None, {}

    def step(self, step: int, values: dict) -> None:
        """Takes a finished step (counted from 1) and its metrics."""
        self.done, self.values = step, values
        self.accuracy = values.get("eval/accuracy", self.accuracy)
        self._finished = [*self._finished[:1], (step, self._clock())]

    def enter(self, phase: str) -> None:
        """Takes the name of the phase that begins; "" at its end."""
        name = PHASES.get(phase, phase)
        self.phase = f"{name} (first time: compiling)" if name and not self._finished else name

    def left(self) -> str:
        """Time to the last step, at the pace since the first one."""
        (first, began), (last, now) = self._finished[0], self._finished[-1]
        return duration((now - began) / (last - first) * (self.total - last)) if last > first else "?"

    def line(self, width: int = 80, *, phase: bool = True) -> str:
        """The line: step, time left, dollars and accuracy whatever the width, phase and other figures as far as they
        fit."""
        parts = [f"step {self.done}/{self.total}"]
        if self._finished:
            parts.append(f"left {self.left()}")
        if not self.values.get("teacher/price_known", 1):
            parts.append("$ unknown")
        elif usd := self.values.get("teacher/cost_usd_total"):
            parts.append(f"${usd:,.2f}")
        if self.accuracy is not None:
            parts.append(f"acc {self.accuracy:.1%}")
        figures = [f"{name} {float(self.values[key]):.3g}" for key, name in SHOWN if key in self.values]
        for part in filter(None, [self.phase if phase else "", *figures]):
            if len("  ".join([*parts, part])) <= width:
                parts.append(part)
        return "  ".join(parts)


class Progress:
    """A live line in a terminal (rich), plain lines elsewhere.

    Args:
      total, start: steps of the run, and those that were done before.
      terminal: None: whether standard output is one.
    """

    def __init__(self, total: int, start: int, *, terminal: bool | None = None):
        self._status = Status(total, start)
        self._terminal = sys.stdout.isatty() and jax.process_index() == 0 if terminal is None else terminal
        self._live, self._said = None, set()
        if self._terminal:
            from rich.console import Console
            from rich.live import Live

            self._console = Console()
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2)
            self._live.start()

    def _render(self):
        from rich.text import Text

        width = self._console.width
        room = min(width, 80)
        done = room * self._status.done // max(1, self._status.total)
        return Text.assemble(
            ("\u2501" * done, "green"), ("\u2500" * (room - done), "dim"), "\n", self._status.line(width)
        )

    def enter(self, name: str) -> None:
        """Names the phase that begins ("" at its end) in the line; elsewhere a line for each until a step has
        finished."""
        self._status.enter(name)
        if self._live is None and name and not self._status.values and name not in self._said:
            self._said.add(name)
            say(self._status.line())

    def step(self, step: int, values: dict) -> None:
        """Shows a finished step (counted from 1) and its main figures."""
        self._status.step(step, values)
        if self._live is None:
            say(f"{self._status.line(100, phase=False)}  {values.get('time/step', 0):.1f} s")

    def accuracy(self, value: float) -> None:
        """Shows what an evaluation during the run came to."""
        self._status.accuracy = value
        if self._live is None:
            say(f"step {self._status.done}/{self._status.total}  held-out accuracy {value:.1%}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            say(text)
        else:
            self._console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def table(rows: list[tuple[str, str]], title: str) -> str:
    """Two columns of text under a title, for the end of a run."""
    wide = max(len(a) for a, _ in rows)
    lines = [title, "-" * max(len(title), wide + 2 + max(len(b) for _, b in rows))]
    return "\n".join(lines + [f"{a:<{wide}}  {b}" for a, b in rows])
