"""The figures of classes: accuracy class by class, and confusion matrices."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robench.reports.boards import group_title
from robench.reports.class_boards import FEW, attack_title, extremes
from robench.reports.classes import class_accuracy, confusion
from robench.reports.overlap import first_and_beside
from robench.reports.record import Record
from robench.reports.style import NEUTRAL, Drawing, Look, house_style, legend_below, shorten
from robench.reports.tables import ranked_groups
from robench.reports.tradeoff import row_names

COLORS = "Blues"  # from light to dark: one hue, whose order is seen without color too
# Not exactly the page's text and paper, which change in dark mode; the cells do not.
DARK, LIGHT = "#0b0f14", "#fdfdfd"
STYLES: tuple[Literal["-", "--"], ...] = ("-", "--")  # of the first row and of the other


def draw_classes(records: Sequence[Record], look: Mapping[str, Look]) -> Iterator[Drawing]:
    """For each group of the leaderboard the accuracy of the classes and, where these are few, the
    confusion matrix, of its first row and the one to see it beside (see `overlap`)."""
    classes, confused = class_accuracy(records), confusion(records)
    for number, group in enumerate(ranked_groups(records), start=1):
        names = row_names(group)
        shown = [names[row.key] for row in first_and_beside(group)]
        mine, cells = (frame[(frame["group"] == number) & frame["name"].isin(shown)]
                       for frame in (classes, confused))
        if mine.empty:
            continue
        yield _accuracies(mine, look)
        if len({*cells["true"], *cells["predicted"]} - {-1}) <= FEW:
            yield _confusions(cells)


def _accuracies(classes: pd.DataFrame, look: Mapping[str, Look]) -> Drawing:
    attack, title = attack_title(classes), group_title(classes)
    first = classes[classes["name"] == classes["name"].iloc[0]]
    chosen = extremes(first)["class"].tolist()
    several = len(set(classes["class"])) > len(chosen)
    shown = classes[classes["class"].isin(chosen)]
    sizes = sorted(set(shown["n"]))
    images = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    which = (f"The {FEW} lowest and the {FEW} highest of {len(first)} classes of "
             f"{first['name'].iloc[0]}" if several else "Each class")
    return Drawing(
        f"class-accuracy {title}",
        f"{title}: accuracy of single classes under {attack} (filled) and without an attack "
        f"(hollow), in percent of the {images} images of a class; means over seeds, with 95 % "
        f"intervals of the sampling error. {which}, the lowest robust accuracy above. Lines are "
        f"the accuracy under {attack} over all classes.",
        f"Accuracy in percent by class under {attack}: " + "; ".join(
            f"{name} " + ", ".join(f"{line['class_name']} {line['robust']:.1f}"
                                   for line in _in_order(some, chosen))
            for name, some in shown.groupby("name", sort=False)),
        class_dots(classes, chosen, attack, title, look),
    )


def _confusions(cells: pd.DataFrame) -> Drawing:
    attack, title = attack_title(cells), group_title(cells)
    wrong = cells[cells["true"] != cells["predicted"]].sort_values("share", ascending=False)
    return Drawing(
        f"confusion {title}",
        f"{title}: what the images of each class are taken for under {attack}, in percent of the "
        "images of the class, the mean over seeds; rows add up to 100, cells below 0.5 are left "
        "blank. The diagonal is robust accuracy. Images that are wrong without an attack count as "
        "what they are taken for then. Into which wrong class an image falls depends on the "
        "attack.",
        "Most frequent confusions in percent of the true class: " + "; ".join(
            f"{name} " + ", ".join(
                f"{line['true_name']} taken for {line['predicted_name']} {line['share']:.1f}"
                for line in some.head(3).to_dict("records"))
            for name, some in wrong.groupby("name", sort=False)),
        confusion_matrices(cells, title),
    )


@house_style()
def class_dots(
    classes: pd.DataFrame, chosen: Sequence[int], attack: str, title: str, look: Mapping[str, Look]
) -> Figure:
    """Clean and robust accuracy of the chosen classes from top to bottom, of each network."""
    networks = list(classes.groupby("name", sort=False))
    figure = Figure(figsize=(7.5, 0.22 * len(chosen) * max(1.5, len(networks)) + 1.2),
                    layout="constrained")
    axes = figure.subplots()
    for i, (_, some) in enumerate(networks):
        seen = look[some["label"].iloc[0]]
        lines = _in_order(some, chosen)
        places = [y + (i - (len(networks) - 1) / 2) * 0.3 for y in range(len(lines))]
        for kind, fill in (("clean", "none"), ("robust", seen.color)):
            middle, low, high = (np.array([line[kind + part] for line in lines], dtype=float)
                                 for part in ("", "_low", "_high"))
            axes.errorbar(middle, places, xerr=[middle - low, high - middle], color=seen.color,
                          marker=seen.marker, markersize=6, markerfacecolor=fill, linestyle="",
                          elinewidth=1, capsize=2, alpha=1 if kind == "robust" else 0.6)
        axes.axvline((some["robust"] * some["n"]).sum() / some["n"].sum(), color=seen.color,
                     linewidth=0.9, linestyle=STYLES[i], zorder=1)
    known = classes.drop_duplicates("class").set_index("class")["class_name"]
    axes.set_yticks(range(len(chosen)), [shorten(known[one], 24) for one in chosen])
    if len(chosen) < len(known):  # between the two ends
        axes.axhline(len(chosen) / 2 - 0.5, color=NEUTRAL, linewidth=0.9, linestyle=":")
    axes.set(ylim=(len(chosen) - 0.5, -0.5), xlim=(0, 100), title=shorten(title, 80),
             xlabel="accuracy (% of the images of the class)", ylabel="true class")
    axes.grid(visible=False, axis="y")
    looks = {str(name): look[some["label"].iloc[0]] for name, some in networks}
    handles = [Line2D([], [], color=one.color, marker=one.marker, markersize=6, linestyle=style)
               for one, style in zip(looks.values(), STYLES, strict=False)]
    handles += [Line2D([], [], color=NEUTRAL, marker="o", markersize=6, linestyle="",
                       markerfacecolor=fill) for fill in (NEUTRAL, "none")]
    legend_below(figure, handles, [*map(shorten, looks), f"under {shorten(attack)}", "clean"])
    return figure


@house_style()
def confusion_matrices(cells: pd.DataFrame, title: str) -> Figure:
    """A heat map for each network, true classes from top to bottom, on one scale."""
    names = {**dict(zip(cells["true"], cells["true_name"], strict=True)),
             **dict(zip(cells["predicted"], cells["predicted_name"], strict=True))}
    true = sorted(set(cells["true"]))
    taken = [*sorted({*cells["true"], *cells["predicted"]} - {-1}),
             *([-1] if -1 in set(cells["predicted"]) else [])]
    networks = list(cells.groupby("name", sort=False))
    figure = Figure(figsize=((0.42 * len(taken) + 0.5) * len(networks) + 1.9,
                             0.4 * len(true) + 1.9), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    scale, colors = Normalize(0, max(cells["share"].max(), 1)), colormaps[COLORS]
    for axes, (name, some) in zip(panels, networks, strict=True):
        shares = np.zeros((len(true), len(taken)))
        for line in some.to_dict("records"):
            shares[true.index(line["true"]), taken.index(line["predicted"])] = line["share"]
        drawn = axes.pcolormesh(shares, norm=scale, cmap=colors, edgecolors=LIGHT, linewidth=0.5)
        for (y, x), share in np.ndenumerate(shares):
            if share >= 0.5:
                axes.text(x + 0.5, y + 0.5, f"{share:.0f}", ha="center", va="center", fontsize=8,
                          color=LIGHT if scale(share) > 0.6 else DARK)
        axes.set_xticks(np.arange(len(taken)) + 0.5, [shorten(names[k], 14) for k in taken],
                        rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(true)) + 0.5, [shorten(names[k], 14) for k in true])
        axes.set(xlabel="taken for", title=shorten(str(name)), aspect="equal",
                 ylim=(len(true), 0))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("true class")
    bar = figure.colorbar(drawn, ax=list(panels), shrink=0.9)
    bar.set_label("images of the true class (%)")
    figure.suptitle(shorten(title, 80), fontsize=11)
    return figure


def _in_order(some: pd.DataFrame, chosen: Sequence[int]) -> list[dict[Hashable, Any]]:
    """The lines of one network for these classes."""
    return some.set_index("class").reindex(list(chosen)).to_dict("records")
