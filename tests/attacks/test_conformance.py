"""Every attack keeps the contract; and the suite that says so notices when one does not."""

import numpy as np
import pytest
import torch

from robench.attacks import ATTACKS, ThreatModel, make_attack
from robench.errors import UsageError
from robench.testing import check_attack

THREATS = [ThreatModel("Linf", 0.2), ThreatModel("L2", 2.0), ThreatModel("L1", 15.0)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", ATTACKS.names())
def test_attack(name, threat):
    if name == "ddn" and threat.norm != "L2":
        with pytest.raises(UsageError, match="L2"):
            make_attack(name, threat)
    else:
        check_attack(name, threat=threat)


@pytest.mark.parametrize(
    ("name", "threat"),
    [
        ("torchattacks:PGD", "Linf:0.2"),
        ("torchattacks:MIFGSM", "Linf:0.2"),
        ("torchattacks:CW", "L2:2"),
        ("torchattacks:FAB", "L2:2"),
        ("torchattacks:Square", "Linf:0.2"),
        ("torchattacks:AutoAttack", "Linf:0.2"),
        ("pyautoattack:standard", "Linf:0.2"),
        ("pyautoattack:fab-t", "L2:2"),
        ("pyautoattack:square", "L1:15"),
    ],
)
def test_adapter(name, threat):
    pytest.importorskip(name.partition(":")[0])
    check_attack(name, threat=ThreatModel.parse(threat))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_other_shapes(shape):
    check_attack("pgd", shape=shape, steps=5)


class Broken:
    """PGD, after or before which something goes wrong."""

    def __init__(self, threat, fault):
        self.threat, self.fault, self.pgd = threat, fault, make_attack("pgd-5", threat)

    def __call__(self, model, x, y):
        return self.fault(self, model, x, y)


def outside(attack, model, x, y):
    return (attack.pgd(model, x, y) + 0.01).clamp(0, 1)


def outside_the_box(attack, model, x, y):
    return x + (attack.pgd(model, x, y) - x).abs()


def nan(attack, model, x, y):
    return attack.pgd(model, x, y) * float("nan")


def wrong_dtype(attack, model, x, y):
    return attack.pgd(model, x, y).half()


def wrong_shape(attack, model, x, y):
    return attack.pgd(model, x, y).squeeze(0)[:, :1]


def attached(attack, model, x, y):
    return attack.pgd(model, x, y).requires_grad_()


def weak(attack, model, x, y):
    return x.clone()


def numpy_noise(attack, model, x, y):
    noise = torch.as_tensor(np.random.uniform(-1e-3, 1e-3, x.shape)).to(x)
    return attack.threat.project(attack.pgd(model, x, y) + noise, x)


def in_place(attack, model, x, y):
    x_adv = attack.pgd(model, x, y)
    x += 0.001
    return attack.threat.project(x_adv, x)


def modes(attack, model, x, y):
    x_adv = attack.pgd(model, x, y)
    if isinstance(model, torch.nn.Module):
        model.eval()
    return x_adv


def statistics(attack, model, x, y):
    if isinstance(model, torch.nn.Module):
        model[1].train()
        model(x)
        model[1].eval()
    return attack.pgd(model, x, y)


def flags(attack, model, x, y):
    if isinstance(model, torch.nn.Module):
        model.requires_grad_(True)
    return attack.pgd(model, x, y)


def gradients(attack, model, x, y):
    model(x).sum().backward()
    return attack.pgd(model, x, y)


def hooks(attack, model, x, y):
    if isinstance(model, torch.nn.Module):
        model.register_forward_hook(lambda *_: None)
    return attack.pgd(model, x, y)


def batches_only(attack, model, x, y):
    return attack.pgd(model, x, y) if len(x) > 1 else x.squeeze()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (outside, "outside Linf:0.2"),
        (outside_the_box, r"outside \[0, 1\]"),
        (nan, "outside Linf:0.2"),
        (wrong_dtype, "dtype torch.float16"),
        (wrong_shape, "have shape"),
        (attached, "not detached"),
        (weak, "no image was fooled"),
        (numpy_noise, "the same torch seed"),
        (in_place, "x or y was changed"),
        (modes, "modes changed"),
        (statistics, "buffers changed"),
        (flags, "requires_grad flags changed"),
        (gradients, ".grad of parameters changed"),
        (hooks, "hooks changed"),
        (batches_only, "have shape"),
    ],
)
def test_a_broken_attack_is_noticed(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_attack(lambda threat: Broken(threat, fault))
