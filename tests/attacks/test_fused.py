"""Fused kernels: the same network, whatever follows a convolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from robench.attacks.base import frozen
from robench.attacks.folding import folded, look
from robench.attacks.fused import Fused, forked, fused
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
        for net in (made, forked(made)):
            for got, wanted in zip(look(net, x.to(dtype)), look(plain, x.to(dtype)), strict=True):
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


class Blocks(nn.Module):
    """Maps that are made of earlier ones, in all the ways that blocks of networks have: a list of
    (maps that are read, kernel, stride, whether a ReLU follows, whether the second is added); of
    kernel 0 there is only the sum."""

    def __init__(self, ways):
        super().__init__()
        self.ways, sides, self.sources = ways, [8], []
        self.convs, self.relu = nn.ModuleList([nn.Conv2d(3, 16, 3, padding=1)]), nn.ReLU()
        for first, second, kernel, stride, *_ in ways:
            first = first % len(sides)
            sides.append(-(-sides[first] // stride) if kernel else sides[first])
            alike = [i for i, side in enumerate(sides[:-1]) if side == sides[-1]]
            self.sources.append((first, alike[second % len(alike)] if alike else None))
            self.convs.append(
                nn.Conv2d(16, 16, kernel, stride, kernel // 2) if kernel else nn.Identity())
        read = {i for way, pair in zip(ways, self.sources, strict=True) for i in pair[: 1 + way[5]]}
        self.ends = sorted(set(range(len(sides))) - read)
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        maps = [self.convs[0](x)]
        for conv, (first, second), (*_, relu, add) in zip(
                self.convs[1:], self.sources, self.ways, strict=True):
            made = conv(maps[first])
            if second is not None and add:
                made = made + maps[second]
            maps.append(self.relu(made) if relu else made)
        return self.last(sum(maps[end].mean((2, 3)) for end in self.ends))


@kernels
@settings(deadline=None, max_examples=50)
@given(ways=st.lists(st.tuples(
    st.integers(0, 9), st.integers(0, 9), st.sampled_from([0, 1, 3]), st.sampled_from([1, 1, 2]),
    st.booleans(), st.booleans()), min_size=1, max_size=8), seed=st.integers(0, 99))
# A sum gives both of its maps the same gradient; so does one that is handed on by another sum.
@example([(0, 0, 3, 1, True, False)] * 2
         + [(1, 2, 0, 1, False, True), (3, 0, 3, 1, False, False)], 0)
@example([(0, 0, 3, 1, True, False)] * 2 + [
    (0, 2, 3, 1, False, True), (3, 1, 0, 1, False, True), (4, 0, 3, 1, False, False)], 0)
# Two shortcuts of one map, and a third reader.
@example([(0, 0, 3, 1, True, False)] + [(1, 0, 1, 2, False, False)] * 2
         + [(1, 0, 3, 2, False, False)], 0)
# A sum that is read again behind the convolution which adds it.
@example([(0, 0, 3, 1, False, False), (1, 0, 3, 1, False, True), (0, 0, 3, 1, False, False)], 0)
# A shortcut beside an addition that hands its gradient on.
@example([(0, 0, 3, 1, True, False), (0, 0, 3, 1, False, False), (2, 0, 1, 2, False, False),
          (0, 2, 3, 1, False, True), (4, 1, 0, 1, False, True), (5, 0, 3, 1, False, False)], 0)
# A map that is read under another name, too.
@example([(0, 0, 3, 1, True, False), (0, 0, 0, 1, False, False), (1, 0, 3, 1, False, True),
          (2, 0, 3, 1, False, False)], 0)
def test_any_network_of_blocks_is_the_same(ways, seed):
    """What layers write in place is read by nobody, in any order of use."""
    torch.manual_seed(seed)
    plain = fx.symbolic_trace(Blocks(ways).eval().requires_grad_(False))
    plain = plain.to(memory_format=torch.channels_last)
    x = torch.rand(24, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    made = fused(copy.deepcopy(plain), x)
    before, steep = x.clone(), forked(made)
    for _ in range(2):
        torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-5)
    for net in (made, steep):
        images = x.clone().requires_grad_(True)
        ours, theirs = net(images), plain(images)
        for k in (0, 2):  # several gradients of one pass
            torch.testing.assert_close(
                *(torch.autograd.grad(logits[:, k].sum(), images, retain_graph=True)[0]
                  for logits in (ours, theirs)), rtol=1e-3, atol=1e-6)
    assert torch.equal(x, before)


@kernels
def test_sums_and_gradients_are_written_in_place():
    net = build_model("small-resnet", classes=10, channels=3, size=32, normalize="cifar10")
    made = fused(folded(net.eval().requires_grad_(False))[0], torch.rand(8, 3, 32, 32))
    layers = {name.partition("network.")[2]: layer for name, layer in made.named_modules()
              if isinstance(layer, Fused)}
    sums = {"layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"}
    assert {name for name, layer in layers.items() if layer.spare_unless_kept} == sums
    # The shortcut of the first block is the map that its own convolutions keep.
    assert {name for name, layer in layers.items() if layer.spare} == sums - {"layer1.0.conv2"}
    # What follows the last one is a mean.
    assert [name for name, layer in layers.items() if not layer.spare_gradient] == [
        "layer3.0.conv2"]


@kernels
def test_what_nobody_reads_keeps_nothing_from_being_fused():
    class Auxiliary(Every):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            logits = super().forward(x)
            F.relu(self.head(x))
            return logits

    plain = fx.symbolic_trace(Auxiliary().eval().requires_grad_(False))
    made = fused(copy.deepcopy(plain), X)
    assert isinstance(made.stem, Fused) and isinstance(made.skip, Fused)
    torch.testing.assert_close(made(X), plain(X), rtol=1e-4, atol=1e-5)


@kernels
def test_a_shortcut_passes_its_gradient_on_without_a_map_of_zeros():
    _, made = prepared(torch.float32)
    steep = forked(made)
    assert made.skip.stride == (2, 2) and steep.skip.stride == (1, 1)
    assert steep.skip.weight is made.skip.weight and steep.down is made.down
    assert sum("_fork" in str(node.target) for node in steep.graph.nodes) == 1


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
