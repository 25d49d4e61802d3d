"""The journal: what was asked of a paid teacher, what came back, and what it cost. Caching, exact resume, replay, data
set.

One SQLite file (WAL) a process, in one folder on local disk; all files of the folder are read. A continuation is found
by what was asked (a hash of provider, model, messages and prefix as rendered, sampling settings, mode and prompt
version) and by who asked (sample id, peak, index: method.md, section 5), so that samples stay fresh within a run. A
result is written before it is used, and so are final failures and missed deadlines: a replay has the same n. Before a
call goes out it is written down with the most that it can cost; a call that never reported back (kill -9, a lost
answer) stays spent.

Safe under threads, processes and kill -9: every event is one transaction. A file that is corrupt, not a journal, or of
another schema is refused, never repaired.

    python -m omniopd_jax.teachers.journal export FOLDER OUT.jsonl
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import sqlite3
import sys
import threading
import time
import zlib

from omniopd_jax.errors import UserError
from omniopd_jax.teachers.protocol import Continuation, Failure

APPLICATION_ID = 0x4F4D4F50  # "OMOP": tells our files from other people's
SCHEMA_VERSION = 1
SCHEMA = """
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
insert into totals values (0, 0, 0.0);
"""


@dataclasses.dataclass(frozen=True)
class Totals:
    """Spent so far: requests on the wire, tokens in and out, dollars; calls of unknown outcome at their upper bound."""

    calls: int = 0
    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.calls + other.calls, self.tokens + other.tokens, self.usd + other.usd)


class Journal:
    """Reads every journal file of a folder and writes one of its own, made at the first write.

    Raises:
      UserError: a file of the folder is corrupt, not a journal, or of another schema; the folder cannot be written.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.mutex = threading.RLock()
        self.own = None
        self.own_path = None
        self.others = {}  # path -> connection
        self._rescan(check=True)

    # reading

    def get(self, key: bytes, sample_id: str, peak: int, indices) -> dict[int, Continuation | Failure]:
        """What is known of the wanted continuations, by index; own file first, then the newest."""
        found, sql = (
            {},
            ("select idx, text, finish, error from continuations where key = ? and sample_id = ? and peak = ?"),
        )
        wanted = set(indices)
        with self.mutex:
            for connection in self._connections():
                for index, text, finish, error in connection.execute(sql, (key, sample_id, peak)):
                    if index in wanted and index not in found:
                        known = error is None
                        found[index] = Continuation(index, text, finish) if known else Failure(index, error)
                if len(found) == len(wanted):
                    break
        return found

    def count(self) -> int:
        """Continuations that the folder holds, failures included."""
        with self.mutex:
            return sum(c.execute("select count(*) from continuations").fetchone()[0] for c in self._connections())

    def totals(self) -> Totals:
        """Spent so far by every process that writes to this folder."""
        with self.mutex:
            self._rescan()
            rows = (c.execute("select calls, tokens, usd from totals").fetchone() for c in self._connections())
            return sum((Totals(*row) for row in rows), Totals())

    def position(self) -> dict[str, dict[str, int]]:
        """How far each file has got, for a checkpoint's metadata: {file: {calls, continuations}}."""
        with self.mutex:
            out = {}
            for path, c in self._named():
                calls = c.execute("select count(*) from calls").fetchone()[0]
                out[path.name] = {"calls": calls}
                out[path.name]["continuations"] = c.execute("select count(*) from continuations").fetchone()[0]
            return out

    def mode(self, provider: str, model: str, asked: str) -> str | None:
        """The mode that the last probe chose for this teacher, or None: what a replay goes by."""
        sql = "select mode, time from modes where provider = ? and model = ? and asked = ?"
        with self.mutex:
            rows = [row for c in self._connections() for row in c.execute(sql, (provider, model, asked))]
        return max(rows, key=lambda row: row[1])[0] if rows else None

    # writing

    def put_mode(self, provider: str, model: str, asked: str, mode: str, report: dict) -> None:
        """Records what the probe chose."""
        with self._write() as c:
            row = (provider, model, asked, mode, json.dumps(report), time.time())
            c.execute("insert or replace into modes values (?, ?, ?, ?, ?, ?)", row)

    def describe(self, key: bytes, about: dict, messages, prefix: str) -> None:
        """Records what a key stands for, once: what `export` writes beside each continuation."""
        with self._write() as c:
            texts = (zlib.compress(json.dumps(list(messages)).encode(), 1), zlib.compress(prefix.encode(), 1))
            c.execute("insert or ignore into requests values (?, ?, ?, ?)", (key, json.dumps(about), *texts))

    def ask(self, key: bytes, n: int, max_tokens: int, max_usd: float, caps: Totals) -> int | str:
        """Writes down a call that is about to go out, if the caps allow the most that it can cost.

        Atomic over threads and over the processes that share the folder. A cap of 0 is no cap.

        Returns:
          The call's id; or, where a cap would be overshot, the cap's name: `usd`, `tokens` or `calls`.
        """
        with self.mutex, self._folder_lock():
            after = self.totals() + Totals(1, max_tokens, max_usd)
            for name in ("usd", "tokens", "calls"):
                cap = getattr(caps, name)
                if cap and getattr(after, name) > cap + 1e-12:
                    return name
            with self._write() as c:
                row = (key, n, "asked", time.time(), max_tokens, max_usd)
                cursor = c.execute(
                    "insert into calls (key, n, status, time, max_tokens, max_usd) values (?, ?, ?, ?, ?, ?)", row
                )
                c.execute("update totals set calls = calls + 1, tokens = tokens + ?, usd = usd + ?", (max_tokens, max_usd))
                return cursor.lastrowid

    def settle(self, call: int, status: str, *, usage=None, latency: float = 0.0, error: str = "", results=()) -> Totals:
        """Writes what became of a call and, in the same transaction, the continuations that it brought.

        Args:
          call: id from `ask`.
          status: `ok` (usage is billed), `rejected` (nothing is, but the call counts), `unsent` (nothing happened),
            `unknown` (stays spent in full).
          usage: (tokens_in, tokens_cached, tokens_out, usd) for `ok`; None: the answer did not say, it stays spent in full.
          latency: seconds.
          error: what went wrong, without secrets.
          results: (key, sample_id, peak, Continuation, raw text or None) each.

        Returns:
          What the call counts as.
        """
        with self._write() as c:
            held = c.execute("select max_tokens, max_usd from calls where id = ?", (call,)).fetchone()
            billed = Totals(1, *held)
            if status in ("rejected", "unsent") or usage:
                tokens_in, cached, tokens_out, usd = usage or (0, 0, 0, 0.0)
                billed = Totals(int(status != "unsent"), tokens_in + tokens_out, usd)
                c.execute(
                    "update totals set calls = calls - ?, tokens = tokens + ?, usd = usd + ?",
                    (int(status == "unsent"), tokens_in + tokens_out - held[0], usd - held[1]),
                )
                row = (tokens_in, cached, tokens_out, usd, call)
                c.execute("update calls set tokens_in=?, tokens_cached=?, tokens_out=?, usd=? where id=?", row)
            c.execute("update calls set status=?, latency=?, error=? where id=?", (status, latency, error or None, call))
            for key, sample_id, peak, continuation, raw in results:
                self._insert(c, key, sample_id, peak, continuation, raw, call)
        return billed

    def put_failure(self, key: bytes, sample_id: str, peak: int, failure: Failure) -> None:
        """Writes a failure that is final: a replay fails there too, and n is the same."""
        with self._write() as c:
            row = (key, sample_id, peak, failure.index, failure.error, time.time())
            c.execute(
                "insert or replace into continuations (key, sample_id, peak, idx, error, time) values (?,?,?,?,?,?)",
                row,
            )

    def copy_to(self, folder) -> None:
        """Copies every file of the journal into `folder`, each a consistent snapshot, for a checkpoint.

        Raises:
          UserError: the folder cannot be written.
        """
        folder = pathlib.Path(folder)
        with self.mutex:
            self._rescan()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for path, connection in self._named():
                    part = folder / f".{path.name}.part"
                    part.unlink(missing_ok=True)
                    target = sqlite3.connect(part)
                    with contextlib.closing(target):
                        connection.backup(target)
                        target.execute("pragma journal_mode = delete")
                    os.replace(part, folder / path.name)
            except (OSError, sqlite3.Error) as e:
                raise UserError(f"cannot copy the teacher's journal to {folder}: {e}") from None

    def export_jsonl(self, path) -> int:
        """Writes every continuation as a line of JSON; returns how many. What several files hold is written once."""
        seen, lines = set(), 0
        with self.mutex, open(path, "w", encoding="utf-8") as out:
            for c in self._connections():
                rows = c.execute(
                    "select k.key, sample_id, peak, idx, text, finish, error, raw, time, about, messages, prefix "
                    "from continuations k left join requests r on r.key = k.key"
                )
                for key, sample_id, peak, index, text, finish, error, raw, when, about, messages, prefix in rows:
                    if (who := (key, sample_id, peak, index)) in seen:
                        continue
                    seen.add(who)
                    line = {"sample_id": sample_id, "peak": peak, "index": index, "text": text, "finish": finish}
                    line |= {"error": error, "raw": raw, "time": when}
                    if about is not None:
                        line |= json.loads(about) | {"messages": json.loads(zlib.decompress(messages))}
                        line["prefix"] = zlib.decompress(prefix).decode()
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
                    lines += 1
        return lines

    def close(self) -> None:
        """Closes every file."""
        with self.mutex:
            for connection in self._connections():
                connection.close()
            self.own, self.others = None, {}

    # inside

    def _insert(self, c, key, sample_id, peak, continuation, raw, call):
        row = (key, sample_id, peak, continuation.index, continuation.text, continuation.finish, raw, call, time.time())
        c.execute(
            "insert or replace into continuations (key, sample_id, peak, idx, text, finish, raw, call, time) "
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )

    def _named(self):
        named = sorted(self.others.items(), key=lambda item: item[0].name, reverse=True)
        return ([(self.own_path, self.own)] if self.own else []) + named

    def _connections(self):
        return [connection for _, connection in self._named()]

    def _rescan(self, *, check: bool = False):
        """Opens the files that other processes have made since; at start-up every one is checked."""
        names = sorted(self.folder.glob("*.sqlite")) if self.folder.is_dir() else []
        for path in names:
            if path != self.own_path and path not in self.others:
                self.others[path] = _open_checked(path, quick_check=check)

    @contextlib.contextmanager
    def _folder_lock(self):
        """Held while caps are compared and a call is written, so that processes cannot overshoot together."""
        self._own()
        with open(self.folder / ".lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _write(self):
        """One transaction on the process's own file."""
        with self.mutex:
            connection = self._own()
            try:
                connection.execute("begin immediate")
                yield connection
                connection.execute("commit")
            except sqlite3.Error as e:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("rollback")
                raise UserError(
                    f"the teacher's journal {self.own_path} cannot be written: {e}; nothing more is asked"
                ) from None
            except BaseException:
                connection.execute("rollback")
                raise

    def _own(self):
        """The connection of this process's own file: made under a hidden name, so that no half-made one is seen."""
        if self.own is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
                path = self.folder / f"{now}-{os.getpid()}-{secrets.token_hex(3)}.sqlite"
                part = self.folder / f".{path.name}.part"
                with contextlib.closing(sqlite3.connect(part)) as new:
                    new.executescript(
                        f"pragma application_id = {APPLICATION_ID}; pragma user_version = {SCHEMA_VERSION}; {SCHEMA}"
                    )
                os.replace(part, path)
                own = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
                own.execute("pragma journal_mode = wal")
                own.execute(
                    "pragma synchronous = normal"
                )  # a killed process loses nothing; a power cut may lose the last calls
            except (OSError, sqlite3.Error) as e:
                raise UserError(f"teacher.journal = {str(self.folder)!r} cannot be written: {e}") from None
            self.own, self.own_path = own, path
        return self.own


def _open_checked(path: pathlib.Path, *, quick_check: bool):
    """A read-only connection. Raises `UserError` where the file is not a sound journal of this schema."""
    advice = "move it out of the folder, or set teacher.journal to another one"
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False, timeout=30.0)
        try:
            made_by = connection.execute("pragma application_id").fetchone()[0]
        except sqlite3.OperationalError:  # a read-only disk: no shared memory file can be made beside it
            connection.close()
            uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            made_by = connection.execute("pragma application_id").fetchone()[0]
        version = connection.execute("pragma user_version").fetchone()[0]
        if made_by != APPLICATION_ID:
            connection.close()
            raise UserError(f"{path} is not a teacher's journal; {advice}")
        if version != SCHEMA_VERSION:
            connection.close()
            raise UserError(f"{path} is a journal of schema {version}, this version reads {SCHEMA_VERSION}; {advice}")
        if quick_check and (said := connection.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            connection.close()
            raise UserError(f"{path} is corrupt ({said}); {advice}, or restore it from a checkpoint's copy")
        return connection
    except sqlite3.Error as e:
        raise UserError(f"{path} is corrupt or not a teacher's journal ({e}); {advice}") from None


def restore(snapshot, folder) -> int:
    """Copies the files of a checkpoint's snapshot that `folder` lacks, before a resume on another machine.

    Returns:
      How many were copied.
    """
    snapshot, folder, copied = pathlib.Path(snapshot), pathlib.Path(folder), 0
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(snapshot.glob("*.sqlite")):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / f".{path.name}.part")
            os.replace(folder / f".{path.name}.part", folder / path.name)
            copied += 1
    return copied


def main(args) -> int:
    """`export FOLDER OUT.jsonl`."""
    if len(args) != 3 or args[0] != "export":
        print(__doc__.splitlines()[-1].strip(), file=sys.stderr)
        return 2
    try:
        if not pathlib.Path(args[1]).is_dir():
            raise UserError(f"{args[1]} is no folder")
        journal = Journal(args[1])
        with contextlib.closing(journal):
            print(f"{journal.export_jsonl(args[2])} continuations -> {args[2]}")
    except UserError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
