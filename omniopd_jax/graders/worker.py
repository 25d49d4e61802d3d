"""The side of the worker processes (processes.py): a server that has its imports forks one worker per connection.

A worker reads one JSON value per line and writes true or false per line. It is apart from the process that trains,
because what it holds can be made to compute for hours, because only a process can be stopped for certain, and because
SIGALRM works in a main thread alone; here it is the main thread.
"""

import contextlib
import faulthandler
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable


class OutOfTime(BaseException):
    """Not an Exception, so that no handler within a library takes it for a mistake of its own."""


def main(answer: Callable, *, warm_up: Callable = lambda: None, settle: Callable = lambda: None) -> None:
    """Serves until standard input closes: each descriptor that arrives there is one worker's connection.

    Arguments of the command line: seconds per question, MiB of memory.

    Args:
      answer: `answer(question, limited)` says true or false; within `limited()`, a context, the seconds count.
      warm_up: called once, before the first fork.
      settle: called in each worker before its first question.
    """
    seconds, memory_mb = float(sys.argv[1]), int(sys.argv[2])
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(100_000)
    orders = socket.socket(fileno=0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers leave no entry
    warm_up()
    gc.freeze()
    orders.sendall(b"r")
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            orders.close()
            try:
                _serve(socket.socket(fileno=fds[0]), answer, settle, seconds, memory_mb)
            finally:
                os._exit(0)
        os.close(fds[0])


def _serve(connection, answer, settle, seconds, memory_mb):
    """One worker's life: its PID, then an answer per line, until the other end closes."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20,) * 2)
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - the watchdog's, for as long as the process lives

    def ring(number, frame):
        raise OutOfTime

    @contextlib.contextmanager
    def limited():
        # one second more and the watchdog, a thread of C, ends the process, whatever it computes
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()

    signal.signal(signal.SIGALRM, ring)
    settle()
    connection.sendall(b"%d\n" % os.getpid())
    for line in connection.makefile("rb"):
        try:
            result = bool(answer(json.loads(line), limited))
        except (Exception, OutOfTime):  # unreadable is wrong: MemoryError and RecursionError are Exceptions too
            result = False
        connection.sendall(json.dumps(result).encode() + b"\n")
