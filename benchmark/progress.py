"""Progress on stderr: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robench.defenses.trainer import EpochLog, Watcher

QUIET_SECONDS = 15.0  # between two lines of one task where there is no terminal
Update = Callable[[float, str], None]  # share done in [0, 1], metrics as text


class Reporter:
    """Says what happens. Results go to stdout; everything here goes to stderr."""

    def __init__(self, *, quiet: bool = False, bars: bool = True) -> None:
        self.quiet = quiet
        self.bars = bars and sys.stderr.isatty()  # several processes cannot share one terminal
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

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
        elif self.bars:
            with self._bar(label) as update:
                yield update
        else:
            with self._lines(label) as update:
                yield update

    @contextmanager
    def _bar(self, label: str) -> Iterator[Update]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(label, total=1.0, metrics="")
            yield lambda share, text: bar.update(task, completed=share, metrics=text)

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


class EpochWatcher(Watcher):
    """Shows a training run in a task."""

    def __init__(self, update: Update, epochs: int) -> None:
        self.update, self.epochs, self.text = update, epochs, ""

    def step(self, epoch: int, step: int, steps: int) -> None:
        self.update((epoch + step / steps) / self.epochs, self.text)

    def epoch(self, log: EpochLog) -> None:
        parts = [f"epoch {log.epoch + 1}/{self.epochs}", f"loss {log.losses['total']:.3f}"]
        for name, value in (("clean", log.clean), ("pgd", log.robust), ("swa pgd", log.swa_robust)):
            if value is not None:
                parts.append(f"{name} {value:.1%}")
        self.text = "  ".join(parts)
        self.update((log.epoch + 1) / self.epochs, self.text)
