"""Several processes train the network that one process trains, whatever the method."""

import importlib
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robench.attacks import ThreatModel
from robench.benchmark import cells
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import EpochWatcher, Reporter
from robench.benchmark.spec import RunSpec
from robench.defenses import DEFENSES, Defense, Losses, make_defense
from robench.defenses import launch as launching
from robench.defenses.distributed import Share, WholeBatch, check_splits
from robench.defenses.launch import check_devices, launch
from robench.errors import RobenchError, UsageError

from . import teamwork as here

CPU = torch.device("cpu")
THREAT = ThreatModel("Linf", 8 / 255)


@pytest.fixture(scope="session")
def teamwork():
    """The module under a name that the processes can import, too."""
    pytest.importorskip("lightning_fabric")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("teamwork")


@pytest.fixture(scope="session")
def two(teamwork, tmp_path_factory):
    """What two processes give for each scenario."""
    return launched(teamwork, 2, teamwork.SCENARIOS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def three(teamwork, tmp_path_factory):
    return launched(teamwork, 3, teamwork.FEW, tmp_path_factory.mktemp("three"))


def launched(teamwork, size, scenarios, folder):
    launch("cpu", size, teamwork.train_all, scenarios, folder)
    return {name: [torch.load(folder / f"{index}-{rank}.pt", weights_only=True)
                   for rank in range(size)] for index, name in enumerate(scenarios)}


def assert_same(got, wanted, where=""):
    """Equal to 1e-8, in all that is in it."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(got[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), where
        for index, pair in enumerate(zip(got, wanted, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype, where
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8, msg=lambda m: f"{where}: {m}")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, abs=1e-8), where
    else:
        assert got == wanted, where


def without_clock(result):
    state = result["state"]
    history = [{k: v for k, v in log.items() if k != "seconds"} for log in state["history"]]
    return {**result, "state": {**state, "history": history}}


def check(name, scenario, everyone):
    alone = without_clock(here.train(scenario))
    first, *others = everyone
    assert_same(without_clock(first), alone, name)
    for other in others:
        assert not other["losses"] and not other["networks"]  # the leader's business
        for net, weights in first["weights"].items():
            assert all(torch.equal(weights[k], v) for k, v in other["weights"][net].items())


@pytest.mark.parametrize("name", here.SCENARIOS)
def test_two_processes_train_as_one(two, name):
    check(name, here.SCENARIOS[name], two[name])
    if name in ("trades group", "trades batch", "peeraid group", "peeraid batch"):
        assert len(two[name][0]["losses"]) == 20


@pytest.mark.parametrize("name", here.FEW)
def test_a_batch_of_fewer_images_than_processes(three, name):
    check(name, here.FEW[name], three[name])


# Shares of a batch


@given(n=st.integers(1, 40), size=st.integers(1, 9))
def test_every_image_counts_once(n, size):
    shares = [Share(rank, size, n, CPU) for rank in range(size)]
    rows = [row for share in shares if share.counted for row in range(n)[share.rows]]
    assert rows == list(range(n))
    assert sum(share.weight for share in shares) == pytest.approx(1)
    for share in shares:
        assert len(range(n)[share.rows]) == share.length
        assert share.weights.shape == (size, 1)
        assert float(share.weights[share.rank]) == pytest.approx(share.weight)


@pytest.mark.parametrize("draw", [
    torch.rand_like, torch.randn_like, lambda x: torch.rand_like(x, dtype=torch.float64),
    lambda x: torch.rand(len(x), 5), lambda x: torch.randn((len(x), 2, 2)),
    lambda x: THREAT.sample(x), lambda x: torch.rand(3, 2),
])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_noise_is_that_of_the_whole_batch(draw, layout):
    x = torch.rand(7, 3, 4, 4).contiguous(memory_format=layout)
    torch.manual_seed(0)
    whole, after = draw(x), torch.rand(1)
    for rank in range(4):
        share = Share(rank, 4, 7, CPU)
        torch.manual_seed(0)
        with WholeBatch(share):
            mine = draw(x[share.rows])
        assert torch.equal(mine, whole[share.rows] if len(whole) == 7 else whole)
        assert torch.equal(torch.rand(1), after)  # the generators stay together


# What is refused


@pytest.mark.parametrize("name", DEFENSES.names())
def test_methods_whose_loss_compares_images_are_refused(name):
    defense = make_defense(name, THREAT)
    if name != "saad":
        check_splits(name, defense)
        return
    with pytest.raises(UsageError, match="saad cannot be trained on several devices"):
        check_splits(name, defense)


@dataclass(frozen=True, kw_only=True)
class Sees(Defense):
    """Cross-entropy; `after_step` wants some value."""

    value: Callable[[Tensor], Tensor]  # of logits (N, K)

    def craft(self, nets, x, y):
        return x

    def loss(self, nets, x, x_adv, y):
        logits = nets["student"](x)
        return Losses({"ce": F.cross_entropy(logits, y)}, {"value": self.value(logits).detach()})


@pytest.mark.parametrize(("value", "good"), [
    (lambda logits: logits.mean(), True),
    (lambda logits: logits.mean(0), True),
    (lambda logits: logits, True),
    (lambda logits: logits[:, :1], True),
    (lambda logits: logits[:, 0], False),
    (lambda logits: logits.sum(0), False),
    (lambda logits: logits.T @ logits, False),
    (lambda logits: logits - logits.mean(0), False),
])
def test_what_a_method_sees_must_be_means_or_tables(value, good):
    if good:
        check_splits("mine", Sees(value=value))
        return
    with pytest.raises(UsageError, match="mine cannot be trained on several devices"):
        check_splits("mine", Sees(value=value))


def test_missing_devices_are_found_at_once(monkeypatch):
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "robench\[devices\]"'):
        check_devices(2, CPU)
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: object())
    check_devices(2, CPU)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES"):
        check_devices(2, torch.device("cuda:1"))
    with pytest.raises(UsageError, match="--devices 99: there are only"):
        check_devices(99, torch.device("cuda"))


def test_devices_and_jobs_are_one_or_the_other():
    with pytest.raises(UsageError, match="use --jobs 1"):
        RunSpec.create({"defenses": ["trades"], "devices": 2, "jobs": 2})


# Processes that fail


@pytest.mark.parametrize(("work", "error", "text"), [
    ("refuse", UsageError, "not like this"), ("die", RobenchError, "one of 2 processes died"),
])
def test_one_that_fails_ends_all(teamwork, work, error, text):
    with pytest.raises(error, match=text):
        launch("cpu", 2, getattr(teamwork, work))
    assert not multiprocessing.active_children()


def test_an_interruption_leaves_no_process(teamwork, tmp_path, monkeypatch):
    def interrupted(*arguments):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(launching, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch("cpu", 2, teamwork.wait_for_ever, tmp_path)
    assert not multiprocessing.active_children()


# The command line

TINY = ("--epochs", "2", "--train-limit", "64", "--limit", "10", "--attack", "fgsm",
        "--set", "validation=20", "--set", "select_steps=1", "--set", "swa_start=null",
        "--device", "cpu", "--quiet")


def test_an_interrupted_cell_goes_on_with_two_processes(python, tmp_path, monkeypatch):
    pytest.importorskip("lightning_fabric")
    matrix = Matrix(RunSpec.create({
        "defenses": "trades", "epochs": 2, "train_limit": 64, "limit": 10, "attacks": "fgsm",
        "train": {"validation": 20, "select_steps": 1, "swa_start": None}, "device": "cpu",
        "out": tmp_path,
    }), Reporter(quiet=True))
    (cell,), _ = matrix.plan()

    def step(self, epoch, step, steps):
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(EpochWatcher, "step", step)
    with pytest.raises(KeyboardInterrupt):
        cells.train(cell, matrix.dataset, matrix.device, matrix.reporter)
    assert (cell.folder / "state.pt").exists()
    (seconds,) = [float(row.split(",")[2]) for row in rows_of(cell.folder)]
    done = python("-m", "robench", "run", "--defense", "trades", *TINY, "--devices", "2",
                  "--out", str(tmp_path))
    assert (done.stderr, done.returncode) == (f"reports: {tmp_path}/leaderboard.html\n", 0)
    assert not (cell.folder / "state.pt").exists()
    assert (cell.folder / "best.safetensors").exists()
    assert len(rows_of(cell.folder)) == 2
    result = cell.result()
    assert result.devices == 2 and result.history[0].seconds == seconds
    record = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert "trained on 2 devices together" in record["notes"]


def rows_of(folder):
    return (folder / "training.csv").read_text().splitlines()[1:]
