"""Tables for people: how numbers are written, and a table as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

NOTHING = "–"
TITLES = {"clean": "Clean", "fgsm": "FGSM", "pgd-20": "PGD-20", "cw": "CW",
          "autoattack": "AutoAttack", "worst": "Worst case"}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what it says. detail: what a wide page adds to it in small print.
        sort: the number to sort by where `text` does not begin with it.
        interval: low, mean and high in percent, for a page that draws them.
        more: a longer text, to unfold. minor: not to be relied on, printed faint.
        links: where the number comes from: "#" and the id of a row of another board, or "./" and
            the path of a file.
    """

    text: str
    detail: str = ""
    sort: float | None = None
    interval: tuple[float, float, float] | None = None
    more: str = ""
    minor: bool = False
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column under its title; `words` are aligned left, numbers right. `code` may be cut.

    Where `contest` is set, the largest number of the column is the best, and a paper marks it.
    """

    title: str
    cells: tuple[Cell, ...]
    words: bool = False
    code: bool = False
    contest: bool = False


@dataclass(frozen=True)
class Board:
    """A table for people.

    Attributes:
        title: the heading. facts: what holds for all rows. remarks: what is to be known about
            single rows.
        lead: title of the column the table is ranked by; Markdown prints its details.
        ids: of the rows, for links to them. facets: by what each row can be filtered.
    """

    title: str
    columns: tuple[Column, ...]
    facts: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    lead: str | None = None
    ids: tuple[str, ...] = ()
    facets: tuple[Mapping[str, str], ...] = ()

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def percent(value: float, n: int) -> str:
    """A percentage: two decimals from 1,000 images on, one below."""
    return f"{value:.{_decimals(n)}f}"


def points(value: float, n: int) -> str:
    """A difference in percentage points, signed, with a true minus."""
    return f"{value:+.{_decimals(n)}f}".replace("-", "−")


def p_value(p: float) -> str:
    if math.isnan(p):
        return "not paired"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 5.0 min or 3.2 h."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """950, 12.3 k or 11.2 M."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def accuracy(
    mean: float, std: float, low: float, high: float, *, n: int, failed: int, show_n: bool
) -> Cell:
    """`mean ± std over seeds`, the interval as detail; a failure is said, never left out.

    The four numbers are in percent, NaN where unknown; `failed` counts seeds.
    """
    if math.isnan(mean):
        return Cell("failed" if failed else NOTHING)
    spread = "" if math.isnan(std) else f" ± {percent(std, n)}"
    loss = f" ({failed} failed)" if failed else ""
    images = f" (n = {n:,})" if show_n else ""
    return Cell(f"{percent(mean, n)}{spread}{loss}{images}",
                f"[{percent(low, n)}, {percent(high, n)}]", interval=(low, mean, high))


def markdown(board: Board) -> str:
    """A heading, the facts, the table and the remarks, in GitHub's Markdown."""
    facts = [f"- {_escape(fact)}" for fact in board.facts]
    lines = table(board.columns, board.lead)
    remarks = [f"- {_escape(remark)}" for remark in board.remarks]
    blocks = [[f"## {_escape(board.title)}"], facts, lines, remarks]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def table(columns: Sequence[Column], lead: str | None = None) -> list[str]:
    """The lines of a table in GitHub's Markdown; the column titled `lead` with its details."""
    parts = [_aligned(column, column.title == lead) for column in columns]
    return ["| " + " | ".join(line) + " |" for line in zip(*parts, strict=True)]


def plain(text: str) -> str:
    """One line without control characters, which could write anywhere in a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}"
                   for c in " ".join(text.split()))


def _decimals(n: int) -> int:
    return 2 if n >= 1000 else 1


def _escape(text: str) -> str:
    """One line in which names mean nothing to Markdown or HTML."""
    return re.sub(r"([\\`*<>|&~])", r"\\\1", plain(text))


def _aligned(column: Column, with_details: bool) -> list[str]:
    """Title, rule and cells, padded so that the source reads as a table too."""
    texts = [f"{cell.text} {cell.detail}" if with_details else cell.text for cell in column.cells]
    title, *cells = (_escape(text) for text in (column.title, *texts))
    width = max(3, len(title), *map(len, cells))
    if column.words:
        return [title.ljust(width), ":" + "-" * (width - 1), *(c.ljust(width) for c in cells)]
    return [title.rjust(width), "-" * (width - 1) + ":", *(c.rjust(width) for c in cells)]


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
