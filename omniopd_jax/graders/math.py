"""Math grader: does a response end in the reference answer? By math-verify, in worker processes that can be killed.

Nothing that a response holds can hang or stop the caller: after `seconds` the worker gives up, a second later it is
ended, and an answer that could not be compared in that time is wrong. Works in any thread.
"""

import importlib.util
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from omniopd_jax.errors import UserError

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "math_worker.py")
START_SECONDS = 120.0  # for the worker's imports, sympy's above all, on a busy machine
LONGEST = 40_000  # characters of a response that go to the worker: its end, and its last box where that lies before
LONGEST_ANSWER = 20_000  # characters of a reference answer


class MathGrader:
    """Compares answers in up to `workers` processes, started when needed. Safe to share between threads; close it, or use it in a `with`."""

    def __init__(self, *, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096):
        workers = min(4, os.cpu_count() or 1) if workers is None else workers
        if seconds <= 0 or workers < 1 or memory_mb < 512:
            raise UserError(
                f"math grader: seconds = {seconds}, workers = {workers}, memory_mb = {memory_mb}: "
                "need more than 0, at least 1 and at least 512"
            )
        self.workers, self.seconds, self.memory_mb = workers, seconds, memory_mb
        self._idle = queue.LifoQueue()  # the one used last first: its imports are done
        for _ in range(workers):
            self._idle.put(_Worker(seconds, memory_mb))

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
            worker.wait_until_ready()
            told = worker.ask(json.dumps([_end_of(text), answer]).encode() + b"\n", self.seconds + 2)
            return told == b"true\n"
        finally:
            if not told:  # hung, or ended by its watchdog or for memory, or interrupted: another takes its place
                worker.stop()
                worker = _Worker(self.seconds, self.memory_mb)
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
            raise UserError(f"an answer for the math grader has at most {LONGEST_ANSWER} characters; this has {len(str(answer))}")

    def check_machine(self) -> None:
        """Raises a UserError where math-verify is missing."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the math grader needs math-verify: pip install math-verify")

    def close(self) -> None:
        """Ends the workers; the grader is of no use afterwards."""
        for _ in range(self.workers):
            self._idle.get().stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Worker:
    """One process of math_worker.py."""

    def __init__(self, seconds, memory_mb):
        self.command = [sys.executable, "-P", WORKER, str(seconds), str(memory_mb)]
        self.process, self.ready = None, False

    def wait_until_ready(self):
        """Returns once the imports are done; raises UserError where they fail."""
        if not self.ready:
            if self.process is None:
                self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            if self.read_line(START_SECONDS) != b"ready\n":
                raise UserError("the math grader's worker did not start: is math-verify installed? pip install math-verify")
            self.ready = True

    def ask(self, line, seconds):
        """The answer to `line`; b"" where the worker ended or let `seconds` pass."""
        try:
            self.process.stdin.write(line)
        except OSError:
            return b""
        return self.read_line(seconds)

    def read_line(self, seconds):
        """The next line; b"" where the worker ended or let `seconds` pass."""
        end, line = time.monotonic() + seconds, b""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0, end - time.monotonic()) * 1000):
                return b""
            part = self.process.stdout.read(64)
            if not part:
                return b""
            line += part
        return line

    def stop(self):
        """Ends the process."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def make(*, seconds: float = 5.0, workers: int | None = None, memory_mb: int = 4096) -> MathGrader:
    """A MathGrader that spends at most `seconds` on a pair, in up to `workers` processes (default: one per core, at most 4).

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
