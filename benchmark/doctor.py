"""doctor: is the environment what it claims to be?"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from robench.benchmark.zoo.package import INSTALL, hazards, import_robustbench
from robench.errors import UsageError, one_line

PACKAGES = ("robench", "torch", "torchvision", "numpy", "pandas", "scikit-learn", "torchattacks",
            "pyautoattack", "robustbench", "timm", "huggingface_hub", "setuptools")


@dataclass(frozen=True)
class Finding:
    """One checked fact. `cure` is what to do if it is not ok."""

    name: str
    ok: bool
    text: str
    cure: str = ""


def examine(data_root: Path | None = None) -> list[Finding]:
    """Look at packages, devices and data; nothing is changed or downloaded."""
    findings = [Finding(f"package {name}", True, _version(name)) for name in PACKAGES]
    for check in (_torchvision, _torch, _robustbench):
        findings += check()
    if data_root is not None:
        there = data_root.is_dir()
        names = sorted(p.name for p in data_root.iterdir()) if there else []
        findings.append(Finding("data root", there, ", ".join(names[:8]) or "empty or not there",
                                f"put torchvision's data folders into {data_root}"))
    return findings


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _torchvision() -> Iterator[Finding]:
    yield _try("torchvision", lambda: importlib.import_module("torchvision").__version__,
               "install torch and torchvision from the same index, both CPU or both CUDA")


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("threads", True, str(torch.get_num_threads()))
    yield _try("CUDA devices", _gpus, "install a torch for this GPU and its driver (nvidia-smi "
               "names both), see that nobody else holds the GPU, or take --device cpu")
    tf32 = torch.backends.cudnn.allow_tf32
    yield Finding("TF32 convolutions", True, "allowed (torch's default)" if tf32 else "off")


def _gpus() -> str:
    import torch

    from robench.benchmark.sources import pick_device

    names = [torch.cuda.get_device_name(pick_device(f"cuda:{i}"))
             for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none: everything runs on the CPU"


def _robustbench() -> Iterator[Finding]:
    """The hazards between packages, each with its cure; where there is none, the import."""
    if _version("robustbench") == "not installed":
        yield Finding("robustbench", True, "not installed; robustbench:NAME needs robench[zoo]")
        return
    found = hazards()
    yield from (Finding(one.name, False, one.text, one.cure) for one in found)
    if not found:
        yield _try("robustbench", lambda: f"imports ({import_robustbench().__name__})",
                   INSTALL)


def _try(name: str, action: Callable[[], str], cure: str) -> Finding:
    try:
        return Finding(name, True, action())
    except (ImportError, RuntimeError, UsageError) as error:
        return Finding(name, False, one_line(error), cure)
