"""Cells: the training runs of a matrix, each in a folder named by the hash of its spec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch import nn

from robench.attacks.memory import out_of_memory
from robench.attacks.threat import ThreatModel
from robench.benchmark.checkpoints import CellFolder, Header, load_checkpoint, weights_sha256
from robench.benchmark.checks import check_logits
from robench.benchmark.data import Dataset, hold_out
from robench.benchmark.logs import Run, Several, TrainingCsv, find_watcher, start_watcher
from robench.benchmark.models import MODELS, source_hash
from robench.benchmark.outline import Outline
from robench.benchmark.probe import advice
from robench.benchmark.progress import EpochWatcher, Message, Remote, Reporter, Update, relayed
from robench.benchmark.provenance import now
from robench.benchmark.recipe import (
    ModelSpec,
    Settings,
    default_threat,
    documented,
    load_recipe,
    settings_for,
    train_config,
)
from robench.benchmark.result import Result
from robench.benchmark.sources import Network, pick_device
from robench.benchmark.spec import CellSpec, RunSpec
from robench.benchmark.transfer import rob_f_shares
from robench.defenses.base import DEFENSES, Defense, Moment, make_defense, options_of
from robench.defenses.config import TrainConfig
from robench.defenses.distributed import Team, check_splits
from robench.defenses.launch import check_devices, launch
from robench.defenses.trainer import ALONE, TrainingFailed, Watcher, fit
from robench.errors import UsageError
from robench.randomness import seeded

SMOKE_IMAGES = 32


@dataclass(frozen=True)
class Cell:
    """One training run: what it is, where it lies, and whose teaching it needs."""

    spec: CellSpec
    defense: Defense
    folder: Path
    teachers: Mapping[str, Cell | Network]
    header: Header
    baseline: bool = False
    logs: tuple[str, ...] = ()  # of --log
    devices: int = 1  # that train it together

    @property
    def label(self) -> str:
        return f"{self.spec.defense} seed {self.spec.seed}"

    @property
    def ranked(self) -> tuple[str, ...]:
        return self.spec.train.ranked

    @property
    def others(self) -> tuple[str, ...]:
        """The checkpoints that are kept and measured, but are no rows of the leaderboard."""
        return self.spec.train.unranked + self.partners

    @property
    def partners(self) -> tuple[str, ...]:
        """The networks that are trained with the student."""
        return tuple(name for name in self.defense.trained if name != "student")

    @property
    def crossed(self) -> bool:
        """Whether there are networks for the Rob_f analysis."""
        return bool(self.partners or self.teachers)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return (*self.ranked, *self.others)

    def keeper(self, device: torch.device) -> CellFolder:
        return CellFolder(self.folder, self.header, device)

    def result(self) -> Result | None:
        """What the finished training left; None if it is not finished."""
        path = self.folder / "done.json"
        try:
            return Result.read(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except Exception:  # damaged bytes may raise anything in a parser
            raise UsageError(f"{path} is damaged: delete {self.folder} to train again") from None

    def network(self, checkpoint: str, device: torch.device) -> tuple[nn.Module, Header]:
        net, header = load_checkpoint(self.folder / f"{checkpoint}.safetensors",
                                      self.spec.model.name)
        return net.to(device), header

    def teacher_seconds(self) -> float:
        """Training time of all teachers, theirs included."""
        total = 0.0
        for teacher in self.teachers.values():
            if isinstance(teacher, Cell):
                result = teacher.result()
                total += (result.seconds if result else 0.0) + teacher.teacher_seconds()
        return total

    def teacher_networks(self, device: torch.device) -> dict[str, nn.Module]:
        """The given networks. Raises TrainingFailed while one of them is not trained."""
        for name, teacher in self.teachers.items():
            if isinstance(teacher, Cell) and teacher.result() is None:
                raise TrainingFailed(f"its {name} ({teacher.label}) is not trained")
        return {
            name: teacher.network(teacher.ranked[0], device)[0]
            if isinstance(teacher, Cell)
            else teacher.net.to(device)
            for name, teacher in self.teachers.items()
        }


def plan(
    spec: RunSpec, data: Dataset | Outline, teacher: Network | None
) -> tuple[list[Cell], list[Cell]]:
    """(cells to train in order, teachers first; those among them that are rows).

    Of an outline the networks are not tried, and their keys depend on a hash that may be missing.
    Raises UsageError for unknown names and for settings that the recipe does not have.
    """
    if spec.devices > 1:
        check_devices(spec.devices, pick_device(spec.device))
    data = Outline.of(data) if isinstance(data, Dataset) else data
    planner = _Planner(spec, data, teacher)
    baselines = _expand(spec.baselines, spec.recipe, data.name)
    names = list(dict.fromkeys([*baselines, *_expand(spec.defenses, spec.recipe, data.name)]))
    if not names:
        raise UsageError("name at least one --defense")
    for name in spec.options:
        _ = DEFENSES[name.partition("+")[0]]  # raises for an unknown one
    for name in spec.logs:
        find_watcher(name)
    rows = [planner.cell(name, seed, baseline=name in baselines)
            for name in names for seed in dict.fromkeys(spec.seeds)]
    takers = [cell for cell in planner.cells.values() if "teacher" in cell.defense.given]
    if teacher is not None and not takers:
        raise UsageError("--teacher: none of these defenses takes a teacher")
    return list(planner.cells.values()), rows


def _expand(names: tuple[str, ...], recipe: str, dataset: str) -> list[str]:
    """`all` is every defense that the recipe documents for the data set."""
    everything = [name for name in DEFENSES.names() if documented(recipe, name, dataset)]
    return [n for name in names for n in (everything if name == "all" else [name])]


class _Planner:
    def __init__(self, spec: RunSpec, data: Outline, teacher: Network | None) -> None:
        self.spec, self.data, self.teacher = spec, data, teacher
        self.cells: dict[str, Cell] = {}
        self.code: dict[ModelSpec, str] = {}  # of the networks that were built and tried

    def cell(
        self, name: str, seed: int, *, baseline: bool = False, recipe: str | None = None
    ) -> Cell:
        """The cell of a defense, after those of its teachers; the same one for the same spec.

        recipe: in the place of the run's.
        """
        spec, data = self.spec, self.data
        recipe = recipe or spec.recipe
        settings = settings_for(recipe, name, data.name)
        model = settings.model
        if isinstance(model, str):
            model = ModelSpec(name=model)
        if spec.model is not None and (model is None or spec.model != model.name):
            model = ModelSpec(name=spec.model)
        if model is None:
            raise UsageError(f"recipe {recipe!r} names no model for {name!r}: add --model")
        # A method's official code trains at its own eps; the evaluation is at the run's.
        released = load_recipe(recipe).method_threat(name, data.name)
        threat = ThreatModel.parse(released or [*spec.threats, default_threat(data.name)][0])
        train = self._train_config(settings)
        defense = make_defense(name, threat, **{**settings.options, **spec.options.get(name, {})})
        if not spec.smoke and not defense.begun(Moment(train.epochs - 1, train.epochs)):
            raise UsageError(f"{name} would not have begun when the last of {train.epochs} epochs "
                             "does: take more epochs, or let it begin earlier (see its card)")
        if spec.devices > 1:
            check_splits(name, defense)
        teachers: dict[str, Cell | Network] = {
            role: (self.teacher if role == "teacher" else None)
            or self._taught(role, name, taught_by, seed)
            for role, taught_by in defense.given.items()
        }
        header = Header(
            model=model, classes=data.classes, channels=data.channels, size=data.size,
            dataset=data.name, defense=name, recipe=recipe, seed=seed, checkpoint="", epoch=-1,
            selection=selection_of(train),
        )
        cell_spec = CellSpec(
            dataset=data.name, data_sha256=data.train_sha256, model=model, defense=name,
            options=options_of(defense), threat=str(threat), recipe=recipe, train=train,
            train_limit=SMOKE_IMAGES * 2 if spec.smoke else spec.train_limit,
            seed=seed,
            teachers={role: teacher.spec.key() if isinstance(teacher, Cell)
                      else weights_sha256(teacher.net) for role, teacher in teachers.items()},
            augment=data.augment,
            code=self._try(header),
            selection_sha256=data.test_sha256() if train.select == "test" else "",
            notes=(*settings.notes, *(
                f"its {role} is trained by the recipe {teacher.spec.recipe}"
                for role, teacher in teachers.items()
                if isinstance(teacher, Cell) and teacher.spec.recipe != recipe)),
        )
        key = cell_spec.key()
        cell = Cell(
            spec=cell_spec,
            defense=defense,
            folder=spec.out / "cells" / key,
            teachers=teachers,
            header=header,
            baseline=baseline,
            logs=spec.logs,
            devices=spec.devices,
        )
        together = (cell.result() or cell).devices  # that have trained it, or will
        if together > 1:  # rounding differs, so one may want to know
            notes = (*cell_spec.notes, f"trained on {together} devices together")
            cell = replace(cell, spec=cell_spec.model_copy(update={"notes": notes}))
        if key not in self.cells or baseline:
            self.cells[key] = cell
        return cell

    def _taught(self, role: str, name: str, taught_by: str, seed: int) -> Cell:
        """The cell of a teacher that nobody brought."""
        recipe = self.spec.recipe
        if not documented(recipe, taught_by, self.data.name):
            recipe = "unified"  # official code has such a network from elsewhere
        try:
            return self.cell(taught_by, seed, recipe=recipe)
        except UsageError as error:
            raise UsageError(f"{name!r} needs a {role}, by default one trained by {taught_by!r}: "
                             f"{error}; or bring one: --teacher") from None

    def _try(self, header: Header) -> str:
        """Build a network once and look at its logits; returns the hash of a user's source."""
        model = header.model
        if model not in self.code:
            self.code[model], sample = "", self.data.sample
            if sample is None and not model.is_foreign:
                _ = MODELS[model.name]  # raises for an unknown one
                return ""
            with seeded(0, "try"):
                net = header.build()
            if sample is not None:
                check_logits(net, sample, torch.tensor([header.classes - 1]))
            if model.is_foreign:
                self.code[model] = source_hash(net, model.name)
        return self.code[model]

    def _train_config(self, settings: Settings) -> TrainConfig:
        """The recipe's, overridden by the request."""
        overrides = dict(self.spec.train)
        if self.spec.epochs is not None:
            overrides["epochs"] = self.spec.epochs
        if self.spec.smoke:
            overrides |= {"epochs": 1, "batch_size": SMOKE_IMAGES, "validation": SMOKE_IMAGES}
            # Averages of the one epoch there is.
            overrides |= {name: 0 for name in ("swa_start", "ema_start")
                          if settings.train.get(name)}
            if {**settings.train, **overrides}.get("select") == "test":
                overrides["select"] = "val"  # the test set may be large
        config, n = train_config(settings, overrides), self.data.train
        if config.select == "test" and settings.train.get("select") != "test":
            raise UsageError("train.select: test is for recipes that repeat a paper which did so, "
                             f"{self.spec.recipe!r} does not here: use val or last")
        if config.select == "val" and not config.validation:
            raise UsageError("select: val needs validation images: set train.validation above 0")
        if config.validation >= n:
            raise UsageError(f"train.validation: cannot hold out {config.validation} of {n} images")
        for name, start in config.starts.items():
            if start >= config.epochs:
                off = "swa_start" if name == "swa" else name
                raise UsageError(f"train.{name}_start: {config.epochs} epochs end before epoch "
                                 f"{start}; add --set {name}_start=0.5, or {off}=null for none")
        return config


def selection_of(train: TrainConfig) -> str:
    """How records name the split on which the checkpoint was chosen."""
    return "none" if train.select == "last" else train.select


def train(cell: Cell, dataset: Dataset, device: torch.device, reporter: Reporter) -> Result:
    """Train a cell, or go on with it, or take what is there. Raises RobenchError on NaN."""
    if cell.result() is None and cell.devices == 1:
        _train(cell, dataset, device, reporter)
    elif cell.result() is None:
        with relayed(reporter) as messages:
            launch(device.type, cell.devices, _train_together, cell, dataset, messages)
    result = cell.result()
    assert result is not None, "a training that does not fail leaves its result"
    return result


def _train_together(
    team: Team, device: torch.device, cell: Cell, dataset: Dataset, messages: Queue[Message]
) -> None:
    """What each of several processes does."""
    _train(cell, dataset, device, Remote(messages) if team.leads else Reporter(quiet=True), team)


def _train(
    cell: Cell, dataset: Dataset, device: torch.device, reporter: Reporter, team: Team = ALONE
) -> None:
    config, seed, threat = cell.spec.train, cell.spec.seed, ThreatModel.parse(cell.spec.threat)
    data, held_out = dataset.train, None
    if config.validation:
        data, held_out = hold_out(data, config.validation)
    data = data.take(min(cell.spec.train_limit or len(data), len(data))).fitted().to(device)
    chosen = {"val": held_out, "test": dataset.test, "last": None}[config.select]
    selection = None if chosen is None else chosen.fitted().to(device)
    keeper, fitted = cell.keeper(device), True

    def networks() -> dict[str, nn.Module]:
        nets = dict(cell.teacher_networks(device))
        for name in cell.defense.trained:
            with seeded(seed, "init", name):
                nets[name] = cell.header.build().to(device)
        return nets

    try:
        with reporter.task(f"train {cell.label}") as update:
            history = fit(
                cell.defense,
                networks(),
                (data.x, data.y),
                config,
                threat=threat,
                keeper=keeper,
                selection=None if selection is None else (selection.x, selection.y),
                augment=dataset.augment,
                analyze=partial(rob_f_shares, threat=threat, seed=seed),
                seed=seed,
                watcher=_watcher(cell, keeper, len(data), update, reporter) if team.leads
                else None,
                team=team,
            )
    except Exception as error:
        fitted = team.size > 1 or not out_of_memory(error)
        if fitted:
            raise
    if not fitted:  # here the error has let go of the tensors
        raise TrainingFailed(f"out of memory with batches of {config.batch_size}; "
                             + advice(cell.spec, cell.defense, networks, (data.x, data.y)))
    if team.leads:
        seconds = sum(log.seconds for log in history)
        keeper.write_json("done.json", asdict(Result(seconds, history, cell.devices, now())))
        (cell.folder / "state.pt").unlink(missing_ok=True)  # large, and of no more use


def _watcher(
    cell: Cell, keeper: CellFolder, images: int, update: Update, reporter: Reporter
) -> Watcher:
    """Writes down what is trained, and all that follows."""
    run = Run(cell.spec.key(), cell.label, cell.folder, cell.spec.model_dump(mode="json"))
    keeper.write_json("spec.json", run.settings)
    return Several([
        EpochWatcher(update, cell.spec.train.epochs, images,
                     lambda text: reporter.warn(f"{cell.label}: {text}")),
        TrainingCsv(cell.folder / "training.csv"),
        *(start_watcher(name, run) for name in cell.logs),
    ])
