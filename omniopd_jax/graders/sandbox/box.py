"""What runs in a box that bubblewrap made: the keeper of one program, or the judges of all.

The keeper imports little: it is started afresh for each program.
"""

import json
import os
import signal
import sys

import keeper
import kernel


def main():
    """The life of a box's first process. Arguments: keeper or judges, and the descriptors of each."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # PID 1 takes only the signals that it handles: none
    if sys.argv[1] == "judges":
        return serve_judges(int(sys.argv[2]))
    kernel.import_from("/python")
    order, numbers = int(sys.argv[2]), sys.argv[3]
    with os.fdopen(order, "rb") as f:
        spec = json.loads(f.read())
    for i, text in enumerate(spec["programs"]):
        with open(f"/programs/program.py.{i}" if i else "/programs/program.py", "wb") as f:
            f.write(text.encode("utf-8", "replace"))
    with open("/programs/passwd", "wb") as f:
        f.write(b"nobody:x:65534:65534::/work:\n")
    kernel.mount("none", "/programs", "", kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)
    return keeper.keep_and_tell(spec, *(int(n) if n else None for n in numbers.split(",")))


def serve_judges(number):
    """Forks a judge for each message of descriptors, until the other end closes."""
    import collections  # noqa: F401 - here once, for all judges
    import datetime  # noqa: F401
    import decimal  # noqa: F401
    import fractions  # noqa: F401
    import socket

    import outer

    kernel.import_from("/python")
    orders = socket.socket(fileno=number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1, 8)
        if not message:
            return
        if os.fork() == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                orders.close()
                outer.judge_alone(*fds)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)
