"""The journal: what was asked of a paid teacher, what came back, and what it cost. Caching, exact resume, replay, data
set.

One SQLite file (WAL) a host, `journal.sqlite` in a folder on local disk; all processes of the host write to it. A
continuation is found by what was asked (a hash of provider, model, messages and prefix as rendered, sampling settings,
mode and prompt version) and by who asked (sample id, peak, index: method.md, section 5), so that samples stay fresh
within a run. A result is written before it is used, and so are final failures and missed deadlines: a replay has the
same n. Before a call goes out it is written down with the most that it can cost; a call that never reported back (kill
-9, a lost answer) stays spent. Each text carries a checksum: one that changed on disk is refused by name.

Safe under threads, processes and kill -9: every event is one transaction, begun `immediate`. Other journals in the
folder (of earlier versions, one file a process; of another host, restored from a checkpoint) are read, and imported
once, before the first write. A file that is corrupt, not a journal, or of another schema is refused, never repaired.

    python -m omniopd_jax.teachers.journal export FOLDER OUT.jsonl
    python -m omniopd_jax.teachers.journal forget FOLDER SAMPLE_ID PEAK
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import sqlite3
import sys
import threading
import time
import zlib

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.teachers import journal_file
from omniopd_jax.teachers.journal_file import APPLICATION_ID, NAME, known, renew, restore
from omniopd_jax.teachers.protocol import Continuation, Failure

__all__ = ["APPLICATION_ID", "NAME", "Journal", "Spent", "Totals", "folder_of", "known", "main", "renew", "restore"]


BELIEVED = 4  # times what a call could use by what was sent: a service may put text of its own in front


def folder_of(cfg) -> pathlib.Path:
    """Where a run's journal is: `teacher.journal`, or in the run's own folder of this host."""
    return config.expanded(cfg.teacher.journal or config.local_folder(cfg) / "journal")


@dataclasses.dataclass(frozen=True)
class Totals:
    """Spent so far: requests on the wire, tokens in and out, dollars; calls of unknown outcome at their upper bound."""

    calls: int = 0
    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other):
        return type(self)(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))


@dataclasses.dataclass(frozen=True)
class Spent(Totals):
    """What one run spent; `tokens_in` and `tokens_out` are of the calls whose outcome is known."""

    tokens_in: int = 0
    tokens_out: int = 0


class Journal:
    """The journal of a folder; its file is made at the first write.

    Args:
      folder: where it is.
      run: the run that writes, for `spent`.

    Raises:
      UserError: a file of the folder is corrupt, not a journal, or of another schema; the folder cannot be written.
    """

    def __init__(self, folder, run: str = ""):
        self.folder, self.run = pathlib.Path(folder), run
        self.path = self.folder / NAME
        self.mutex = threading.RLock()
        self.own = self.writer = None  # the connection that writes, and this process's row in `writers`
        self.others = {}  # path -> read-only connection: files that are not imported (yet)
        for path in sorted(self.folder.glob("*.sqlite")) if self.folder.is_dir() else []:
            self.others[path] = journal_file.open_checked(path)
        if self.path in self.others:
            done = {name for (name,) in self.others[self.path].execute("select name from imported")}
            for path in [p for p, c in self.others.items() if p != self.path and journal_file.identity(p, c) in done]:
                self.others.pop(path).close()

    # reading

    def get(
        self, key: bytes, sample_id: str, peak: int, indices, *, pinned: bool = False
    ) -> dict[int, Continuation | Failure]:
        """What is known of the wanted continuations, by index; `pinned`: but what another model wrote than was asked.

        Raises:
          UserError: one of them is not what was written.
        """
        found, wanted = {}, set(indices)
        with self.mutex:
            for path, connection in self._named():
                sums = "sum" if journal_file.schema_of(connection) > 1 else "null"
                sql = f"select idx, text, finish, error, raw, {sums} from continuations "
                sql += "where key = ? and sample_id = ? and peak = ?"
                if pinned and journal_file.tells_who(connection):
                    sql += (
                        " and not exists (select 1 from answered a where a.key = continuations.key and "
                        "a.sample_id = continuations.sample_id and a.peak = continuations.peak and "
                        "a.idx = continuations.idx)"
                    )
                for index, text, finish, error, raw, checksum in connection.execute(sql, (key, sample_id, peak)):
                    if index not in wanted or index in found:
                        continue
                    if checksum is not None and checksum != journal_file.checksum(
                        key, sample_id, peak, index, text, finish, error, raw
                    ):
                        raise UserError(
                            f"{path}: text {index} of sample {sample_id} at peak {peak} is not the one that was "
                            "written "
                            "(its checksum differs): restore the file from a checkpoint's journal_snapshots, or buy "
                            "the text "
                            f"again after: python -m omniopd_jax.teachers.journal forget {self.folder} {sample_id} "
                            f"{peak}"
                        )
                    found[index] = Continuation(index, text, finish) if error is None else Failure(index, error)
                if len(found) == len(wanted):
                    break
        return found

    def count(self) -> int:
        """Continuations that the folder holds, failures included, the probe's answers not."""
        with self.mutex:
            return sum(
                c.execute("select count(*) from continuations where sample_id != 'probe'").fetchone()[0]
                for c in self._connections()
            )

    def totals(self) -> Totals:
        """Spent so far by every process that writes to this folder."""
        with self.mutex:
            self._look_again()
            rows = (c.execute("select calls, tokens, usd from totals").fetchone() for c in self._connections())
            return sum((Totals(*row) for row in rows), Totals())

    def bought(self) -> tuple[Totals, int]:
        """(what the answered calls cost, how many texts they brought), the probe's left out."""
        calls = (
            "select count(*), coalesce(sum(tokens_in + tokens_out), 0), coalesce(sum(usd), 0) from calls "
            "where status = 'ok' and usd is not null and "
            "key not in (select key from continuations where sample_id = 'probe')"
        )
        texts = "select count(*) from continuations where error is null and sample_id != 'probe'"
        with self.mutex:
            self._look_again()
            rows = [(c.execute(calls).fetchone(), c.execute(texts).fetchone()[0]) for c in self._connections()]
        return sum((Totals(*paid) for paid, _ in rows), Totals()), sum(count for _, count in rows)

    def spent(self, run: str = "", *, without: str = "") -> Spent:
        """What this run (or `run`) spent, calls of unknown outcome at their upper bound; `without`: who asked calls
        that do not count.

        Calls of journals from before runs were told apart count for every run.
        """
        sql = (
            "select count(*), coalesce(sum(coalesce(tokens_in + tokens_out, max_tokens)), 0), "
            "coalesce(sum(coalesce(usd, max_usd)), 0), coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0) "
            "from calls where status != 'unsent'"
        )
        if without:  # a look at all texts
            sql += " and key not in (select key from continuations where sample_id = ?)"
        others = (without,) if without else ()
        with self.mutex:
            self._look_again()
            rows = []
            for _, c in self._named():
                mine = " and (run = ? or run is null)" if journal_file.schema_of(c) > 1 else ""
                rows.append(c.execute(sql + mine, (*others, run or self.run) if mine else others).fetchone())
            return sum((Spent(*row) for row in rows), Spent())

    def unknown(self) -> Totals:
        """The part of `totals` that stays spent though nobody knows what was billed: calls under way, lost, or
        unstated."""
        sql = (
            "select count(*), coalesce(sum(max_tokens), 0), coalesce(sum(max_usd), 0) from calls "
            "where usd is null and status != 'unsent'"
        )
        with self.mutex:
            self._look_again()
            return sum((Totals(*c.execute(sql).fetchone()) for c in self._connections()), Totals())

    def in_flight(self) -> int:
        """Calls that are out, of all processes of this host that still live."""
        with self.mutex:
            if self.own is None:
                return 0
            rows = self.own.execute(
                "select w.pid, w.started, count(*) from calls c join writers w on w.id = c.writer "
                "where c.status = 'asked' group by w.id"
            ).fetchall()
        return sum(count for pid, started, count in rows if journal_file.process_started(pid) == started)

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

    def allowance(self, step: str, *, of_any: bool = False) -> tuple[int, int] | None:
        """The (M, N) that a step of this run was given, or with `of_any` of any run; None: it was not begun."""
        whose = "order by run = ? desc" if of_any else "and run = ?"
        sql = f"select chunks, continuations from allowances where step = ? {whose}"
        with self.mutex:
            found = [
                c.execute(sql, (step, self.run)).fetchone()
                for c in self._connections()
                if journal_file.has_table(c, "allowances")
            ]
        return next(filter(None, found), None)

    def report(self, provider: str, model: str, asked: str) -> dict:
        """The last probe's report on this teacher; {} where there is none."""
        sql = "select report, time from modes where provider = ? and model = ? and asked = ?"
        with self.mutex:
            rows = [row for c in self._connections() for row in c.execute(sql, (provider, model, asked))]
        return json.loads(max(rows, key=lambda row: row[1])[0]) if rows else {}

    def stood_in(self, provider: str, model: str) -> list[str]:
        """The models that earlier versions kept texts under which `model` had been asked for: those that the last probe
        of it names, and, where no other model was asked for, those that were never asked for themselves."""
        kept, asked, told = set(), set(), set()
        with self.mutex:
            for c in self._connections():
                described = (json.loads(about) for (about,) in c.execute("select distinct about from requests"))
                kept |= {about["model"] for about in described if about.get("provider") == provider}
                for name, report in c.execute("select model, report from modes where provider = ?", (provider,)):
                    asked.add(name)
                    told |= {json.loads(report).get("answering")} if name == model else set()
        others = kept - asked if asked == {model} else set()
        return sorted((others | (told & kept)) - {model})

    # writing

    def put_mode(self, provider: str, model: str, asked: str, mode: str, report: dict) -> None:
        """Records what the probe chose."""
        with self._write() as c:
            row = (provider, model, asked, mode, json.dumps(report), time.time())
            c.execute("insert or replace into modes values (?, ?, ?, ?, ?, ?)", row)

    def put_allowance(self, step: str, given: tuple[int, int]) -> None:
        """Records what a step was given, once."""
        with self._write() as c:
            c.execute("insert or ignore into allowances values (?, ?, ?, ?)", (self.run, step, *given))

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
        with self._write() as c:
            after = Totals(*c.execute("select calls, tokens, usd from totals").fetchone()) + Totals(
                1, max_tokens, max_usd
            )
            for name in ("usd", "tokens", "calls"):
                cap = getattr(caps, name)
                if cap and getattr(after, name) > cap + 1e-12:
                    return name
            row = (self.writer, self.run, key, n, "asked", time.time(), max_tokens, max_usd)
            columns = "writer, run, key, n, status, time, max_tokens, max_usd"
            cursor = c.execute(f"insert into calls ({columns}) values (?, ?, ?, ?, ?, ?, ?, ?)", row)
            c.execute("update totals set calls = calls + 1, tokens = tokens + ?, usd = usd + ?", (max_tokens, max_usd))
            return cursor.lastrowid

    def settle(
        self, call: int, status: str, *, usage=None, most_usd: float = 0.0, caps: Totals = Totals(),
        latency: float = 0.0, error: str = "", results=(), by: str = "",
    ) -> Totals:  # fmt: skip
        """Writes what became of a call and, in the same transaction, the continuations that it brought.

        Args:
          call: id from `ask`.
          status: `ok` (usage is billed), `rejected` (nothing is, but the call counts), `unsent` (nothing happened),
            `unknown` (stays spent in full).
          usage: (tokens_in, tokens_cached, tokens_out, usd) for `ok`; None: the answer did not say, it stays spent in
            full. More than was reserved is believed up to BELIEVED times that (a service may put text of its own in
            front), as far as the caps go; what is said beyond stays out.
          most_usd: the most that it can have cost by the price of the model that answered, where that is more than was
            reserved.
          caps: on all that the folder has seen.
          latency: seconds.
          error: what went wrong, without secrets.
          results: (key, sample_id, peak, Continuation, raw text or None) each.
          by: the model that wrote them, where it is another than the one asked for.

        Returns:
          What the call counts as.
        """
        with self._write() as c:
            held = c.execute("select max_tokens, max_usd from calls where id = ?", (call,)).fetchone()
            most = (held[0], max(held[1], most_usd))
            said = (usage[0] + usage[2], usage[3]) if usage else most
            if said[0] > most[0] or said[1] > most[1] + 1e-12:
                top = self._believed(c, held, most, caps)
                if said[0] > top[0] or said[1] > top[1]:
                    usage, most = None, tuple(max(a, min(b, t)) for a, b, t in zip(most, said, top))
            billed = Totals(1, *most)
            if most != held and not usage and status in ("ok", "unknown"):
                c.execute(
                    "update totals set tokens = tokens + ?, usd = usd + ?", (most[0] - held[0], most[1] - held[1])
                )
                c.execute("update calls set max_tokens = ?, max_usd = ? where id = ?", (*most, call))
            if status in ("rejected", "unsent") or usage:
                tokens_in, cached, tokens_out, usd = usage or (0, 0, 0, 0.0)
                billed = Totals(int(status != "unsent"), tokens_in + tokens_out, usd)
                c.execute(
                    "update totals set calls = calls - ?, tokens = tokens + ?, usd = usd + ?",
                    (int(status == "unsent"), tokens_in + tokens_out - held[0], usd - held[1]),
                )
                row = (tokens_in, cached, tokens_out, usd, call)
                c.execute("update calls set tokens_in=?, tokens_cached=?, tokens_out=?, usd=? where id=?", row)
            c.execute(
                "update calls set status=?, latency=?, error=? where id=?", (status, latency, error or None, call)
            )
            for key, sample_id, peak, k, raw in results:
                journal_file.insert_text(
                    c, key, sample_id, peak, k.index, k.text, k.finish, None, raw, call, time.time(), by
                )
        return billed

    def _believed(self, c, held, most, caps: Totals) -> tuple[int, float]:
        """(tokens, dollars) up to which an answer is believed that says more than its call could use."""
        spent = c.execute("select tokens, usd from totals").fetchone()
        limits = ((caps.tokens or math.inf), (caps.usd or math.inf))
        return tuple(min(BELIEVED * m, h + max(0, cap - s)) for m, h, cap, s in zip(most, held, limits, spent))

    def put_failure(self, key: bytes, sample_id: str, peak: int, failure: Failure) -> None:
        """Writes a failure that is final: a replay fails there too, and n is the same."""
        with self._write() as c:
            journal_file.insert_text(
                c, key, sample_id, peak, failure.index, None, None, failure.error, None, None, time.time()
            )

    def forget(self, sample_id: str, peak: int) -> int:
        """Removes what is known of a sample at a peak, so that it is asked for again; returns how many texts that
        were."""
        with self._write() as c:
            c.execute("delete from answered where sample_id = ? and peak = ?", (sample_id, peak))
            return c.execute("delete from continuations where sample_id = ? and peak = ?", (sample_id, peak)).rowcount

    def copy_to(self, folder) -> None:
        """Copies every file of the journal into `folder`, each a consistent snapshot, for a checkpoint.

        Raises:
          UserError: the folder cannot be written.
        """
        folder = pathlib.Path(folder)
        with self.mutex:
            self._look_again()
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
        """Writes every continuation but the probe's as a line of JSON, once; returns how many. `model` is the one that
        wrote it."""
        seen, lines = set(), 0
        with self.mutex, open(path, "w", encoding="utf-8") as out:
            for c in self._connections():
                by, join = "null", ""
                if journal_file.tells_who(c):
                    by, join = "a.model", "left join answered a using (key, sample_id, peak, idx) "
                rows = c.execute(
                    "select k.key, k.sample_id, k.peak, k.idx, text, finish, error, raw, time, about, messages, "
                    f"prefix, {by} "
                    f"from continuations k {join}left join requests r on r.key = k.key where k.sample_id != 'probe'"
                )
                for key, sample_id, peak, index, text, finish, error, raw, when, about, messages, prefix, model in rows:
                    if (who := (key, sample_id, peak, index)) in seen:
                        continue
                    seen.add(who)
                    line = {"sample_id": sample_id, "peak": peak, "index": index, "text": text, "finish": finish}
                    line |= {"error": error, "raw": raw, "time": when}
                    if about is not None:
                        line |= json.loads(about) | {"messages": json.loads(zlib.decompress(messages))}
                        line["prefix"] = zlib.decompress(prefix).decode()
                    if model:
                        line["model"] = model
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
                    lines += 1
        return lines

    def close(self) -> None:
        """Closes every file."""
        with self.mutex:
            for connection in self._connections():
                connection.close()
            self.own, self.writer, self.others = None, None, {}

    # inside

    def _named(self):
        named = sorted(self.others.items(), key=lambda item: (item[0] == self.path, item[0].name), reverse=True)
        return ([(self.path, self.own)] if self.own else []) + named

    def _connections(self):
        return [connection for _, connection in self._named()]

    def _look_again(self):
        """Opens the journal's file for reading where another process has made it since."""
        if self.own is None and self.path not in self.others and self.path.is_file():
            self.others[self.path] = journal_file.open_checked(self.path)

    @contextlib.contextmanager
    def _write(self):
        """One transaction on the journal's file."""
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
                    f"the teacher's journal {self.path} cannot be written: {e}; nothing more is asked until it can, "
                    "and what "
                    "it holds is kept"
                ) from None
            except BaseException:
                connection.execute("rollback")
                raise

    def _own(self):
        """The connection that writes. Made under a hidden name, so that no half-made file is seen; imports the
        others."""
        if self.own is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self.path.exists():
                    journal_file.create(self.path)
                if self.path not in self.others:
                    self.others[self.path] = journal_file.open_checked(self.path)
                self.others.pop(self.path).close()
                own = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=60.0)
                own.execute("pragma journal_mode = wal")
                own.execute(
                    "pragma synchronous = normal"
                )  # a killed process loses nothing; a power cut may lose the last calls
                own.execute("begin immediate")
                journal_file.later_tables(own)
                for path, other in list(self.others.items()):
                    journal_file.import_into(own, other, journal_file.identity(path, other))
                me = (os.getpid(), journal_file.process_started(os.getpid()))
                self.writer = own.execute("insert into writers (pid, started) values (?, ?)", me).lastrowid
                own.execute("commit")
            except (OSError, sqlite3.Error) as e:
                raise UserError(f"teacher.journal = {str(self.folder)!r} cannot be written: {e}") from None
            for connection in self.others.values():
                connection.close()
            self.own, self.others = own, {}
        return self.own


def main(args) -> int:
    """`export FOLDER OUT.jsonl`, `forget FOLDER SAMPLE_ID PEAK`."""
    known = {"export": 3, "forget": 4}
    if not args or known.get(args[0]) != len(args) or (args[0] == "forget" and not re.fullmatch(r"-?\d{1,9}", args[3])):
        print("\n".join(line.strip() for line in __doc__.splitlines()[-2:]), file=sys.stderr)
        return 2
    try:
        if not pathlib.Path(args[1]).is_dir():
            raise UserError(f"{args[1]} is no folder")
        with contextlib.closing(Journal(args[1])) as journal:
            if args[0] == "export":
                print(f"{journal.export_jsonl(args[2])} continuations -> {args[2]}")
            else:
                print(f"{journal.forget(args[2], int(args[3]))} texts forgotten")
    except UserError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
