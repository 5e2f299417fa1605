"""Measurements of earlier runs, taken as they are where they still hold."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

import robench
from robench.attacks.search import Pooled
from robench.attacks.threat import ThreatModel
from robench.benchmark.evaluate import BATCH, attack_config
from robench.benchmark.spec import AttackSpec, digest
from robench.benchmark.transfer import crafting
from robench.reports.compare import alike
from robench.reports.record import Record, Survey, Transfer

S = TypeVar("S", bound=Survey)


@dataclass(frozen=True)
class Place:
    """Where what is measured on a network is kept: files named by all that the outcome depends on.

    Attributes:
        weights: their hash. source, model: the network. classes: of the data set.
        starts: hash of examples that are looked at first, "" for none.
    """

    folder: Path
    weights: str
    source: str
    model: str
    classes: int
    seed: int
    batch_size: int | None = None
    starts: str = ""

    def record(self, spec: AttackSpec, threat: ThreatModel, data_sha256: str) -> Path:
        """The record of an attack on images with this hash."""
        attack = spec.build(threat)
        # Outside the pool, noise is drawn per batch.
        size = None if isinstance(attack, Pooled) else self.batch_size or BATCH
        identity = {
            "weights": self.weights,
            "network": [self.source, self.model],
            "attack": spec.model_dump(mode="json"),
            # defaults and versions included
            "config": attack_config(attack, self.classes),
            "batch_size": size,
            "seed": self.seed,
            "threat": str(threat),
            "data": data_sha256,
            # An upgrade may mend an attack of ours; a library's version is in its options.
            **({"robench": robench.__version__} if size is None else {}),
            **({"starts": self.starts} if self.starts else {}),
        }
        return self.folder / f"{spec.slug}-{digest(identity)}.json"


def shard_path(record: Path, span: tuple[int, int]) -> Path:
    """The file of a shard of an attack, beside its record."""
    return record.with_name(f"{record.stem}.{span[0]}-{span[1]}.npz")


def discard(record: Path) -> None:
    """Delete what an attack kept before its record was there, of any number of shards."""
    name = glob.escape(record.stem)
    for pattern in (f"{name}.*partial", f"{name}.*-*.npz"):
        for path in record.parent.glob(pattern):
            path.unlink(missing_ok=True)


def transfer_config(threat: ThreatModel) -> dict[str, object]:
    """How the examples of the Rob_f analysis are crafted."""
    ascent = crafting(threat)
    return {"steps": ascent.steps, "step_size": ascent.step_size, "start": ascent.start}


def transfers_path(folder: Path, threat: ThreatModel, data_sha256: str) -> Path:
    """The Rob_f rows of the cell in that folder."""
    identity = {"threat": str(threat), "data": data_sha256, **transfer_config(threat)}
    return folder / "eval" / f"rob_f-{digest(identity)}.json"


def kept_record(path: Path, fingerprint: tuple[float, ...]) -> Record | None:
    """The record of an earlier run, if the network still gives the same logits."""
    try:
        record = Record.model_validate_json(path.read_bytes())
        same = alike(record.fingerprint, fingerprint)
        return record if same and path.with_suffix(".npz").exists() else None
    except (OSError, ValidationError):  # not there, or damaged: measure again
        return None


def kept_transfers(path: Path) -> list[Transfer] | None:
    try:
        lines = path.read_bytes().splitlines()
        return [Transfer.model_validate_json(line) for line in lines] or None
    except (OSError, ValidationError):
        return None


def kept_survey(path: Path, kind: type[S], fingerprint: tuple[float, ...]) -> S | None:
    """The survey of an earlier run, if the network still gives the same logits."""
    try:
        survey = kind.model_validate_json(path.read_bytes())
        return survey if alike(survey.fingerprint, fingerprint) else None
    except (OSError, ValidationError):
        return None
