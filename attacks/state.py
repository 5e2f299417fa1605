"""The state file of a search: what has ended, and the units that were under way."""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robench.attacks.pool import Images, Units
from robench.files import pack_arrays, write_atomic

Arrays = dict[str, Any]


def write_state(path: Path, arrays: Arrays, under_way: Units | None) -> None:
    """Write the file, whole or not at all. Raises RobenchError: the disk is full."""
    write_atomic(path, pack_arrays(arrays | _packed(under_way), compress=False))


def read_state(path: Path, identity: str, fingerprint: np.ndarray[Any, Any]) -> Arrays | None:
    """The arrays of `write_state`; None if there is no file, or it is damaged, of another search
    or of a network with other logits."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept}
        same = np.allclose(arrays["fingerprint"], fingerprint, rtol=1e-3, atol=1e-3)
        return arrays if same and str(arrays["identity"]) == identity else None
    except Exception:  # damaged bytes may raise anything in a parser
        return None  # the file only saves time


def units_of(arrays: Arrays, images: Images) -> Units | None:
    """The units that were under way, on the device of the images."""
    if "unit.image" not in arrays:
        return None
    tensors = {name: torch.from_numpy(array).to(images.y.device)
               for name, array in arrays.items() if name.startswith(("unit.", "state."))}
    rows = {name.removeprefix("unit."): t for name, t in tensors.items() if name[0] == "u"}
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name[0] == "s"}
    return Units(x=images.x[rows["image"]], state=state, **rows)


def _packed(units: Units | None) -> Arrays:
    """The tensors of units, without the clean images."""
    if units is None:
        return {}
    names = [f.name for f in fields(Units) if f.name not in ("x", "state")]
    rows = {f"unit.{name}": getattr(units, name) for name in names}
    state = {f"state.{name}": tensor for name, tensor in units.state.items()}
    return {name: tensor.cpu().numpy() for name, tensor in (rows | state).items()}
