"""What each image is taken for, clean and under attack: read from the files beside the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robench.reports.compare import per_image, unfit
from robench.reports.record import Record

Labels = npt.NDArray[np.int64]
NOTHING = -1  # the class of an image whose logits are not finite
ARRAYS = ("label", "clean", "predicted")


@dataclass(frozen=True)
class Predictions:
    """Of S networks that differ only in their seed, on the same n images, under one attack.

    Attributes:
        label: (n,) the true classes.
        clean: (S, n) what the clean images are taken for.
        predicted: (S, n) what the counted adversarial examples are taken for, or NOTHING. Of an
            image that is wrong when clean, or is not fooled: the clean prediction.
        names: of the classes, as far as they are known.
    """

    label: Labels
    clean: Labels
    predicted: Labels
    names: tuple[str, ...]

    def name(self, label: int) -> str:
        """Of a class; its number where it has no name."""
        if label == NOTHING:
            return "nothing"
        return self.names[label] if label < len(self.names) else str(label)


def predictions(records: Sequence[Record]) -> Predictions | None:
    """Of records of one attack on one row; None if there are none, or a file is not to be found or
    is of before predictions were kept.

    Raises RobenchError if a file is damaged or is not its record's.
    """
    label: list[Labels] = []
    clean: list[Labels] = []
    predicted: list[Labels] = []
    names: tuple[str, ...] = ()
    for record in records:
        found = per_image(record, *ARRAYS, "classes")
        if found is None or not found.keys() >= set(ARRAYS):
            return None
        arrays = [found[name] for name in ARRAYS]
        if any(a.shape != (record.n,) or a.dtype.kind != "i" for a in arrays):
            raise unfit(record)
        mine, *others = (array.astype(np.int64) for array in arrays)
        right = [int((other == mine).sum()) for other in others]
        if (right != [record.n_correct, record.n_robust] or mine.min() < 0
                or min(other.min() for other in others) < NOTHING
                or (label and not np.array_equal(mine, label[0]))):
            raise unfit(record)
        label.append(mine)
        clean.append(others[0])
        predicted.append(others[1])
        names = names or tuple(map(str, found.get("classes", np.empty(0, str)).ravel()))
    if not label:
        return None
    return Predictions(label[0], np.stack(clean), np.stack(predicted), names)
