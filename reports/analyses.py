"""The analyses: what can be asked of results, each as a table and as figures.

To add one: an entry. It becomes a tab of the page, a CSV file of `robench report`, and a name for
`robench analyze`. Everything is a function of results:

    ANALYSES["rob-f"].frame(load([Path("runs")]))  # a DataFrame
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robench.registry import unknown
from robench.reports import tables
from robench.reports.ablation import ablation, ablation_boards
from robench.reports.beside import published, published_boards
from robench.reports.boards import checkpoint_boards, leaderboards, rob_f_boards, rob_f_summary
from robench.reports.class_boards import class_boards
from robench.reports.class_figures import draw_classes
from robench.reports.classes import class_accuracy, confusion
from robench.reports.corruptions import corruption_boards, corruptions, draw_corruptions
from robench.reports.cost import cost, cost_boards
from robench.reports.crossing import crossing, crossing_boards, draw_crossing
from robench.reports.curves import draw_over_eps, draw_over_steps, over_eps, over_steps
from robench.reports.drawings import draw_rob_f, draw_rob_f_training, draw_tradeoff, draw_training
from robench.reports.landscape import landscape_boards, sharpness
from robench.reports.landscape_figures import draw_landscapes
from robench.reports.overlap import overlap_table
from robench.reports.overlap_figures import draw_overlaps
from robench.reports.pictures import draw_pictures, picture_boards, pictures
from robench.reports.store import Results
from robench.reports.style import Drawing, Looks
from robench.reports.text import NOTHING, Board, Cell, Column, markdown
from robench.reports.trace import Trace, record_id
from robench.reports.tradeoff import tradeoff_table
from robench.reports.union import union, union_boards


def no_figures(results: Results, look: Looks) -> Iterable[Drawing]:
    return ()


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: on the command line, of the tab and, with underscores, of the CSV file.
        title: of the tab. description: a line. intro: how to read it, if that takes more.
        frame: the table, without lines where there are no data.
        draw: the figures, a look for every label given.
        boards: the table for people, one below the other; None where it is the frame as it is,
            which has no place on a page.
        legend: what the columns of the boards mean.
        brief: in the place of the boards where there is little room.
    """

    name: str
    title: str
    description: str
    frame: Callable[[Results], pd.DataFrame]
    draw: Callable[[Results, Looks], Iterable[Drawing]] = no_figures
    boards: Callable[[Results], list[Board]] | None = None
    intro: str = ""
    legend: str = ""
    brief: Callable[[Results], list[Board]] | None = None

    @property
    def stem(self) -> str:
        """The name of its table in files."""
        return self.name.replace("-", "_")

    @property
    def file(self) -> str:
        return f"{self.stem}.csv"

    def tables(self, results: Results, *, brief: bool = False) -> list[Board]:
        """The table for people, or else the frame as it is."""
        boards = brief and self.brief or self.boards
        return boards(results) if boards else [_board(self, self.frame(results))]

    def text(self, results: Results) -> str:
        """The table in Markdown."""
        return "\n".join(map(markdown, self.tables(results)))


def _board(analysis: Analysis, frame: pd.DataFrame) -> Board:
    """A frame as it is, numbers in four digits."""
    def cell(value: Any) -> Cell:
        if pd.isna(value):
            return Cell(NOTHING)
        return Cell(f"{value:.4g}" if isinstance(value, float) else str(value))

    return Board(analysis.title, tuple(
        Column(str(name), tuple(map(cell, values)), words=frame[name].dtype == object)
        for name, values in frame.items()))


LEGEND = """\
± is the standard deviation over seeds; the small interval is the 95 % Wilson interval of the
sampling error over the n images of the column. The two are not added up. “p” is the exact McNemar
test on the same images (with several seeds: the sign test over images); it is about these networks
and is not corrected for the number of rows. A difference with p of 0.05 or more, or not paired, is
faint. Warnings are what the trust checks found: unfold their number to read them."""

ANALYSES = {one.name: one for one in (
    Analysis(
        "leaderboard", "Leaderboard", "The ranking: accuracy without an attack and under each",
        lambda results: tables.leaderboard(results.records),
        boards=lambda results: leaderboards(tables.leaderboard(results.records),
                                            Trace(results.records)),
        intro="Accuracy in percent, without an attack and under each attack. Rows are ranked only "
        "against rows of the same data set, threat model and images. Every number leads to its "
        "records.",
        legend=LEGEND,
    ),
    Analysis(
        "rob-f", "Rob_f", "Each network on its own examples and on the student's (Jung et al. "
        "2024, PeerAiD)",
        lambda results: tables.rob_f(results.transfers, results.records), draw_rob_f,
        lambda results: rob_f_boards(tables.rob_f(results.transfers, results.records),
                                     list(map(record_id, results.transfers))),
        intro="Who withstands whose examples: Rob_f(x_f*) is the accuracy of network f on examples "
        "crafted against f itself, Rob_f(x_S*) its accuracy on examples crafted against the "
        "student S. Percentages.",
        brief=lambda results: rob_f_summary(tables.rob_f(results.transfers, results.records)),
    ),
    Analysis(
        "rob-f-training", "Rob_f over training", "Rob_f after each epoch, on the images that "
        "select checkpoints",
        lambda results: tables.rob_f_training(results.epochs, results.records),
        draw_rob_f_training,
    ),
    Analysis(
        "transfer", "Transfer", "Every network on the examples of every other (measured by "
        "`robench transfer`)",
        crossing, draw_crossing, crossing_boards,
        intro="Accuracy in percent of every network on the examples that were crafted against "
        "every other: rows say against whom, columns who is evaluated.",
    ),
    Analysis(
        "others", "Other checkpoints", "Networks of the same training runs that are outside the "
        "ranking",
        lambda results: tables.other_checkpoints(results.records),
        boards=lambda results: checkpoint_boards(tables.other_checkpoints(results.records),
                                                 Trace(results.records)),
    ),
    Analysis(
        "published", "Published", "The numbers of others for the same data and threat models; not "
        "measured here",
        published, boards=published_boards,
        intro="What others published for the same data set and threat model: other networks, "
        "trainings and images. Nothing here is measured by robench, and nothing is ranked.",
    ),
    Analysis(
        "landscape", "Landscape", "Sharpness of the loss around the weights (measured by `robench "
        "landscape`; Li et al. 2018, Stutz et al. 2021)",
        lambda results: sharpness(results.landscapes, results.records), draw_landscapes,
        lambda results: landscape_boards(sharpness(results.landscapes, results.records)),
        intro="How fast the loss grows around a network, along random directions in which every "
        "filter is as long as the network’s own; adversarial examples are crafted anew at every "
        "point. Less is flatter.",
    ),
    Analysis(
        "trade-off", "Trade-off", "What robustness costs in clean accuracy and in time",
        lambda results: tradeoff_table(results.records), draw_tradeoff,
    ),
    Analysis(
        "ablation", "Options", "What an option of a training changes, paired by seed",
        ablation, boards=ablation_boards,
        intro="Configurations of one defense against the first of them, seed by seed: the mean "
        "difference in points, and Student's 95 % interval of it over trainings.",
    ),
    Analysis(
        "cost", "Cost", "What the run took: time, passes and memory of trainings and attacks",
        cost, boards=cost_boards,
        intro="What the trainings, the attacks and the other measurements took, each training and "
        "each teacher once. Times are wall times of single processes, added up; passes are of "
        "single images. What was not counted is said, and is in no sum.",
    ),
    Analysis(
        "union", "Union", "Accuracy under each of several threat models, and under all of them "
        "(Tramer and Boneh 2019)",
        lambda results: union(results.records), boards=union_boards,
        intro="The same networks on the same images under several threat models. An image counts "
        "under all of them if it withstands each. Accuracies in percent.",
    ),
    Analysis(
        "over-eps", "Over eps", "How robustness goes down as the attacker may change more",
        over_eps, draw_over_eps,
    ),
    Analysis(
        "over-steps", "Over steps", "How robustness goes down as PGD takes more steps (measured by "
        "`robench steps`)",
        over_steps, draw_over_steps,
    ),
    Analysis(
        "corruptions", "Corruptions", "Accuracy under noise, blur, weather and compression "
        "(measured by `robench corruptions`; Hendrycks and Dietterich 2019)",
        corruptions, draw_corruptions, corruption_boards,
        intro="Accuracy in percent on images that nobody attacked, but corruptions of five "
        "severities. The mean is the plain one over the 15 corruptions of the paper, as "
        "RobustBench ranks by; the paper's mCE divides by AlexNet's errors and is another number.",
    ),
    Analysis(
        "overlap", "Attacks", "Which images fall to which attacks",
        lambda results: overlap_table(results.records), draw_overlaps,
    ),
    Analysis(
        "classes", "Classes", "Robust accuracy class by class, and the worst class (Tian et al. "
        "2021, Xu et al. 2021)",
        lambda results: class_accuracy(results.records),
        lambda results, look: draw_classes(results.records, look),
        lambda results: class_boards(results.records, Trace(results.records)),
        intro="Robust accuracy class by class, under the attack that ranks the rows, the worst "
        "class, and what the images of each class are taken for. The interval of the worst class "
        "is that of the lowest true accuracy of any class, although these images tell which one is "
        "the lowest; with few images in a class the observed minimum is too low on average. "
        "Percentages of the images of the true class.",
    ),
    Analysis(
        "confusion", "Confusion", "What the images of each class are taken for, without an attack "
        "and under the one that ranks",
        lambda results: confusion(results.records),
    ),
    Analysis(
        "gallery", "Gallery", "Images before and after an attack (measured by `robench gallery`)",
        pictures, lambda results, look: draw_pictures(results), picture_boards,
        intro="The first images of the test set that are classified right, and what an attack "
        "makes of them. The pictures are rounded to 8 bits; predictions are those of the exact "
        "adversarial examples, in fp32.",
    ),
    Analysis(
        "training", "Training", "How accuracy and loss went while the networks learned",
        lambda results: tables.training(results.epochs, results.records), draw_training,
    ),
)}


def find_analysis(name: str) -> Analysis:
    """Raises UsageError for a name nobody knows."""
    if name not in ANALYSES:
        raise unknown("analysis", name, ANALYSES)
    return ANALYSES[name]
