"""Forks an outer process for each order, so that a grading does not pay for another start of Python and its imports.

Standard input is a local socket on which each order arrives as the descriptor of its own connection. The server reads
none of them: it never holds a program or a test, so that each child starts from the same clean state. It makes the
control groups, which only this user can remove again.
"""

import os
import signal
import socket
import sys
import time

import cgroup


def main():
    """Serves until the other end of standard input closes. Arguments: bytes of a control group, bubblewrap's path or
    ""."""
    # here once, for every child that judges asserts, and from the machine's own files
    import collections  # noqa: F401
    import datetime  # noqa: F401
    import decimal  # noqa: F401
    import fractions  # noqa: F401

    import bubblewrap
    import outer

    files = sys.path.pop(0)  # this folder: what it holds is imported by now
    most, bwrap = int(sys.argv[2]), sys.argv[3]
    orders = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    judges = bubblewrap.start_judges(bwrap, files) if bwrap else None
    folder, number = cgroup.parent() if most else None, 0
    groups, ended = {}, []  # of the outer processes that run, by PID; those that can be removed once they are empty
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1, 1)
        ended = remove(ended + reap(groups))
        if not message:
            break
        number += 1
        group = cgroup.make(folder, number, most) if folder else None
        child = os.fork()
        if child == 0:
            try:
                os.dup2(fds[0], 0)
                os.dup2(fds[0], 1)
                outer.main(bwrap and bubblewrap.Boxes(bwrap, files, judges), group)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(0)
        os.close(fds[0])
        if group is not None:
            groups[child] = group
    if judges is not None:
        judges.close()
    end = time.monotonic() + 3
    while (groups or ended) and time.monotonic() < end:  # what is left ends with its connection
        ended = remove(ended + reap(groups))
        time.sleep(0.02)


def reap(groups):
    """Reaps the children that have ended; returns their groups."""
    found = []
    while True:
        try:
            pid = os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            pid = 0
        if not pid:
            return found
        if pid in groups:
            found.append(groups.pop(pid))


def remove(groups):
    """Removes the groups that are empty; returns the others."""
    return [group for group in groups if not cgroup.remove(group)]
