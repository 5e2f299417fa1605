"""Boards as LaTeX tables for a paper: a fragment to \\input, of booktabs tables.

The best number of a column is bold, the second best underlined, as far as the board says that its
numbers may be compared (`Column.contest`). Equal numbers, as printed, share the mark.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from robench.reports.text import Board, Cell, Column, condensed

PREAMBLE = r"\usepackage{booktabs,graphicx}"
_HEAD = f"""\
% Tables written by robench report. In the preamble: {PREAMBLE}
% In the text: \\input{{leaderboard}}
"""
_LEGEND = (r"In percent; $\pm$ is the standard deviation over seeds, brackets hold the 95\,\% "
           r"Wilson interval of the sampling error. Best in bold, second underlined.")
_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}",
    "`": r"\textasciigrave{}", "'": r"\char39{}",
    # Braces: a row that begins with [ or * would be an option of the \\ before it.
    "[": "{[}", "]": "{]}", "*": "{*}",
    "±": r"$\pm$", "−": r"$-$", "Δ": r"$\Delta$", "×": r"$\times$", "·": r"$\cdot$",
    "≤": r"$\leq$", "≥": r"$\geq$", "→": r"$\to$", "…": r"\ldots{}", "–": r"\textendash{}",
    "—": r"\textemdash{}", "“": r"\textquotedblleft{}", "”": r"\textquotedblright{}",
    "’": r"\textquoteright{}", "ß": r"\ss{}", "æ": r"\ae{}", "ø": r"\o{}", "ł": r"\l{}",
    "ı": r"\i{}",
}
_ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=",
            "\u0306": "u", "\u0307": ".", "\u0308": '"', "\u030a": "r", "\u030b": "H",
            "\u030c": "v", "\u0327": "c"}
_SPLIT = re.compile(r"^(.+), (n = [\d,]+|points)$")  # titles that take two lines
_NUMBER = re.compile(r"^(\d+(?:\.\d+)?)(.*)$", flags=re.DOTALL)


def fragment(rankings: Sequence[Board], published: Sequence[Board]) -> str:
    """A table for each ranking, then one for each board of published numbers."""
    tables = [table(board, f"robench-{number}", _LEGEND)
              for number, board in enumerate(map(condensed, rankings), start=1)]
    tables += [table(board, f"robench-published-{number}")
               for number, board in enumerate(published, start=1)]
    return "\n".join([_HEAD, *(tables or ["% Nothing is ranked yet.\n"])])


def table(board: Board, label: str, legend: str = "") -> str:
    """One board as a table with caption and label; no wider than the line, whatever it holds."""
    columns = [_column(column, column.title == board.lead) for column in board.columns]
    head, *lines = (" & ".join(line) + r" \\" for line in zip(*columns, strict=True))
    caption = ". ".join(map(escape, (board.title, *board.facts))) + ". " + legend
    kinds = "".join("l" if column.words else "r" for column in board.columns)
    return "\n".join([
        r"\begin{table}[htbp]", r"\centering",
        rf"\caption[{{{escape(board.title)}}}]{{{caption.rstrip()}}}", rf"\label{{tab:{label}}}",
        r"\smallskip",
        # Scaled down only where it is wider than the line.
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\smallskip{{\footnotesize\raggedright {escape(remark)}\par}}"
          for remark in board.remarks),
        r"\end{table}", "",
    ])


def escape(text: str) -> str:
    """One line of LaTeX that prints exactly this text; no character of it is a command.

    A letter that LaTeX's own fonts lack is printed as its code point, [U+4E2D].
    """
    plain = "".join(map(_character, " ".join(text.split())))
    return re.sub(r"([-,])(?=\1)", r"\1{}", plain)  # two would be one character


def _character(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if character.isascii() and character.isprintable():
        return character
    base, *marks = list(unicodedata.normalize("NFD", character))
    if base.isascii() and base.isalpha() and len(marks) == 1 and marks[0] in _ACCENTS:
        letter = rf"\{base}{{}}" if base in "ij" else base  # without their dots
        return rf"\{_ACCENTS[marks[0]]}{{{letter}}}"
    return f"{{[}}U+{ord(character):04X}{{]}}"


def _column(column: Column, lead: bool) -> list[str]:
    """Title and cells; only the column of the ranking prints its details."""
    places = _places(column) if column.contest else [0] * len(column.cells)
    return [_title(column.title),
            *(_cell(cell, place, lead) for cell, place in zip(column.cells, places, strict=True))]


def _title(title: str) -> str:
    parts = _SPLIT.match(title)
    if parts is None:
        return escape(title)
    return rf"\shortstack{{{escape(parts[1])}\\{escape(parts[2])}}}"


def _places(column: Column) -> list[int]:
    """1 for the best number of a column, 2 for the second best, 0 for the others.

    Nothing is the best of one: a column with a single number has no marks.
    """
    numbers = [_NUMBER.match(cell.text) for cell in column.cells]
    values = [float(number[1]) if number else None for number in numbers]
    best = sorted({value for value in values if value is not None}, reverse=True)[:2]
    if sum(value is not None for value in values) < 2:
        return [0] * len(values)
    return [best.index(value) + 1 if value in best else 0 for value in values]


def _cell(cell: Cell, place: int, lead: bool) -> str:
    detail = rf" {{\footnotesize {escape(cell.detail)}}}" if lead and cell.detail else ""
    number = _NUMBER.match(cell.text)
    if not place or number is None:
        return escape(cell.text) + detail
    mark = r"\textbf" if place == 1 else r"\underline"
    rest = f" {escape(number[2])}" if number[2] else ""
    return f"{mark}{{{number[1]}}}{rest}{detail}"
