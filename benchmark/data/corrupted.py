"""Corrupted test images in the layout of CIFAR-10-C and CIFAR-100-C.

A folder holds <corruption>.npy, uint8 (5 N, H, W, C), and labels.npy, (5 N,): the N test images in
their order at severity 1, then at severity 2, and so on. The arrays are mapped, not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robench.benchmark.data.download import Archive, Task, fetched
from robench.benchmark.data.images import Images
from robench.benchmark.data.streams import Array, Streamed
from robench.errors import UsageError, one_line
from robench.registry import unknown

SEVERITIES = 5
FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
ARCHIVES = {
    "cifar10": Archive(
        "CIFAR-10-C.tar", 2_918_471_680, "56bf5dcef84df0e2308c6dcbcbbd8499",
        ("https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1",
         "https://zenodo.org/record/2535967/files/CIFAR-10-C.tar")),
    "cifar100": Archive(
        "CIFAR-100-C.tar", 2_918_473_216, "11f0ed0f1191edbf9fa23466ae6021d3",
        ("https://zenodo.org/records/3555552/files/CIFAR-100-C.tar?download=1",
         "https://zenodo.org/record/3555552/files/CIFAR-100-C.tar")),
}


def corrupted(
    dataset: str, test: Images, root: Path, *, room: int, download: bool, task: Task,
    only: tuple[str, ...] = (),
) -> Mapping[str, tuple[Images, ...]]:
    """For each corruption, by name, the images at severity 1, 2, ...

    Args:
        test: the whole test set, whose images these are.
        root: the folder of the files, or the one that has CIFAR-10-C/ or CIFAR-100-C/ in it.
        room: bytes of pixels that may be in memory.
        only: names of corruptions; all there are if there are none.

    Raises UsageError for files that are missing, damaged, or of another data set.
    """
    named = root / FOLDERS.get(dataset, ".")
    if download and dataset in ARCHIVES and not any(
            (place / "labels.npy").exists() for place in (root, named)):
        fetched(ARCHIVES[dataset], root, FOLDERS[dataset], task)
    folder = next((place for place in (root, named) if (place / "labels.npy").exists()), None)
    if folder is None:
        where = f", in {named}" if dataset in FOLDERS else ""
        there = f" or remove {named} and add --download" if named.is_dir() else " or add --download"
        how = there if dataset in ARCHIVES else ""
        raise UsageError(f"no labels.npy in {root}{where}: name the folder of the corrupted "
                         f"images with --corruptions-root DIR{how}")
    names = sorted(path.stem for path in folder.glob("*.npy") if path.stem != "labels")
    if not names:
        raise UsageError(f"no corruptions in {folder}: they are files such as fog.npy")
    for name in only:
        if name not in names:
            raise unknown("corruption", name, names)
    labels = _array(folder / "labels.npy")
    expected = np.tile(test.y.cpu().numpy(), SEVERITIES)
    if labels.shape != expected.shape or not (labels == expected).all():
        raise UsageError(f"{folder / 'labels.npy'} does not hold the {len(test):,} labels of the "
                         f"test set of {dataset}, {SEVERITIES} times")
    _, channels, height, width = test.x.shape
    found = {}
    for name in only or names:
        path = folder / f"{name}.npy"
        pixels = _array(path)
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), height, width, channels):
            raise UsageError(f"{path} holds {pixels.dtype} {pixels.shape}, not uint8 "
                             f"{(len(labels), height, width, channels)}")
        found[name] = tuple(
            Images(Streamed(Array(path, severity * len(test), (channels, height, width)),
                            torch.arange(len(test)), room), test.y)
            for severity in range(SEVERITIES))
    return found


def _array(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged bytes may raise anything in a parser
        raise UsageError(f"cannot read {path} ({one_line(error)})") from None
