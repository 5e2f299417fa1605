"""What each process does in test_distributed.py. New interpreters import it as `teamwork`."""

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from robench.attacks import ThreatModel
from robench.defenses import make_defense, trainer
from robench.defenses.config import TrainConfig
from robench.errors import UsageError
from robench.randomness import seeded

THREAT = ThreatModel("Linf", 0.1)
IMAGES = 37  # in batches of 8: four of them and one of 5, five steps an epoch


@dataclass(frozen=True)
class Scenario:
    defense: str
    norm: str
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    images: int = IMAGES
    stop_after: int | None = None  # steps of a single process that is interrupted then

    def __str__(self) -> str:
        extra = {**self.options, **self.train, **({"stop": 1} if self.stop_after else {})}
        return " ".join([self.defense, self.norm, *extra])


SHORT = {"epochs": 2}
SCENARIOS = {str(s): s for s in (
    Scenario("trades", "group"),
    Scenario("trades", "batch"),
    Scenario("peeraid", "group"),
    Scenario("peeraid", "batch"),
    Scenario("trades+awp", "batch", {"awp.gamma": 0.01}),
    Scenario("peeraid+awp", "group", {"awp.gamma": 0.01}, SHORT),
    Scenario("pgd-at", "batch", {"extra_clean_forward": True, "craft_mode": "train"}, SHORT),
    Scenario("ard", "batch", train=SHORT),
    Scenario("cat", "batch", train=SHORT),
    Scenario("mtard", "batch", train=SHORT),
    Scenario("adr", "batch", train=SHORT),
    Scenario("ikl", "batch", train=SHORT),
    Scenario("trades", "batch", train={"select": "val", "swa_start": 0.5, "ema": 0.9, "clip": 0.5}),
    Scenario("peeraid", "batch", train=SHORT, stop_after=7),
)}
# Batches of 4 and one of 2, of which three processes find no image for one of them.
FEW = {str(s): s for s in (
    Scenario("ard", "batch", train={"batch_size": 4, "epochs": 2}, images=10),
    Scenario("ikl+awp", "batch", train={"batch_size": 4, "epochs": 2}, images=10),
)}


class Kept:
    """A keeper in memory."""

    def __init__(self):
        self.state, self.networks = None, {}

    def load_state(self):
        return self.state

    def save_state(self, state):
        self.state = copied(state)

    def save_network(self, name, net, epoch):
        self.networks[name] = {"epoch": torch.tensor(epoch), **copied(net.state_dict())}


def copied(state):
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    return state.detach().clone() if isinstance(state, torch.Tensor) else state


class Steps(trainer.Watcher):
    """The losses of every step."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = [], stop_after

    def losses(self, means):
        self.seen.append(dict(means))

    def step(self, epoch, step, steps):
        if self.stop_after == epoch * steps + step:
            raise KeyboardInterrupt


def network(norm, seed):
    with seeded(seed, "network"):
        norms = [nn.GroupNorm(2, 4), nn.GroupNorm(2, 6)]
        if norm == "batch":
            norms = [nn.BatchNorm2d(4), nn.BatchNorm1d(6, momentum=None)]
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), norms[0], nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 6), norms[1], nn.ReLU(), nn.Linear(6, 3),
        )
    return net.double().to(memory_format=torch.channels_last)


def data(n, seed):
    with seeded(seed, "data"):
        x = torch.rand(n, 3, 4, 4, dtype=torch.float64)
    return x, x[:, 0, :3].mean(2).argmax(1)


def noisy(x):
    return (x + 0.1 * torch.rand_like(x)).clamp(0, 1)


def train(scenario, team=trainer.ALONE):
    """What a training leaves: weights, losses of its steps, what it tells and what it keeps."""
    trainer.CHECK_EVERY = 1
    config = TrainConfig(**{"epochs": 4, "batch_size": 8, "lr": 0.05, "select": "last",
                            "select_steps": 2, **scenario.train})
    defense = make_defense(scenario.defense, THREAT, **{"steps": 2, **scenario.options})
    keeper = Kept()

    def run(watcher, team):
        nets = {name: network(scenario.norm, seed)
                for seed, name in enumerate((*defense.trained, *defense.given))}
        trainer.fit(
            defense, nets, data(scenario.images, 0), config, threat=THREAT, keeper=keeper,
            selection=None if config.select == "last" else data(30, 1), augment=noisy,
            watcher=watcher, team=team,
        )
        return {name: copied(net.state_dict()) for name, net in nets.items()}

    if scenario.stop_after:
        try:
            run(Steps(scenario.stop_after), trainer.ALONE)
        except KeyboardInterrupt:
            keeper.networks = {}
    steps = Steps()
    weights = run(steps, team)
    return {"weights": weights, "losses": steps.seen, "networks": keeper.networks,
            "state": keeper.state}


# What is launched


def train_all(team, device, scenarios, folder):
    for index, scenario in enumerate(scenarios.values()):
        torch.save(train(scenario, team), folder / f"{index}-{team.rank}.pt")


def refuse(team, device):
    """The second process finds something wrong while the first one waits for it."""
    if team.rank == 1:
        raise UsageError("not like this")
    dist.barrier()


def die(team, device):
    if team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_for_ever(team, device, folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)
