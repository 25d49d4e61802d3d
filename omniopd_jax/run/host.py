"""What surrounds the loop on the host: an asyncio thread for the teacher, and signals that ask for a clean end."""

import asyncio
import atexit
import concurrent.futures
import contextlib
import signal
import threading

CANCEL_S = 10.0  # how long the end of cancelled calls is waited for
RESUME_EXIT_CODE = 75  # after a signal: the state is saved, start me again (EX_TEMPFAIL)


class AsyncThread:
    """An asyncio loop in a thread of its own, so that teachers are asked while the main thread samples."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teachers", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # also where loading or a probe is ended by a signal

    def submit(self, coroutine):
        """Starts a coroutine; returns its concurrent Future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancels what is still under way and waits for its end, then stops the loop and its thread."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.submit(self._cancel_all()).result(timeout=CANCEL_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


class StopFlag:
    """SIGTERM and SIGINT ask for a clean end: inside the loop the state is saved first. A second SIGINT ends at once.

    Outside the loop (`in_loop` false) everything that a resume needs is on disk, so the process ends at once, with the
    same exit code.
    """

    def __init__(self):
        self.requested: str | None = None  # of this process
        self.agreed: str | None = None  # of all: what the loop acts on
        self.in_loop = False

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self):
        """Inside, a signal is only noted: the loop saves, then ends."""
        self.in_loop = True
        try:
            yield
        finally:
            self.in_loop = False

    def _catch(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if not self.in_loop:
            raise SystemExit(RESUME_EXIT_CODE)
