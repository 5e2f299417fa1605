"""What an option of a training changes: two configurations of one defense, paired by seed.

The same seed means the same weights and order of images at the start, so that the difference is
taken seed by seed, and Student's t-interval is that of the mean over trainings: what to expect of
other seeds, on these images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import pandas as pd
from scipy.special import stdtrit

from robench.reports.columns import Line, clean_records, make_frame
from robench.reports.grouping import Row
from robench.reports.record import Record
from robench.reports.store import Results
from robench.reports.tables import ranked_groups
from robench.reports.text import TITLES, Board, Cell, Column, points

COLUMNS = ("dataset", "split", "threat", "images", "recipe", "model", "defense", "checkpoint",
           "label", "delta_to", "metric", "seeds", "delta", "delta_std", "delta_from",
           "delta_until", "n")


def ablation(results: Results) -> pd.DataFrame:
    """Differences in points, one row for each configuration, metric and checkpoint.

    Each configuration of a defense is compared with the first one of the results, over the seeds
    that both have, two at least. delta_from and delta_until are the 95 % t-interval of the mean.
    """
    lines = [line for group in ranked_groups(results.records) for line in _of(group)]
    return make_frame(lines, COLUMNS)


def ablation_boards(results: Results) -> list[Board]:
    """A board for each ranking, lines as in `ablation`."""
    frame = ablation(results)
    boards = []
    for place, some in frame.groupby(["dataset", "split", "threat", "recipe", "model"], sort=False):
        dataset, split, threat, recipe, model = map(str, place)
        lines = some.to_dict("records")
        boards.append(Board(f"{dataset} {split}, {threat}: what an option changes", (
            *(Column(title, tuple(Cell(line[name]) for line in lines), words=True)
              for title, name in (("Configuration", "label"), ("Compared with", "delta_to"),
                                  ("Checkpoint", "checkpoint"))),
            Column("Accuracy", tuple(Cell(TITLES.get(line["metric"], line["metric"]))
                                     for line in lines), words=True),
            Column("Images", tuple(Cell(f"{line['n']:,}") for line in lines)),
            Column("Seeds", tuple(Cell(str(line["seeds"])) for line in lines)),
            Column("Difference, points", tuple(
                Cell(points(line["delta"], line["n"]), sort=line["delta"]) for line in lines)),
            Column("95 % interval over seeds", tuple(
                Cell(f"[{points(line['delta_from'], line['n'])}, "
                     f"{points(line['delta_until'], line['n'])}]", sort=line["delta_from"])
                for line in lines)),
        ), (f"Recipe: {recipe}, Model: {model}",)))
    return boards


def _of(group: Sequence[Row]) -> Iterator[Line]:
    first: dict[tuple[str, ...], Row] = {}
    for row in group:
        key = row.key
        same = (key.recipe, key.model, key.source, key.defense, key.checkpoint)
        other = first.setdefault(same, row)
        if other is row:
            continue
        for metric in ("clean", *(name for name in row.cells if name in other.cells)):
            pairs = _pairs(_measured(row, metric), _measured(other, metric))
            if len(pairs) < 2:
                continue
            deltas = [100 * (_share(ours, metric) - _share(theirs, metric))
                      for ours, theirs in pairs]
            mean, std = statistics.fmean(deltas), statistics.stdev(deltas)
            half = float(stdtrit(len(deltas) - 1, 0.975)) * std / math.sqrt(len(deltas))
            yield {
                **key._asdict(), "images": pairs[0][0].data_sha256[:12], "label": row.label,
                "delta_to": other.label, "metric": metric, "seeds": len(deltas), "delta": mean,
                "delta_std": std, "delta_from": mean - half, "delta_until": mean + half,
                "n": pairs[0][0].n,
            }


def _measured(row: Row, metric: str) -> Sequence[Record]:
    return clean_records(row) if metric == "clean" else row.passed(metric)


def _pairs(ours: Sequence[Record], theirs: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Records of the same seed on the same images."""
    others = {(r.seed, r.data_sha256): r for r in theirs}
    return [(r, others[r.seed, r.data_sha256]) for r in ours if (r.seed, r.data_sha256) in others]


def _share(record: Record, metric: str) -> float:
    return (record.n_correct if metric == "clean" else record.n_robust) / record.n
