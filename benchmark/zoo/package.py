"""The package robustbench, despite what packages do to each other.

Three hazards, measured on robustbench 1.1.1 and torchattacks 3.5.1, are handled here and told by
`robench doctor`: robustbench imports `autoattack`, which is not on PyPI, while it depends on
`pyautoattack`; it imports `pkg_resources`, gone from setuptools 82; and torchattacks ships its
own old copy of a `robustbench` package, which wins if it is installed last.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from robench.errors import UsageError

INSTALL = 'pip install "robench[zoo]"'
CURE = "pip install --force-reinstall --no-deps robustbench"


@dataclass(frozen=True)
class Hazard:
    """What keeps robustbench from working, and the command that cures it."""

    name: str
    text: str
    cure: str


def import_robustbench() -> ModuleType:
    """The robustbench package. Raises UsageError with the command that cures what is wrong."""
    if "robustbench" in sys.modules:
        return sys.modules["robustbench"]
    for hazard in hazards():
        raise UsageError(f"robustbench cannot be used: {hazard.name} {hazard.text}; repair it: "
                         f"{hazard.cure}")
    try:
        if not _there("autoattack"):  # the same code under its name on PyPI
            sys.modules["autoattack"] = importlib.import_module("pyautoattack")
            sys.modules["autoattack.state"] = importlib.import_module("pyautoattack.state")
        with warnings.catch_warnings():
            # pkg_resources warns that it is deprecated; timm warns about its own module names.
            warnings.simplefilter("ignore")
            return importlib.import_module("robustbench")
    except ImportError as error:
        raise UsageError(f"robustbench cannot be imported ({error}); "
                         f"install it again: {INSTALL}") from None


def hazards() -> list[Hazard]:
    """What is wrong with the installation, found without importing robustbench."""
    try:
        distribution("robustbench")
    except PackageNotFoundError:
        return [Hazard("robustbench", "is not installed", INSTALL)]
    found = []
    if overwritten():
        found.append(Hazard("robustbench", "is overwritten by torchattacks' own old copy", CURE))
    if not (_there("autoattack") or _there("pyautoattack")):
        found.append(Hazard("autoattack", "is missing, and pyautoattack, which takes its place",
                            'pip install "pyautoattack>=0.2"'))
    if not _there("pkg_resources"):
        found.append(Hazard("pkg_resources", "is missing: setuptools no longer has it",
                            'pip install "setuptools<81"'))
    return found


def overwritten() -> bool:
    """Whether the installed robustbench files are not robustbench's own."""
    try:
        recorded = distribution("robustbench").files or []
    except PackageNotFoundError:
        return False
    for file in recorded:
        if str(file) == "robustbench/utils.py" and file.hash is not None:
            path = Path(str(file.locate()))
            content = hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest()
            return base64.urlsafe_b64encode(content).rstrip(b"=").decode() != file.hash.value
    return True


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # a module in sys.modules that nobody found there
        return True
