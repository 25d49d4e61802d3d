"""The outer process of the sandbox: makes the namespaces, starts the keeper, and judges assert tests."""

import json
import os
import signal
import sys
from contextlib import suppress

import asserts
import kernel
import remote
from keeper import MOST_DIGITS, keep, send_line


def read_frame(fd):
    """One message of 8 bytes of length and as many of JSON; None at the end of the stream."""
    head = read_exactly(fd, 8)
    body = head and read_exactly(fd, int.from_bytes(head, "big"))
    return None if body is None else json.loads(body)


def read_exactly(fd, count):
    """Reads `count` bytes; None where the stream ends before."""
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def judge(channel, status, out):
    """The outer process of assert tests: runs the tests against the program and writes one verdict."""
    request = read_frame(0)
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    sys.set_int_max_str_digits(MOST_DIGITS)
    reason, detail = asserts.check(channel, request)
    if reason == "gone":  # the program went away: the keeper knows why
        os.close(channel)
        line = read_line(status)
        told = json.loads(line) if line else {"reason": "exit", "code": -9, "detail": "the sandbox ended"}
        reason = told["reason"] if told["reason"] != "exit" else "error"
        detail = told["detail"] or detail or f"exit code {told['code']}"
    else:
        os.set_blocking(status, False)
        line = read_line(status)  # a limit was broken while the tests still ran: that counts
        if line and json.loads(line)["reason"] != "exit":
            told = json.loads(line)
            reason, detail = told["reason"], told["detail"]
    send_line(out, {"reason": reason, "detail": detail})


def read_line(fd):
    """The first line that waits on `fd`, b"" where there is none."""
    data = bytearray()
    with suppress(BlockingIOError):
        while not data.endswith(b"\n") and (part := os.read(fd, 1)):  # one by one: what follows is another's
            data += part
    return bytes(data)


def main():
    """Reads the order from standard input, sets the stage, and sees it through."""
    os.closerange(3, 65536)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # PID 1 takes only the signals that it handles: none
    spec = read_frame(0)
    limits, judging = spec["limits"], spec["cases"] is None
    signal.alarm(int(limits["total_seconds"] if not judging else limits["wall_seconds"]) + 5)
    out = os.dup(1)
    os.dup2(os.open("/dev/null", os.O_RDWR), 1)
    leash_r, leash_w = os.pipe()
    status_r, status_w = os.pipe()
    here, there = kernel.socket_pair() if judging else (None, None)
    isolated, script = not spec["unsafe"], b""
    try:
        if isolated:
            with open(remote.__cached__ if os.path.exists(remote.__cached__) else remote.__file__, "rb") as f:
                script = f.read()
            os.chdir(spec["prefix"])
            kernel.enter_namespaces()
    except OSError as error:
        return send_line(out, {"refused": error.strerror or str(error)})
    keeper = os.fork()
    if keeper == 0:
        try:
            for fd in filter(None, (leash_w, status_r, here)):
                os.close(fd)
            os.dup2(1, 0)
            kernel.call("prctl", kernel.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            try:
                if isolated:
                    kernel.build_root(spec, script)
                    kernel.import_from("/python")
            except OSError as error:
                return send_line(out, {"refused": error.strerror or str(error)})
            send_line(out, {"ready": True})  # no program has run yet: only up to here a refusal is believed
            send_line(status_w, {})
            keep(spec, (leash_r, out), status_w if judging else out, there)
        except Exception as error:  # the machine's own trouble, say no process to be had: this program's grade alone
            told = {"reason": "error", "code": 0, "stdout": "", "detail": f"sandbox: {type(error).__name__}: {error}"}
            send_line(status_w if judging else out, told)
        finally:
            os._exit(0)
    for fd in filter(None, (leash_r, status_w, there)):
        os.close(fd)
    if not read_line(status_r):
        return None
    if isolated:
        kernel.enter_box()
        kernel.import_from("/python")
    if judging:
        kernel.set_limits(limits | {"memory_mb": limits["memory_mb"] + 256}, isolated)
    if isolated:
        kernel.drop_rights(kernel.seccomp_filter(judge=True))
    kernel.call("prctl", kernel.PR_SET_DUMPABLE, 0, 0, 0, 0)
    if judging:
        judge(here, status_r, out)
        os.close(leash_w)  # the keeper ends with it, and the program with the keeper
    os.waitpid(keeper, 0)
    return None
