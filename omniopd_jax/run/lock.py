"""One run per run directory: a lock file that process 0 holds, with a heartbeat, taken over from a process that is
gone."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading

import jax

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.parallel import processes
from omniopd_jax.run import files, logging

NAME = "lock"  # <run_dir>/lock
BEAT_S = 30.0  # between heartbeats
SILENT_S = 300.0  # a holder on another host that has not written for so long is gone


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds the lock: a process is named by its host, the host's boot, its pid, when it started (clock ticks) and
    whose number that pid is: a container has its own. "" of a version that did not say."""

    host: str
    boot: str
    pid: int
    started: int
    token: str
    namespace: str = ""


def this_process() -> Holder:
    """This process, with a new token."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.is_file() else ""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else ""
    started = start_time(os.getpid()) or 0
    return Holder(socket.gethostname(), boot_id, os.getpid(), started, secrets.token_hex(8), namespace)


def start_time(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since its boot; None where there is no such process, or where
    it has ended and its parent has not asked for its exit code yet."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name, in parentheses, may hold anything
    return None if state in "ZX" else int(rest[18])


def gone(holder: Holder, here: Holder, silent_s: float) -> str:
    """Why the holder can't be alive, or '' where it may be. `silent_s`: since its last heartbeat."""
    if holder.host != here.host:
        return f"host {holder.host} has been silent for {silent_s:.0f} s" if silent_s > SILENT_S else ""
    if holder.boot != here.boot:
        return f"host {holder.host} has been restarted since"
    if holder.namespace and holder.namespace != here.namespace:  # its pid says nothing here
        return f"its container on this host has been silent for {silent_s:.0f} s" if silent_s > SILENT_S else ""
    if start_time(holder.pid) != holder.started:
        return f"process {holder.pid} has ended"
    return ""


def check_gone(run_dir, holder: Holder, silent_s: float, here: Holder) -> None:
    """Says that a lock is taken over from a holder that is gone.

    Raises:
      UserError: it may be alive.
    """
    reason = gone(holder, here, silent_s)
    if not reason:
        raise UserError(
            f"run_dir = {run_dir} is in use by process {holder.pid} on {holder.host} (heartbeat {silent_s:.0f} s "
            "ago): wait until it ends, stop it, or set another run_dir"
        )
    logging.say(f"{run_dir} was left locked, and {reason}: this run takes it over")


class Lock:
    """The lock of a run directory, once acquired: writes a heartbeat until `release`.

    Where this process was silent for so long that it was taken over and lives all the same, its next heartbeat finds
    that out: `lost` then says who has the lock, and `Mirror.send` ends the run before its next checkpoint.
    """

    def __init__(self, run_dir):
        self._folder = pathlib.Path(run_dir)
        self._path = self._folder / NAME
        self.holder, self.lost = this_process(), ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock, from a holder that is gone with a line that says so.

        Raises:
          UserError: another process holds it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._guarded():
            own = self._folder / f".{NAME}-{self.holder.token}"
            own.write_text(json.dumps(dataclasses.asdict(self.holder)))
            try:
                if self._path.exists():
                    self._check_gone(now=own.stat().st_mtime)
                os.replace(own, self._path)
            finally:
                own.unlink(missing_ok=True)
        self._thread.start()

    @contextlib.contextmanager
    def _guarded(self):
        """Alone among those who take or release the lock at this moment; the kernel frees it if this process dies."""
        with (self._folder / f".{NAME}-guard").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _check_gone(self, now: float) -> None:
        holder, beat = self._read()
        check_gone(self._folder, holder, now - beat, self.holder)  # both by the file system's clock

    def _read(self) -> tuple[Holder, float]:
        try:
            return Holder(**json.loads(self._path.read_text())), self._path.stat().st_mtime
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._path} is damaged: remove it if no run uses {self._folder}") from error

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError, UserError):  # a full disk, a folder moved away: the run will say so
                self.beat()

    def beat(self) -> None:
        """One heartbeat."""
        holder, _ = self._read()
        if holder.token != self.holder.token:
            self.lost = f"process {holder.pid} on {holder.host}"
            self._stop.set()
        else:
            os.utime(self._path)

    def release(self) -> None:
        """Gives the lock back, if it is still this process's."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError, ValueError), self._guarded():
            if json.loads(self._path.read_text())["token"] == self.holder.token:
                self._path.unlink()


@contextlib.contextmanager
def held(folder, run_dir):
    """A folder, locked by process 0 for all processes of the run: yields its lock; `run_dir`: what the config calls it.

    Raises:
      UserError: in every process, where another run holds it or the folder can't be written.
    """
    lock = Lock(folder)
    if jax.process_index() == 0:
        processes.raise_on_all("lock", lambda: _checked(lock, folder, run_dir))
    else:
        processes.raise_on_all("lock", lambda: None)
    try:
        yield lock
    finally:
        if jax.process_index() == 0:
            lock.release()


def _checked(lock: Lock, folder, run_dir) -> None:
    """Locks; a folder that can't be written is one line, before anything loads."""
    folder, name = pathlib.Path(folder), "local_dir" if config.is_bucket(run_dir) else "run_dir"
    try:
        lock.acquire()
        files.try_writing(folder)
    except FileExistsError as error:
        raise UserError(f"{name} = {folder} is a file, not a folder: set another {name}") from error
    except NotADirectoryError as error:
        raise UserError(f"{name} = {folder} is below a file, not a folder: set another {name}") from error
    except OSError as error:
        lock.release()
        raise UserError(f"{name} = {folder} can't be written ({error.strerror}): set another {name}") from error
