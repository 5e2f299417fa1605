"""Results as pandas tables. `columns` says what the columns mean, `grouping` what a row is."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from robench.errors import UsageError, one_line
from robench.reports.columns import (
    COSTS,
    IDENTITY,
    OPTIONAL,
    Line,
    accuracy_columns,
    describe,
    dtype_of,
    image_sets,
    make_frame,
    mark,
    measured,
)
from robench.reports.compare import difference, find_baseline, robust_mean, strongest
from robench.reports.grouping import Row, groups, rows
from robench.reports.record import Epoch, Record, Transfer
from robench.reports.runs import run_labels, trainings

DELTA = ("delta", "delta_p", "delta_to", "delta_attack")
ROB_F = ("dataset", "recipe", "model", "defense", "label", "checkpoint", "selection", "seed",
         "network", "rob_f_self", "rob_f_student", "student_robust", "clean", "n", "attack",
         "threat")
ROB_F_TRAINING = ("run", "dataset", "model", "recipe", "defense", "label", "seed", "epoch",
                  "selection", "network", "rob_f_self", "rob_f_student")
TRAINING = ("run", "dataset", "model", "recipe", "defense", "label", "seed", "epoch", "lr",
            "seconds", "selection", "clean", "robust")


def leaderboard(records: Sequence[Record]) -> pd.DataFrame:
    """The ranked networks, aggregated over seeds; `rank` restarts in each `group`.

    A group has one data set, one threat model and one set of images per attack. It is ranked by
    `rank_attack` (see `compare.strongest`); rows on which that attack failed have no rank. The
    difference `delta`, in percentage points, is to the baseline `delta_to` under `delta_attack`.
    """
    table = ranked_groups(records)
    lines = [
        {**line, "group": number, "images": image_sets(group)}
        for number, group in enumerate(table, start=1)
        for line in _ranking(group)
    ]
    accuracies = accuracy_columns(row for group in table for row in group)
    return make_frame(lines, ("group", "rank", "rank_attack", *IDENTITY, *accuracies, *DELTA,
                              *COSTS))


def ranked_groups(records: Sequence[Record]) -> list[list[Row]]:
    """The groups of `leaderboard`, not yet in the order of their ranks."""
    return groups(rows([r for r in records if r.ranked and r.role == "table"]))


def other_checkpoints(records: Sequence[Record]) -> pd.DataFrame:
    """The networks outside the ranking (the peer, the last epoch, ...), aggregated over seeds."""
    table = unranked_rows(records)
    return make_frame([describe(row) for row in table],
                      (*IDENTITY, *accuracy_columns(table), *COSTS))


def unranked_rows(records: Sequence[Record]) -> list[Row]:
    """The rows of `other_checkpoints`."""
    return rows([r for r in records if not r.ranked and r.role == "table"])


def rob_f(transfers: Sequence[Transfer], records: Sequence[Record] = ()) -> pd.DataFrame:
    """The Rob_f analysis of PeerAiD, one row per network f and seed, accuracies in percent.

    `rob_f_self` is f's accuracy on x_f*, crafted against f; `rob_f_student` is f's on x_S*,
    crafted against the student. How the student was selected, and the options that tell two
    configurations of a defense apart, are known only from `records` of the same runs.
    """
    labels = run_labels(records, transfers)
    selections = {(r.run, r.checkpoint): r.selection for r in records}
    lines = [
        {
            **t.model_dump(include=set(ROB_F)),
            "label": labels[t.run],
            "selection": mark(selections.get((t.run, t.checkpoint), "")),
            "rob_f_self": 100 * t.self_crafted / t.n,
            "rob_f_student": 100 * t.student_crafted / t.n,
            "student_robust": 100 * t.student_robust / t.n,
            "clean": 100 * t.clean / t.n,
        }
        for t in transfers
    ]
    return make_frame(lines, ROB_F)


def rob_f_training(epochs: Sequence[Epoch], records: Sequence[Record] = ()) -> pd.DataFrame:
    """`rob_f` on the selection split: one row per network f, epoch and training."""
    labels = run_labels(records, epochs)
    lines = [
        {
            **e.model_dump(include=set(ROB_F_TRAINING)),
            "label": labels[e.run],
            "selection": mark(e.selection),
            "network": network,
            "rob_f_self": 100 * own,
            "rob_f_student": 100 * students,
        }
        for one in trainings(epochs) for e in one.epochs
        for network, (own, students) in e.rob_f.items()
    ]
    return make_frame(lines, ROB_F_TRAINING)


def training(epochs: Sequence[Epoch], records: Sequence[Record] = ()) -> pd.DataFrame:
    """One row per epoch and training (see `runs.trainings`), accuracies in percent.

    `loss` is the total; <a>_clean and <a>_robust are those of averaged weights (swa, ema), missing
    where there are none yet. Labels are those of the `records` of the same runs.
    """
    labels = run_labels(records, epochs)
    lines = [
        {
            **e.model_dump(include=set(TRAINING)),
            "label": labels[e.run],
            "selection": mark(e.selection),
            "loss": e.losses.get("total"),
            "clean": _percent(e.clean),
            "robust": _percent(e.robust),
            **{f"{name}_{what}": _percent(value) for name, pair in e.averages.items()
               for what, value in zip(("clean", "robust"), pair, strict=True)},
        }
        for one in trainings(epochs) for e in one.epochs
    ]
    averages = sorted({name for line in lines for name in line} - {*TRAINING, "loss"})
    return make_frame(lines, (*TRAINING, "loss", *averages))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def to_csv(frame: pd.DataFrame) -> str:
    """Full precision. The cell of an accuracy that failed on every seed says "failed"."""
    frame = frame.copy()
    for name in measured(frame):
        failed = frame[name].isna() & (frame[f"{name}_failed"].fillna(0) > 0)
        frame[name] = frame[name].astype(object).mask(failed, "failed")
    lines: list[Iterable[Any]] = [frame.columns, *frame.itertuples(index=False)]
    return "".join(",".join(map(_csv_cell, line)) + "\n" for line in lines)


def from_csv(text: str) -> pd.DataFrame:
    """The table that `to_csv` wrote, with its types; what failed is a missing number again.

    Raises UsageError for another text.
    """
    try:
        header, *lines = csv.reader(io.StringIO(text, newline=""))
        return make_frame([dict(zip(header, map(_csv_value, header, line), strict=True))
                           for line in lines], header)
    except Exception as error:  # damaged text may raise anything in pandas
        raise UsageError(f"this is no table of robench: {one_line(error)}") from None


def _csv_cell(value: Any) -> str:
    """Quoted also around a lone carriage return, which pandas and csv forget."""
    text = "" if pd.isna(value) else str(value)
    return '"' + text.replace('"', '""') + '"' if re.search('[,"\r\n]', text) else text


def _csv_value(name: str, cell: str) -> Any:
    kind = dtype_of(name)
    if kind == "object":
        return cell or (None if name in OPTIONAL else "")
    if kind == "bool":
        return {"True": True, "False": False}[cell]
    if cell in ("", "failed"):
        return None
    return int(cell) if kind == "Int64" else float(cell)


def _ranking(group: Sequence[Row]) -> list[Line]:
    """A line per row, most robust first; equals share a rank, rows without one come last."""
    attack = strongest(group)
    scored = [(robust_mean(row, attack) if attack else math.nan, row) for row in group]
    scores = sorted((score for score, _ in scored if not math.isnan(score)), reverse=True)
    lines = [
        {
            **describe(row),
            "rank": None if math.isnan(score) else scores.index(score) + 1,
            "rank_attack": attack,
            **_difference(row, group, attack),
        }
        for score, row in scored
    ]
    return sorted(lines, key=lambda line: (
        line["rank"] or math.inf, -line.get("clean", -math.inf), line["label"]
    ))


def _difference(row: Row, group: Sequence[Row], attack: str | None) -> Line:
    baseline = find_baseline(row, group)
    found = None if baseline is None or baseline is row else difference(row, baseline, attack)
    if found is None:
        return {}
    return dict(zip(DELTA, (found.points, found.p, found.baseline, found.attack), strict=True))
