"""Stopping a run between two iterations, so that what is saved can be resumed exactly."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Turns the first SIGINT or SIGTERM inside a ``with`` block into a flag.

    A second signal raises ``KeyboardInterrupt`` where the program stands, and so does the first
    while :attr:`immediate` is true. Outside the main thread, where Python allows no signal
    handlers, the block changes nothing.

    Attributes:
        received: name of the signal that came, else an empty string.
        immediate: whether the first signal raises; for stretches that leave nothing half done.
    """

    def __init__(self) -> None:
        self.received = ""
        self.immediate = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignal:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A loader process that was forked from this one: a Ctrl-C is its parent's to handle,
            # anything else ends it.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        again = bool(self.received)
        self.received = signal.Signals(number).name
        if again or self.immediate:
            raise KeyboardInterrupt
