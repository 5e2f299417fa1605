"""Tables of committed results inside a Markdown file, written by the records and not by hand.

    <!-- robench: results/cifar10-small-resnet leaderboard -->
    ... replaced ...
    <!-- /robench -->

Several runs, with a comma between them, are merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from robench.errors import UsageError
from robench.files import write_atomic
from robench.reports import tables
from robench.reports.ablation import ablation_boards
from robench.reports.boards import leaderboards, rob_f_summary
from robench.reports.landscape import landscape_boards, sharpness
from robench.reports.store import Results, load
from robench.reports.text import Board, markdown

MARK = re.compile(r"^(<!-- robench: (?P<run>\S+) (?P<table>\S+) -->\n).*?^(<!-- /robench -->)$",
                  flags=re.DOTALL | re.MULTILINE)
TABLES: dict[str, Callable[[Results], list[Board]]] = {
    "ablation": ablation_boards,
    "leaderboard": lambda results: leaderboards(tables.leaderboard(results.records)),
    "rob_f": lambda results: rob_f_summary(tables.rob_f(results.transfers, results.records)),
    "sharpness": lambda results: landscape_boards(sharpness(results.landscapes, results.records)),
}


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
        run, name = match["run"], match["table"]
        if name not in TABLES:
            raise UsageError(f"no table {name!r}: write one of {', '.join(TABLES)}")
        boards = TABLES[name](load([folder / one for one in run.split(",")]))
        text = "\n".join(markdown(condensed(board)) for board in boards)
        return f"{match[1]}\n{_without_headings(text)}\n{match[4]}"

    return MARK.subn(table, text)


def condensed(board: Board) -> Board:
    """Columns that say the same in every row become a fact above the table, and one that repeats
    the column by which the table is ranked is left out."""
    lead = next((column for column in board.columns if column.title == board.lead), None)
    columns, same = [], []
    for column in board.columns:
        texts = [cell.text for cell in column.cells]
        if len(texts) > 1 and len(set(texts)) == 1 and column is not lead:
            same.append(f"{column.title}: {texts[0]}")
        elif lead is None or column is lead or texts != [cell.text for cell in lead.cells]:
            columns.append(column)
    facts = (*board.facts, ", ".join(same)) if same else board.facts
    return replace(board, columns=tuple(columns), facts=facts)


def _without_headings(text: str) -> str:
    """The file around it has its own; the title becomes a line of text."""
    return re.sub(r"^## (.*)$", r"**\1**", text, flags=re.MULTILINE)
