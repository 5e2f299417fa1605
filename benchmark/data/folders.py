"""Folders of a user's, with a folder for each class: folder:PATH, and ImageNet's validation set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from robench.benchmark.data.files import COLOR, GREY, Files, Look, by_class, grouped, headers
from robench.benchmark.data.images import Augment, Dataset, Images
from robench.benchmark.data.registry import DATASETS, Request
from robench.errors import UsageError


@DATASETS.register(
    "folder:PATH",
    description="your images: PATH/train/<class>/*.png and PATH/test/<class>/*.png (or val, jpg, "
    "...), without train for evaluation only; sizes that differ need ,resize=N,crop=N",
)
def folder(request: Request) -> Dataset:
    """Square images of one size. Grey if all are grey, else all are RGB."""
    name = request.name(f"folder:{request.path}", resize="", crop="", interpolation="bilinear")
    look = Look.asked(request, None, None)
    path = Path(request.path).expanduser()
    train, test, val = (path / part for part in ("train", "test", "val"))
    places = [place for place in (train, test if test.is_dir() else val) if place.is_dir()]
    if not path.is_dir():
        raise UsageError(f"no folder {path}: images go to {train}/<class>/ and {test}/<class>/")
    if places == [train]:
        raise UsageError(f"no folder {test}: images go to {test}/<class>/")
    splits = [by_class(place) for place in places or [path]]
    classes = tuple(splits[-1])
    if different := set(classes) ^ set(splits[0]):
        raise UsageError(f"{path}: class {min(different)!r} is not in both train and test")
    look = _fitting(look, [file for split in splits for group in split.values() for file in group])
    parts = [_images(request, look, list(split.values())) for split in splits]
    return request.dataset(parts[0] if len(parts) > 1 else None, parts[-1], name=name,
                           classes=classes, augment=Augment())


IMAGENET = {"resize": 256, "crop": 224, "interpolation": "bilinear"}


def imagenet_name(**options: object) -> str:
    """What records call ImageNet's validation set with the options resize, crop, interpolation."""
    given = {key: str(value) for key, value in options.items()}
    return Request("imagenet", "", given).name("imagenet", **IMAGENET)


@DATASETS.register(
    "imagenet:PATH",
    description="ImageNet's validation set, PATH/val/<wnid>/*.JPEG, for evaluation: shorter side "
    "256, center 224, bilinear, unless ,resize=N,crop=N,interpolation=bicubic say otherwise",
    paper="Deng et al. 2009; Russakovsky et al. 2015, arXiv 1409.0575",
)
def imagenet(request: Request) -> Dataset:
    """Its name in records is `imagenet`, wherever it lies. Classes are in the order of wnids."""
    name = request.name("imagenet", **IMAGENET)
    look = Look.asked(request, 256, 224, modes=(*GREY, *COLOR, "CMYK"))
    groups = by_class(Path(request.path).expanduser() / "val")
    test = _images(request, look, list(groups.values()))
    return request.dataset(None, test, name=name, classes=tuple(groups), augment=Augment())


def _images(request: Request, look: Look, groups: Sequence[Sequence[str]]) -> Images:
    files, labels, order = grouped(groups)
    return request.images(Files(files, look), labels[order], order)


def _fitting(look: Look, files: Sequence[str]) -> Look:
    """With the number of channels, and the size, that all of these images have."""
    found = headers(files)
    channels = 1 if all(mode in GREY for _, mode in found) else 3
    if look.resize is not None or look.crop is not None:
        return replace(look, channels=channels)
    width, height = found[0][0]
    how = "add ,resize=N,crop=N to the name of the data set"
    if width != height:
        raise UsageError(f"{files[0]} is {width}x{height}: images must be square; {how}")
    for file, (size, _) in zip(files, found, strict=True):
        if size != (width, height):
            raise UsageError(f"{file} is {size[0]}x{size[1]}, but {files[0]} is {width}x{height}: "
                             f"all images must have one size; {how}")
    return replace(look, channels=channels, size=width)
