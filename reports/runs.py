"""Trainings: what they are called in tables and figures, and which of them are one curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from robench.reports.grouping import canonical, defense_names, defense_options, distinct, newest
from robench.reports.record import Epoch, Record, Transfer


def run_labels(
    records: Iterable[Record], others: Iterable[Epoch | Transfer] = ()
) -> dict[str, str]:
    """The label of the defense behind each training run, by the run's key.

    Of a run that has `others` and no records too: there only a hash of the settings is known.
    """
    records = list(records)
    names = defense_names(records)
    known = {r.run: names[r.dataset, r.defense, defense_options(r.defense_config)]
             for r in records if r.run}
    found = {one.run: one for one in sorted(others, key=lambda one: one.settings)
             if one.run not in known}
    return known | distinct({
        run: ((one.dataset,), one.defense,
              canonical({"settings": one.settings} if one.settings else {}))
        for run, one in found.items()})


@dataclass(frozen=True)
class Training:
    """The rows of one training, in their order."""

    epochs: tuple[Epoch, ...]

    @property
    def run(self) -> str:
        return self.epochs[0].run

    @property
    def seed(self) -> int:
        return self.epochs[0].seed

    @property
    def created(self) -> str:
        return self.epochs[0].created

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs)


def trainings(epochs: Iterable[Epoch]) -> list[Training]:
    """The trainings that these rows are of, each once.

    One run may have been trained on several machines: there its epochs begin anew. The same
    training, as an older version and as a newer one wrote it, took the same seconds; the rows that
    say more about it count.
    """
    runs: dict[str, list[list[Epoch]]] = {}
    for epoch in epochs:
        several = runs.setdefault(epoch.run, [])
        last = several[-1][-1] if several else None
        if last is None or epoch.epoch <= last.epoch or epoch.created != last.created:
            several.append([])
        several[-1].append(epoch)
    found: dict[object, Training] = {}
    for several in runs.values():
        for rows in sorted(several, key=lambda rows: bool(rows[0].settings)):
            one = Training(tuple(rows))
            found[one.run, one.seconds] = one
    return list(found.values())


class Place(NamedTuple):
    """What trainings share that are drawn side by side."""

    dataset: str
    model: str
    recipe: str
    selection: str
    threat: str
    attack: str
    options: str  # of the selection attack, as JSON
    n: int | None
    data_sha256: str


@dataclass(frozen=True)
class Panel:
    """Trainings that may be compared after each epoch.

    Attributes:
        title: tells it from other panels.
        runs: by label the epochs of the newest training of each seed.
        left_out: how many other trainings of these seeds there are.
    """

    title: str
    place: Place
    runs: dict[str, list[Epoch]] = field(default_factory=dict)
    left_out: int = 0


def panels(epochs: Sequence[Epoch], records: Iterable[Record]) -> list[Panel]:
    """One for each data set, model and recipe, and each way to measure after an epoch."""
    labels = run_labels(records, epochs)
    found: dict[Place, dict[str, list[Training]]] = {}
    for one in trainings(epochs):
        e = one.epochs[0]
        place = Place(e.dataset, e.model, e.recipe, e.selection, e.threat, e.attack,
                      canonical(e.attack_config), e.n, e.data_sha256)
        found.setdefault(place, {}).setdefault(labels[one.run], []).append(one)
    titles = distinct({place: ((), ", ".join(place[:3]), canonical(_said(place)))
                       for place in found})
    result = []
    for place, several in found.items():
        kept = {label: newest(some) for label, some in several.items()}
        result.append(Panel(
            titles[place], place,
            {label: [epoch for one in new for epoch in one.epochs]
             for label, (new, _) in kept.items()},
            sum(len(others) for _, others in kept.values())))
    return result


def left_out(number: int) -> str:
    """What a reader must know of a figure of the newest measurements only; "" if that are all."""
    return f" Older ones of the same seed, left out: {number}." if number else ""


def _said(place: Place) -> Mapping[str, str]:
    """How the accuracies were measured, as far as it is known."""
    said = {"selected on": place.selection, "threat": place.threat, "attack": place.attack,
            "options": place.options if place.attack else "",
            "images": f"{place.n} of {place.data_sha256[:12]}" if place.n else ""}
    return {name: value for name, value in said.items() if value}
