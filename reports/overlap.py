"""Which attack breaks what: how the sets of images that attacks fool overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import numpy as np
import pandas as pd

from robench.reports.columns import clean_records, make_frame
from robench.reports.compare import Flags, find_baseline, robust_mean, strongest, survival
from robench.reports.grouping import Row
from robench.reports.record import Record
from robench.reports.tables import ranked_groups
from robench.reports.tradeoff import row_names

IDENTITY = ("dataset", "split", "threat", "recipe", "model", "defense", "checkpoint")
Seen = Mapping[str, Mapping[int, tuple[Flags, Flags]]]  # by attack and seed: (correct, robust)
Fooled = tuple[str, ...]  # names of attacks


def overlap(records: Sequence[Record]) -> pd.DataFrame:
    """By which attacks exactly the images fall that are classified right without one.

    For each group of `tables.leaderboard` its first row and the baseline of that row; where the
    first row is a baseline itself, the best other row. A line for each of the two and each set of
    attacks, `fooled_by`, that fools an image which no other attack fools: a `count` of the `n`
    images, the mean over seeds. The empty set stands for the images that withstand all.

    Counted are the attacks that ended well on every seed of both rows and left their flags; an
    attack with a limit sees the first images of the same test set, so that the smallest limit is
    `n`. Groups with fewer than two such attacks have no lines.

    Raises RobenchError if a file of flags is damaged.
    """
    lines = []
    for number, group in enumerate(ranked_groups(records), start=1):
        chosen = first_and_beside(group)
        seen = [_seen(row) for row in chosen]
        attacks = [name for name in (seen[0] if seen else ()) if all(name in s for s in seen)]
        n = min((len(flags[0]) for s in seen for name in attacks for flags in s[name].values()),
                default=0)
        counted = [_count(s, attacks, n) for s in seen]
        if len(attacks) < 2 or not all(counted):
            continue
        names = row_names(group)
        lines += [
            {"group": number, **{name: getattr(row.key, name) for name in IDENTITY},
             "label": row.label, "name": names[row.key], "attacks": tuple(attacks),
             "fooled_by": fooled, "count": images, "n": n}
            for row, sets in zip(chosen, counted, strict=True)
            for fooled, images in sorted(sets.items())
        ]
    return make_frame(lines, ("group", *IDENTITY, "label", "name", "attacks", "fooled_by", "count",
                              "n"))


def overlap_table(records: Sequence[Record]) -> pd.DataFrame:
    """`overlap` for a file: the sets as text, "none" for the empty one."""
    frame = overlap(records)
    return frame.assign(**{
        name: pd.Series([" + ".join(attacks) or "none" for attacks in frame[name]], frame.index,
                        dtype=object)
        for name in ("attacks", "fooled_by")
    })


def first_and_beside(group: Sequence[Row]) -> list[Row]:
    """The first row of a ranking and the one to see it beside; [] where nothing is ranked."""
    ranked = by_rank(group)
    if not ranked:
        return []
    first, *others = ranked
    beside = (next((row for row in others if not row.baseline), None) if first.baseline
              else find_baseline(first, ranked))
    return [first] if beside is None else [first, beside]


def by_rank(group: Sequence[Row]) -> list[Row]:
    """The rows that have a rank, in its order; among equals the more accurate comes first."""
    attack = strongest(group)
    ranked = [row for row in group if attack and row.passed(attack)]
    return sorted(ranked, key=lambda row: (-robust_mean(row, attack or ""), -_clean(row),
                                           row.label))


def _clean(row: Row) -> float:
    return fmean(record.n_correct / record.n for record in clean_records(row))


def _seen(row: Row) -> Seen:
    """The flags of the attacks that have them for every seed of the row."""
    seeds = {record.seed for record in row.records}
    found = {}
    for name in row.cells:
        flags = {record.seed: survival(record) for record in row.passed(name)}
        known = {seed: pair for seed, pair in flags.items() if pair is not None}
        if known.keys() == seeds:
            found[name] = known
    return found


def _count(seen: Seen, attacks: Collection[str], n: int) -> dict[Fooled, float]:
    """Images by the attacks that fool them, mean over seeds.

    {} if the attacks disagree about which images are right without them: then they have not seen
    the same images.
    """
    total: Counter[Fooled] = Counter()
    seeds = {seed for name in attacks for seed in seen[name]}
    for seed in seeds:
        correct = [seen[name][seed][0][:n] for name in attacks]
        if any(not np.array_equal(other, correct[0]) for other in correct):
            return {}
        fooled = np.stack([~seen[name][seed][1][:n] for name in attacks], axis=1)[correct[0]]
        for row, images in zip(*np.unique(fooled, axis=0, return_counts=True), strict=True):
            total[tuple(name for name, hit in zip(attacks, row, strict=True) if hit)] += int(images)
    return {names: images / len(seeds) for names, images in total.items()}
