"""Math grader: does a response end in the reference answer? By math-verify, in worker processes that can be killed.

Nothing that a response holds can hang or stop the caller: after `seconds` the worker gives up, a second later it is
ended, and an answer that could not be compared in that time is wrong. Works in any thread.
"""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from omniopd_jax.errors import UserError
from omniopd_jax.graders.gym import last_boxed

PACKAGE = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))  # the folder that holds omniopd_jax
START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from omniopd_jax.graders import math_worker; math_worker.main()"
)
START_SECONDS = 120.0  # for the worker's imports, sympy's above all, on a busy machine
LONGEST = 40_000  # characters of a response that go to the worker: its end, and its last box where that comes before
LONGEST_ANSWER = 20_000  # characters of a reference answer


class MathGrader:
    """Compares answers in up to `workers` processes, started when needed. Safe to share between threads."""

    extract = staticmethod(last_boxed)

    def __init__(self, *, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096):
        workers = min(4, os.cpu_count() or 1) if workers is None else workers
        if seconds <= 0 or workers < 1 or memory_mb < 512:
            raise UserError(
                f"math grader: seconds = {seconds}, workers = {workers}, memory_mb = {memory_mb}: "
                "need more than 0, at least 1 and at least 512"
            )
        self.workers, self.seconds = workers, seconds
        self._server = _Server(seconds, memory_mb)
        self._idle = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(_Worker(self._server))

    def grade(self, text: str, answer: str) -> bool:
        """Whether `text`, a response or an answer alone, gives `answer`. False for what cannot be read or decided.

        Raises:
          UserError: the worker does not start (math-verify is missing, say).
        """
        text, answer = str(text), str(answer)  # some data sets hold numbers
        if len(answer) > LONGEST_ANSWER:
            return False
        worker = self._idle.get()
        told = b""
        try:
            told = worker.ask(json.dumps([_end_of(text), answer]).encode() + b"\n", self.seconds + 2)
            return told == b"true\n"
        finally:
            if not told:  # hung, or ended by its watchdog or for memory, or interrupted: another takes its place
                worker.stop()
            self._idle.put(worker)

    def grade_all(self, texts: Iterable[str], answers: Iterable[str]) -> list[bool]:
        """`grade` for each text and its answer, `workers` at a time, in order.

        Raises:
          UserError: as `grade`.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.grade, texts, answers))

    def check_answer(self, answer) -> None:
        """Raises a UserError unless `answer` is text or a number."""
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            kind = "null" if answer is None else f"{type(answer).__name__} {answer!r:.60}"
            raise UserError(f"an answer for the math grader is text or a number; this is {kind}")
        if not str(answer).strip():
            raise UserError("an answer for the math grader is text or a number; this is empty")
        if len(str(answer)) > LONGEST_ANSWER:
            raise UserError(
                f"an answer for the math grader has at most {LONGEST_ANSWER} characters; this has {len(str(answer))}"
            )

    def check_machine(self) -> None:
        """Raises a UserError where math-verify is missing."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the math grader needs math-verify: pip install math-verify")

    def close(self) -> None:
        """Ends the processes; others start if an answer comes."""
        workers = [self._idle.get() for _ in range(self.workers)]
        for worker in workers:
            worker.stop()
            self._idle.put(worker)
        self._server.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Server:
    """The process of math_worker.py that has loaded everything and forks the workers."""

    def __init__(self, seconds, memory_mb):
        self.command = [sys.executable, "-P", "-c", START, PACKAGE, str(seconds), str(memory_mb)]
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
        with theirs:
            self.process = subprocess.Popen(
                self.command, stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True
            )
        self.orders.settimeout(START_SECONDS)
        try:
            ready = self.orders.recv(1)
        except OSError:
            ready = b""
        if not ready:
            self.end()
            raise UserError("the math grader's worker did not start: is math-verify installed? pip install math-verify")

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
        self.server, self.connection, self.pid = server, None, 0

    def ask(self, line, seconds):
        """The answer to `line`; b"" where the worker ended or let `seconds` pass."""
        if self.connection is None:
            self.connection = self.server.connect()
            told = self.read_line(START_SECONDS)
            if not told:
                return b""
            self.pid = int(told)
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
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self.connection, self.pid = None, 0


def make(*, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096) -> MathGrader:
    """A MathGrader that spends at most `seconds` on a pair, in up to `workers` processes (default: one per core, at
    most 4).

    Raises:
      UserError: an impossible setting.
    """
    return MathGrader(seconds=seconds, workers=workers, memory_mb=memory_mb)


def _end_of(text):
    """The part of a long response that can hold its answer."""
    if len(text) <= LONGEST:
        return text
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if 0 <= box < len(text) - LONGEST:
        return text[max(0, box - 200) : box + LONGEST]
    return text[-LONGEST:]
