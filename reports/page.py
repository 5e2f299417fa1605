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

from robench.reports import tables
from robench.reports.beside import published_boards
from robench.reports.boards import FACETS, checkpoint_boards, leaderboards, rob_f_boards
from robench.reports.class_boards import class_boards
from robench.reports.gallery import draw_all
from robench.reports.landscape import landscape_boards, sharpness
from robench.reports.pictures import picture_boards
from robench.reports.provenance import provenance, record_boards
from robench.reports.store import Results
from robench.reports.style import GRID, INK, Drawing, to_svg
from robench.reports.text import Board
from robench.reports.trace import Trace, record_id

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
    trace = Trace(results.records)
    ranking = tables.leaderboard(results.records)
    others = tables.other_checkpoints(results.records)
    transfers = tables.rob_f(results.transfers, results.records)
    drawn = draw_all(results)

    def take(*kinds: str) -> list[Drawing]:
        """The drawings of these kinds, each into one section only."""
        found = [drawing for drawing in drawn if drawing.name.startswith(kinds)]
        drawn[:] = [drawing for drawing in drawn if drawing not in found]
        return found

    first, *rest = (
        Section("leaderboard", "Leaderboard", LEADERBOARD, leaderboards(ranking, trace),
                legend=LEGEND),
        Section("rob-f", "Rob_f", ROB_F,
                rob_f_boards(transfers, list(map(record_id, results.transfers))), take("rob-f")),
        Section("others", "Other checkpoints", OTHERS, checkpoint_boards(others, trace)),
        Section("published", "Published", PUBLISHED, published_boards(results)),
        Section("landscape", "Landscape", LANDSCAPE,
                landscape_boards(sharpness(results.landscapes, results.records)),
                take("weight", "input")),
        Section("trade-off", "Trade-off", "What robustness costs in clean accuracy and in time.",
                drawings=take("clean-vs-robust", "cost-vs-robust")),
        Section("over-eps", "Over eps", "How robustness goes down as the attacker may change more.",
                drawings=take("accuracy-over-eps")),
        Section("overlap", "Attacks", "Which images fall to which attacks.",
                drawings=take("overlap")),
        Section("classes", "Classes", CLASSES, class_boards(results.records, trace),
                take("class-accuracy", "confusion")),
        Section("gallery", "Gallery", GALLERY, picture_boards(results), take("gallery")),
        Section("training", "Training", "How accuracy and loss went while the networks learned.",
                drawings=take("training")),
        Section("figures", "Figures", "Everything else that was drawn.", drawings=take("")),
        Section("measured", "How was this measured?", MEASURED, provenance(results.records)),
        Section("records", "Records", RECORDS, record_boards(results, folder)),
    )
    return [first, *(section for section in rest if section.boards or section.drawings)]


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


LEADERBOARD = """\
Accuracy in percent, without an attack and under each attack. Rows are ranked only against rows of
the same data set, threat model and images. Every number leads to its records."""
LEGEND = """\
± is the standard deviation over seeds; the small interval is the 95 % Wilson interval of the
sampling error over the n images of the column. The two are not added up. “p” is the exact McNemar
test on the same images (with several seeds: the sign test over images); it is about these networks
and is not corrected for the number of rows. A difference with p of 0.05 or more, or not paired, is
faint. Warnings are what the trust checks found: unfold their number to read them."""
ROB_F = """\
Who withstands whose examples: Rob_f(x_f*) is the accuracy of network f on examples crafted against
f itself, Rob_f(x_S*) its accuracy on examples crafted against the student S. Percentages."""
OTHERS = "Networks of the same training runs that are outside the ranking."
PUBLISHED = """\
What others published for the same data set and threat model: other networks, trainings and images.
Nothing here is measured by robench, and nothing is ranked."""
LANDSCAPE = """\
How fast the loss grows around a network, along random directions in which every filter is as long
as the network’s own; adversarial examples are crafted anew at every point. Less is flatter."""
CLASSES = """\
Robust accuracy class by class, under the attack that ranks the rows, the worst class, and what the
images of each class are taken for. The interval of the worst class is that of the lowest true
accuracy of any class, although these images tell which one is the lowest; with few images in a
class the observed minimum is too low on average. Percentages of the images of the true class."""
GALLERY = """\
The first images of the test set that are classified right, and what an attack makes of them. The
pictures are rounded to 8 bits; predictions are those of the exact adversarial examples, in fp32."""
MEASURED = """\
Every adversarial example was checked again in fp32 before it counted: inside the threat model and
misclassified. An attack that failed is shown as “failed”, never as a number. Rows are ranked
together only if they share data set, threat model and images. A checkpoint selected on the test
images is marked “test (!)”: its numbers are too good."""
RECORDS = """\
What was written when an attack on a network ended: counts of images, not percentages. Every number
of this page is made from these rows."""
