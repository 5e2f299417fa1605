"""Networks from anywhere: a checkpoint, the user's own factory, the RobustBench zoo."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from robench.attacks.threat import ThreatModel
from robench.benchmark.checkpoints import Header, load_checkpoint, load_weights, read_header
from robench.benchmark.checks import eval_mode
from robench.benchmark.data import Dataset
from robench.benchmark.models import build_model
from robench.benchmark.zoo import load_robustbench
from robench.errors import UsageError, one_line


@dataclass(frozen=True)
class Network:
    """A network in eval mode and where it came from."""

    net: nn.Module
    source: str
    model: str  # name of the architecture
    header: Header | None = None  # what a robench checkpoint says about itself
    in_train_mode: int = 0  # modules that came in train mode, see `checks.eval_mode`


def load_network(
    source: str, dataset: Dataset, threat: ThreatModel, *, model: str | None = None,
    zoo: Path = Path("models"),
) -> Network:
    """Load `PATH`, `package.module:factory` or `robustbench:NAME` for this data set.

    Args:
        model: the architecture, for a checkpoint that does not name it.
        zoo: where RobustBench's weights lie or are put.

    Raises:
        UsageError: it does not exist, cannot be read, or is not for this data set.
    """
    def build(name: str) -> nn.Module:
        return build_model(name, classes=len(dataset.classes), channels=dataset.channels,
                           size=dataset.size)

    if source.startswith("robustbench:"):
        name = source.removeprefix("robustbench:")
        return Network(load_robustbench(name, dataset.name, threat.norm, zoo), source, name)
    path = Path(source)
    if path.suffix in (".safetensors", ".pt", ".pth") or path.exists():
        return _from_file(path, model, dataset, build)
    if ":" in source:
        net = build(source)
        modes = int(eval_mode(net))
        return Network(net.eval(), source, source, in_train_mode=modes)
    raise UsageError(f"{source!r} is no file, no package.module:factory and no robustbench:NAME")


def _from_file(
    path: Path, model: str | None, dataset: Dataset, build: Callable[[str], nn.Module]
) -> Network:
    header = read_header(path) if path.suffix == ".safetensors" else None
    if header is not None and model in (None, header.model.name):
        if (header.classes, header.channels) != (len(dataset.classes), dataset.channels):
            raise UsageError(f"{path} was trained on {header.dataset} ({header.classes} classes, "
                             f"{header.channels} channels) and does not fit this data set")
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
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not there ({one_line(error)})") from None
    return device
