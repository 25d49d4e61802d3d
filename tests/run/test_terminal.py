"""The status line at 80 columns, what is said while nothing has finished, and text that a terminal would obey."""

import pytest

from omniopd_jax.run import terminal

VALUES = {
    "loss": -0.000123, "audit/pi_hat_mean": 0.81, "entropy": 0.0345, "anchor/kl_ref_to_student_exact": 0.001,
    "completions/mean_length": 812.3, "teacher/cost_usd_total": 12345.67,
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def status(total=200, steps=3, seconds=3600.0, **values):
    clock = Clock()
    s = terminal.Status(total, 0, clock=clock)
    for step in range(1, steps + 1):
        clock.now += seconds
        s.step(step, VALUES | values)
    return s


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_step_time_left_dollars_and_accuracy_are_never_cut(width):
    s = status(10_000, 3, **{"eval/accuracy": 0.4567})
    s.enter("teacher_wait")
    line = s.line(width)
    for part in ("step 3/10000", "left 9997 h 0 min", "$12,345.67", "acc 45.7%"):
        assert part in line
    assert ("asking the teacher" in line) == (width >= 80) and ("KL" in line) == (width == 200)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_rest_fits_the_width(width):
    assert len(status().line(width)) <= width


def test_the_time_left_counts_from_the_first_step_which_compiles():
    clock = Clock()
    s = terminal.Status(10, 0, clock=clock)
    clock.now = 300.0
    s.step(1, VALUES)
    assert s.left() == "?"
    clock.now = 310.0
    s.step(2, VALUES)
    assert s.left() == "1 min"


def test_the_last_accuracy_stays_after_its_step():
    s = status()
    s.step(4, VALUES | {"eval/accuracy": 0.5})
    s.step(5, VALUES)
    assert "acc 50.0%" in s.line()


def test_an_unknown_price_is_unknown():
    assert "$ unknown" in status(**{"teacher/price_known": 0, "teacher/cost_usd_total": 0.0}).line()


def test_phases_are_named_while_nothing_has_finished(capsys):
    progress = terminal.Progress(20, 0, terminal=False)
    for phase in ("rollout", "teacher_wait", "update"):
        progress.enter(phase)
        progress.enter("")
    progress.step(1, VALUES | {"time/step": 2.0})
    progress.enter("rollout")
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "step 0/20  sampling (first time: compiling)", "step 0/20  asking the teacher (first time: compiling)",
        "step 0/20  updating (first time: compiling)",
    ]  # fmt: skip
    assert len(out) == 4 and out[3].startswith("step 1/20")


def test_an_evaluation_during_the_run_is_shown(capsys):
    progress = terminal.Progress(20, 0, terminal=False)
    progress.step(5, VALUES)
    progress.accuracy(0.75)
    assert capsys.readouterr().out.splitlines()[-1] == "step 5/20  held-out accuracy 75.0%"


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "a\x07b", "x\u202ey", "half \ud83d", "nul \x00", "\x9b31m", "a\rb"], ids=ascii
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, capsys):
    terminal.say(text)
    shown = capsys.readouterr().out
    assert all(c.isprintable() for c in shown.rstrip("\n")) and "\\" in shown


def test_text_that_a_terminal_only_shows_is_left_alone():
    assert terminal.printable("日本 é 🌍\n\ttab") == "日本 é 🌍\n\ttab"


def test_a_terminal_of_80_columns_shows_the_line_whole(monkeypatch, capsys):
    """As rich draws it: the line is not cut, and markup or escapes in what is said are shown."""
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    progress = terminal.Progress(200, 0, terminal=True)
    progress.step(1, VALUES | {"eval/accuracy": 0.4567})
    progress.enter("teacher_wait")
    progress.say("[bold]text[/bold] \x1b[31m")
    progress.close()
    shown = capsys.readouterr().out
    assert "step 1/200  left ?  $12,345.67  acc 45.7%  asking the teacher" in shown
    assert "[bold]text[/bold] \\x1b[31m" in shown
