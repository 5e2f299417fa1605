"""Several threat models: the accuracy of a network under each of them, and under all.

Tramer and Boneh 2019, arXiv 1904.13000. Made from the survival flags of records of the same
network on the same images, whichever commands measured them, and of the attack `union`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from robench.reports.columns import make_frame
from robench.reports.compare import Flags, alike, per_image, survival
from robench.reports.grouping import (
    attack_names,
    attack_options,
    defense_names,
    defense_options,
)
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
                 "label": labels[r.dataset, r.defense, defense_options(r.defense_config)],
                 "model": r.model, "source": r.source, "seed": r.seed, "threats": every,
                 "n": one.n, "images": one.images[:12]}
        for threat, flags in {"clean": one.clean, **one.under, "all": one.all}.items():
            low, high = wilson(float(flags.mean()), one.n)
            lines.append({**known, "threat": threat,
                          "attacks": " + ".join(one.attacks.get(threat, ())),
                          "accuracy": 100 * float(flags.mean()), "low": 100 * low,
                          "high": 100 * high,
                          "whole": threat in one.whole or threat in ("clean", "all")})
    return make_frame(lines, COLUMNS)


def union_boards(results: Results) -> list[Board]:
    """A board for networks that were attacked alike on the same images, most robust first."""
    frame = union(results.records)
    found: dict[tuple[str, ...], list[dict[str, dict[str, object]]]] = {}
    for _, lines in frame.groupby([*COLUMNS[:8], "images"], sort=False, dropna=False):
        network = {str(line["threat"]): {str(k): v for k, v in line.items()}
                   for line in lines.to_dict("records")}
        first = network["all"]
        how = tuple(f"{threat}: {line['attacks']}" for threat, line in network.items()
                    if threat not in ("clean", "all"))
        found.setdefault((f"{first['dataset']} {first['split']}, {first['threats']}",
                          f"n = {first['n']:,}, sha256 {first['images']}", *how),
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
    """The networks that several threat models tried, and what of them is not here, and why.

    A network is known by its model and weights, whatever it is called. What it makes of a few
    images must be the same up to rounding, which differs between machines.
    """
    names = attack_names(records)
    networks: dict[tuple[str, ...], list[Record]] = {}
    for r in sorted(records, key=lambda r: (r.n, r.created)):  # the largest, then the newest
        if r.role == "table" and r.ranked:
            network = (r.dataset, r.split, r.model, r.weights_sha256)
            networks.setdefault(network, []).append(r)
    found: list[Standing] = []
    reasons: list[str] = []
    for some in networks.values():
        if len(_threats(r.threat for r in some)) < 2:
            continue
        attacks = [(r.threat, names[r.dataset, r.split, r.threat, r.attack,
                                    attack_options(r.attack_config)]) for r in some]
        passed = {attack for attack, r in zip(attacks, some, strict=True) if r.status == "ok"}
        uses: list[dict[tuple[str, str], Record]] = []  # of the same weights
        for attack, r in zip(attacks, some, strict=True):
            if r.status == "ok":
                same = (use for use in uses
                        if alike(next(iter(use.values())).fingerprint, r.fingerprint))
                use = next(same, None)
                if use is None:
                    uses.append(use := {})
                use[attack] = r
            elif attack not in passed:
                ended = "failed" if r.status == "failed" else "did not end"
                reasons.append(f"{_who(r)}: {attack[1]} at {r.threat} left out, it {ended}")
        for measured in uses:
            threats = _threats(threat for threat, _ in measured)
            one = _standing(threats, measured) if len(threats) > 1 else (
                "with other logits than under other threat models: the same weights, used in "
                "another way" if len(uses) > 1 else None)
            if isinstance(one, Standing):
                found.append(one)
            elif one is not None:
                reasons.append(f"{_who(next(iter(measured.values())))}: "
                               f"{'' if len(threats) > 1 else threats[0] + ' '}left out, {one}")
    return found, list(dict.fromkeys(reasons))


def _threats(names: Iterable[str]) -> list[str]:
    """The single threat models, in order of first appearance."""
    return list(dict.fromkeys(one for name in names for one in name.split(AND)))


def _who(r: Record) -> str:
    return f"{r.defense} ({r.checkpoint or r.source})"


def _standing(
    threats: Sequence[str], measured: Mapping[tuple[str, str], Record]
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
