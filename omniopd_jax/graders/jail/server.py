"""Forks an outer process for each order, so that a grading does not pay for another start of Python and its imports.

Standard input is a local socket on which each order arrives as the descriptor of its own connection. The server reads
none of them: it never holds a program or a test, so that each child starts from the same clean state.
"""

import os
import signal
import socket
import sys


def main():
    """Serves until the other end of standard input closes."""
    # here once, for every child that judges asserts, and from the machine's own files
    import ast  # noqa: F401
    import collections  # noqa: F401
    import datetime  # noqa: F401
    import decimal  # noqa: F401
    import fractions  # noqa: F401

    import outer

    del sys.path[0]  # this folder: its files are imported by now

    orders = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1, 1)
        while reap():
            pass
        if not message:
            return
        if os.fork() == 0:
            try:
                os.dup2(fds[0], 0)
                os.dup2(fds[0], 1)
                outer.main()
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(0)
        os.close(fds[0])


def reap():
    """Whether a child that had ended was found."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0
