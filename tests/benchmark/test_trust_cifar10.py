"""Planted frauds and sound networks on CIFAR-10, over three seeds: a table of docs/trust.md."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from robench.attacks.threat import ThreatModel
from robench.benchmark.checkpoints import load_checkpoint, read_header
from robench.benchmark.data import load_dataset
from robench.benchmark.evaluate import Target, evaluate
from robench.benchmark.models import build_model
from robench.benchmark.spec import AttackSpec
from robench.benchmark.trust.diagnosis import ATTACKS, examine_attacks
from robench.benchmark.trust.outcome import Patient
from robench.reports.trust import id_of

from .frauds import FRAUDS, plant

pytestmark = [pytest.mark.slow, pytest.mark.realdata]
CELLS = Path(__file__).parents[2] / "results" / "cifar10-campaign" / "cells"
THREAT = ThreatModel("Linf", 8 / 255)
SEEDS = (0, 1, 2)
IMAGES = 64
dataset = cache(load_dataset)


@cache
def standard(root, seed):
    """A small ResNet, trained for a minute without any defense."""
    train = dataset("cifar10", root).train.take(10_000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_model("small-resnet", classes=10, channels=3, size=32).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(4):
            for rows in torch.split(torch.randperm(len(train)), 128):
                optimizer.zero_grad()
                cross_entropy(net(train.x[rows]), train.y[rows]).backward()
                optimizer.step()
    return net.eval()


def network(root, name, seed):
    if name == "standard":
        return standard(root, seed)
    (path,) = (path for path in CELLS.glob("*/best.safetensors")
               if (h := read_header(path)) is not None and (h.defense, h.seed) == (name, seed))
    return load_checkpoint(path)[0]


def raised(net, root, threat):
    """(clean accuracy, the ids of the flags that every evaluation raises)."""
    images = dataset("cifar10", root).test.take(IMAGES)
    scores = evaluate(net, images.x, images.y, threat=threat, attacks=["fgsm"])
    return scores.clean, [id_of(text) for text in scores.warnings]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FRAUDS)
def test_a_fraud_raises_its_flag_and_no_other(data_root, name, seed):
    images = dataset("cifar10", data_root).test.take(500).x
    net, threat, check = plant(name, standard(data_root, seed), images, THREAT)
    assert raised(net, data_root, threat)[1] == [check]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["standard", "pgd-at", "trades", "peeraid"])
def test_a_sound_network_raises_none(data_root, name, seed):
    clean, flags = raised(network(data_root, name, seed), data_root, THREAT)
    assert clean > 0.25 and flags == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["standard", "pgd-at", "trades"])
def test_doctor_raises_no_flag_of_a_sound_network(data_root, name, seed):
    data = dataset("cifar10", data_root)
    target = Target(network(data_root, name, seed), data.test.take(IMAGES))
    specs = tuple(AttackSpec.parse(text) for text in ATTACKS)
    found = examine_attacks(Patient(target, THREAT, specs, data.train, 10))
    assert [f.check.id for f in (*target.findings, *found) if f.flagged] == []
