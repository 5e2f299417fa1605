"""leaderboard.html: one file that needs nothing else, not even JavaScript or a network."""

from __future__ import annotations

import re
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from robench.reports import tables
from robench.reports.boards import checkpoint_boards, leaderboards, rob_f_boards
from robench.reports.gallery import draw_all
from robench.reports.provenance import provenance
from robench.reports.store import Results
from robench.reports.style import GRID, INK, Drawing, to_svg

_ASSETS = files("robench.reports") / "html"


def page(results: Results) -> str:
    """The whole page. Everything that comes from results is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("leaderboard.html.j2"))
    return template.render(
        css=Markup(_asset("style.css")),
        script=Markup(_asset("sort.js")),
        rankings=leaderboards(tables.leaderboard(results.records)),
        transfers=rob_f_boards(tables.rob_f(results.transfers, results.records)),
        others=checkpoint_boards(tables.other_checkpoints(results.records)),
        drawings=[(drawing, inline_svg(drawing)) for drawing in draw_all(results)],
        measured=provenance(results.records),
    )


def inline_svg(drawing: Drawing) -> Markup:
    """The figure as an <svg> element, in the colors of the page, read aloud as `alt`.

    matplotlib has escaped the text in it. The ids get the figure's name: one page holds several.
    """
    svg = to_svg(drawing.figure, drawing.name, background="none")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    for color, variable in ((INK, "var(--ink)"), (GRID, "var(--line)")):
        svg = re.sub(rf"\b(fill|stroke): {color}", rf"\1: {variable}", svg)
    label = f'<svg role="img" aria-label="{escape(drawing.alt)}" '
    return Markup(svg.replace("<svg ", label, 1))


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
