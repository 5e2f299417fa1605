"""How many images a verdict needs: the power of `robench check`, exactly, and sizes from it.

Power is the probability of the verdict "regressed" where the network really is worse. It is summed
over what may be observed and not approximated, so that it holds for the test as it is carried out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, bdtrc, gammaln, ndtri, xlog1py, xlogy

from robench.reports.drop import Flags, Floats, mcnemar, pooled_z, regressed
from robench.reports.text import NOTHING, Cell, Column, table

Integers = npt.NDArray[np.int64]
POWER = 0.8
MOST = 1_000_000  # images; more is as good as never
TAILS = 7  # standard deviations that are summed over; what lies beyond is below 1e-11

# The table of docs/gate.md: (max-drop, true drop) in points, shares and accuracies in percent.
DROPS = ((0.0, 0.5), (0.0, 1.0), (0.0, 2.0), (0.5, 1.0), (0.5, 2.0), (0.5, 3.0))
DISCORDANT = (2.0, 5.0, 10.0, 20.0)
ACCURACIES = (30.0, 50.0, 70.0)


def paired_power(
    n: int, lost: float, gained: float, *, max_drop: float, alpha: float = 0.05
) -> float:
    """The probability of "regressed" on n images of which shares in [0, 1] are lost and gained."""
    share = lost + gained
    total = _likely(n, share)
    need = _first(0 * total, total + 1, lambda lost: regressed(
        mcnemar(lost, total - lost), 100 * (2 * lost - total) / n, max_drop=max_drop, alpha=alpha))
    reached = np.where(need > 0, bdtrc(np.maximum(need - 1.0, 0.0), total, lost / share), 1.0)
    return float((_probability(total, n, share) * np.where(need > total, 0.0, reached)).sum())


def unpaired_power(
    n: int, baseline: float, current: float, *, max_drop: float, alpha: float = 0.05
) -> float:
    """The probability of "regressed" on n images a side, of accuracies in [0, 1]."""
    before = _likely(n, baseline)
    need = _first(0 * before, before + 1, lambda fall: regressed(
        pooled_z(before / n, n, (before - fall) / n, n), 100 * fall / n,
        max_drop=max_drop, alpha=alpha))
    reached = np.where(need > before, 0.0, bdtr(np.maximum(before - need, 0.0), n, current))
    return float((_probability(before, n, baseline) * reached).sum())


def images_needed(power: Callable[[int], float], target: float = POWER) -> int | None:
    """The images at which a power that grows with them reaches its target; None beyond MOST.

    Verdicts are about whole images, so power grows in small steps back and forth. At the number
    returned the target is reached, at one image less it is not.
    """
    high = 1
    while power(high) < target:
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= target else (middle, high)
    return high


def images_to_pass(drop: float, variance: float, *, max_drop: float, alpha: float) -> int | None:
    """Images at which an interval of the drop ends below max_drop, 4 times out of 5, about.

    Args:
        drop, max_drop: in points. variance: of the difference of one image, in [0, 2].
    """
    room = (max_drop - drop) / 100
    if room <= 0:
        return None
    n = variance * ((float(ndtri(1 - alpha)) + float(ndtri(POWER))) / room) ** 2
    return None if n > MOST else max(1, round(n))


def power_table(alpha: float = 0.05) -> str:
    """The sizes of DROPS as two Markdown tables, paired and unpaired."""
    titles = [f"{drop:g} points, max-drop {bar:g}" for bar, drop in DROPS]

    def sizes(name: str, shares: tuple[float, ...], size: Callable[..., int | None]) -> str:
        columns = [Column(name, tuple(Cell(f"{share:g} %") for share in shares))]
        for title, (bar, drop) in zip(titles, DROPS, strict=True):
            needed = [size(share, drop, bar, alpha) for share in shares]
            columns.append(Column(title, tuple(
                Cell(NOTHING if n is None else f"{n:,}") for n in needed)))
        return "\n".join(table(columns)) + "\n"

    return (sizes("Discordant images", DISCORDANT, paired_size) + "\n"
            + sizes("Accuracy of the baseline", ACCURACIES, unpaired_size))


def paired_size(share: float, drop: float, max_drop: float, alpha: float = 0.05) -> int | None:
    """Images for a true drop in points with `share` percent of discordant images; None where a
    drop cannot be larger than the images that differ."""
    if share < drop:
        return None
    lost, gained = (share + drop) / 200, (share - drop) / 200
    return images_needed(lambda n: paired_power(n, lost, gained, max_drop=max_drop, alpha=alpha))


def unpaired_size(accuracy: float, drop: float, max_drop: float, alpha: float = 0.05) -> int | None:
    """Images on each side for a true drop in points from an accuracy in percent."""
    return images_needed(lambda n: unpaired_power(
        n, accuracy / 100, (accuracy - drop) / 100, max_drop=max_drop, alpha=alpha))


def _likely(n: int, share: float) -> Integers:
    """The counts of n that a share makes likely."""
    center, reach = n * share, TAILS * float(np.sqrt(n * share * (1 - share))) + 1
    return np.arange(max(0, int(center - reach)), min(n, int(center + reach) + 1) + 1)


def _probability(counts: Integers, n: int, share: float) -> Floats:
    """P(X = count), X ~ Bin(n, share)."""
    choose = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    return np.exp(choose + xlogy(counts, share) + xlog1py(n - counts, -share))


def _first(low: Integers, high: Integers, holds: Callable[[Integers], Flags]) -> Integers:
    """The smallest integer in [low, high) from which on a monotone condition holds, or high."""
    while bool((low < high).any()):
        middle = (low + high) // 2
        found = holds(np.minimum(middle, high - 1))
        low, high = np.where(found, low, np.minimum(middle + 1, high)), np.where(
            found, middle, high)
    return low
