"""From a number in a table back to the records it is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from robench.reports.columns import clean_records, image_sets
from robench.reports.compare import find_baseline
from robench.reports.grouping import Key, Row
from robench.reports.record import Record, Transfer
from robench.reports.tables import ranked_groups, unranked_rows


def record_id(record: Record | Transfer) -> str:
    """A name made from all that a record says, wherever its survival flags lie."""
    return short_id("r", record.model_dump_json(exclude={"flags"}))


def short_id(kind: str, text: str) -> str:
    """An HTML id that stands for a text."""
    return f"{kind}-{sha256(text.encode()).hexdigest()[:12]}"


class Trace:
    """Which records the numbers of `tables.leaderboard` and `other_checkpoints` are made from."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._ids = {id(record): record_id(record) for record in records}
        self._rows: dict[tuple[Any, ...], tuple[Row, Row | None]] = {}
        for number, group in enumerate(ranked_groups(records), start=1):
            for row in group:
                self._rows[number, *row.key] = row, find_baseline(row, group)
        for row in unranked_rows(records):
            self._rows[image_sets([row]), *row.key] = row, None

    def __call__(self, line: Mapping[Any, Any], name: str) -> tuple[str, ...]:
        """Links to the records behind "clean", an attack, "worst" or "delta" of a line."""
        place = line["group"] if "group" in line else line["images"]
        row, baseline = self._rows[place, *(line[field] for field in Key._fields)]
        attack = line.get("delta_attack")
        if name == "clean":
            records = clean_records(row)
        elif name == "worst":
            records = row.records
        elif name == "delta":
            records = [r for one in (row, baseline) if one and attack for r in one.passed(attack)]
        else:
            records = list(row.cells.get(name, {}).values())
        return tuple(f"#{self._ids[id(record)]}" for record in records)
