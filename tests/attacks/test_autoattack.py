"""The ensemble: its parts and their parameters, few classes, and verdicts that stay the same."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robench.attacks import ThreatModel, make_attack
from robench.attacks.apgd import APGD
from robench.attacks.fab import FAB
from robench.attacks.search import Pooled, Search, Stage
from robench.attacks.square import Square
from robench.errors import UsageError

LINF = ThreatModel("Linf", 0.1)


def parts(name, threat=LINF, classes=10):
    """name -> (steps, units, other options that matter) of each stage."""
    return make_attack(name, threat).config(classes)["stages"]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_standard_has_the_parameters_of_the_reference(norm):
    """Croce and Hein 2020, section 4: every part once, 100 iterations, 9 targets, 5000 queries."""
    found = parts("autoattack", ThreatModel(norm, 0.1))
    assert list(found) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [part["units"] for part in found.values()] == [1, 9, 9, 1]
    assert all(found[name]["steps"] == 100 for name in ("apgd-ce", "apgd-t", "fab-t"))
    assert found["apgd-ce"]["rho"] == 0.75 and not found["apgd-ce"]["large_eps"]
    fab = found["fab-t"]
    assert (fab["alpha_max"], fab["eta"], fab["beta"]) == (0.1, 1.05, 0.9)
    assert (found["square"]["queries"], found["square"]["p_init"]) == (5000, 0.8)


def test_standard_in_l1_has_restarts_fewer_targets_and_the_larger_eps():
    """Croce and Hein 2021, section 4."""
    attack = make_attack("autoattack", ThreatModel("L1", 10.0))
    ce, targeted, fab, square = (stage.stepper for stage in attack.stages(10))
    assert [s.units(10) for s in (ce, targeted, fab, square)] == [5, 5, 9, 1]
    assert [s.large_eps is not False for s in (ce, targeted)] == [True, True]


def test_plus_and_rand():
    plus = parts("autoattack-plus")
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [part["units"] for part in plus.values()] == [5, 5, 5, 1, 9, 9]
    rand = parts("autoattack-rand")
    assert list(rand) == ["apgd-ce", "apgd-dlr"]
    assert all((part["eot"], part["units"]) == (20, 1) for part in rand.values())
    for version in ("plus", "rand"):  # no larger eps in L1
        found = parts(f"autoattack-{version}", ThreatModel("L1", 10.0))
        assert all(part.get("large_eps", False) is False for part in found.values())


@pytest.mark.parametrize(("classes", "targets"), [(2, 1), (3, 2), (4, 3), (9, 8), (100, 9)])
def test_few_classes_have_fewer_targets_and_another_loss_and_say_so(classes, targets):
    attack = make_attack("autoattack", LINF)
    stages = [stage.stepper for stage in attack.stages(classes)]
    assert [s.units(classes) for s in stages] == [1, targets, targets, 1]
    assert (stages[1].loss == "targeted-dlr") == (classes >= 4)
    notes = attack.notes(classes)
    assert bool(notes) == (classes < 10)
    assert any("targeted" in note for note in notes) == (classes < 4)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_it_runs_with_few_classes(classes):
    x, net = torch.rand(6, 1, 8, 8), network(classes)
    for name in ("autoattack-rand", "apgd-t", "fab-t"):
        x_adv = make_attack(name, ThreatModel("Linf", 0.3))(net, x, net(x).argmax(1))
        assert (net(x_adv).argmax(1) != net(x).argmax(1)).any()


def test_lite_says_that_it_is_not_autoattack():
    attack = make_attack("autoattack-lite", LINF, share=0.25)
    assert [stage.share for stage in attack.stages(10)] == [1.0, 1.0, 0.25, 0.25]
    assert "not AutoAttack" in attack.notes(10)[0]
    with pytest.raises(UsageError, match="share"):
        make_attack("autoattack-lite", LINF, share=2.0)


def network(classes=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                             nn.Flatten(), nn.Linear(8 * 64, classes)).eval()


@dataclass(frozen=True, slots=True)
class Short(Pooled):
    """All parts of AutoAttack with few steps."""

    threat: ThreatModel

    def stages(self, classes):
        t = self.threat
        return tuple(map(Stage, (APGD(t, "ce", steps=7), APGD(t, "targeted-dlr", steps=7),
                                 FAB(t, steps=7), Square(t, queries=40))))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_in_ieee_no_verdict_depends_on_the_batch_the_order_or_the_shard(norm):
    threat = ThreatModel(norm, {"Linf": 0.02, "L2": 0.13, "L1": 0.7}[norm])
    net = network()
    x = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)

    def verdicts(rows, slots):
        search = Search(Short(threat, precision="ieee"), net, x[rows], y[rows], seed=0, slots=slots)
        return search.run().fell_to

    everything = torch.arange(90)
    whole = verdicts(everything, 1000)
    assert 10 < (whole == -1).sum() < 80 and len(set(whole.tolist())) >= 3
    for slots in (16, 37):
        assert (verdicts(everything, slots) == whole).all()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    assert (verdicts(order, 64) == whole[order]).all()
    for shard in range(7):
        assert (verdicts(everything[shard::7], 64) == whole[shard::7]).all()


def test_every_part_alone_agrees_with_its_place_in_the_ensemble():
    """Each part starts from the clean image: what stands against all stands against each."""
    threat, net = ThreatModel("Linf", 0.02), network()
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    whole = Search(Short(threat), net, x, y, seed=0).run()
    alone = [Search(stage.stepper, net, x, y, seed=0).run().standing
             for stage in Short(threat).stages(5)]
    assert (whole.standing == alone[0] & alone[1] & alone[2] & alone[3]).all()
    for index, standing in enumerate(alone):
        fell_before = (whole.fell_to >= 0) & (whole.fell_to < index)
        assert ((whole.fell_to == index) == (~standing & ~fell_before)).all()


def test_union_attacks_what_stands_under_each_threat_model():
    """The logits differ by 32 - sum x: 64 pixels by eps each, or 64 times as much by one."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    model[1].weight.copy_(torch.stack([torch.zeros(64), torch.ones(64)]))
    model[1].bias.copy_(torch.tensor([32.0, 0.0]))
    x = 0.5 - torch.tensor([0.009, 0.0156])[:, None, None, None].expand(2, 1, 8, 8)
    y = torch.zeros(2, dtype=torch.long)
    attack = make_attack("union", ThreatModel("Linf", 0.011), also="L1:1.5")
    found = Search(attack, model, x, y, seed=0).run()
    names = [found.stages[stage] if stage >= 0 else "" for stage in found.fell_to]
    assert names == ["Linf:0.011 apgd-ce", "L1:1.5 apgd-ce"]
    assert found.stages[0].startswith("Linf:0.011 ") and found.stages[-1] == "L1:1.5 square"
    assert (found.distance <= 0.011 * (1 + 1e-6)).all()  # in L1 as a share of its eps
    assert found.distance[1] > 0.011 * (64 * 0.0156) / 1.5
    x_adv = attack(model, x, y)
    assert (x_adv[0] != x[0]).any() and torch.equal(x_adv[1:], x[1:])
    assert list(attack.config(2)["stages"]) == list(found.stages)


def test_union_wants_different_threat_models():
    with pytest.raises(UsageError, match="write Linf:8/255"):
        make_attack("union", LINF, also="Linf:8")
    with pytest.raises(UsageError, match="not different"):
        make_attack("union", LINF, also="L2:0.5+L2:0.5")
    with pytest.raises(UsageError, match="eps is above 0"):  # in the search it divides by it
        make_attack("union", LINF, also="L2:0.5+L1:0")
    assert make_attack("union", ThreatModel("L2", 0.5)).others == (ThreatModel("L1", 12.0),)
