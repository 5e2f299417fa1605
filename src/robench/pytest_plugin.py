"""The pytest plugin: a fixture `robench` with `assert_robust`, for the tests of your own project.

    def test_the_network_is_robust(robench):
        robench.assert_robust(model, images, labels, attack="pgd-20", min_accuracy=0.4)

pytest imports this file wherever robench is installed, so that it must import nothing heavy.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from robench.attacks.base import Classifier
    from robench.attacks.threat import ThreatModel
    from robench.benchmark.evaluate import Scores


def assert_robust(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    min_accuracy: float,
    attack: str = "autoattack",
    threat: str | ThreatModel = "Linf:8/255",
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """Assert that a share of at least `min_accuracy` in [0, 1] of the images withstands an attack.

    What counts is the share itself, not the lower end of its interval: the images of a test are
    fixed, and the assertion is about them. The message of a failure has the 95 % Wilson interval,
    which says what it means for other images. What the evaluation doubts becomes a warning; where
    a check failed, so that the number may not be relied on, the assertion fails.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K), as for `robench.evaluate`.
        images, labels: (N, C, H, W) float and (N,) int64.
        attack: a name with options, "pgd-20" or "autoattack,version=plus".

    Returns the scores. Raises AssertionError in one line, and UsageError like `robench.evaluate`.
    """
    __tracebackhide__ = True
    from robench.benchmark.evaluate import evaluate
    from robench.errors import UsageError
    from robench.reports.judge import failed
    from robench.reports.text import percent
    from robench.reports.uncertainty import wilson

    if not 0 <= min_accuracy <= 1:
        raise UsageError(f"min_accuracy {min_accuracy}: write a share from 0 to 1, 0.4 for 40 %")
    scores = evaluate(model, images, labels, threat=threat, attacks=[attack], seed=seed,
                      batch_size=batch_size)
    for text in scores.warnings:
        warnings.warn(text, UserWarning, stacklevel=2)
    doubts = failed(scores.warnings, scores.measurements[0].config)
    if doubts:
        raise AssertionError(f"the evaluation under {attack} is unreliable: "
                             f"{', '.join(sorted(doubts))} (see the warnings)")
    robust = scores.measurements[0].robust
    n, share = len(robust), float(robust.mean())
    if share < min_accuracy:
        low, high = wilson(share, n)
        raise AssertionError(
            f"robust accuracy under {attack} at {scores.measurements[0].threat} is "
            f"{percent(100 * share, n)} % ({int(robust.sum())} of {n} images, 95 % interval "
            f"{percent(100 * low, n)} to {percent(100 * high, n)} %), below min_accuracy "
            f"{100 * min_accuracy:g} %; clean accuracy is {percent(100 * scores.clean, n)} %"
        )
    return scores


class Robench:
    """What the fixture offers."""

    assert_robust = staticmethod(assert_robust)


@pytest.fixture(scope="session")
def robench() -> Robench:
    """Assertions about robust accuracy; torch is imported when the first one is made."""
    return Robench()
