"""robench: benchmark adversarial defenses against adversarial attacks on image classifiers.

The Python API is `robench.evaluate`, `robench.run` and the packages `robench.attacks`,
`robench.defenses`, `robench.benchmark` and `robench.reports`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("robench")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

if not (Path(__file__).parent / "attacks").is_dir():
    # git wrote the links as text files (Windows): look beside src/ instead.
    __path__ = [*__path__, str(Path(__file__).resolve().parents[2])]

if TYPE_CHECKING:
    from robench.attacks.threat import ThreatModel as ThreatModel
    from robench.benchmark.evaluate import evaluate as evaluate
    from robench.benchmark.matrix import run as run
    from robench.benchmark.spec import RunSpec as RunSpec

# Imported on first use: `robench --help` must not wait for torch.
_LAZY = {
    "ThreatModel": "robench.attacks.threat",
    "evaluate": "robench.benchmark.evaluate",
    "run": "robench.benchmark.matrix",
    "RunSpec": "robench.benchmark.spec",
}
__all__ = ["RunSpec", "ThreatModel", "__version__", "evaluate", "run"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'robench' has no attribute {name!r}")
