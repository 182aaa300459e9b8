"""Stops a run in good order: at the next step it writes a checkpoint and ends.

A run is asked to stop by SIGTERM, which clusters send before they take a machine away, or by a file named `stop` in its
folder, which any machine that sees the folder can make.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

POLL_SECONDS = 1.0
AGAIN_SECONDS = 5.0


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self, asked_elsewhere: Callable[[], bool] = lambda: False, poll_seconds: float = POLL_SECONDS) -> None:
        """Nothing is asked yet; `asked_elsewhere` is looked at once in so many seconds."""
        self._asked = False
        self._elsewhere = asked_elsewhere
        self._poll_seconds = poll_seconds
        self._looked = -poll_seconds

    def __bool__(self) -> bool:
        now = time.monotonic()
        if not self._asked and now - self._looked >= self._poll_seconds:
            self._looked = now
            with suppress(OSError):  # an object store that is away for a moment: it is asked again
                self._asked = self._elsewhere()
        return self._asked

    def ask(self, *_: Any) -> None:
        """Ask this process to stop."""
        self._asked = True


@contextmanager
def on_sigterm(act: Callable[..., None]) -> Iterator[None]:
    """Call `act` when SIGTERM arrives; another after some seconds ends the process as ever.

    What comes sooner is the same request, by another way: launchers pass on what the scheduler sends to every process. Only
    the main thread can listen for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first = math.inf

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if time.monotonic() > first + AGAIN_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        elif first == math.inf:
            first = time.monotonic()
            act()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
