"""The registry of reports, and `render`, which runs them all. Light: no pandas, no matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from robench.registry import Registry
from robench.reports.store import Results, anchored, save

# Writes files into the folder and returns their paths; the same results give the same bytes.
Report = Callable[[Results, Path], list[Path]]


def _builtin() -> None:
    importlib.import_module("robench.reports.writers")


REPORTS: Registry[Report] = Registry("report", "robench.reports", _builtin)


def render(results: Results, out: Path) -> list[Path]:
    """Write the data files and every registered report into `out`; returns the paths.

    The data come first, so that a report that fails costs none of them. Relative paths of flags
    are taken as relative to `out`. Files are byte-identical for identical results. Raises
    RobenchError if the disk refuses or a file of flags is damaged.
    """
    paths = save(out, results)
    results = anchored(results, out)
    for entry in REPORTS:
        paths += entry.value(results, out)
    return paths


def summary(results: Results) -> str:
    """The leaderboards in Markdown, for the terminal."""
    from robench.reports.writers import leaderboard_text

    return leaderboard_text(results)
