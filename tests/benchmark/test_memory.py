"""Measurements beside the attacks take fewer images at a time where memory is short."""

import pytest
import torch
from torch import nn

from robench.attacks.ascent import Ascent
from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Images
from robench.benchmark.landscape import Survey, survey_lines
from robench.benchmark.steps import first_fooled
from robench.benchmark.transfer import rob_f
from robench.errors import RobenchError

THREAT = ThreatModel("Linf", 0.1)


class Tight(nn.Module):
    """A network for `room` images at a time."""

    def __init__(self, net, room):
        super().__init__()
        self.net, self.room = net, room

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.net(x)


def rob_f_of(net, data):
    return rob_f({"student": net, "peer": net}, data, THREAT)


def steps_of(net, data):
    return first_fooled(net, data, Ascent(THREAT, 5, 0.03)).tolist()


def landscape_of(kind):
    def measured(net, data):
        lines = survey_lines(Survey.create(kind, 3), net, data, THREAT)
        return [round(loss, 5) for line in lines for loss in line]
    return measured


@pytest.mark.parametrize("measure", [rob_f_of, steps_of, landscape_of("weight"),
                                     landscape_of("input")])
def test_short_memory_changes_nothing(measure):
    generator = torch.Generator().manual_seed(0)
    data = Images(torch.rand(20, 1, 3, 3, generator=generator), torch.arange(20) % 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).eval()
    assert measure(Tight(net, 6).eval(), data) == measure(Tight(net, 20).eval(), data)
    with pytest.raises(RobenchError, match="out of memory with one image at a time"):
        measure(Tight(net, 0).eval(), data)
