"""Progress on stderr: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robench.defenses.trainer import EpochLog, Watcher

FINISHED_BARS = 8  # that are shown beside those of tasks that run
QUIET_SECONDS = 15.0  # between two lines of one task where there is no terminal
Update = Callable[[float, str], None]  # share done in [0, 1], metrics as text
Message = tuple[str, Any, Any, Any]


class Sender(Protocol):
    """The end of a queue that a worker has."""

    def put(self, message: Message, /) -> None: ...


class Receiver(Protocol):
    """The end of a queue that the command has."""

    def get(self) -> Message: ...


class Reporter:
    """Says what happens. Results go to stdout; everything here goes to stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
        )
        self._bars = Progress(*columns, console=self.console)  # one display for all tasks

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A warning is shown even when quiet."""
        self.console.print(f"warning: {text}", markup=False)

    @contextmanager
    def task(self, label: str) -> Iterator[Update]:
        """Yields a function to call with the share done and a text of metrics."""
        if self.quiet:
            yield lambda share, text: None
        elif sys.stderr.isatty():
            with self._bar(label) as update:
                yield update
        else:
            with self._lines(label) as update:
                yield update

    @contextmanager
    def _bar(self, label: str) -> Iterator[Update]:
        self._bars.start()
        task = self._bars.add_task(label, total=1.0, metrics="")
        try:
            yield lambda share, text: self._bars.update(task, completed=share, metrics=text)
        finally:
            self._bars.stop_task(task)
            ended = [t.id for t in self._bars.tasks if t.finished or t.stop_time is not None]
            if len(ended) == len(self._bars.tasks):
                self._bars.stop()  # leaves the bars on the screen
            else:  # many workers may have thousands, and a screen has few lines
                ended = ended[:-FINISHED_BARS]
            for old in ended:
                self._bars.remove_task(old)

    @contextmanager
    def _lines(self, label: str) -> Iterator[Update]:
        began = last = time.monotonic()
        metrics = ""

        def update(share: float, text: str) -> None:
            nonlocal last, metrics
            now, metrics = time.monotonic(), text
            if now - last >= QUIET_SECONDS and 0 < share < 1:
                last = now
                left = (now - began) / share * (1 - share)
                self.say(f"{label}: {share:.0%}, {left:.0f} s left  {text}")

        yield update
        if time.monotonic() - began >= 1:  # what is quick needs no line
            self.say(f"{label}: {time.monotonic() - began:.0f} s  {metrics}")

    def relay(self, messages: Receiver) -> None:
        """Show what Remote reporters send, until a message "end"."""
        tasks: dict[Any, contextlib.ExitStack] = {}
        updates: dict[Any, Update] = {}
        said = set[str]()
        while (message := messages.get())[0] != "end":
            kind, key, *content = message
            if kind == "open":
                tasks[key] = contextlib.ExitStack()
                updates[key] = tasks[key].enter_context(self.task(content[0]))
            elif kind == "update":
                updates[key](*content)
            elif kind == "close":
                tasks.pop(key).close()
                del updates[key]
            elif kind == "say":
                self.say(content[0])
            elif content[0] not in said:  # several workers may look at one network
                said.add(content[0])
                self.warn(content[0])
        for task in tasks.values():  # of processes that died
            task.close()


class Remote(Reporter):
    """The reporter of a worker process: sends everything to its parent's."""

    def __init__(self, messages: Sender) -> None:
        super().__init__()
        self._messages = messages
        self._numbers = itertools.count()

    def say(self, text: str) -> None:
        self._messages.put(("say", None, text, None))

    def warn(self, text: str) -> None:
        self._messages.put(("warn", None, text, None))

    @contextmanager
    def task(self, label: str) -> Iterator[Update]:
        key, last = (platform.node(), os.getpid(), next(self._numbers)), 0.0

        def update(share: float, text: str) -> None:
            nonlocal last
            if share >= 1 or time.monotonic() - last > 0.2:  # a person cannot read faster
                last = time.monotonic()
                self._messages.put(("update", key, share, text))

        self._messages.put(("open", key, label, None))
        try:
            yield update
        finally:
            self._messages.put(("close", key, None, None))


@contextmanager
def relayed(reporter: Reporter) -> Iterator[Queue[Message]]:
    """A queue through which the Remote reporters of other processes use this one."""
    messages: Queue[Message] = multiprocessing.get_context("spawn").Queue()
    done = threading.Event()
    screen = threading.Thread(target=reporter.relay, args=(_Until(messages, done),), daemon=True)
    screen.start()
    try:
        yield messages
    finally:
        done.set()
        screen.join(5)  # who was killed while it wrote may have left half a message


class _Until:
    """The messages of a queue, and an end once all are read that were there when it was `done`.

    The end is no message of the queue: this process would start a thread to send it, which waits
    forever where a killed worker holds the lock; left behind, it drops that lock when the process
    is already ending, and the semaphore leaks.
    """

    def __init__(self, messages: Queue[Message], done: threading.Event) -> None:
        self._messages, self._done = messages, done

    def get(self) -> Message:
        while True:
            over = self._done.is_set()
            try:
                return self._messages.get(timeout=0.1)
            except queue.Empty:
                if over:
                    return "end", None, None, None


class EpochWatcher(Watcher):
    """Shows a training run in a task: speed, losses, and the accuracies of the last epoch.

    images: in an epoch.
    """

    def __init__(
        self, update: Update, epochs: int, images: int, warn: Callable[[str], None]
    ) -> None:
        self._update, self._epochs, self._images, self._warn = update, epochs, images, warn
        self._losses = self._accuracies = ""
        self._began = time.monotonic()

    def begin(self, history: Sequence[EpochLog]) -> None:
        self._began = time.monotonic()
        if history:
            self._accuracies = _accuracies(history[-1])

    def step(self, epoch: int, step: int, steps: int) -> None:
        done = step / steps
        speed = done * self._images / max(time.monotonic() - self._began, 1e-6)
        self._show(epoch, epoch + done, f"{speed:.0f} images/s")

    def losses(self, means: Mapping[str, float]) -> None:
        self._losses = _losses(means)

    def epoch(self, log: EpochLog) -> None:
        self._losses, self._accuracies = _losses(log.losses), _accuracies(log)
        self._show(log.epoch, log.epoch + 1, f"{log.images_per_second:.0f} images/s")
        self._began = time.monotonic()

    def warn(self, text: str) -> None:
        self._warn(text)

    def _show(self, epoch: int, done: float, speed: str) -> None:
        parts = (f"epoch {epoch + 1}/{self._epochs}", speed, self._losses, self._accuracies)
        self._update(done / self._epochs, "  ".join(part for part in parts if part))


def _losses(means: Mapping[str, float]) -> str:
    """The total, and its parts if there are several."""
    parts = {name: value for name, value in means.items() if name != "total"}
    text = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return f"loss {means['total']:.3f}" + (f" ({text})" if len(parts) > 1 else "")


def _accuracies(log: EpochLog) -> str:
    values = {"clean": log.clean, "pgd": log.robust}
    values |= {f"{name} pgd": robust for name, (_, robust) in log.averages.items()}
    return "  ".join(f"{name} {value:.1%}" for name, value in values.items() if value is not None)
