"""speed: how long an attack takes here and in the library that everybody uses for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from robench.attacks.base import Attack, frozen, make_attack
from robench.attacks.network import PRECISIONS, Network, Precision, searching
from robench.attacks.prepare import auto_slots
from robench.attacks.search import Pooled, Search
from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Images
from robench.benchmark.evaluate import BATCH, Flags, Target
from robench.benchmark.gauge import (
    Counter,
    PassTime,
    PeakMemory,
    Spread,
    rotating,
    time_passes,
    using_threads,
    wait,
)
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import Reporter
from robench.benchmark.provenance import environment
from robench.benchmark.references import (
    REFERENCE_BATCH,
    csv_text,
    fooled,
    machine,
    networks,
    reference,
    torchattacks_pgd,
)
from robench.benchmark.spec import RunSpec
from robench.errors import UsageError
from robench.files import write_atomic
from robench.randomness import seeded
from robench.reports.text import NOTHING, Board, Cell, Column, markdown

TASKS = ("autoattack", "pgd-20")
LIMIT = 32
TRAIN_BATCH = 64


@dataclass(frozen=True)
class Result:
    """What one run of an attack gave.

    Attributes:
        robust: (N,) looked up when the clock has stopped.
        forwards, backwards: passes of single images.
        stages: seconds of each part, where they are known.
    """

    robust: Callable[[], Flags]
    forwards: int
    backwards: int
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One timed run. peak: bytes by which memory grew; NaN where that cannot be told."""

    seconds: float
    robust: int
    forwards: int
    backwards: int
    peak: float
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One implementation, ready to run on the images of a case.

    Attributes:
        batch: images, or units, at a time.
        prepared: the network that it runs on, and passes: how long that one takes.
    """

    name: str
    run: Callable[[], Result]
    batch: int
    prepared: str
    passes: PassTime


@dataclass(frozen=True)
class Line:
    """One implementation on one network, of n images.

    Attributes:
        seconds: of the whole attack. ratio: seconds of the library / seconds of this, run by run.
        forwards, backwards: passes per image.
        forward_ms, both_ms: per image, of a forward pass, and of a forward and a backward pass.
        floor_seconds: of the passes alone. floor_share: of the seconds.
        peak_mib: by how much memory grew at most.
    """

    contender: str
    n: int
    robust: int
    seconds: Spread
    ratio: Spread
    forwards: float
    backwards: float
    forward_ms: float
    both_ms: float
    floor_seconds: float
    floor_share: float
    peak_mib: float
    batch: int
    prepared: str
    stages: dict[str, float]


def speed_attack(
    sources: Sequence[str], spec: RunSpec, *, task: str = "autoattack",
    precisions: Sequence[str] = ("exact",), repeats: int = 3, threads: int | None = None,
    train_steps: int | None = None, zoo: Path = Path("models"), quiet: bool = True,
) -> str:
    """Time ours and the library's attack in turn on the same images; write speed.csv and .md.

    Args:
        sources: networks as for `eval`; without any, and with train_steps, spec.model is
            trained that many steps by pgd-at and by standard training.
        precisions: of ours, each a contender.

    Returns the Markdown. Raises UsageError where the library is missing.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UsageError(f"unknown precision {precision!r}: write {', '.join(PRECISIONS)}")
    if task not in TASKS:
        raise UsageError(f"{task!r} has no counterpart here: write {' or '.join(TASKS)}")
    matrix = Matrix(spec, Reporter(quiet=quiet))
    _check_library(task, matrix.threat)
    data = matrix.test.take(min(spec.limit or LIMIT, len(matrix.test)))
    with using_threads(threads):
        if not sources:
            sources = _trained(spec, train_steps, matrix.reporter)
        boards, rows, text = list[Board](), list[dict[str, Any]](), ""
        for name, net in networks(matrix, sources, zoo):
            case = _Case(name, net, data, matrix, task)
            lines = case.lines(cast(Sequence[Precision], precisions), repeats)
            boards.append(_board(f"{name}: {task}", lines, case.facts))
            rows += [_row(name, task, matrix, line) for line in lines]
            text = "\n".join(["# Speed\n", *map(markdown, boards)])
            write_atomic(spec.out / "speed.csv", csv_text(rows))
            write_atomic(spec.out / "speed.md", text)
    return text


def summarize(
    contender: Contender, samples: Sequence[Sample], library: Sequence[Sample], n: int
) -> Line:
    """The line of a contender; `library` are the runs of the library, in the same repeats."""
    first, passes = samples[0], contender.passes
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(samples, library, strict=True)]
    seconds = Spread.of([sample.seconds for sample in samples])
    floor = passes.floor(first.forwards, first.backwards)
    return Line(
        contender=contender.name, n=n, robust=first.robust, seconds=seconds,
        ratio=Spread.of(ratios), forwards=first.forwards / n, backwards=first.backwards / n,
        forward_ms=passes.forward * 1e3, both_ms=passes.both * 1e3, floor_seconds=floor,
        floor_share=floor / seconds.median, batch=contender.batch, prepared=contender.prepared,
        peak_mib=max(sample.peak for sample in samples) / 2**20,
        stages={part: median(sample.stages[part] for sample in samples) for part in first.stages},
    )


class _Case:
    """One network and the images of an evaluation, those that it gets wrong among them."""

    def __init__(
        self, name: str, net: nn.Module, data: Images, matrix: Matrix, task: str
    ) -> None:
        self._name, self._net, self._task, self._reporter = name, net, task, matrix.reporter
        self._threat, self._seed = matrix.threat, matrix.spec.seeds[0]
        self._batch = matrix.spec.batch_size
        correct = int(Target(net, data).correct.sum())
        if not correct:
            raise UsageError(f"{name} is right on none of the {len(data)} images")
        self._images = data.to(matrix.device).held()
        self.facts = [
            f"{len(data)} images of {matrix.dataset.name}, of which the network gets {correct} "
            f"right; {self._threat}, seed {self._seed}", machine(matrix.device),
        ]

    def lines(self, precisions: Sequence[Precision], repeats: int) -> list[Line]:
        contenders = [self._library(), *map(self._ours, precisions)]
        samples: list[list[Sample]] = [[] for _ in contenders]
        with self._reporter.task(f"{self._name}: {self._task}") as update:
            for done, index in enumerate(rotating(len(contenders), repeats)):
                share = done / (repeats * len(contenders))
                update(share, f"repeat {done // len(contenders)}: {contenders[index].name}")
                samples[index].append(self._sample(contenders[index]))
        self.facts.append(f"{repeats} repeats, the implementations in turn: median (least to "
                          "most); ratio: seconds of the library / of ours, repeat by repeat")
        return [summarize(contender, mine, samples[0], len(self._images))
                for contender, mine in zip(contenders, samples, strict=True)]

    def _sample(self, contender: Contender) -> Sample:
        device = self._images.x.device
        with PeakMemory(device) as memory:
            began = time.perf_counter()
            result = contender.run()
            wait(device)
            seconds = time.perf_counter() - began
        return Sample(seconds, int(result.robust().sum()), result.forwards, result.backwards,
                      memory.peak, result.stages)

    def _ours(self, precision: Precision) -> Contender:
        attack = cast(Pooled, make_attack(self._task, self._threat, precision=precision))
        x, y = self._images.x, self._images.y
        with frozen(self._net), searching(precision):
            network = Network(self._net, precision, x[:8])
            size = self._batch or auto_slots(network, x, len(x))
            passes = time_passes(network, x, size)

        def run() -> Result:
            found = Search(attack, self._net, x, y, seed=self._seed, slots=size).run()
            return Result(lambda: found.standing, found.forwards, found.backwards,
                          dict(zip(found.stages, found.seconds, strict=True)))

        return Contender(f"robench, {precision}", run, size, network.prepared, passes)

    def _library(self) -> Contender:
        name = "pyautoattack" if self._task == "autoattack" else "torchattacks"
        size = self._batch or (REFERENCE_BATCH if self._task == "autoattack" else BATCH)
        x, y, size = self._images.x, self._images.y, min(size, len(self._images))
        with frozen(self._net):
            plain = Network(lambda images: self._net(images), "exact", x[:8])
            passes = time_passes(plain, x, size)

        def run() -> Result:
            counter = Counter(self._net)
            if self._task == "autoattack":
                x_adv = reference(counter, x, y, self._threat, seed=self._seed, batch_size=size)
            else:
                attack = torchattacks_pgd(self._threat, 20).build(self._threat)
                x_adv = _evaluation(attack, counter, x, y, size, self._seed)
            return Result(lambda: ~fooled(self._net, x, x_adv, y, self._threat),
                          counter.forwards, counter.backwards)

        return Contender(name, run, size, plain.prepared, passes)


def _evaluation(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, size: int, seed: int
) -> Tensor:
    """What a script around an attack does: attack a batch, look at the predictions, go on."""
    parts = []
    with seeded(seed, "speed"):
        for images, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            parts.append(attack(model, images, labels))
            with torch.no_grad(), frozen(model):
                model(parts[-1])
    return torch.cat(parts)


def _check_library(task: str, threat: ThreatModel) -> None:
    """Raises UsageError where there is nothing to compare with."""
    if task == "autoattack":
        make_attack("pyautoattack:standard", threat)
    else:
        torchattacks_pgd(threat, 20).build(threat)


def _trained(spec: RunSpec, steps: int | None, reporter: Reporter) -> list[str]:
    """Checkpoints of short trainings, kept under spec.out: a robust network and a usual one."""
    if not steps:
        raise UsageError("name a NETWORK, or a --model and the --train-steps to train it with")
    images = steps * TRAIN_BATCH
    train = {"batch_size": TRAIN_BATCH, "validation": 0, "select": "last", "swa_start": None}
    spec = spec.model_copy(update={"defenses": ("pgd-at", "standard"), "train": train})
    matrix = Matrix(spec, reporter)
    available = len(matrix.dataset.train)
    matrix.spec = spec.model_copy(update={
        "epochs": math.ceil(images / available), "train_limit": min(images, available)})
    cells, rows = matrix.plan()
    for cell in cells:
        matrix.train(cell)
    return [str(cell.folder / f"{cell.ranked[0]}.safetensors") for cell in rows]


def _row(name: str, task: str, matrix: Matrix, line: Line) -> dict[str, Any]:
    """The line as flat values, with where it comes from."""
    values = asdict(line)
    for key in ("seconds", "ratio"):
        spread = Spread(*values.pop(key))
        values |= {key: spread.median, f"{key}_min": spread.low, f"{key}_max": spread.high}
    values["stages"] = ";".join(f"{part}={seconds:.4g}" for part, seconds in line.stages.items())
    facts = environment(matrix.device)
    del facts["peak_bytes"]
    return {"network": name, "attack": task, "dataset": matrix.dataset.name,
            "threat": str(matrix.threat), **values, **facts}


def _board(title: str, lines: Sequence[Line], facts: Sequence[str]) -> Board:
    def column(title: str, text: Callable[[Line], str], words: bool = False) -> Column:
        return Column(title, tuple(Cell(text(line)) for line in lines), words)

    columns = (
        column("Implementation", lambda line: line.contender, words=True),
        column("Seconds", lambda line: str(line.seconds)),
        column("Ratio", lambda line: str(line.ratio)),
        column("Robust", lambda line: f"{line.robust} of {line.n}"),
        column("Forwards per image", lambda line: f"{line.forwards:.0f}"),
        column("Backwards per image", lambda line: f"{line.backwards:.0f}"),
        column("Floor, s", lambda line: f"{line.floor_seconds:.3g}"),
        column("Floor, share", lambda line: f"{line.floor_share:.0%}"),
        column("Memory, MiB", lambda line: NOTHING if math.isnan(line.peak_mib)
               else f"{line.peak_mib:.0f}"),
    )
    remarks = []
    for line in lines:
        parts = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in line.stages.items())
        remarks.append(
            f"{line.contender}: network {line.prepared}, {line.batch} images at a time; "
            f"{line.forward_ms:.3g} ms per image forward, {line.both_ms:.3g} ms forward and "
            f"backward" + (f"; {parts}" if parts else ""))
    notes = ("floor: the time of the same passes at that batch size, with nothing around them; "
             "memory: by how much it grew")
    return Board(title, columns, (*facts, notes), tuple(remarks))
