"""Models of RobustBench's zoo as networks; their files are read as weights, and never run."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from robench.attacks.threat import Norm
from robench.benchmark.checkpoints import check_unpacked
from robench.benchmark.data.folders import imagenet_name
from robench.benchmark.progress import Reporter
from robench.benchmark.zoo.fetch import fetch
from robench.benchmark.zoo.package import import_robustbench
from robench.errors import RobenchError, UsageError, one_line
from robench.registry import unknown

LISTS = ("Linf", "L2", "corruptions")
# What RobustBench calls the preparation of ImageNet's images -> what robench calls these.
PREPARED = {
    "Res256Crop224": "imagenet", "BicubicRes256Crop224": "imagenet,interpolation=bicubic",
    "Crop288": "the center 288x288 of images that are not resized",
    "Res224": "images that are squashed to 224x224",
}


def split_name(name: str, norm: Norm) -> tuple[str, str]:
    """(list of the zoo, model): `L2/NAME` is of the list that it names, NAME of the norm's."""
    listed, slash, model = name.rpartition("/")
    return (listed, model) if slash else (norm, model)


def load_robustbench(
    name: str, dataset: str, norm: Norm, folder: Path, reporter: Reporter | None = None
) -> nn.Module:
    """A model of the zoo, in eval mode.

    Weights are read from `folder`/<dataset>/<norm>/<name>.pt and downloaded to it if they are
    not there.

    Args:
        name: as in `zoo_models`; the norm says from which list, unless the name does: L2/NAME.

    Raises:
        UsageError: an unknown name, or a file that would run code.
        RobenchError: the download fails, or the file is damaged or of another model.
    """
    listed, name = split_name(name, norm)
    import_robustbench()
    zoo = importlib.import_module("robustbench.model_zoo")
    utils = importlib.import_module("robustbench.utils")
    enums = importlib.import_module("robustbench.model_zoo.enums")
    try:
        data, threat = enums.BenchmarkDataset(dataset), enums.ThreatModel(listed)
        models = zoo.model_dicts[data][threat]
    except (ValueError, KeyError):
        raise UsageError(f"the RobustBench zoo has no models for {dataset} under {listed}"
                         ) from None
    if name not in models:
        raise unknown("RobustBench model", name, models)
    try:
        with (warnings.catch_warnings(), open(os.devnull, "w") as nowhere,
              redirect_stdout(nowhere), guarded(utils, reporter or Reporter(quiet=True))):
            warnings.simplefilter("ignore")
            net: nn.Module = utils.load_model(
                model_name=name, model_dir=str(folder), dataset=dataset, threat_model=listed
            )
    except RobenchError:
        raise
    except Exception as error:  # whatever its many loaders raise
        place = folder / dataset / listed / f"{name}.pt"
        raise RobenchError(f"robustbench:{name} could not be loaded from {place} "
                           f"({one_line(error)})") from None
    return net.eval()


def published_on(net: nn.Module, name: str, norm: Norm) -> str:
    """The images of ImageNet on which RobustBench evaluates a model that it loaded: the name of a
    data set, or words where robench has none."""
    listed, name = split_name(name, norm)
    enums = importlib.import_module("robustbench.model_zoo.enums")
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    known = models[enums.BenchmarkDataset.imagenet][enums.ThreatModel(listed)][name]
    if prepared := str(known.get("preprocessing", "")):
        return PREPARED.get(prepared, prepared)
    made: Any = net.model if isinstance(net, nn.Sequential) else net  # a model of timm's
    return images_of(made.default_cfg)


def images_of(config: Mapping[str, Any]) -> str:
    """The name of ImageNet as timm's configuration of a network has its images."""
    size = config["input_size"][-1]
    return imagenet_name(resize=int(size / config["crop_pct"]), crop=size,
                         interpolation=config["interpolation"])


@contextmanager
def guarded(utils: ModuleType | None = None, reporter: Reporter | None = None) -> Iterator[None]:
    """Until it ends, torch.load reads weights alone in this process, whatever its caller or the
    environment asks for; and the downloads of `utils`, robustbench's, are ours, and what it puts
    into a network is all that this needs."""
    load = torch.load
    ours = {(torch, "load"): partial(read_tensors, load)}
    if utils is not None:
        reporter = reporter or Reporter(quiet=True)
        ours[utils, "download_gdrive_new"] = partial(_download, reporter, load)
        ours[utils, "_safe_load_state_dict"] = partial(_complete, utils._safe_load_state_dict)
    theirs = {place: getattr(*place) for place in ours}
    for (module, name), function in ours.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name), function in theirs.items():
            setattr(module, name, function)


def _complete(
    load: Any, net: nn.Module, name: str, state: dict[str, Any], *rest: Any
) -> nn.Module:
    """`load`, which robustbench lets pass over whatever is missing in files of many models, since
    their normalization is: on ImageNet even a file without any weights.

    Raises ValueError: more is missing than constants, which the network has by itself.
    """
    made: nn.Module = load(net, name, state, *rest)
    learned = {key for key, value in made.named_parameters() if value.requires_grad}
    learned |= {key for key, _ in made.named_buffers()
                if key.endswith(("running_mean", "running_var"))}
    missing = sorted(learned.intersection(made.load_state_dict(state, strict=False).missing_keys))
    if missing:
        raise ValueError(f"it is of another network: {missing[0]} is missing, {len(missing)} in "
                         "all")
    return made


def read_tensors(
    load: Any, file: Any, *arguments: Any, advice: str = "delete it, and run the same command "
    "again to download it", **options: Any,
) -> Any:
    """`load`, which is torch.load, of tensors and plain values.

    Raises:
        UsageError: a pickle that would run code, which it names, or a web page.
        RobenchError: a file that is damaged. Both say what to do: `advice`.
    """
    try:
        if isinstance(file, str | os.PathLike):
            check_unpacked(Path(file))
        return load(file, *arguments, **{**options, "weights_only": True})
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes may raise anything in a parser
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise UsageError(f"{file}: it holds more than weights: to read it, {code[1]} would "
                             f"have to run; robench does not unpickle code: {advice}") from None
        if isinstance(file, str | os.PathLike) and _is_page(Path(file)):
            raise UsageError(f"{file}: it is a web page, no weights: {advice}") from None
        raise RobenchError(f"{file}: it is damaged, or no file of weights "
                           f"({one_line(error, 80)}): {advice}") from None


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(100).lstrip().lower().startswith((b"<!doctype", b"<html"))


def _download(reporter: Reporter, load: Any, drive_id: str, place: str | Path) -> None:
    path = Path(place)
    with reporter.task(f"download {path.name}") as update:
        digest = fetch(drive_id, path, partial(_check, load), update)
    reporter.say(f"{path}: {path.stat().st_size / 1e6:,.1f} MB, sha256 {digest}")


def _check(load: Any, path: Path) -> None:
    read_tensors(load, path, map_location="cpu",
                 advice="it was removed; the same command downloads it again")
