"""FGSM, PGD and CW: attacks made of `Ascent`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robench.attacks.ascent import Ascent, Start
from robench.attacks.base import ATTACKS, Attack, Classifier, frozen
from robench.attacks.objectives import OBJECTIVES
from robench.attacks.threat import ThreatModel
from robench.errors import UsageError
from robench.registry import unknown


@ATTACKS.register(
    "pgd",
    description="projected gradient ascent with restarts; any adversarial iterate counts",
    paper="Madry et al. 2018, arXiv 1706.06083",
)
@dataclass(frozen=True, slots=True)
class PGD:
    """Projected gradient descent on the loss.

    Attributes:
        steps: gradient steps per restart.
        step_size: in the unit of eps; None means eps / 4 (2/255 at 8/255).
        restarts: independent random starts; an image that has fallen is not attacked again.
        loss: "ce", "cw" or "dlr".
        start: where a restart begins, see Ascent.
    """

    threat: ThreatModel
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    loss: str = "ce"
    start: Start = "uniform"

    def __post_init__(self) -> None:
        if self.loss not in OBJECTIVES:
            raise unknown("loss", self.loss, OBJECTIVES)
        if self.restarts < 1:
            raise UsageError(f"restarts must be >= 1, not {self.restarts}")
        self._ascent()

    def _ascent(self) -> Ascent:
        step_size = self.threat.eps / 4 if self.step_size is None else self.step_size
        return Ascent(self.threat, self.steps, step_size, self.start)

    def __call__(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        result = x.detach().clone()
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        with frozen(model):
            for _ in range(self.restarts):
                todo = (~fooled).nonzero().squeeze(1)
                if not len(todo):
                    break
                result[todo], fooled[todo] = self._restart(model, x[todo], y[todo])
        return result

    def _restart(self, model: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One run from one start: examples (N, C, H, W) and which of them are misclassified."""
        objective = OBJECTIVES[self.loss]
        first = torch.empty_like(x)  # the first misclassified iterate of each image
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def look(z: Tensor, logits: Tensor) -> None:
            wrong = (logits.argmax(1) != y) & ~fooled
            first[wrong] = z.detach()[wrong]
            fooled.logical_or_(wrong)

        def watched(z: Tensor) -> Tensor:
            logits = model(z)
            look(z, logits)
            return objective(logits, y)

        last = self._ascent().maximize(watched, x)
        with torch.no_grad():
            look(last, model(last))
        return torch.where(fooled.view(-1, *[1] * (x.ndim - 1)), first, last), fooled


@ATTACKS.register(
    "fgsm",
    description="one step of length eps along the gradient, no random start",
    paper="Goodfellow et al. 2015, arXiv 1412.6572",
)
def fgsm(threat: ThreatModel) -> Attack:
    return PGD(threat, steps=1, step_size=threat.eps, start="none")


@ATTACKS.register(
    "cw",
    description="PGD on the Carlini-Wagner margin loss",
    paper="Carlini and Wagner 2017, arXiv 1608.04644; as an Linf attack: Madry et al. 2018",
)
def cw(
    threat: ThreatModel, steps: int = 20, step_size: float | None = None, restarts: int = 1
) -> Attack:
    return PGD(threat, steps, step_size, restarts, loss="cw")
