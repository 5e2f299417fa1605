"""RobustBench's models, despite what their packages do to each other.

Three hazards, measured on robustbench 1.1.1 and torchattacks 3.5.1, are handled here and told by
`robench doctor`: robustbench imports `autoattack`, which is not on PyPI, while it depends on
`pyautoattack`; it imports `pkg_resources`, gone from setuptools 82; and torchattacks ships its
own old copy of a `robustbench` package, which wins if it is installed last.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

from torch import nn

from robench.attacks.threat import Norm
from robench.errors import RobenchError, UsageError, one_line
from robench.registry import unknown

CURE = "pip install --force-reinstall --no-deps robustbench"


def import_robustbench() -> ModuleType:
    """The robustbench package. Raises UsageError with the command that cures what is wrong."""
    if "robustbench" in sys.modules:
        return sys.modules["robustbench"]
    if overwritten():
        raise UsageError(f"torchattacks has overwritten robustbench; repair it: {CURE}")
    try:
        try:
            importlib.import_module("autoattack")
        except ImportError:  # the same code under its name on PyPI
            sys.modules["autoattack"] = importlib.import_module("pyautoattack")
            sys.modules["autoattack.state"] = importlib.import_module("pyautoattack.state")
        with warnings.catch_warnings():
            # pkg_resources warns that it is deprecated; timm warns about its own module names.
            warnings.simplefilter("ignore")
            return importlib.import_module("robustbench")
    except ImportError as error:
        raise UsageError(f"robustbench cannot be imported ({error}); "
                         'install it: pip install "robench[zoo]"') from None


def overwritten() -> bool:
    """Whether the installed robustbench files are not robustbench's own."""
    try:
        recorded = distribution("robustbench").files or []
    except PackageNotFoundError:
        return False
    for file in recorded:
        if str(file) == "robustbench/utils.py" and file.hash is not None:
            import base64
            import hashlib

            content = hashlib.sha256(Path(str(file.locate())).read_bytes()).digest()
            return base64.urlsafe_b64encode(content).rstrip(b"=").decode() != file.hash.value
    return True


def load_robustbench(name: str, dataset: str, norm: Norm, folder: Path) -> nn.Module:
    """A model of the zoo, in eval mode.

    Weights are read from `folder`/<dataset>/<norm>/<name>.pt and downloaded to it if they are
    not there. Raises UsageError for an unknown name, RobenchError if the download fails.
    """
    import_robustbench()
    zoo = importlib.import_module("robustbench.model_zoo")
    utils = importlib.import_module("robustbench.utils")
    enums = importlib.import_module("robustbench.model_zoo.enums")
    try:
        data, threat = enums.BenchmarkDataset(dataset), enums.ThreatModel(norm)
        models = zoo.model_dicts[data][threat]
    except (ValueError, KeyError):
        raise UsageError(f"the RobustBench zoo has no models for {dataset} under {norm}") from None
    if name not in models:
        raise unknown("RobustBench model", name, models)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            net: nn.Module = utils.load_model(
                model_name=name, model_dir=str(folder), dataset=dataset, threat_model=norm
            )
    except Exception as error:  # whatever its many loaders raise
        place = folder / dataset / norm / f"{name}.pt"
        raise RobenchError(f"robustbench:{name} could not be loaded from {place} "
                           f"({one_line(error)})") from None
    return net.eval()
