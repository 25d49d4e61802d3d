"""The journal: nothing paid for is lost or paid twice, whatever kills the process."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from teacher_kit import ask, cfg_for, check, request, texts
from wire_server import WireServer

from omniopd_jax.errors import UserError
from omniopd_jax.teachers import Continuation, Failure, TeacherStopped, journal
from omniopd_jax.teachers.journal import Journal, Spent, Totals


def buy(j, who, peak, continuation):
    """A call that brings one text."""
    call = j.ask(b"k" * 16, 1, 10, 0.5, Totals())
    j.settle(call, "ok", usage=(4, 1, 2, 0.25), results=[(b"k" * 16, who, peak, continuation, None)])


def fill(folder, name="a", n=3):
    j = Journal(folder)
    j.describe(b"k" * 16, {"model": "m"}, [{"role": "user", "content": "x"}], "so")
    for i in range(n):
        buy(j, name, 3, Continuation(i, f"text {i} \u00e9\n", "stop"))
    j.put_failure(b"k" * 16, name, 3, Failure(n, "deadline"))
    j.close()


def test_what_is_put_is_got(tmp_path):
    fill(tmp_path)
    fill(tmp_path, "b")  # another process's file
    j = Journal(tmp_path)
    found = j.get(b"k" * 16, "a", 3, range(6))
    assert found == {i: Continuation(i, f"text {i} \u00e9\n", "stop") for i in range(3)} | {3: Failure(3, "deadline")}
    assert j.get(b"k" * 16, "b", 3, [1])[1].text == "text 1 \u00e9\n"
    for key, who, peak in ((b"x" * 16, "a", 3), (b"k" * 16, "c", 3), (b"k" * 16, "a", 4)):
        assert j.get(key, who, peak, range(6)) == {}
    assert j.count() == 8 and sum(p["continuations"] for p in j.position().values()) == 8
    assert [p.name for p in tmp_path.glob("*.sqlite")] == ["journal.sqlite"]  # one a host
    j.close()
    Journal(tmp_path / "none").close()
    assert not (tmp_path / "none").exists()  # reading makes no file


def test_samples_are_fresh_by_who_asks_and_shared_by_the_same(tmp_path):
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        first, other, later = ask(c, request("a"), request("b"), request("a", peak=9))
        assert len({*texts(first), *texts(other), *texts(later)}) == 12
        [again] = ask(c, request("a"))
        assert again.continuations == first.continuations and again.replayed == 4
        [warmer] = ask(c, request("a", temperature=0.9))
        assert warmer.replayed == 0
        [more] = ask(c, request("a", n=6))  # N raised: only what is missing is asked
        assert more.replayed == 4 and more.continuations[:4] == first.continuations
        assert server.calls()[-1]["body"]["n"] == 2


def test_replay_only_prefer_off(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.continuation": "auto"})
        check(c)
        [first] = ask(c, request())
        calls = len(server.calls())
        c.teacher.replay = "off"
        [fresh] = ask(c, request())
        assert fresh.replayed == 0 and len(server.calls()) > calls
        calls = len(server.log)
        c.teacher.replay = "prefer"
        [kept] = ask(c, request())
        assert kept.replayed == 4
    c.teacher.replay, c.teacher.base_url = "only", ""  # no key, no server, no probe
    line, report = check(c)
    assert "replay" in line and report is None
    [offline] = ask(c, request())
    assert offline.continuations == kept.continuations and offline.usage.calls == 0
    with pytest.raises(TeacherStopped, match="no continuation"):
        ask(c, request("new"))
    c.teacher.journal = str(tmp_path / "absent")
    with pytest.raises(UserError, match="teacher.journal"):
        ask(c, request())
    assert not (tmp_path / "absent").exists()


def test_corrupt_and_foreign_files_are_refused_and_left_alone(tmp_path):
    fill(tmp_path / "sound", n=400)
    [path] = (tmp_path / "sound").glob("*.sqlite")
    whole = path.read_bytes()
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("create table t (x)")
    other.commit()
    other.close()
    future = bytearray(whole)
    future[60:64] = (99).to_bytes(4, "big")  # user_version
    torn = bytearray(whole)
    torn[8192 : 8192 + 2048] = os.urandom(2048)
    cases = {
        "text": b"not a database at all", "empty": b"", "foreign": (tmp_path / "other.sqlite").read_bytes(),
        "future": bytes(future), "torn": bytes(torn), "cut": whole[: len(whole) // 2],
    }  # fmt: skip
    for name, content in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x.sqlite").write_bytes(content)
        with pytest.raises(UserError, match="x.sqlite"):
            Journal(folder)
        assert (folder / "x.sqlite").read_bytes() == content, name


def test_a_snapshot_is_whole_while_others_write(tmp_path):
    j = Journal(tmp_path / "j")
    stop = threading.Event()
    written = []

    def write(t):
        i = 0
        while not stop.is_set():
            call = j.ask(b"k" * 16, 1, 10, 0.5, Totals())
            j.settle(
                call, "ok", usage=(4, 1, 2, 0.25), results=[(b"k" * 16, f"s{t}", 0, Continuation(i, "x", "stop"), None)]
            )
            written.append((t, i))
            i += 1

    threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
    [t.start() for t in threads]
    try:
        for i in range(3):
            time.sleep(0.1)
            before = len(written)
            j.copy_to(tmp_path / f"copy{i}")
            snapshot = Journal(tmp_path / f"copy{i}")
            assert snapshot.count() >= before
            totals = snapshot.totals()
            in_flight = totals.calls - snapshot.count()
            assert 0 <= in_flight <= 4 and totals.usd == pytest.approx(snapshot.count() * 0.25 + in_flight * 0.5)
            snapshot.close()
    finally:
        stop.set()
        [t.join() for t in threads]
    assert j.count() == len(written)
    j.copy_to(tmp_path / "last")
    j.close()
    assert journal.restore(tmp_path / "last", tmp_path / "elsewhere") == 1
    assert journal.restore(tmp_path / "last", tmp_path / "elsewhere") == 0
    moved = Journal(tmp_path / "elsewhere")
    assert moved.count() == len(written)
    moved.close()


def _writer(folder, name, n):
    j = Journal(folder)
    for i in range(n):
        call = j.ask(b"k" * 16, 1, 10, 0.0, Totals(calls=150))
        if isinstance(call, int):
            j.settle(
                call, "ok", usage=(1, 0, 1, 0.0), results=[(b"k" * 16, name, 0, Continuation(i, "x", "stop"), None)]
            )
    j.close()


def test_many_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_writer, args=(tmp_path, f"p{i}", 60)) for i in range(4)]
    [p.start() for p in writers]
    [p.join(60) for p in writers]
    assert [p.exitcode for p in writers] == [0] * 4
    j = Journal(tmp_path)
    assert j.totals() == Totals(150, 300, 0.0) and j.count() == 150  # 240 asked for, the cap is exact
    j.close()


def ask_all(url: str, folder) -> list[list[str]]:
    """The texts of 24 audits with 2 continuations each."""
    c = cfg_for(url, "openai", folder, **{"teacher.max_concurrency": 4, "budget.calls": 100000})
    print("ready", flush=True)
    return [texts(r) for r in ask(c, *(request(f"s{s}", p, "x" * p, n=2) for s in range(8) for p in (3, 6, 9)))]


RUN = """
import json, sys; sys.path[:0] = {paths!r}
from test_teacher_journal import ask_all
print(json.dumps(ask_all({url!r}, {folder!r})), flush=True)
"""


@pytest.mark.parametrize("wanted", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_pays_nothing_twice_but_what_was_in_flight(wanted, tmp_path):
    here = pathlib.Path(__file__).parent
    paths = [str(here), str(here.parent / "support"), str(here.parents[1])]
    rng = random.Random(5)
    with WireServer(delay_s=0.05, honours_n=False) as server:
        expected = ask_all(server.url("openai"), tmp_path / "whole")
        mark = len(server.calls())
        code = RUN.format(paths=paths, url=server.url("openai"), folder=str(tmp_path / "killed"))
        kills = 0
        for _ in range(2 * wanted):
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "ready\n"
            before = len(server.calls())
            while len(server.calls()) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.6 / wanted))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            out, _ = process.communicate(timeout=60)
            if len(out.splitlines()) == 2 or kills == wanted:
                break
        assert ask_all(server.url("openai"), tmp_path / "killed") == expected
        time.sleep(0.2)
        calls = server.calls()[mark:]
    j = Journal(tmp_path / "killed" / "journal")
    totals = j.totals()
    j.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "killed" / "journal" / journal.NAME)) as db:
        states = dict(db.execute("select status, count(*) from calls group by 1").fetchall())
        lost = [s for (s,) in db.execute("select status from calls where status = 'asked'")]
    paid_twice = sum(len(e["texts"]) for e in calls) - sum(len(r) for r in expected)
    assert kills >= wanted - 1 and 0 <= paid_twice <= len(lost) <= kills * 4, (kills, paid_twice, states)
    assert len(calls) <= totals.calls <= len(calls) + len(lost)  # in flight stays spent


def test_export(tmp_path, capsys):
    with WireServer(faults=["empty"]) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        ask(c, request("a", n=2), request("b", n=2))
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "omniopd_jax.teachers.journal", "export", str(tmp_path / "journal"), str(out)]
    repo = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0 and "4 continuations" in done.stdout, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4 and {line["sample_id"] for line in lines} == {"a", "b"}
    assert lines[0]["messages"][1]["content"] == "Add 3 and 4." and lines[0]["prefix"] == "The sum of 3"
    assert {"text", "finish", "error", "model", "mode", "temperature", "peak", "index"} <= lines[0].keys()
    assert journal.main(["export", str(tmp_path / "none"), str(out)]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_an_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        buy(Journal(tmp_path / "file" / "j"), "a", 0, Continuation(0, "", "stop"))


# what the disk does to it


def change(folder, sql, *values):
    with contextlib.closing(sqlite3.connect(folder / journal.NAME)) as db:
        db.execute(sql, values)
        db.commit()


@pytest.mark.parametrize(
    "column,value", [("text", "text 2 e"), ("text", None), ("finish", "length"), ("error", "x"), ("raw", "r")]
)
def test_a_text_that_changed_on_disk_is_refused_by_name(column, value, tmp_path):
    fill(tmp_path)
    change(tmp_path, f"update continuations set {column} = ? where idx = 1", value)
    j = Journal(tmp_path)
    assert j.get(b"k" * 16, "a", 3, [0])[0].text == "text 0 \u00e9\n"
    with pytest.raises(UserError, match="journal.sqlite: text 1 of sample a at peak 3"):
        j.get(b"k" * 16, "a", 3, range(3))
    j.close()
    assert journal.main(["forget", str(tmp_path), "a", "3"]) == 0  # as the line says
    j = Journal(tmp_path)
    assert j.get(b"k" * 16, "a", 3, range(3)) == {} and j.totals().calls == 3
    j.close()


def test_a_changed_text_stops_the_run_with_its_state(tmp_path):
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path)
        ask(c, request("a"))
        change(tmp_path / "journal", "update continuations set text = 'no' where idx = 2")
        with pytest.raises(TeacherStopped, match="text 2 of sample a"):
            ask(c, request("a"))


OLD_SCHEMA = """
create table requests (key blob primary key, about text not null, messages blob not null, prefix blob not null);
create table continuations (
  key blob not null, sample_id text not null, peak integer not null, idx integer not null,
  text text, finish text, error text, raw text, call integer, time real not null,
  primary key (key, sample_id, peak, idx)) without rowid;
create table calls (
  id integer primary key, key blob, n integer not null, status text not null, time real not null, latency real,
  tokens_in integer, tokens_cached integer, tokens_out integer, usd real, max_tokens integer, max_usd real, error text);
create table totals (calls integer not null, tokens integer not null, usd real not null);
create table modes (provider text, model text, asked text, mode text, report text, time real,
  primary key (provider, model, asked));
"""


def old_file(folder, name, who, *, usd):
    """A journal of the first schema: one file a process, no checksums; one call of known cost and one that was lost."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(folder / name)) as db:
        db.executescript(f"pragma application_id = {journal.APPLICATION_ID}; pragma user_version = 1; {OLD_SCHEMA}")
        db.execute("insert into totals values (2, 30, ?)", (2 * usd,))
        for status, billed in (("ok", usd), ("asked", None)):
            tokens = (10, 0, 5) if billed else (None,) * 3
            row = (b"k" * 16, 1, status, 1.0, *tokens, billed, 15, usd)
            db.execute(
                "insert into calls (key, n, status, time, tokens_in, tokens_cached, tokens_out, usd, max_tokens, "
                "max_usd) "
                "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row,
            )  # fmt: skip
        for i in range(3):
            db.execute(
                "insert into continuations (key, sample_id, peak, idx, text, finish, time) values (?, ?, 3, ?, ?, "
                "'stop', 1.0)",
                (b"k" * 16, who, i, f"old {i}"),
            )
        db.execute("insert into modes values ('openai', 'm', 'auto', 'prefill', '{}', 1.0)")
        db.commit()


def test_journals_of_the_first_schema_are_read_and_imported_once(tmp_path):
    old_file(tmp_path, "20260101T000000.000000-1-aaaaaa.sqlite", "a", usd=0.25)
    old_file(tmp_path, "20260102T000000.000000-2-bbbbbb.sqlite", "b", usd=0.5)
    want = {i: Continuation(i, f"old {i}", "stop") for i in range(3)}
    for _ in range(3):  # read before any write, then imported, then again
        j = Journal(tmp_path)
        assert j.get(b"k" * 16, "a", 3, range(3)) == j.get(b"k" * 16, "b", 3, range(3)) == want
        assert j.totals() == Totals(4, 60, 1.5) and j.unknown() == Totals(2, 30, 0.75)
        assert j.spent() == Spent(4, 60, 1.5, 20, 10), "tokens in and out are those of the calls that are known"
        assert j.mode("openai", "m", "auto") == "prefill"
        j.put_mode("openai", "n", "auto", "prefix", {})
        assert j.totals() == Totals(4, 60, 1.5) and j.count() == 6
        j.close()
    assert len(list(tmp_path.glob("2026*.sqlite"))) == 2  # left where they are
    j = Journal(tmp_path)
    assert isinstance(j.ask(b"k" * 16, 1, 10, 0.5, Totals(usd=2.0)), int)
    assert j.ask(b"k" * 16, 1, 10, 0.1, Totals(usd=2.0)) == "usd"
    j.close()


def test_another_hosts_snapshot_is_imported_beside_the_one_that_is_there(tmp_path):
    fill(tmp_path / "here", "a")
    fill(tmp_path / "there", "b")
    for host in ("here", "there"):
        j = Journal(tmp_path / host)
        j.copy_to(tmp_path / f"copy of {host}")
        j.close()
    for _ in range(2):
        assert journal.restore(tmp_path / "copy of here", tmp_path / "here") == 0
        journal.restore(tmp_path / "copy of there", tmp_path / "here")
        j = Journal(tmp_path / "here")
        assert j.count() == 8 and j.totals() == Totals(6, 36, 1.5)
        j.put_mode("openai", "m", "auto", "prefix", {})
        j.close()


def test_the_probes_questions_are_paid_once_over_many_starts(tmp_path):
    with WireServer() as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.continuation": "auto"})
        _, first = check(c)
        calls = len(server.calls())
        for _ in range(3):
            _, again = check(c)
            assert again.mode == first.mode and again.latency_s == first.latency_s
        assert len(server.calls()) == calls and "answers from the journal" in again.table()
        c.teacher.replay = "off"
        check(c)
        assert len(server.calls()) == 2 * calls


def test_a_probe_that_met_refusals_is_paid_once_too(tmp_path):
    with WireServer(extensions={"prefix"}, refuses={"seed"}) as server:
        c = cfg_for(server.url("openai"), "openai", tmp_path, **{"teacher.continuation": "auto"})
        _, first = check(c)
        calls = len(server.calls())
        _, again = check(c)
        assert len(server.calls()) == calls and again.mode == first.mode == "prefix"
        [result] = ask(c, request())
        assert len(result.continuations) == 4
