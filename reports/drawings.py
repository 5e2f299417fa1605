"""The figures of tables: which there are for some results, and what they say in words."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import pandas as pd

from robench.reports.boards import group_title
from robench.reports.figures import (
    clean_vs_robust,
    cost_vs_robust,
    rob_f_bars,
    rob_f_curves,
    training_curves,
)
from robench.reports.record import Epoch, Transfer
from robench.reports.store import Results
from robench.reports.style import Drawing, Looks
from robench.reports.tables import rob_f_training, run_labels
from robench.reports.text import TITLES, duration
from robench.reports.tradeoff import tradeoff


def draw_tradeoff(results: Results, look: Looks) -> Iterator[Drawing]:
    """Two for each group of the leaderboard: against clean accuracy, and against time."""
    for _, group in tradeoff(results.records).groupby("group", sort=False):
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


def draw_rob_f(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each data set, threat model, attack, model, recipe and set of images."""
    labels = run_labels(results.records)
    panels: dict[tuple[str, ...], dict[str, tuple[str, list[Transfer]]]] = {}
    for t in results.transfers:
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


def draw_training(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each data set, model and recipe."""
    labels = run_labels(results.records)
    panels: dict[tuple[str, ...], dict[str, list[Epoch]]] = {}
    for epoch in results.epochs:
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


def draw_rob_f_training(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each data set, model and recipe."""
    frame = rob_f_training(results.epochs, results.records)
    for place, panel in frame.groupby(["dataset", "model", "recipe"], sort=False):
        title = ", ".join(map(str, place))
        last = panel[panel["epoch"] == panel.groupby("label")["epoch"].transform("max")]
        yield Drawing(
            f"rob-f-training {title}",
            f"{title}. Accuracy of each network f after each epoch, left on examples crafted "
            "against the student (x_S*), right on those crafted against f itself (x_f*); the mean "
            "over seeds, bands go from the lowest to the highest seed.",
            "Accuracy in percent on x_S* and on x_f* after the last epoch: " + "; ".join(
                f"{label}: {network} {some['rob_f_student'].mean():.1f} and "
                f"{some['rob_f_self'].mean():.1f}"
                for (label, network), some in last.groupby(["label", "network"], sort=False)),
            rob_f_curves(panel, title, look),
        )


def _mean(transfers: list[Transfer], name: str) -> float:
    """A count of the rows, as a percentage of the images."""
    return 100 * fmean(getattr(t, name) / t.n for t in transfers)
