"""Every defense keeps the contract; and the suite that says so notices when one does not."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from robench.attacks import ThreatModel
from robench.defenses import DEFENSES, TRADES, Defense, Losses
from robench.testing import check_defense


@pytest.mark.parametrize("name", DEFENSES.names())
def test_defense(name):
    check_defense(name)


@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:0.5", "L1:2"])
def test_other_threat_models_and_options(threat):
    check_defense("trades", threat=ThreatModel.parse(threat), beta=1.0, steps=3)
    check_defense("peeraid", threat=ThreatModel.parse(threat), lambda1=0.5)


def test_a_class_is_taken_too():
    check_defense(TRADES, start="uniform", craft_mode="train")


@dataclass(frozen=True, kw_only=True)
class Sound(Defense):
    """Distills a teacher on clean images; each test below breaks one thing."""

    given = {"teacher": "standard"}

    def craft(self, nets, x, y):
        return x.detach()

    def loss(self, nets, x, x_adv, y):
        with torch.no_grad():
            target = nets["teacher"](x).softmax(1)
        return Losses({"ce": F.cross_entropy(nets["student"](x_adv), target)})


def test_an_unregistered_class_passes():
    check_defense(Sound)


class OutsideTheBall(Sound):
    def craft(self, nets, x, y):
        return (x + 0.5).clamp(0, 1)


class Attached(Sound):
    def craft(self, nets, x, y):
        return x.clone().requires_grad_()


class LeavesEvalMode(Sound):
    def craft(self, nets, x, y):
        nets["student"].eval()
        return x


class MovesTheTeachersStatistics(Sound):
    def craft(self, nets, x, y):
        modes = {module: module.training for module in nets["teacher"].modules()}
        nets["teacher"].train()(x)
        for module, training in modes.items():
            module.training = training
        return x


class LeavesGradients(Sound):
    def craft(self, nets, x, y):
        nets["student"](x).sum().backward()
        return x


class VectorLoss(Sound):
    def loss(self, nets, x, x_adv, y):
        return Losses({"sum": nets["student"](x_adv).sum(1)})


class NaNLoss(Sound):
    def loss(self, nets, x, x_adv, y):
        return Losses({"sum": nets["student"](x_adv).sum() * float("nan")})


class FloatPart(Sound):
    def loss(self, nets, x, x_adv, y):
        total = super().loss(nets, x, x_adv, y).total
        return Losses({"ce": total.item()})


class SetsModes(Sound):
    def loss(self, nets, x, x_adv, y):
        nets["student"].eval()
        return super().loss(nets, x, x_adv, y)


class ChangesTheTeacher(Sound):
    def after_step(self, nets, x, y, losses):
        with torch.no_grad():
            nets["teacher"][-1].bias += 1


class IdlePeer(Sound):
    trained = ("student", "peer")


@dataclass(frozen=True, kw_only=True)
class Tuples(Sound):
    weights: tuple[float, ...] = field(default=(1.0, 2.0))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (OutsideTheBall, "outside Linf"),
        (Attached, "not detached"),
        (LeavesEvalMode, "student: modes changed"),
        (MovesTheTeachersStatistics, "teacher: buffers changed"),
        (LeavesGradients, "student: .grad of parameters changed"),
        (VectorLoss, "the part 'sum' of the loss is no finite scalar tensor"),
        (NaNLoss, "the part 'sum' of the loss is no finite scalar tensor"),
        (FloatPart, "the part 'ce' of the loss is no finite scalar tensor"),
        (SetsModes, "a step changed the mode"),
        (ChangesTheTeacher, "teacher is given, but its parameters or buffers changed"),
        (IdlePeer, "peer is trained, but"),
        (Tuples, "do not survive JSON"),
    ],
)
def test_a_broken_defense_is_noticed(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_defense(broken)
