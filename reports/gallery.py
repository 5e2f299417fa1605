"""Which figures there are for some results, under which names, and what they say in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from statistics import fmean

import pandas as pd

from robench.reports.boards import group_title
from robench.reports.class_figures import draw_classes
from robench.reports.figures import (
    accuracy_over_eps,
    clean_vs_robust,
    cost_vs_robust,
    rob_f_bars,
    training_curves,
)
from robench.reports.grouping import Key, Row, canonical, distinct, rows
from robench.reports.landscape_figures import draw_landscapes, label_names
from robench.reports.overlap_figures import draw_overlaps
from robench.reports.pictures import draw_pictures
from robench.reports.record import Epoch, Record, Transfer
from robench.reports.store import Results
from robench.reports.style import Drawing, Look, looks
from robench.reports.tables import run_labels
from robench.reports.text import TITLES, duration
from robench.reports.tradeoff import tradeoff
from robench.reports.uncertainty import Estimate, estimate

Looks = Mapping[str, Look]


def draw_all(results: Results) -> list[Drawing]:
    """Every figure for which there are data, under names that are unique and fit for files."""
    labels = run_labels(results.records)
    look = looks([
        *(row.label for row in rows(results.records)),
        *(labels.get(t.run, t.defense) for t in results.transfers),
        *(labels.get(e.run, e.defense) for e in results.epochs),
        *label_names(results),
    ])
    drawings: dict[str, Drawing] = {}
    for drawing in (
        *_tradeoff(results.records, look),
        *_over_eps(results.records, look),
        *draw_overlaps(results.records, look),
        *draw_classes(results.records, look),
        *_rob_f(results.transfers, labels, look),
        *_training(results.epochs, labels, look),
        *draw_landscapes(results, look),
        *draw_pictures(results),
    ):
        name = re.sub(r"[^a-z0-9]+", "-", drawing.name.lower()).strip("-")[:80]
        copies = sum(known == name or known.startswith(f"{name}--") for known in drawings)
        unique = f"{name}--{copies + 1}" if copies else name
        drawings[unique] = replace(drawing, name=unique)
    return list(drawings.values())


def _tradeoff(records: list[Record], look: Looks) -> Iterator[Drawing]:
    """Two for each group of the leaderboard: against clean accuracy, and against time."""
    for _, group in tradeoff(records).groupby("group", sort=False):
        yield _clean_vs_robust(group, look)
        yield from _cost_vs_robust(group[group["attack_seconds"] > 0], look)


def _clean_vs_robust(group: pd.DataFrame, look: Looks) -> Drawing:
    attack, title = group["rank_attack"].iloc[0], group_title(group)
    front = ", ".join(group["name"][group["pareto"]])
    return Drawing(
        f"clean-vs-robust {title}",
        f"{title}: clean accuracy against accuracy under {TITLES.get(attack, attack)}, with "
        "95 % intervals of the sampling error. Up and to the right is better. On the Pareto "
        f"front, the dashed line: {front}. The others are paler: some row is at least as good "
        "in both, and better in one.",
        "Clean and robust accuracy in percent: " + "; ".join(
            f"{line['name']} {line['clean']:.1f} and {line[attack]:.1f}"
            for line in group.to_dict("records")) + f". Pareto front: {front}",
        clean_vs_robust(group, attack, title, look),
    )


def _cost_vs_robust(group: pd.DataFrame, look: Looks) -> Iterator[Drawing]:
    """None where no time was taken."""
    if group.empty:
        return
    attack, title = group["rank_attack"].iloc[0], group_title(group)
    machines = sorted(set(group["machine"]))
    where = (f"Evaluated on {machines[0]}." if len(machines) == 1 else
             f"Evaluated on different machines ({'; '.join(machines)}): do not compare the times.")
    yield Drawing(
        f"cost-vs-robust {title}",
        f"{title}: the time to train a network and its teachers, and the time that "
        f"{TITLES.get(attack, attack)} took on it, against accuracy under this attack; means over "
        f"seeds, logarithmic axes. Up and to the left is better in training. {where}",
        "Robust accuracy in percent, training and evaluation time: " + "; ".join(
            f"{line['name']} {line[attack]:.1f}, "
            f"{duration(line['train_and_teacher_seconds']) if line['train_seconds'] else 'unknown'}"
            f" and {duration(line['attack_seconds'])}" for line in group.to_dict("records")),
        cost_vs_robust(group, attack, title, look),
    )


def _over_eps(records: list[Record], look: Looks) -> Iterator[Drawing]:
    """One for each data set, norm, attack and set of images."""
    panels: dict[tuple[str, ...], dict[Key, list[Row]]] = {}
    for row in rows([r for r in records if r.role == "curve"]):
        norm = row.key.threat.partition(":")[0]
        for attack, images in row.images.items():
            if row.passed(attack):
                place = (row.key.dataset, row.key.split, norm, attack, images)
                panel = panels.setdefault(place, {})
                panel.setdefault(row.key._replace(threat=norm), []).append(row)
    for (dataset, split, norm, attack, _), lines in panels.items():
        names = distinct({
            key: ((), some[0].label, canonical(key._replace(options="")._asdict()))
            for key, some in lines.items()
        })
        curves = {names[key]: (some[0].label, _curve(some, attack, 255 if norm == "Linf" else 1))
                  for key, some in lines.items()}
        title = f"{dataset} {split}, {norm}, {attack}"
        unit = "1/255 of the pixel range" if norm == "Linf" else "pixel range [0, 1]"
        yield Drawing(
            f"accuracy-over-eps {title}",
            f"{title}: accuracy as the budget of the attack grows; eps = 0 is clean accuracy. "
            "Bands are 95 % intervals of the sampling error.",
            "Accuracy in percent over eps: " + "; ".join(
                f"{name} " + ", ".join(f"{100 * e.mean:.1f} at {eps:.3g}" for eps, e in curve)
                for name, (_, curve) in curves.items()),
            accuracy_over_eps(curves, title, f"eps ({norm}, {unit})", look),
        )


def _rob_f(transfers: list[Transfer], labels: Mapping[str, str], look: Looks) -> Iterator[Drawing]:
    """One for each data set, threat model, attack, model, recipe and set of images."""
    panels: dict[tuple[str, ...], dict[str, tuple[str, list[Transfer]]]] = {}
    for t in transfers:
        label = labels.get(t.run, t.defense)
        place = (t.dataset, t.threat, t.attack, t.model, t.recipe, t.data_sha256)
        panel = panels.setdefault(place, {})
        panel.setdefault(f"{label}: {t.network}", (label, []))[1].append(t)
    for (*shown, _), groups in panels.items():
        title = ", ".join(shown)
        yield Drawing(
            f"rob-f {title}",
            f"{title}. Accuracy of each network f on examples crafted against f itself (x_f*) and "
            "on examples crafted against the student (x_S*), with 95 % intervals.",
            "Accuracy in percent on x_f* and on x_S*: " + "; ".join(
                f"{name} {_mean(ts, 'self_crafted'):.1f} and {_mean(ts, 'student_crafted'):.1f}"
                for name, (_, ts) in groups.items()),
            rob_f_bars(groups, title, look),
        )


def _training(epochs: list[Epoch], labels: Mapping[str, str], look: Looks) -> Iterator[Drawing]:
    """One for each data set, model and recipe."""
    panels: dict[tuple[str, ...], dict[str, list[Epoch]]] = {}
    for epoch in epochs:
        panel = panels.setdefault((epoch.dataset, epoch.model, epoch.recipe), {})
        panel.setdefault(labels.get(epoch.run, epoch.defense), []).append(epoch)
    for place, runs in panels.items():
        title = ", ".join(place)
        yield Drawing(
            f"training {title}",
            f"{title}: accuracy and loss after each epoch, the mean over seeds; bands go from the "
            "lowest to the highest seed. Every defense has its own loss: do not compare them.",
            "Training curves of " + ", ".join(
                f"{label} ({max(e.epoch for e in run) + 1} epochs)" for label, run in runs.items()),
            training_curves(runs, title, look),
        )


def _curve(some: list[Row], attack: str, scale: int) -> list[tuple[float, Estimate]]:
    """(eps * scale, accuracy), from the clean accuracy at 0 on."""
    first = some[0].passed(attack)
    points = {0.0: estimate([r.n_correct for r in first], first[0].n)}
    for row in some:
        records = row.passed(attack)
        eps = float(Fraction(row.key.threat.partition(":")[2]) * scale)
        points[eps] = estimate([r.n_robust for r in records], records[0].n)
    return sorted(points.items(), key=lambda point: point[0])


def _mean(transfers: list[Transfer], name: str) -> float:
    """A count of the rows, as a percentage of the images."""
    return 100 * fmean(getattr(t, name) / t.n for t in transfers)
