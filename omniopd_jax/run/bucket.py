"""A run whose `run_dir` is a bucket (gs://BUCKET/PATH): Orbax writes the checkpoints there; all else is written to a
folder of this host, `local_dir`, and sent with each checkpoint.

Why two places: an object of a bucket can't be appended to, and SQLite needs a local disk. What is sent before a save
reaches as far as the checkpoint does, so a resume on another machine has everything that it would have had here; the
journal itself stays where it is, and its copies travel as `journal_snapshots`.
"""

import contextlib
import fnmatch
import json
import os
import pathlib
import threading
import time
from dataclasses import asdict

import fsspec
import jax
from etils import epath

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded
from omniopd_jax.parallel import processes
from omniopd_jax.run import files, lock, logging

SENT = (  # of the local folder: what a run writes but for the live journal
    "config.json", "summary.json", "teacher_probe.json", "metrics*.jsonl", "audits*.jsonl", "completions*.jsonl",
    "evaluations*.jsonl", "ahead", "journal_snapshots", "tensorboard", "profile", "wandb_id.txt", "trackers.json",
)  # fmt: skip
MARK = ".bucket"  # in the local folder: whose it is
GUARD = ".lock-guard"  # held for the moment in which a lock is looked at and taken
GUARD_S = 30.0  # a guard that another holds for so long was left by a process that is gone


class Mirror:
    """A run's local folder and its copy in the bucket; of a run that is not in a bucket, nothing.

    Args:
      folder: the local one.
      url: the bucket's; None: there is none, and `send` does nothing.
      sends: whether this process sends what its disk holds: one of each host does.
    """

    def __init__(self, folder: pathlib.Path, url: epath.Path | None = None, sends: bool = False):
        self._folder, self._url, self._sends = folder, url, sends
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and time of what the bucket has
        self.lock: Lock | lock.Lock | None = None

    def fetch(self) -> None:
        """Takes what the bucket holds of the run, over what is here: another host may have gone on since. Lines that
        only this host has, of a send that failed before it was killed, stay where they go on from the bucket's.

        Raises:
          UserError: the bucket can't be read.
        """
        if not self._sends:
            return
        mark = self._folder / MARK
        if mark.is_file() and mark.read_text() != str(self._url):
            raise UserError(
                f"local_dir = {self._folder} belongs to run_dir = {mark.read_text()}: set another local_dir"
            )
        mark.write_text(str(self._url))
        fetched = set()
        with _one_line(self._url, "read"):
            for name, path in _tree(self._url):
                target, content = self._folder / name, path.read_bytes()
                if _goes_on(target, content):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.tmp")
                temporary.write_bytes(content)
                os.replace(temporary, target)
                fetched.add(name)
        self._sent = {name: seen for name, seen in self._here().items() if name in fetched}

    def send(self, *, last: bool = False) -> None:
        """Sends the files that have changed, and removes those that are gone.

        What can't be sent now is sent the next time, with a line; it is an error at the end of the run (`last`).

        Raises:
          UserError: another run has taken `run_dir` over, or the bucket can't be written at the end.
        """
        if self.lock is not None and self.lock.lost:
            where = self._url or self._folder
            raise UserError(f"run_dir = {where} was taken over by another run ({self.lock.lost}): this one ends")
        if not self._sends:
            return
        try:
            with _one_line(self._url, "written"):
                here = self._here()
                for name in sorted(here, key=_order):
                    if here[name] != self._sent.get(name):
                        self._send_one(name)
                        self._sent[name] = here[name]
                for name in [n for n in self._sent if n not in here]:
                    with contextlib.suppress(FileNotFoundError):
                        (self._url / name).unlink()
                    del self._sent[name]
        except UserError as error:
            if last:
                raise UserError(f"{error}; what was not sent is in {self._folder}") from error
            logging.say(f"warning: {error}; sent again with the next checkpoint")

    def _send_one(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # gone since: the next time says so
            (self._url / name).write_bytes((self._folder / name).read_bytes())

    def _here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for top in (p for p in self._folder.iterdir() if _is_sent(p.name)):
            for path in top.rglob("*") if top.is_dir() else (top,):
                if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp":
                    found[str(path.relative_to(self._folder))] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found


def _goes_on(here: pathlib.Path, content: bytes) -> bool:
    """Whether a file of lines holds these and more."""
    if here.suffix != ".jsonl" or not here.is_file() or here.stat().st_size <= len(content):
        return False
    with here.open("rb") as file:
        return file.read(len(content)) == content


def _order(name: str) -> tuple[bool, str]:
    """What says that other files are there is sent behind them."""
    return name.endswith("/disks"), name


def _is_sent(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in SENT)


def _tree(url: epath.Path, name: str = ""):
    """(name, path) of what `Mirror.send` wrote, under a folder of the bucket."""
    if not url.is_dir():
        return
    for path in url.iterdir():
        if not name and not _is_sent(path.name):
            continue
        own = f"{name}{path.name}"
        if path.is_dir():
            yield from _tree(path, f"{own}/")
        else:
            yield own, path


class Lock:
    """A bucket's lock: an object that says who holds it, written anew every `lock.BEAT_S` as a heartbeat.

    It is looked at and taken under a guard, an object that the service creates for one alone. Where a holder was
    silent for so long that it was taken over and lives all the same, its next heartbeat finds that out: `lost` then
    says who has it, and `Mirror.send` ends the run before its next checkpoint.
    """

    def __init__(self, url: epath.Path):
        self._url, self._path, self.holder, self.lost = url, url / lock.NAME, lock.this_process(), ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="bucket's lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock, from a holder that is gone with a line that says so.

        Raises:
          UserError: another process holds it, or the bucket can't be written.
        """
        with _one_line(self._url, "written"), self._guarded():
            if self._path.exists():
                now = (self._url / GUARD).stat().mtime
                lock.check_gone(self._url, self._read(), now - self._path.stat().mtime, self.holder)
            self._write()
        self._thread.start()

    @contextlib.contextmanager
    def _guarded(self):
        guard, seen, since = self._url / GUARD, "", time.monotonic()
        while not self._created(guard):
            with contextlib.suppress(FileNotFoundError):
                other = guard.read_text()
                if other != seen:
                    seen, since = other, time.monotonic()
                elif time.monotonic() - since > GUARD_S:
                    guard.unlink()
                    continue
            time.sleep(0.5)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                guard.unlink()

    def _created(self, path: epath.Path) -> bool:
        """Creates an object that was not there; False where it was: the service decides between two."""
        try:
            fsspec.filesystem("gs").pipe_file(str(path), self.holder.token.encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def _write(self) -> None:
        self._path.write_text(json.dumps(asdict(self.holder)))

    def _read(self) -> lock.Holder:
        try:
            return lock.Holder(**json.loads(self._path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._path} is damaged: remove it if no run uses {self._url}") from error

    def _beat(self) -> None:
        while not self._stop.wait(lock.BEAT_S):
            with contextlib.suppress(Exception):  # the network: the saves themselves will say so
                self.beat()

    def beat(self) -> None:
        """One heartbeat."""
        holder = self._read() if self._path.exists() else None
        if holder is None or holder.token != self.holder.token:
            self.lost = f"process {holder.pid} on {holder.host}" if holder else "the lock is gone"
            self._stop.set()
        else:
            self._write()

    def release(self) -> None:
        """Gives the lock back, if it is still this process's."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(Exception):  # at the end: what is left is taken over as of a process that has ended
            if self._read().token == self.holder.token:
                self._path.unlink()


@contextlib.contextmanager
def held(cfg):
    """The run's place, locked by process 0 for all of its processes: yields its `Mirror`.

    Raises:
      UserError: in every process, where another run holds it or it can't be written.
    """
    folder = config.local_folder(cfg)
    with lock.held(folder, cfg.run_dir) as local:
        disks = processes.disks(folder)
        if not config.is_bucket(cfg.run_dir):
            if len(set(disks)) > 1:
                raise UserError(
                    f"run_dir = {cfg.run_dir} is not one folder for all processes (the lowest that sees each one's: "
                    f"{disks}): set one that all hosts share, or gs://BUCKET/PATH"
                )
            mirror = Mirror(folder)
            mirror.lock = local if jax.process_index() == 0 else None
            yield mirror
            return
        folder.mkdir(parents=True, exist_ok=True)
        mirror = Mirror(folder, files.place(cfg.run_dir), sends=disks[jax.process_index()] == jax.process_index())
        own = Lock(files.place(cfg.run_dir)) if jax.process_index() == 0 else None
        mirror.lock = own
        try:
            processes.raise_on_all("bucket's lock", own.acquire if own else lambda: None)
            processes.raise_on_all("bucket's files", mirror.fetch)
            try:
                yield mirror
            except BaseException:
                with contextlib.suppress(UserError):  # the error that is on its way says more
                    mirror.send()
                raise
            mirror.send(last=True)
        finally:
            if own is not None:
                own.release()


def copied(run_dir, to) -> pathlib.Path:
    """A run's folder as a path of this machine: of a bucket's, its config, summary and records are copied into `to`.

    Raises:
      UserError: the bucket can't be read.
    """
    if not config.is_bucket(run_dir):
        return pathlib.Path(run_dir)
    url = files.place(run_dir)
    folder = pathlib.Path(to) / url.name
    folder.mkdir(parents=True)
    with _one_line(url, "read"):
        for path in url.iterdir():
            if path.suffix in (".json", ".jsonl"):
                (folder / path.name).write_bytes(path.read_bytes())
    return folder


@contextlib.contextmanager
def _one_line(url, what: str):
    """Whatever the service, its client or its credentials say, as one line. What our own code raises passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gcsfs, google.auth and aiohttp share no base class
        raise UserError(f"run_dir = {url} can't be {what} ({type(error).__name__}: {bounded.line(error)})") from error
