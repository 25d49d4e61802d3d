"""The processes that compare mathematical answers: one that loads everything, and forks a worker per connection.

A worker reads one JSON list [text, answer] per line and writes true or false per line. It is apart from the process
that trains, because sympy can be sent to compute for hours, because only a process can be stopped for certain, and
because the library's own time limit (SIGALRM) works in a main thread alone; here it is the main thread. A fork has the
imports and, above all, what ANTLR's parser builds while it reads its first expressions: a cold one reads about 10 a
second.
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

from omniopd_jax.graders.math_equal import grade


class OutOfTime(BaseException):
    """Not an Exception, so that no handler within sympy takes it for a mistake of its own."""


WARM_UP = (  # expressions of the usual kinds, for the parser's tables
    ("3x^2-5x+\\frac{1}{2}", "3x^2-4x+\\frac{1}{2}"),
    ("\\frac{\\sqrt{2}}{2}", "\\sqrt{3}"),
    ("2\\pi r", "2\\pi r^2"),
    ("x=\\frac{-b\\pm\\sqrt{b^2-4ac}}{2a}", "x=1"),
    ("[-2,7) \\cup (8,\\infty)", "(-\\infty,-2) \\cup (3,5]"),
    ("x^2+y^2=4", "y=2x+3"),
    ("-1 \\le x < 4", "[-1,4)"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "5"),
    ("\\sin x + \\cos^2 x", "\\ln 2 + e^{x}"),
    ("\\binom{5}{2}+5!", "\\log_2 3"),
    ("(x+1)(x-2)^3", "(x-1)(x+2)"),
    ("3+4i", "2-i"),
    ("10^{-6}", "1.5 \\times 10^{3}"),
    ("\\sqrt[3]{16}", "2^{\\frac{1}{3}}"),
    ("\\{1,2,3\\}", "\\{4,5\\}"),
    ("\\frac{a+b}{c-d}", "\\frac{a}{b}+\\frac{c}{d}"),
    ("x>3", "x<-3"),
    ("90^\\circ", "45^{\\circ}"),
    ("\\emptyset", "|x-1|"),
    ("The value is $\\frac{1}{2}$ and $x = 3$.", "7"),
    ("x \\in \\mathbb{R}", "y = \\pm 1"),
    ("\\int_0^1 x dx", "a_1 b_2"),
)


def main():
    """Serves until standard input closes: each descriptor that arrives there is one worker's connection.

    Arguments: seconds per pair, MiB of memory.
    """
    seconds, memory_mb = float(sys.argv[1]), int(sys.argv[2])
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(100_000)
    orders = socket.socket(fileno=0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers leave no entry
    for got, gold in WARM_UP:
        with contextlib.suppress(Exception):
            grade(f"\\boxed{{{got}}}" if "$" not in got else got, gold)
    gc.freeze()
    orders.sendall(b"r")
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            orders.close()
            try:
                serve(socket.socket(fileno=fds[0]), seconds, memory_mb)
            finally:
                os._exit(0)
        os.close(fds[0])


def serve(connection, seconds, memory_mb):
    """One worker's life: its PID, then an answer per line, until the other end closes."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20,) * 2)
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - the watchdog's, for as long as the process lives

    def ring(number, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    connection.sendall(b"%d\n" % os.getpid())
    for line in connection.makefile("rb"):
        # one second more and the watchdog, a thread of C, ends the process, whatever it computes
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                result = bool(grade(*json.loads(line)))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (Exception, OutOfTime):  # unreadable is wrong: MemoryError and RecursionError are Exceptions too
            result = False
        faulthandler.cancel_dump_traceback_later()
        connection.sendall(json.dumps(result).encode() + b"\n")
