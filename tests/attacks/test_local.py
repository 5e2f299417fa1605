"""Logits of images near known ones: those of the whole network, whatever comes in."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from robench.attacks import ThreatModel
from robench.attacks import local as local_module
from robench.attacks.local import Change, Local, windows_of
from robench.attacks.network import Network
from robench.attacks.pool import Images, new_units
from robench.attacks.spans import Span
from robench.attacks.square import Square
from robench.attacks.windows import Plan
from robench.benchmark.models import build_model


class Residual(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride, in_place):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=in_place), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = (nn.Identity() if inputs == outputs and stride == 1
                     else nn.Conv2d(inputs, outputs, 1, stride))
        self.in_place = in_place

    def forward(self, x):
        out = self.main(x)
        if self.in_place:
            out += self.skip(x)
            return F.relu(out, inplace=True)
        return F.relu(out + self.skip(x))


class Scaled(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, channels, 1, 1))

    def forward(self, x):
        return (x - self.mean) / 0.3


def random_net(channels, kernels, strides, normalized, in_place):
    layers = [Scaled(channels)] if normalized else []
    width = channels
    for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
        outputs = (4, 4, 6)[i]
        layers.append(Residual(width, outputs, kernel, stride, in_place))
        width = outputs
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5)]
    net = nn.Sequential(*layers).double().eval().requires_grad_(False)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
    return fx.symbolic_trace(net)


def proposals(base, sizes):
    """Random squares in random places; rows (N,) of top, left."""
    h, w = base.shape[2:]
    proposal, places = base.clone(), []
    for row, size in enumerate(sizes.tolist()):
        ends = h - size, w - size  # borders as often as the rest
        top, left = (int(torch.randint(n + 1, ())) if torch.rand(()) < 0.5
                     else n * int(torch.randint(2, ())) for n in ends)
        places.append((top, left))
        square = proposal[row, :, top : top + size, left : left + size]
        square.copy_(torch.rand_like(square))
    return proposal, *torch.tensor(places).unbind(1)



@dataclass
class Known:
    """Proposals of which everything is known."""

    proposal: torch.Tensor
    base: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor

    def images(self, rows):
        return self.proposal[rows]

    def known(self, rows):
        return self.base[rows]

    def squares(self, rows, size):
        return windows_of(self.proposal[rows], size, size)[
            torch.arange(len(self.top[rows])), self.top[rows], self.left[rows]]


@pytest.fixture
def always(monkeypatch):
    """Local wherever it can be, even where it does not pay."""
    monkeypatch.setattr(Local, "saves", lambda self, size, n: self._plan(size) is not None)


def change(keys, version, top, left, sizes, after=None):
    return Change(keys, version, version + 1 if after is None else after, top, left, sizes)


def walk(net, shape, calls, units=6, most=None):
    """Random proposals, one or more of an image, acceptance and batches; yields logits and those
    of the whole network."""
    local = Local(net, torch.rand(1, *shape, dtype=torch.float64))
    local.saves = lambda size, n: local._plan(size) is not None
    local._most = most or local._most
    base = torch.rand(units, *shape, dtype=torch.float64)
    sizes, version = torch.ones(units, dtype=torch.int64), torch.zeros(units, dtype=torch.int64)
    for call in range(calls):
        if call % 4 == 0:
            sizes = torch.randint(0, min(shape[1:]) + 1, (units,))
            sizes = sizes.clamp_max(3) if torch.rand(()) < 0.5 else sizes
            sizes[: units // 2] = sizes[0]
        rows = torch.randperm(units)[: int(torch.randint(1, units + 1, ()))]
        if torch.rand(()) < 0.5:
            rows = torch.arange(units)
        rows = rows.repeat_interleave(torch.randint(1, 4, (len(rows),)))
        proposal, top, left = proposals(base[rows], sizes[rows])
        after = 100 * call + torch.arange(len(rows)) + 1
        yield (local.logits(change(rows * 7, version[rows], top, left, sizes[rows], after),
                            Known(proposal, base[rows], top, left)), net(proposal))
        taken = torch.rand(len(rows)) < 0.4  # of two of one image the last
        base, version = base.clone(), version.clone()
        for row in taken.nonzero().flatten():
            base[rows[row]], version[rows[row]] = proposal[row], after[row]
        if torch.rand(()) < 0.2:  # an image that nobody has seen
            other = int(torch.randint(units, ()))
            base[other], version[other] = torch.rand(shape, dtype=torch.float64), -call - 1


@settings(max_examples=30, deadline=None)
@given(
    channels=st.sampled_from([1, 3]), height=st.integers(7, 13), width=st.integers(7, 13),
    blocks=st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 3])),
                    min_size=1, max_size=3),
    normalized=st.booleans(), in_place=st.booleans(), most=st.sampled_from([None, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_logits_are_those_of_the_whole_network(
    channels, height, width, blocks, normalized, in_place, most, seed
):
    torch.manual_seed(seed)
    net = random_net(channels, *zip(*blocks, strict=True), normalized, in_place)
    for got, wanted in walk(net, (channels, height, width), 12, most=most):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["small-resnet", "preactresnet18", "mobilenetv2"])
def test_networks_of_the_benchmark(name, always):
    torch.manual_seed(0)
    net = build_model(name, classes=10, channels=3, size=32, normalize="cifar10").eval()
    net.requires_grad_(False)
    x = torch.rand(8, 3, 32, 32)
    network = Network(net, "exact", x[:2])
    sizes, version = torch.full((8,), 3), torch.zeros(8, dtype=torch.int64)
    for _ in range(3):
        proposal, top, left = proposals(x, sizes)
        got = network.near(change(torch.arange(8), version, top, left, sizes),
                           Known(proposal, x, top, left))
        torch.testing.assert_close(got, network.logits(proposal), rtol=1e-4, atol=1e-5)
        x[::2] = proposal[::2]
        version[::2] += 1
    assert network.forwards == 48 and len(network._local._maps) > 3


def test_a_name_twice_and_units_in_another_order_are_seen(always):
    torch.manual_seed(0)
    net = random_net(1, (3, 3), (1, 1), False, False)
    local = Local(net, torch.rand(1, 1, 9, 9, dtype=torch.float64))
    images, sizes = torch.rand(4, 1, 9, 9, dtype=torch.float64), torch.full((4,), 2)
    for names in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 1, 1], [3, 2, 1, 0]):
        keys = torch.tensor(names)
        proposal, top, left = proposals(images[keys], sizes)
        version = torch.zeros(4, dtype=torch.int64)
        got = local.logits(change(keys, version, top, left, sizes),
                           Known(proposal, images[keys], top, left))
        torch.testing.assert_close(got, net(proposal))


def test_only_the_windows_are_computed(always, monkeypatch):
    """The second look at a known image costs no pass through the first layers."""
    torch.manual_seed(0)
    net = random_net(1, (3, 3), (1, 2), False, False)
    local = Local(net, torch.rand(1, 1, 24, 24, dtype=torch.float64))
    base, sizes = torch.rand(3, 1, 24, 24, dtype=torch.float64), torch.full((3,), 2)
    version, filled = torch.zeros(3, dtype=torch.int64), []
    fill = Local._fill
    monkeypatch.setattr(Local, "_fill", lambda self, plan, slots, base: (
        filled.append(len(slots)), fill(self, plan, slots, base)))
    for _ in range(6):
        proposal, top, left = proposals(base, sizes)
        local.logits(change(torch.arange(3), version, top, left, sizes),
                     Known(proposal, base, top, left))
        taken = torch.rand(3) < 0.5
        base, version = torch.where(taken[:, None, None, None], proposal, base), version + taken
    assert filled == [3]


def test_memory_that_runs_out_leaves_nothing_half_known(always, monkeypatch):
    torch.manual_seed(0)
    net = random_net(1, (3, 3), (1, 1), False, False)
    local = Local(net, torch.rand(1, 1, 9, 9, dtype=torch.float64))
    sizes, fill, calls = torch.full((12,), 2), Local._fill, []

    def look(base, version, rows):
        proposal, top, left = proposals(base[rows], sizes[rows])
        named = change(rows, torch.full_like(rows, version), top, left, sizes[rows])
        got = local.logits(named, Known(proposal, base[rows], top, left))
        torch.testing.assert_close(got, net(proposal))

    def fails(self, plan, places, base):
        calls.append(len(places))
        if len(calls) == 2:
            raise RuntimeError("can't allocate memory")
        fill(self, plan, places, base)

    look(torch.rand(12, 1, 9, 9, dtype=torch.float64), 0, torch.arange(12))
    others = torch.rand(12, 1, 9, 9, dtype=torch.float64)
    monkeypatch.setattr(Local, "_fill", fails)
    with pytest.raises(RuntimeError, match="allocate"):
        look(others, 10, torch.arange(12))
    for rows in (torch.arange(6, 12), torch.arange(12)):
        look(others, 10, rows)
    assert calls[:2] == [8, 4]


def test_the_memory_is_bounded(monkeypatch):
    torch.manual_seed(0)
    net = random_net(1, (3,), (1,), False, False)
    monkeypatch.setattr(local_module, "MEMORY", 100_000)
    for got, wanted in walk(net, (1, 12, 12), 6, units=20):
        torch.testing.assert_close(got, wanted)
    local = Local(net, torch.rand(1, 1, 12, 12, dtype=torch.float64))
    assert 0 < local._most < 20


def test_batches_of_mixed_squares_come_in_few_sizes(always, monkeypatch):
    """Every size of a batch has kernels of its own, whose memory is kept."""
    torch.manual_seed(0)
    net = random_net(1, (3, 3), (1, 1), False, False)
    local = Local(net, torch.rand(1, 1, 9, 9, dtype=torch.float64))
    seen, conv = set(), F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args: (seen.add(len(x)), conv(x, *args))[1])
    for small in range(10, 38):
        sizes = torch.tensor([2] * small + [0] * (47 - small))[torch.randperm(47)]
        base, keys = torch.rand(47, 1, 9, 9, dtype=torch.float64), torch.arange(47)
        proposal, top, left = proposals(base, sizes)
        seen.clear()
        got = local.logits(change(keys, torch.full_like(keys, 2 * small), top, left, sizes),
                           Known(proposal, base, top, left))
        assert max(seen) > 16 and all(n <= 16 or n % 16 == 0 for n in seen)
        torch.testing.assert_close(got, net(proposal))


def test_it_is_used_where_it_pays(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    net = fx.symbolic_trace(
        build_model("small-resnet", classes=10, channels=3, size=32).eval())
    local = Local(net, torch.rand(1, 3, 32, 32))
    assert local.saves(3, 64) and local.saves(5, 64)
    assert not local.saves(29, 64) and not local.saves(3, 8) and not local.saves(0, 64)
    plan = local._plan(3)
    assert plan is not None and plan.work < local._dense / 2
    dense = fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
    assert not Local(dense, torch.rand(1, 3, 32, 32)).saves(3, 64)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.last((F.relu_(x) + x).mean((2, 3)))


def test_operations_in_place_on_what_others_read_are_left_alone():
    net = fx.symbolic_trace(Shared().double().requires_grad_(False))
    local = Local(net, torch.rand(1, 1, 24, 24, dtype=torch.float64))
    assert not local.saves(2, 1000)


@given(st.integers(1, 12), st.data())
def test_cover_is_the_smallest_that_covers(length, data):
    low = data.draw(st.lists(st.integers(-3, length - 1), min_size=1, max_size=5))
    high = [a + data.draw(st.integers(1, 6)) for a in low]
    span = Span.cover(low, high, length)
    for start, a, b in zip(span.start, low, high, strict=True):
        assert 0 <= start <= max(a, 0) and min(b, length) <= start + span.size <= length
    needed = [min(b, length) - max(a, 0) for a, b in zip(low, high, strict=True)]
    assert span.size == max(1, *needed)


def test_windows_grow_by_the_reach_of_the_kernels():
    net = random_net(3, (3, 3), (1, 2), True, False)
    Local(net, torch.rand(1, 3, 32, 32, dtype=torch.float64))  # finds the shapes
    plan = Plan(net, 3, 1.0)
    convs = [layer.window[0].size for node, layer in plan.layers.items() if "main" in node.name
             and isinstance(net.get_submodule(str(node.target)), nn.Conv2d)]
    assert convs == [5, 7, 5, 7]


def test_square_decides_as_with_the_whole_network(always):
    """Every proposal that is accepted, and the same logits."""
    torch.manual_seed(0)
    net = build_model("small-resnet", classes=10, channels=3, size=16).double().eval()
    net.requires_grad_(False)
    x = torch.rand(24, 3, 16, 16, dtype=torch.float64)
    y = net(x).argmax(1)
    paths = []
    for plain in (False, True):
        network = Network(net, "exact", x[:4])
        if plain:
            network.near = lambda change, proposals, network=network: network.logits(
                proposals.images(slice(None)))
        images = Images(x, y, torch.ones(24, 9, dtype=torch.int64), torch.arange(24))
        attack = Square(ThreatModel("Linf", 0.05))
        units = new_units(attack, images, [(i, 0) for i in range(24)], 0)
        path = []
        for query in range(40):
            attack.step(network, units)
            units.step += 1 if query else 900  # late queries have small squares
            path.append(units.state["x_adv"])
        paths.append(torch.stack(path))
        assert plain or network._local._maps
    assert torch.equal(*paths)
    assert (paths[0][-1] != paths[0][1]).flatten(1).any(1).sum() > 5
