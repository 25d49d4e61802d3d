"""PID 1 of the sandbox: starts the program, watches time, output and memory, kills and reaps everything."""

import json
import os
import resource
import select
import signal
import time
from contextlib import suppress

import kernel

MOST_DIGITS = 50_000  # of an integer as text, as LiveCodeBench's harness has it; Python's own limit is 4,300
START = """import builtins, sys
def _start():
    builtins.exit = builtins.quit = sys.exit
    path, count, preamble = sys.argv[1:]
    sys.argv[:], globals()["__file__"] = [path], path
    failed = None
    for i in range(int(count)):
        try:
            with open(f"{path}.{i}" if i else path, "rb") as f:
                return preamble, compile(f.read(), path, "exec")
        except (SyntaxError, ValueError) as error:
            failed = failed or error
    raise failed
_start = _start()
del builtins, sys
exec(_start[0])
exec(_start[1])
"""


def send_line(fd, value):
    """Writes one line of JSON, however long."""
    data = memoryview(json.dumps(value).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


class Keeper:
    """Starts programs, watches them and clears up after each."""

    def __init__(self, spec, leashes):
        self.spec, self.limits, self.leashes = spec, spec["limits"], leashes
        self.filter = kernel.seccomp_filter()
        self.isolated = os.getpid() == 1  # the only thing that makes kill(-1) safe

    def run(self, stdin, channel=None, end=float("inf")):
        """Runs the program once.

        Args:
          stdin: its standard input, or None for an empty one.
          channel: the descriptor that becomes its number 3, or None.
          end: the time of the monotonic clock when it must be over, wall limit or not.

        Returns:
          dict with `reason` (exit, timeout, memory, output), `code`, `stdout` and `detail` (end of stderr).
        """
        source = input_file(stdin)
        out_r, out_w = os.pipe()
        err_r, err_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.become_program([source, out_w, err_w] + ([channel] if channel is not None else []))
        for fd in (source, out_w, err_w, *([channel] if channel is not None else [])):
            os.close(fd)
        return self.watch(pid, out_r, err_r, min(end, time.monotonic() + self.limits["wall_seconds"]))

    def become_program(self, fds):
        """In the child: the program's descriptors, limits, rights and image. Does not return."""
        try:
            os.setsid()
            high = [os.dup2(fd, 100 + i, inheritable=True) for i, fd in enumerate(fds)]  # off the numbers they go to
            for i, fd in enumerate(high):
                os.dup2(fd, i)
            os.closerange(len(fds), 4096 if self.isolated else 65536)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            if self.isolated:
                kernel.add_scratch(self.limits)
            kernel.set_limits(self.limits, self.isolated)
            kernel.call("prctl", kernel.PR_SET_THP_DISABLE, 1, 0, 0, 0)
            os.chdir(self.spec["work"])
            os.umask(0o077)
            env = {"HOME": self.spec["work"], "TMPDIR": self.spec["work"], "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
            if self.isolated:
                env |= {"TMPDIR": "/tmp", "PATH": "/python/bin", "LD_LIBRARY_PATH": "/python/lib"}
                kernel.drop_rights(self.filter)
            python, program, remote = (self.spec["paths"][name] for name in ("python", "program", "remote"))
            # not -I: the environment is ours, and the hash seed in it makes two gradings equal
            options = ["-s", "-S", "-P", "-B", "-X", "utf8", "-X", f"int_max_str_digits={MOST_DIGITS}"]
            script = [remote] if len(fds) > 3 else ["-c", START]
            arguments = [program, str(len(self.spec["programs"])), self.spec["preamble"]]
            os.execve(python, [python, *options, *script, *arguments], env)
        except BaseException as error:
            os.write(2, f"sandbox: {error}".encode())
        finally:
            os._exit(127)

    def watch(self, pid, out_r, err_r, end):
        """Waits for the program's end or a limit, kills what is left, and says how it went."""
        handle = os.pidfd_open(pid)
        poll = select.poll()
        kept = {out_r: bytearray(), err_r: bytearray()}
        for fd in (handle, out_r, err_r):
            poll.register(fd, select.POLLIN)
            os.set_blocking(fd, False)
        for fd in self.leashes:
            poll.register(fd, 0)  # to be told when the other end closes
        most, reason = self.limits["output_kb"] * 1024, None
        look = time.monotonic() + 0.05
        ended = False
        while not ended and reason is None:
            now = time.monotonic()
            for fd, _ in poll.poll(max(0, min(end - now, 0.05)) * 1000):
                if fd in self.leashes:  # no one waits for this program any more
                    self.clear(pid)
                    os._exit(1)
                elif fd == handle:
                    ended = True
                elif not read_some(fd, kept[fd]):
                    poll.unregister(fd)
            if max(map(len, kept.values())) > most:
                reason = "output"
            elif not ended and time.monotonic() >= end:
                reason = "timeout"
            elif time.monotonic() >= look:
                look = time.monotonic() + 0.05
                reason = "memory" if self.isolated and resident() > self.limits["memory_mb"] << 20 else None
        status, used = self.clear(pid)
        for fd, data in kept.items():
            while len(data) <= most and read_some(fd, data):
                pass
            os.close(fd)
        os.close(handle)
        if reason is None and max(map(len, kept.values())) > most:
            reason = "output"
        return self.describe(reason, os.waitstatus_to_exitcode(status), used, bytes(kept[out_r]), bytes(kept[err_r]))

    def clear(self, pid):
        """Kills every process below and reaps them; returns the program's exit status and CPU seconds."""
        result = (0, 0.0)
        while True:
            if self.isolated:
                with suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                kill_descendants()
            try:
                found, status, usage = os.wait4(-1, 0 if self.isolated else os.WNOHANG)
            except ChildProcessError:
                return result
            if found == pid:
                result = (status, usage.ru_utime + usage.ru_stime)
            elif found == 0:
                time.sleep(0.002)

    def describe(self, reason, code, used, out, err):
        """One result for `run`."""
        detail = err[-2000:].decode("utf-8", "replace").strip()
        if reason is None:
            over = used >= self.limits["cpu_seconds"]
            if code == -signal.SIGKILL and self.spec.get("grouped") and not over:
                reason = "memory"  # the control group's limit
            elif code == -signal.SIGXCPU or (code == -signal.SIGKILL and over):
                reason = "timeout"
            elif code and detail.rpartition("\n")[2].startswith("MemoryError"):
                reason = "memory"
        text = out.decode("utf-8", "replace") if reason is None else ""
        return {"reason": reason or "exit", "code": code, "stdout": text, "detail": detail.rpartition("\n")[2][:300]}


def input_file(text):
    """A descriptor at the start of `text`, or /dev/null for None."""
    if text is None:
        return os.open("/dev/null", os.O_RDONLY)
    fd = os.memfd_create("stdin")
    data = memoryview(text.encode("utf-8", "replace"))
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_some(fd, into):
    """Reads what is there; False at the end of the stream or where nothing waits."""
    try:
        data = os.read(fd, 1 << 16)
    except BlockingIOError:
        return False
    into += data
    return bool(data)


def kill_descendants():
    """Kills all below this process: what left its parent, as daemons do, is this one's own child by then."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as f:
            parents[int(name)] = int(f.read().rpartition(b")")[2].split()[1])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    for pid in below - {os.getpid()}:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def resident():
    """Bytes resident in all processes of the namespace but this one; 0 where /proc could not be mounted."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as f:
                    total += int(f.read().split()[1])
            except (OSError, IndexError):
                pass
    return total * resource.getpagesize()


def keep(spec, leashes, told, channel):
    """The keeper's life: every case in turn, up to the first that breaks a limit."""
    kernel.call("prctl", kernel.PR_SET_DUMPABLE, 0, 0, 0, 0)
    keeper = Keeper(spec, leashes)
    if not keeper.isolated:
        kernel.call("prctl", kernel.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if channel is not None:
        return send_line(told, keeper.run(None, channel))
    end = time.monotonic() + spec["limits"]["total_seconds"]
    for stdin in spec["cases"]:
        result = keeper.run(stdin, end=end)
        send_line(told, result)
        if result["reason"] != "exit" or result["code"]:
            break
    return None


def keep_and_tell(spec, ready, leash, told, out, channel):
    """The keeper's life in a box that is ready, from the word that it is to the word of how it went.

    Args:
      ready: where the outer process waits for that word.
      leash: the descriptor that closes with the outer process.
      told: where the runs' results go.
      out: the connection; what is said there before `ready` is believed, for no program has run.
      channel: the program's line to its judge, or None.
    """
    send_line(out, {"ready": True})
    send_line(ready, {})
    try:
        keep(spec, (leash, out), told, channel)
    except Exception as error:  # the machine's own trouble, say no process to be had: this program's grade alone
        send_line(
            told, {"reason": "error", "code": 0, "stdout": "", "detail": f"sandbox: {type(error).__name__}: {error}"}
        )
