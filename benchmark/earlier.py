"""What earlier runs have left in a folder: which files are there, and how long they took."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import Cell
from robench.benchmark.checkpoints import Header, read_header
from robench.benchmark.graph import Estimate, Pair, Span
from robench.benchmark.kept import Place, shard_path, transfers_path
from robench.benchmark.spec import CellSpec, RunSpec
from robench.errors import UsageError
from robench.reports.record import Record

Line = dict[str, str]
Model = TypeVar("Model", bound=BaseModel)
SPEED = Path("runs/speed")  # where `robench speed` writes
# What is taken from a line of it; in capitals what is a number.
_TRAINED = ("dataset", "defense", "model", "contender", "device", "IMAGES_PER_SECOND")
_ATTACKED = ("attack", "contender", "dataset", "device", "network", "SECONDS", "N")


@dataclass(frozen=True)
class Kept:
    """The files of a folder, read once.

    Attributes:
        cells: of finished trainings: what they are, their seconds and epochs, and on what kind of
            device their networks were measured, "" if none was. What is damaged is left out.
        records: by the names of the cells' folders. attacks: the same by data set, model, kind of
            device and attack. peaks: most bytes, by data set, model and kind of device.
        weights: hashes by checkpoint, as far as somebody asked for them.
        speed_train, speed: lines of `robench speed`.
    """

    cells: list[tuple[CellSpec, float, int, str]] = field(default_factory=list)
    records: dict[str, list[Record]] = field(default_factory=dict)
    attacks: dict[tuple[str, ...], list[Record]] = field(default_factory=dict)
    peaks: dict[tuple[str, ...], int] = field(default_factory=dict)
    weights: dict[Path, str | None] = field(default_factory=dict)
    speed_train: list[Line] = field(default_factory=list)
    speed: list[Line] = field(default_factory=list)

    @classmethod
    def read(cls, out: Path) -> Kept:
        kept = cls()
        for folder in sorted(out.glob("cells/*")):
            records = [record for path in sorted(folder.glob("eval/*.json"))
                       if not path.name.startswith("rob_f") and (record := _read(path, Record))]
            kept.records[folder.name] = records
            for record in records:
                where = (record.dataset, record.model, _kind(record.device))
                kept.attacks.setdefault((*where, record.attack), []).append(record)
                kept.peaks[where] = max(kept.peaks.get(where, 0), record.peak_bytes)
            spec, done = _read(folder / "spec.json", CellSpec), _read(folder / "done.json", _Done)
            if spec and done:
                kinds = [_kind(record.device) for record in records]
                kept.cells.append((spec, done.seconds, len(done.history),
                                   kinds[0] if kinds else ""))
        for place in dict.fromkeys((out / "speed", SPEED)):
            kept.speed_train.extend(_csv(place / "speed-train.csv", _TRAINED))
            kept.speed.extend(_csv(place / "speed.csv", _ATTACKED))
        return kept

    def weights_of(self, folder: Path, checkpoint: str) -> str | None:
        """The hash of a checkpoint, as a record says it; the best and the last may be one."""
        path = folder / f"{checkpoint}.safetensors"
        if path not in self.weights:
            self.weights[path] = None
            header = _header(path)
            for record in self.records.get(folder.name, []) if header else []:
                if header and (_family(record.checkpoint), record.epoch) == (
                        _family(checkpoint), header.epoch):
                    self.weights[path] = record.weights_sha256
                    break
        return self.weights[path]

    def hashes(self, dataset: str, n: int) -> list[str]:
        """Of the first n test images, as far as an evaluation says it."""
        return list(dict.fromkeys(
            record.data_sha256 for records in self.records.values() for record in records
            if (record.dataset, record.n) == (dataset, n)))


class _Done(BaseModel):
    """Of a done.json, what tells how long a training takes."""

    seconds: float = Field(ge=0, allow_inf_nan=False)
    history: list[Any]


def _read(path: Path, kind: type[Model]) -> Model | None:
    """None for a file that is not there or damaged: it is of no help here."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _csv(path: Path, names: Sequence[str]) -> list[Line]:
    """The lines that have these columns; the names in capitals are of positive numbers."""
    try:
        lines = list(csv.DictReader(path.read_text().splitlines()))
    except (OSError, ValueError, csv.Error):
        return []
    return [line for line in lines if all(
        _positive(line.get(name.lower())) if name.isupper() else line.get(name) for name in names)]


def _positive(text: str | None) -> bool:
    try:
        return 0 < float(text or "") < math.inf
    except ValueError:
        return False


def _kind(device: str) -> str:
    return device.partition(":")[0]


@dataclass(frozen=True)
class Earlier:
    """What is known before a request is run: `graph.Known`.

    Attributes:
        device: "cpu" or "cuda"; times of other devices tell nothing.
        images, classes: of the training set. data: hashes of the first n test images.
        test: how many there are.
    """

    spec: RunSpec
    kept: Kept
    device: str
    threats: Sequence[ThreatModel]
    images: int
    classes: int
    test: int
    data: Callable[[int], Iterable[str]]

    def trained(self, cell: Cell) -> bool:
        return cell.result() is not None

    def attacked(
        self, cell: Cell, checkpoint: str, pair: Pair, span: Span | None = None
    ) -> bool:
        spec, threat, _ = pair
        weights = self.kept.weights_of(cell.folder, checkpoint)
        if weights is None:
            return False
        place = Place(cell.folder / "eval", weights, "trained", str(cell.spec.model), self.classes,
                      cell.spec.seed, self.spec.batch_size)
        wanted = [".json", ".npz", *([".safetensors"] if self.spec.keep_examples else [])]
        paths = (place.record(spec, threat, sha256)
                 for sha256 in self.data(min(spec.limit or self.test, self.test)))
        if span is not None:  # one without examples is made again where they are wanted
            there = any(shard_path(path, span).exists() for path in paths)
            return there and not self.spec.keep_examples
        return any(all(path.with_suffix(suffix).exists() for suffix in wanted) for path in paths)

    def transferred(self, cell: Cell) -> bool:
        return any(all(transfers_path(cell.folder, threat, sha256).exists()
                       for threat in self.threats) for sha256 in self.data(self.test))

    def training(self, cell: Cell) -> Estimate:
        spec, memory = cell.spec, self.kept.peaks.get(self._where(cell))
        options = json.loads(json.dumps(spec.options))
        rates = [seconds / epochs for known, seconds, epochs, device in self.kept.cells
                 if epochs and device in ("", self.device) and (
                     known.dataset, known.defense, known.options, known.model.name,
                     known.train_limit) == (
                     spec.dataset, spec.defense, options, spec.model.name, spec.train_limit)]
        if rates:
            return Estimate(fmean(rates) * spec.train.epochs, _of(rates, "training"), memory)
        speeds = [float(line["images_per_second"]) for line in self.kept.speed_train
                  if _kind(line["device"]) == self.device and (
                      line["dataset"], line["defense"], line["model"], line["contender"]) == (
                      spec.dataset, spec.defense, spec.model.name,
                      f"robench, {spec.train.precision}")]
        if speeds:  # without the passes that select a checkpoint
            images = min(spec.train_limit or self.images, self.images - spec.train.validation)
            return Estimate(spec.train.epochs * images / max(speeds), "robench speed train", memory)
        return Estimate(memory=memory)

    def attack(self, cell: Cell, pair: Pair, images: int) -> Estimate:
        spec, threat, _ = pair
        where, n = self._where(cell), min(spec.limit or images, images)
        memory, of_attack = self.kept.peaks.get(where), self.kept.attacks.get(
            (*where, spec.label), [])
        same = [record for record in of_attack if record.threat == str(threat)]
        rates = [record.seconds / record.n for record in same or of_attack]
        if rates:
            return Estimate(fmean(rates) * n, _of(rates, "record"), memory)
        for line in self.kept.speed:
            contender = f"robench, {spec.options.get('precision', 'exact')}"
            if (line["attack"], line["contender"], line["dataset"], _kind(line["device"])) == (
                    spec.label.partition(",")[0], contender, cell.spec.dataset, self.device) and (
                    header := _header(Path(line["network"]))) and header.model == cell.spec.model:
                seconds = float(line["seconds"]) / float(line["n"]) * n
                return Estimate(seconds, "robench speed attack", memory)
        return Estimate(memory=memory)

    def _where(self, cell: Cell) -> tuple[str, str, str]:
        return cell.spec.dataset, str(cell.spec.model), self.device


def _family(checkpoint: str) -> str:
    """The network behind a checkpoint: "student", an average or a partner."""
    return "student" if checkpoint in ("best", "last") else checkpoint.removesuffix("-last")


def _header(path: Path) -> Header | None:
    try:
        return read_header(path) if path.suffix == ".safetensors" and path.exists() else None
    except UsageError:  # damaged: who needs it will say so
        return None


def _of(rates: Sequence[float], what: str) -> str:
    return f"{len(rates)} earlier {what}{'s' if len(rates) > 1 else ''}"
