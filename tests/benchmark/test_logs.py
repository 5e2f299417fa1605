"""What is written about a training: the CSV, the loggers of others, the line on the screen."""

import csv
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from robench.benchmark import logs, progress
from robench.benchmark.cells import plan, train
from robench.benchmark.data import load_dataset
from robench.benchmark.logs import (
    WATCHERS,
    Metrics,
    Run,
    Several,
    TrainingCsv,
    find_watcher,
    metrics,
    start_watcher,
)
from robench.benchmark.progress import EpochWatcher, Reporter
from robench.benchmark.sources import pick_device
from robench.benchmark.spec import RunSpec, read_config
from robench.defenses.history import EpochLog
from robench.defenses.trainer import Watcher
from robench.errors import RobenchError, UsageError

RUN = Run("0123456789ab", "trades seed 0", Path("cells/0123456789ab"), {"seed": 0})
FIRST = EpochLog(0, 0.1, 2.0, {"total": 2.0, "ce": 1.5, "kl": 0.5}, images=100)
SECOND = EpochLog(1, 0.01, 4.0, {"total": 1.0, "ce": 0.75, "kl": 0.25}, 0.9, 0.5, 100,
                  {"swa": (0.8, 0.625)})


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_metrics_of_an_epoch():
    assert metrics(SECOND) == {
        "lr": 0.01, "seconds": 4.0, "images_per_second": 25.0, "loss/total": 1.0,
        "loss/ce": 0.75, "loss/kl": 0.25, "clean": 0.9, "robust": 0.5, "swa_clean": 0.8,
        "swa_robust": 0.625,
    }
    assert metrics(FIRST).keys() == metrics(SECOND).keys() - {"clean", "robust", "swa_clean",
                                                              "swa_robust"}


# training.csv


def test_the_csv_is_whole_after_every_epoch(tmp_path):
    path = tmp_path / "training.csv"
    watcher = TrainingCsv(path)
    watcher.begin([])
    watcher.epoch(FIRST)
    (row,) = rows(path)
    assert row == {"epoch": "0", **{k: str(v) for k, v in metrics(FIRST).items()}}
    watcher.epoch(SECOND)
    first, second = rows(path)
    assert second == {"epoch": "1", **{k: str(v) for k, v in metrics(SECOND).items()}}
    assert first == {**row, **dict.fromkeys(second.keys() - row.keys(), "")}
    assert [p.name for p in tmp_path.iterdir()] == ["training.csv"]


def test_the_csv_of_a_resumed_training_is_that_of_an_uninterrupted_one(tmp_path):
    for name, before, after in (("whole", [], [FIRST, SECOND]), ("resumed", [FIRST], [SECOND]),
                                ("late", [FIRST, SECOND], [])):
        watcher = TrainingCsv(tmp_path / name)
        watcher.begin(before)
        for log in after:
            watcher.epoch(log)
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 1


# The loggers of others, as far as they are called here


class Calls:
    """A module, class or object on which everything can be called; it is all written down."""

    def __init__(self, calls, name=""):
        self._calls, self._name = calls, name

    def __getattr__(self, name):
        return Calls(self._calls, f"{self._name}.{name}")

    def __call__(self, *arguments, **options):
        self._calls.append((self._name, *arguments, options))
        return Calls(self._calls, f"{self._name}()")


@pytest.fixture
def fake(monkeypatch):
    """Puts a module of this name in place of the real one; returns the list of its calls."""

    def install(name):
        calls = []
        module = ModuleType(name)
        module.__getattr__ = lambda attribute: getattr(Calls(calls), attribute)
        module.__spec__ = SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


def follow(name):
    """A training of two epochs that was interrupted after the first."""
    watcher = start_watcher(name, RUN)
    watcher.begin([FIRST])
    watcher.step(1, 1, 1)
    watcher.epoch(SECOND)
    watcher.end()


def test_tensorboard(fake):
    fake("tensorboard")
    calls = fake("torch.utils.tensorboard")
    follow("tensorboard")
    assert calls[0] == (".SummaryWriter", str(RUN.folder / "tensorboard"), {"purge_step": 0})
    told = [call[1:4] for call in calls if call[0].endswith("add_scalar")]
    assert told == [(name, value, log.epoch) for log in (FIRST, SECOND)
                    for name, value in metrics(log).items()]
    assert calls[-1][0].endswith(".close")


def test_mlflow(fake):
    calls = fake("mlflow")
    follow("mlflow")
    assert calls == [
        (".start_run", {"run_name": RUN.label, "tags": {"cell": RUN.key}}),
        (".log_dict", {"seed": 0}, "spec.json", {}),
        (".log_metrics", metrics(FIRST), {"step": 0}),
        (".log_metrics", metrics(SECOND), {"step": 1}),
        (".end_run", {}),
    ]


def test_wandb(fake):
    calls = fake("wandb")
    follow("wandb")
    assert calls == [
        (".init", {"project": "robench", "id": RUN.key, "name": RUN.label,
                   "config": {"seed": 0}, "resume": "allow", "dir": str(RUN.folder)}),
        (".init().log", metrics(FIRST), {"step": 0}),
        (".init().log", metrics(SECOND), {"step": 1}),
        (".init().finish", {}),
    ]


@pytest.mark.parametrize("name", WATCHERS.names())
def test_a_missing_extra_is_a_usage_error(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        find_watcher(name)
    assert f'pip install "robench[{name}]"' in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", "Did you mean: tensorboard?"), ("no_such_package:Log", "cannot be imported"),
     ("json:NoSuchLog", "cannot be imported"), ("x y:Log", "cannot be imported")],
)
def test_unknown_loggers(name, message):
    with pytest.raises(UsageError, match=message.replace("?", "\\?")) as error:
        find_watcher(name)
    assert "\n" not in str(error.value)


def test_loggers_of_other_packages(monkeypatch):
    def load():
        WATCHERS.register("mine", description="of another package")(Mine)

    monkeypatch.setattr("robench.registry.entry_points", lambda group: [
        SimpleNamespace(name="mine", load=load)] if group == "robench.watchers" else [])
    monkeypatch.setattr(WATCHERS, "_entries", dict(WATCHERS._entries))
    monkeypatch.setattr(WATCHERS, "_loaded", False)
    assert find_watcher("mine") is Mine


def test_a_logger_that_cannot_start(monkeypatch):
    def broken(run):
        raise OSError("no\nserver")

    monkeypatch.setattr(logs, "find_watcher", lambda name: broken)
    with pytest.raises(RobenchError, match="--log x could not be started: OSError: no server"):
        start_watcher("x", RUN)


# Several watchers


class Notes(Watcher):
    """Writes down what it is told; `fails_at` names a method that does not work."""

    def __init__(self, fails_at="", error=None):
        self.told, self._fails_at = [], fails_at
        self._error = error or ConnectionError("gone")

    def _note(self, what, *arguments):
        if what == self._fails_at:
            raise self._error
        self.told.append((what, *arguments))

    def begin(self, history):
        self._note("begin", history)

    def step(self, *arguments):
        self._note("step", *arguments)

    def losses(self, means):
        self._note("losses", means)

    def epoch(self, log):
        self._note("epoch", log)

    def warn(self, text):
        self._note("warn", text)

    def end(self):
        self._note("end")


def tell(watcher):
    watcher.begin([FIRST])
    watcher.step(1, 1, 2)
    watcher.losses({"total": 1.0})
    watcher.epoch(SECOND)
    watcher.warn("odd")
    watcher.end()


def test_all_are_told_the_same():
    alone, pair = Notes(), (Notes(), Notes())
    tell(alone)
    tell(Several(pair))
    assert len(alone.told) == 6
    assert alone.told == pair[0].told == pair[1].told


@pytest.mark.parametrize("moment", ["begin", "step", "losses", "epoch", "warn", "end"])
def test_one_that_fails_is_told_nothing_more_and_the_others_all(moment):
    alone, well, ill = Notes(), Notes(), Notes(moment)
    tell(alone)
    tell(Several([ill, well]))
    warning = ("warn", "Notes failed and logs no more: ConnectionError: gone")
    assert [note for note in well.told if note != warning] == alone.told
    assert well.told.count(warning) == 1
    assert ill.told == alone.told[: len(ill.told)] and len(ill.told) < 6


@pytest.mark.parametrize("error", [RobenchError("disk full"), KeyboardInterrupt()])
def test_some_failures_end_the_training(error):
    with pytest.raises(type(error)):
        tell(Several([Notes("epoch", error)]))


# In a run


def one_cell(folder, **request):
    dataset = load_dataset("digits")
    spec = RunSpec.create({
        "defenses": "standard", "epochs": 2, "train_limit": 64, "out": folder,
        "train": {"select": "val", "validation": 20, "select_steps": 1}, **request,
    })
    (cell,), _ = plan(spec, dataset, None)
    return cell, dataset


def test_a_training_leaves_its_csv(tmp_path):
    cell, dataset = one_cell(tmp_path)
    result = train(cell, dataset, pick_device("cpu"), Reporter(quiet=True))
    assert rows(cell.folder / "training.csv") == [
        {"epoch": str(log.epoch), **{k: str(metrics(log).get(k, "")) for k in columns}}
        for columns in [metrics(result.history[-1])] for log in result.history
    ]
    assert cell.result().history == result.history
    assert {log.images for log in result.history} == {64}
    for checkpoint in ("best", "last"):
        facts = result.overfitting(checkpoint)
        assert facts["robust_overfitting"] >= 0 and facts["catastrophic_epoch"] is None
    assert result.overfitting("peer")["robust_overfitting"] is None


SEEN = []


class Mine(Metrics):
    def __init__(self, run):
        self.run = run

    def epoch(self, log):
        SEEN.append((self.run, log))


def test_a_logger_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_logs.py").write_text("def make(run):\n    return WATCHER(run)\n")
    assert find_watcher("my_logs:make").__name__ == "make"
    sys.modules["my_logs"].WATCHER = Mine
    SEEN.clear()
    cell, dataset = one_cell(tmp_path, logs="my_logs:make")
    result = train(cell, dataset, pick_device("cpu"), Reporter(quiet=True))
    assert [log for _, log in SEEN] == result.history
    run = SEEN[0][0]
    assert (run.key, run.label, run.folder) == (cell.spec.key(), "standard seed 0", cell.folder)
    assert run.settings == json.loads((cell.folder / "spec.json").read_text())
    assert cell.spec.key() == one_cell(tmp_path)[0].spec.key()
    sys.modules.pop("my_logs")


def test_loggers_are_looked_for_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="unknown log 'nothing'"):
        one_cell(tmp_path, logs="nothing")
    (tmp_path / "config.yaml").write_text("log: nothing\n")
    assert RunSpec.create(read_config(tmp_path / "config.yaml")).logs == ("nothing",)


def test_the_command_line(robench, tmp_path):
    done = robench("run", "--defense", "trades", "--log", "wandbb", "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "") and "Did you mean: wandb?" in done.err
    assert not (tmp_path / "out").exists()


# On the screen


def test_the_line_on_the_screen(monkeypatch):
    clock, shown, warned = iter([0.0, 10.0, 14.0, 20.0, 20.0, 21.0]), [], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    watcher = EpochWatcher(lambda *update: shown.append(update), 4, 100, warned.append)
    watcher.begin([])
    watcher.step(0, 1, 2)
    watcher.losses({"total": 2.0, "ce": 1.5, "kl": 0.5})
    watcher.step(0, 2, 2)
    watcher.epoch(SECOND)
    watcher.step(2, 1, 2)
    watcher.warn("odd")
    watcher.end()
    assert shown == [
        (0.125, "epoch 1/4  12 images/s"),
        (0.25, "epoch 1/4  10 images/s  loss 2.000 (ce 1.5, kl 0.5)"),
        (0.5, "epoch 2/4  25 images/s  loss 1.000 (ce 0.75, kl 0.25)  clean 90.0%  pgd 50.0%  "
              "swa pgd 62.5%"),
        (0.625, "epoch 3/4  50 images/s  loss 1.000 (ce 0.75, kl 0.25)  clean 90.0%  pgd 50.0%  "
                "swa pgd 62.5%"),
    ]
    assert warned == ["odd"]
