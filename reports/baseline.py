"""Another baseline for the differences of a report than the one a run was started with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robench.errors import UsageError
from robench.registry import unknown
from robench.reports.compare import find_baseline
from robench.reports.grouping import Row, groups, rows
from robench.reports.store import Results


def with_baseline(results: Results, label: str) -> Results:
    """The same results, in which the rows labeled `label` are the baselines and no others.

    Raises UsageError: no row of a ranking has this label, or there is a ranking in which nothing
    may be compared with it: it was measured on other images, under another threat model, on
    another split, or shares no attack or recipe with the rows there.
    """
    table = rows([r for r in results.records if r.ranked and r.role == "table"])
    labels = {row.label for row in table}
    if label not in labels:
        raise unknown("baseline", label, labels)
    chosen = {id(record) for row in table if row.label == label for record in row.records}
    records = [record.model_copy(update={"baseline": id(record) in chosen})
               for record in results.records]
    for group in groups(rows([r for r in records if r.ranked and r.role == "table"])):
        if not _comparable(group):
            dataset, split, threat = group[0].key[:3]
            names = ", ".join(dict.fromkeys(row.label for row in group))
            raise UsageError(
                f"--baseline {label!r}: nothing of it may be compared with {names} on {dataset} "
                f"{split}, {threat}: other images, threat model, split, recipe or attacks; report "
                f"those runs by themselves"
            )
    return replace(results, records=records)


def _comparable(group: Sequence[Row]) -> bool:
    """Whether a row of the group, if there is one, has a difference to a baseline in it."""
    others = [row for row in group if not row.baseline]
    baselines = [find_baseline(row, group) for row in others]
    return not others or any(
        baseline is not None and row.cells.keys() & baseline.cells.keys()
        for row, baseline in zip(others, baselines, strict=True)
    )
