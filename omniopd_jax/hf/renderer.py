"""Jinja templates, rendered by a process of its own within bounds of time, memory and length (`template_worker`)."""

import atexit
import importlib.util
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import threading
import time

WORKER = pathlib.Path(__file__).with_name("template_worker.py")
START_SECONDS = 60.0  # until the worker has its imports, from a cold disk
SECONDS = 10.0  # of one prompt: a real template takes a millisecond
BYTES = 100_000_000  # of an answer: the worker's own bound on characters, escaped
CHUNK = 1 << 16


class RenderError(ValueError):
    """Why a template gave no text: one line."""


class Renderer:
    """One worker for all templates of this process, started when first asked; started again after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process, self._owner, self._said = None, None, None

    def render(self, source: str, variables: dict, *, date: str = "", seconds: float | None = None) -> str:
        """The template's text.

        Args:
          source: the template. variables: what it sees, JSON.
          date: YYYY-MM-DD, what it takes for today; "": today.
          seconds: its time; None: `SECONDS`.

        Raises:
          RenderError: it raised, or did not keep within time, memory or length.
        """
        seconds = SECONDS if seconds is None else seconds
        line = json.dumps({"source": source, "variables": variables, "date": date}).encode() + b"\n"
        with self._lock:
            try:
                self._start()
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
            self._said.close()

    def _start(self) -> None:
        if self._owner != os.getpid():  # after a fork the parent's worker is the parent's
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(WORKER), *_places()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                start_new_session=True,  # Ctrl-C is for the run, which ends the worker itself
            )
            os.set_blocking(self._process.stdin.fileno(), False)
            os.set_blocking(self._process.stdout.fileno(), False)
            self._exchange(b"", time.monotonic() + START_SECONDS, START_SECONDS)  # it has its imports

    def _exchange(self, line: bytes, deadline: float, seconds: float) -> bytes:
        """Sends a line and returns the line that comes back."""
        source, sink = self._process.stdout.fileno(), self._process.stdin.fileno()
        got, left = bytearray(), memoryview(line)
        while not got.endswith(b"\n"):
            wait = deadline - time.monotonic()
            ready = select.select([source], [sink] if left else [], [], max(wait, 0))
            if not any(ready):
                raise RenderError(f"it takes more than {seconds:g} s: a loop without end?")
            try:
                if ready[1]:
                    left = left[os.write(sink, left[:CHUNK]) :]
                part = os.read(source, CHUNK) if ready[0] else None
            except BrokenPipeError:
                part = b""
            if part == b"" or len(got) > BYTES:
                raise RenderError(f"the process that renders it ended: {self._last_words()}")
            got += part or b""
        return bytes(got)

    def _last_words(self) -> str:
        """What the worker said last."""
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 2000))
        words = self._said.read().decode(errors="replace").strip().splitlines()
        return words[-1][:200] if words else "out of memory?"


def _places() -> list[str]:
    """Where this process has the worker's packages from: Python's isolated mode looks in no folder of the user's."""
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    return list(dict.fromkeys(str(pathlib.Path(spec.origin).parents[1]) for spec in found if spec and spec.origin))


shared = Renderer()
atexit.register(shared.close)
