"""The figure of `robench speed scale`: seconds over the number of tasks, and of shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robench.reports.style import house_style, looks, shorten


class Point(NamedTuple):
    """Wall seconds of a contender with so many tasks or shards: the median, least and most."""

    part: str  # "tasks" or "shards"
    name: str
    number: int
    median: float
    low: float
    high: float


@house_style()
def scaling_figure(points: Sequence[Point]) -> Figure:
    """A panel for tasks, with a line for each executor, and one for shards. Both begin at 0."""
    look = looks(point.name for point in points)
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = dict(zip(("tasks", "shards"), figure.subplots(1, 2), strict=True))
    titles = {"tasks": "tasks with nothing left to do", "shards": "one attack, cut into shards"}
    for part, axes in panels.items():
        some = [point for point in points if point.part == part]
        for name in dict.fromkeys(point.name for point in some):
            line = sorted(point for point in some if point.name == name)
            axes.errorbar(
                [p.number for p in line], [p.median for p in line],
                yerr=[[p.median - p.low for p in line], [p.high - p.median for p in line]],
                color=look[name].color, marker=look[name].marker, linewidth=1.5, capsize=2,
                label=shorten(name))
        axes.set(xlabel=f"number of {part}", ylabel="seconds", title=titles[part])
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    shards = panels["shards"]
    shards.set_xscale("log", base=2)
    shards.xaxis.set_major_locator(
        FixedLocator(sorted({p.number for p in points if p.part == "shards"})))
    shards.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    shards.xaxis.set_minor_locator(NullLocator())
    return figure
