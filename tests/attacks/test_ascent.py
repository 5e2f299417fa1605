"""Ascent: the inner loop of every defense."""

import pytest
import torch
from torch import nn

from robench.attacks import Ascent, ThreatModel, frozen
from robench.attacks.threat import NORMS

X = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
EPS = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}
STARTS = ["uniform", "normal", "none"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def brightness(z: torch.Tensor) -> torch.Tensor:
    return z.flatten(1).sum(1)


def is_inside(threat: ThreatModel, z: torch.Tensor) -> bool:
    near = threat.distance(z, X) <= threat.eps * (1 + 1e-5) + 1.2e-7
    return bool(near.all() and (z >= 0).all() and (z <= 1).all())


@pytest.mark.parametrize("clamp_start", [True, False])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_iterate_is_inside(norm, start, clamp_start):
    threat = ThreatModel(norm, EPS[norm])
    iterates = []

    def objective(z: torch.Tensor) -> torch.Tensor:
        iterates.append(z.detach().clone())
        return brightness(z)

    ascent = Ascent(threat, 4, threat.eps, start, clamp_start)
    x_adv = ascent.maximize(objective, X)
    assert len(iterates) == 4
    first = 0 if clamp_start else 1  # TRADES and its kin do not clamp the start
    assert all(is_inside(threat, z) for z in [*iterates[first:], x_adv])
    assert not x_adv.requires_grad and x_adv.grad_fn is None
    if start == "none":
        assert (brightness(x_adv) > brightness(X)).all()


def test_start_none_is_the_image():
    ascent = Ascent(ThreatModel("Linf", 0.1), steps=0, start="none")
    x_adv = ascent.maximize(brightness, X)
    assert torch.equal(x_adv, X) and x_adv.data_ptr() != X.data_ptr()


def test_start_normal_is_small_and_start_uniform_fills_the_ball():
    x = torch.full((50, 3, 6, 6), 0.5)
    threat = ThreatModel("Linf", 0.1)
    normal = Ascent(threat, steps=0, start="normal").maximize(brightness, x) - x
    assert abs(normal.std() - 0.001) < 1e-4 and normal.abs().max() < 0.01
    uniform = Ascent(threat, steps=0, start="uniform").maximize(brightness, x) - x
    assert 0.099 < uniform.abs().max() <= 0.1 + 1e-6 and abs(uniform.mean()) < 0.01


@pytest.mark.parametrize("start", STARTS)
def test_starts_follow_torchs_seed(start):
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Ascent(ThreatModel("Linf", 0.1), steps=0, start=start).maximize(brightness, X)

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(2)) == (start == "none")


@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_gradient_leaves_its_image_alone(norm):
    """The other images of the batch climb all the same."""
    threat = ThreatModel(norm, EPS[norm])

    def objective(z: torch.Tensor) -> torch.Tensor:
        factor = torch.where(torch.arange(len(z)) == 2, float("nan"), 1.0)
        return factor * brightness(z)

    x_adv = Ascent(threat, 3, threat.eps / 2, "none").maximize(objective, X)
    assert torch.isfinite(x_adv).all()
    torch.testing.assert_close(x_adv[2], X[2])
    climbed = brightness(x_adv) > brightness(X)
    assert climbed.tolist() == [True, True, False, True, True]


def test_parameters_and_modes_are_left_alone():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), nn.Dropout(0.5), nn.Linear(108, 3))
    net[1].eval()
    net[3].bias.grad = torch.ones(3)
    modes = [module.training for module in net.modules()]
    Ascent(ThreatModel("Linf", 0.1)).maximize(lambda z: net(z).sum(1), X)
    assert [module.training for module in net.modules()] == modes
    assert net[3].weight.grad is None and torch.equal(net[3].bias.grad, torch.ones(3))
    assert all(p.requires_grad for p in net.parameters())


def test_it_climbs_under_no_grad():
    with torch.no_grad():
        x_adv = Ascent(ThreatModel("Linf", 0.1), start="none").maximize(brightness, X)
    assert (brightness(x_adv) > brightness(X)).all()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_frozen_restores_after_an_exception(mode):
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()
    net[0].bias.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    with pytest.raises(ZeroDivisionError), frozen(net, mode=mode):
        assert all(module.training == (mode == "train") for module in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        raise ZeroDivisionError
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
