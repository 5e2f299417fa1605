"""What is known of a network under attack: the fields of its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robench.attacks.base import frozen
from robench.attacks.gradient import PGD
from robench.attacks.memory import Batches
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import full_precision
from robench.benchmark.cells import Cell, selection_of
from robench.benchmark.checkpoints import Header, weights_sha256
from robench.benchmark.result import Result
from robench.benchmark.spec import digest
from robench.reports.record import Epoch


@dataclass(frozen=True)
class Subject:
    """A network under attack, and the part of its records that does not change."""

    net: nn.Module
    folder: Path  # where its measurements are kept
    label: str
    facts: dict[str, Any]

    images: Tensor  # (8, C, H, W) for the fingerprint
    warnings: tuple[str, ...] = ()  # about the network as it came

    @cached_property
    def weights(self) -> str:
        return weights_sha256(self.net)

    @cached_property
    def fingerprint(self) -> tuple[float, ...]:
        """The largest logit of each image: the same weights may be used in another way."""
        with torch.no_grad(), frozen(self.net), full_precision():
            top = Batches(len(self.images))(self.net, self.images).amax(1)
        return tuple(float(f"{value:.6g}") for value in top.tolist())


def cell_facts(
    cell: Cell, header: Header, teachers: Mapping[str, nn.Module], *, ranked: bool
) -> dict[str, Any]:
    """The fields of a `Record` on one checkpoint of a trained cell; ranked: a row of tables."""
    spec, result = cell.spec, cell.result()
    assert result is not None, "records are of trained cells"
    return {
        "run": spec.key(),
        "seed": spec.seed,
        "model": str(spec.model),
        "source": "trained",
        "defense": spec.defense,
        "defense_config": spec.config,
        "recipe": spec.recipe,
        "epochs": spec.train.epochs,
        "train_seconds": result.seconds,
        "teacher_seconds": cell.teacher_seconds(),
        **result.overfitting(header.checkpoint),
        "selection": selection_of(spec.train),
        "checkpoint": header.checkpoint,
        "epoch": header.epoch,
        "ranked": ranked,
        "baseline": cell.baseline,
        "teacher_sha256": {name: weights_sha256(teacher) for name, teacher in teachers.items()},
        "notes": spec.notes,
    }


def epochs(cell: Cell, result: Result, tested: int) -> list[Epoch]:
    """The rows of a training; tested: images of the test split, on which some recipes select."""
    spec = cell.spec
    train, threat = spec.train, ThreatModel.parse(spec.threat)
    images, data_sha256 = {
        "val": (train.validation, spec.data_sha256),
        "test": (tested, spec.selection_sha256),
        "last": (None, ""),
    }[train.select]
    attack = PGD(threat, train.select_steps, train.select_step_size)
    config = {"steps": attack.steps, "step_size": attack.size, "start": attack.start}
    return [
        Epoch(
            run=spec.key(), seed=spec.seed, dataset=spec.dataset, model=str(spec.model),
            defense=spec.defense, recipe=spec.recipe, epoch=log.epoch, lr=log.lr,
            seconds=log.seconds, losses=log.losses, selection=train.select,
            clean=log.clean, robust=log.robust, averages=log.averages, rob_f=log.rob_f,
            created=result.created, settings=digest(spec.config), threat=spec.threat,
            attack=f"pgd-{config['steps']}", attack_config=config, n=images,
            data_sha256=data_sha256,
        )
        for log in result.history
    ]
