"""robench steps: one run of PGD against as many runs as there are numbers of steps."""

import numpy as np
import pytest
import torch

from robench.attacks.ascent import Ascent
from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Images
from robench.benchmark.evaluate import Target, measure
from robench.benchmark.spec import AttackSpec
from robench.benchmark.steps import CLEAN, STANDS, first_fooled
from robench.reports import load

FEW = ("--limit", 20, "--device", "cpu", "--quiet")


@pytest.fixture
def data(make_network):
    """60 random images, of which the network gets 45 right."""
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = make_network()(x).argmax(1)
    y[::4] = (y[::4] + 1) % 10
    return Images(x, y)


def fell(net, data, threat, steps, **options):
    attack = Ascent(threat, steps, threat.eps / 4, "uniform")
    return first_fooled(net, data, attack, **options)


@pytest.mark.parametrize("threat", ["Linf:0.03", "L2:0.3"])
def test_every_number_of_steps_is_that_attack(make_network, data, threat):
    """Image by image what pgd-K of the pool finds, from the same starts."""
    net, threat = make_network(), ThreatModel.parse(threat)
    at = fell(net, data, threat, 25, seed=3)
    target = Target(net, data)
    assert list(at == CLEAN) == list(~target.correct)
    counts = []
    for steps in (1, 2, 5, 11, 25):
        alone = measure(target, AttackSpec.parse(f"pgd-{steps}"), threat, seed=3)
        standing = (at == STANDS) | (at > steps)
        assert list(standing) == list(alone.robust)
        counts.append(int(standing.sum()))
    assert counts[0] > counts[-1] > 0  # a telling example


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"batch_size": 1}])
def test_batches_change_nothing(make_network, data, options):
    threat = ThreatModel("Linf", 0.03)
    assert np.array_equal(fell(make_network(), data, threat, 12, **options),
                          fell(make_network(), data, threat, 12))


def test_a_longer_run_begins_as_a_shorter_one(make_network, data):
    threat, net = ThreatModel("Linf", 0.03), make_network()
    short, long = fell(net, data, threat, 7), fell(net, data, threat, 30)
    assert np.array_equal(short, np.where(long > 7, STANDS, long))


def test_without_a_budget_everything_stands(make_network, data):
    at = fell(make_network(), data, ThreatModel("Linf", 0), 3)
    assert set(at.tolist()) == {STANDS, CLEAN} and (at == CLEAN).sum() == 15


def test_the_network_is_left_alone(make_network, data):
    net = make_network().train()
    state = torch.get_rng_state()
    fell(net, data, ThreatModel("Linf", 0.03), 3)
    assert net.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_the_command_from_end_to_end(robench, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = robench("steps", checkpoint.name, "--steps", 12, "--threat", "Linf:0.02", *FEW)
    assert done.code == 0, done.err
    (one,) = load([tmp_path / "runs/steps"]).steps
    assert (one.attack, one.n, len(one.fell_at), one.attack_config["steps"]) == (
        "pgd-12", 20, 13, 12)
    (flags,) = (tmp_path / "runs/steps/steps").glob("*.npz")
    with np.load(flags) as kept:
        at = kept["fell_at"]
    assert one.n_correct == (at != CLEAN).sum()
    assert list(one.fell_at) == [int((at == k).sum()) for k in range(13)]
    assert "runs/steps/over_steps.csv" in done.err and "| trades" in done.out
    names = {path.name for path in (tmp_path / "runs/steps/figures").iterdir()}
    assert "accuracy-over-steps-digits-test-linf-0-02-pgd-12.svg" in names

    def never(*_, **__):
        raise AssertionError("attacked again")

    monkeypatch.setattr("robench.benchmark.steps.first_fooled", never)
    assert robench("steps", checkpoint.name, "--steps", 12, "--threat", "Linf:0.02",
                   *FEW).out == done.out
    assert len(load([tmp_path / "runs/steps"]).steps) == 1


def test_mistakes_are_one_line(robench, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, words in ((("--steps", 0), "steps must be >= 1, not 0"),
                           (("--limit", 0), "limit: ")):
        done = robench("steps", checkpoint.name, *FEW, *options)
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
