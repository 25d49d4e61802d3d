"""An event loop whose clock jumps to the next timer when nothing else is ready: waits of hours are tested in no
time."""

import asyncio
import selectors


class _Jumping(selectors.SelectSelector):
    """Instead of waiting for `timeout`, moves the clock on by it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("nothing will ever happen: every task waits, and no timer is set")
        self.now += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.jumping = _Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self.jumping.now


def run(coroutine):
    """`asyncio.run` on a clock of its own; real sockets and threads have no part in it."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)
