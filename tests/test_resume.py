"""Killed and started again, a run ends with the same parameters, to the last bit, as one that was never stopped."""

import json
import pathlib
import random
import re
import signal
import time

import pytest
import tiny

from configs import tiny as recipe
from omniopd_jax import train
from omniopd_jax.run import checkpoint

STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.make_folders(folder)
    return folder


def settings(folder, name, **more) -> dict:
    values = tiny.overrides(folder / "student", folder / "teacher", folder / name)
    return values | {"num_steps": STEPS, "checkpoint.every": 2, "checkpoint.keep": 2, "audit.log_per_step": 4} | more


def start(folder, name, **more):
    return tiny.start(tiny.arguments(settings(folder, name, **more)))


def in_process(folder, name, **more):
    """The command's own recipe and settings."""
    c = recipe.get_config()
    c.update_from_flattened_dict(settings(folder, name, **more))
    return c


def finish(process, code=0, timeout=300) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out


def when_logged(process, run_dir: pathlib.Path, steps: int, timeout=300) -> None:
    """Returns as soon as so many steps are in metrics.jsonl; the process must still be at work then."""
    path, end = run_dir / "metrics.jsonl", time.monotonic() + timeout
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, f"ended too early: {process.communicate()[1][-3000:]}"
        assert time.monotonic() < end
        time.sleep(0.002)


def stop(process, number) -> None:
    process.send_signal(number)


@pytest.fixture
def one_device(monkeypatch):
    """In process there are eight; the commands had one."""
    tiny.on_one_device(monkeypatch)


@pytest.fixture(scope="module")
def begin(runner, folder):
    """begin(name) -> a run under way in a process that had imported everything before."""
    return lambda name: runner.begin(folder / name, settings(folder, name))


@pytest.fixture(scope="module")
def whole(folder, begin) -> pathlib.Path:
    """The run that nobody stopped."""
    run = begin("whole").wait()
    assert run.code == 0, run.err[-4000:]
    return folder / "whole"


def same_run(a: pathlib.Path, b: pathlib.Path, steps: int = STEPS) -> None:
    """Parameters and losses are equal to the last bit, audits too, and every step is there once."""
    assert tiny.same(checkpoint.restore_params(a)[0], checkpoint.restore_params(b)[0])
    rows_a, rows_b = (tiny.lines(p / "metrics.jsonl") for p in (a, b))
    assert [r["step"] for r in rows_a] == [r["step"] for r in rows_b] == list(range(steps))
    for key in ("loss", "grad_norm", "audit/k_sem_mean", "entropy"):
        assert [r[key] for r in rows_a] == [r[key] for r in rows_b]
    keys = ("step", "sample_id", "peak", "chunk", "continuations", "k_sem", "pi_hat")
    audits_a, audits_b = ([[r[k] for k in keys] for r in tiny.lines(p / "audits.jsonl")] for p in (a, b))
    assert audits_a == audits_b


@pytest.fixture(scope="module")
def stopped(folder, begin, whole):
    """One run through a kill -9, then a SIGTERM, then to its end: (folder, what each part left)."""
    at = random.Random(2024).randrange(1, 5)
    run_dir, left = folder / "stopped", {}

    def signalled(steps: int, number: int):
        run, end = begin("stopped"), time.monotonic() + 300
        while len(run.metrics()) < steps:
            assert run.code is None and time.monotonic() < end, (run.code, run.err[-3000:])
            time.sleep(0.002)
        run.kill(number)
        return run.wait()

    left["killed"] = signalled(at, signal.SIGKILL).code
    run = signalled(at + 2, signal.SIGTERM)
    assert run.code == 75, run.err[-4000:]
    left["said"] = run.out
    left["saved"] = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    left["logged"] = [r["step"] for r in tiny.lines(run_dir / "metrics.jsonl")]
    left["summary"] = (run_dir / "summary.json").exists()
    run = begin("stopped").wait()
    assert run.code == 0, run.err[-4000:]
    left["rest"] = run.out
    return run_dir, left


def test_a_killed_run_goes_on_to_the_same_bits(whole, stopped):
    run_dir, left = stopped
    assert left["killed"] == -signal.SIGKILL
    same_run(whole, run_dir)


def test_sigterm_finishes_the_step_and_saves_it(stopped):
    _, left = stopped
    assert left["logged"] == list(range(len(left["logged"])))
    assert len(left["logged"]) < STEPS, "the signal came too late to test anything"
    assert left["saved"][-1] == len(left["logged"]), "the checkpoint is of the last finished step"
    assert not left["summary"], "a run that is to be resumed has no summary yet"
    assert "SIGTERM" in left["said"]


def test_a_resumed_run_says_so(stopped):
    _, left = stopped
    assert f"resumed from step {left['saved'][-1]}" in left["rest"]


def test_totals_go_on_over_the_stops(whole, stopped):
    a, b = (json.loads((p / "summary.json").read_text()) for p in (whole, stopped[0]))
    for key in ("teacher/calls", "teacher/tokens_in", "teacher/tokens_out", "student_tokens", "step"):
        assert a[key] == b[key], key


def test_a_complete_run_started_again_only_evaluates(folder, whole, one_device):
    before = (whole / "metrics.jsonl").read_bytes(), (whole / "audits.jsonl").read_bytes()
    params = checkpoint.restore_params(whole)[0]
    out = train.train(in_process(folder, "whole"))
    assert (out["exit_code"], out["step"]) == (0, STEPS)
    assert ((whole / "metrics.jsonl").read_bytes(), (whole / "audits.jsonl").read_bytes()) == before
    assert tiny.same(checkpoint.restore_params(whole)[0], params)


@pytest.mark.slow
def test_a_longer_run_goes_on_where_the_shorter_one_ended(folder, whole, one_device):
    """The data position is the step: nine steps are the first of eleven."""
    c = in_process(folder, "more", num_steps=2)
    assert train.train(c)["step"] == 2
    c.num_steps = 4
    assert train.train(c)["step"] == 4
    rows = [tiny.lines(p / "metrics.jsonl")[:4] for p in (folder / "more", whole)]
    assert [r["loss"] for r in rows[0]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-4)


LONG, EVERY = {"num_steps": 120, "checkpoint.every": 3}, 3


@pytest.fixture(scope="module")
def long_run(folder) -> tuple[pathlib.Path, float]:
    """A longer run that nobody stopped, and the seconds that its command took up to its first step."""
    began = time.monotonic()
    process = start(folder, "long", **LONG)
    when_logged(process, folder / "long", 1)
    first_step = time.monotonic() - began
    finish(process)
    return folder / "long", first_step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_twenty_signals_at_random_moments(folder, long_run, number):
    """One in four comes while the command starts, the others in the loop: in a rollout, an update, a save.

    Every start goes on from a whole checkpoint. After SIGTERM it is that of the last step that was logged, after kill
    -9 at most `checkpoint.every` + 1 steps behind. The end is bit-identical.
    """
    whole, first_step = long_run
    rng, name, logs = (
        random.Random(int(number)),
        f"signals-{int(number)}",
        folder / f"signals-{int(number)}" / "metrics.jsonl",
    )
    logged, met, lost = 0, [], []
    for _ in range(20):
        process = start(folder, name, **LONG)
        began = time.monotonic()
        if rng.random() < 0.25:
            time.sleep(rng.random() * first_step)
        else:
            when_logged(process, logs.parent, logged + 1 + rng.randrange(2))
            time.sleep(rng.random() * 0.4)
        moment = time.monotonic() - began
        assert process.poll() is None, "it ended before the signal"
        stop(process, number)
        out, err = process.communicate(timeout=300)
        in_loop = "stopped by SIGTERM" in out
        # outside the loop a signal ends the command at once: by its handler, or before there is one
        saved = any((logs.parent / "checkpoints").glob("[0-9]*"))  # without a checkpoint there is nothing to go on from
        ended = (75, -15) if saved else (75, -15, 143)
        assert process.returncode in (ended if number == signal.SIGTERM else (-9,)), err[-3000:]
        assert "can't be restored" not in err, f"a torn checkpoint was found: {err}"
        if went_on := re.search(r"resumed from step (\d+)", out):
            lost.append(logged - int(went_on.group(1)))
        else:
            assert "step 1/" not in out or logged <= EVERY + 1, "it began anew"
        logged = logs.read_bytes().count(b"\n") if logs.exists() else 0
        if in_loop:
            saved = max(int(f.name) for f in (logs.parent / "checkpoints").iterdir() if f.name.isdigit())
            assert saved == logged, "every step that was finished is saved"
        met.append((round(moment, 1), logged, in_loop))
    print(
        f"\n{signal.Signals(number).name}: (seconds into its command, steps logged, saved by the loop) {met}; lost "
        f"{lost}"
    )
    assert len(lost) >= 10 and max(lost) <= (0 if number == signal.SIGTERM else EVERY + 1), lost
    finish(start(folder, name, **LONG))
    same_run(whole, logs.parent, LONG["num_steps"])


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint(folder, whole):
    process = start(folder, "early")
    when_logged(process, folder / "early", 1)
    stop(process, signal.SIGKILL)
    process.communicate()
    finish(start(folder, "early"))
    same_run(whole, folder / "early")


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(folder):
    process = start(folder, "interrupted", num_steps=500)
    when_logged(process, folder / "interrupted", 2)
    for _ in range(2):
        stop(process, signal.SIGINT)
        time.sleep(0.02)
    process.communicate(timeout=60)
    assert process.returncode != 0
