"""The checks that take several records, and whether a number may be relied on. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from robench.errors import UsageError
from robench.options import parse_number
from robench.reports.grouping import leaves
from robench.reports.record import Record, Transfer
from robench.reports.trust import CHECKS, beyond_luck, flag, id_of

# Flags after which an evaluation needs an attack made for the defense.
ADAPT = {"random", "dynamic", "masking", "transfer<=whitebox"}
FALLS = 0.05  # share of the right images below which next to none stands


def judged(records: Sequence[Record], transfers: Sequence[Transfer] = ()) -> list[Record]:
    """The same records, with the flags that several records raise together among the warnings of
    each record of the network that they are about; those of an earlier call are replaced."""
    networks: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        networks.setdefault(_network(record), []).append(record)
    partners: dict[tuple[str, str], tuple[str, ...]] = {}
    for t in transfers:
        partners[t.run, t.network] = partners.get((t.run, t.network), ()) + transfer_only(t)
    flags = {network: [*partners.get((some[0].run, some[0].checkpoint), ()), *_flags(some)]
             for network, some in networks.items()}
    return [_with(record, flags[_network(record)]) for record in records]


def unreliable(records: Iterable[Record]) -> list[str]:
    """The ranked networks with a failed check, "network: ids"; [] if all may be relied on.

    Networks outside of the ranking, such as a peer or a teacher, are flagged but not counted, and
    neither is randomness that the attack averages over.
    """
    found: dict[str, dict[str, None]] = {}
    for record in records:
        if record.ranked and record.role == "table":
            ids = failed(record.warnings, record.attack_config)
            name = record.defense if record.source == "trained" else record.source
            found.setdefault(name, {}).update(dict.fromkeys(sorted(ids)))
    return [f"{name}: {', '.join(ids)}" for name, ids in found.items() if ids]


def failed(warnings: Iterable[str], attack_config: Mapping[str, Any]) -> set[str]:
    """The checks that a number must pass to be relied on, and that its warnings say it failed."""
    ids = {id for id in map(id_of, warnings) if id and CHECKS[id].level == "fail"}
    return ids - ({"random"} if adaptive(attack_config) else set())


def adaptive(attack_config: Mapping[str, Any]) -> bool:
    """Whether the attack was made for the defense: it says so in its options, or averages its
    gradients over the randomness of the network."""
    options = leaves(attack_config)
    named = [(name.rpartition(".")[2], value) for name, value in options.items()]
    return any((name == "adaptive" and value is True)
               or (name == "eot" and isinstance(value, int) and value > 1)
               for name, value in named)


def transfer_only(transfer: Transfer) -> tuple[str, ...]:
    """The flag of a network f that is right on x_S* and wrong on x_f*."""
    if transfer.network == "student":
        return ()
    gap = (transfer.student_crafted - transfer.self_crafted) / transfer.n
    return flag("transfer-only", gap)


def _network(record: Record) -> tuple[object, ...]:
    return record.run, record.source, record.checkpoint, record.weights_sha256


def _flags(records: Sequence[Record]) -> Iterator[str]:
    for id, measure in NETWORK.items():
        yield from flag(id, measure(records))


def _with(record: Record, flags: Sequence[str]) -> Record:
    own = [text for text in record.warnings
           if (id := id_of(text)) == "" or CHECKS[id].when != "records"]
    warnings = (*own, *dict.fromkeys(flags if record.role == "table" else ()))
    return record if warnings == record.warnings else record.model_copy(
        update={"warnings": warnings})


def _iterated(records: Sequence[Record]) -> float:
    """PGD must break at least what one step breaks, on the same images."""
    return _worst(beyond_luck(many.n_robust - one.n_robust, one.n)
                  for one, many in _single_and_many(records))


def _overfitted(records: Sequence[Record]) -> float:
    """One step is withstood, several are not."""
    return _worst(one.n_robust / one.n_correct for one, many in _single_and_many(records)
                  if one.n_correct and many.n_robust < FALLS * one.n_correct)


def _monotone(records: Sequence[Record]) -> float:
    """Under one attack, on the same images, robust accuracy must not grow with eps."""
    pairs = ((a, b) for a in records for b in records
             if _gradient(a) and _alike(a, b) and _budget(a)[0] == _budget(b)[0])
    return _worst(beyond_luck(b.n_robust - a.n_robust, a.n) for a, b in pairs
                  if _budget(a) < _budget(b))


def _lucky(records: Sequence[Record]) -> float:
    """Seeds of one attack on one network and the same images."""
    return _worst(beyond_luck(a.n_robust - b.n_robust, a.n) for a in records for b in records
                  if _alike(a, b) and a.threat == b.threat)


def _unanswered(records: Sequence[Record]) -> float:
    """Flags that ask for an attack made for the defense, where there is none."""
    asked = any(id_of(text) in ADAPT for r in records for text in r.warnings)
    return float(asked and not any(adaptive(r.attack_config) for r in records))


# The checks of this module that are about one network.
NETWORK: dict[str, Callable[[Sequence[Record]], float]] = {
    "iter>=single": _iterated, "catastrophic-overfitting": _overfitted, "monotone-eps": _monotone,
    "seed-spread": _lucky, "adaptive-hook": _unanswered,
}


def _worst(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def _single_and_many(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """FGSM and each PGD under the same threat model on the same images."""
    table = [r for r in records if r.role == "table" and r.status == "ok"]
    return [(one, many) for one in table if one.attack == "fgsm" for many in table
            if _gradient(many) and many.threat == one.threat
            and many.data_sha256 == one.data_sha256]


def _gradient(record: Record) -> bool:
    return re.match(r"(pgd|cw)\b", record.attack) is not None


def _alike(one: Record, other: Record) -> bool:
    """The same attack on the same images, both to the end."""
    return one.status == other.status == "ok" and (one.attack, one.data_sha256) == (
        other.attack, other.data_sha256)


def _budget(record: Record) -> tuple[str, float]:
    norm, _, eps = record.threat.partition(":")
    try:
        return norm, parse_number(eps)
    except UsageError:  # a record of somebody else's
        return record.threat, 0.0
