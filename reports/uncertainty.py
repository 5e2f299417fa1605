"""How sure a robust accuracy is: sampling error, seed spread and the paired test.

Two things make an accuracy uncertain, and they are never added up here:

- Sampling error: other test images would have given another number. The interval is Wilson's
  95 % interval for the mean accuracy over n images. Several seeds are attacked on the same n
  images, so they do not count as more images: pooling them to n * seeds would pretend to a
  precision that is not there. The interval is a little too wide for the mean of several seeds.
- Seed spread: another training run would have given another number. It is the sample standard
  deviation over the training runs, and unknown (NaN) for a single one. For the mean of S runs,
  mean +- t(S - 1) * std / sqrt(S) is the usual 95 % interval: with S = 2, t is 12.7.

Differences are tested image by image. The p-values are about these networks, not about other
seeds, and are not corrected for the number of comparisons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, ndtri  # scipy.stats takes a second to import

Z95 = float(ndtri(0.975))


@dataclass(frozen=True)
class Estimate:
    """Accuracies in [0, 1] over networks that differ only in the seed.

    Attributes:
        mean: over the networks. std: over the networks; NaN for one.
        low, high: 95 % interval of the sampling error of `mean` over n images.
        n: images each network was measured on.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int


def estimate(counts: Sequence[float], n: int) -> Estimate:
    """From the number of right images, out of n > 0, of each network."""
    shares = [count / n for count in counts]
    mean = statistics.fmean(shares)
    std = statistics.stdev(shares) if len(shares) > 1 else math.nan
    return Estimate(mean, std, *wilson(mean, n), n)


def wilson(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % Wilson interval of a share in [0, 1] of n > 0 images, without correction.

    Another `z`, the quantile of the normal distribution, gives another level.
    """
    shrink = 1 + z**2 / n
    center = (share + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and 1 the interval ends there exactly; rounding must not leave [0, 1].
    return min(max(center - half, 0.0), share), max(min(center + half, 1.0), share)


def lowest(shares: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """A 95 % interval of the lowest of K true shares, from the observed ones of n > 0 images each.

    It holds although the same images tell which one is the lowest. Below, no correction is due:
    the lowest lower limit is at or below that of the truly lowest share. Above, all K shares must
    be at or below their upper limits for the lowest of these to hold, each at 2.5 % / K therefore
    (Bonferroni).
    """
    z = float(ndtri(1 - 0.025 / len(shares)))
    pairs = list(zip(shares, sizes, strict=True))
    return (min(wilson(share, n)[0] for share, n in pairs),
            min(wilson(share, n, z)[1] for share, n in pairs))


def paired_p(ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_]) -> float:
    """Two-sided exact p-value that neither side survives on more images than the other.

    Args:
        ours, theirs: (S, n) survival flags of S seeds on the same n images.

    With one seed this is the exact McNemar test. With several, an image counts for the side on
    which more seeds survive, once: the sign test over images, which stay the independent units.
    """
    difference = ours.sum(axis=0, dtype=np.int64) - theirs.sum(axis=0, dtype=np.int64)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))
