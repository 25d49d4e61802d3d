"""One run per run directory: who holds it, when it is taken over, and that nobody else writes there."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import tiny

from omniopd_jax import config, train
from omniopd_jax.errors import UserError
from omniopd_jax.run import bucket, files, lock
from omniopd_jax.teachers import journal

HOLD = (
    "import sys, time; from omniopd_jax.run import lock\n"
    "own = lock.Lock(sys.argv[1]); own.acquire(); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def other(tmp_path):
    """A live process that holds tmp_path/run."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def holder_file(folder, **changes) -> None:
    """A lock left in `folder` by this host's process 1, changed as asked."""
    folder.mkdir(exist_ok=True)
    here = dataclasses.replace(lock.this_process(), pid=1, started=lock.start_time(1))
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(here, **changes))))


def test_a_second_run_is_refused_and_harms_nothing(other, tmp_path):
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on .* set another run_dir"):
        lock.Lock(tmp_path / "run").acquire()
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_killed_holder_is_taken_over_with_a_line(other, tmp_path, capsys):
    other.kill()
    other.wait()
    own = lock.Lock(tmp_path / "run")
    own.acquire()
    assert f"process {other.pid} has ended: this run takes it over" in capsys.readouterr().out
    own.release()
    assert not (tmp_path / "run" / "lock").exists()


def test_a_holder_that_nobody_has_waited_for_has_ended(other, tmp_path, capsys):
    """A parent that does not ask for the exit code leaves its child in the list of processes."""
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    own = lock.Lock(tmp_path / "run")
    own.acquire()
    assert f"process {other.pid} has ended" in capsys.readouterr().out
    own.release()


@pytest.mark.parametrize(
    ("changes", "silent_s", "free"),
    [
        ({}, 0, False),
        ({}, 10_000, False),  # alive on this host, whatever its heartbeat: a suspended process comes back
        ({"started": 1}, 0, True),  # the number was given to another process
        ({"pid": 2**22 + 1}, 0, True),
        ({"boot": "an earlier boot"}, 0, True),
        ({"namespace": "pid:[1]", "started": 1}, 200, False),  # another container's process 1, with this host's name
        ({"namespace": "pid:[1]", "started": 1}, 400, True),
        ({"namespace": "", "started": 1}, 0, True),  # of a version that did not say
        ({"host": "elsewhere"}, 200, False),
        ({"host": "elsewhere"}, 400, True),
        ({"host": "elsewhere", "boot": "its own", "pid": 2**22 + 1}, 10, False),
    ],
)
def test_a_lock_is_taken_over_only_where_its_holder_is_gone(tmp_path, changes, silent_s, free):
    folder = tmp_path / "run"
    holder_file(folder, **changes)
    beat = time.time() - silent_s
    os.utime(folder / "lock", (beat, beat))
    own = lock.Lock(folder)
    if free:
        own.acquire()
        assert json.loads((folder / "lock").read_text())["pid"] == os.getpid()
        own.release()
    else:
        with pytest.raises(UserError, match="in use by process"):
            own.acquire()


def test_of_many_that_take_over_at_once_one_has_the_lock(tmp_path):
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        holder_file(folder, started=1)
        start, ends = threading.Barrier(4), []

        def take(folder=folder, start=start, ends=ends):
            own = lock.Lock(folder)
            start.wait()
            try:
                own.acquire()
                ends.append(own)
            except UserError as error:
                ends.append(str(error))

        threads = [threading.Thread(target=take) for _ in range(4)]
        [t.start() for t in threads]
        [t.join(30) for t in threads]
        held = [own for own in ends if isinstance(own, lock.Lock)]
        assert len(held) == 1 and len(ends) == 4, ends
        assert json.loads((folder / "lock").read_text())["token"] == held[0].holder.token
        held[0].release()
        assert not (folder / "lock").exists()


@pytest.mark.parametrize("kind", ["file", "under a file"])
def test_a_run_dir_that_can_not_be_written_is_one_line_before_anything_loads(tmp_path, kind):
    (tmp_path / "file").write_text("")
    run_dir = tmp_path / "file" if kind == "file" else tmp_path / "file" / "run"
    c = tiny.recipe(tmp_path / "no student", tmp_path / "no teacher", run_dir)
    with pytest.raises(UserError, match="run_dir = .*file.*: set another run_dir"):
        train.train(c)


def test_the_key_that_is_wrong_is_named_however_it_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^run_dir = "), lock.held(tmp_path / "file", f"{tmp_path}/file/"):
        pass
    with pytest.raises(UserError, match="^local_dir = "), lock.held(tmp_path / "file", "gs://bucket/run"):
        pass


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves it as it is behind `--config.run_dir=`; else a folder of that name is made here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    c = config.default()
    c.run_dir, c.teacher.journal = "~/runs/x", "~/journal"
    assert config.local_folder(c) == files.place(c.run_dir) == tmp_path / "runs" / "x"
    assert journal.folder_of(c) == tmp_path / "journal"


def test_the_heartbeat_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    own = lock.Lock(tmp_path)
    own.acquire()
    os.utime(tmp_path / "lock", (1, 1))
    end = time.monotonic() + 10
    while (tmp_path / "lock").stat().st_mtime < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert time.time() - (tmp_path / "lock").stat().st_mtime < 10
    own.release()
    assert not (tmp_path / "lock").exists()


def test_a_run_that_was_taken_over_while_it_was_away_writes_no_more(tmp_path):
    """A host that is suspended for longer than others wait: whoever took the folder over must not be disturbed."""
    c = config.default()
    c.run_dir = str(tmp_path / "run")
    with bucket.held(c) as mirror:
        mirror.lock.beat()
        mirror.send()
        (tmp_path / "run" / "lock").unlink()  # by hand: nobody else has it
        with pytest.raises(FileNotFoundError):
            mirror.lock.beat()
        mirror.send()
        holder_file(tmp_path / "run", host="elsewhere", token="theirs")
        os.utime(tmp_path / "run" / "lock", (1, 1))
        mirror.lock.beat()
        assert (tmp_path / "run" / "lock").stat().st_mtime == 1, "no heartbeat in another's name"
        with pytest.raises(
            UserError, match=r"run was taken over by another run \(process 1 on elsewhere\): this one ends"
        ):
            mirror.send()
    assert (tmp_path / "run" / "lock").exists()


def test_a_run_dir_that_the_hosts_do_not_share_is_one_line(tmp_path, monkeypatch):
    """Each would write its part of a checkpoint, and wait for the others' for ever."""
    c = config.default()
    c.run_dir = str(tmp_path / "run")
    monkeypatch.setattr(bucket.processes, "disks", lambda folder: [0, 0])
    with bucket.held(c):
        pass
    monkeypatch.setattr(bucket.processes, "disks", lambda folder: [0, 1])
    with pytest.raises(UserError, match=r"run_dir = .* is not one folder for all processes"), bucket.held(c):
        pass
