"""run_dir = gs://...: checkpoints, metrics and config in a bucket, the lock, what is refused; against a local stand-in
that gcsfs, TensorStore and Google's SDK talk to as to the service (tests/support/fake_bucket.py)."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time

import fake_bucket
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import teacher_runs
import tiny
from etils import epath
from wire_server import WireServer

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.run import best, bucket, checkpoint, files, lock
from omniopd_jax.run.state import TrainState
from omniopd_jax.run.validation import validate
from omniopd_jax.teachers import by_row


@pytest.fixture
def gcs(monkeypatch):
    with fake_bucket.serving() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # FSSPEC_GS is read on import alone
        fsspec.filesystem("gs").clear_instance_cache()
        yield server


def state(number: int) -> TrainState:
    params = {"a": {"w": jnp.arange(12.0).reshape(3, 4) + number}, "b": jnp.full(5, number, jnp.bfloat16)}
    return TrainState(params, {"m": jnp.ones(3) * number}, jnp.int32(number), jax.random.key(number))


def like(s: TrainState) -> TrainState:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), s)


def mirror_of(folder, url="gs://bucket/runs/a"):
    folder.mkdir(parents=True, exist_ok=True)
    return bucket.Mirror(folder, files.place(url), sends=True)


def test_what_is_saved_is_in_the_bucket_and_comes_back_on_another_host(gcs, tmp_path):
    (tmp_path / "a").mkdir()
    mirror = mirror_of(tmp_path / "a")
    own = checkpoint.Checkpoints("gs://bucket/runs/a", keep=2, local=tmp_path / "a")
    own.before_save = mirror.send
    with contextlib.closing(own):
        (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 0}\n')
        own.save(state(3), {"steps": 3})
        assert gcs.text("runs/a/metrics.jsonl") == '{"step": 0}\n'  # sent before the save begins
    before, gcs.requests[:] = dict(gcs.objects), []
    with contextlib.closing(checkpoint.Checkpoints.reader("gs://bucket/runs/a")) as read:
        got, meta = read.restore_newest(like(state(3)))
    assert checkpoint.fingerprint(got) == checkpoint.fingerprint(state(3)) and meta == {"steps": 3}
    assert np.array_equal(got.params["a"]["w"], state(3).params["a"]["w"])
    assert gcs.objects == before and {method for method, _ in gcs.requests} == {"GET"}  # a reader writes nothing
    mirror_of(tmp_path / "b").fetch()
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "b" / "checkpoints").exists() and not list(tmp_path.glob("gs:*"))


@pytest.mark.slow
def test_the_best_checkpoint_and_a_named_teachers_journal_know_the_bucket(gcs, tmp_path):
    c = config.default()
    c.update_from_flattened_dict({
        "run_dir": "gs://bucket/runs/a", "local_dir": str(tmp_path), "checkpoint.best_metric": "eval/accuracy",
    })  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    with best.watched(c, {}, 0) as kept:
        kept.take(state(2), {"eval/accuracy": 0.5})
    assert gcs.text("runs/a/best/config.json") == "{}"
    with contextlib.closing(checkpoint.Checkpoints.reader("gs://bucket/runs/a/best")) as read:
        assert read.latest() == 2
    c.teachers.one = config.ConfigDict({"model": "x"})
    (own,) = by_row.configs(c).values()
    assert own.teacher.journal == str(tmp_path / "journal" / "one") and own.run_dir == "gs://bucket/runs/a/teachers/one"
    assert config.local_folder(own) == tmp_path / "teachers" / "one" and not list(tmp_path.glob("gs:*"))


def test_a_broken_checkpoint_of_a_bucket_is_set_aside(gcs, tmp_path, capsys):
    own = checkpoint.Checkpoints("gs://bucket/r", keep=3, local=tmp_path)
    with contextlib.closing(own):
        for number in (1, 2):
            own.save(state(number), {})
        own.wait()
        for name in [n for n in gcs.objects if "/checkpoints/2/state/" in n and "/d/" in n]:
            gcs.put(name, b"\0" * 40)
        got, _ = own.restore_newest(like(state(2)))
        assert int(got.step) == 1 and own.latest() == 1
    assert "moved the broken checkpoint 2 to gs://bucket/r/corrupt_checkpoints/2-" in capsys.readouterr().err


def test_only_what_changed_is_sent_and_what_is_gone_is_removed(gcs, tmp_path, capsys):
    mirror = mirror_of(tmp_path)
    for name in (
        "config.json",
        "ahead/1.0.npz",
        "journal/journal.sqlite",
        "lock",
        ".hidden",
        "ahead/x.tmp",
        "mine.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    mirror.send()
    assert sorted(gcs.objects) == ["runs/a/ahead/1.0.npz", "runs/a/config.json"]
    (tmp_path / "ahead" / "1.0.npz").rename(tmp_path / "ahead" / "2.0.npz")
    writes = gcs.writes
    mirror.send()
    assert sorted(gcs.objects) == ["runs/a/ahead/2.0.npz", "runs/a/config.json"] and gcs.writes == writes + 1
    gcs.refuse = "POST .*upload"
    (tmp_path / "config.json").write_text("new")
    mirror.send()  # a save goes on, with a line
    assert "runs/a can't be written (" in capsys.readouterr().out and gcs.text("runs/a/config.json") == "config.json"
    with pytest.raises(UserError, match=r"can't be written .*; what was not sent is in "):
        mirror.send(last=True)
    gcs.refuse = ""
    mirror.send()
    assert gcs.text("runs/a/config.json") == "new"


def test_a_copy_of_the_journal_is_called_whole_when_it_is_there(tmp_path, monkeypatch):
    part, order = tmp_path / "own" / "journal_snapshots" / "10" / "0", []
    part.mkdir(parents=True)
    for name in ("disks", "journal.sqlite"):
        (part / name).write_text(name)
    mirror = bucket.Mirror(tmp_path / "own", epath.Path(tmp_path / "bucket"), sends=True)
    monkeypatch.setattr(mirror, "_send_one", order.append)
    mirror.send()
    assert order == ["journal_snapshots/10/0/journal.sqlite", "journal_snapshots/10/0/disks"]


def test_what_a_killed_host_could_not_send_is_not_lost_on_it(tmp_path):
    """Its bucket could not be written before the last checkpoint: lines that go on from the bucket's stay and are sent,
    as is what the bucket never had; what another host has gone on with is taken."""
    url, own = epath.Path(tmp_path / "bucket"), tmp_path / "own"
    url.mkdir()
    own.mkdir()
    for name, there, here in (("metrics.jsonl", "1\n", "1\n2\n"), ("audits.jsonl", "1\n3\n", "1\n2\n2\n"),
                              ("config.json", "new", "older"), ("summary.json", None, "mine")):  # fmt: skip
        (own / name).write_text(here)
        if there is not None:
            (url / name).write_text(there)
    mirror = bucket.Mirror(own, url, sends=True)
    mirror.fetch()
    wanted = {"metrics.jsonl": "1\n2\n", "audits.jsonl": "1\n3\n", "config.json": "new", "summary.json": "mine"}
    assert {name: (own / name).read_text() for name in wanted} == wanted
    mirror.send()
    assert {name: (url / name).read_text() for name in wanted} == wanted


def test_a_local_folder_is_of_one_run(gcs, tmp_path):
    mirror_of(tmp_path, "gs://bucket/one").fetch()
    mirror_of(tmp_path, "gs://bucket/one").fetch()
    with pytest.raises(UserError, match="belongs to run_dir = gs://bucket/one: set another local_dir"):
        mirror_of(tmp_path, "gs://bucket/two").fetch()


def test_a_run_that_is_refused_sends_nothing(gcs, tmp_path):
    own = bucket.Lock(files.place("gs://bucket/run"))
    own.acquire()
    gcs.put("run/metrics.jsonl", b"theirs")
    (tmp_path / "metrics.jsonl").write_text("old")
    c = tiny.recipe("no student", "no teacher", "gs://bucket/run", local_dir=str(tmp_path))
    with pytest.raises(UserError, match="gs://bucket/run is in use by process"), bucket.held(c):
        pass
    assert gcs.text("run/metrics.jsonl") == "theirs" and (tmp_path / "metrics.jsonl").read_text() == "old"
    own.release()


def test_one_of_many_that_start_at_once_gets_the_lock(gcs):
    said, won = [], []

    def start():
        own = bucket.Lock(files.place("gs://bucket/r"))
        try:
            own.acquire()
            won.append(own)
        except UserError as error:
            said.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1 and len(said) == 3 and all("gs://bucket/r is in use by process" in s for s in said)
    won[0].release()
    assert not gcs.objects


@pytest.mark.parametrize(
    ("changes", "silent_s", "why"),
    [
        ({"host": "elsewhere"}, 301, "host elsewhere has been silent for 30"),
        ({"host": "elsewhere"}, 200, None),
        ({"started": 1}, 0, "has ended"),
        ({"boot": "another"}, 0, "has been restarted"),
        ({}, 3000, None),
    ],
)
def test_a_lock_is_taken_over_from_a_holder_that_is_gone(gcs, capsys, changes, silent_s, why):
    holder = dataclasses.replace(lock.this_process(), **changes)
    gcs.put("r/lock", json.dumps(dataclasses.asdict(holder)).encode())
    then = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() - silent_s))
    gcs.objects["r/lock"] = dataclasses.replace(gcs.objects["r/lock"], updated=then)
    own = bucket.Lock(files.place("gs://bucket/r"))
    if why is None:
        with pytest.raises(UserError, match="in use by process"):
            own.acquire()
        return
    own.acquire()
    assert why in capsys.readouterr().out
    own.release()


def test_a_run_whose_lock_was_taken_over_ends_before_its_next_save(gcs, tmp_path):
    own = bucket.Lock(files.place("gs://bucket/r"))
    own.acquire()
    mirror = mirror_of(tmp_path, "gs://bucket/r")
    mirror.lock = own
    own.beat()
    mirror.send()
    other = dataclasses.replace(lock.this_process(), host="elsewhere", pid=7)
    gcs.put("r/lock", json.dumps(dataclasses.asdict(other)).encode())
    own.beat()
    with pytest.raises(UserError, match=r"was taken over by another run \(process 7 on elsewhere\)"):
        mirror.send()
    own.release()
    assert json.loads(gcs.text("r/lock"))["host"] == "elsewhere"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_dir": "s3://bucket/x"}, "run_dir = 's3://bucket/x' is neither a folder nor gs://BUCKET/PATH"),
        ({"run_dir": "gs://bucket"}, "neither a folder nor gs://BUCKET/PATH"),
        ({"run_dir": "file:///tmp/x"}, "neither a folder nor gs://BUCKET/PATH"),
        ({"teacher.journal": "gs://bucket/j"}, "teacher.journal = 'gs://bucket/j' must be a folder on a local disk"),
    ],
)
def test_places_that_cannot_be_written_are_refused_by_name(changes, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        c = tiny.recipe("student", "teacher", "gs://bucket/run")
        c.update_from_flattened_dict(changes)
        validate(c)


def test_a_bucket_without_permission_is_one_line_before_anything_loads(gcs, tmp_path):
    gcs.refuse = "POST"
    c = tiny.recipe("no student", "no teacher", "gs://bucket/run", local_dir=str(tmp_path))
    with pytest.raises(UserError, match="^run_dir = gs://bucket/run can't be written") as caught, bucket.held(c):
        pass
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_bucket_on_another_host_as_if_it_had_not_been(gcs, tmp_path):
    """A whole run: the same parameters, audits and money as a run in a folder; export and report read the bucket."""
    runner = teacher_runs.Runner()
    try:
        with WireServer(delay_s=0.05) as server:
            settings = teacher_runs.wire(server) | {"num_steps": 5, "max_staleness": 1}
            whole = runner.run(tmp_path / "whole", settings)
            assert whole.code == 0, whole.err[-2000:]
            there = settings | {"run_dir": "gs://bucket/runs/x"}
            first = runner.start(tmp_path / "first", there | {"local_dir": str(tmp_path / "host1")}, env=gcs.env)
            end = time.monotonic() + 120
            while not any("checkpoints/2/commit" in n for n in gcs.objects) and first.code is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            first.kill(signal.SIGKILL)
            assert first.wait().code == -signal.SIGKILL, first.err[-2000:]
            rest = runner.run(tmp_path / "rest", there | {"local_dir": str(tmp_path / "host2")}, env=gcs.env)
            assert rest.code == 0 and "resumed from step" in rest.out, rest.out[-1000:] + rest.err[-3000:]
    finally:
        runner.close()
    assert tiny.same(whole.params(), checkpoint.restore_params("gs://bucket/runs/x")[0])
    keys = ("step", "loss", "teacher/tokens_out")
    lines = [json.loads(line) for line in gcs.text("runs/x/metrics.jsonl").splitlines()]
    assert [[m[k] for k in keys] for m in lines] == [[m[k] for k in keys] for m in whole.metrics()]
    kept = {n.split("/")[2] for n in gcs.objects}
    assert {"config.json", "summary.json", "audits.jsonl", "journal_snapshots", "checkpoints"} <= kept
    assert "lock" not in kept and "journal" not in kept and not list(tiny.REPO.glob("gs:*"))
    for command in (
        ["export", "--checkpoint=gs://bucket/runs/x", f"--out={tmp_path / 'model'}"],
        ["report", "gs://bucket/runs/x", f"--out={tmp_path / 'page.html'}"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"omniopd_jax.{command[0]}", *command[1:]], cwd=tiny.REPO, text=True,
            env=tiny.environment(**gcs.env), capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_write_one_run_to_a_bucket(gcs, tmp_path):
    values = tiny.overrides(*tiny.make_folders(tmp_path), "gs://bucket/two") | {
        "local_dir": str(tmp_path / "local"), "checkpoint.every": 1, "distributed.start_s": 60,
    }  # fmt: skip
    done = subprocess.run(
        [tiny.REPO / "launch" / "multihost_cpu.sh", "2", *tiny.arguments(values)], cwd=tiny.REPO, text=True,
        env=tiny.environment(PYTHON=tiny.PYTHON, **gcs.env), capture_output=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    kept = {n.split("/")[1] for n in gcs.objects}
    assert {
        "metrics.jsonl",
        "audits.jsonl",
        "audits-1.jsonl",
        "config.json",
        "summary.json",
    } <= kept and "lock" not in kept
    assert {n.split("/")[2] for n in gcs.objects if n.startswith("two/checkpoints/")} >= {"1", "2"}
    assert checkpoint.saved_params("gs://bucket/two").step == 2
