"""The regression gate: is a network less robust than its baseline? docs/gate.md has the rules."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from robench.errors import UsageError
from robench.registry import unknown
from robench.reports.drop import (
    Drop,
    Flags,
    holm,
    over_seeds,
    paired,
    regressed,
    unpaired,
)
from robench.reports.grouping import AUTOATTACK, leaves
from robench.reports.measured import Measured
from robench.reports.power import images_needed, images_to_pass, paired_power, unpaired_power

Verdict = Literal["regressed", "incomparable", "inconclusive", "improved", "pass"]
# Of several comparisons the first of these that occurs is the verdict on all.
VERDICTS: tuple[Verdict, ...] = ("regressed", "incomparable", "inconclusive", "improved", "pass")
CLEAN = "clean"  # the metric that needs no attack


@dataclass(frozen=True)
class Side:
    """One network, with its seeds, under one attack on the same images.

    Attributes:
        entries: by seed, at least one. metric: an attack, or CLEAN.
    """

    entries: tuple[Measured, ...]
    metric: str

    @property
    def n(self) -> int:
        return self.entries[0].n

    @property
    def shares(self) -> list[float]:
        """The accuracy of each network, in [0, 1]."""
        clean = self.metric == CLEAN
        return [(one.n_correct if clean else one.n_robust) / one.n for one in self.entries]

    @property
    def share(self) -> float:
        return statistics.fmean(self.shares)

    @property
    def flags(self) -> Flags | None:
        """(S, n); None if those of a network are lost."""
        found = [one.correct if self.metric == CLEAN else one.robust for one in self.entries]
        known = [flags for flags in found if flags is not None]
        return np.stack(known) if len(known) == len(found) else None

    @property
    def network(self) -> tuple[str, str, str]:
        one = self.entries[0]
        return one.network, one.model, one.checkpoint

    @property
    def setting(self) -> tuple[str, str, str]:
        one = self.entries[0]
        return one.dataset, one.split, one.threat


@dataclass(frozen=True)
class Comparison:
    """The verdict on one network under one attack.

    Attributes:
        reasons: what differs, where it is incomparable; notes: what else a reader must know.
        paired: the images are the same. drop: None where it is incomparable.
        p: of `drop`, adjusted by Holm. seeds: the drop between trainings, where there are several.
        needed: images that would decide, about; None if it is decided or no number would.
    """

    network: str
    setting: str
    metric: str
    baseline: Side | None
    current: Side | None
    verdict: Verdict = "incomparable"
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    paired: bool = False
    drop: Drop | None = None
    p: float = 1.0
    seeds: Drop | None = None
    needed: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What `check` found, and by which rules."""

    verdict: Verdict
    comparisons: tuple[Comparison, ...]
    max_drop: float
    alpha: float


def check(
    current: Sequence[Measured], baseline: Sequence[Measured], *, metrics: Sequence[str] = (),
    max_drop: float = 0.5, alpha: float = 0.05,
) -> Outcome:
    """Compare networks with their baselines.

    A single network is compared with a single one, whatever their names; of several, those of
    one name, model and checkpoint.

    Args:
        metrics: attacks, or "clean". Default: AutoAttack, or else the attack that leaves the
            baseline the least.
        max_drop: in points; smaller drops are tolerated. alpha: of the test, in (0, 0.5).

    Raises UsageError for a metric that the baseline does not have, and for numbers out of range.
    """
    if not 0 <= max_drop <= 100:
        raise UsageError(f"max-drop {max_drop}: write points from 0 to 100")
    if not 0 < alpha < 0.5:
        raise UsageError(f"alpha {alpha}: write a probability between 0 and 0.5")
    known = {CLEAN, *(one.metric for one in baseline)}
    for name in metrics:
        if name not in known:
            raise unknown("metric", name, known)
    pairs = list(_comparisons(current, baseline, metrics, alpha))
    drops = [(i, one.drop) for i, one in enumerate(pairs) if one.drop is not None]
    adjusted = holm([drop.p for _, drop in drops])
    for (i, drop), p in zip(drops, adjusted, strict=True):
        verdict = _verdict(drop, p, max_drop=max_drop, alpha=alpha)
        pairs[i] = replace(pairs[i], p=p, verdict=verdict)
        if verdict == "inconclusive":
            needed = _needed(pairs[i], drop, max_drop=max_drop, alpha=alpha, tests=len(drops))
            pairs[i] = replace(pairs[i], needed=needed)
    found = {one.verdict for one in pairs}
    return Outcome(next(v for v in VERDICTS if v in found), tuple(pairs), max_drop, alpha)


def _verdict(drop: Drop, p: float, *, max_drop: float, alpha: float) -> Verdict:
    if regressed(p, drop.points, max_drop=max_drop, alpha=alpha):
        return "regressed"
    if drop.high < 0:
        return "improved"
    same = drop.lost == drop.gained == 0
    return "pass" if same or drop.high <= max_drop else "inconclusive"


# Which measurements belong together


def _sides(entries: Iterable[Measured]) -> list[Side]:
    """Seeds together; networks, settings, attacks and sets of images apart."""
    found: dict[tuple[str, ...], list[Measured]] = {}
    for one in entries:
        found.setdefault((one.network, one.model, one.checkpoint, one.dataset, one.split,
                          one.threat, one.metric, one.data_sha256), []).append(one)
    return [Side(tuple(sorted(some, key=lambda one: one.seed)), some[0].metric)
            for some in found.values()]


def _comparisons(
    current: Sequence[Measured], baseline: Sequence[Measured], metrics: Sequence[str], alpha: float
) -> Iterator[Comparison]:
    """Each side of the baseline that is asked for, with what it is to be compared with. What the
    baseline lacks is said; where it has nothing to compare by, nothing guards that network."""
    old, new = _sides(baseline), _sides(current)
    single = len({s.network for s in old}) == len({s.network for s in new}) == 1
    groups: dict[tuple[str, ...], list[Side]] = {}
    for side in old:
        groups.setdefault((*side.network, *side.setting), []).append(side)
    for sides in groups.values():
        rivals = [s for s in new if single or s.network == sides[0].network]
        chosen = metrics or (_strongest(sides),)
        found = {metric: mine for metric in chosen if (mine := _of(sides, metric))}
        lacking = ", ".join(metric for metric in chosen if metric not in found)
        if not found:
            yield Comparison(_name(sides[0]), _where(sides[0]), lacking, None, None, reasons=(
                f"the baseline has no {lacking} on {_name(sides[0])}: save one that has, or name "
                "another --metric, too",))
        for metric, mine in found.items():
            side = max(mine, key=lambda s: s.n)
            one = _compared(side, max(_of(rivals, metric), default=None, key=lambda s: (
                s.setting == side.setting, s.entries[0].data_sha256 ==
                side.entries[0].data_sha256, s.entries[0].attack == side.entries[0].attack, s.n)),
                alpha)
            lost = (f"not compared, for the baseline does not have it: {lacking}",) * bool(lacking)
            yield replace(one, notes=(*one.notes, *lost))


def _of(sides: Iterable[Side], metric: str) -> list[Side]:
    if metric == CLEAN:  # every attack begins with it
        return [replace(side, metric=CLEAN) for side in sides]
    return [side for side in sides if side.metric == metric]


def _strongest(sides: Sequence[Side]) -> str:
    """The attack to compare by: chosen from the baseline alone, so that it does not favor."""
    names = [side.metric for side in sides]
    return AUTOATTACK if AUTOATTACK in names else min(sides, key=lambda s: s.share).metric


# What differs


def _compared(old: Side, new: Side | None, alpha: float) -> Comparison:
    """Everything but the verdict, which depends on the other comparisons."""
    network = _name(old)
    result = Comparison(network, _where(old), old.metric, old, new)
    if new is None:
        return replace(result, reasons=(f"not measured now: {old.metric} on {network}",))
    reasons = tuple(dict.fromkeys([*_unfinished("baseline", old), *_unfinished("current", new),
                                   *_differences(old, new)]))
    if reasons:
        return replace(result, reasons=reasons)
    same = old.entries[0].data_sha256 == new.entries[0].data_sha256 and old.n == new.n
    notes = list(_notes(old, new))
    before, after = old.flags, new.flags
    if same and before is not None and after is not None:
        drop = paired(before, after, alpha)
    else:
        drop = unpaired(old.share, old.n, new.share, new.n, alpha)
        same = False
        notes.append("unpaired, which needs far more images: "
                     + ("survival flags are lost" if old.n == new.n and
                        old.entries[0].data_sha256 == new.entries[0].data_sha256
                        else "the images are others"))
    return replace(result, drop=drop, paired=same, notes=tuple(notes),
                   seeds=over_seeds(old.shares, new.shares, alpha))


def _name(side: Side) -> str:
    return ", ".join(filter(None, (side.network[0], side.network[2])))


def _where(side: Side) -> str:
    dataset, split, threat = side.setting
    return f"{dataset} {split}, {threat}"


def _unfinished(name: str, side: Side) -> Iterator[str]:
    for one in side.entries:
        if one.status == "failed":
            yield f"{name}: {one.attack} failed: {one.error}"
        elif side.metric != CLEAN and (one.status != "ok" or one.n_open):
            yield f"{name}: {one.n_open} of {one.n} images were not attacked to the end"


def _differences(old: Side, new: Side) -> Iterator[str]:
    """What makes numbers incomparable, as "what: current, baseline other"."""
    first = old.entries[0]
    names = ["dataset", "split"] + ["threat", "attack", "precision"] * (old.metric != CLEAN)
    for one in (*old.entries, *new.entries):
        for name in names:
            mine, theirs = getattr(one, name), getattr(first, name)
            if mine != theirs:
                yield f"{name}: {mine}, baseline {theirs}"
        if old.metric != CLEAN and one.attack == first.attack:
            yield from _options(one.attack_config, first.attack_config)


def _options(mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    mine, theirs = leaves(mine), leaves(theirs)
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or mine[name] != theirs[name]:
            yield (f"attack option {name}: {mine.get(name, 'not there')}, "
                   f"baseline {theirs.get(name, 'not there')}")


def _notes(old: Side, new: Side) -> Iterator[str]:
    """What leaves numbers comparable, but a reader must know."""
    if {one.weights_sha256 for one in old.entries} == {one.weights_sha256 for one in new.entries}:
        yield "the weights are the same on both sides"
    for name in ("robench", "torch", "attack_seed"):
        values = [sorted({str(getattr(one, name)) for one in side.entries}) for side in (new, old)]
        if values[0] != values[1]:
            yield (f"{name.replace('_', ' ')}: {', '.join(values[0])}, "
                   f"baseline {', '.join(values[1])}")
    doubts = sorted({id for one in old.entries for id in one.failed})
    if doubts and old.metric != CLEAN:
        yield f"the baseline is unreliable: {', '.join(doubts)}; it may be too high"
    known = {text for one in old.entries for text in one.warnings}
    yield from dict.fromkeys(f"warning: {text}" for one in new.entries for text in one.warnings
                             if text not in known)


# How many images


def _needed(
    one: Comparison, drop: Drop, *, max_drop: float, alpha: float, tests: int
) -> int | None:
    """Images (on each side, if unpaired) at which such a drop would be decided, 4 times out of 5:
    as a regression if it is larger than max_drop, at worst as the first of so many tests that Holm
    looks at; else as a pass, whose interval is its own."""
    assert one.baseline is not None and one.current is not None, "it was compared"
    before, after, n = one.baseline.share, one.current.share, one.baseline.n
    variance = before * (1 - before) + after * (1 - after)
    power = partial(unpaired_power, baseline=before, current=after, max_drop=max_drop,
                    alpha=alpha / tests)
    if one.paired and drop.lost is not None and drop.gained is not None:
        variance = (drop.lost + drop.gained) / n * drop.weight**2 - (drop.points / 100) ** 2
        power = partial(paired_power, lost=drop.lost / n, gained=drop.gained / n,
                        max_drop=max_drop / drop.weight, alpha=alpha / tests)
    if drop.points > max_drop:
        return images_needed(power)
    return images_to_pass(drop.points, variance, max_drop=max_drop, alpha=alpha)
