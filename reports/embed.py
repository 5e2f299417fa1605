"""Tables of committed results inside a Markdown file, written by the records and not by hand.

    <!-- robench: results/cifar10-small-resnet leaderboard -->
    ... replaced ...
    <!-- /robench -->

The table is that of the analysis of this name. Several runs, with a comma between them, are merged.
"""

from __future__ import annotations

import re
from pathlib import Path

from robench.errors import UsageError
from robench.files import write_atomic
from robench.reports.analyses import find_analysis
from robench.reports.store import load
from robench.reports.text import condensed, markdown

MARK = re.compile(r"^(<!-- robench: (?P<run>\S+) (?P<table>\S+) -->\n).*?^(<!-- /robench -->)$",
                  flags=re.DOTALL | re.MULTILINE)


def embed(path: Path) -> None:
    """Write the marked tables of a Markdown file again, from the runs that the marks name.

    Paths of runs are relative to the file.

    Raises UsageError: the file cannot be read or has no mark, there is no such run or table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    made, count = embedded(text, path.parent)
    if not count:
        raise UsageError(f"{path} has no mark: write <!-- robench: RUN leaderboard --> and, on a "
                         "later line, <!-- /robench -->")
    write_atomic(path, made)


def embedded(text: str, folder: Path) -> tuple[str, int]:
    """The text with its marked tables made anew, and how many there are."""

    def table(match: re.Match[str]) -> str:
        analysis = find_analysis(match["table"])
        boards = analysis.tables(load([folder / one for one in match["run"].split(",")]),
                                 brief=True)
        text = "\n".join(markdown(condensed(board)) for board in boards)
        return f"{match[1]}\n{_without_headings(text)}\n{match[4]}"

    return MARK.subn(table, text)


def _without_headings(text: str) -> str:
    """The file around it has its own; the title becomes a line of text."""
    return re.sub(r"^## (.*)$", r"**\1**", text, flags=re.MULTILINE)
