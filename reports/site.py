"""A site of several runs: a page for each, and one with their leaderboards that leads to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from robench.errors import UsageError
from robench.files import write_atomic
from robench.reports import tables
from robench.reports.analyses import LEGEND
from robench.reports.boards import leaderboards
from robench.reports.page import Section, page, rendered, summary
from robench.reports.store import RECORDS, load
from robench.reports.text import condensed

INDEX = "index.html"


def site(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the pages into `out` and return their paths, that of the index first.

    folders: runs, or folders of runs. Raises UsageError: there is no run, or two have one name.
    """
    runs = [run for folder in folders for run in _runs(folder)]
    names = [run.resolve().name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two runs are called {twice[0]!r}: rename the folder of one")
    overview: list[Section] = []
    pages: dict[str, str] = {}
    for run, name in zip(runs, names, strict=True):
        results, file = load([run]), f"{name}.html"
        if file == INDEX:
            raise UsageError(f"{run}: a run cannot be called {name!r} on a site")
        pages[file] = page(results, out)
        boards = list(map(condensed, leaderboards(tables.leaderboard(results.records))))
        overview.append(Section(f"run-{len(overview)}", name, f"{summary(results)}.", boards,
                                legend=LEGEND, link=f"./{quote(file)}"))
    count = f"{len(runs)} run" + "s" * (len(runs) > 1)
    for file, text in {INDEX: rendered(overview, count), **pages}.items():
        write_atomic(out / file, text)
    return [out / file for file in (INDEX, *pages)]


def _runs(folder: Path) -> list[Path]:
    """The folder if it is a run, else the runs in it, by name."""
    if (folder / RECORDS).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{RECORDS}"))
    if not found:
        raise UsageError(f"{folder}: no run there, that is, no folder with a {RECORDS}")
    return found
