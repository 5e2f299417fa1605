"""EpochLog: what one epoch of a training showed, and what the epochs together say about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STUDENT = "student"
PATIENCE = 5  # epochs after which the loss must have moved
MOVED = 0.01  # as a share of the first epoch's loss
COLLAPSE = 0.5  # the share of the best robust accuracy below which it has collapsed
ABOVE_CHANCE = 0.15  # a robust accuracy that a constant network does not reach


@dataclass(frozen=True, slots=True)
class EpochLog:
    """One epoch: accuracies in [0, 1] on the selection split, None where not measured.

    Attributes:
        losses: the mean over the steps of every part of the loss, "total" among them.
        images: training images that passed.
        averages: of each average of weights that was measured, (clean, robust).
        rob_f: of each network f, accuracy on x_f*, crafted against f, and on x_S*, crafted against
            the student (Jung et al. 2024); empty for a student that learns alone.
    """

    epoch: int  # 0-based
    lr: float  # of its last step
    seconds: float  # of training alone
    losses: dict[str, float]
    clean: float | None = None
    robust: float | None = None
    images: int = 0
    averages: dict[str, tuple[float, float]] = field(default_factory=dict)
    rob_f: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> EpochLog:
        """From the JSON of `asdict`, also as it was when SWA was the only average."""
        content = dict(kept)
        swa = content.pop("swa_clean", None), content.pop("swa_robust", None)
        averages = _pairs(content.pop("averages", {} if None in swa else {"swa": swa}))
        rob_f = _pairs(content.pop("rob_f", {}))
        return cls(**content, averages=averages, rob_f=rob_f)

    def score(self, of: str = STUDENT) -> tuple[float, float] | None:
        """What the selection compares: robust accuracy, clean accuracy where that is equal."""
        clean, robust = self.averages.get(of, (None, None)) if of != STUDENT else (
            self.clean, self.robust)
        return None if robust is None or clean is None else (robust, clean)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def _pairs(kept: Any) -> dict[str, tuple[float, float]]:
    return {name: (first, second) for name, (first, second) in dict(kept).items()}


History = Sequence[EpochLog]


def is_best(history: History, of: str = STUDENT) -> bool:
    """Whether the last epoch was measured and none before has a higher score."""
    scores = [score for log in history if (score := log.score(of)) is not None]
    return bool(history) and history[-1].score(of) is not None and scores[-1] == max(scores)


def robust_overfitting(history: History, of: str = STUDENT) -> float | None:
    """Best minus last robust accuracy of the student or an average, in [0, 1]; None if never
    measured.

    Rice et al. 2020 report 0.06 to 0.09 for PGD-AT.
    """
    robust = [score[0] for log in history if (score := log.score(of)) is not None]
    return max(robust) - robust[-1] if robust else None


def catastrophic_epoch(history: History) -> int | None:
    """The first epoch, 0-based, in which robust accuracy had collapsed while clean had not fallen.

    Compared with the best epoch before: below half of its robust accuracy, at its clean accuracy
    or above (Wong et al. 2020 name it catastrophic overfitting). Where the best is what a
    constant network may reach, nothing can collapse.
    """
    best: tuple[float, float] = (0.0, 0.0)
    for log in history:
        now = log.score()
        if now is None:
            continue
        if best[0] >= ABOVE_CHANCE and now[0] < COLLAPSE * best[0] and now[1] >= best[1]:
            return log.epoch
        best = max(best, now)
    return None


def findings(history: History) -> Iterator[str]:
    """What a user should know about the last epoch; every finding comes once in a training."""
    log = history[-1]
    if len(history) == PATIENCE:
        first, *later = (epoch.losses["total"] for epoch in history)
        if first - min(later) <= MOVED * abs(first):
            yield (f"the loss has not fallen by more than {MOVED:.0%} in {PATIENCE} epochs "
                   f"({first:.4g}, now {later[-1]:.4g}): try another learning rate (--set lr=...)")
    if catastrophic_epoch(history) == log.epoch and log.robust is not None:
        yield (f"catastrophic overfitting in epoch {log.epoch}: robust accuracy fell to "
               f"{log.robust:.1%} while clean accuracy is {log.clean:.1%}")
