"""SIGINT and SIGTERM between two steps, where what was done is whole and can be kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
_handlers: dict[int, Handler] = {}  # of the signals that wait for a step
_waiting: list[int] = []  # those that came since the last one


@contextmanager
def at_steps() -> Iterator[None]:
    """Inside, a signal that has a handler waits for the next `step`; a second SIGINT does not.

    Signals that are ignored, or end the process, go on to do so. Nothing changes where these
    blocks are nested, and outside of the main thread, where Python handles no signals.
    """
    if _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    for kind in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(kind)
        if callable(handler):
            _handlers[kind] = handler
            signal.signal(kind, _note)
    try:
        yield
    finally:
        handlers, late = dict(_handlers), list(_waiting)
        for held, handler in handlers.items():
            signal.signal(held, handler)
        _handlers.clear()
        _waiting.clear()
        for first in late[:1]:
            handlers[first](first, None)


def waiting() -> bool:
    """Whether the next `step` will be the last."""
    return bool(_waiting)


def step() -> None:
    """Handle the signal that waits: the commands of robench are interrupted here."""
    if _waiting:
        number = _waiting[0]
        _waiting.clear()
        _handlers[number](number, None)


def _note(number: int, frame: FrameType | None) -> None:
    if _waiting and number == signal.SIGINT:
        step()
    _waiting.append(number)
