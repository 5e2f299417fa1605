"""Transfer: networks on examples that were crafted against another.

The Rob_f analysis of PeerAiD asks it of a student, its peer and its teachers, `robench transfer` of
all networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robench.attacks.ascent import Ascent
from robench.attacks.base import frozen, memory_format
from robench.attacks.memory import Batches
from robench.attacks.objectives import ce
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import full_precision
from robench.benchmark.data import Images
from robench.benchmark.data.streams import Streamed
from robench.randomness import seeded

STEPS = 10
Show = Callable[[float, str], None]  # share done in [0, 1], what to say about it


@dataclass(frozen=True)
class Counts:
    """Of N images, what one network gets right.

    Attributes:
        clean: the image. right: the example, wrong when clean or not. kept: both.
    """

    clean: int
    right: int
    kept: int


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


def transferred(
    source: nn.Module, nets: Mapping[str, nn.Module], data: Images, threat: ThreatModel, *,
    seed: int = 0, batch_size: int = 500, show: Show = lambda share, text: None,
) -> dict[str, Counts]:
    """How networks fare on examples crafted against `source`, by their names.

    All are in eval mode. The random starts are the same whatever is attacked.
    """
    counts = {name: [0, 0, 0] for name in nets}
    device, ascent = next(source.parameters()).device, crafting(threat)
    batches = Batches(batch_size)
    for start in range(0, len(data), batch_size):
        x = data.x[start : start + batch_size].to(device)
        x = x.contiguous(memory_format=memory_format(source))
        y = data.y[start : start + batch_size].to(device)
        with seeded(seed, "rob_f", start):
            begin = ascent.begin(x)
        with frozen(source), full_precision():
            x_adv = batches(lambda x, y, z: ascent.maximize(_loss_on(source, y), x, z), x, y, begin)
        for name, net in nets.items():
            clean, right = (batches(partial(_right, net), z, y) for z in (x, x_adv))
            for place, flags in enumerate((clean, right, clean & right)):
                counts[name][place] += int(flags.sum())
        show(min(start + batch_size, len(data)) / len(data), "")
    return {name: Counts(*row) for name, row in counts.items()}


def rob_f(
    nets: Mapping[str, nn.Module],
    data: Images,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 500,
) -> dict[str, RobF]:
    """Rob_f(x_f*) and Rob_f(x_S*) for every network f, "student" among them."""
    def on_examples_of(name: str, shown: Mapping[str, nn.Module]) -> dict[str, Counts]:
        return transferred(nets[name], shown, data, threat, seed=seed, batch_size=batch_size)

    of_student = on_examples_of("student", nets)
    own = {name: of_student[name] if name == "student" else on_examples_of(name, {name: net})[name]
           for name, net in nets.items()}
    return {name: RobF(own[name].clean, own[name].right, of_student[name].right,
                       of_student["student"].right) for name in nets}


def rob_f_shares(
    nets: Mapping[str, nn.Module], data: tuple[Tensor | Streamed, Tensor], threat: ThreatModel, *,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """(Rob_f(x_f*), Rob_f(x_S*)) in [0, 1] of every network; {} for a student without company."""
    if len(nets) == 1:
        return {}
    images = Images(*data)
    return {name: (row.self_crafted / len(images), row.student_crafted / len(images))
            for name, row in rob_f(nets, images, threat, seed=seed).items()}


def _loss_on(net: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: ce(net(z), y)


@torch.no_grad()
def _right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N,) bool."""
    with frozen(net), full_precision():
        right: Tensor = net(x).argmax(1) == y
    return right
