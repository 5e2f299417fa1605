"""Accuracy as the attacker may do more: over eps, and over the steps of PGD.

With steps of one length from one start, the first k iterates of a long run are those of PGD with k
steps, and any misclassified iterate counts. So one run gives the accuracy under every number of
steps: an image withstands k steps if none of the iterates 0 to k is misclassified.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import pandas as pd

from robench.reports.columns import make_frame
from robench.reports.figures import accuracy_curves
from robench.reports.grouping import Key, Row, canonical, distinct, rows
from robench.reports.record import Steps
from robench.reports.store import Results
from robench.reports.style import Drawing, Looks
from robench.reports.surveys import grouped, net_names
from robench.reports.uncertainty import Estimate, estimate

LADDER = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # numbers of steps in table and figure
COLUMNS = ("dataset", "split", "name", "label", "seeds", "accuracy", "std", "low", "high", "n",
           "images", "attack")


def over_eps(results: Results) -> pd.DataFrame:
    """Accuracy under an attack as its budget grows; at eps = 0 it is clean accuracy.

    One row for each network and eps, aggregated over seeds, in percent; `norm` is that of eps, in
    units of the pixel range [0, 1].
    """
    panels: dict[tuple[str, ...], dict[Key, list[Row]]] = {}
    for row in rows([r for r in results.records if r.role == "curve"]):
        norm = row.key.threat.partition(":")[0]
        for attack, images in row.images.items():
            if row.passed(attack):
                place = (row.key.dataset, row.key.split, norm, attack, images)
                panel = panels.setdefault(place, {})
                panel.setdefault(row.key._replace(threat=norm), []).append(row)
    lines = []
    for (dataset, split, norm, attack, images), nets in panels.items():
        names = distinct({
            key: ((), some[0].label, canonical(key._replace(options="")._asdict()))
            for key, some in nets.items()
        })
        for key, some in nets.items():
            known = {"dataset": dataset, "split": split, "norm": norm, "attack": attack,
                     "images": images, "name": names[key], "label": some[0].label,
                     "seeds": len(some[0].passed(attack))}
            lines += [{**known, "eps": eps, **_accuracy(got)} for eps, got in _points(some, attack)]
    return make_frame(lines, (*COLUMNS, "norm", "eps"))


def over_steps(results: Results) -> pd.DataFrame:
    """Accuracy under PGD as it takes more steps, all of the length `step_size`.

    One row for each network and number of steps, aggregated over seeds, in percent; with 0 steps
    it is that at a random start.
    """
    lines = []
    for setting, nets in grouped(results.steps, _setting, results.records).items():
        names = net_names(nets)
        for net, some in nets.items():
            known = {**setting._asdict(), "name": names[net], "label": net.label,
                     "seeds": len(some)}
            left = [[one.n_correct - fell for fell in accumulate(one.fell_at)] for one in some]
            lines += [{**known, "steps": steps,
                       **_accuracy(estimate([counts[steps] for counts in left], some[0].n))}
                      for steps in (*(k for k in LADDER if k < setting.longest), setting.longest)]
    return make_frame(lines, (*COLUMNS, "threat", "step_size", "start", "steps"))


class Setting(NamedTuple):
    """What runs of PGD share that may be compared."""

    dataset: str
    split: str
    threat: str
    attack: str
    step_size: float
    start: str
    longest: int
    images: str


def _setting(one: Steps) -> Setting:
    return Setting(one.dataset, one.split, one.threat, one.attack,
                   one.attack_config["step_size"], one.attack_config["start"],
                   len(one.fell_at) - 1, one.data_sha256)


def draw_over_eps(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each data set, norm, attack and set of images."""
    frame = over_eps(results)
    for (dataset, split, norm, attack, _), panel in frame.groupby(
            ["dataset", "split", "norm", "attack", "images"], sort=False):
        scale, unit = ((255, "1/255 of the pixel range") if norm == "Linf"
                       else (1, "pixel range [0, 1]"))
        title = f"{dataset} {split}, {norm}, {attack}"
        panel = panel.assign(x=(scale * panel["eps"]).round(9))
        yield Drawing(
            f"accuracy-over-eps {title}",
            f"{title}: accuracy as the budget of the attack grows; eps = 0 is clean accuracy. "
            "Bands are 95 % intervals of the sampling error.",
            f"Accuracy in percent over eps: {_in_words(panel)}",
            accuracy_curves(panel, title, f"eps ({norm}, {unit})", look),
        )


def draw_over_steps(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each data set, threat model, step size and set of images."""
    frame = over_steps(results)
    for (dataset, split, threat, attack, size, start, _), panel in frame.groupby(
            ["dataset", "split", "threat", "attack", "step_size", "start", "images"], sort=False):
        title = f"{dataset} {split}, {threat}, {attack}"
        panel = panel.assign(x=panel["steps"].astype(int))
        yield Drawing(
            f"accuracy-over-steps {title}",
            f"{title}: accuracy as PGD takes more steps of {size:.4g} each from one start "
            f"({start}); any iterate counts. 0 steps: at the start itself. Bands are 95 % "
            "intervals of the sampling error. A line that still falls at its end means that PGD "
            "with so few steps overstates robustness.",
            f"Accuracy in percent over steps: {_in_words(panel)}",
            accuracy_curves(panel, title, "steps of PGD (number)", look, growing=True),
        )


def _points(some: list[Row], attack: str) -> list[tuple[float, Estimate]]:
    """(eps, accuracy), from the clean accuracy at 0 on."""
    first = some[0].passed(attack)
    points = {0.0: estimate([r.n_correct for r in first], first[0].n)}
    for row in some:
        records = row.passed(attack)
        eps = float(Fraction(row.key.threat.partition(":")[2]))
        points[eps] = estimate([r.n_robust for r in records], records[0].n)
    return sorted(points.items(), key=lambda point: point[0])


def _accuracy(got: Estimate) -> dict[str, Any]:
    return {"accuracy": 100 * got.mean, "std": 100 * got.std, "low": 100 * got.low,
            "high": 100 * got.high, "n": got.n}


def _in_words(panel: pd.DataFrame) -> str:
    return "; ".join(
        f"{name} " + ", ".join(f"{line['accuracy']:.1f} at {line['x']:.3g}"
                               for line in some.to_dict("records"))
        for name, some in panel.groupby("name", sort=False))
