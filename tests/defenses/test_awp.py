"""AWP against its definition: the displacement, the step at the displaced weights, the way back."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from robench.attacks import ThreatModel
from robench.defenses import AWP, Losses, Moment, make_defense
from robench.defenses.base import options_of, take_step
from robench.errors import UsageError
from robench.testing import check_defense

THREAT = ThreatModel("Linf", 8 / 255)
NAMES = ("pgd-at", "trades", "peeraid", "rslad")


def small():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(64, 10))
    return net.double().train()


def prepared(name):
    torch.manual_seed(0)
    defense = make_defense(f"{name}+awp", THREAT, **{"awp.gamma": 0.01})
    nets = {key: small() for key in defense.trained}
    nets |= {key: small().eval().requires_grad_(False) for key in defense.given}
    return defense, nets, torch.rand(6, 3, 6, 6, dtype=torch.float64), torch.randint(10, (6,))


@pytest.mark.parametrize("name", NAMES)
def test_the_displacement_is_that_of_the_paper(name):
    defense, nets, x, y = prepared(name)
    x_adv = defense.craft(nets, x, y)
    before = copy.deepcopy(nets)

    def objective(n):
        return defense.loss(n, x, x_adv, y)

    with defense.perturbed(nets, objective):
        inside = copy.deepcopy(nets)
        for key in nets:  # the pass that finds v leaves no trace in the statistics
            for (_, a), (_, b) in zip(nets[key].named_buffers(), before[key].named_buffers(),
                                      strict=True):
                assert torch.equal(a, b)
    # The same by a proxy, one plain step of SGD up the loss, and the difference of the weights.
    proxy = copy.deepcopy(before)
    objective(proxy).total.backward()
    moved = 0
    for key in defense.trained:
        for (label, w), p in zip(before[key].named_parameters(), proxy[key].parameters(),
                                 strict=True):
            got = dict(inside[key].named_parameters())[label] - w
            if w.dim() == 1 or p.grad is None:
                assert not got.any()
                continue
            difference = 0.01 * p.grad
            wanted = 0.01 * w.norm() / (difference.norm() + 1e-20) * difference
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-15)
            assert got.norm().item() == pytest.approx(0.01 * w.norm().item())
            moved += 1
    assert moved == 2 * len(defense.trained)
    for key in nets:
        for w, old in zip(nets[key].parameters(), before[key].parameters(), strict=True):
            torch.testing.assert_close(w, old, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_taken_at_the_displaced_weights_and_the_shift_taken_back(name):
    defense, nets, x, y = prepared(name)
    torch.manual_seed(1)
    x_adv = defense.craft(nets, x, y)
    proxy, shifted = copy.deepcopy(nets), copy.deepcopy(nets)
    defense.loss(proxy, x, x_adv, y).total.backward()
    shifts = {}
    with torch.no_grad():
        for key in defense.trained:
            for (label, w), p in zip(shifted[key].named_parameters(), proxy[key].parameters(),
                                     strict=True):
                if w.dim() > 1:
                    shifts[key, label] = 0.01 * w.norm() / p.grad.norm() * p.grad
                    w += shifts[key, label]
    defense.loss(shifted, x, x_adv, y).total.backward()
    for key in defense.trained:
        with torch.no_grad():
            for label, w in shifted[key].named_parameters():  # one step of SGD, weight decay on w+v
                w -= 0.1 * (w.grad + 5e-2 * w)
                w -= shifts.get((key, label), 0)
    torch.manual_seed(1)
    optimizers = [torch.optim.SGD(nets[key].parameters(), lr=0.1, weight_decay=5e-2)
                  for key in defense.trained]
    take_step(defense, nets, optimizers, x, y)
    for key in nets:
        for (label, got), wanted in zip(nets[key].state_dict().items(),
                                        shifted[key].state_dict().values(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12, msg=label)


def test_the_warm_up_is_the_defense_itself():
    defense = make_defense("trades+awp", THREAT, **{"awp.warm_up": 0.25, "beta": 2.0})
    assert isinstance(defense, AWP)
    assert defense.at(Moment(4, 20, 2, 3)) == make_defense("trades", THREAT, beta=2.0)
    assert defense.at(Moment(5, 20)) == defense
    assert replace(defense, warm_up=0.0).at(Moment(0, 20)) == replace(defense, warm_up=0.0)


def test_options_go_to_the_part_that_they_name():
    defense = make_defense("trades+awp", THREAT, beta=3, **{"awp.gamma": "1/100"})
    options = options_of(defense)
    assert (options["beta"], options["awp.gamma"], options["awp.warm_up"]) == (3.0, 0.01, 0.0)
    assert make_defense("trades+awp", THREAT, **options) == defense
    for wrong, message in ({"gamma": 1}, "'trades' has no option 'gamma'"), (
            {"awp.beta": 1}, "'awp' has no option 'beta'"):
        with pytest.raises(UsageError, match=message):
            make_defense("trades+awp", THREAT, **wrong)
    with pytest.raises(UsageError, match="unknown wrapper 'awq'"):
        make_defense("trades+awq", THREAT)


def test_it_keeps_the_contract_around_every_kind_of_defense():
    for name in NAMES:
        check_defense(f"{name}+awp")


def test_a_weight_that_the_loss_does_not_reach_stays():
    defense, nets, x, y = prepared("pgd-at")

    class Ignorant(type(defense.inner)):
        def loss(self, nets, x, x_adv, y):
            return Losses({"w": nets["student"][0].weight.square().sum()})

    blind = AWP(inner=Ignorant(threat=THREAT))
    with blind.perturbed(nets, lambda n: blind.loss(n, x, x, y)):
        pass
