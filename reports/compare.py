"""Rows against each other: the attack that ranks them, per-image survival, the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robench.errors import RobenchError
from robench.files import unpack_arrays
from robench.reports.grouping import AUTOATTACK, Key, Row
from robench.reports.record import Record
from robench.reports.uncertainty import paired_p

Flags = npt.NDArray[np.bool_]
MOST = 1_000_000  # bytes of a file of flags that are not flags


@dataclass(frozen=True)
class Difference:
    """A row minus a baseline.

    Attributes:
        points: in percentage points of robust accuracy.
        p: of the paired test (see `uncertainty`); NaN where the two cannot be paired.
    """

    baseline: str
    attack: str
    points: float
    p: float


def robust_mean(row: Row, attack: str) -> float:
    """Mean robust accuracy in [0, 1] over the networks of a row; NaN if it never succeeded."""
    records = row.passed(attack)
    return statistics.fmean(r.n_robust / r.n for r in records) if records else math.nan


def strongest(rows: Sequence[Row]) -> str | None:
    """The attack to compare by: AutoAttack, or else the one that leaves the lowest accuracy.

    Only attacks that were tried on every row count; one that failed on a row was tried, and
    does not give way to a weaker one. None if there is no such attack.
    """
    common = [name for name in rows[0].cells if all(name in row.cells for row in rows)]
    for name in common:
        if name == AUTOATTACK or name.startswith(f"{AUTOATTACK} ("):
            return name
    means = {}
    for name in common:
        known = [m for m in (robust_mean(row, name) for row in rows) if not math.isnan(m)]
        if known:
            means[name] = statistics.fmean(known)
    return min(means, key=lambda name: means[name]) if means else None


def find_baseline(row: Row, group: Sequence[Row]) -> Row | None:
    """The first baseline of the group that is like the row but for the defense.

    Of the same recipe, and with the same average of weights (SWA, EMA, none), or else what
    averaging gains would be counted as the defense's. Of a network that was trained in a run also
    with the same model and, unless each method has its own schedule, as many epochs and at the same
    threat model; among others one of the same model goes first. None if there is none.
    """
    fair = [other for other in group
            if other.baseline and other.key.recipe == row.key.recipe
            and _average(other) == _average(row) and _as_trained(other.key, row.key)]
    same = [other for other in fair if other.key.model == row.key.model]
    return next(iter(same or fair), None)


def _average(row: Row) -> str:
    name = row.key.checkpoint.removesuffix("-last")
    return name if name in ("swa", "ema") else ""


def _as_trained(one: Key, other: Key) -> bool:
    if "trained" not in (one.source, other.source):
        return True
    how = (one.epochs, one.trained_at) == (other.epochs, other.trained_at)
    return (one.source, one.model) == (other.source, other.model) and (
        how or one.recipe == "as-released")


def difference(row: Row, baseline: Row, attack: str | None) -> Difference | None:
    """None where there is nothing to subtract: no common attack, or it failed on one side.

    `row` and `baseline` are of one group, so the images are the same. The p-value needs the
    survival flags of the same seeds on both sides.
    """
    attack = attack or strongest([row, baseline])
    if attack is None or not (row.passed(attack) and baseline.passed(attack)):
        return None
    points = 100 * (robust_mean(row, attack) - robust_mean(baseline, attack))
    return Difference(baseline.label, attack, points, _paired(row, baseline, attack))


def worst_case(row: Row) -> tuple[list[int], int] | None:
    """Images that survive every attack, per seed, and the number of images all attacks saw.

    An attack with a limit sees the first images of the same test set. None if there is only one
    attack, one failed or lacks a seed, or flags are missing or of other images.
    """
    seeds = {tuple(sorted(cell)) for cell in row.cells.values()}
    failed = any(record.status != "ok" for record in row.records)
    if len(row.cells) < 2 or len(seeds) > 1 or failed:
        return None
    n = min(record.n for record in row.records)
    survivors: dict[int, Flags] = {}
    clean: dict[int, Flags] = {}
    for record in row.records:
        flags = survival(record)
        if flags is None:
            return None
        correct, robust = flags[0][:n], flags[1][:n]
        if not np.array_equal(clean.setdefault(record.seed, correct), correct):
            return None
        survivors[record.seed] = survivors.get(record.seed, robust) & robust
    return [int(survivors[seed].sum()) for seed in sorted(survivors)], n


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same network, on whatever device."""
    return len(one) == len(other) and np.allclose(one, other, rtol=1e-3, atol=1e-3)


def survival(record: Record) -> tuple[Flags, Flags] | None:
    """(correct, robust), each (n,) bool; None if the record's flags are not to be found.

    Raises RobenchError if the file is damaged or is not the record's.
    """
    found = per_image(record, "correct", "robust")
    if found is None:
        return None
    correct, robust = (found.get(name, np.empty(0)) for name in ("correct", "robust"))
    flags = all(array.shape == (record.n,) and array.dtype == bool for array in (correct, robust))
    if not flags or int(robust.sum()) != record.n_robust:
        raise unfit(record)
    return correct, robust


def per_image(record: Record, *names: str) -> dict[str, npt.NDArray[Any]] | None:
    """Of these arrays those that the record's file of flags has; None if it is not to be found.

    Raises RobenchError if the file is damaged.
    """
    path = Path(record.flags)
    if not record.flags or not path.is_file():
        return None
    try:  # six arrays, four bytes for each image or less, and the names of stages and classes
        arrays = unpack_arrays(path, 24 * record.n + MOST)
    except (OSError, ValueError) as error:
        raise RobenchError(f"cannot read the survival flags {path}: {error}") from None
    return {name: arrays[name] for name in names if name in arrays}


def unfit(record: Record) -> RobenchError:
    """What is to be raised for a file of flags that is of another record."""
    return RobenchError(f"the survival flags {record.flags} do not fit their record: "
                        "evaluate again")


def _paired(row: Row, baseline: Row, attack: str) -> float:
    """The p-value, or NaN if the seeds differ or flags are missing."""
    ours, theirs = row.passed(attack), baseline.passed(attack)
    if [r.seed for r in ours] != [r.seed for r in theirs]:
        return math.nan
    stacks = _stack(ours), _stack(theirs)
    if stacks[0] is None or stacks[1] is None:
        return math.nan
    return paired_p(stacks[0], stacks[1])


def _stack(records: Sequence[Record]) -> Flags | None:
    """(S, n) robust flags of S networks; None if those of one are missing."""
    found = [flags[1] for flags in map(survival, records) if flags is not None]
    return np.stack(found) if len(found) == len(records) else None
