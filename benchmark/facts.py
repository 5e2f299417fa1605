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
from robench.attacks.memory import Batches
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import full_precision
from robench.benchmark.cells import Cell, Result, selection_of
from robench.benchmark.checkpoints import Header, weights_sha256
from robench.benchmark.kept import transfer_config
from robench.benchmark.transfer import RobF
from robench.reports.record import Epoch, Transfer


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


def epochs(cell: Cell, result: Result) -> list[Epoch]:
    spec = cell.spec
    return [
        Epoch(
            run=spec.key(), seed=spec.seed, dataset=spec.dataset, model=str(spec.model),
            defense=spec.defense, recipe=spec.recipe, epoch=log.epoch, lr=log.lr,
            seconds=log.seconds, losses=log.losses, selection=spec.train.select,
            clean=log.clean, robust=log.robust, averages=log.averages, rob_f=log.rob_f,
        )
        for log in result.history
    ]


def transfers(
    cell: Cell, measured: Mapping[str, RobF], threat: ThreatModel, n: int, data_sha256: str
) -> list[Transfer]:
    """The Rob_f rows of a cell on n images."""
    spec, config = cell.spec, transfer_config(threat)
    return [
        Transfer(
            run=spec.key(), seed=spec.seed, dataset=spec.dataset, model=str(spec.model),
            defense=spec.defense, recipe=spec.recipe, checkpoint=cell.ranked[0], network=name,
            attack=f"pgd-{config['steps']}", attack_config=config, threat=str(threat), n=n,
            data_sha256=data_sha256, clean=row.clean, self_crafted=row.self_crafted,
            student_crafted=row.student_crafted, student_robust=row.student_robust,
        )
        for name, row in measured.items()
    ]
