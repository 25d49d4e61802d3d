"""Real servers on 127.0.0.1 for as long as a `with` lasts: vLLM's CPU build, and `transformers serve`."""

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from benchmarks.real import prepare
from omniopd_jax.errors import UserError

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "teacher_vllm.sh"
START_SECONDS = 600.0  # ready after 40 to 110 s on a quiet machine
LIBC = ctypes.CDLL(None)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """One server process and its group, which ends with this process at the latest."""

    def __init__(self, command: list[str], port: int, log: pathlib.Path, env: dict[str, str] | None = None):
        self.command, self.port, self.log = command, port, log
        self.env = os.environ | (env or {})
        self.url = f"http://127.0.0.1:{port}/v1"
        self.process: subprocess.Popen | None = None

    def start(self, *, wait: bool = True) -> None:
        """Starts the process; with `wait` returns when it answers /health.

        Raises:
          UserError: it ended, or did not answer in `START_SECONDS`; with the end of its log.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when /health answers; says every 15 s that it is waited for."""
        started, told = time.monotonic(), 0
        while not self._answers():
            seconds = time.monotonic() - started
            if self.process.poll() is not None or seconds > START_SECONDS:
                self.stop()
                words = " ".join(self.log.read_text(errors="replace").split())[-600:]
                raise UserError(f"the server {' '.join(self.command[:4])} ... did not start ({self.log}): {words}")
            if seconds // 15 > told:
                told = seconds // 15
                print(f"== real: waiting for the server, {seconds:.0f} s (its log: {self.log})", flush=True)
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return reply.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the process and all that it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def texts(url: str, path: str, body: dict) -> list[str]:
    """The texts of one call, straight over HTTP: `path` is completions or chat/completions."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        choices = json.loads(reply.read())["choices"]
    return [c["text"] if "text" in c else c["message"]["content"] or "" for c in choices]


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent dies, also by kill -9 (Linux)."""
    LIBC.prctl(1, signal.SIGTERM)


def vllm(model: pathlib.Path, *more: str, name: str = "teacher", max_len: int = 1024, seqs: int = 64, log: str = "",
         threads: int = 2) -> Server:  # fmt: skip
    """vLLM's CPU build with one model, by launch/teacher_vllm.sh --cpu; `more` are flags of its own."""
    port = free_port()
    command = [
        "bash", str(LAUNCHER), "--cpu", "--python", str(prepare.python()), "--model", str(model), "--port", str(port),
        "--max-len", str(max_len), "--seqs", str(seqs), "--", "--served-model-name", name, *more,
    ]  # fmt: skip
    path = prepare.ROOT / "logs" / (log or f"vllm-{name}.log")
    return Server(command, port, path, {"OMP_NUM_THREADS": str(threads)})


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a `with` in order, as Ctrl-C does."""

    def leave(number, _):
        raise SystemExit(128 + number)

    old = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def serve_transformers(model: pathlib.Path, *more: str, log: pathlib.Path | None = None) -> Server:
    """`transformers serve` of this environment with one model; `more` are flags of its own. Its hub cache is an empty
    folder beside its log, so it serves nothing else."""
    log, port = log or prepare.ROOT / "logs" / "transformers-serve.log", free_port()
    home = (log.parent / "hub-home").resolve()
    (home / "hub").mkdir(parents=True, exist_ok=True)  # it lists the folder at its start
    command = [
        str(pathlib.Path(sys.executable).parent / "transformers"), "serve", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--device", "cpu", *more,
    ]  # fmt: skip
    return Server(command, port, log, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"})
