"""What a request becomes: cells that can be trained, or one line that says why not."""

from dataclasses import replace

import pytest

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
