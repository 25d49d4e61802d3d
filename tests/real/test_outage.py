"""A real server that is overrun, and one that is killed in the middle of a step."""

import pathlib
import signal
import sqlite3
import time

import pytest
import real_kit
import teacher_runs
from teacher_kit import ask

from benchmarks.real import server

pytestmark = pytest.mark.real
CALLS, SEQS = 256, 8
PART = 24  # texts of a step, of some 96, that are there when the server dies
AWAY_S = 20.0  # before it is started again


@pytest.fixture(scope="module")
def small():
    """A server of its own, for at most eight texts at a time: it may be killed."""
    flags = ("--block-size", "32")
    with server.vllm(real_kit.student(), *flags, seqs=SEQS, log="vllm-small.log", threads=1) as made:
        yield made


def rows(journal: pathlib.Path, sql: str) -> list[tuple]:
    """Of a journal that another process may be writing to."""
    path = journal / "journal.sqlite"
    if not path.exists():
        return []
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30) as c:
        return c.execute(sql).fetchall()


TEXTS = "select hex(key), sample_id, peak, idx, text, finish, error from continuations where sample_id != 'probe'"


def settings(small, **more) -> dict:
    """The small world's student, with the real model as a teacher of another tokenizer."""
    return {
        "num_steps": 3, "prompts_per_step": 8, "rollout.parts": 1, "teacher.provider": "openai",
        "teacher.model": "teacher", "teacher.base_url": small.url, "teacher.tokenizer": str(real_kit.student()),
        "teacher.continuation": "completion", "teacher.max_concurrency": 4, "teacher.timeout_s": 120.0,
    } | more  # fmt: skip


def until_part_of_a_step(run, seconds=600) -> list[tuple]:
    """Waits until PART more texts have come since the first step was done; returns what is journaled."""
    end, first = time.monotonic() + seconds, None
    while time.monotonic() < end:
        assert run.code is None, (run.out[-2000:], run.err[-2000:])
        if run.metrics():
            got = rows(run.folder / "journal", TEXTS)
            first = len(got) if first is None else first
            if len(got) >= first + PART:
                return got
        time.sleep(0.05)
    raise AssertionError((run.out[-2000:], run.err[-2000:]))


def test_256_calls_at_once_are_each_answered_once(small, tmp_path):
    c = real_kit.cfg(small.url, tmp_path, **{
        "teacher.tokenizer": str(real_kit.student()), "teacher.continuation": "completion",
        "teacher.max_concurrency": CALLS, "teacher.replay": "prefer", "teacher.timeout_s": 500.0,
    })  # fmt: skip
    messages = real_kit.problems(CALLS)
    results = ask(c, *(real_kit.Cut(f"call {i}", m, "The answer").request(1, 4) for i, m in enumerate(messages)))
    assert [len(r.continuations) for r in results] == [1] * CALLS, [r.failures for r in results if r.failures][:3]
    assert sum(r.usage.calls for r in results) == CALLS
    calls = rows(tmp_path / "journal", "select status, n from calls")
    assert calls == [("ok", 1)] * CALLS
    kept = rows(tmp_path / "journal", TEXTS)
    assert len(kept) == CALLS == len({row[1] for row in kept})


def test_a_server_that_is_killed_and_comes_back_costs_the_run_time_alone(small, runner, tmp_path):
    N = teacher_runs.SIZES["audit.num_continuations"]
    run = runner.start(tmp_path / "run", settings(small, **{"teacher.deadline_s": 900.0}))
    before = until_part_of_a_step(run)
    small.stop(signal.SIGKILL)
    steps = len(run.metrics())
    time.sleep(AWAY_S)
    assert run.code is None and len(run.metrics()) == steps, "it waits, and makes no step without its teacher"
    small.start()
    run.wait(900)
    assert run.code == 0, run.err[-3000:]
    assert "has not answered for" in run.err and "calls wait" in run.err
    after = rows(run.folder / "journal", TEXTS)
    assert set(before) <= set(after), "a text that was journaled has changed"
    assert not any(row[-1] for row in after), "a failure was written down"
    audits = run.audits()
    assert audits and all(a["n"] == N == len(a["continuations"]) and not a["failures"] for a in audits)
    assert len(after) == N * len(audits), "every text of every audit, and no other"
    calls = rows(run.folder / "journal", "select status, sum(n) from calls where key in (select key from continuations "
                 "where sample_id != 'probe') group by status")  # fmt: skip
    assert dict(calls)["ok"] == len(after), calls  # what had been answered was not asked again


def test_a_server_that_stays_away_ends_the_run_within_its_deadline_with_a_checkpoint(small, runner, tmp_path):
    deadline = 20.0
    run = runner.start(tmp_path / "run", settings(small, **{"teacher.deadline_s": deadline, "checkpoint.every": 100}))
    until_part_of_a_step(run)
    small.stop(signal.SIGKILL)
    killed = time.monotonic()
    run.wait(240)
    assert time.monotonic() - killed < deadline + 30
    assert run.code == 2, (run.code, run.err[-2000:])
    errors = [line for line in run.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "has not answered for" in errors[0] and "start again" in errors[0], run.err[-2000:]
    assert "Traceback" not in run.err and any((run.folder / "checkpoints").iterdir())
