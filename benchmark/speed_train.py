"""speed train: how fast a defense trains here, and in a plain loop as released scripts have it.

The plain loop drives the same defense, so that passes and their order are the same by
construction, in the way of the scripts: float32, eager, contiguous, a DataLoader over PIL images,
and parameters that ask for gradients while examples are crafted. It is no straw man: it forwards
a teacher once per batch, and takes the number of workers that suits it best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Augment, Held, Images, load_dataset
from robench.benchmark.gauge import Counter, Spread, rotating, using_threads, wait
from robench.benchmark.models import build_model
from robench.benchmark.progress import Reporter
from robench.benchmark.provenance import environment
from robench.benchmark.recipe import default_threat
from robench.benchmark.references import csv_text, machine
from robench.benchmark.sources import pick_device
from robench.benchmark.spec import RunSpec, the_only, threat_models
from robench.defenses import Moment, make_defense
from robench.defenses.base import Defense, take_step
from robench.defenses.fast import View, accelerated
from robench.files import write_atomic
from robench.randomness import seeded
from robench.reports.text import NOTHING, Board, Cell, Column, markdown

DEFENSES = ("pgd-at", "trades", "rslad", "peeraid")
MODEL = "resnet18"
WORKERS = (0, 2)  # of the plain loop's DataLoader: the better of these
Batches = Iterator[tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """What is trained on: images in [0, 1] on the device, how they are augmented, and steps."""

    dataset: str
    images: Held
    augment: Augment
    classes: int
    model: str
    threat: ThreatModel
    batch_size: int


@dataclass
class Loop:
    """One implementation of the training of a defense.

    Attributes:
        views: what the defense sees. batches: the source of endless (x, y), for so many workers.
        workers: None where there are none to choose.
        counters: of the passes of each network.
    """

    name: str
    defense: Defense
    views: Mapping[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    counters: Mapping[str, Counter]
    batches: Callable[[int], Batches]
    workers: int | None = None
    steps: int = 0

    def run(self, steps: int) -> float:
        """The seconds of so many steps, loading and augmentation included."""
        batches = self.batches(self.workers or 0)
        x, _ = next(batches)  # workers have started
        wait(x.device)
        began = time.perf_counter()
        for x, y in islice(batches, steps):
            take_step(self.defense, self.views, self.optimizers, x, y)
        wait(x.device)
        self.steps += steps
        return time.perf_counter() - began

    def warm_up(self) -> None:
        """One step; then the number of workers is chosen, and counts begin."""
        self.run(1)
        if self.workers is not None:
            def seconds(workers: int) -> float:
                self.workers = workers
                return self.run(1)

            self.workers = min(WORKERS, key=seconds)
        self.steps = 0
        for counter in self.counters.values():
            counter.forwards = counter.backwards = 0


@dataclass(frozen=True)
class Line:
    """One implementation.

    Attributes:
        rate: images per second. ratio: seconds of the plain loop / of this, repeat by repeat.
        forwards, backwards: passes per training image, of each network.
    """

    contender: str
    rate: Spread
    ratio: Spread
    forwards: dict[str, float] = field(default_factory=dict)
    backwards: dict[str, float] = field(default_factory=dict)
    workers: int | None = None


def speed_train(
    spec: RunSpec, *, batch_size: int = 128, steps: int = 2, repeats: int = 3,
    threads: int | None = None, quiet: bool = True,
) -> str:
    """Time a few steps of each defense, in turn; write speed-train.csv and .md to spec.out.

    Args:
        spec: its defenses, model, device, threat and first seed; its data set if it was set,
            else random images of the size of CIFAR-10's.
        steps: in each of the repeats.

    Returns the Markdown.
    """
    device, reporter = pick_device(spec.device), Reporter(quiet=quiet)
    case = _case(spec, batch_size, steps, device)
    defenses = {name: make_defense(name, case.threat).at(Moment(0, 1))
                for name in spec.defenses or DEFENSES}
    boards, rows, text = list[Board](), list[dict[str, Any]](), ""
    with using_threads(threads):
        for name, defense in defenses.items():
            lines = _lines(name, defense, case, spec.seeds[0], steps, repeats, reporter)
            boards.append(_board(name, lines, case, steps, repeats))
            rows += [_row(name, case, steps, line) for line in lines]
            text = "\n".join(["# Speed of training\n", *map(markdown, boards)])
            write_atomic(spec.out / "speed-train.csv", csv_text(rows))
            write_atomic(spec.out / "speed-train.md", text)
    return text


def _case(spec: RunSpec, batch_size: int, steps: int, device: torch.device) -> Case:
    if "dataset" in spec.model_fields_set:
        found = load_dataset(spec.dataset, spec.data_root, download=spec.download)
        name, train, augment = found.name, found.train, found.augment
        classes, usual = len(found.classes), default_threat(found.name)
    else:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, ((steps + 1) * batch_size, 3, 32, 32), generator=generator)
        labels = torch.randint(10, (len(pixels),), generator=generator)
        name, train, augment = "random images", Images(pixels / 255, labels), Augment(4, True)
        classes, usual = 10, "Linf:8/255"
    chosen = train.select(torch.arange((steps + 1) * batch_size) % len(train)).to(device)
    threat = the_only(threat_models(spec, usual))
    return Case(name, chosen.held(), augment, classes, spec.model or MODEL, threat, batch_size)


def _lines(
    name: str, defense: Defense, case: Case, seed: int, steps: int, repeats: int,
    reporter: Reporter,
) -> list[Line]:
    loops = [_plain(defense, case, torch.contiguous_format, "plain loop"),
             _plain(defense, case, torch.channels_last, "plain loop, channels_last"),
             _ours(defense, case, "fp32"), _ours(defense, case, "bf16")]
    seconds: list[list[float]] = [[] for _ in loops]
    with seeded(seed, "speed"), reporter.task(name) as update:
        for loop in loops:
            update(0, f"warm-up: {loop.name}")
            loop.warm_up()
        for done, index in enumerate(rotating(len(loops), repeats)):
            update(done / (repeats * len(loops)), loops[index].name)
            seconds[index].append(loops[index].run(steps))
    return [_line(loop, mine, seconds[0], steps * case.batch_size, case.batch_size)
            for loop, mine in zip(loops, seconds, strict=True)]


def _line(
    loop: Loop, seconds: Sequence[float], plain: Sequence[float], images: int, batch: int
) -> Line:
    """images: of one repeat."""
    trained = loop.steps * batch
    return Line(
        loop.name, workers=loop.workers,
        rate=Spread.of([images / mine for mine in seconds]),
        ratio=Spread.of([theirs / mine for mine, theirs in zip(seconds, plain, strict=True)]),
        forwards={name: c.forwards / trained for name, c in loop.counters.items()},
        backwards={name: c.backwards / trained for name, c in loop.counters.items()},
    )


# The implementations


class _Asking(View):
    """A network that `frozen` cannot freeze: in the scripts, too, its parameters go on asking."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(())


def _plain(defense: Defense, case: Case, layout: torch.memory_format, name: str) -> Loop:
    nets = {key: net.to(memory_format=layout) for key, net in _networks(defense, case).items()}
    counters = {key: Counter(net) for key, net in nets.items()}
    views = {key: _Asking(net, counters[key].forward) for key, net in nets.items()}
    photos, device = _Photos(case), case.images.x.device

    def batches(workers: int) -> Batches:
        loader = DataLoader(photos, case.batch_size, shuffle=True, num_workers=workers,
                            pin_memory=device.type == "cuda")
        for x, y in loader:
            yield x.to(device, memory_format=layout), y.to(device)

    return _loop(name, defense, nets, views, counters, case, batches, WORKERS[0])


def _ours(defense: Defense, case: Case, precision: Any) -> Loop:
    nets = {key: net.to(memory_format=torch.channels_last)
            for key, net in _networks(defense, case).items()}
    views = accelerated(nets, precision, case.images.x[:8])
    counters = {}
    for key, net in views.items():
        counters[key] = Counter(net.compute if isinstance(net, View) else net)
        if isinstance(net, View):
            net.compute = counters[key].forward  # under its memory of passes
        else:
            views[key] = counters[key]
    x, y = case.images.x, case.images.y

    def batches(workers: int) -> Batches:
        for index in torch.split(torch.randperm(len(x), device=x.device), case.batch_size):
            images = case.augment(x[index])
            yield images.contiguous(memory_format=torch.channels_last), y[index]

    return _loop(f"robench, {precision}", defense, nets, views, counters, case, batches, None)


def _networks(defense: Defense, case: Case) -> dict[str, nn.Module]:
    """New ones, the same for every implementation."""
    _, channels, size, _ = case.images.x.shape
    nets = {}
    for name in (*defense.trained, *defense.given):
        with seeded(0, name):
            net = build_model(case.model, classes=case.classes, channels=channels, size=size)
        trained = name in defense.trained
        nets[name] = net.to(case.images.x.device).train(trained).requires_grad_(trained)
    return nets


def _loop(
    name: str, defense: Defense, nets: Mapping[str, nn.Module], views: Mapping[str, nn.Module],
    counters: Mapping[str, Counter], case: Case, batches: Callable[[int], Batches],
    workers: int | None,
) -> Loop:
    memory = {key: module.eval().requires_grad_(False)
              for key, module in defense.memory(views, case.classes).items()}
    optimizers = [torch.optim.SGD(nets[key].parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
                  for key in defense.trained]
    return Loop(name, defense, {**views, **memory}, optimizers, counters, batches, workers)


class _Photos(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The images as the scripts' data sets hold them: bytes, PIL, then torchvision's transforms."""

    def __init__(self, case: Case) -> None:
        from torchvision import transforms  # type: ignore[import-untyped]

        pixels = (case.images.x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        self._pixels = pixels[..., 0] if pixels.shape[3] == 1 else pixels
        self._labels = case.images.y.tolist()
        steps: list[Callable[[Any], Any]] = [transforms.ToTensor()]
        if case.augment.flip:
            steps.insert(0, transforms.RandomHorizontalFlip())
        if case.augment.pad:
            steps.insert(0, transforms.RandomCrop(pixels.shape[1], padding=case.augment.pad))
        self._transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]


# The tables


def _row(name: str, case: Case, steps: int, line: Line) -> dict[str, Any]:
    row = {"defense": name, "model": case.model, "dataset": case.dataset,
           "threat": str(case.threat), "contender": line.contender,
           "batch_size": case.batch_size, "steps": steps, "workers": line.workers}
    for key, spread in (("images_per_second", line.rate), ("ratio", line.ratio)):
        row |= {key: spread.median, f"{key}_min": spread.low, f"{key}_max": spread.high}
    for key, passes in (("forwards", line.forwards), ("backwards", line.backwards)):
        row[key] = ";".join(f"{net}={number:g}" for net, number in passes.items())
    facts = environment(case.images.x.device)
    del facts["peak_bytes"]
    return {**row, **facts}


def _board(name: str, lines: Sequence[Line], case: Case, steps: int, repeats: int) -> Board:
    def column(title: str, text: Callable[[Line], str], words: bool = False) -> Column:
        return Column(title, tuple(Cell(text(line)) for line in lines), words)

    columns = (
        column("Implementation", lambda line: line.contender, words=True),
        column("Images per second", lambda line: _rate(line.rate)),
        column("Ratio", lambda line: str(line.ratio)),
        column("Forwards per image", lambda line: _passes(line.forwards), words=True),
        column("Backwards per image", lambda line: _passes(line.backwards), words=True),
        column("Workers", lambda line: NOTHING if line.workers is None else str(line.workers)),
    )
    facts = (
        f"{case.model} on {case.dataset} {tuple(case.images.x.shape[1:])}, batches of "
        f"{case.batch_size}; {case.threat}", machine(case.images.x.device),
        f"{repeats} repeats of {steps} steps, the implementations in turn: median (least to "
        "most); ratio: seconds of the plain loop / of this, repeat by repeat",
    )
    return Board(name, columns, facts, tuple(_differences(lines)))


def _rate(rate: Spread) -> str:
    median, low, high = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in rate)
    return f"{median} ({low} to {high})"


def _passes(passes: Mapping[str, float]) -> str:
    return ", ".join(f"{net} {number:g}" for net, number in passes.items())


def _differences(lines: Sequence[Line]) -> Iterator[str]:
    """Where passes are not those of the plain loop."""
    for line in lines[1:]:
        for kind in ("forwards", "backwards"):
            for net, wanted in getattr(lines[0], kind).items():
                found = getattr(line, kind)[net]
                if found != wanted:
                    yield (f"{line.contender}: {found:g} {kind} of the {net} per image, the "
                           f"plain loop {wanted:g}")
