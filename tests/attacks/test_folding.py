"""Folding: the same function with fewer layers."""

import copy

import pytest
import torch
from torch import nn

from robench.attacks.base import frozen
from robench.attacks.folding import close, folded, in_bf16, last_linear, look, repeats

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """`foldable` says which of the batch-norms may be folded."""

    foldable = {"conv": "norm"}

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5)
        for norm in (self.norm, self.other):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.2, 3)
            nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


class TwoReaders(Net):
    """Others read the convolution's output, too."""

    foldable = {}

    def forward(self, x):
        maps = self.conv(x)
        return self.last((self.norm(maps) + maps).mean(dim=(2, 3)))


class CalledTwice(Net):
    """One convolution with two batch-norms behind it."""

    foldable = {}

    def forward(self, x):
        return self.last((self.norm(self.conv(x)) + self.other(self.conv(x))).mean(dim=(2, 3)))


class BatchStatistics(Net):
    foldable = {}

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)


@pytest.mark.parametrize("cls", [Net, TwoReaders, CalledTwice, BatchStatistics])
def test_only_what_may_be_folded_is(cls):
    net = cls().train()
    before = copy.deepcopy(net.state_dict())
    traced, folds = folded(net)
    assert folds == cls.foldable
    with frozen(net):
        for got, wanted in zip(look(traced, X), look(net, X), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    norms = [m for m in traced.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(norms) == (not folds)


@pytest.mark.parametrize("bias", [True, False])
def test_the_last_linear_layer_stays_in_float32(bias):
    net = Net().eval()
    net.last = nn.Linear(4, 5, bias=bias)
    wanted = net(X)
    made = in_bf16(copy.deepcopy(net), X)
    assert made.conv.weight.dtype == torch.bfloat16
    assert torch.equal(made.last.weight, net.last.weight)
    assert set(made.state_dict()) == set(net.state_dict())
    logits = made(X.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, rtol=0.05, atol=0.05)


def test_what_wants_bfloat16_behind_the_last_linear_layer_gets_it():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4),
                        nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 5, 1), nn.Flatten())
    assert last_linear(net) == "1"
    assert in_bf16(net, X)(X.bfloat16()).dtype == torch.bfloat16


def test_networks_without_linear_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
    assert last_linear(net) is None
    assert in_bf16(net, X)(X.bfloat16()).dtype == torch.bfloat16


def test_random_networks_do_not_repeat():
    net = Net().eval()
    assert repeats(net, X, net(X).detach())
    assert not repeats(lambda x: net(x) + torch.rand(()), X, net(X).detach())


def test_close():
    x = torch.tensor([3.0, 4.0])
    assert close(x, x * (1 + 1e-3), 1.1e-3) and not close(x, x * 1.01, 1e-3)
    assert not close(x, x[None], 1)
