"""The outer process of the sandbox: makes the namespaces, starts the keeper, and judges assert tests."""

import json
import os
import signal
import sys
from contextlib import suppress

import asserts
import kernel
import remote
from keeper import MOST_DIGITS, keep_and_tell, send_line


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
    order = read_frame(0)
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    sys.set_int_max_str_digits(MOST_DIGITS)
    reason, detail = asserts.check(channel, order)
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


def main(boxes=None, group=None):
    """Reads the order from standard input, sets the stage, and sees it through.

    Args:
      boxes: what makes boxes by bubblewrap; None: namespaces are made here.
      group: the control group of the program's processes, or None.
    """
    kept = boxes.judges.fileno() if boxes else 3
    os.closerange(3, kept)
    os.closerange(kept + bool(boxes), 65536)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # PID 1 takes only the signals that it handles: none
    spec = read_frame(0) | {"grouped": group is not None}
    limits, judging = spec["limits"], spec["cases"] is None
    signal.alarm(int(limits["total_seconds"] if not judging else limits["wall_seconds"]) + 5)
    out = os.dup(1)
    os.dup2(os.open("/dev/null", os.O_RDWR), 1)
    leash_r, leash_w = os.pipe()
    status_r, status_w = os.pipe()
    here, there = kernel.socket_pair() if judging else (None, None)
    given = (leash_r, status_w if judging else out, out, there)
    if boxes:
        return run_boxed(boxes, spec, group, given, (leash_w, status_r, status_w, here, out))
    isolated, script = not spec["unsafe"], b""
    try:
        procs = os.open(f"{group}/cgroup.procs", os.O_WRONLY) if group else None  # while it may be opened
        if isolated:
            with open(remote.__cached__ if os.path.exists(remote.__cached__) else remote.__file__, "rb") as f:
                script = f.read()
            os.chdir(spec["prefix"])
            kernel.enter_namespaces()
    except OSError as error:
        return send_line(out, {"refused": error.strerror or str(error)})
    keeper = os.fork()
    if keeper == 0:
        for fd in filter(None, (leash_w, status_r, here)):
            os.close(fd)
        os.dup2(1, 0)
        kernel.call("prctl", kernel.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        try:
            if procs is not None:
                os.write(procs, b"0")
                os.close(procs)
            if isolated:
                kernel.build_root(spec, script)
                kernel.import_from("/python")
            keep_and_tell(spec, status_w, *given)
        except OSError as error:
            send_line(out, {"refused": error.strerror or str(error)})
        finally:
            os._exit(0)
    for fd in filter(None, (leash_r, status_w, there, procs)):
        os.close(fd)
    if not read_line(status_r):
        return None
    if isolated:
        kernel.enter_box()
        kernel.import_from("/python")
    if judging:
        judge_confined(limits, isolated, here, status_r, out)
        os.close(leash_w)  # the keeper ends with it, and the program with the keeper
    elif isolated:
        kernel.drop_rights(kernel.seccomp_filter(judge=True))
    os.waitpid(keeper, 0)
    return None


def judge_confined(limits, isolated, channel, status, out):
    """Takes a judge's limits, gives up its rights, and judges."""
    kernel.set_limits(limits | {"memory_mb": limits["memory_mb"] + 256}, isolated)
    if isolated:
        kernel.drop_rights(kernel.seccomp_filter(judge=True))
    kernel.call("prctl", kernel.PR_SET_DUMPABLE, 0, 0, 0, 0)
    judge(channel, status, out)


def run_boxed(boxes, spec, group, given, own):
    """As the end of `main`, with boxes made by bubblewrap: this process only waits, outside of them."""
    leash_w, status_r, status_w, here, out = own
    keeper = os.fork()
    if keeper == 0:
        os.dup2(1, 0)
        try:
            boxes.keeper(spec, (status_w, *given), group)
        finally:
            os._exit(1)
    for fd in {given[0], status_w, given[3]} - {None}:
        os.close(fd)
    if os.geteuid() == 0:
        os.setresuid(kernel.NOBODY, kernel.NOBODY, kernel.NOBODY)
    if not read_line(status_r):  # whatever it said on the connection came before any program
        return send_line(out, {"refused": "bubblewrap made no box"})
    if here is not None:
        done_r, done_w = os.pipe()
        boxes.judge((0, here, status_r, done_w))
        for fd in (here, status_r, done_w):
            os.close(fd)
        os.read(done_r, 1)  # it closes with the judge
        os.close(leash_w)
    os.waitpid(keeper, 0)
    return None


def judge_alone(connection, channel, status, done):
    """A judge's life in the box of the judges. `done` closes with it."""
    os.dup2(connection, 0)
    out = os.dup(0)
    os.close(connection)
    limits = read_frame(0)
    signal.alarm(int(limits["wall_seconds"]) + 5)
    judge_confined(limits, True, channel, status, out)
