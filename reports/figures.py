"""The figures. Each function draws one; `drawings` and `curves` decide which to draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from robench.reports.record import Epoch, Transfer
from robench.reports.style import (
    INK,
    NEUTRAL,
    Look,
    house_style,
    legend_below,
    new_figure,
    pale,
    shorten,
)
from robench.reports.text import TITLES
from robench.reports.uncertainty import estimate

# For lines of one label, which have one color.
_LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


@house_style()
def clean_vs_robust(
    group: pd.DataFrame, attack: str, title: str, look: Mapping[str, Look]
) -> Figure:
    """Clean against robust accuracy with 95 % intervals, one point for each row.

    `group` is rows of `tradeoff.tradeoff`, ranked by `attack`. A step line is the Pareto front;
    rows behind it are paler. Names stand in the right margin so that they never overlap.
    """
    figure, (axes,) = new_figure(7.5, max(4.2, 0.32 * len(group) + 1.0))
    for line in group.to_dict("records"):
        x, y, seen = line["clean"], line[attack], look[line["label"]]
        axes.errorbar(
            x, y,
            xerr=[[x - line["clean_low"]], [line["clean_high"] - x]],
            yerr=[[y - line[f"{attack}_low"]], [line[f"{attack}_high"] - y]],
            color=seen.color, marker=seen.marker, markersize=7, linewidth=1, capsize=2,
            alpha=1.0 if line["pareto"] else 0.4,
        )
    _label_rows(figure, axes, group, "clean", attack, look)
    front = group[group["pareto"]].sort_values("clean")
    axes.set_xlim(axes.get_xlim())  # as it is: the line goes on to the edges
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    axes.plot([left, *front["clean"], front["clean"].iloc[-1]],
              [front[attack].iloc[0], *front[attack], bottom],
              drawstyle="steps-pre", color=NEUTRAL, linewidth=0.9, linestyle="--", zorder=1)
    axes.set(xlabel="clean accuracy (%)", title=shorten(title, 80), ylabel=_under(attack))
    return figure


@house_style()
def cost_vs_robust(
    group: pd.DataFrame, attack: str, title: str, look: Mapping[str, Look]
) -> Figure:
    """Training time, where it is known, and evaluation time against robust accuracy.

    `group` is rows of `tradeoff.tradeoff`, ranked by `attack`. Bars are 95 % intervals.
    """
    panels = [
        (name, seconds, label) for name, seconds, label in (
            ("train_and_teacher_seconds", 60, "training time, with teachers (minutes)"),
            ("attack_seconds", 1, f"time of {shorten(TITLES.get(attack, attack))} (seconds)"),
        ) if (group[name] > 0).any()
    ]
    figure, places = new_figure(4.0 * len(panels) + 2.5, max(4.0, 0.32 * len(group) + 1.0),
                                panels=len(panels), share="y")
    for axes, (name, seconds, label) in zip(places, panels, strict=True):
        known = group[group[name] > 0]
        for line in known.to_dict("records"):
            y, seen = line[attack], look[line["label"]]
            axes.errorbar(
                line[name] / seconds, y,
                yerr=[[y - line[f"{attack}_low"]], [line[f"{attack}_high"] - y]],
                color=seen.color, marker=seen.marker, markersize=7, linewidth=1, capsize=2,
            )
        axes.set_xscale("log")
        # Wide enough for two ticks, however close the times are.
        axes.set_xlim(known[name].min() / seconds / 2.3, known[name].max() / seconds * 2.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=label, ylabel=_under(attack))
    _label_rows(figure, axes, known.assign(**{name: known[name] / seconds}), name, attack, look)
    figure.suptitle(shorten(title, 80), fontsize=11)
    return figure


@house_style()
def accuracy_curves(
    panel: pd.DataFrame, title: str, xlabel: str, look: Mapping[str, Look], growing: bool = False,
    ylabel: str = "accuracy (%)",
) -> Figure:
    """Accuracy against `x`; bands are 95 % intervals.

    `panel` is rows of `curves.over_eps` or `over_steps` and the column `x`. `growing`: the axis of
    x is linear up to 1 and logarithmic from there on, with ticks at its values.
    """
    figure, (axes,) = new_figure(7.5, 4.2)
    drawn: Counter[str] = Counter()
    for name, curve in panel.groupby("name", sort=False):
        label = curve["label"].iloc[0]
        seen = look[label]
        axes.plot(curve["x"], curve["accuracy"], label=shorten(str(name)),
                  color=seen.color, marker=seen.marker, markersize=5, clip_on=False,
                  linestyle=_LINES[drawn[label] % len(_LINES)])
        drawn[label] += 1
        axes.fill_between(curve["x"], curve["low"], curve["high"], color=seen.color, alpha=0.1,
                          linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=shorten(title, 80), ylim=(0, None))
    if growing:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xticks(sorted(panel["x"].unique()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


@house_style()
def rob_f_bars(
    groups: Mapping[str, tuple[str, Sequence[Transfer]]], title: str, look: Mapping[str, Look]
) -> Figure:
    """Rob_f(x_f*) and Rob_f(x_S*) of each network f, with 95 % intervals.

    `groups` maps the name of each network to the label that gives its color, and its rows, one
    for each seed.
    """
    figure, (axes,) = new_figure(7.5, 0.62 * len(groups) + 1.3)
    for place, (label, transfers) in enumerate(groups.values()):
        n = transfers[0].n
        color = look[label].color
        for counts, offset, shade in (
            ([t.self_crafted for t in transfers], -0.19, pale(color)),
            ([t.student_crafted for t in transfers], 0.19, color),
        ):
            got = estimate(counts, n)
            axes.barh(place + offset, 100 * got.mean, 0.36, color=shade,
                      xerr=[[100 * (got.mean - got.low)], [100 * (got.high - got.mean)]],
                      error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2})
    axes.set_yticks(range(len(groups)), [shorten(name) for name in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="accuracy of f (%)", title=shorten(title, 80), xlim=(0, None))
    legend_below(figure, [Patch(color=pale(NEUTRAL)), Patch(color=NEUTRAL)],
                 ["on x_f*, crafted against f itself", "on x_S*, crafted against the student"])
    return figure


_AVERAGES: dict[str, Literal["--", ":"]] = {"swa": "--", "ema": ":"}


@house_style()
def training_curves(
    runs: Mapping[str, Sequence[Epoch]], title: str, look: Mapping[str, Look]
) -> Figure:
    """Clean and robust accuracy and the training loss over the epochs, a color for each defense.

    `runs` maps labels to the epochs of all seeds; lines are means over seeds, bands go from the
    lowest to the highest seed, dashed and dotted lines are averaged weights (SWA, EMA).
    """
    epochs = [epoch for run in runs.values() for epoch in run]
    averages = {name: style for name, style in _AVERAGES.items()
                if any(name in epoch.averages for epoch in epochs)}
    figure, (clean, robust, loss) = new_figure(11.5, 3.5, panels=3)
    for label, run in runs.items():
        seen = look[label]
        _over_epochs(clean, [(e.epoch, e.clean) for e in run], seen)
        _over_epochs(robust, [(e.epoch, e.robust) for e in run], seen)
        for name, style in averages.items():
            pairs = [(e.epoch, *e.averages.get(name, (None, None))) for e in run]
            _over_epochs(clean, [(epoch, value) for epoch, value, _ in pairs], seen, style)
            _over_epochs(robust, [(epoch, value) for epoch, _, value in pairs], seen, style)
        _over_epochs(loss, [(e.epoch, e.losses.get("total")) for e in run], seen)
    clean.set(ylabel=f"clean {_splits(epochs)} accuracy (%)")
    robust.set(ylabel=f"robust {_splits(epochs)} accuracy (%)", title=shorten(title, 80))
    for axes in (clean, robust):
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    loss.set(ylabel="training loss")
    for axes in (clean, robust, loss):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [Line2D([], [], color=look[label].color, marker=look[label].marker, markersize=4)
               for label in runs]
    labels = [shorten(label) for label in runs]
    for name, style in averages.items():
        handles.append(Line2D([], [], color=INK, linestyle=style))
        labels.append(f"averaged weights ({name.upper()})")
    legend_below(figure, handles, labels)
    return figure


@house_style()
def rob_f_curves(
    runs: Mapping[str, Sequence[Epoch]], title: str, look: Mapping[str, Look]
) -> Figure:
    """Rob_f(x_S*) and Rob_f(x_f*) over the epochs; `runs` as for `training_curves`.

    A color for each defense, a line style for each of its networks.
    """
    figure, axes = new_figure(9.5, 3.7, panels=2, share="y")
    epochs = [epoch for run in runs.values() for epoch in run]
    roles = ["student", *sorted({name for e in epochs for name in e.rob_f} - {"student"})]
    styles = dict(zip(roles, cycle(_LINES), strict=False))
    lines: dict[str, Line2D] = {}
    for label, run in runs.items():
        for network in dict.fromkeys(name for e in run for name in e.rob_f):
            values = [(e.epoch, *e.rob_f[network]) for e in run if network in e.rob_f]
            _over_epochs(axes[0], [(epoch, students) for epoch, _, students in values],
                         look[label], styles[network])
            _over_epochs(axes[1], [(epoch, own) for epoch, own, _ in values], look[label],
                         styles[network])
            lines[shorten(f"{label}: {network}")] = Line2D(
                [], [], color=look[label].color, marker=look[label].marker, markersize=4,
                linestyle=styles[network])
    for place, what in zip(axes, ("on x_S*, crafted against the student",
                                  "on x_f*, crafted against f itself"), strict=True):
        place.set(title=what, xlabel="epoch", ylim=(0, None))
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel(f"{_splits(epochs)} accuracy of f (%)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    figure.suptitle(shorten(title, 80))
    legend_below(figure, list(lines.values()), list(lines))
    return figure


def _splits(epochs: Sequence[Epoch]) -> str:
    """What the accuracies after epochs are of."""
    return " / ".join(sorted({"test (!)" if e.selection == "test" else "validation"
                              for e in epochs}))


def _under(attack: str) -> str:
    return f"accuracy under {shorten(TITLES.get(attack, attack))} (%)"


def _label_rows(
    figure: Figure, axes: Axes, group: pd.DataFrame, x: str, attack: str, look: Mapping[str, Look]
) -> None:
    """The names of the points (x, attack) in the right margin, where they never overlap."""
    group = group.sort_values([attack, "name"])
    low, high = group[f"{attack}_low"].min(), group[f"{attack}_high"].max()
    pad = 0.06 * (high - low)
    axes.set_ylim(low - pad, high + pad)
    places = _spread([float((y - low + pad) / (high - low + 2 * pad)) for y in group[attack]],
                     gap=0.22 / figure.get_figheight())
    for line, place in zip(group.to_dict("records"), places, strict=True):
        axes.annotate(
            shorten(line["name"]), (line[x], line[attack]), (1.03, place),
            textcoords="axes fraction", va="center",
            arrowprops={"arrowstyle": "-", "color": look[line["label"]].color, "linewidth": 0.6,
                        "alpha": 0.6, "shrinkB": 5, "relpos": (0, 0.5)},
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] near the wanted ones (ascending), at least `gap` apart if they fit."""
    gap = min(gap, 1 / len(wanted))
    places: list[float] = []
    for want in wanted:
        places.append(max(want, places[-1] + gap) if places else want)
    limit = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _over_epochs(
    axes: Axes, points: Sequence[tuple[int, float | None]], look: Look, linestyle: str = "-"
) -> None:
    """The mean over seeds and the range of the seeds; epochs without a value are left out."""
    by_epoch: dict[int, list[float]] = {}
    for epoch, value in points:
        if value is not None:
            by_epoch.setdefault(epoch, []).append(value)
    epochs = sorted(by_epoch)
    values = [by_epoch[epoch] for epoch in epochs]
    axes.plot(epochs, [fmean(v) for v in values], color=look.color, linestyle=linestyle,
              linewidth=1.5, marker=look.marker, markersize=4, markevery=1 + len(epochs) // 8)
    axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values],
                      color=look.color, alpha=0.15, linewidth=0)
