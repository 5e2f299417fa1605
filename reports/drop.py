"""How far robust accuracy fell from a baseline to another network: test, interval, and seeds.

The drop is baseline minus current, in points: positive is worse. Three questions are told apart:

- `paired`: are these networks less robust on other images of the distribution, too? Both sides
  were attacked on the same images, so that only images count whose fate differs. The test is
  McNemar's, exact and one-sided (McNemar 1947); the interval inverts the score test, which is
  McNemar's where the drop is zero (Tango 1998).
- `unpaired`: the same question, from other images of the same data set and split on either side.
  The test is the pooled z-test with Yates' correction, close to Fisher's exact test and, like it,
  conservative; the interval is Newcombe's hybrid of two Wilson intervals (1998, method 10).
- `over_seeds`: would other training runs be less robust on these images? Student's t-test over
  the accuracies of the networks, whose spread is taken to be the same on both sides.

Several seeds on a side are averaged image by image, and images stay the independent units. A
difference of averages is no longer one of -1, 0, 1; it is counted in effective images that have
the sum and the sum of squares of the differences, as Rao and Scott (1992) count clusters. With a
single seed on either side they are the images themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, ndtr, ndtri, stdtr, stdtrit

from robench.reports.uncertainty import wilson

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
EQUAL = 1e-9  # points; differences below it are rounding


@dataclass(frozen=True)
class Drop:
    """A drop in points.

    Attributes:
        points: baseline minus current.
        low, high: its 1 - 2 alpha interval.
        p: one-sided, that there is no drop.
        lost, gained: effective numbers of images that survived on the baseline only, and on the
            current side only; None unless paired. weight: what each of them counts, 1 for single
            networks.
    """

    points: float
    low: float
    high: float
    p: float
    lost: float | None = None
    gained: float | None = None
    weight: float = 1.0


def discordant(baseline: Flags, current: Flags) -> tuple[float, float, float]:
    """(lost, gained, weight) of survival flags (S, n) and (T, n) on the same images.

    `lost` and `gained` are effective images, each worth `weight`: the sum of all differences
    is (lost - gained) * weight. For S = T = 1 the weight is 1 and they are plain counts.
    """
    difference = baseline.mean(axis=0) - current.mean(axis=0)
    size = float(np.abs(difference).sum())
    if size == 0:
        return 0.0, 0.0, 1.0
    weight = float((difference**2).sum()) / size
    total, net = size / weight, float(difference.sum()) / weight
    # Rounding must leave no less than nothing.
    return max(total + net, 0.0) / 2, max(total - net, 0.0) / 2, weight


def paired(baseline: Flags, current: Flags, alpha: float) -> Drop:
    """The drop between networks that were attacked on the same images.

    Args:
        baseline, current: (S, n) and (T, n) survival flags.
    """
    n = baseline.shape[1]
    lost, gained, weight = discordant(baseline, current)
    low, high = tango(lost, gained, n, alpha)
    return Drop(100 * (lost - gained) * weight / n, 100 * weight * float(low),
                100 * weight * float(high), float(mcnemar(lost, gained)), lost, gained, weight)


def mcnemar(lost: npt.ArrayLike, gained: npt.ArrayLike) -> Floats:
    """One-sided exact p-value: P(X >= lost) for X ~ Bin(lost + gained, 1/2), element by element.

    Between whole numbers it is the regularized incomplete beta function, which is the same there.
    """
    b, c = np.asarray(lost, float), np.asarray(gained, float)
    return np.where(b > 0, betainc(np.maximum(b, 1e-300), c + 1, 0.5), 1.0)


def tango(
    lost: npt.ArrayLike, gained: npt.ArrayLike, n: int, alpha: float
) -> tuple[Floats, Floats]:
    """The 1 - 2 alpha score interval of a difference (lost - gained) / n of paired shares.

    Tango, Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design, Statistics in Medicine 17, 1998. Element by element, by bisection.
    """
    b, c = np.asarray(lost, float), np.asarray(gained, float)
    return -_score_bound(c, b, n, alpha), _score_bound(b, c, n, alpha)


def _score_bound(lost: Floats, gained: Floats, n: int, alpha: float) -> Floats:
    """The largest difference that the score test does not reject."""
    z = float(ndtri(1 - alpha))
    low, high = (lost - gained) / n, np.ones((lost - gained).shape)
    for _ in range(60):  # halves the distance to below the precision of a float
        delta = (low + high) / 2
        # The share of `gained` that is most likely, given that the difference is delta.
        b = (2 * n - lost + gained) * delta - lost - gained
        c = -gained * delta * (1 - delta)
        share = (np.sqrt(np.maximum(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        inside = (n * delta - (lost - gained)) ** 2 <= z * z * variance
        low, high = np.where(inside, delta, low), np.where(inside, high, delta)
    return high


def unpaired(
    baseline: float, n_baseline: int, current: float, n_current: int, alpha: float
) -> Drop:
    """The drop between shares in [0, 1], means over seeds, of different images on either side."""
    z = float(ndtri(1 - alpha))
    low_b, high_b = wilson(baseline, n_baseline, z)
    low_c, high_c = wilson(current, n_current, z)
    drop = baseline - current
    return Drop(100 * drop, 100 * (drop - math.hypot(baseline - low_b, high_c - current)),
                100 * (drop + math.hypot(high_b - baseline, current - low_c)),
                float(pooled_z(baseline, n_baseline, current, n_current)))


def pooled_z(
    baseline: npt.ArrayLike, n_baseline: int, current: npt.ArrayLike, n_current: int
) -> Floats:
    """One-sided p-value that a share did not fall, with Yates' correction, element by element."""
    before, after = np.asarray(baseline, float), np.asarray(current, float)
    share = (n_baseline * before + n_current * after) / (n_baseline + n_current)
    inverse = 1 / n_baseline + 1 / n_current
    spread = np.sqrt(np.maximum(share * (1 - share) * inverse, 1e-300))
    return np.asarray(ndtr((inverse / 2 - (before - after)) / spread))


def over_seeds(baseline: Sequence[float], current: Sequence[float], alpha: float) -> Drop | None:
    """The drop between trainings, from shares in [0, 1] of networks that differ in the seed.

    None where there is no spread to measure: a single network on either side.
    """
    free = len(baseline) + len(current) - 2
    if free < 1:
        return None
    centers = [statistics.fmean(side) for side in (baseline, current)]
    drop = centers[0] - centers[1]
    squares = sum((share - center) ** 2
                  for side, center in zip((baseline, current), centers, strict=True)
                  for share in side)
    error = math.sqrt(squares / free * (1 / len(baseline) + 1 / len(current)))
    half = error * float(stdtrit(free, 1 - alpha))
    if error == 0:
        p = 0.0 if drop > 0 else 1.0
    else:
        p = float(stdtr(free, -drop / error))
    return Drop(100 * drop, 100 * (drop - half), 100 * (drop + half), p)


def regressed(
    p: npt.ArrayLike, points: npt.ArrayLike, *, max_drop: float, alpha: float
) -> Flags:
    """Whether a drop is significant and larger than max_drop points, element by element."""
    return (np.asarray(p) <= alpha) & (np.asarray(points) > max_drop + EQUAL)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm (1979): at most alpha of families have one below it by chance."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = worst
    return adjusted
