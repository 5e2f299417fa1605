"""Weights on disk: safetensors with a JSON header, readable without robench. Never pickle."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from robench.benchmark.models import build_model
from robench.benchmark.recipe import ModelSpec
from robench.errors import UsageError, one_line
from robench.files import write_atomic


class Header(BaseModel):
    """What a checkpoint says about itself; enough to build the network again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSpec
    classes: PositiveInt
    channels: PositiveInt
    size: PositiveInt
    dataset: str
    defense: str
    recipe: str
    seed: int
    checkpoint: str
    epoch: int
    selection: str = "unknown"  # the split on which the epoch was chosen: val, test or none

    def build(self) -> nn.Module:
        """A new network, from torch's global generator."""
        net = build_model(self.model.name, classes=self.classes, channels=self.channels,
                          size=self.size, normalize=self.model.normalize)
        # Convolutions are up to twice as fast this way, but a user's network may call view().
        return net if self.model.is_foreign else net.to(memory_format=torch.channels_last)


def weights_sha256(net: nn.Module) -> str:
    """Hash of all parameters and buffers, by name; the same on every device."""
    total = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        total.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_checkpoint(path: Path, net: nn.Module, header: Header) -> None:
    state = {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
    write_atomic(path, to_safetensors(state, {"robench": header.model_dump_json()}))


def read_header(path: Path) -> Header | None:
    """The header of a robench checkpoint; None for a file of somebody else's."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("robench")
        return None if text is None else Header.model_validate_json(text)
    except ValidationError:
        raise UsageError(f"{path}: its robench header is damaged or of another version") from None
    except Exception as error:  # damaged bytes may raise anything in a parser
        raise UsageError(_unreadable(path, error)) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in a .pt/.pth file that holds tensors alone.

    Raises UsageError for a missing, truncated or foreign file, and for a pickle that would run
    code.
    """
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                loaded: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            loaded = _load(path, "cpu")
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path}: holds more than tensors, or is damaged; robench does not unpickle code. "
            "Save the state dict alone: torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # damaged bytes may raise anything in a parser
        raise UsageError(_unreadable(path, error)) from None
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise UsageError(f"{path}: holds no state dict of tensors")
    return loaded


def check_unpacked(file: Path) -> None:
    """Raises ValueError for a file that takes more memory than it is long: torch.save packs
    nothing, and a few bytes of somebody else's could fill the memory."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                raise ValueError("it unpacks to more than it is, which no file of torch.save does")


def _load(path: Path, device: torch.device | str) -> Any:
    """The tensors of a file of torch.save; a pickle that would run code is refused."""
    check_unpacked(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other versions of the format
        return torch.load(path, map_location=device, weights_only=True)


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) or not path.exists():
        return f"there is no file {path}"
    return f"{path}: cannot be read, it is truncated or not a checkpoint ({one_line(error, 120)})"


def load_weights(net: nn.Module, path: Path) -> None:
    """Put the weights of a file into a network of the same architecture.

    The prefix of DataParallel and the dead `sub_block1` of TRADES' WideResNet are ignored unless
    the network has such names itself. Raises UsageError naming the first difference.
    """
    net.load_state_dict(_fitting(net, read_weights(path), path))


def _fitting(net: nn.Module, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Those that the network has; see load_weights."""
    own = net.state_dict()
    if not any(name.startswith("module.") for name in own):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items()
               if name in own or not name.startswith("sub_block1.")}
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or extra or shapes:
        if shapes:
            name = min(shapes)
            what = f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        elif missing:
            what = f"{missing[0]} is missing"
        else:
            what = f"{extra[0]} is unknown to it"
        raise UsageError(
            f"{path} does not fit {type(net).__name__}: {what} "
            f"({len(missing)} missing, {len(extra)} unknown, {len(shapes)} of another shape)"
        )
    return weights


def load_checkpoint(path: Path, model: str | None = None) -> tuple[nn.Module, Header]:
    """A network that robench saved, in eval mode.

    model: a package.module:factory that the caller knows the network by. A file may name such
    code, but does not have it run. Raises UsageError.
    """
    header = read_header(path)
    if header is None:
        raise UsageError(f"{path} does not say which network it holds: add --model NAME")
    name, weights = header.model.name, read_weights(path)
    if not header.model.is_foreign:
        with torch.device("meta"):  # a header that asks for too much gets no memory
            _fitting(header.build(), weights, path)
    elif name != model:
        raise UsageError(f"{path} was made with code, {name!r}, which a file cannot have run: "
                         "if you trust it, name it yourself with --model")
    net = header.build()
    net.load_state_dict(_fitting(net, weights, path))
    return net.eval(), header


class CellFolder:
    """The `Keeper` of a cell: its state and its checkpoints in one folder."""

    def __init__(self, folder: Path, header: Header, device: torch.device) -> None:
        self.folder, self.header, self.device = folder, header, device

    def load_state(self) -> dict[str, Any] | None:
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = _load(path, self.device)
        except Exception:  # damaged bytes may raise anything in a parser
            raise UsageError(f"{path} is damaged: delete {self.folder} to train again") from None
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.folder / "state.pt", buffer.getvalue())

    def save_network(self, name: str, net: nn.Module, epoch: int) -> None:
        header = self.header.model_copy(update={"checkpoint": name, "epoch": epoch})
        save_checkpoint(self.path(name), net, header)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def write_json(self, name: str, content: Any) -> None:
        write_atomic(self.folder / name, json.dumps(content, indent=1) + "\n")
