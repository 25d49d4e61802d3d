"""Jinja templates, rendered by a process of its own within bounds of time, memory and length (`template_worker`)."""

import atexit
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import time

WORKER = pathlib.Path(__file__).with_name("template_worker.py")
SECONDS = 10.0  # of one prompt: a real template takes a millisecond
BYTES = 100_000_000  # of an answer: the worker's own bound on characters, escaped
CHUNK = 1 << 16


class RenderError(ValueError):
    """Why a template gave no text: one line."""


class Renderer:
    """One worker for all templates of this process, started when first asked; started again after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process, self._owner = None, None

    def render(self, source: str, variables: dict, *, seconds: float | None = None) -> str:
        """The template's text.

        Args:
          source: the template. variables: what it sees, JSON.
          seconds: its time; None: `SECONDS`.

        Raises:
          RenderError: it raised, or did not keep within time, memory or length.
        """
        seconds = SECONDS if seconds is None else seconds
        line = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        with self._lock:
            self._start()
            try:
                answer = json.loads(self._exchange(line, time.monotonic() + seconds, seconds))
            except BaseException:
                self.close()  # whatever is still on its way belongs to this call
                raise
        if "error" in answer:
            raise RenderError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """Ends the worker."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _start(self) -> None:
        if self._owner != os.getpid():  # after a fork the parent's worker is the parent's
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run, which ends the worker itself
            )
            os.set_blocking(self._process.stdin.fileno(), False)
            os.set_blocking(self._process.stdout.fileno(), False)

    def _exchange(self, line: bytes, deadline: float, seconds: float) -> bytes:
        """Sends a line and returns the line that comes back."""
        source, sink = self._process.stdout.fileno(), self._process.stdin.fileno()
        got, left = bytearray(), memoryview(line)
        while not got.endswith(b"\n"):
            wait = deadline - time.monotonic()
            ready = select.select([source], [sink] if left else [], [], max(wait, 0))
            if not any(ready):
                raise RenderError(f"it takes more than {seconds:g} s: a loop without end?")
            if ready[1]:
                left = left[os.write(sink, left[:CHUNK]) :]
            if ready[0]:
                part = os.read(source, CHUNK)
                if not part or len(got) > BYTES:
                    raise RenderError("the process that renders it ended: out of memory?")
                got += part
        return bytes(got)


shared = Renderer()
atexit.register(shared.close)
