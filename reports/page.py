"""leaderboard.html: one file that needs nothing else, not even JavaScript or a network."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from robench.reports.analyses import ANALYSES
from robench.reports.boards import FACETS
from robench.reports.gallery import draw, looks_of
from robench.reports.provenance import provenance, record_boards
from robench.reports.store import Results
from robench.reports.style import GRID, INK, Drawing, to_svg
from robench.reports.text import Board

_ASSETS = files("robench.reports") / "html"


@dataclass(frozen=True)
class Section:
    """A tab of a page: what it shows, boards, figures, how to read them, a page with more."""

    id: str
    title: str
    intro: str
    boards: Sequence[Board] = ()
    drawings: Sequence[Drawing] = ()
    legend: str = ""
    link: str = ""


def sections(results: Results, folder: Path | None = None) -> list[Section]:
    """The tabs in their order. The first is always there, the others where they have content."""
    look = looks_of(results)
    shown = [
        *(Section(one.name, one.title, one.intro or f"{one.description}.",
                  one.boards(results) if one.boards else (), draw(one, results, look), one.legend)
          for one in ANALYSES.values()),
        Section("measured", "How was this measured?", MEASURED, provenance(results.records)),
        Section("records", "Records", RECORDS, record_boards(results, folder)),
    ]
    return [shown[0], *(section for section in shown[1:] if section.boards or section.drawings)]


def page(results: Results, folder: Path | None = None) -> str:
    """The whole page. Everything that comes from results is escaped.

    `folder` is where the page will lie: survival flags are linked relative to it.
    """
    return rendered(sections(results, folder), summary(results))


def rendered(shown: Sequence[Section], summary: str) -> str:
    """A page of these tabs, complete in itself, with a line about all of them."""
    environment = Environment(autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"parts": _parts, "svg": inline_svg}
    script = _asset("tables.js") + _asset("page.js")
    return environment.from_string(_asset("leaderboard.html.j2")).render(
        css=Markup(_asset("style.css")),
        script=Markup(script),
        # No other script runs, whatever a name in the results may hold.
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        sections=shown,
        facets=_choices(board for section in shown for board in section.boards),
        summary=summary,
    )


def inline_svg(drawing: Drawing) -> Markup:
    """The figure as an <svg> element, in the colors of the page, read aloud as `alt`.

    matplotlib has escaped the text in it. The ids get the figure's name: one page holds several.
    """
    svg = to_svg(drawing.figure, drawing.name, background="none")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    for color, variable in ((INK, "ink"), (GRID, "line"), ("#ffffff", "paper")):
        svg = re.sub(rf"\b(fill|stroke): {color}", rf"\1: var(--{variable})", svg)
    label = f'<svg role="img" aria-label="{escape(drawing.alt)}" '
    return Markup(svg.replace("<svg ", label, 1))


def _parts(title: str) -> tuple[str, str]:
    """The title of a column, and what is printed small below it: the images or the unit."""
    match = re.fullmatch(r"(.+), (n = [\d,]+|points)", title, flags=re.DOTALL)
    return (match[1], match[2]) if match else (title, "")


def _choices(boards: Iterable[Board]) -> dict[str, tuple[str, list[str]]]:
    """By facet: its title, and its values where there are several to choose from."""
    rows = [facets for board in boards for facets in board.facets]
    values = {name: sorted({row[name] for row in rows if name in row}) for name in FACETS}
    return {name: (FACETS[name], some) for name, some in values.items() if len(some) > 1}


def summary(results: Results) -> str:
    """One line: how much was measured."""
    networks = {(r.run, r.checkpoint, r.weights_sha256) for r in results.records}
    names = sorted({r.dataset for r in results.records})
    counts = f"{len(results.records):,} records of {len(networks):,} networks"
    return f"{counts} on {', '.join(names)}" if names else "No records"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


MEASURED = """\
Every adversarial example was checked again in fp32 before it counted: inside the threat model and
misclassified. An attack that failed is shown as “failed”, never as a number. Rows are ranked
together only if they share data set, threat model and images. A checkpoint selected on the test
images is marked “test (!)”: its numbers are too good."""
RECORDS = """\
What was written when an attack on a network ended: counts of images, not percentages. Every number
of this page is made from these rows."""
