"""Rob_f: the counts against a direct computation, one image at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Images
from robench.benchmark.transfer import RobF, crafting, rob_f
from robench.randomness import seeded


@pytest.fixture
def nets():
    """A student and a peer, each with a batch-norm whose two modes differ."""
    def make():
        net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(9, 4), nn.Tanh(),
                            nn.Linear(4, 3))
        net[0].running_mean.fill_(0.4)
        for p in net.parameters():
            p.data *= 3
        return net

    torch.manual_seed(0)
    return {"student": make().eval(), "peer": make().eval()}


@pytest.fixture
def data():
    """40 images, of which the student gets 3 of 4 right."""
    x = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    return Images(x, torch.arange(40) % 3)


def directly(nets, data, threat, seed, batch_size):
    """The same by hand: ten signed steps of eps / 4 from a uniform start, last iterate."""
    counts = {name: [0, 0, 0, 0] for name in nets}
    for begin in range(0, len(data), batch_size):
        x, y = data.x[begin : begin + batch_size], data.y[begin : begin + batch_size]
        crafted = {}
        for name, net in nets.items():
            with seeded(seed, "rob_f", begin):
                z = (x + threat.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
            for _ in range(10):
                z.requires_grad_(True)
                (grad,) = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)
                moved = z.detach() + threat.eps / 4 * grad.sign()
                z = torch.min(torch.max(moved, x - threat.eps), x + threat.eps).clamp(0, 1)
            crafted[name] = z
        for name, net in nets.items():
            with torch.no_grad():
                batches = x, crafted[name], crafted["student"]
                right = [int((net(z).argmax(1) == y).sum()) for z in batches]
                right.append(int((nets["student"](crafted["student"]).argmax(1) == y).sum()))
            counts[name] = [a + b for a, b in zip(counts[name], right, strict=True)]
    return {name: RobF(*row) for name, row in counts.items()}


@pytest.mark.parametrize("batch_size", [40, 15, 1])
@pytest.mark.parametrize("seed", [0, 3])
def test_counts(nets, data, seed, batch_size):
    threat = ThreatModel("Linf", 0.05)
    measured = rob_f(nets, data, threat, seed=seed, batch_size=batch_size)
    assert measured == directly(nets, data, threat, seed, batch_size)
    peer = measured["peer"]
    assert 0 < peer.self_crafted < peer.student_crafted <= peer.clean < 40  # a telling example


@pytest.mark.parametrize("threat", ["Linf:0.05", "L2:0.2", "L1:0.5", "Linf:0"])
def test_the_student_on_its_own_examples(nets, data, threat):
    row = rob_f(nets, data, ThreatModel.parse(threat))["student"]
    assert row.self_crafted == row.student_crafted == row.student_robust <= row.clean


def test_without_a_budget_nothing_changes(nets, data):
    for row in rob_f(nets, data, ThreatModel("Linf", 0)).values():
        assert row.clean == row.self_crafted == row.student_crafted


def test_two_equal_networks_have_equal_rows(nets, data):
    same = {"student": nets["student"], "teacher": nets["student"]}
    rows = rob_f(same, data, ThreatModel("Linf", 0.05))
    assert rows["teacher"] == rows["student"]


def test_networks_are_measured_in_eval_mode_and_get_their_modes_back(nets, data):
    threat = ThreatModel("Linf", 0.05)
    expected = rob_f(nets, data, threat)
    for net in nets.values():
        net.train()
    states = {k: {n: v.clone() for n, v in net.state_dict().items()} for k, net in nets.items()}
    before = torch.get_rng_state()
    assert rob_f(nets, data, threat) == expected
    assert torch.equal(torch.get_rng_state(), before)
    for name, net in nets.items():
        assert net.training and net[0].training
        assert all(torch.equal(v, states[name][n]) for n, v in net.state_dict().items())


def test_the_crafting_of_the_paper():
    ascent = crafting(ThreatModel("Linf", 8 / 255))
    assert (ascent.steps, ascent.step_size, ascent.start) == (10, 2 / 255, "uniform")
