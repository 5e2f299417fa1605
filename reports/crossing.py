"""Whose examples fool whom: every network on the examples that were crafted against every other.

A number belongs to a pair of networks of one seed, and is the mean over seeds. Low off the diagonal
means that the examples transfer; a network that is much more accurate on the examples of others
than on its own is no more robust for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import pandas as pd

from robench.reports.columns import make_frame
from robench.reports.grouping import canonical
from robench.reports.heatmap import heat_map
from robench.reports.record import Crossing, Shown
from robench.reports.store import Results
from robench.reports.style import Drawing, Looks
from robench.reports.surveys import (
    Names,
    Net,
    another,
    grouped,
    net_names,
    net_of,
    survey_labels,
)
from robench.reports.text import NOTHING, Board, Cell, Column, percent
from robench.reports.uncertainty import estimate

COLUMNS = ("group", "dataset", "split", "threat", "attack", "crafted_against", "evaluated_on",
           "seeds", "accuracy", "accuracy_std", "accuracy_low", "accuracy_high", "kept", "clean",
           "n", "images")


class Setting(NamedTuple):
    """What pairs share that may be compared."""

    dataset: str
    split: str
    threat: str
    attack: str
    options: str  # of the attack, as JSON
    images: str


def crossing(results: Results) -> pd.DataFrame:
    """One row for each pair of networks, by their names, the mean over seeds, in percent.

    `accuracy` is that of the network `evaluated_on` on examples crafted against the network
    `crafted_against`, over all n images, with its standard deviation over seeds and the 95 %
    interval of the sampling error; `kept` is over the images only that it gets right when clean,
    which `clean` is the share of.
    """
    labels = survey_labels([shown for one in results.crossings for shown in one.shown],
                           results.records)
    groups = grouped(results.crossings, _setting, results.records)
    lines = []
    for number, (setting, nets) in enumerate(groups.items(), start=1):
        places = _places(nets, labels)
        pairs: dict[tuple[Net, Net], list[tuple[Crossing, Shown]]] = {}
        for net, some in nets.items():
            for one in some:
                for shown in one.shown:
                    target = places[shown.seed, shown.weights_sha256]
                    pairs.setdefault((net, target), []).append((one, shown))
        names = net_names(dict.fromkeys(net for pair in pairs for net in pair))
        for (source, target), found in sorted(
                pairs.items(), key=lambda pair: [names[net] for net in pair[0]]):
            n = found[0][0].n
            right = estimate([shown.right for _, shown in found], n)
            clean = sum(shown.clean for _, shown in found)
            lines.append({
                **setting._asdict(), "group": number, "crafted_against": names[source],
                "evaluated_on": names[target], "seeds": len(found),
                "accuracy": 100 * right.mean, "accuracy_std": 100 * right.std,
                "accuracy_low": 100 * right.low, "accuracy_high": 100 * right.high,
                "kept": 100 * sum(shown.kept for _, shown in found) / clean if clean else None,
                "clean": 100 * clean / (n * len(found)), "n": n,
            })
    return make_frame(lines, COLUMNS)


def _places(nets: Mapping[Net, Sequence[Crossing]], labels: Names) -> dict[tuple[int, str], Net]:
    """The networks that were attacked or shown, by seed and weights.

    As in `grouped` the one seen last stands for its seed, unless another of it was attacked.
    """
    places = {(one.seed, one.weights_sha256): net for net, some in nets.items() for one in some}
    taken = {(net, seed) for (seed, _), net in places.items()}
    for one in sorted(chain(*nets.values()), key=lambda one: one.created, reverse=True):
        for shown in one.shown:
            if (shown.seed, shown.weights_sha256) not in places:
                net = net_of(shown, labels)
                if (net, shown.seed) in taken:
                    net = another(net, shown)
                taken.add((net, shown.seed))
                places[shown.seed, shown.weights_sha256] = net
    return places


def crossing_boards(results: Results) -> list[Board]:
    """A board for each set of images and attack: a row for each network that was attacked."""
    boards = []
    for title, group in _groups(crossing(results)):
        first, grid = group.iloc[0], _grid(group)
        rows = list(grid.index)
        columns = [Column("Crafted against", tuple(map(Cell, rows)), words=True)]
        for target, values in grid.items():
            columns.append(Column(f"{target} %", tuple(
                Cell(NOTHING if pd.isna(value) else percent(value, first["n"]))
                for value in values)))
        seeds = sorted(set(group["seeds"]))
        boards.append(Board(title, tuple(columns), facts=(
            f"Accuracy on all of {first['n']:,} images, columns: evaluated on",
            f"Seeds: {' or '.join(map(str, seeds))}, pairs are of one seed",
            f"Images: sha256 {first['images'][:12]}")))
    return boards


def draw_crossing(results: Results, look: Looks) -> Iterator[Drawing]:
    """A heat map for each set of images and attack with several networks."""
    for title, group in _groups(crossing(results)):
        grid = _grid(group)
        if len(grid.columns) < 2:
            continue
        yield Drawing(
            f"transfer {title}",
            f"{title}: accuracy in percent of the network below on examples crafted against the "
            "network at the left, over all images, wrong when clean or not; means over seeds. On "
            "the diagonal each network meets its own examples.",
            "Accuracy in percent: " + "; ".join(
                f"examples against {source}: " + ", ".join(
                    f"{target} {value:.1f}" for target, value in values.items()
                    if not pd.isna(value))
                for source, values in grid.iterrows()),
            heat_map(grid.to_numpy(), list(grid.index), list(grid.columns), title,
                     ("evaluated on (network)", "crafted against (network)"), "accuracy (%)"),
        )


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for _, group in frame.groupby("group", sort=False):
        first = group.iloc[0]
        yield (f"{first['dataset']} {first['split']}, {first['threat']}, {first['attack']}", group)


def _grid(group: pd.DataFrame) -> pd.DataFrame:
    """Accuracies, rows: crafted against, columns: evaluated on, in the order of appearance."""
    columns = dict.fromkeys(group["evaluated_on"])
    rows = dict.fromkeys(group["crafted_against"])
    values: Mapping[tuple[str, str], float] = {
        (line["crafted_against"], line["evaluated_on"]): line["accuracy"]
        for line in group.to_dict("records")}
    return pd.DataFrame([[values.get((row, column)) for column in columns] for row in rows],
                        index=list(rows), columns=list(columns), dtype=float)


def _setting(one: Crossing) -> Setting:
    return Setting(one.dataset, one.split, one.threat, one.attack, canonical(one.attack_config),
                   one.data_sha256)
