"""A row as the columns of a table: percentages with their errors, costs, warnings.

Every accuracy `<a>` (of "clean", an attack or "worst") comes with `<a>_std`, `<a>_low`,
`<a>_high`, `<a>_n` and `<a>_failed`: standard deviation over seeds, 95 % interval of the sampling
error, images, and seeds whose measurement failed. `uncertainty` says what these mean. All are in
percent but the last two. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from robench.reports.compare import worst_case
from robench.reports.grouping import Row
from robench.reports.record import Record
from robench.reports.uncertainty import estimate

STANDARD = ("clean", "fgsm", "pgd-20", "cw", "autoattack")
PARTS = ("", "_std", "_low", "_high", "_n", "_failed")
IDENTITY = ("dataset", "split", "threat", "images", "recipe", "epochs", "model", "source",
            "defense", "options", "label", "checkpoint", "selection", "baseline", "seeds")
COSTS = ("train_seconds", "train_and_teacher_seconds", "robust_overfitting", "catastrophic_epoch",
         "parameters", "warnings", "warning_text", "notes")

# What the columns of all tables are, by their names; what is not here is a number.
OPTIONAL = {"rank_attack", "delta_to", "delta_attack"}  # text that may be missing
_TEXT = {
    "dataset", "split", "threat", "images", "recipe", "model", "source", "defense", "options",
    "label", "name", "checkpoint", "selection", "warning_text", "notes", "network", "run",
    "attack", "attacks", "norm", "start", "threats", "machine", "device", "part", "what",
    "method", "teacher", "certainty", "crafted_against", "evaluated_on", "fooled_by",
    "corruption", "severity", "class_name", "worst_name", "best_name", "true_name",
    "predicted_name", "metric", *OPTIONAL,
}
_FLAGS = {"baseline", "pareto", "whole", "fooled"}
_WHOLE = {
    "group", "rank", "epoch", "epochs", "catastrophic_epoch", "seeds", "seed", "n", "parameters",
    "warnings", "networks", "measured", "peak_bytes", "untimed", "uncounted", "steps", "averaged",
    "image", "class", "classes", "true", "predicted", "directions", "points", "direction_seed",
}

Line = dict[str, Any]


def accuracy_columns(table: Iterable[Row]) -> list[str]:
    """The standard accuracies, then others as they come, then the worst case."""
    names = dict.fromkeys((*STANDARD, *(name for row in table for name in row.cells), "worst"))
    return [name + part for name in names for part in PARTS]


def measured(frame: pd.DataFrame) -> list[str]:
    """The accuracies of a table that were measured or failed on some row: "clean", ..."""
    names = [name.removesuffix("_failed") for name in frame.columns if name.endswith("_failed")]
    return [name for name in names if frame[f"{name}_failed"].notna().any()]


def make_frame(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Exactly these columns in this order, with the same types whatever is missing."""
    return pd.DataFrame({
        name: pd.Series([line.get(name) for line in lines], dtype=dtype_of(name))
        for name in columns
    })


def dtype_of(name: str) -> str:
    """The pandas type of a column of these tables."""
    if name in _TEXT:
        return "object"
    if name in _FLAGS:
        return "bool"
    return "Int64" if name in _WHOLE or name.endswith(("_n", "_failed")) else "float64"


def mark(selection: str) -> str:
    """How a checkpoint was selected; a selection on the test images is not to be overlooked."""
    return "test (!)" if selection == "test" else selection


def describe(row: Row) -> Line:
    """What a row says by itself, by column."""
    networks = {record.seed: record for record in row.records}.values()
    warnings = _warnings(row)
    line: Line = {
        **row.key._asdict(),
        "label": row.label,
        "images": image_sets([row]),
        "selection": ", ".join(sorted({mark(r.selection) for r in row.records})),
        "baseline": row.baseline,
        "seeds": len(networks),
        "train_seconds": sum(r.train_seconds for r in networks) / len(networks),
        "train_and_teacher_seconds":
            sum(r.train_seconds + r.teacher_seconds for r in networks) / len(networks),
        "robust_overfitting": _overfitting(networks),
        "catastrophic_epoch": min((r.catastrophic_epoch for r in networks
                                   if r.catastrophic_epoch is not None), default=None),
        "parameters": max(r.parameters for r in networks),
        "warnings": len(warnings),
        "warning_text": "; ".join(warnings),
        "notes": "; ".join(dict.fromkeys(note for r in row.records for note in r.notes)),
    }
    for name, cell in row.cells.items():
        passed = row.passed(name)
        line |= _accuracy(name, [r.n_robust for r in passed], passed[0].n if passed else 0,
                          failed=len(cell) - len(passed))
    return line | _clean(row) | _worst(row)


def _overfitting(networks: Collection[Record]) -> float | None:
    """Best minus last robust accuracy on the selection split, in points, mean over seeds."""
    gaps = [r.robust_overfitting for r in networks if r.robust_overfitting is not None]
    return 100 * sum(gaps) / len(gaps) if gaps else None


def image_sets(table: Sequence[Row]) -> str:
    """Short hashes of the image sets behind some rows, the largest first."""
    sizes = {record.data_sha256: record.n for row in table for record in row.records}
    return "+".join(sha[:12] for sha, _ in sorted(sizes.items(), key=lambda item: -item[1]))


def _warnings(row: Row) -> list[str]:
    """Each warning once, with the attacks it is about unless it is about all of them."""
    attacks: dict[str, list[str]] = {}
    for name, cell in row.cells.items():
        texts = [text for record in cell.values() for text in record.warnings]
        texts += [f"failed: {record.error or 'reason unknown'}"
                  for record in cell.values() if record.status == "failed"]
        texts += [f"partial: out of time, robust accuracy is between "
                  f"{record.n_robust - record.n_open} and {record.n_robust} of {record.n}"
                  for record in cell.values() if record.status == "partial"]
        for text in dict.fromkeys(" ".join(text.split()) for text in texts):
            attacks.setdefault(text, []).append(name)
    return [
        *(text if len(names) == len(row.cells) > 1 else f"{', '.join(names)}: {text}"
          for text, names in attacks.items()),
        *row.remarks,
    ]


def _accuracy(name: str, counts: Sequence[int], n: int, failed: int = 0) -> Line:
    """The columns of one accuracy, from the number of right images of each network."""
    if not counts:
        return {f"{name}_failed": failed}
    got = estimate(counts, n)
    values = (100 * got.mean, 100 * got.std, 100 * got.low, 100 * got.high, n, failed)
    return {name + part: value for part, value in zip(PARTS, values, strict=True)}


def _clean(row: Row) -> Line:
    """Clean accuracy on the largest image set that any attack of the row finished on.

    A seed on which no attack finished has no trustworthy clean count: it failed here too.
    """
    records = clean_records(row)
    failed = len({record.seed for record in row.records}) - len(records)
    n = records[0].n if records else 0
    return _accuracy("clean", [record.n_correct for record in records], n, failed)


def clean_records(row: Row) -> list[Record]:
    """The records that `clean` is made from, one of each seed."""
    passed = [record for name in row.cells for record in row.passed(name)]
    largest = max(passed, key=lambda record: record.n, default=None)
    by_seed = {r.seed: r for r in passed if largest and r.data_sha256 == largest.data_sha256}
    return [record for _, record in sorted(by_seed.items())]


def _worst(row: Row) -> Line:
    found = worst_case(row)
    return {} if found is None else _accuracy("worst", *found)
