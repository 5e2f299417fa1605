"""fit: the only training loop.

    for epoch in epochs:                          # seeded by (seed, epoch): resumes exactly
        for x, y in shuffled, augmented batches:  # on the device
            now = defense.at(moment)                                # schedules of the method
            x_adv = now.craft(nets, x, y)                           # inner maximization
            with now.perturbed(nets, objective):                    # AWP and the like
                losses = now.loss(nets, x, x_adv, y)
                losses.total.backward()
                for every trained network: optimizer.step()
            now.after_step(nets, x, y, losses)
        now.after_epoch(nets)
        average the student's weights             # SWA, from swa_start on
        measure student and average               # clean and PGD, on the selection split
        keep best, last, swa, swa-last, peer      # networks
        keep the state                            # optimizers, averages, history
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from robench.attacks.base import frozen, memory_format
from robench.attacks.gradient import PGD
from robench.attacks.threat import ThreatModel
from robench.defenses.averaging import WeightAverage
from robench.defenses.base import Defense, Moment, Nets, clean_logits, take_step
from robench.errors import RobenchError
from robench.randomness import seeded

EVAL_BATCH = 500
CHECK_EVERY = 50  # steps between looks for NaN: each look waits for the device


class TrainingFailed(RobenchError):
    """A training went wrong by itself; other cells of the matrix are not concerned."""


class TrainConfig(BaseModel):
    """How a network is trained, apart from the method.

    Points in time (milestones, swa_start) are 0-based epochs, or fractions of all epochs if
    they lie strictly between 0 and 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)  # batch-norm cannot use a single image
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)  # on every parameter, as all sources do
    milestones: tuple[float, ...] = ()  # lr is multiplied by gamma from these epochs on
    gamma: float = Field(default=0.1, gt=0, le=1)
    lr_per_iteration: bool = False  # look the lr up at epoch + (i + 1) / n instead of epoch
    swa_start: float | None = Field(default=None, ge=0)
    validation: int = Field(default=0, ge=0)  # training images held out
    select: Literal["val", "test", "last"] = "val"
    select_steps: int = Field(default=10, ge=1)  # PGD steps of the selection attack
    select_step_size: float | None = None  # None: eps / 4
    select_every: int = Field(default=1, ge=1)
    select_dense_from: int = Field(default=0, ge=0)  # from here on select in every epoch

    def moment(self, point: float) -> float:
        """A milestone in epochs."""
        return point * self.epochs if 0 < point < 1 else point

    def lr_at(self, time: float) -> float:
        """The learning rate `time` epochs into the training."""
        return self.lr * self.gamma ** sum(time >= self.moment(m) for m in self.milestones)

    def averages(self, epoch: int) -> bool:
        return self.swa_start is not None and epoch >= int(self.moment(self.swa_start))

    def measures(self, epoch: int) -> bool:
        """Whether this epoch takes part in the selection; the last one always does."""
        last = epoch == self.epochs - 1
        dense = epoch >= self.select_dense_from
        return last or dense or epoch % self.select_every == 0

    @property
    def ranked(self) -> tuple[str, ...]:
        """The checkpoints that are rows of the leaderboard."""
        student, average = ("last", "swa-last") if self.select == "last" else ("best", "swa")
        return (student,) if self.swa_start is None else (student, average)


@dataclass(frozen=True, slots=True)
class EpochLog:
    """One epoch: accuracies in [0, 1] on the selection split, None where not measured."""

    epoch: int  # 0-based
    lr: float
    seconds: float  # of training alone
    losses: dict[str, float]
    clean: float | None = None
    robust: float | None = None
    swa_clean: float | None = None
    swa_robust: float | None = None

    @property
    def score(self) -> tuple[float, float] | None:
        """What the selection compares: robust accuracy, clean accuracy where that is equal."""
        return None if self.robust is None or self.clean is None else (self.robust, self.clean)

    @property
    def swa_score(self) -> tuple[float, float] | None:
        if self.swa_robust is None or self.swa_clean is None:
            return None
        return self.swa_robust, self.swa_clean


class Keeper(Protocol):
    """Where a training run keeps what must survive it."""

    def load_state(self) -> dict[str, Any] | None: ...
    def save_state(self, state: dict[str, Any]) -> None: ...
    def save_network(self, name: str, net: nn.Module, epoch: int) -> None: ...


class Watcher:
    """Told how the training goes. This one does not care."""

    def step(self, epoch: int, step: int, steps: int) -> None: ...
    def epoch(self, log: EpochLog) -> None: ...


@dataclass
class _Progress:
    """What changes from epoch to epoch and is not in a network or an optimizer."""

    epoch: int = 0  # the next one
    history: list[EpochLog] = field(default_factory=list)
    best: tuple[float, float] = (-1.0, -1.0)  # (robust, clean): clean decides a tie
    swa_best: tuple[float, float] = (-1.0, -1.0)
    average: WeightAverage = field(default_factory=WeightAverage)


def fit(
    defense: Defense,
    nets: Nets,
    train: tuple[Tensor, Tensor],
    config: TrainConfig,
    *,
    threat: ThreatModel,
    keeper: Keeper,
    selection: tuple[Tensor, Tensor] | None = None,
    augment: Callable[[Tensor], Tensor] = lambda x: x,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> list[EpochLog]:
    """Train `nets` in place and leave the checkpoints with `keeper`. Goes on where it stopped.

    Args:
        defense: the method; its `trained` networks move, its `given` ones do not.
        nets: one network per name in `trained` and `given`, all on the device of the data.
        train: images (N, C, H, W) in [0, 1] and labels (N,), resident on the device.
        threat: of the selection attack.
        selection: images and labels on which the best epoch is chosen; None if select is last.
        augment: a batch of images to a batch of images, random through torch's generator.

    Returns:
        One log per epoch, those before an interruption included.

    Raises:
        TrainingFailed: a loss was NaN or infinite. State and networks of the epoch before stay.
    """
    watcher = watcher or Watcher()
    for name in defense.given:
        nets[name].eval().requires_grad_(False)
    optimizers = {
        name: torch.optim.SGD(
            nets[name].parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        for name in defense.trained
    }
    classes = clean_logits(nets["student"], train[0][:1]).shape[1]
    memory = {name: module.eval().requires_grad_(False)
              for name, module in defense.memory(nets, classes).items()}
    nets = {**nets, **memory}
    progress = _restore(keeper.load_state(), defense, nets, optimizers, memory)
    attack = PGD(threat, config.select_steps, config.select_step_size)
    while progress.epoch < config.epochs:
        epoch = progress.epoch
        with seeded(seed, "epoch", epoch):
            log = _epoch(defense, nets, optimizers, train, augment, config, epoch, watcher)
            student, average = nets["student"], None
            if config.averages(epoch):
                progress.average.update(student)
                clean_batches = (augment(x) for x, _ in _batches(train, config.batch_size))
                average = progress.average.network(student, clean_batches)
        if selection is not None and config.measures(epoch):
            # The same noise in every epoch: epochs are compared, not draws.
            with seeded(seed, "selection"):
                log["clean"], log["robust"] = accuracies(student, selection, attack)
            if average is not None:
                with seeded(seed, "selection"):
                    log["swa_clean"], log["swa_robust"] = accuracies(average, selection, attack)
        progress.history.append(EpochLog(**log))
        progress.epoch += 1
        _keep_networks(keeper, defense, nets, average, progress, config)
        keeper.save_state(_state(progress, nets, optimizers, defense, memory))
        watcher.epoch(progress.history[-1])
    return progress.history


def _epoch(
    defense: Defense,
    nets: Nets,
    optimizers: dict[str, torch.optim.SGD],
    train: tuple[Tensor, Tensor],
    augment: Callable[[Tensor], Tensor],
    config: TrainConfig,
    epoch: int,
    watcher: Watcher,
) -> dict[str, Any]:
    """One pass over the training images; returns the fields of its EpochLog."""
    started = time.perf_counter()
    steps = _steps(len(train[0]), config.batch_size)
    seen: list[dict[str, Tensor]] = []
    lr, layout = config.lr_at(epoch), memory_format(nets["student"])
    for name in defense.trained:
        nets[name].train()
    for step, (clean, y) in enumerate(_batches(train, config.batch_size)):
        x = augment(clean).contiguous(memory_format=layout)
        if config.lr_per_iteration:
            lr = config.lr_at(epoch + (step + 1) / steps)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
        now = defense.at(Moment(epoch, config.epochs, step, steps, lr / config.lr))
        losses = take_step(now, nets, optimizers.values(), x, y)
        parts = {"total": losses.total, **losses.parts}
        seen.append({name: value.detach() for name, value in parts.items()})
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            _refuse_nan(seen, epoch)
        watcher.step(epoch, step + 1, steps)
    with torch.no_grad():
        now.after_epoch(nets)
    means = {name: torch.stack([s[name] for s in seen]).mean().item() for name in seen[0]}
    seconds = time.perf_counter() - started
    return {"epoch": epoch, "lr": lr, "seconds": seconds, "losses": means}


def _steps(n: int, size: int) -> int:
    """How many batches `_batches` makes of n images."""
    return max(1, n // size + (n % size > 1))


def _batches(data: tuple[Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches. A last batch of one image is left out: batch-norm cannot use it."""
    x, y = data
    order = torch.randperm(len(x), device=x.device)
    for start in range(0, len(x), size):
        index = order[start : start + size]
        if len(index) > 1 or len(x) == 1:
            yield x[index], y[index]


def _refuse_nan(seen: list[dict[str, Tensor]], epoch: int) -> None:
    finite = torch.stack([s["total"] for s in seen]).isfinite()
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        parts = {name: f"{value.item():.4g}" for name, value in seen[step].items()}
        kept = f"the state after epoch {epoch - 1} is kept" if epoch else "no epoch was finished"
        raise TrainingFailed(
            f"the loss is not finite in epoch {epoch}, step {step} ({parts}); {kept}. "
            "Try a smaller learning rate (--set lr=...)"
        )


def accuracies(
    net: nn.Module, data: tuple[Tensor, Tensor], attack: PGD
) -> tuple[float, float]:
    """Clean and attacked accuracy in [0, 1]; what is wrong when clean is not attacked."""
    correct = robust = 0
    for start in range(0, len(data[0]), EVAL_BATCH):
        x, y = data[0][start : start + EVAL_BATCH], data[1][start : start + EVAL_BATCH]
        with frozen(net), torch.no_grad():
            right = net(x).argmax(1) == y
            x, y = x[right], y[right]
            correct += len(x)
            if len(x):
                robust += int((net(attack(net, x, y)).argmax(1) == y).sum())
    return correct / len(data[0]), robust / len(data[0])


def _keep_networks(
    keeper: Keeper,
    defense: Defense,
    nets: Nets,
    average: nn.Module | None,
    progress: _Progress,
    config: TrainConfig,
) -> None:
    """Hand over the networks that this epoch made best or last."""
    log, epoch = progress.history[-1], progress.epoch - 1
    others = [name for name in defense.trained if name != "student"]
    is_last = progress.epoch == config.epochs
    if log.score is not None and log.score >= progress.best:  # the later one of two equals
        progress.best = log.score
        keeper.save_network("best", nets["student"], epoch)
        for name in others:  # the partner of the best student
            keeper.save_network(name, nets[name], epoch)
    if average is not None and log.swa_score is not None and log.swa_score >= progress.swa_best:
        progress.swa_best = log.swa_score
        keeper.save_network("swa", average, epoch)
    if is_last:
        keeper.save_network("last", nets["student"], epoch)
        if average is not None:
            keeper.save_network("swa-last", average, epoch)
        if config.select == "last":
            for name in others:
                keeper.save_network(name, nets[name], epoch)


def _state(
    progress: _Progress,
    nets: Nets,
    optimizers: dict[str, torch.optim.SGD],
    defense: Defense,
    memory: Nets,
) -> dict[str, Any]:
    return {
        "epoch": progress.epoch,
        "history": [asdict(log) for log in progress.history],
        "best": progress.best,
        "swa_best": progress.swa_best,
        "average": progress.average.state_dict(),
        "nets": {name: nets[name].state_dict() for name in defense.trained},
        "memory": {name: module.state_dict() for name, module in memory.items()},
        "optimizers": {name: opt.state_dict() for name, opt in optimizers.items()},
    }


def _restore(
    state: dict[str, Any] | None,
    defense: Defense,
    nets: Nets,
    optimizers: dict[str, torch.optim.SGD],
    memory: Nets,
) -> _Progress:
    progress = _Progress()
    if state is None:
        return progress
    progress.epoch = state["epoch"]
    progress.history = [EpochLog(**log) for log in state["history"]]
    progress.best, progress.swa_best = state["best"], state["swa_best"]
    progress.average.load_state_dict(state["average"])
    for name in defense.trained:
        nets[name].load_state_dict(state["nets"][name])
        optimizers[name].load_state_dict(state["optimizers"][name])
    for name, module in memory.items():
        module.load_state_dict(state["memory"][name])
    return progress
