"""Where a training is written down, apart from the screen: training.csv always, more by --log.

To add one, write a `Watcher` whose constructor takes a `Run`, and name it package.module:Class,
or register it in a module that an entry point of the group `robench.watchers` names:

    @WATCHERS.register("my-log", description="...")
    class MyLog(Metrics): ...
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from robench.defenses.trainer import EpochLog, Watcher
from robench.errors import RobenchError, UsageError, one_line
from robench.files import write_atomic
from robench.registry import Registry


@dataclass(frozen=True)
class Run:
    """The training that a watcher is to follow.

    Attributes:
        key, label: a name that no other training has, and one for people.
        folder: of the cell; a watcher may put files there.
        settings: everything that determines the weights, as JSON.
    """

    key: str
    label: str
    folder: Path
    settings: Mapping[str, Any]


WATCHERS: Registry[Callable[[Run], Watcher]] = Registry("log", "robench.watchers")


def metrics(log: EpochLog) -> dict[str, float]:
    """The numbers of an epoch by name; accuracies in [0, 1], those that were measured."""
    values = {
        "lr": log.lr,
        "seconds": log.seconds,
        "images_per_second": log.images_per_second,
        **{f"loss/{name}": value for name, value in log.losses.items()},
        "clean": log.clean,
        "robust": log.robust,
    }
    for name, (clean, robust) in log.averages.items():
        values |= {f"{name}_clean": clean, f"{name}_robust": robust}
    for name, (own, students) in log.rob_f.items():
        values |= {f"rob_f/{name}_self": own, f"rob_f/{name}_student": students}
    return {name: value for name, value in values.items() if value is not None}


class TrainingCsv(Watcher):
    """A file with a line for each epoch, written anew after every one, so that it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, float]] = []

    def begin(self, history: Sequence[EpochLog]) -> None:
        self._rows = [self._row(log) for log in history]
        self._write()

    def epoch(self, log: EpochLog) -> None:
        self._rows.append(self._row(log))
        self._write()

    @staticmethod
    def _row(log: EpochLog) -> dict[str, float]:
        return {"epoch": log.epoch, **metrics(log)}

    def _write(self) -> None:
        text = io.StringIO()
        columns = dict.fromkeys(name for row in self._rows for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomic(self._path, text.getvalue())


class Metrics(Watcher):
    """A watcher that passes on the numbers of each epoch, after a resume those before it too.

    Attributes:
        needs: the package without which it does not work, which is also the name of our extra.
    """

    needs: ClassVar[str] = ""

    def begin(self, history: Sequence[EpochLog]) -> None:
        for log in history:
            self.epoch(log)


@WATCHERS.register("tensorboard", description="event files in the folder of the cell")
class TensorBoard(Metrics):
    needs = "tensorboard"

    def __init__(self, run: Run) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # What an earlier start wrote is purged, since `begin` tells all of it again.
        self._writer = writer(str(run.folder / "tensorboard"), purge_step=0)

    def epoch(self, log: EpochLog) -> None:
        for name, value in metrics(log).items():
            self._writer.add_scalar(name, value, log.epoch)
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()


@WATCHERS.register("mlflow", description="an MLflow run; the server is MLFLOW_TRACKING_URI")
class MLflow(Metrics):
    needs = "mlflow"

    def __init__(self, run: Run) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=run.label, tags={"cell": run.key})
        self._mlflow.log_dict(dict(run.settings), "spec.json")

    def epoch(self, log: EpochLog) -> None:
        self._mlflow.log_metrics(metrics(log), step=log.epoch)

    def end(self) -> None:
        self._mlflow.end_run()


@WATCHERS.register("wandb", description="a Weights & Biases run of the project robench")
class WandB(Metrics):
    needs = "wandb"

    def __init__(self, run: Run) -> None:
        self._run: Any = importlib.import_module("wandb").init(
            project="robench", id=run.key, name=run.label, config=dict(run.settings),
            resume="allow", dir=str(run.folder),
        )

    def epoch(self, log: EpochLog) -> None:
        self._run.log(metrics(log), step=log.epoch)

    def end(self) -> None:
        self._run.finish()


def find_watcher(name: str) -> Callable[[Run], Watcher]:
    """What --log names: registered, or package.module:Class.

    Raises UsageError if there is none, or if a package that it needs is not installed.
    """
    made = _imported(name) if ":" in name else WATCHERS[name].value
    needs = getattr(made, "needs", "")
    if needs and importlib.util.find_spec(needs) is None:
        raise UsageError(f"--log {name} needs the package {needs}; install it: "
                         f'pip install "robench[{needs}]"')
    return made


def start_watcher(name: str, run: Run) -> Watcher:
    """Raises RobenchError if it cannot start: its server may be down."""
    try:
        return find_watcher(name)(run)
    except RobenchError:
        raise
    except Exception as error:
        raise RobenchError(f"--log {name} could not be started: {one_line(error)}") from None


def _imported(name: str) -> Callable[[Run], Watcher]:
    # An installed console script does not search the current directory, `python -m` does.
    sys.path.insert(0, "")
    try:
        made: Callable[[Run], Watcher] = pkgutil.resolve_name(name)
    except Exception as error:  # whatever the module's own code raises
        raise UsageError(f"--log {name}: cannot be imported: {one_line(error)}") from None
    finally:
        sys.path.remove("")
    return made


class Several(Watcher):
    """Tells several watchers the same; one that fails is told nothing more.

    A failure of robench itself, such as a full disk, still ends the training.
    """

    def __init__(self, watchers: Iterable[Watcher]) -> None:
        self._watchers = list(watchers)

    def _tell(self, what: Callable[[Watcher], None]) -> None:
        for watcher in list(self._watchers):
            try:
                what(watcher)
            except RobenchError:
                raise
            except Exception as error:  # loggers raise whatever their servers make of it
                self._watchers.remove(watcher)
                self.warn(f"{type(watcher).__name__} failed and logs no more: {one_line(error)}")

    def begin(self, history: Sequence[EpochLog]) -> None:
        self._tell(lambda watcher: watcher.begin(history))

    def step(self, epoch: int, step: int, steps: int) -> None:
        self._tell(lambda watcher: watcher.step(epoch, step, steps))

    def losses(self, means: Mapping[str, float]) -> None:
        self._tell(lambda watcher: watcher.losses(means))

    def epoch(self, log: EpochLog) -> None:
        self._tell(lambda watcher: watcher.epoch(log))

    def warn(self, text: str) -> None:
        self._tell(lambda watcher: watcher.warn(text))

    def end(self) -> None:
        self._tell(lambda watcher: watcher.end())
