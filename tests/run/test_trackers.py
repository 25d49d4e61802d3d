"""Trackers: the same names everywhere, tables, the config; none ever stops a run. Read back with their own
libraries."""

import json
import subprocess
import sys

import pytest
import report_runs as runs
import tiny

from omniopd_jax.errors import UserError
from omniopd_jax.run import logging, trackers

CONFIG = {"num_steps": 3, "teacher.model": "a \ud800 name \x1b[31m", "anchor.kl_coef": 0.1}
AUDITS = [runs.audit(0, i, chunk="<b>\ud800\x00 | cell") for i in range(3)]


def fill(wanted, folder, said=None):
    said = [] if said is None else said
    t = trackers.Trackers(wanted, folder, CONFIG, 0, said.append)
    for step in range(3):
        t.metrics(step, {"loss": 1.0 / (step + 1), "audit/k_sem_mean": 2 + step, "health/truncation": 0})
        t.table("audits", step, AUDITS)
    t.table("completions", 2, [runs.completion(2, 0)])
    t.close()
    return said


@pytest.mark.slow  # its reader imports TensorFlow
def test_tensorboard_holds_scalars_tables_and_the_config(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert fill(["tensorboard"], tmp_path) == []
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("audit/k_sem_mean")] == [(0, 2.0), (1, 3.0), (2, 4.0)]
    tags = events.Tags()["tensors"]
    assert {"audits/text_summary", "completions/text_summary", "config/text_summary"} <= set(tags)
    table = events.Tensors("audits/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table.count("\n") == 4 and "k_sem" in table.split("\n")[0] and "<b>" in table
    assert "anchor.kl_coef = 0.1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


class Broken:
    def __init__(self, *_):
        self.calls = 0

    def metrics(self, *_):
        self.calls += 1
        if self.calls == 2:
            raise ConnectionError("the\nserver is gone")

    table = close = metrics


@pytest.mark.parametrize("place", ["start", "middle"])
def test_a_tracker_that_fails_is_reported_once_and_left_out(tmp_path, monkeypatch, place):
    def refused(*_):
        raise PermissionError("no")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refused if place == "start" else Broken)
    said = fill(["wandb"], tmp_path)
    assert len(said) == 1 and "tracker wandb failed" in said[0] and "\n" not in said[0]


class Tables:
    keeps = True

    def __init__(self, *_):
        self.got = []

    def metrics(self, step, values):
        self.got.append(step)

    def table(self, name, *_):
        self.got.append(name)
        raise TypeError("a row of two kinds")

    def close(self):
        pass


def test_a_table_that_is_refused_costs_the_tables_alone(tmp_path, monkeypatch):
    own, said = Tables(), []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *_: own)
    t = trackers.Trackers(["wandb"], tmp_path, {}, 0, said.append)
    for step in range(3):
        t.metrics(step, {"loss": 1.0})
        t.table("audits", step, AUDITS)
    assert own.got == [0, "audits", 1, 2] and said == [
        "warning: tracker wandb takes no more tables: TypeError: a row of two kinds"
    ]


def test_steps_that_are_repeated_after_a_kill_are_logged_once(tmp_path, monkeypatch):
    """Six steps were logged, the checkpoint is of step 3: those two between come once more. A tracker that is new, or
    had failed before, gets them."""
    made: dict[str, list] = {"wandb": [], "trackio": [], "tensorboard": []}

    def maker(name):
        def make(*_):
            own = Tables()
            own.keeps = name != "tensorboard"
            made[name].append(own)
            return own

        return make

    monkeypatch.setattr(trackers, "TRACKERS", {name: maker(name) for name in made})
    for start, names, steps in ((0, ("wandb",), range(6)), (3, ("wandb", "trackio"), range(2, 8))):
        w = logging.Writer(tmp_path, start_step=start, tensorboard=True, trackers=names, rank=0)
        for step in steps:  # the first of the second start: an evaluation that was missing
            w.metrics(step, {"loss": 1.0})
        w.close()
    assert [own.got for own in made["wandb"]] == [[0, 1, 2, 3, 4, 5], [2, 6, 7]]
    assert made["trackio"][0].got == made["tensorboard"][1].got == [2, 3, 4, 5, 6, 7]
    (tmp_path / trackers.LAST).write_text('{"wandb": ')  # cut off
    trackers.Trackers(["wandb"], tmp_path, {}, 3, print).metrics(4, {})
    assert made["wandb"][2].got == [4]


def test_an_online_run_of_wandb_goes_on_under_its_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    given = []

    class Run:
        def define_metric(self, *_, **__):
            pass

    monkeypatch.setattr(wandb, "init", lambda **how: given.append(how) or Run())
    monkeypatch.setenv("WANDB_MODE", "online")
    said: list[str] = []
    for _ in range(2):
        trackers.Trackers(["wandb"], tmp_path, {}, 0, said.append)
    assert said == [] and given[0]["id"] == given[1]["id"] and given[1]["resume"] == "allow"
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.Trackers(["wandb"], tmp_path, {}, 0, said.append)
    assert said == [] and "id" not in given[2]


FULL = """
import resource, signal, sys
from omniopd_jax.run import trackers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
t = trackers.Trackers(["tensorboard"], sys.argv[1], {}, 0, print)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for step in range(400):
    t.metrics(step, {f"m{i}": 1.0 for i in range(60)})
t.close()
print("went on")
"""


def test_a_disk_that_is_full_for_tensorboard_does_not_hold_the_run(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert "tracker tensorboard failed and is left out" in done.stdout and "went on" in done.stdout


def test_names_and_packages_are_checked_before_anything_loads(monkeypatch):
    trackers.check(())
    trackers.check(("tensorboard",))
    with pytest.raises(UserError, match="log.trackers = 'mlflow' is unknown"):
        trackers.check(("mlflow",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        trackers.check(("wandb",))


def test_tables_are_bounded(tmp_path, monkeypatch):
    seen = []

    class Seen(Broken):
        def metrics(self, *_):
            """Nothing."""

        close = metrics

        def table(self, name, step, records):
            seen.append((len(records), trackers._cells(name, records)))

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Seen)
    t = trackers.Trackers(["wandb"], tmp_path, {}, 0, print)
    t.table("audits", 0, [runs.audit(0, 0, chunk="x" * 10_000)] * 1000)
    assert seen[0][0] == trackers.TABLE_ROWS
    assert max(len(str(c)) for row in seen[0][1] for c in row) <= trackers.CELL_CHARACTERS


READ = """
import json, pathlib, struct, sys
from wandb.proto import wandb_internal_pb2
(path,) = pathlib.Path(sys.argv[1]).glob("wandb/offline-run-*/run-*.wandb")
data, at, parts, rows, config = path.read_bytes(), 7, b"", [], {}
while at + 7 <= len(data):  # LevelDB's log format: blocks of 32 KiB, a record in one piece (1) or several (2, 3, 4)
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    piece, at = data[at + 7 : at + 7 + length], at + 7 + length
    parts = piece if kind in (1, 2) else parts + piece
    if kind not in (1, 4):
        continue
    record = wandb_internal_pb2.Record()
    record.ParseFromString(parts)
    if record.WhichOneof("record_type") == "history":
        rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    if record.WhichOneof("record_type") == "run":
        config |= {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in record.run.config.update}
print(json.dumps([rows, config]))
"""


@pytest.mark.slow
def test_a_wandb_run_is_written_offline_and_read_back_with_its_own_library(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert fill(["wandb"], tmp_path) == []
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    rows, config = json.loads(done.stdout.splitlines()[-1])
    scalars = [r for r in rows if "loss" in r]
    assert [(r["step"], r["audit/k_sem_mean"]) for r in scalars] == [(0, 2), (1, 3), (2, 4)]
    tables = [{k.split("/")[0] for k in r} for r in rows]
    assert sum("audits" in t for t in tables) == 3 and sum("completions" in t for t in tables) == 1
    assert config["anchor.kl_coef"] == 0.1 and config["num_steps"] == 3
    (table, *_) = tmp_path.glob("wandb/offline-run-*/files/media/table/audits_*.table.json")
    read = json.loads(table.read_text())
    assert read["columns"] == list(trackers.COLUMNS["audits"]) and len(read["data"]) == 3


@pytest.mark.slow
def test_a_trackio_run_is_read_back_with_its_own_library(tmp_path):
    pytest.importorskip("trackio")
    write = (
        "import sys; sys.path[:0] = ['tests/support', 'tests/run']\n"
        "import pathlib, test_trackers\n"
        "print(test_trackers.fill(['trackio'], pathlib.Path(sys.argv[1])))\n"
    )
    env = tiny.environment(TRACKIO_DIR=str(tmp_path / "trackio"), TRACKIO_PROJECT="mine")
    start = [sys.executable, "-c", write, str(tmp_path / "run")]
    done = subprocess.run(start, cwd=tiny.REPO, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "[]" in done.stdout, done.stderr
    read = (
        "import json\n"
        "from trackio.sqlite_storage import SQLiteStorage as storage\n"
        "(run,) = storage.get_runs('mine')\n"
        "print(json.dumps([run, storage.get_logs('mine', run), storage.get_run_config('mine', run)], default=str))\n"
    )
    shown = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stderr
    run, logs, config = json.loads(shown.stdout.splitlines()[-1])
    assert run == "run" and config["anchor.kl_coef"] == 0.1
    assert [(r["step"], r["audit/k_sem_mean"]) for r in logs if "loss" in r] == [(0, 2), (1, 3), (2, 4)]
    tables = [r["audits"] for r in logs if "audits" in r]
    assert len(tables) == 3 and [r["k_sem"] for r in tables[0]["_value"]] == [a["k_sem"] for a in AUDITS]
