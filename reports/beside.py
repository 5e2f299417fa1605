"""Published numbers as a table and as boards, clearly not measured here."""

from __future__ import annotations

import pandas as pd

from robench.reports.columns import make_frame
from robench.reports.published import Published, beside, curated, place
from robench.reports.store import Results
from robench.reports.text import NOTHING, Board, Cell, Column

PUBLISHED = ("dataset", "threat", "method", "model", "teacher", "checkpoint", "epochs", "attack",
             "clean", "robust", "source", "certainty", "notes")
_WORDS = {"method": "Method", "model": "Model", "teacher": "Teacher", "checkpoint": "Checkpoint"}
_MARK = ("Numbers of others as they published them, in percent, on the whole test set; nothing "
         "here was measured by robench, ranked with its rows or subtracted from them")


def published(results: Results) -> pd.DataFrame:
    """All published numbers that belong beside the results, one in a row (see `beside`)."""
    return make_frame([p.model_dump() for p in beside(results.records, results.published)],
                      PUBLISHED)


def published_boards(results: Results) -> list[Board]:
    """A board for each data set and threat model of which there is something to compare.

    It shows the methods that were measured there and all numbers given as files; how many others
    there are is said.
    """
    methods = {(place(r.dataset, r.threat), r.defense) for r in results.records}
    groups: dict[object, list[Published]] = {}
    for number in beside(results.records, results.published):
        groups.setdefault(place(number.dataset, number.threat), []).append(number)
    shipped = set(curated()) - set(results.published)
    boards = []
    for where, numbers in groups.items():
        shown = [p for p in numbers if p not in shipped or (where, p.method) in methods]
        if shown:
            boards.append(_board(shown, len(numbers) - len(shown)))
    return boards


def _board(numbers: list[Published], others: int) -> Board:
    """In the order of the methods' names, so that nothing looks like a rank."""
    numbers = sorted(numbers, key=lambda p: p.method)
    first = numbers[0]
    texts = {name: [getattr(p, name) for p in numbers] for name in _WORDS}
    columns = [Column(title, tuple(Cell(text or NOTHING) for text in texts[name]), words=True)
               for name, title in _WORDS.items() if any(texts[name])]
    if any(p.epochs for p in numbers):
        columns.append(Column("Epochs", tuple(Cell(str(p.epochs or NOTHING)) for p in numbers)))
    columns += [
        Column("Clean %", tuple(_percent(p.clean, p.decimals) for p in numbers)),
        Column("Robust %", tuple(_percent(p.robust, p.decimals) for p in numbers)),
        *(Column(name.title(), tuple(Cell(getattr(p, name)) for p in numbers), words=True)
          for name in ("attack", "source", "certainty")),
    ]
    more = f"{others} more, of methods that were not measured here, are in published.csv"
    return Board(
        title=f"Published: {first.dataset}, {first.threat}",
        columns=tuple(columns),
        facts=(_MARK, more) if others else (_MARK,),
        remarks=_remarks(numbers),
    )


def _remarks(numbers: list[Published]) -> tuple[str, ...]:
    """Each note of a source once, with the methods it is about."""
    methods: dict[tuple[str, str], dict[str, None]] = {}
    for p in numbers:
        if p.notes:
            methods.setdefault((p.source, p.notes), {})[f"{p.method} {p.model}".strip()] = None
    return tuple(f"{source}, {', '.join(names)}: {notes}"
                 for (source, notes), names in methods.items())


def _percent(value: float | None, decimals: int) -> Cell:
    return Cell(NOTHING) if value is None else Cell(f"{value:.{decimals}f}", sort=value)
