"""From records to rows: which measurements belong together, and which rows may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from robench.reports.later import earlier_attack, earlier_defense
from robench.reports.record import Record

K = TypeVar("K")
T = TypeVar("T", bound="Dated")
AUTOATTACK = "autoattack"
ALIASES = {"pyautoattack:standard": AUTOATTACK}


class Key(NamedTuple):
    """What networks share that differ only in their seed, and how they were looked at."""

    dataset: str
    split: str
    threat: str
    recipe: str
    epochs: int
    model: str
    source: str
    defense: str
    options: str  # of the defense, as JSON
    checkpoint: str

    @property
    def trained_at(self) -> str:
        """The threat model of the training; "" of a network from outside."""
        return trained_at(self.options)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        label: the defense, with the options that tell it from others of its name.
        cells: per attack, a record per seed (at least one), all on the same images.
        remarks: what a reader must know about how the row came about.
    """

    key: Key
    label: str
    cells: Mapping[str, Mapping[int, Record]]
    remarks: tuple[str, ...] = ()

    @property
    def records(self) -> list[Record]:
        return [record for cell in self.cells.values() for record in cell.values()]

    @property
    def baseline(self) -> bool:
        return any(record.baseline for record in self.records)

    @property
    def images(self) -> dict[str, str]:
        """Per attack, the SHA-256 of the images it was measured on."""
        return {name: next(iter(cell.values())).data_sha256 for name, cell in self.cells.items()}

    def passed(self, attack: str) -> list[Record]:
        """The records of an attack that ended well, by seed; [] if it never ran."""
        return [r for _, r in sorted(self.cells.get(attack, {}).items()) if r.status == "ok"]


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per defense, configuration and image set, in order of first appearance.

    Networks are one row if they agree in everything but the seed. Where one of them was
    measured by the same attack on several image sets (a quick look and the full test set, say),
    the largest sets make one row, the second largest the next, and so on.
    """
    columns = attack_names(records)
    labels = defense_names(records)
    found: dict[Key, dict[str, list[Record]]] = {}
    for record in records:
        cells = found.setdefault(_key(record), {})
        cells.setdefault(columns[_attack_id(record)], []).append(record)
    return [
        _row(key, labels[key.dataset, key.defense, key.options], measured)
        for key, cells in found.items()
        for measured in _by_images(cells)
    ]


def groups(table: Sequence[Row]) -> list[list[Row]]:
    """Rows that may be ranked against each other, in order of first appearance.

    A group shares data set, split and threat model, and no attack in it was measured on two
    different sets of images. Attacks may differ in their images: AutoAttack on the first 1,000,
    PGD on all of them.
    """
    sets: dict[tuple[str, ...], set[str]] = {}
    for row in table:
        for attack, images in row.images.items():
            sets.setdefault((*row.key[:3], attack), set()).add(images)
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in table:
        contested = sorted((attack, images) for attack, images in row.images.items()
                           if len(sets[(*row.key[:3], attack)]) > 1)
        found.setdefault((*row.key[:3], *contested), []).append(row)
    return list(found.values())


def canonical(options: Mapping[str, Any]) -> str:
    """JSON with sorted keys: equal text means equal options."""
    return json.dumps(options, sort_keys=True)


def defense_options(config: Mapping[str, Any]) -> str:
    """`canonical` of a `defense_config`, whichever version wrote it (see `later`)."""
    return canonical(earlier_defense(config))


def trained_at(options: str) -> str:
    """The threat model of a training with these `defense_options`; "" where they do not say."""
    return str(json.loads(options).get("threat") or "")


def attack_options(config: Mapping[str, Any]) -> str:
    """`canonical` of an `attack_config`, likewise."""
    return canonical(earlier_attack(config))


def attack_names(records: Iterable[Record]) -> dict[tuple[str, ...], str]:
    """The column of (data set, split, threat, attack, options as JSON).

    An attack that failed before it was built has no options; it belongs to the column of the
    same attack elsewhere.
    """
    known: dict[tuple[str, ...], Record] = {}
    for record in sorted(records, key=lambda record: record.status != "ok"):
        known.setdefault(_attack_id(record), record)
    built = {
        one: (one[:3], ALIASES.get(r.attack, r.attack),
              canonical({"attack": r.attack, **earlier_attack(r.attack_config)}))
        for one, r in known.items() if r.status == "ok" or r.attack_config
    }
    names = distinct(built)
    for one in known:
        same = [name for other, name in names.items() if other[:4] == one[:4]]
        names.setdefault(one, same[0] if same else ALIASES.get(one[3], one[3]))
    return names


def defense_names(records: Iterable[Record]) -> dict[tuple[str, ...], str]:
    """The label of (data set, defense, options as JSON)."""
    ids = dict.fromkeys((r.dataset, r.defense, defense_options(r.defense_config)) for r in records)
    return distinct({one: ((one[0],), one[1], one[2]) for one in ids})


def distinct(things: Mapping[K, tuple[tuple[str, ...], str, str]]) -> dict[K, str]:
    """A label for each id, given its (scope, name, options as JSON).

    The label is the name; where a scope has it with several options, those that differ are added.
    """
    rivals: dict[tuple[tuple[str, ...], str], list[dict[str, Any]]] = {}
    for scope, name, options in things.values():
        rivals.setdefault((scope, name), []).append(leaves(json.loads(options)))
    labels = {}
    for one, (scope, name, options) in things.items():
        mine, others = leaves(json.loads(options)), rivals[scope, name]
        shown = [
            f"{key}={value}" for key, value in mine.items()
            if any(key not in other or other[key] != value for other in others)
        ]
        if any(other.get("attack") != mine.get("attack") for other in others):
            # Another implementation, whose options cannot be compared with these.
            shown = [str(mine["attack"])] if mine["attack"] != name else []
        labels[one] = f"{name} ({', '.join(shown)})" if shown else name
    return labels


def leaves(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= (leaves(value, f"{prefix}{key}.") if isinstance(value, dict)
                 else {f"{prefix}{key}": value})
    return flat


class Dated(Protocol):
    """What was measured on, or trained with, one of several seeds."""

    @property
    def seed(self) -> int: ...
    @property
    def created(self) -> str: ...


def newest(several: Iterable[T]) -> tuple[list[T], list[T]]:
    """The newest of each seed, by seed, and the others; the last of those of one age."""
    by_age = sorted(several, key=lambda one: one.created)
    last = {one.seed: one for one in by_age}
    return ([last[seed] for seed in sorted(last)],
            [one for one in by_age if one is not last[one.seed]])


def _attack_id(record: Record) -> tuple[str, ...]:
    return (record.dataset, record.split, record.threat, record.attack,
            attack_options(record.attack_config))


def _key(record: Record) -> Key:
    return Key(record.dataset, record.split, record.threat, record.recipe, record.epochs,
               record.model, record.source, record.defense,
               defense_options(record.defense_config), record.checkpoint)


def _by_images(cells: Mapping[str, Sequence[Record]]) -> list[dict[str, list[Record]]]:
    """The largest image set of every attack, then the second largest, and so on."""
    result: list[dict[str, list[Record]]] = []
    for attack, records in cells.items():
        sets: dict[str, list[Record]] = {}
        for record in records:
            sets.setdefault(record.data_sha256, []).append(record)
        for place, some in enumerate(sorted(sets.values(), key=lambda r: -r[0].n)):
            if place == len(result):
                result.append({})
            result[place][attack] = some
    return result


def _row(key: Key, label: str, measured: Mapping[str, Sequence[Record]]) -> Row:
    """Keeps the newest record of each seed that did not fail, and says so if there were others."""
    cells: dict[str, dict[int, Record]] = {}
    weights: dict[int, set[str]] = {}
    remarks = []
    for attack, records in measured.items():
        passed, _ = newest(record for record in records if record.status == "ok")
        others, _ = newest(record for record in records if record.status != "ok")
        cells[attack] = {record.seed: record for record in (*others, *passed)}
        for seed, record in cells[attack].items():
            weights.setdefault(seed, set()).add(record.weights_sha256)
        if len(records) > len(cells[attack]):
            remarks.append(f"{attack}: {len(records) - len(cells[attack])} older or failed "
                           "measurement(s) of the same seed left out")
    remarks += [f"seed {seed}: the attacks saw {len(known)} different networks"
                for seed, known in sorted(weights.items()) if len(known) > 1]
    return Row(key, label, cells, tuple(remarks))
