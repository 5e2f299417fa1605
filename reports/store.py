"""The data files of a run folder, read and written. No torch, no pandas.

Files of RobustBench are read too; what they say is no measurement, and is not written again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from robench.errors import UsageError
from robench.files import write_atomic
from robench.options import first_error
from robench.reports import robustbench
from robench.reports.judge import judged
from robench.reports.published import Published
from robench.reports.record import (
    Corruptions,
    Crossing,
    Epoch,
    Gallery,
    Landscape,
    Record,
    Steps,
    Transfer,
)

RECORDS, TRANSFERS, EPOCHS = "results.jsonl", "transfer.jsonl", "training.jsonl"
LANDSCAPES, CROSSINGS, STEPS = "landscape.jsonl", "crossing.jsonl", "steps.jsonl"
GALLERIES, CORRUPTIONS = "gallery.jsonl", "corruptions.jsonl"
Line = TypeVar("Line", bound=BaseModel)


@dataclass(frozen=True)
class Results:
    """Everything that reports are made of.

    `Record.flags` is an absolute path after `load` and `anchored`. A relative one is relative
    to the folder of results.jsonl.
    """

    records: list[Record] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    landscapes: list[Landscape] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    corruptions: list[Corruptions] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)  # given as files of RobustBench


def load(paths: Sequence[Path]) -> Results:
    """Read and merge run folders, the results.jsonl in them and RobustBench's .json files.

    Exact duplicates are dropped; two copies of a row that differ only in where the survival
    flags lie are duplicates too, and the first one stays. Flags that several records raise
    together are set anew.

    Raises:
        UsageError: there is no results.jsonl, or a line of a file is not a row (the message
            names the file and the line), a path of flags leads out of the folder, and not into
            another run, from which it was merged; or see `robustbench.read`.
    """
    found = Results()
    for path in paths:
        if path.suffix == ".json":
            found.published.append(robustbench.read(path))
            continue
        folder = path.parent if path.name == RECORDS else path
        if not (folder / RECORDS).is_file():
            raise UsageError(f"{path}: no {RECORDS} there; name a run folder or its {RECORDS}")
        part = Results(
            _read(folder / RECORDS, Record),
            _read(folder / TRANSFERS, Transfer),
            _read(folder / EPOCHS, Epoch),
            _read(folder / LANDSCAPES, Landscape),
            _read(folder / CROSSINGS, Crossing),
            _read(folder / STEPS, Steps),
            _read(folder / GALLERIES, Gallery),
            _read(folder / CORRUPTIONS, Corruptions),
        )
        part = anchored(part, folder)
        _check_flags(part.records, folder)
        found.records.extend(part.records)
        found.transfers.extend(part.transfers)
        found.epochs.extend(part.epochs)
        found.landscapes.extend(part.landscapes)
        found.crossings.extend(part.crossings)
        found.steps.extend(part.steps)
        found.galleries.extend(part.galleries)
        found.corruptions.extend(part.corruptions)
    transfers = _unique(found.transfers)
    return Results(judged(_unique(found.records), transfers), transfers, _unique(found.epochs),
                   _unique(found.landscapes), _unique(found.crossings), _unique(found.steps),
                   _unique(found.galleries), _unique(found.corruptions),
                   list(dict.fromkeys(found.published)))


def save(out: Path, results: Results) -> list[Path]:
    """Write the data files into `out`, each whole or not at all; returns their paths.

    Those of later commands are written only where there is or was something in them. Rows keep
    their order. Absolute paths of flags become relative to `out`, so that the folder can be moved.
    Raises RobenchError if the disk refuses.
    """
    records = [
        record.model_copy(update={"flags": relative(record.flags, out)})
        for record in results.records
    ]
    files: tuple[tuple[str, Sequence[BaseModel]], ...] = (
        (RECORDS, records), (TRANSFERS, results.transfers), (EPOCHS, results.epochs),
        (LANDSCAPES, results.landscapes), (CROSSINGS, results.crossings), (STEPS, results.steps),
        (GALLERIES, results.galleries), (CORRUPTIONS, results.corruptions),
    )
    written = [(out / name, lines) for name, lines in files
               if lines or name not in (CROSSINGS, STEPS, GALLERIES, CORRUPTIONS)
               or (out / name).exists()]
    for path, lines in written:
        write_atomic(path, "".join(f"{line.model_dump_json()}\n" for line in lines))
    return [path for path, _ in written]


def anchored(results: Results, folder: Path) -> Results:
    """The same results with the paths of flags absolute, taken as relative to `folder`."""
    records = [
        record.model_copy(update={"flags": os.path.abspath(folder / record.flags)})
        if record.flags else record
        for record in results.records
    ]
    return replace(results, records=records)


def relative(flags: str, out: Path) -> str:
    """The path of flags as it is written into a file in `out`."""
    if not os.path.isabs(flags):
        return flags
    try:
        return Path(os.path.relpath(flags, out)).as_posix()
    except ValueError:  # another drive (Windows): there is no relative path
        return flags


def _check_flags(records: Sequence[Record], folder: Path) -> None:
    """Raises UsageError where a record leads to a file that no run has written."""
    home = Path(os.path.abspath(folder))
    known: dict[Path, bool] = {}
    for path in (Path(record.flags) for record in records if record.flags):
        inside = path.is_relative_to(home)
        if not inside and path.parent not in known:
            known[path.parent] = any((p / RECORDS).is_file() for p in path.parents)
        fits = path.suffix == ".npz" and str(path).isprintable()
        if not fits or not (inside or known[path.parent] or not os.path.lexists(path)):
            raise UsageError(f"{folder / RECORDS}: the survival flags {str(path)!r} are not those "
                             "of a run")


def _read(path: Path, kind: type[Line]) -> list[Line]:
    """One row a line; a file that is not there has no rows."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(kind.model_validate_json(line))
        except ValidationError as error:
            reason = first_error(error)
            raise UsageError(f"{path}:{number}: not a {kind.__name__}: {reason}") from None
    return rows


def _unique(rows: Iterable[Line]) -> list[Line]:
    """Without repetitions, in order of first appearance."""
    seen: dict[str, Line] = {}
    for row in rows:
        seen.setdefault(row.model_dump_json(exclude={"flags"}), row)
    return list(seen.values())
