"""The Rob_f analysis of PeerAiD: each network on its own examples and on the student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robench.attacks.ascent import Ascent
from robench.attacks.base import frozen, memory_format
from robench.attacks.objectives import ce
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import full_precision
from robench.benchmark.data import Images
from robench.randomness import seeded

STEPS = 10


@dataclass(frozen=True)
class RobF:
    """Counts over N images, wrong when clean or not.

    Attributes:
        clean: f right on x.
        self_crafted: f right on x_f*, crafted against f. student_crafted: f right on x_S*,
            crafted against the student.
        student_robust: the student right on x_S*.
    """

    clean: int
    self_crafted: int
    student_crafted: int
    student_robust: int


def crafting(threat: ThreatModel) -> Ascent:
    """PGD-10 on cross-entropy with step eps / 4: 2/255 at 8/255. The last iterate counts."""
    return Ascent(threat, STEPS, threat.eps / 4, "uniform")


def rob_f(
    nets: Mapping[str, nn.Module],
    data: Images,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 500,
) -> dict[str, RobF]:
    """Rob_f(x_f*) and Rob_f(x_S*) for every network f, "student" among them.

    All networks are in eval mode. Every network is attacked from the same random starts.
    """
    counts = {name: [0, 0, 0, 0] for name in nets}
    device = next(nets["student"].parameters()).device
    ascent = crafting(threat)
    for start in range(0, len(data), batch_size):
        x = data.x[start : start + batch_size].to(device)
        x = x.contiguous(memory_format=memory_format(nets["student"]))
        y = data.y[start : start + batch_size].to(device)
        crafted = {}
        for name, net in nets.items():
            with seeded(seed, "rob_f", start), frozen(net), full_precision():
                crafted[name] = ascent.maximize(_loss_on(net, y), x)
        student_right = _right(nets["student"], crafted["student"], y)
        for name, net in nets.items():
            row = counts[name]
            row[0] += _right(net, x, y)
            row[1] += _right(net, crafted[name], y)
            row[2] += _right(net, crafted["student"], y)
            row[3] += student_right
    return {name: RobF(*row) for name, row in counts.items()}


def _loss_on(net: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: ce(net(z), y)


@torch.no_grad()
def _right(net: nn.Module, x: Tensor, y: Tensor) -> int:
    with frozen(net), full_precision():
        return int((net(x).argmax(1) == y).sum())
