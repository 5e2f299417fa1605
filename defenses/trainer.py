"""fit: the only training loop.

    for epoch in epochs:                          # seeded by (seed, epoch): resumes exactly
        for x, y in shuffled, augmented batches:  # on the device
            now = defense.at(moment)                                # schedules of the method
            x_adv = now.craft(views, x, y)                          # inner maximization
            with now.perturbed(views, objective):                   # AWP and the like
                losses = now.loss(views, x, x_adv, y)
                losses.total.backward()
                for every trained network: optimizer.step()
            now.after_step(views, x, y, losses)
            update the averages of every step     # EMA, from ema_start on
        now.after_epoch(views)
        update the averages of every epoch        # SWA, from swa_start on
        measure student and averages              # clean and PGD, on the selection split
        analyze the networks together             # Rob_f, on the selection split
        keep best, last, swa, ema, ..., peer      # networks
        keep the state                            # optimizers, averages, memory, history
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robench import signals
from robench.attacks.base import frozen, memory_format
from robench.attacks.gradient import PGD
from robench.attacks.memory import Batches
from robench.attacks.threat import ThreatModel
from robench.defenses.averaging import Average, MovingAverage, WeightAverage
from robench.defenses.base import Defense, Moment, Nets, clean_logits, take_step
from robench.defenses.config import TrainConfig as TrainConfig
from robench.defenses.config import make_optimizer
from robench.defenses.distributed import ReadOnly, Team
from robench.defenses.fast import accelerated
from robench.defenses.feed import Pixels, shuffled, steps_of
from robench.defenses.history import EpochLog as EpochLog
from robench.defenses.history import findings
from robench.defenses.keeping import Keeper as Keeper
from robench.defenses.keeping import Progress, UnderWay, keep_networks
from robench.errors import RobenchError
from robench.randomness import generators, seeded, set_generators

EVAL_BATCH = 500
CHECK_EVERY = 50  # steps between looks at the losses: each look waits for the device
ALONE = Team()
Augment = Callable[[Tensor], Tensor]
Data = tuple[Pixels, Tensor]  # images (N, C, H, W) in [0, 1] and labels (N,)
Analysis = Callable[[Nets, Data], dict[str, tuple[float, float]]]


class TrainingFailed(RobenchError):
    """A training went wrong by itself; other cells of the matrix are not concerned."""


class Watcher:
    """Told how the training goes. This one does not care."""

    def begin(self, history: Sequence[EpochLog]) -> None:
        """Once, first: the epochs before an interruption."""

    def step(self, epoch: int, step: int, steps: int) -> None:
        """`step` of `steps` steps of the epoch are over."""

    def losses(self, means: Mapping[str, float]) -> None:
        """Every CHECK_EVERY steps: the mean of each part of the loss since the last look."""

    def epoch(self, log: EpochLog) -> None:
        """The epoch is over, and is kept."""

    def warn(self, text: str) -> None:
        """Something looks wrong, in one line; the training goes on."""

    def end(self) -> None:
        """Once, last, also after an error."""


@dataclass(frozen=True)
class _Training:
    """What does not change in one call of `fit`.

    nets: the networks themselves: optimizers, averages, checkpoints and selection are theirs.
    views: what the defense sees, memory included.
    """

    defense: Defense
    nets: Nets
    views: Nets
    train: Data
    augment: Augment
    config: TrainConfig
    keeper: Keeper
    watcher: Watcher
    team: Team

    @property
    def student(self) -> nn.Module:
        return self.nets["student"]

    def clean_batches(self) -> Iterator[Tensor]:
        return (self.augment(x) for x, _ in shuffled(self.train, self.config.batch_size))


def fit(
    defense: Defense,
    nets: Nets,
    train: Data,
    config: TrainConfig,
    *,
    threat: ThreatModel,
    keeper: Keeper,
    selection: Data | None = None,
    augment: Augment = lambda x: x,
    analyze: Analysis = lambda nets, data: {},
    seed: int = 0,
    watcher: Watcher | None = None,
    team: Team = ALONE,
) -> list[EpochLog]:
    """Train `nets` in place and leave the checkpoints with `keeper`. Goes on where it stopped.

    Args:
        defense: the method; its `trained` networks move, its `given` ones do not.
        nets: one network per name in `trained` and `given`, all on the device of the data.
        train: images (N, C, H, W) in [0, 1] and labels (N,), resident on the device; or images
            that are read when a batch needs them, and come on the device.
        threat: of the selection attack.
        selection: images and labels on which the best epoch is chosen; None if select is last.
        augment: a batch of images to a batch of images, random through torch's generator.
        analyze: from the trained and given networks and the selection to `EpochLog.rob_f`, in
            every epoch that is measured; it leaves the networks as they are.
        team: of several processes, each calls this with the same arguments but for the device;
            batches are split among them. The first one tells `watcher` and saves with `keeper`.

    Returns:
        One log per epoch, those before an interruption included.

    Raises:
        TrainingFailed: a loss was NaN or infinite. State and networks of the epoch before stay.
        UsageError: the state is of another version of robench.
    """
    if watcher is None or not team.leads:
        watcher = Watcher()
    if not team.leads:
        keeper = ReadOnly(keeper)
    with ExitStack() as endings:
        endings.callback(watcher.end)
        for name in defense.given:
            nets[name].eval().requires_grad_(False)
        for handle in team.unite(nets):
            endings.callback(handle.remove)
        views = accelerated(nets, config.precision, train[0][:8])
        classes = clean_logits(nets["student"], train[0][:1]).shape[1]
        memory = {name: module.eval().requires_grad_(False)
                  for name, module in defense.memory(views, classes).items()}
        progress = Progress(
            nets={name: nets[name] for name in defense.trained},
            optimizers={name: make_optimizer(config, nets[name]) for name in defense.trained},
            memory=memory,
            averages=_averages(config, nets["student"]),
        )
        state = keeper.load_state()
        if state is not None:
            progress.load_state_dict(state)
        views |= memory
        run = _Training(defense, nets, views, train, augment, config, keeper, watcher, team)
        attack = PGD(threat, config.select_steps, config.select_step_size)
        watcher.begin(progress.history)
        for name in sorted(nets):
            if config.precision == "bf16" and views[name] is nets[name]:
                watcher.warn(f"the {name} is no network for bf16: it is computed as it is")
        while progress.epoch < config.epochs:
            with seeded(seed, "epoch", progress.epoch):
                with signals.at_steps():
                    log = _epoch(run, progress)
                averaged = _averaged(run, progress)
            if selection is not None and config.measures(log.epoch):
                log = _measured(log, run.student, averaged, selection, attack, seed)
                log = replace(log, rob_f=analyze(nets, selection))
            progress.history.append(log)
            keep_networks(keeper, progress, averaged, config)
            keeper.save_state(progress.state_dict())
            watcher.epoch(log)
            for finding in findings(progress.history):
                watcher.warn(finding)
    return progress.history


def _averages(config: TrainConfig, student: nn.Module) -> dict[str, Average]:
    averages: dict[str, Average] = {}
    if config.swa_start is not None:
        averages["swa"] = WeightAverage()
    if config.ema is not None:
        averages["ema"] = MovingAverage(student, config.ema)
    return averages


def _epoch(run: _Training, progress: Progress) -> EpochLog:
    """One pass over the training images; returns its log without accuracies.

    A signal ends it after a step, and that step is kept.
    """
    config, epoch, size = run.config, progress.epoch, run.config.batch_size
    begun, progress.under_way = progress.under_way, UnderWay()
    started = time.perf_counter() - begun.seconds
    seen, steps = begun.seen, steps_of(len(run.train[1]), size)
    images = min(len(seen) * size, len(run.train[1]))
    layout = memory_format(run.student)
    moving = [average for name, average in progress.averages.items()
              if average.every_step and config.averages(epoch, name)]
    for net in progress.nets.values():
        net.train()

    def at(step: int) -> tuple[float, Moment]:
        lr = config.lr_of(epoch, step, steps)
        return lr, Moment(epoch, config.epochs, step, steps, lr / config.lr)

    batches = shuffled(run.train, size, start=len(seen))
    if begun.generators:
        set_generators(begun.generators, run.train[1].device)
    for step, (clean, y) in enumerate(batches, start=len(seen)):
        x = run.augment(clean).contiguous(memory_format=layout)
        lr, moment = at(step)
        for optimizer in progress.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
        now, own_x, own_y = run.team.split(run.defense.at(moment), x, y)
        losses = take_step(now, run.views, progress.optimizers.values(), own_x, own_y, config.clip)
        for average in moving:
            average.update(run.student)
        parts = {"total": losses.total, **losses.parts}
        seen.append({name: value.detach() for name, value in parts.items()})
        images += len(y)
        run.watcher.step(epoch, step + 1, steps)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            run.watcher.losses(_look(seen[step // CHECK_EVERY * CHECK_EVERY :], epoch, step))
        if signals.waiting() and run.team.size == 1:  # several are not stopped at the same step
            progress.under_way = UnderWay(seen, time.perf_counter() - started,
                                          generators(run.train[1].device))
            run.keeper.save_state(progress.state_dict())
        signals.step()
    lr, moment = at(steps - 1)
    with torch.no_grad():
        run.defense.at(moment).after_epoch(run.views)
    means = {name: torch.stack([s[name] for s in seen]).mean().item() for name in seen[0]}
    return EpochLog(epoch, lr, time.perf_counter() - started, means, images=images)


def _look(seen: list[dict[str, Tensor]], epoch: int, last: int) -> dict[str, float]:
    """The mean of each part over the steps up to `last`, with one transfer from the device.

    Raises TrainingFailed if a total is not finite.
    """
    rows = torch.stack([torch.stack(list(s.values())) for s in seen]).cpu()
    finite = rows[:, 0].isfinite()  # the total
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        parts = {name: f"{value:.4g}" for name, value in zip(seen[bad], rows[bad].tolist(),
                                                             strict=True)}
        kept = f"the state after epoch {epoch - 1} is kept" if epoch else "no epoch was finished"
        raise TrainingFailed(
            f"the loss is not finite in epoch {epoch}, step {last - len(seen) + 1 + bad} "
            f"({parts}); {kept}. Try a smaller learning rate (--set lr=...)"
        )
    return dict(zip(seen[0], rows.mean(0).tolist(), strict=True))


def _averaged(run: _Training, progress: Progress) -> dict[str, nn.Module]:
    """The networks of the averages that have begun, at the end of an epoch."""
    networks = {}
    for name, average in progress.averages.items():
        if run.config.averages(progress.epoch, name):
            if not average.every_step:
                average.update(run.student)
            networks[name] = average.network(run.student, run.clean_batches())
    return networks


def _measured(
    log: EpochLog,
    student: nn.Module,
    averaged: Mapping[str, nn.Module],
    selection: Data,
    attack: PGD,
    seed: int,
) -> EpochLog:
    """The log with the accuracies of the student and of the averages."""
    scores = {}
    for name, net in {"student": student, **averaged}.items():
        with seeded(seed, "selection"):  # the same in every epoch: epochs are compared, not draws
            scores[name] = accuracies(net, selection, attack)
    clean, robust = scores.pop("student")
    return replace(log, clean=clean, robust=robust, averages=scores)


def accuracies(
    net: nn.Module, data: Data, attack: PGD
) -> tuple[float, float]:
    """Clean and attacked accuracy in [0, 1]; what is wrong when clean is not attacked."""
    correct, robust, batches = 0, 0, Batches(EVAL_BATCH)
    for start in range(0, len(data[0]), EVAL_BATCH):
        x, y = data[0][start : start + EVAL_BATCH], data[1][start : start + EVAL_BATCH]
        with frozen(net), torch.no_grad():
            right = batches(net, x).argmax(1) == y
            x, y = x[right], y[right]
            correct += len(x)
            if len(x):
                robust += int((batches(net, attack(net, x, y)).argmax(1) == y).sum())
    return correct / len(data[0]), robust / len(data[0])
