"""How sharp the loss around networks is: one number for each, as a table.

Sharpness is the mean of L(w + alpha d) - L(w) over alpha in [-1/2, 1/2] and over the random
directions d, in nats. L is the loss on examples that are crafted anew for each displacement, each
filter of d is as long as the network's own. So it is the average-case flatness of the robust loss
of Stutz et al. 2021 (arXiv 2104.04448, section 3), with Li et al.'s normalization filter by filter
in place of theirs layer by layer. An average, since it is finite, does not depend on the number of
points, and is far steadier than a curvature at 0, a difference of losses that each come from an
attack. Not over the whole of [-1, 1]: there every network is at chance, and what would count is how
large its logits get. Lower is flatter; it may be negative, since no network is trained to a minimum
of the loss on these images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid
from scipy.stats import t

from robench.reports.columns import make_frame, mark
from robench.reports.grouping import canonical
from robench.reports.record import Landscape, Record
from robench.reports.store import Results
from robench.reports.surveys import Net, grouped
from robench.reports.text import NOTHING, Board, Cell, Column, markdown

RADIUS = 0.5
COLUMNS = ("group", "rank", "dataset", "split", "threat", "attack", "model", "recipe", "defense",
           "label", "checkpoint", "selection", "seeds", "sharpness", "sharpness_std",
           "sharpness_low", "sharpness_high", "sharpness_directions_std", "loss", "loss_std", "n",
           "images", "directions", "points", "direction_seed")


class Setting(NamedTuple):
    """What landscapes share that may be compared."""

    dataset: str
    split: str
    threat: str
    attack: str
    model: str
    kind: str
    options: str  # of the attack, as JSON
    images: str
    direction_seed: int
    alphas: tuple[float, ...]
    lines: int

    @property
    def title(self) -> str:
        under = ", ".join(part for part in (self.threat, self.attack) if part)
        return f"{self.dataset} {self.split}, {under}, {self.model}"


def sharpness(landscapes: Sequence[Landscape], records: Sequence[Record] = ()) -> pd.DataFrame:
    """One row for each network surveyed along directions, aggregated over seeds; flattest first.

    `rank` restarts in each `group`, whose rows have the images, attack, architecture, directions
    and points in common. `sharpness_low` and `_high` are the 95 % interval of the mean over seeds
    by Student's t, NaN for a single one; `sharpness_directions_std` is the standard deviation over
    directions, the mean over seeds; `loss` is that of the networks themselves. Labels are those of
    the `records` of the same runs.
    """
    groups = grouped([one for one in landscapes if one.kind == "weight"], setting_of, records)
    lines = [
        {**line, "group": number}
        for number, (setting, nets) in enumerate(groups.items(), start=1)
        for line in _ranking(setting, nets)
    ]
    return make_frame(lines, COLUMNS)


def sharpness_by_direction(landscape: Landscape) -> list[float]:
    """The mean increase of the loss over |alpha| <= 1/2, for each line; NaN if it is not finite."""
    alphas = np.array(landscape.alphas)
    # The ends of the range need not be among the points.
    inside = np.union1d(alphas[np.abs(alphas) <= RADIUS], [-RADIUS, RADIUS])
    center = landscape.alphas.index(0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        means = [trapezoid(np.interp(inside, alphas, line), inside) / (2 * RADIUS) - line[center]
                 for line in landscape.losses]
    return [_finite(float(mean)) for mean in means]


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values by Student's t; NaN for one."""
    if len(values) < 2:
        return math.nan, math.nan
    half = float(t.ppf(0.975, len(values) - 1)) * _std(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def setting_of(one: Landscape) -> Setting:
    return Setting(one.dataset, one.split, one.threat, one.attack, one.model, one.kind,
                   canonical(one.attack_config), one.data_sha256, one.direction_seed, one.alphas,
                   len(one.losses))


def landscape_boards(frame: pd.DataFrame) -> list[Board]:
    """A board for each group of `sharpness`."""
    return [_board(group) for _, group in frame.groupby("group", sort=False)]


def sharpness_text(results: Results) -> str:
    """The sharpness ranking in Markdown, and what its columns mean; "" without one."""
    boards = landscape_boards(sharpness(results.landscapes, results.records))
    return "\n".join(["# Sharpness\n", *map(markdown, boards), LEGEND]) if boards else ""


LEGEND = """\
Mean increase of the cross-entropy on PGD examples, crafted anew, when the weights move by at most
half of each filter's length in random directions; lower is flatter. ± is the standard deviation
over seeds, [ ] the 95 % interval of the mean over seeds (Student's t).
"""


def _ranking(
    setting: Setting, nets: Mapping[Net, Sequence[Landscape]]
) -> list[dict[str, Any]]:
    lines = [_line(setting, net, some) for net, some in nets.items()]
    values = sorted(line["sharpness"] for line in lines if not math.isnan(line["sharpness"]))
    for line in lines:
        value = line["sharpness"]
        line["rank"] = None if math.isnan(value) else values.index(value) + 1
    return sorted(lines, key=lambda line: (line["rank"] or math.inf, line["label"]))


def _line(setting: Setting, net: Net, some: Sequence[Landscape]) -> dict[str, Any]:
    numbers = [sharpness_by_direction(one) for one in some]
    means = [statistics.fmean(number) for number in numbers]
    losses = [_finite(one.losses[0][one.alphas.index(0.0)]) for one in some]
    low, high = seed_interval(means)
    return {
        **setting._asdict(), **net._asdict(),
        "label": f"{net.label} ({net.source})" if net.source else net.label,
        "defense": some[0].defense,
        "selection": mark(net.selection),
        "seeds": len(some),
        "sharpness": statistics.fmean(means),
        "sharpness_std": _std(means),
        "sharpness_low": low,
        "sharpness_high": high,
        "sharpness_directions_std": statistics.fmean(map(_std, numbers)),
        "loss": statistics.fmean(losses),
        "loss_std": _std(losses),
        "n": some[0].n,
        "images": setting.images[:12],
        "directions": setting.lines,
        "points": len(setting.alphas),
    }


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _board(group: pd.DataFrame) -> Board:
    lines = group.to_dict("records")
    first = lines[0]
    words = {"label": "Defense", "recipe": "Recipe", "checkpoint": "Checkpoint",
             "selection": "Selected on"}
    return Board(
        title=f"{first['dataset']} {first['split']}, {first['threat']}, {first['model']}",
        columns=(
            Column("#", tuple(Cell(NOTHING if pd.isna(line["rank"]) else str(line["rank"]))
                              for line in lines)),
            *(Column(title, tuple(Cell(str(line[name]) or NOTHING) for line in lines), words=True)
              for name, title in words.items()),
            Column("Seeds", tuple(Cell(str(line["seeds"])) for line in lines)),
            Column(LEAD, tuple(_cell(line, "sharpness") for line in lines)),
            Column("Std over directions, nats",
                   tuple(Cell(_nats(line["sharpness_directions_std"])) for line in lines)),
            Column("Loss, nats", tuple(_cell(line, "loss") for line in lines)),
        ),
        facts=(f"{first['attack']} on {first['n']:,} images, {first['directions']} directions, "
               f"{first['points']} points on each", f"Images: sha256 {first['images']}"),
        lead=LEAD,
    )


LEAD = "Sharpness, nats"


def _cell(line: Mapping[Any, Any], name: str) -> Cell:
    """Mean and standard deviation over seeds; the interval as detail, where there is one."""
    value, std, low = line[name], line[f"{name}_std"], line.get(f"{name}_low", math.nan)
    spread = "" if math.isnan(std) else f" ± {_nats(std)}"
    detail = "" if math.isnan(low) else f"[{_nats(low)}, {_nats(line[f'{name}_high'])}]"
    return Cell(_nats(value) + spread, detail, sort=None if math.isnan(value) else value)


def _nats(value: float) -> str:
    """With a true minus."""
    return NOTHING if math.isnan(value) else f"{value:.3f}".replace("-", "−")
