"""What surrounds the loop on the host: an asyncio thread for the teacher, and signals that ask for a clean end."""

import asyncio
import atexit
import contextlib
import os
import pathlib
import secrets
import signal
import sys
import threading

RESUME_EXIT_CODE = 75  # after a signal: the state is saved, start me again (EX_TEMPFAIL)


def write_whole(path, text: str) -> None:
    """Writes a small file whole or not at all: a crash or a full disk leaves what was there before."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class AsyncThread:
    """An asyncio loop in a thread of its own, so that teachers are asked while the main thread samples."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teachers", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # wherever the process ends: nothing is destroyed while it is pending

    def submit(self, coroutine):
        """Starts a coroutine; returns its concurrent Future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def cancel_all(self) -> None:
        """Cancels what is still running and waits until it has ended, before what it uses is closed."""

        async def cancel():
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.submit(cancel()).result(timeout=30)

    def close(self) -> None:
        """Cancels what is under way, then stops the loop and its thread; once is enough."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        self.cancel_all()
        self.submit(self._loop.shutdown_asyncgens()).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class StopFlag:
    """SIGTERM and SIGINT ask for a clean end: inside the loop the state is saved first. A second SIGINT ends at once.

    Outside the loop (`in_loop` false) the process ends at once and says what it was doing. Its exit code is 75 where a
    checkpoint is there (`saved`), so that starting it again goes on; else 128 + the signal's number, as of any command.
    """

    def __init__(self):
        self.requested: str | None = None  # of this process
        self.agreed: str | None = None  # of all: what the loop acts on
        self.in_loop = False
        self.saved = False  # a checkpoint of the run is on disk
        self.doing = "starting"

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            # the process is about to end with its own code, which a second notice must not take the place of
            late = number == signal.SIGTERM and self.agreed == number.name
            signal.signal(number, (lambda *_: None) if late else handler)

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
            then = "the newest checkpoint is there: start again to go on" if self.saved else "nothing had to be saved"
            print(f"stopped by {self.requested} while {self.doing}; {then}", file=sys.stderr, flush=True)
            raise SystemExit(RESUME_EXIT_CODE if self.saved else 128 + number)
