"""The built-in reports. To add one: a function from results and folder to paths, registered.

The last word of its name is the format it is written for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from robench.errors import UsageError
from robench.files import write_atomic
from robench.reports import tables
from robench.reports.analyses import ANALYSES, Analysis
from robench.reports.base import REPORTS
from robench.reports.beside import published_boards
from robench.reports.boards import leaderboards
from robench.reports.gallery import draw, draw_all, looks_of
from robench.reports.jsonfile import to_json
from robench.reports.latex import fragment
from robench.reports.page import page
from robench.reports.robustbench import model_files
from robench.reports.store import Results
from robench.reports.style import Drawing, to_png, to_svg
from robench.reports.text import markdown

log = logging.getLogger("robench")


@REPORTS.register("analyses-csv", description="a .csv for each analysis with data: full precision, "
                                              "in percent")
def analyses_csv(results: Results, out: Path) -> list[Path]:
    return [path for one in ANALYSES.values() for path in write_table(one, results, out)]


@REPORTS.register("leaderboard-md", description="leaderboard.md: as in the terminal, and what "
                                               "others published")
def leaderboard_md(results: Results, out: Path) -> list[Path]:
    boards = [f"\n{markdown(board)}" for board in published_boards(results)]
    return _write(out / "leaderboard.md", leaderboard_text(results) + "".join(boards))


@REPORTS.register("leaderboard-tex", description="leaderboard.tex: booktabs tables for a paper")
def leaderboard_tex(results: Results, out: Path) -> list[Path]:
    boards = leaderboards(tables.leaderboard(results.records))
    return _write(out / "leaderboard.tex", fragment(boards, published_boards(results)))


@REPORTS.register("leaderboard-json", description="leaderboard.json: every table with its column "
                                                  "types, nothing rounded")
def leaderboard_json(results: Results, out: Path) -> list[Path]:
    frames = {one.stem: one.frame(results) for one in ANALYSES.values()}
    return _write(out / "leaderboard.json", to_json({
        name: frame for name, frame in frames.items() if len(frame)}))


@REPORTS.register("leaderboard-html", description="leaderboard.html: everything on one page")
def leaderboard_html(results: Results, out: Path) -> list[Path]:
    return _write(out / "leaderboard.html", page(results, out))


@REPORTS.register("robustbench", description="model_info/: a file for each network of a data set "
                                             "and threat model that RobustBench lists",
                  paper="Croce et al. 2021 (RobustBench)")
def robustbench(results: Results, out: Path) -> list[Path]:
    files = model_files(results.records)
    if not files:
        log.warning("nothing for RobustBench: no ranked network of a data set and threat model "
                    "that it lists")
    return [path for name, text in files.items() for path in _write(out / name, text)]


@REPORTS.register("figures", description="figures/*.png and *.svg")
def figures(results: Results, out: Path) -> list[Path]:
    return write_figures(draw_all(results), out)


def analyze(one: Analysis, results: Results, out: Path) -> list[Path]:
    """Write the table of one analysis and its figures into `out`; returns their paths.

    Raises UsageError where there are no data for it.
    """
    drawings = draw(one, results, looks_of(results))
    if not drawings and one.frame(results).empty:
        raise UsageError(f"these runs have no data for {one.name!r}: {one.description}")
    return write_table(one, results, out) + write_figures(drawings, out)


def write_table(one: Analysis, results: Results, out: Path) -> list[Path]:
    """None without data, unless there is an older one to replace."""
    frame, path = one.frame(results), out / one.file
    return [] if frame.empty and not path.exists() else _write(path, tables.to_csv(frame))


def write_figures(drawings: Iterable[Drawing], out: Path) -> list[Path]:
    paths = []
    for drawing in drawings:
        stem = out / "figures" / drawing.name
        paths += _write(stem.with_suffix(".png"), to_png(drawing.figure))
        paths += _write(stem.with_suffix(".svg"), to_svg(drawing.figure, drawing.name))
    return paths


def leaderboard_text(results: Results) -> str:
    """The leaderboards in Markdown, and what their columns mean."""
    boards = leaderboards(tables.leaderboard(results.records))
    if not boards:
        return "# Leaderboard\n\nNothing is ranked yet.\n"
    return "\n".join(["# Leaderboard\n", *map(markdown, boards), LEGEND])


LEGEND = """\
Accuracies in percent; ± is the standard deviation over seeds, [ ] the 95 % Wilson interval of
the sampling error. p is the exact McNemar test on the same images (with several seeds: the sign
test over images), not corrected for the number of rows.
"""


def _write(path: Path, content: bytes | str) -> list[Path]:
    write_atomic(path, content)
    return [path]
