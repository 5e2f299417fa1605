"""Networks from anywhere: a file, the user's own factory, the zoos and hubs of others."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from robench.attacks.threat import ThreatModel
from robench.benchmark.checkpoints import Header, load_checkpoint, load_weights, read_header
from robench.benchmark.checks import eval_mode
from robench.benchmark.data import Dataset, class_order
from robench.benchmark.models import build_model
from robench.benchmark.progress import Reporter
from robench.benchmark.zoo.entries import license_of
from robench.benchmark.zoo.hubs import Pretrained, hub_file, load_timm, load_torchvision
from robench.benchmark.zoo.load import load_robustbench, published_on, split_name
from robench.errors import UsageError, one_line

SOURCES = ("a file", "package.module:factory", "robustbench:NAME", "timm:NAME",
           "torchvision:NAME", "hf:ORG/REPO")


@dataclass(frozen=True)
class Network:
    """A network in eval mode and where it came from."""

    net: nn.Module
    source: str
    model: str  # name of the architecture
    header: Header | None = None  # what a robench checkpoint says about itself
    in_train_mode: int = 0  # modules that came in train mode, see `checks.eval_mode`
    notes: tuple[str, ...] = ()  # what a reader of a table must know: the license of the weights


def load_network(
    source: str, dataset: Dataset, threat: ThreatModel, *, model: str | None = None,
    zoo: Path = Path("models"), reporter: Reporter | None = None,
) -> Network:
    """Load a network, named as in SOURCES, for this data set.

    Args:
        model: the architecture, for a checkpoint that does not name it.
        zoo: where RobustBench's weights lie or are put.
        reporter: shows downloads, and the license of weights that others trained.

    Raises:
        UsageError: it does not exist, cannot be read, or is not for this data set.
        RobenchError: it could not be downloaded.
    """
    def build(name: str) -> nn.Module:
        return build_model(name, classes=len(dataset.classes), channels=dataset.channels,
                           size=dataset.size)

    reporter = reporter or Reporter(quiet=True)
    path, (kind, colon, name) = Path(source), source.partition(":")
    if kind == "robustbench" and colon:
        return _of_zoo(name, dataset, threat, zoo, reporter)
    if kind in HUBS and colon:
        return _of_library(source, HUBS[kind](name, len(dataset.classes)), dataset, reporter)
    if kind == "hf" and colon:
        file, license = hub_file(name)
        network = replace(_from_file(file, model, dataset, build), source=source)
        return _licensed(network, license, reporter)
    if path.suffix in (".safetensors", ".pt", ".pth") or path.exists():
        return _from_file(path, model, dataset, build)
    if colon:
        net = build(source)
        modes = int(eval_mode(net))
        return Network(net.eval(), source, source, in_train_mode=modes)
    raise UsageError(f"{source!r} is none of {', '.join(SOURCES)}")


HUBS: dict[str, Callable[[str, int], Pretrained]] = {
    "timm": load_timm, "torchvision": load_torchvision,
}


ZOO_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


def _of_zoo(
    name: str, dataset: Dataset, threat: ThreatModel, folder: Path, reporter: Reporter
) -> Network:
    """Raises UsageError for images of other classes than those of the zoo's data set."""
    source, kind = f"robustbench:{name}", class_order(dataset.name)[0]
    classes = ZOO_CLASSES.get(kind)
    if classes not in (None, len(dataset.classes)):
        raise UsageError(f"{source} tells {classes:,} classes apart, {dataset.name} has "
                         f"{len(dataset.classes):,}: labels would mean other classes")
    net = load_robustbench(name, kind, threat.norm, folder, reporter)
    listed, model = split_name(name, threat.norm)
    network = Network(net, source, model)
    if kind == "imagenet":
        network = _prepared(network, published_on(net, name, threat.norm), dataset, reporter)
    return _licensed(network, license_of(model, kind, listed), reporter)


def _prepared(
    network: Network, published_on: str, dataset: Dataset, reporter: Reporter
) -> Network:
    """With a note, if its published accuracy is on ImageNet resized or cropped in another way."""
    if published_on == dataset.name:
        return network
    return _noted(network, f"{network.source}: published numbers are on {published_on}, these on "
                  f"{dataset.name}", reporter)


def _noted(network: Network, note: str, reporter: Reporter) -> Network:
    reporter.warn(note)
    return replace(network, notes=(*network.notes, note))


def _of_library(
    source: str, found: Pretrained, dataset: Dataset, reporter: Reporter
) -> Network:
    """Raises UsageError for a network that does not take these images."""
    if found.classes != len(dataset.classes):
        raise UsageError(f"{source} tells {found.classes:,} classes apart, {dataset.name} has "
                         f"{len(dataset.classes):,}: name a data set with those classes, or "
                         f"weights for these: {source.partition(',')[0]},file=PATH")
    if found.channels != dataset.channels:
        raise UsageError(f"{source} takes images with {found.channels} channels, {dataset.name} "
                         f"has {dataset.channels}")
    sizes = (f"{source} was trained on {found.size}x{found.size} images, {dataset.name} has "
             f"{dataset.size}x{dataset.size}")
    if found.size != dataset.size and found.fixed:
        raise UsageError(f"{sizes}, and it takes no others")
    network = Network(found.net, source, source.partition(",")[0])
    if found.size != dataset.size:
        network = _noted(network, sizes, reporter)
    elif class_order(dataset.name)[0] == "imagenet":
        network = _prepared(network, found.published_on, dataset, reporter)
    return _licensed(network, found.license, reporter)


def _licensed(network: Network, license: str, reporter: Reporter) -> Network:
    """The network with the license of its weights among its notes; it is shown, too."""
    note = f"license of the weights: {license}"
    reporter.say(f"{network.source}: {note}")
    return replace(network, notes=(*network.notes, note))


def _from_file(
    path: Path, model: str | None, dataset: Dataset, build: Callable[[str], nn.Module]
) -> Network:
    header = read_header(path) if path.suffix == ".safetensors" else None
    if header is not None and model in (None, header.model.name):
        if (header.classes, header.channels) != (len(dataset.classes), dataset.channels):
            raise UsageError(f"{path} was trained on {header.dataset} ({header.classes} classes, "
                             f"{header.channels} channels) and does not fit this data set")
        mine, theirs = class_order(dataset.name), class_order(header.dataset)
        if mine[0] == theirs[0] and mine != theirs:
            raise UsageError(f"{path} was trained on {header.dataset}: its classes are in another "
                             f"order than those of {dataset.name}")
        net, _ = load_checkpoint(path, model)
        return Network(net, str(path), str(header.model), header)
    if model is None:
        if not path.exists():
            raise UsageError(f"there is no file {path}")
        raise UsageError(f"{path} does not say which network it holds: add --model NAME")
    net = build(model)
    load_weights(net, path)
    return Network(net.eval(), str(path), model, header)


def default_jobs(device: str) -> int:
    """One process per core on the CPU, at most 4, since small networks use one core well; one
    for each GPU."""
    if device.startswith("cpu") or (device == "auto" and not torch.cuda.is_available()):
        return min(cores(), 4)
    return 1 if ":" in device else max(1, torch.cuda.device_count())


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA if there is one, else the CPU. Raises UsageError for a missing device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device)  # computed there: a GPU may be too old for this torch
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not there ({one_line(error)})") from None
    return device
