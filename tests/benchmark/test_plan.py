"""What a request becomes: cells that can be trained, or one line that says why not."""

from dataclasses import replace

import pytest
import torch

from robench.attacks.network import Network
from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import plan
from robench.benchmark.data import load_dataset
from robench.benchmark.spec import RunSpec
from robench.errors import UsageError

SMALL = {"model": "smallcnn"}


@pytest.fixture(scope="module")
def named():
    """The digits under the name of another data set, for its recipes."""
    digits = load_dataset("digits")
    return lambda name: replace(digits, name=name)


def planned(dataset, **request):
    cells, rows = plan(RunSpec.create({**SMALL, **request}), dataset, None)
    return {cell.spec.defense: cell for cell in cells}, rows


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny-imagenet"])
def test_everything_as_released_can_be_planned(named, dataset):
    """Teachers whose training no source documents are trained by the unified recipe."""
    cells, rows = planned(named(dataset), defenses="all", recipe="as-released",
                          train={"validation": 144})
    assert len(rows) >= 2 and {row.spec.recipe for row in rows} == {"as-released"}
    natural = [cell for cell in cells.values() if set(cell.teachers) & {"natural", "helper"}]
    if natural:
        assert cells["standard"].spec.recipe == "unified"
        for cell in natural:
            role = (set(cell.teachers) & {"natural", "helper"}).pop()
            assert cell.spec.teachers[role] == cells["standard"].spec.key()
            assert f"its {role} is trained by the recipe unified" in cell.spec.notes


@pytest.mark.parametrize(("defense", "option", "epochs", "begins"), [
    ("trades+awp", {"awp.warm_up": 9}, 9, 10), ("iad", {"begin": 60}, 60, 61),
    ("iad-ii", {"begin": 3}, 3, 4),
    ("iad+awp", {"begin": 4, "awp.warm_up": 2}, 4, 5)])
def test_a_method_that_would_never_begin_is_refused(named, defense, option, epochs, begins):
    request = {"defenses": (defense,), "options": {defense: option},
               "train": {"swa_start": None}}
    with pytest.raises(UsageError, match=f"the last of {epochs} epochs"):
        planned(named("digits"), epochs=epochs, **request)
    planned(named("digits"), epochs=begins, **request)
    planned(named("digits"), epochs=epochs, smoke=True, **request)


def test_smoke_runs_what_is_as_released(named):
    cells, _ = planned(named("cifar10"), defenses=("peeraid", "ikl+awp"), recipe="as-released",
                       smoke=True)
    assert cells["peeraid"].spec.train.swa_start == 0 and cells["peeraid"].spec.train.epochs == 1
    assert cells["ikl+awp"].spec.train.ema_start == 0


def test_windows_are_computed_only_in_a_network_of_our_own():
    """A user's own GraphModule is none: in ieee every pass has one shape."""
    net = torch.fx.symbolic_trace(torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(144, 3)).eval().requires_grad_(False))
    x, zeros = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    for precision, ours in (("ieee", False), ("exact", True)):
        network = Network(net, precision, x)
        network.near(zeros, zeros, x, x, zeros, zeros, zeros + 3)
        assert (network._local is not None) == ours, precision


def test_copies_of_an_image_with_other_labels_do_not_share_what_is_known(monkeypatch):
    from robench.attacks.pool import Images, new_units
    from robench.attacks.square import Square

    names = []

    class Net:
        def near(self, keys, *others):
            names.append(keys)
            return torch.zeros(2, 3)

    x = torch.rand(1, 1, 8, 8).repeat(2, 1, 1, 1)
    images = Images(x, torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.int64), torch.zeros(
        2, dtype=torch.int64))
    attack = Square(ThreatModel("Linf", 0.1), queries=3)
    units = new_units(attack, images, [(0, 0), (1, 0)], 0)
    attack.step(Net(), units)
    assert names[0][0] != names[0][1]
