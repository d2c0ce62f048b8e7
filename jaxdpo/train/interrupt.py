"""Ctrl-C and SIGTERM: a run in training ends after its step, saved; whatever else runs ends at once.

SIGTERM is what schedulers and cloud machines send before they take a machine away.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises within `terminable`, as Ctrl-C raises KeyboardInterrupt."""


class Interruption:
    """After `hold`, the first Ctrl-C or SIGTERM sets `requested`; the second does what it did before.

    Handlers belong to a program's main thread: in another thread nothing is ever requested.

    Example:
      >>> with Interruption() as stop:
      ...     stop.hold()
      ...     signal.raise_signal(signal.SIGTERM)
      ...     stop.requested
      True
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that came."""
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self.signal is not None

    def __enter__(self) -> "Interruption":
        return self

    def hold(self) -> None:
        """From here on there is something to save; what comes earlier, as while compiling, ends the run at once."""
        if not self._former and threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._restore()
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number)
        # Not `print`: what it writes to may be in use at this very moment.
        os.write(2, f"\n{self.signal.name}: stopping after this step; once more to stop now\n".encode())


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`, so that what is being written is cleared away, as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
