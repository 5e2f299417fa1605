"""What `fit` tells the watcher about a training that is not what was asked for."""

import pytest
import torch
from torch import nn

from robench.attacks import ThreatModel
from robench.defenses import make_defense
from robench.defenses.config import TrainConfig
from robench.defenses.trainer import Watcher, fit


class Noisy(nn.Module):
    """Random in eval mode, too: no twin can stand for it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        return self.linear(x.flatten(1) + 0.1 * torch.randn_like(x.flatten(1)))


class Warnings(Watcher):
    def __init__(self):
        self.texts = []

    def warn(self, text):
        self.texts.append(text)


@pytest.mark.parametrize(("net", "precision", "count"), [
    (Noisy, "bf16", 1), (Noisy, "fp32", 0),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), "bf16", 0)])
def test_a_network_that_bf16_leaves_as_it_is(make_keeper, net, precision, count):
    torch.manual_seed(0)
    threat, watcher = ThreatModel("Linf", 0.1), Warnings()
    data = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    config = TrainConfig(epochs=1, batch_size=6, select="last", precision=precision)
    fit(make_defense("pgd-at", threat, steps=1), {"student": net()}, data, config, threat=threat,
        keeper=make_keeper(), watcher=watcher)
    assert len(watcher.texts) == count
    assert all("student is no network for bf16" in text for text in watcher.texts)
