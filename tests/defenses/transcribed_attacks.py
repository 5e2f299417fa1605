"""What every defense's attack maximizes, transcribed from the methods specification.

An objective takes the networks (modes already set), the batch and the options, and returns the
function of x~ that the attack maximizes. Whatever it computes before that is fixed for all steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .formulas import cross_entropy, kl_batchmean, soft_cross_entropy
from .networks import EPS, Nets
from .transcribed_losses import adr_label

Objective = Callable[[Tensor], Tensor]


def label_objective(nets: Nets, x: Tensor, y: Tensor, **_: Any) -> Objective:
    """Section 5.1, PGD-AT, MART, MTARD, ARD, IAD, AKD2 and CAT's second network: CE(S(x~), y)."""
    return lambda z: cross_entropy(nets["student"](z), y)


def _towards(target: Tensor, student: nn.Module) -> Objective:
    return lambda z: kl_batchmean(target, student(z))


def trades_objective(nets: Nets, x: Tensor, y: Tensor, **_: Any) -> Objective:
    """Section 5.1, TRADES, LBGAT, HAT, CAT's first network: KL(S(x) || S(x~)), fixed target."""
    return _towards(nets["student"](x).detach(), nets["student"])


def rslad_objective(nets: Nets, x: Tensor, y: Tensor, **_: Any) -> Objective:
    """Sections 2.4 and 5.1: KL(T(x) || S(x~)), fixed target."""
    return _towards(nets["teacher"](x), nets["student"])


def adaad_objective(nets: Nets, x: Tensor, y: Tensor, **_: Any) -> Objective:
    """Section 5.1, AdaAD, IGDM: KL(T(x~) || S(x~)), recomputed, gradient through T too."""
    return lambda z: kl_batchmean(nets["teacher"](z), nets["student"](z))


def peeraid_objective(nets: Nets, x: Tensor, y: Tensor, **_: Any) -> Objective:
    """Section 1.2, steps 2 and 3: KL(P(x) || S(x~)) at temperature 1, P in eval mode, fixed."""
    return _towards(nets["peer"](x).detach(), nets["student"])


def ikl_objective(nets: Nets, x: Tensor, y: Tensor, **_: Any) -> Objective:
    """Sections 2.14 and 5.1: CEsoft(S(x), S(x~)), fixed target."""
    target = nets["student"](x).detach()
    return lambda z: soft_cross_entropy(target, nets["student"](z))


def adr_objective(nets: Nets, x: Tensor, y: Tensor, **options: Any) -> Objective:
    """Sections 2.16 and 5.1: cross-entropy with the rectified label, fixed."""
    label = adr_label(nets, x, y, **options)
    return lambda z: -(label * torch.log_softmax(nets["student"](z), 1)).sum() / len(y)


def saad_objective(
    nets: Nets, x: Tensor, y: Tensor, correction: float = 1.0, **_: Any
) -> Objective:
    """Section 2.17: KL(T(x) + beta (grad_x T_y(x) . (x~ - x)) e_y || S(x~)); x~ moves both."""
    leaf = x.clone().requires_grad_()
    logits = nets["teacher"](leaf)
    (slope,) = torch.autograd.grad(logits[torch.arange(len(y)), y].sum(), leaf)
    label = torch.eye(logits.shape[1], dtype=x.dtype)[y]

    def objective(z: Tensor) -> Tensor:
        change = (slope * (z - x)).sum((1, 2, 3))
        target = logits.detach() + correction * change[:, None] * label
        return kl_batchmean(target, nets["student"](z))

    return objective


CRAFTS: dict[str, Callable[..., Objective] | None] = {
    "standard": None,  # no attack
    "pgd-at": label_objective,
    "ard": label_objective,
    "trades": trades_objective,
    "rslad": rslad_objective,
    "adaad": adaad_objective,
    "peeraid": peeraid_objective,
    "mart": label_objective,
    "iad": label_objective,
    "iad-ii": label_objective,
    "akd2": label_objective,
    "cat": trades_objective,  # and label_objective against the peer
    "mtard": label_objective,
    "lbgat": trades_objective,
    "hat": trades_objective,
    "ikl": ikl_objective,
    "adr": adr_objective,
    "igdm": adaad_objective,
    "saad": saad_objective,
}
ADVERSARIAL = [name for name, craft in CRAFTS.items() if craft is not None]


def sign_pgd(
    make_objective: Callable[..., Objective] | None,
    nets: Nets,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    mode: str,
    steps: int = 10,
    step_size: float = 2 / 255,
    eps: float = EPS,
    **options: Any,
) -> Tensor:
    """Section 1.2, step 3, and 5.1: x~ <- clamp(proj(x~ + step sign(grad)), 0, 1), last iterate.

    Only the student is attacked, perhaps in train mode; all others are in eval mode (1.2, 2.5).
    """
    for key, net in nets.items():
        net.train(key == "student" and mode == "train")
    assert make_objective is not None
    objective = make_objective(nets, x, y, **options)
    x_adv = start
    for _ in range(steps):
        z = x_adv.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(z), z)
        z = z.detach() + step_size * grad.sign()
        z = torch.minimum(torch.maximum(z, x - eps), x + eps)
        x_adv = z.clamp(0, 1)
    return x_adv


def normal_start(x: Tensor) -> Tensor:
    """Section 1.2, step 3: x + 0.001 N(0, I), neither clamped nor projected."""
    return x + 0.001 * torch.randn_like(x)
