"""timm, torchvision and the Hugging Face Hub: networks that others trained, by name.

Normalization is put into the network: it takes images in [0, 1]. Files are read as weights alone.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from robench.benchmark.checkpoints import load_weights
from robench.benchmark.data.folders import imagenet_name
from robench.benchmark.models import Normalize
from robench.benchmark.zoo.entries import UNKNOWN
from robench.benchmark.zoo.load import guarded, images_of
from robench.errors import RobenchError, UsageError, one_line

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
STANDARD = "model.safetensors"  # how the Hub names weights


@dataclass(frozen=True)
class Pretrained:
    """A network that takes images in [0, 1], in eval mode, and what is known about it.

    Attributes:
        classes: the number of logits K. size: of the images it was trained on, in pixels.
        fixed: it takes no other size.
        published_on: what records call ImageNet as its published accuracy is on it.
        license: of the weights, "unknown" where nobody states it.
    """

    net: nn.Module
    classes: int
    channels: int
    size: int
    fixed: bool
    published_on: str
    license: str


def load_timm(name: str, classes: int) -> Pretrained:
    """`NAME` or `NAME,file=PATH` of timm, with the mean and standard deviation of its weights.

    Weights are timm's, downloaded if they are not there, or those of a file, of a network for
    `classes` classes. Raises UsageError, and RobenchError where the download fails.
    """
    timm = _module("timm", "timm models")
    name, options = _options("timm", name, ("file",))
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise _unknown("timm model", base, timm.list_models())
    file, license = options.get("file"), UNKNOWN
    given: dict[str, Any] = {"num_classes": classes}
    if file is None:
        given = {"pretrained": True}
        known = _timm_config(timm, name)
        # Not left to timm: 1.0.9, which robustbench pins, does not find a newer client. What needs
        # a loader of its own elsewhere (custom_load) does not on the Hub, unless that says so.
        if known is not None and known.hf_hub_id and known.custom_load != "hf":
            path, license = hub_file(f"{known.hf_hub_id}/{known.hf_hub_filename or STANDARD}")
            given["pretrained_cfg_overlay"] = {"file": str(path), "custom_load": False}
    net = _made(f"timm:{name}", lambda: timm.create_model(name, **given))
    config = net.pretrained_cfg
    if file is not None:
        load_weights(net, Path(file))
    elif license == UNKNOWN:
        license = config.get("license") or UNKNOWN
    channels, size = config["input_size"][0], config["input_size"][-1]
    return Pretrained(
        _normalized(net, config["mean"], config["std"]),
        classes if file is not None else config["num_classes"], channels, size,
        bool(config.get("fixed_input_size")), images_of(config), license)


def load_torchvision(name: str, classes: int) -> Pretrained:
    """`NAME`, `NAME,weights=IMAGENET1K_V1` or `NAME,file=PATH` of torchvision's classifiers.

    The mean and standard deviation are those of the named weights, by default of the newest ones
    that torchvision has; a file holds a network for `classes` classes. Raises as `load_timm`.
    """
    models = importlib.import_module("torchvision.models")
    name, options = _options("torchvision", name, ("weights", "file"))
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision model", name, known)
    available = models.get_model_weights(name)
    chosen = options.get("weights", "DEFAULT")
    if chosen not in available.__members__:
        raise _unknown(f"weights of torchvision:{name}", chosen, available.__members__)
    weights, file = available[chosen], options.get("file")
    net = _made(f"torchvision:{name}", lambda: models.get_model(
        name, weights=weights if file is None else None,
        **({} if file is None else {"num_classes": classes})))
    if file is not None:
        load_weights(net, Path(file))
    preset, meta = weights.transforms(), weights.meta
    size = preset.crop_size[0]
    return Pretrained(
        _normalized(net, preset.mean, preset.std),
        classes if file is not None else len(meta["categories"]), len(preset.mean), size,
        min(meta["min_size"]) >= size,
        imagenet_name(resize=preset.resize_size[0], crop=size,
                      interpolation=preset.interpolation.value),
        UNKNOWN if file is not None else meta.get("license", UNKNOWN))


def hub_file(source: str) -> tuple[Path, str]:
    """(the file, the license) of `ORG/REPO`, `ORG/REPO/FILE` or either of them with `@REVISION`.

    The file is `model.safetensors` unless it is named; it is downloaded to the Hub's own cache, or
    taken from there. Raises UsageError, and RobenchError where it cannot be had.
    """
    text, _, revision = source.partition("@")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", text)
    if match is None:
        raise UsageError(f"hf:{source}: write hf:ORG/REPO or hf:ORG/REPO/FILE")
    repository, file = match[1], match[2] or STANDARD
    if not file.endswith(WEIGHTS):
        raise UsageError(f"hf:{source}: {file} is no file of weights ({', '.join(WEIGHTS)})")
    hub = _module("huggingface_hub", "the Hugging Face Hub")
    where = {"revision": revision or None, "endpoint": os.environ.get("HF_ENDPOINT")}
    try:
        path = hub.hf_hub_download(repository, file, **where)
    except hub.errors.EntryNotFoundError as error:
        if isinstance(error, hub.errors.LocalEntryNotFoundError):
            raise _unavailable(source, error) from None
        raise UsageError(f"hf:{source}: {repository} has no {file}: name the file, "
                         f"hf:{repository}/FILE") from None
    except Exception as error:  # of the network, of the Hub, of its client
        raise _unavailable(source, error) from None
    return Path(path), _license(hub, repository, where)


def _timm_config(timm: ModuleType, name: str) -> Any:
    """What timm knows about the weights of a name, None if there are none."""
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # resnet18.NAME of weights that it does not have
        raise UsageError(f"timm:{name}: {error}") from None


def _license(hub: ModuleType, repository: str, where: dict[str, Any]) -> str:
    """What the card of a repository says, "unknown" where there is none or no network."""
    try:
        api = hub.HfApi(endpoint=where["endpoint"])
        card = api.model_info(repository, revision=where["revision"]).card_data
        return str(card.get("license") or UNKNOWN) if card else UNKNOWN
    except Exception:  # the file is here: a license that is not told must not take it away
        return UNKNOWN


def _unavailable(source: str, error: Exception) -> RobenchError:
    return RobenchError(f"hf:{source} could not be downloaded ({one_line(error)})")


def _made(source: str, build: Callable[[], Any]) -> Any:
    """A network of a library with its weights, in eval mode."""
    try:
        with warnings.catch_warnings(), guarded():
            warnings.simplefilter("ignore")
            return build().eval()
    except UsageError:
        raise
    except Exception as error:  # of the network, of the library
        raise RobenchError(f"{source} could not be loaded ({one_line(error)})") from None


def _normalized(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=net)).eval()


def _options(kind: str, text: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    name, *pairs = text.split(",")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    for key, value in options.items():
        if key not in known or not value:
            raise UsageError(f"{kind}:{text}: {key!r} is none of "
                             f"{', '.join(f'{one}=...' for one in known)}")
    if len(set(options) & {"weights", "file"}) > 1:
        raise UsageError(f"{kind}:{text}: give weights=... or file=..., not both")
    return name, options


def _module(name: str, what: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{what} need {name} ({error}): pip install \"robench[hub]\"") from None


def _unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Like `registry.unknown`, of lists that are too long to be shown."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return UsageError(f"unknown {kind} {name!r}."
                      + (f" Did you mean: {', '.join(close)}?" if close else ""))
