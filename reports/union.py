"""Several threat models: the accuracy of a network under each of them, and under all.

Tramer and Boneh 2019, arXiv 1904.13000. Made from the survival flags of records of the same
network on the same images, whichever commands measured them, and of the attack `union`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from robench.reports.compare import Flags, per_image, survival
from robench.reports.grouping import attack_names, canonical, defense_names
from robench.reports.record import Record
from robench.reports.store import Results
from robench.reports.text import NOTHING, Board, Cell, Column, percent
from robench.reports.uncertainty import wilson

COLUMNS = ("dataset", "split", "label", "checkpoint", "model", "source", "seed", "threats",
           "threat", "attacks", "accuracy", "low", "high", "n", "whole", "images")
AND = "+"  # between the threat models of a record of the attack `union`


@dataclass(frozen=True)
class Standing:
    """One network under several threat models.

    Attributes:
        record: one of its records, for all that they share.
        n, images: how many images all of them saw, and the hash of these.
        under: threat model -> (n,) the images that stand under it, as far as is known.
        attacks: threat model -> the attacks that say so.
        whole: the threat models under which all images were attacked. Under the others only those
            that stood before: fewer may stand.
        clean: (n,) right without an attack.
    """

    record: Record
    n: int
    images: str
    under: Mapping[str, Flags]
    attacks: Mapping[str, tuple[str, ...]]
    whole: frozenset[str]
    clean: Flags

    @property
    def all(self) -> Flags:
        """(n,) what withstands every threat model."""
        flags: Flags = np.logical_and.reduce(list(self.under.values()))
        return flags


def union(records: Sequence[Record]) -> pd.DataFrame:
    """A line for each network and threat model, and one for all of them together, in percent.

    `threats` are all of a network, `threat` that of the line; `attacks` are those that ended well
    and left their flags. An image stands under a threat model if it withstands each of them.
    `whole`: all images were attacked under this threat model; else the accuracy may be lower.
    """
    labels = defense_names(records)
    lines = []
    for one in standings(records)[0]:
        r, every = one.record, AND.join(one.under)
        known = {"dataset": r.dataset, "split": r.split, "checkpoint": r.checkpoint,
                 "label": labels[r.dataset, r.defense, canonical(r.defense_config)],
                 "model": r.model, "source": r.source, "seed": r.seed, "threats": every,
                 "n": one.n, "images": one.images[:12]}
        for threat, flags in {"clean": one.clean, **one.under, "all": one.all}.items():
            low, high = wilson(float(flags.mean()), one.n)
            lines.append({**known, "threat": threat,
                          "attacks": " + ".join(one.attacks.get(threat, ())),
                          "accuracy": 100 * float(flags.mean()), "low": 100 * low,
                          "high": 100 * high,
                          "whole": threat in one.whole or threat in ("clean", "all")})
    return pd.DataFrame(lines, columns=list(COLUMNS))


def union_boards(results: Results) -> list[Board]:
    """A board for networks that were attacked alike on the same images, most robust first."""
    frame = union(results.records)
    found: dict[tuple[str, ...], list[dict[str, dict[str, object]]]] = {}
    for _, lines in frame.groupby([*COLUMNS[:8], "images"], sort=False, dropna=False):
        network = {str(line["threat"]): {str(k): v for k, v in line.items()}
                   for line in lines.to_dict("records")}
        first = network["all"]
        alike = tuple(f"{threat}: {line['attacks']}" for threat, line in network.items()
                      if threat not in ("clean", "all"))
        found.setdefault((f"{first['dataset']} {first['split']}, {first['threats']}",
                          f"n = {first['n']:,}, sha256 {first['images']}", *alike),
                         []).append(network)
    remarks = tuple(standings(results.records)[1])
    return [_board(title, facts, networks, remarks) for (title, *facts), networks in found.items()]


def _board(title: str, facts: Sequence[str], networks: list[dict[str, dict[str, object]]],
           remarks: tuple[str, ...]) -> Board:
    networks = sorted(networks, key=lambda network: -float(str(network["all"]["accuracy"])))
    threats = list(networks[0])

    def words(name: str, key: str) -> Column:
        return Column(name, tuple(Cell(str(network["all"][key]) or NOTHING)
                                  for network in networks), words=True)

    names = {"clean": "Clean %", "all": "All of them %"}
    part = any(not line["whole"] for network in networks for line in network.values())
    return Board(title, (
        words("Defense", "label"), words("Checkpoint", "checkpoint"), words("Model", "model"),
        words("Seed", "seed"),
        *(Column(names.get(threat, f"{threat} %"),
                 tuple(_accuracy(network[threat]) for network in networks))
          for threat in threats),
    ), (*facts, *(["≤: under this threat model only the images were attacked that stood under the "
                   "ones before it"] if part else [])), remarks)


def _accuracy(line: Mapping[str, object]) -> Cell:
    value, low, high, n = (float(str(line[name])) for name in ("accuracy", "low", "high", "n"))
    text = percent(value, int(n))
    if not line["whole"]:
        return Cell(f"≤ {text}", sort=value)
    return Cell(text, f"[{percent(low, int(n))}, {percent(high, int(n))}]", sort=value,
                interval=(low, value, high))


def standings(records: Sequence[Record]) -> tuple[list[Standing], list[str]]:
    """The networks that several threat models tried, and why others of them are not here.

    A network is known by its weights and what it makes of a few images, whatever it is called.
    """
    names = attack_names(records)
    networks: dict[tuple[object, ...], dict[tuple[str, ...], Record]] = {}
    for r in sorted(records, key=lambda r: (r.n, r.created)):  # the largest, then the newest
        if r.status == "ok" and r.role == "table" and r.ranked:
            attack = names[r.dataset, r.split, r.threat, r.attack, canonical(r.attack_config)]
            network = (r.dataset, r.split, r.weights_sha256, r.fingerprint)
            networks.setdefault(network, {})[r.threat, attack] = r
    found, reasons = [], []
    for measured in networks.values():
        threats = dict.fromkeys(t for threat, _ in measured for t in threat.split(AND))
        if len(threats) > 1:
            one = _standing(list(threats), measured)
            if isinstance(one, Standing):
                found.append(one)
            else:
                r = next(iter(measured.values()))
                reasons.append(f"{r.defense} ({r.checkpoint or r.source}): left out, {one}")
    return found, reasons


def _standing(
    threats: Sequence[str], measured: Mapping[tuple[str, ...], Record]
) -> Standing | str:
    """What is known of one network, or why it cannot be put together."""
    n = min(r.n for r in measured.values())
    smallest = {r.data_sha256 for r in measured.values() if r.n == n}
    if len(smallest) > 1:
        return "its threat models were measured on different images"
    clean: Flags | None = None
    under: dict[str, list[Flags]] = {threat: [] for threat in threats}
    attacks: dict[str, list[str]] = {threat: [] for threat in threats}
    whole = set()
    for (threat, attack), r in measured.items():
        flags = survival(r)
        if flags is None:
            return f"the survival flags of {attack} at {threat} are lost"
        correct = flags[0][:n]
        if clean is not None and not np.array_equal(clean, correct):
            return "its threat models were measured on different images"
        clean = correct
        parts = _parts(r, flags[1])
        if parts is None:
            return f"the survival flags of {attack} do not say what the images fell to"
        for one, stand, full in parts:
            under[one].append(stand[:n])
            attacks[one].append(attack)
            whole |= {one} if full else set()
    assert clean is not None, "a network has records"
    return Standing(
        max(measured.values(), key=lambda r: bool(r.run)), n, smallest.pop(),
        {threat: np.logical_and.reduce(flags) for threat, flags in under.items()},
        {threat: tuple(sorted(some)) for threat, some in attacks.items()}, frozenset(whole), clean)


def _parts(record: Record, robust: Flags) -> list[tuple[str, Flags, bool]] | None:
    """(threat model, images that stand under it, whether all were attacked under it).

    A union works off its threat models one after the other: an image that fell to one was not
    attacked under the later ones. Its parts are named after their threat models. None if the file
    of flags does not say what an image fell to.
    """
    threats = record.threat.split(AND)
    if len(threats) == 1 or record.n_robust == record.n_correct:
        return [(threat, robust, True) for threat in threats]
    found = per_image(record, "breaker", "stages") or {}
    if not {"breaker", "stages"} <= found.keys():
        return None
    of = np.array([stage.partition(" ")[0] for stage in found["stages"].tolist()] + [""])
    fell = of[found["breaker"]]  # -1, which is none of them, is the last
    return [(threat, robust | ((fell != "") & (fell != threat)),
             not np.isin(fell, threats[:place]).any())
            for place, threat in enumerate(threats)]
