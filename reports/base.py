"""The registry of reports, and `render`, which runs them. Light: no pandas, no matplotlib.

The last word of a report's name is its format: "leaderboard-csv" and "rob-f-csv" are written for
`--format csv`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path

from robench.registry import Entry, Registry, unknown
from robench.reports.store import Results, anchored, save

# Writes files into the folder and returns their paths; the same results give the same bytes.
Report = Callable[[Results, Path], list[Path]]
ASKED = {"robustbench"}  # formats that are written only when they are named


def _builtin() -> None:
    importlib.import_module("robench.reports.writers")


REPORTS: Registry[Report] = Registry("report", "robench.reports", _builtin)


def format_of(entry: Entry[Report]) -> str:
    """The format that a report is written for."""
    return entry.name.rpartition("-")[2]


def render(results: Results, out: Path, formats: Collection[str] = ()) -> list[Path]:
    """Write the data files and the reports of some formats into `out`; returns the paths.

    Without `formats` all are written but those that must be asked for. The data come first, so
    that a report that fails costs none of them. Relative paths of flags are taken as relative to
    `out`. Files are byte-identical for identical results. Raises UsageError for an unknown format,
    and RobenchError if the disk refuses or a file of flags is damaged.
    """
    known = {format_of(entry) for entry in REPORTS}
    for name in formats:
        if name not in known:
            raise unknown("format", name, known)
    wanted = set(formats) or known - ASKED
    paths = save(out, results)
    results = anchored(results, out)
    for entry in REPORTS:
        if format_of(entry) in wanted:
            paths += entry.value(results, out)
    return paths


def summary(results: Results) -> str:
    """The leaderboards in Markdown, for the terminal."""
    from robench.reports.writers import leaderboard_text

    return leaderboard_text(results)
