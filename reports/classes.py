"""Class by class: robust accuracy, the worst class, and what the classes are taken for.

A network may owe its robust accuracy to a few easy classes. Robust accuracy class by class, and the
lowest of these numbers, as in Tian et al. 2021 (arXiv 2105.14240) and Xu et al. 2021 (arXiv
2010.06121). All of it is under the attack that ranks a group of the leaderboard, for the rows whose
files say what each image was taken for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from robench.reports.columns import make_frame
from robench.reports.compare import strongest
from robench.reports.grouping import Key, Row
from robench.reports.overlap import by_rank
from robench.reports.predictions import Labels, Predictions, predictions
from robench.reports.record import Record
from robench.reports.tables import ranked_groups
from robench.reports.tradeoff import row_names
from robench.reports.uncertainty import estimate, lowest

IDENTITY = ("group", *Key._fields, "label", "name", "attack", "seeds")
PARTS = ("", "_std", "_low", "_high")
ACCURACIES = tuple(f"{kind}{part}" for kind in ("clean", "robust") for part in PARTS)
Line = dict[str, Any]


def class_accuracy(records: Sequence[Record]) -> pd.DataFrame:
    """A line for each row of the leaderboard and each of its classes.

    `clean` and `robust` are in percent of the `n` images of the class, the mean over `seeds`, with
    the standard deviation over seeds and the 95 % interval of the sampling error (`uncertainty`).
    Raises RobenchError if a file of flags is damaged.
    """
    lines = [
        {**known, "class": label, "class_name": seen.name(label), "n": int(mine.sum()),
         **_shares("clean", seen.clean[:, mine] == label),
         **_shares("robust", seen.predicted[:, mine] == label)}
        for known, seen in _seen(records)
        for label, mine in ((int(k), seen.label == k) for k in np.unique(seen.label))
    ]
    return make_frame(lines, (*IDENTITY, "class", "class_name", "n", *ACCURACIES))


def worst_class(records: Sequence[Record]) -> pd.DataFrame:
    """A line for each row of the leaderboard: the class with the lowest robust accuracy, and the
    one with the highest.

    `worst_class` is in percent, the mean over seeds, of the class `worst_name`; `_std` over seeds,
    `_low` and `_high` the 95 % interval of the lowest true accuracy of a class
    (`uncertainty.lowest`), `_n` the images of the class. An observed minimum is on average below
    the true one, and the more so the fewer images a class has. `robust` is over all images.
    """
    return worst_of(class_accuracy(records))


def worst_of(classes: pd.DataFrame) -> pd.DataFrame:
    """`worst_class` of the records from which `class_accuracy` made these lines."""
    lines: list[Line] = []
    for _, some in classes.groupby(["group", *Key._fields], sort=False):
        worst, best = (some.iloc[int(place)] for place in (some["robust"].argmin(),
                                                           some["robust"].argmax()))
        low, high = lowest((some["robust"] / 100).tolist(), some["n"].tolist())
        lines.append({
            **{name: worst[name] for name in IDENTITY},
            "robust": float((some["robust"] * some["n"]).sum() / some["n"].sum()),
            "worst_class": worst["robust"], "worst_class_std": worst["robust_std"],
            "worst_class_low": 100 * low, "worst_class_high": 100 * high,
            "worst_class_n": worst["n"], "worst_name": worst["class_name"],
            "best_class": best["robust"], "best_name": best["class_name"], "classes": len(some),
        })
    return make_frame(lines, (
        *IDENTITY, "robust", *(f"worst_class{part}" for part in (*PARTS, "_n")), "worst_name",
        "best_class", "best_name", "classes"))


def confusion(records: Sequence[Record]) -> pd.DataFrame:
    """The confusion matrix of each row of the leaderboard, a line for each cell that is not empty.

    A `count` of images of the class `true` are taken for the class `predicted` under the attack,
    and `clean_count` without it: means over seeds, and `share` and `clean_share` in percent of the
    `n` images of the class. The class -1, "nothing", is where a network gives no finite logits.
    Raises RobenchError if a file of flags is damaged.
    """
    lines = []
    for known, seen in _seen(records):
        attacked, clean = _cells(seen.label, seen.predicted), _cells(seen.label, seen.clean)
        sizes = dict(zip(*(a.tolist() for a in np.unique(seen.label, return_counts=True)),
                         strict=True))
        for true, predicted in sorted({*attacked, *clean}):
            counts = attacked.get((true, predicted), 0.0), clean.get((true, predicted), 0.0)
            n = sizes[true]
            lines.append({
                **known, "true": true, "true_name": seen.name(true), "predicted": predicted,
                "predicted_name": seen.name(predicted), "count": counts[0],
                "clean_count": counts[1], "share": 100 * counts[0] / n,
                "clean_share": 100 * counts[1] / n, "n": n,
            })
    return make_frame(lines, (*IDENTITY, "true", "true_name", "predicted", "predicted_name",
                              "count", "clean_count", "share", "clean_share", "n"))


def _seen(records: Sequence[Record]) -> Iterator[tuple[Line, Predictions]]:
    """The rows that have predictions, in the order of their ranks."""
    for number, group in enumerate(ranked_groups(records), start=1):
        attack, names = strongest(group), row_names(group)
        for row in by_rank(group):
            seen = predictions(row.passed(attack or ""))
            if seen is not None:
                yield _identity(number, row, names[row.key], attack, len(seen.clean)), seen


def _identity(number: int, row: Row, name: str, attack: str | None, seeds: int) -> Line:
    return {"group": number, **row.key._asdict(), "label": row.label, "name": name,
            "attack": attack, "seeds": seeds}


def _shares(name: str, right: npt.NDArray[np.bool_]) -> Mapping[str, float]:
    """The columns of one accuracy, from flags (S, n) of the images of a class."""
    got = estimate([int(count) for count in right.sum(axis=1)], right.shape[1])
    values = (got.mean, got.std, got.low, got.high)
    return {name + part: 100 * value for part, value in zip(PARTS, values, strict=True)}


def _cells(label: Labels, predicted: Labels) -> dict[tuple[int, int], float]:
    """(true class, prediction) -> images, the mean over the rows of `predicted` (S, n)."""
    pairs = np.stack([np.broadcast_to(label, predicted.shape), predicted], axis=-1).reshape(-1, 2)
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    return {(int(true), int(taken)): int(count) / len(predicted)
            for (true, taken), count in zip(cells, counts, strict=True)}
