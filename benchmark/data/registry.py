"""Data sets by name. To add one: a function from a Request to a Dataset, registered here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robench.benchmark.data.download import Task
from robench.benchmark.data.images import Dataset, Images
from robench.benchmark.data.streams import Source, Streamed, half_of_memory
from robench.errors import UsageError
from robench.registry import Registry

CPU = torch.device("cpu")
OPTIONS = ("order", "resize", "crop", "interpolation")  # that any data set takes


@contextmanager
def _untold(label: str) -> Iterator[Callable[[float, str], None]]:
    yield lambda share, text: None


@dataclass(frozen=True)
class Request:
    """What a user asks for: `cifar10`, `tiny-imagenet,order=sorted`, `imagenet:PATH,crop=192`.

    Attributes:
        kind: the name in DATASETS, without :PATH. path: "" where there is none.
        root: the folder for data sets that are no folders of the user's.
        download: whether what is not there may be fetched into root.
        room: bytes of pixels that may be in memory; larger data sets are read when needed.
        task: who is told how a download goes.
    """

    kind: str
    path: str
    options: Mapping[str, str]
    root: Path | None = None
    download: bool = False
    room: int = 0
    task: Task = _untold

    @classmethod
    def parse(cls, name: str, **more: Any) -> Request:
        options: dict[str, str] = {}
        head = name
        while "," in head:  # a path may have commas, too
            rest, _, last = head.rpartition(",")
            key, _, value = last.partition("=")
            if key not in OPTIONS or not value:
                break
            if key in options:
                raise UsageError(f"dataset {name!r} names {key} twice")
            options[key], head = value, rest
        kind, _, path = head.partition(":")
        return cls(kind, path, options, **more)

    @property
    def entry(self) -> str:
        """The name in DATASETS."""
        return f"{self.kind}:PATH" if self.path else self.kind

    def name(self, what: str, **defaults: object) -> str:
        """What records call the data set: `what`, and the options that are not the default. Part
        of its identity, with the hash of the images.

        Raises UsageError for options without a default here: the data set takes no others.
        """
        if others := sorted(set(self.options) - set(defaults)):
            takes = f"takes {', '.join(defaults)} only" if defaults else "has no options"
            raise UsageError(f"{self.kind} does not know {others[0]!r}: it {takes}")
        parts = [f"{key}={self.options[key]}" for key, default in defaults.items()
                 if self.options.get(key, str(default)) != str(default)]
        return ",".join([what, *parts])

    def number(self, key: str, default: int | None = None) -> int | None:
        text = self.options.get(key)
        if text is None:
            return default
        if not text.isdecimal() or not 1 <= int(text) <= 10_000:
            raise UsageError(f"{self.kind}: {key} is a number of pixels, not {text!r}")
        return int(text)

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        """One of `known`, of which the first is the default."""
        value = self.options.get(key, known[0])
        if value not in known:
            raise UsageError(f"{self.kind}: {key} is one of {', '.join(known)}, not {value!r}")
        return value

    def images(self, source: Source, labels: Any, order: Any = None) -> Images:
        """Images (N) of a source in this order, not read yet. Labels: N of any integer type."""
        rows = np.arange(len(labels)) if order is None else np.asarray(order)
        y = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        return Images(Streamed(source, torch.as_tensor(rows), self.room), y)

    def dataset(self, training: Images | None, test: Images, **facts: Any) -> Dataset:
        """In memory where all of it has room there; what is wrong with it is found here."""
        parts: list[Images] = [part for part in (training, test) if part is not None]
        if sum(4 * part.x.shape.numel() for part in parts) <= self.room:
            parts = [part.held() for part in parts]
        checked = [part.checked(len(facts["classes"])) for part in parts]
        return Dataset(training=checked[0] if training is not None else None, test=checked[-1],
                       **facts)


Loader = Callable[[Request], Dataset]


def _builtin() -> None:
    for module in ("bundled", "folders", "tiny_imagenet"):
        importlib.import_module(f"robench.benchmark.data.{module}")


DATASETS: Registry[Loader] = Registry("dataset", builtin=_builtin)


def load_dataset(
    name: str, root: Path | None = None, *, download: bool = False, room: int | None = None,
    device: torch.device = CPU, jobs: int = 1, task: Task = _untold,
) -> Dataset:
    """A data set by name.

    Args:
        name: a name in DATASETS, in which PATH is a folder of yours; options follow it.
        root: the folder with the data sets that are no folders of yours.
        download: fetch into root what is not there.
        room: bytes of pixels that may be in memory. A data set that takes more is read when it is
            needed: the same images, in the same order. None: half of the memory of this machine
            and of the `device` that works on them, for all of so many `jobs` together.
        task: as `Reporter.task`, for what takes long.

    Raises UsageError for an unknown name and for data that are missing or damaged.
    """
    room = half_of_memory(device) // jobs if room is None else room
    request = Request.parse(name, root=root, download=download, room=room, task=task)
    return DATASETS[request.entry].value(request)


def class_order(name: str) -> tuple[str, str]:
    """(data set, the order of its classes) of a data set's name: label k means another class in
    another order."""
    request = Request.parse(name)
    return request.kind, request.options.get("order", "")
