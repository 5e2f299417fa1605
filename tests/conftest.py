"""For all tests: seeds, one thread, fresh interpreters, and who is skipped where."""

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]

# Before anything imports torch, and for child processes too: on the tiny networks of the tests
# more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long one example takes says nothing on a busy machine.
hypothesis.settings.register_profile("robench", deadline=None)
hypothesis.settings.load_profile("robench")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, and what takes minutes unless it was asked for."""
    asked = os.environ.get("ROBENCH_SLOW") == "1" or "slow" in item.config.option.markexpr
    if item.get_closest_marker("slow") and not asked:
        pytest.skip("slow: run with -m slow or ROBENCH_SLOW=1")
    if item.get_closest_marker("gpu") and not _cuda():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("realdata"):
        _data_root()


def _cuda() -> bool:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where the driver is too old
        return torch.cuda.is_available()


def _data_root() -> Path:
    root = os.environ.get("ROBENCH_DATA")
    if not root:
        pytest.skip("set ROBENCH_DATA to a folder with the data in torchvision's layout")
    return Path(root)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real data sets, in torchvision's layout."""
    return _data_root()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whichever tests ran before. Imports nothing for tests without it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def robustbench() -> ModuleType:
    """The package. Not installed, it is skipped; installed but of no use, it is an error."""
    try:
        distribution("robustbench")
    except PackageNotFoundError:
        pytest.skip('robustbench is not installed: pip install "robench[zoo]"')
    from robench.benchmark.zoo.package import import_robustbench

    return import_robustbench()


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a fresh interpreter that finds robench and turns warnings into errors."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            cwd=cwd, capture_output=True, text=True, timeout=300,
        )

    return run
