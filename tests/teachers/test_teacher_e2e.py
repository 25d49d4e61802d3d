"""The whole loop with a teacher over the wire: faults, outages, kill -9, replay, secrets. The server's log is the
judge."""

import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import sqlite3
import time

import pytest
import teacher_runs
import tiny
from teacher_runs import answered, seeds, wire
from wire_server import WireServer

from benchmarks.real.server import serve_transformers

MARK = "sk-MARKED0123456789abcdef"
N = teacher_runs.SIZES["audit.num_continuations"]


def until(condition, run, seconds=180):
    """Waits for a condition while the run goes on."""
    end = time.monotonic() + seconds
    while not condition():
        assert run.code is None and time.monotonic() < end, (run.code, run.out[-2000:], run.err[-2000:])
        time.sleep(0.02)


def of_training(server):
    """The calls but the probe's, whose seeds are 1 to 12; a client that was killed may have sent half a request."""
    return [e for e in server.calls() if (e["body"] or {}).get("seed", 0) > 1000]


def assert_counts_are_the_servers(run, server):
    """Every audit's n is what the server sent; nothing that had been answered was asked again."""
    sent, audits = answered(server.calls()), run.audits()
    assert audits
    for audit in audits:
        assert audit["n"] == sum(sent.get(s, 0) for s in seeds(audit, N)) == len(audit["continuations"]), audit
        assert audit["n"] + len(audit["failures"]) == N
    known = set()
    for entry in of_training(server):
        seed = entry["body"]["seed"]
        assert seed not in known, "asked again for what had been answered"
        if entry["texts"]:
            known.add(seed)


def assert_mark_is_nowhere(run):
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert MARK.encode() not in path.read_bytes(), path
    assert (run.folder / "run.out").stat().st_size and (run.folder / "run.err").exists()


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_thirty_percent_faults_then_a_replay_offline(steps, runner, tmp_path, capfd):
    """Faults, secrets and replay on one run: its key is marked, its journal alone must then give the same run again."""
    healthy = [None] * 12  # the probe's questions; the training calls draw a fault three times in ten
    settings = {"num_steps": steps, "teacher.max_retries": 2}
    key = {"OPENAI_API_KEY": MARK}
    with WireServer(key=MARK, share=0.3, faults=healthy, retry_after_s=0.3, rng=random.Random(steps)) as server:
        noisy = wire(server) | settings | {"log.tensorboard": True}
        first = runner.run(tmp_path / "first", noisy, env=key, args=["--verbosity=1"])
        assert first.code == 0, first.err[-3000:]
        # the SDK's logs
        assert all(w in first.err for w in ("HTTP Request: POST", "send_request_headers")), first.err[:3000]
        assert list((tmp_path / "first" / "tensorboard").iterdir())
        assert_counts_are_the_servers(first, server)
        kinds = {entry["fault"] for entry in server.calls()} - {None}
        assert len(kinds) >= (10 if steps == 20 else 4), kinds
        before = len(server.calls())
    steps_seen = first.metrics()
    assert len(steps_seen) == steps and all(math.isfinite(m[k]) for m in steps_seen for k in ("loss", "grad_norm"))
    assert sum(m["teacher/retries"] for m in steps_seen) > 0
    assert_mark_is_nowhere(first)

    offline = (
        wire(server) | settings | {"teacher.replay": "only", "teacher.journal": str(tmp_path / "first" / "journal")}
    )
    again = runner.run(tmp_path / "again", offline, env={"OPENAI_API_KEY": None})
    assert again.code == 0, again.err[-3000:]
    assert tiny.same(first.params(), again.params())
    keys = ("step", "sample_id", "peak", "continuations", "similarity", "failures", "n", "weight")
    assert [[a[k] for k in keys] for a in again.audits()] == [[a[k] for k in keys] for a in first.audits()]
    assert len(server.calls()) == before and sum(m["teacher/calls"] for m in again.metrics()) == 0


def test_a_refused_key_is_not_told(runner, tmp_path):
    with WireServer(key="another") as server:
        run = runner.run(tmp_path / "run", wire(server), env={"OPENAI_API_KEY": MARK}, args=["--verbosity=1"])
    assert run.code == 2 and "OPENAI_API_KEY" in run.err and "refuses the key" in run.err
    assert "Traceback" in run.err  # the verbosity that was asked for
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or MARK.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("kind", ["503", *(pytest.param(k, marks=pytest.mark.slow) for k in ("stall", "gone"))])
def test_total_failure_stops_with_a_checkpoint_and_the_resumed_run_goes_on(kind, runner, tmp_path):
    deadline = 4.0
    server = WireServer(stall_s=60.0).start()
    try:
        settings = wire(server) | {"num_steps": 4, "checkpoint.every": 100}
        settings |= {"teacher.deadline_s": deadline, "teacher.timeout_s": 1.5}
        run = runner.start(tmp_path / "run", settings)
        until(lambda: len(run.metrics()) >= 1, run)
        server.kinds, server.share = [kind], float(kind != "gone")
        server.stop() if kind == "gone" else None
        broken = time.monotonic()
        run.wait()
        seconds = time.monotonic() - broken
        assert run.code == 2 and "has not answered for" in run.err and "start again" in run.err, run.err[-2000:]
        assert "Traceback" not in run.err
        assert seconds < deadline + 12, seconds  # the rest: a step under way, the checkpoint, the process's end
        done = len(run.metrics())
        assert 1 <= done < 4 and (run.folder / "checkpoints" / str(done)).is_dir()
        assert all(a["n"] == N for a in run.audits())  # the failed step wrote nothing off
        server.share = 0.0
        server.start() if kind == "gone" else None
        rest = runner.run(tmp_path / "run", settings)
        assert rest.code == 0 and f"resumed from step {done}" in rest.out, rest.err[-2000:]
        assert len(rest.metrics()) == 4
        if kind == "503":
            assert_counts_are_the_servers(rest, server)
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in training", "in the probe"])
def test_a_signal_while_the_server_hangs_ends_the_run_in_silence(when, runner, tmp_path):
    """What is open is cancelled and awaited: no traceback, nothing destroyed while pending; the silence itself is
    told."""
    with WireServer(stall_s=120.0) as server:
        settings = wire(server) | {"num_steps": 6, "teacher.timeout_s": 100.0, "teacher.deadline_s": 300.0}
        if when == "in the probe":
            server.kinds, server.share = ["stall"], 1.0
        run = runner.start(tmp_path / "run", settings)
        if when == "in training":
            until(lambda: len(run.metrics()) >= 1, run)
            server.kinds, server.share = ["stall"], 1.0
        until((run.folder / "run.err").exists, run)
        until(lambda: "has not answered for 1" in run.err, run)
        start = time.monotonic()
        run.kill(signal.SIGTERM)
        run.wait()
        assert time.monotonic() - start < 20
    assert run.code == (75 if when == "in training" else 128 + signal.SIGTERM), (run.code, run.err[-2000:])
    assert "calls wait" in run.err and "given up in" in run.err
    for word in ("Traceback", "Task was destroyed", "Event loop is closed", "never retrieved", "Exception ignored"):
        assert word not in run.err + run.out, run.err[-3000:]


@pytest.mark.slow
def test_a_server_that_is_gone_for_twenty_seconds(runner, tmp_path):
    server = WireServer(delay_s=0.05).start()
    try:
        run = runner.start(tmp_path / "run", wire(server) | {"num_steps": 6, "teacher.deadline_s": 90.0})
        until(lambda: len(run.metrics()) >= 2, run)
        server.stop()
        time.sleep(20)
        done = len(run.metrics())
        server.start()
        run.wait()
    finally:
        server.stop()
    assert run.code == 0 and done <= 4, run.err[-2000:]
    assert_counts_are_the_servers(run, server)
    assert sum(m["teacher/failed"] for m in run.metrics()) <= 8  # those that were being answered when it went
    assert max(m["time/teacher_wait"] for m in run.metrics()) > 15


def lost_calls(folder):
    """Calls of each process that wrote to the journal that nobody heard of again."""
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as connection:
        counts = connection.execute("select count(*) from calls where status = 'asked' group by writer").fetchall()
    return [count for (count,) in counts]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_kill_9_and_resume_pays_for_nothing_twice(kills, runner, tmp_path):
    steps = kills + 1
    rng = random.Random(kills)
    with WireServer(delay_s=0.15, honours_n=False) as server:
        settings = wire(server) | {"num_steps": steps, "teacher.max_concurrency": 4}
        killed = 0
        while killed < kills:
            before = len(server.calls())
            run = runner.start(tmp_path / "killed", settings)
            # somewhere between its first call, in training or in the probe, and what a few steps take
            target = before + rng.randint(1, 60)
            while run.code is None and len(server.calls()) < target:
                time.sleep(0.005)
            if run.code is not None:
                break
            run.kill(signal.SIGKILL)
            run.wait()
            assert run.code == -signal.SIGKILL
            killed += 1
        assert killed == kills  # else it had finished before
        last = runner.run(tmp_path / "killed", settings)
        assert last.code == 0, last.err[-3000:]
        time.sleep(0.3)
        training = of_training(server)
        sent = answered(training)
        twice = sum(count - 1 for count in sent.values())
        # in flight at a kill: written down as asked, answer never read; the server may have answered
        in_flight = lost_calls(tmp_path / "killed" / "journal") or [0]
        assert 0 <= twice <= sum(in_flight) and len(in_flight) <= killed and max(in_flight) <= 4, (twice, in_flight)
        wanted = {s for a in last.audits() for s in seeds(a, N)}
        assert len(last.audits()) and wanted == sent.keys()  # nothing was asked that the finished run did not use

        calls = len(training)
        whole = settings | {"teacher.replay": "prefer", "teacher.journal": str(tmp_path / "killed" / "journal")}
        uninterrupted = runner.run(tmp_path / "whole", whole)
        assert uninterrupted.code == 0, uninterrupted.err[-3000:]
        assert len(of_training(server)) == calls
    assert tiny.same(last.params(), uninterrupted.params())
    drop = ("latency_s", "cost_usd")
    strip = [[{k: v for k, v in a.items() if k not in drop} for a in r.audits()] for r in (last, uninterrupted)]
    assert strip[0] == strip[1]
    assert os.path.isdir(pathlib.Path(tmp_path / "killed" / "journal_snapshots"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base_url, folder) of `transformers serve` on the small world's teacher."""
    parent = tmp_path_factory.mktemp("served")
    folder = parent / "teacher"
    shutil.copytree(tiny.TRAINED / "teacher", folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    # without do_sample it is greedy, whatever temperature a request names; top_k's own default would be 50
    (folder / "generation_config.json").write_text(
        json.dumps(generation | {"do_sample": True, "top_k": 0, "top_p": 1.0})
    )
    with serve_transformers(folder, log=parent / "log") as made:
        yield made.url, folder


@pytest.mark.slow
def test_the_whole_run_distils_from_transformers_serve(served, runner, tmp_path):
    """A real server: probed, continued by raw completion, one text a call (it ignores n), and what it says is used."""
    url, folder = served
    settings = {
        "teacher.provider": "openai",
        "teacher.base_url": url,
        "teacher.model": str(folder),
        "teacher.tokenizer": str(folder),
        "teacher.continuation": "auto",
        "teacher.timeout_s": 120.0,
        "teacher.deadline_s": 600.0,
        "num_steps": 3,
        "teacher.max_concurrency": 4,
    }
    run = runner.start(tmp_path / "run", settings).wait(580)
    assert run.code == 0, run.err[-3000:]
    report = json.loads((tmp_path / "run" / "teacher_probe.json").read_text())
    rows = dict(report["rows"])
    assert (
        report["mode"] == "completion" and rows["texts a call"] == "one" and rows["samples at temperature 1"] == "yes"
    )
    assert len(run.metrics()) == 3 and all(math.isfinite(m["loss"]) for m in run.metrics())
    audits = run.audits()
    assert audits and all(a["n"] == N and not a["failures"] for a in audits)
    # it samples, though this teacher is seldom in two minds
    assert any(len(set(a["continuations"])) > 1 for a in audits)
    # it is the small world's teacher, so it often writes what the student wrote
    assert sum(a["k_sem"] for a in audits) / sum(a["n"] for a in audits) > 0.5
    assert all(m["teacher/calls"] >= m["audit/chunks"] * N for m in run.metrics())
