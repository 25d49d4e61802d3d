"""A journal's file: its schema, how it is made, checked, imported and restored. What is written in it: journal.py."""

import contextlib
import hashlib
import os
import pathlib
import secrets
import shutil
import sqlite3
import time

from omniopd_jax.errors import UserError

APPLICATION_ID = 0x4F4D4F50  # "OMOP": tells our files from other people's
SCHEMA_VERSION = 2
READ = (1, 2)  # schemas that are read and imported
NAME = "journal.sqlite"
SCHEMA = """
create table meta (id text not null);
create table requests (key blob primary key, about text not null, messages blob not null, prefix blob not null);
create table continuations (
  key blob not null, sample_id text not null, peak integer not null, idx integer not null,
  text text, finish text, error text, raw text, call integer, time real not null, sum blob not null,
  primary key (key, sample_id, peak, idx)) without rowid;
create table calls (
  id integer primary key, writer integer, run text, key blob, n integer not null, status text not null, time real not null,
  latency real, tokens_in integer, tokens_cached integer, tokens_out integer, usd real, max_tokens integer, max_usd real,
  error text);
create index asked on calls (writer) where status = 'asked';
create table totals (calls integer not null, tokens integer not null, usd real not null);
create table modes (provider text, model text, asked text, mode text, report text, time real,
  primary key (provider, model, asked));
create table writers (id integer primary key, pid integer not null, started text not null);
create table imported (name text primary key, time real not null);
insert into totals values (0, 0, 0.0);
"""
# texts that another model wrote than the one asked for; journals of before have no such table
ANSWERED = """
create table if not exists answered (key blob not null, sample_id text not null, peak integer not null,
  idx integer not null, model text not null, primary key (key, sample_id, peak, idx)) without rowid
"""
# (M, N) that a step was given where the budget spreads what is left: a step that is repeated asks for the same
ALLOWANCES = """
create table if not exists allowances (run text not null, step text not null, chunks integer not null,
  continuations integer not null, primary key (run, step))
"""


def create(path: pathlib.Path) -> None:
    """An empty journal at `path`, unless another process is quicker."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
    try:
        with contextlib.closing(sqlite3.connect(part)) as new:
            new.executescript(
                f"pragma application_id = {APPLICATION_ID}; pragma user_version = {SCHEMA_VERSION}; {SCHEMA}{ANSWERED};{ALLOWANCES}"
            )
            new.execute("insert into meta values (?)", (secrets.token_hex(8),))
            new.commit()
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def insert_text(c, key, sample_id, peak, index, text, finish, error, raw, call, when, by="") -> None:
    """Writes a text, or a final failure, with its checksum; `by`: the model that wrote it in the place of another."""
    mark = checksum(key, sample_id, peak, index, text, finish, error, raw)
    row = (key, sample_id, peak, index, text, finish, error, raw, call, when, mark)
    c.execute("insert or replace into continuations values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    if by:
        c.execute("insert or replace into answered values (?, ?, ?, ?, ?)", (*row[:4], by))
    else:
        c.execute("delete from answered where key = ? and sample_id = ? and peak = ? and idx = ?", row[:4])


def later_tables(c) -> None:
    """Makes the tables that journals of earlier versions lack."""
    c.execute(ANSWERED)
    c.execute(ALLOWANCES)


def has_table(c, name: str) -> bool:
    """Whether a journal has a table of a later version."""
    return bool(c.execute("select 1 from sqlite_master where name = ?", (name,)).fetchone())


def tells_who(c) -> bool:
    """Whether a journal has the table of those who answered in the place of others."""
    return has_table(c, "answered")


def checksum(*parts) -> bytes:
    """Of a stored text and all that it is found by."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def import_into(own, other, name: str) -> None:
    """Takes over what another journal holds, once, as `take_from` does.

    Raises:
      UserError: a text of the other journal is not the one that was written.
    """
    if not own.execute("select 1 from imported where name = ?", (name,)).fetchone():
        take_from(own, other, name)
        own.execute("insert into imported values (?, ?)", (name, time.time()))


def take_from(own, other, name: str) -> None:
    """Takes over what another journal holds and this one does not: a call that is in both, as one was copied from the
    other once, counts once. Where both have a text, the newer one is kept.

    Raises:
      UserError: a text of the other journal is not the one that was written.
    """
    new = schema_of(other) > 1
    own.executemany("insert or ignore into requests values (?, ?, ?, ?)", other.execute("select * from requests"))
    texts = f"select key, sample_id, peak, idx, text, finish, error, raw, time, {'sum' if new else 'null'} from continuations"
    rows = other.execute("select * from answered") if tells_who(other) else ()
    others = {tuple(where): model for *where, model in rows}
    for key, sample_id, peak, index, text, finish, error, raw, when, mark in other.execute(texts):
        where = (key, sample_id, peak, index)
        if mark is not None and mark != checksum(*where, text, finish, error, raw):
            raise UserError(
                f"journal {name}: text {index} of sample {sample_id} at peak {peak} is not the one that was written "
                "(its "
                "checksum differs): take another copy of that journal, or move its file out of the folder"
            )
        sql = "select time from continuations where key = ? and sample_id = ? and peak = ? and idx = ?"
        here = own.execute(sql, where).fetchone()
        if here is None or here[0] < when:
            insert_text(own, *where, text, finish, error, raw, None, when, others.get(where, ""))
    if has_table(other, "allowances"):
        own.executemany(
            "insert or ignore into allowances values (?, ?, ?, ?)", other.execute("select * from allowances")
        )
    columns = "key, n, status, time, latency, tokens_in, tokens_cached, tokens_out, usd, max_tokens, max_usd, error"
    columns += ", run" if new else ""
    calls = other.execute(f"select {columns} from calls").fetchall()
    spent = other.execute("select calls, tokens, usd from totals").fetchone()
    if new:
        here = set(own.execute("select key, n, time, run from calls"))
        lacking = [row for row in calls if (*row[:2], row[3], row[-1]) not in here]
        if len(lacking) < len(calls):
            calls = lacking
            spent = [sum(of) for of in zip(*map(_counts_as, calls))] or (0, 0, 0.0)
    marks = ", ".join("?" for _ in columns.split(","))
    own.executemany(f"insert into calls ({columns}) values ({marks})", calls)
    own.execute("update totals set calls = calls + ?, tokens = tokens + ?, usd = usd + ?", spent)
    for row in other.execute("select provider, model, asked, mode, report, time from modes").fetchall():
        here = own.execute("select time from modes where provider = ? and model = ? and asked = ?", row[:3]).fetchone()
        if here is None or here[0] < row[5]:
            own.execute("insert or replace into modes values (?, ?, ?, ?, ?, ?)", row)


def _counts_as(call) -> tuple[int, int, float]:
    """(calls, tokens, dollars) of a row of `calls`: what is not known at its upper bound, as in `totals`."""
    _, _, status, _, _, tokens_in, _, tokens_out, usd, max_tokens, max_usd, *_ = call
    if status == "unsent":
        return 0, 0, 0.0
    return 1, max_tokens if tokens_in is None else tokens_in + tokens_out, max_usd if usd is None else usd


def catch_up(snapshot: pathlib.Path, target: pathlib.Path) -> None:
    """Takes from a later copy of a journal what was written on another machine, where it went on."""
    newest = "select id, key, n, time from calls order by id desc limit 1"
    same = "select 1 from calls where id = ? and key = ? and n = ? and time = ?"
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(contextlib.closing(open_checked(snapshot)))
        here = stack.enter_context(contextlib.closing(open_checked(target)))
        last, name = other.execute(newest).fetchone(), identity(snapshot, other)
        if last is None or here.execute(same, last).fetchone():
            return  # the copy is a beginning of what is here
        own = stack.enter_context(contextlib.closing(sqlite3.connect(target, isolation_level=None, timeout=60.0)))
        try:
            own.execute("begin immediate")
            later_tables(own)
            if (waits := target.with_name(f"{name}.sqlite")).is_file():
                import_into(own, stack.enter_context(contextlib.closing(open_checked(waits))), name)
            take_from(own, other, name)
            own.execute("commit")
        except sqlite3.Error as error:
            raise UserError(f"{target} can't take over what its copy in {snapshot.parent} has more: {error}") from error


def schema_of(connection) -> int:
    """The version of a journal's schema."""
    return connection.execute("pragma user_version").fetchone()[0]


def identity(path: pathlib.Path, connection) -> str:
    """What a journal is known by, wherever it was copied to: its own id, in the first schema its file's name."""
    return path.name if schema_of(connection) == 1 else connection.execute("select id from meta").fetchone()[0]


def process_started(pid: int) -> str:
    """When a process began, '' where there is none: a number may be given to another process later."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        try:
            os.kill(pid, 0)
        except OSError:
            return ""
        return "running"
    return f"{boot} {stat.rpartition(')')[2].split()[19]}"


def open_checked(path: pathlib.Path):
    """A read-only connection. Raises `UserError` where the file is not a sound journal of this schema."""
    advice = "move it out of the folder, or set teacher.journal to another one"
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False, timeout=30.0
        )
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
        if version not in READ:
            connection.close()
            raise UserError(f"{path} is a journal of schema {version}, this version reads {SCHEMA_VERSION}; {advice}")
        if (said := connection.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            connection.close()
            raise UserError(f"{path} is corrupt ({said}); {advice}, or restore it from a checkpoint's copy")
        return connection
    except sqlite3.Error as e:
        raise UserError(f"{path} is corrupt or not a teacher's journal ({e}); {advice}") from None


def known(folder) -> tuple[list[str], list[str]]:
    """(identities of a folder's own journals, of those that were or will be imported into them); the folders of named
    teachers included."""
    own, imported = [], []
    folder = pathlib.Path(folder)
    for path in sorted([*folder.glob("*.sqlite"), *folder.glob("*/*.sqlite")]):
        with contextlib.closing(open_checked(path)) as c:
            (own if path.name == NAME else imported).append(identity(path, c))
            if schema_of(c) > 1:
                imported += [name for (name,) in c.execute("select name from imported")]
    return own, imported


def renew(folder, retired) -> None:
    """Gives each journal of a folder whose identity is in `retired` a new one: another disk has imported what it held,
    and will import what it is to hold. What both disks hold counts twice while both are of the run, so that a cap is
    reached early, never late."""
    folder = pathlib.Path(folder)
    for path in sorted([folder / NAME, *folder.glob(f"*/{NAME}")]):
        if not path.is_file():
            continue
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=60.0)) as c:
            c.execute("begin immediate")
            if (old := identity(path, c)) in retired:
                c.execute("update meta set id = ?", (secrets.token_hex(8),))
                c.execute("insert or ignore into imported values (?, ?)", (old, time.time()))
            c.execute("commit")


def restore(snapshot, folder, elsewhere=(), takes: bool = True) -> int:
    """Takes what a checkpoint's snapshot holds and `folder` lacks, before a resume: the files of another machine, and
    what a journal of this folder got where the run went on elsewhere.

    Args:
      elsewhere: identities that another disk of the run answers for.
      takes: whether files that no disk knows come here.

    Returns:
      How many files were copied.

    Raises:
      UserError: a file of the snapshot is no sound journal.
    """
    snapshot, folder, copied = pathlib.Path(snapshot), pathlib.Path(folder), 0
    folder.mkdir(parents=True, exist_ok=True)
    held, target = set(sum(known(folder), [])), folder / NAME
    for path in sorted(p for p in snapshot.glob("*") if p.is_dir()):  # of a named teacher
        copied += restore(path, folder / path.name, elsewhere, takes)
    for path in sorted(snapshot.glob("*.sqlite")):
        with contextlib.closing(open_checked(path)) as there:
            name, current = identity(path, there), schema_of(there) == SCHEMA_VERSION
        if name in elsewhere:
            continue
        if name in held:
            if current and target.is_file():
                catch_up(path, target)
            continue
        # of another host: imported beside the one that is there
        place = folder / (f"{name}.sqlite" if target.exists() and path.name == NAME else path.name)
        if takes and not place.exists():
            part = folder / f".{place.name}.part"
            shutil.copyfile(path, part)
            os.replace(part, place)
            copied += 1
    return copied
