"""Accuracy on corrupted images: per corruption and severity, and the mean that is ranked by.

The mean corruption accuracy is the plain mean over the 15 corruptions of the paper and their
severities, as RobustBench ranks by. It is not the mCE of Hendrycks and Dietterich 2019, which
divides errors by those of AlexNet on ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from robench.reports.columns import make_frame
from robench.reports.figures import accuracy_curves
from robench.reports.heatmap import heat_map
from robench.reports.record import Corruptions
from robench.reports.store import Results
from robench.reports.style import Drawing, Looks
from robench.reports.surveys import grouped, net_names
from robench.reports.text import Board, Cell, Column, accuracy
from robench.reports.uncertainty import estimate

# The corruptions of the benchmark, in the paper's order. The other four of the published files are
# for validation, and no part of the mean.
STANDARD = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)
CLEAN, MEAN = "(none)", "mean"
COLUMNS = ("group", "dataset", "split", "name", "label", "seeds", "corruption", "severity",
           "averaged", "accuracy", "std", "low", "high", "n", "images")


class Setting(NamedTuple):
    """What networks share that may be compared."""

    dataset: str
    split: str
    n: int
    images: str


def corruptions(results: Results) -> pd.DataFrame:
    """Accuracy in percent, for each network, corruption and severity, the mean over seeds.

    `corruption` is "(none)" for the clean images, "mean" for the mean over `averaged` corruptions;
    `severity` is 1, 2, ..., "mean" over these, and "" for clean images. Intervals are of the
    sampling error of n images: corrupted versions of one image are no new images.
    """
    lines = []
    groups = grouped(results.corruptions, _setting, results.records)
    for number, (setting, nets) in enumerate(groups.items(), start=1):
        names = net_names(nets)
        for net, some in nets.items():
            known = {**setting._asdict(), "group": number, "name": names[net], "label": net.label,
                     "seeds": len(some)}
            averaged = ranked(some[0].right)
            rows: list[tuple[str, str, list[float]]] = [(CLEAN, "", [one.clean for one in some])]
            for corruption in (MEAN, *ordered(some[0].right)):
                kinds = averaged if corruption == MEAN else (corruption,)
                table = [np.mean([one.right[kind] for kind in kinds], axis=0) for one in some]
                rows += [(corruption, MEAN, [float(row.mean()) for row in table])]
                rows += [(corruption, str(severity + 1), [float(row[severity]) for row in table])
                         for severity in range(len(table[0]))]
            for corruption, severity, counts in rows:
                got = estimate(counts, setting.n)
                lines.append({
                    **known, "corruption": corruption, "severity": severity,
                    "averaged": len(averaged) if corruption == MEAN else 1,
                    "accuracy": 100 * got.mean, "std": 100 * got.std, "low": 100 * got.low,
                    "high": 100 * got.high,
                })
    return make_frame(lines, COLUMNS)


def ordered(names: Collection[str]) -> tuple[str, ...]:
    """Those of the paper in its order, then the others."""
    return (*(name for name in STANDARD if name in names), *sorted(set(names) - set(STANDARD)))


def ranked(names: Collection[str]) -> tuple[str, ...]:
    """Those that the mean is over: the paper's, or all if there is none of these."""
    return tuple(name for name in STANDARD if name in names) or ordered(names)


def corruption_boards(results: Results) -> list[Board]:
    """A board for each set of images: networks in columns, corruptions in rows."""
    boards = []
    for title, group in _groups(corruptions(results)):
        first = group.iloc[0]
        whole = group[group["severity"].isin(["", MEAN])]
        rows = list(dict.fromkeys(whole["corruption"]))
        averaged = int(whole["averaged"].max())
        columns = [Column("Corruption", tuple(Cell(_said(row, averaged)) for row in rows),
                          words=True)]
        for name, lines in whole.groupby("name", sort=False):
            columns.append(Column(f"{name} %", tuple(
                replace(accuracy(*(line[part] for part in ("accuracy", "std", "low", "high")),
                                 n=first["n"], failed=0, show_n=False), sort=line["accuracy"])
                for line in lines.to_dict("records"))))
        boards.append(Board(title, tuple(columns), facts=(
            f"Accuracy on {first['n']:,} images in each version, mean over the severities",
            _mean_of(averaged), f"Seeds: {' or '.join(map(str, sorted(set(group['seeds']))))}"
            + ("; ± is the standard deviation over seeds" if (group["seeds"] > 1).any() else ""),
            f"Images: sha256 {first['images'][:12]}")))
    return boards


def draw_corruptions(results: Results, look: Looks) -> Iterator[Drawing]:
    """For each set of images a heat map of the corruptions, and the mean over severity."""
    for title, group in _groups(corruptions(results)):
        names = list(dict.fromkeys(group["name"]))
        corrupted = group[group["corruption"] != CLEAN]
        averaged = int(group["averaged"].max())
        if len(names) > 1:
            across, cells = "name", corrupted[corrupted["severity"] == MEAN]
            label, what = "network", "mean over the severities"
            headline = f"{title}, {what}"
        else:
            across, cells = "severity", corrupted[corrupted["severity"] != MEAN]
            label, what = "severity", f"of {names[0]}"
            headline = f"{title}: {names[0]}"
        grid = cells.pivot(index="corruption", columns=across, values="accuracy")
        grid = grid.loc[list(dict.fromkeys(cells["corruption"])),
                        list(dict.fromkeys(cells[across]))]
        rows = [_said(row, averaged) for row in grid.index]
        yield Drawing(
            f"corruptions {title}",
            f"{title}: accuracy in percent under each corruption, {what}. {_mean_of(averaged)}.",
            "Accuracy in percent: " + "; ".join(
                f"{row}: " + ", ".join(f"{column} {value:.1f}" for column, value in line.items())
                for row, (_, line) in zip(rows, grid.iterrows(), strict=True)),
            heat_map(grid.to_numpy(), rows, list(grid.columns), headline, (label, "corruption"),
                     "accuracy (%)"),
        )
        mean = group[(group["corruption"] == CLEAN)
                     | ((group["corruption"] == MEAN) & (group["severity"] != MEAN))]
        panel = mean.assign(x=mean["severity"].replace("", "0").astype(int))
        yield Drawing(
            f"accuracy-over-severity {title}",
            f"{title}: mean accuracy over {averaged} corruptions as they become more severe; 0 is "
            "without corruption. Bands are 95 % intervals of the sampling error.",
            "Accuracy in percent over severity: " + "; ".join(
                f"{name} " + ", ".join(f"{line['accuracy']:.1f} at {line['x']}"
                                       for line in lines.to_dict("records"))
                for name, lines in panel.groupby("name", sort=False)),
            accuracy_curves(panel, title, "severity (0: no corruption)", look,
                            ylabel=f"mean accuracy over {averaged} corruptions (%)"),
        )


def _said(corruption: str, averaged: int) -> str:
    if corruption == MEAN:
        return f"mean of {averaged}"
    return "no corruption" if corruption == CLEAN else corruption.replace("_", " ")


def _mean_of(averaged: int) -> str:
    """What the mean is, and what it is not."""
    which = ("the 15 corruptions of the paper" if averaged == len(STANDARD)
             else f"{averaged} corruptions, not the paper's 15,")
    return f"The mean is the plain one over {which} and their severities; it is no mCE"


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for _, group in frame.groupby("group", sort=False):
        first = group.iloc[0]
        yield f"{first['dataset']} {first['split']}, corrupted", group


def _setting(one: Corruptions) -> Setting:
    return Setting(one.dataset, one.split, one.n, one.data_sha256)

