"""Worker processes that can be ended: a server that has loaded everything forks a worker for each connection.

This is the trainer's side; worker.py is theirs. They see nothing of the trainer's environment, where the keys are.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

from omniopd_jax.errors import UserError

PACKAGE = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))  # the folder that holds omniopd_jax
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from omniopd_jax.graders import {0}; {0}.main()"
START_SECONDS = 300.0  # for the worker's imports, sympy's above all, on a busy machine
KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG")  # of the environment: what finds the interpreter's own files


class Pool:
    """Up to `workers` processes of the module `name`, started when needed. Safe to share between threads.

    Args:
      name: a module of this package whose `main` serves (worker.py).
      what: whose they are, for the errors.
      seconds: for one question.
      workers: processes; None: one per core, at most 4.
      memory_mb: MiB of address space of each.
      missing: what the user does where they don't start.

    Raises:
      UserError: an impossible setting.
    """

    def __init__(self, name: str, what: str, *, seconds: float, workers: int | None, memory_mb: int, missing: str):
        workers = min(4, os.cpu_count() or 1) if workers is None else workers
        if seconds <= 0 or workers < 1 or memory_mb < 512:
            raise UserError(
                f"{what}: seconds = {seconds}, workers = {workers}, memory_mb = {memory_mb}: "
                "need more than 0, at least 1 and at least 512"
            )
        self.seconds, self.workers = seconds, workers
        self._server = _Server(name, seconds, memory_mb, f"the {what}'s worker did not start: {missing}")
        self.idle = queue.LifoQueue()
        for _ in range(workers):
            self.idle.put(_Worker(self._server))

    def ask(self, line: bytes, first: bytes = b"") -> bytes:
        """A worker's answer to `line`; b"" where it ended or had none in time, and another takes its place.

        `first`, a line too, readies the worker: it is sent once to each and may take START_SECONDS.
        """
        worker, told = self.idle.get(), b""
        try:
            if first and first not in worker.ready:
                if worker.ask(first, START_SECONDS) != b"true\n":
                    return b""
                worker.ready.add(first)
            told = worker.ask(line, self.seconds + 2)
            return told
        finally:
            if not told:  # hung, or ended by its watchdog or for memory, or interrupted
                worker.stop()
            self.idle.put(worker)

    def close(self) -> None:
        """Ends the processes; others start if a question comes."""
        for worker in [self.idle.get() for _ in range(self.workers)]:
            worker.stop()
            self.idle.put(worker)
        self._server.stop()


class _Server:
    """The process that has loaded everything and forks the workers."""

    def __init__(self, name, seconds, memory_mb, missing):
        self.command = [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            "-c",
            START.format(name),
            PACKAGE,
            str(seconds),
            str(memory_mb),
        ]
        self.missing = missing
        self.process = self.orders = None
        self.lock = threading.Lock()

    def connect(self):
        """A connection to a new worker."""
        mine, theirs = socket.socketpair()
        with self.lock, theirs:
            for attempt in (1, 2):
                if self.process is None:
                    self.start()
                try:
                    socket.send_fds(self.orders, [b"x"], [theirs.fileno()])
                    break
                except OSError:  # it was killed, say for memory
                    self.end()
                    if attempt == 2:
                        raise
        return mine

    def start(self):
        """Starts the process and waits for its imports."""
        self.orders, theirs = socket.socketpair()
        env = {name: os.environ[name] for name in KEPT if name in os.environ} | {"PYTHONHASHSEED": "0"}
        with theirs:
            self.process = subprocess.Popen(
                self.command, stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True, env=env
            )
        self.orders.settimeout(START_SECONDS)
        try:
            ready = self.orders.recv(1)
        except OSError:
            ready = b""
        if not ready:
            self.end()
            raise UserError(self.missing)

    def stop(self):
        """Ends the process."""
        with self.lock:
            self.end()

    def end(self):
        """As `stop`, for a caller that holds the lock."""
        if self.process is not None:
            self.orders.close()
            self.process.kill()
            self.process.wait()
            self.process = None


class _Worker:
    """One worker, forked by the server when it is first asked."""

    def __init__(self, server):
        self.server, self.connection, self.pid, self.process, self.ready = server, None, 0, None, set()

    def ask(self, line, seconds):
        """The answer to `line`; b"" where the worker ended or let `seconds` pass."""
        if self.connection is None:
            self.connection = self.server.connect()
            told = self.read_line(START_SECONDS)
            if not told:
                return b""
            self.pid = int(told)
            with contextlib.suppress(OSError, AttributeError):  # where the system has none
                self.process = os.pidfd_open(self.pid)  # the number may be another's by the time that it is ended
        try:
            self.connection.settimeout(seconds)
            self.connection.sendall(line)
        except OSError:
            return b""
        return self.read_line(seconds)

    def read_line(self, seconds):
        """The next line; b"" where the worker ended or let `seconds` pass."""
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            try:
                self.connection.settimeout(max(0.001, end - time.monotonic()))
                part = self.connection.recv(64)
            except OSError:
                return b""
            if not part:
                return b""
            line += part
        return line

    def stop(self):
        """Ends the process; another takes its place when it is asked again."""
        if self.connection is not None:
            self.connection.close()
            if self.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.process, signal.SIGKILL)
                os.close(self.process)
            elif self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self.connection, self.pid, self.process, self.ready = None, 0, None, set()
