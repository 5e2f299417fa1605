"""Fused kernels: the same network, whatever follows a convolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from robench.attacks.base import frozen
from robench.attacks.folding import folded, look
from robench.attacks.fused import Fused, fused
from robench.attacks.network import Network
from robench.benchmark.models import build_model

kernels = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_convolution_pointwise"), reason="torch without oneDNN")
X = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0)).contiguous(
    memory_format=torch.channels_last)


class Every(nn.Module):
    """Convolutions followed by everything that may and may not be fused."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(8, 16, 1, stride=2)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.split = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = self.relu(self.stem(x))  # a convolution and a ReLU
        x = F.relu(x + self.same(x))  # and a map that is its input, too
        y = self.down(x)
        y = torch.relu(torch.add(y, self.skip(x)))  # two that could have the sum
        z = self.twice(y)  # called twice: left alone
        z = self.twice(F.relu(z)) + z  # used twice
        z = F.gelu(self.split(z) + 1)  # groups, a number
        return self.last(z.mean((2, 3)))


def prepared(dtype):
    torch.manual_seed(0)
    net = fx.symbolic_trace(Every().eval().requires_grad_(False))
    net = net.to(dtype).to(memory_format=torch.channels_last)
    return net, fused(copy.deepcopy(net), X.to(dtype))


@kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_logits_and_gradients_are_the_same(dtype, tolerance):
    plain, made = prepared(dtype)
    for x in (X, X[:1], X.repeat(20, 1, 1, 1)):
        for got, wanted in zip(look(made, x.to(dtype)), look(plain, x.to(dtype)), strict=True):
            assert (got - wanted).float().norm() <= tolerance * wanted.float().norm()
        with torch.no_grad():
            got, wanted = made(x.to(dtype)), plain(x.to(dtype))
            assert (got - wanted).float().norm() <= tolerance * wanted.float().norm()


@kernels
def test_what_is_fused():
    _, made = prepared(torch.float32)
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, Fused)}
    assert {name: layer.relu for name, layer in layers.items()} == {
        "stem": True, "same": True, "down": True, "skip": False}
    left = [node.target for node in made.graph.nodes if node.op == "call_function"]
    assert [name.__name__ for name in left] == ["relu", "add", "add", "gelu"]


@kernels
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (3, 0), (5, 2), ((3, 5), (2, 1))])
@pytest.mark.parametrize("size", [(8, 6), (8, 7), (7, 7)])
def test_the_gradient_of_a_few_channels(kernel, padding, size):
    """In blocks where they fit, whatever size the layer was made for."""
    conv = nn.Conv2d(3, 5, kernel, padding=padding).requires_grad_(False)
    x = torch.rand(4, 3, *size, requires_grad=True)
    grad = torch.rand_like(conv(x))
    wanted = torch.autograd.grad(conv(x), x, grad)[0]
    for made_for in ((8, 8), (7, 7)):
        layer = Fused(conv, made_for, relu=False)
        assert (layer._back is not None) == (made_for == (8, 8))
        torch.testing.assert_close(layer.gradient(grad, x), wanted, rtol=1e-4, atol=1e-5)


def test_other_types_are_left_alone():
    net = fx.symbolic_trace(Every().double().eval().requires_grad_(False))
    assert fused(net, X.double()) is net
    assert not any(isinstance(layer, Fused) for layer in net.modules())


@kernels
@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "mobilenetv2", "small-resnet"])
def test_networks_of_the_benchmark(name):
    torch.manual_seed(0)
    net = build_model(name, classes=10, channels=3, size=32).eval().requires_grad_(False)
    x = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    plain = folded(net)[0].requires_grad_(False).to(memory_format=torch.channels_last)
    made = fused(copy.deepcopy(plain), x)
    assert sum(isinstance(layer, Fused) for layer in made.modules()) > 5
    for got, wanted in zip(look(made, x), look(plain, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_torch_without_the_kernels_searches_with_the_folded_network(monkeypatch):
    def missing(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", missing)
    net = build_model("small-resnet", classes=10, channels=3, size=32).eval()
    x = torch.rand(2, 3, 32, 32)
    with frozen(net):
        network = Network(net, "exact", x)
        torch.testing.assert_close(network.logits(x), net(x).detach(), rtol=1e-4, atol=1e-5)
    assert network.prepared.startswith("batch-norm folded")
