"""Tiny-ImageNet-200 in its official layout, in either order of its classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from robench.benchmark.data.download import Archive, fetched
from robench.benchmark.data.files import Files, Look, grouped, headers
from robench.benchmark.data.images import Augment, Dataset
from robench.benchmark.data.registry import DATASETS, Request
from robench.errors import UsageError

FOLDER = "tiny-imagenet-200"
ORDERS = ("wnids", "sorted")
ARCHIVE = Archive(
    name="tiny-imagenet-200.zip", size=248_100_043, md5="90528d7ca1a48142e341f4ef8d21d0de",
    urls=("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
          "https://zenodo.org/records/10720917/files/tiny-imagenet-200.zip?download=1"),
)


@DATASETS.register(
    "tiny-imagenet",
    description="110,000 color 64x64 photos, 200 classes in the order of wnids.txt, or "
    "tiny-imagenet,order=sorted as torchvision's ImageFolder has them; test set: val",
    paper="Le and Yang 2015",
)
def tiny_imagenet(request: Request) -> Dataset:
    """Grey images become RGB. The official test images have no labels: `val` is the test set.

    In another order label k means another class, so checkpoints of one do not fit the other; the
    order is part of the name and, through the labels, of the hash.
    """
    name = request.name("tiny-imagenet", order=ORDERS[0])
    order = request.choice("order", ORDERS)
    how = f"name the folder with {FOLDER}/ in it with --data-root DIR, or add --download"
    if request.root is None:
        raise UsageError(f"tiny-imagenet does not come with robench: {how}")
    folder = request.root / FOLDER
    if request.download and not folder.is_dir():
        fetched(ARCHIVE, request.root, FOLDER, request.task)
    try:
        wnids = (folder / "wnids.txt").read_text().split()
        words = _words(folder / "words.txt")
        annotated = [line.split("\t")[:2] for line
                     in (folder / "val/val_annotations.txt").read_text().splitlines() if line]
        trained = [sorted(map(str, (folder / "train" / wnid / "images").glob("*.JPEG")))
                   for wnid in wnids]
        tested = [(str(folder / "val/images" / file), wnid) for file, wnid in annotated]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read tiny-imagenet in {folder} ({error}): {how}") from None
    label = {wnid: k for k, wnid in enumerate(sorted(wnids) if order == "sorted" else wnids)}
    faults = [wnid for wnid, files in zip(wnids, trained, strict=True) if not files]
    faults += [wnid for _, wnid in tested if wnid not in label]
    if not tested or faults or len(label) < len(wnids):
        named = [f"class {wnid!r} of " for wnid in faults[:1]]
        raise UsageError(f"{folder} is damaged: {''.join(named)}wnids.txt, train/ and "
                         "val/val_annotations.txt do not fit together")
    look = Look(headers(trained[0][:1])[0][0][0])
    files, owners, shuffled = grouped(trained)
    labels = np.array([label[wnid] for wnid in wnids])[owners]
    train = Files(files, look)
    test = Files(tuple(file for file, _ in tested), look)
    return request.dataset(
        request.images(train, labels[shuffled], shuffled),
        request.images(test, [label[wnid] for _, wnid in tested]),
        name=name, classes=_names(list(label), words), augment=Augment(pad=4, flip=True),
    )


def _words(file: Path) -> dict[str, str]:
    """The first word for each wnid."""
    pairs = (line.split("\t", 1) for line in file.read_text().splitlines() if "\t" in line)
    return {wnid: words.split(",")[0].strip() for wnid, words in pairs}


def _names(wnids: list[str], words: dict[str, str]) -> tuple[str, ...]:
    names = [words.get(wnid, wnid) for wnid in wnids]
    often = Counter(names)
    return tuple(name if often[name] == 1 else f"{name} ({wnid})"
                 for name, wnid in zip(names, wnids, strict=True))
