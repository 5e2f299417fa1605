"""The figures of tables: which there are for some results, and what they say in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from robench.reports.grouping import canonical, distinct, newest
from robench.reports.record import Transfer
from robench.reports.runs import Panel, left_out, panels, run_labels
from robench.reports.store import Results
from robench.reports.style import Drawing, Looks
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
    labels = run_labels(results.records, results.transfers)
    found: dict[tuple[str, ...], dict[tuple[str, str, str], list[Transfer]]] = {}
    for t in results.transfers:
        panel = found.setdefault((t.dataset, t.threat, t.attack, t.model, t.recipe,
                                  canonical(t.attack_config), t.data_sha256), {})
        panel.setdefault((labels[t.run], t.network, t.checkpoint), []).append(t)
    titles = distinct({place: ((), ", ".join(place[:5]), canonical(
        {"options": place[5], "images": place[6][:12]})) for place in found})
    for place, bars in found.items():
        names = distinct({bar: ((), f"{bar[0]}: {bar[1]}", canonical({"student": bar[2]}))
                          for bar in bars})
        kept = {bar: newest(some) for bar, some in bars.items()}
        groups = {names[bar]: (bar[0], new) for bar, (new, _) in kept.items()}
        yield Drawing(
            f"rob-f {titles[place]}",
            f"{titles[place]}. Accuracy of each network f on examples crafted against f itself "
            "(x_f*) and on examples crafted against the student (x_S*), with 95 % intervals."
            + left_out(sum(len(others) for _, others in kept.values())),
            "Accuracy in percent on x_f* and on x_S*: " + "; ".join(
                f"{name} {_mean(ts, 'self_crafted'):.1f} and {_mean(ts, 'student_crafted'):.1f}"
                for name, (_, ts) in groups.items()),
            rob_f_bars(groups, titles[place], look),
        )


def draw_training(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each panel, see `runs.panels`."""
    for panel in panels(results.epochs, results.records):
        yield Drawing(
            f"training {panel.title}",
            f"{panel.title}: accuracy and loss after each epoch, the mean over seeds; bands go "
            f"from the lowest to the highest seed. {_measured(panel)}Every defense has its own "
            f"loss: do not compare them.{left_out(panel.left_out)}",
            "Training curves of " + ", ".join(
                f"{label} ({max(e.epoch for e in run) + 1} epochs)"
                for label, run in panel.runs.items()),
            training_curves(panel.runs, panel.title, look),
        )


def draw_rob_f_training(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each panel, see `runs.panels`."""
    for panel in panels([e for e in results.epochs if e.rob_f], results.records):
        last = {label: max(e.epoch for e in run) for label, run in panel.runs.items()}
        ends = {(label, network): [e.rob_f[network] for e in run
                                   if e.epoch == last[label] and network in e.rob_f]
                for label, run in panel.runs.items()
                for network in dict.fromkeys(name for e in run for name in e.rob_f)}
        yield Drawing(
            f"rob-f-training {panel.title}",
            f"{panel.title}. Accuracy of each network f after each epoch, left on examples crafted "
            "against the student (x_S*), right on those crafted against f itself (x_f*); the mean "
            f"over seeds, bands go from the lowest to the highest seed.{left_out(panel.left_out)}",
            "Accuracy in percent on x_S* and on x_f* after the last epoch: " + "; ".join(
                f"{label}: {network} {100 * fmean(students for _, students in pairs):.1f} and "
                f"{100 * fmean(own for own, _ in pairs):.1f}"
                for (label, network), pairs in ends.items() if pairs),
            rob_f_curves(panel.runs, panel.title, look),
        )


def _measured(panel: Panel) -> str:
    """Under what the robust accuracies are, as far as it is known."""
    place = panel.place
    if not place.attack:
        return ""
    images = f" on {place.n:,} images" if place.n else ""
    return f"Robust accuracy is under {place.attack} at {place.threat}{images}. "


def _mean(transfers: Sequence[Transfer], name: str) -> float:
    """A count of the rows, as a percentage of the images."""
    return 100 * fmean(getattr(t, name) / t.n for t in transfers)
