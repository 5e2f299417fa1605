"""An AutoAttack run that is killed, budgeted or interrupted ends with the same verdicts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robench.attacks.threat import ThreatModel
from robench.benchmark.data import load_dataset
from robench.benchmark.models import build_model

from .kills import kill_until, seconds_of_writing

ROOT = Path(__file__).parents[2]
LIMIT = 24


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network that knows the digits well enough to withstand a small eps on some of them."""
    data = load_dataset("digits").train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model("smallcnn", classes=10, channels=1, size=8)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(60):
            rows = torch.randint(len(data), (128,))
            x = ThreatModel("Linf", 0.15).sample(data.x[rows])
            loss = nn.functional.cross_entropy(net(x), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    file = tmp_path_factory.mktemp("weights") / "net.pt"
    torch.save(net.state_dict(), file)
    return file


def start(folder, weights, *options):
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1",
           "GIT_DIR": os.devnull}
    command = [sys.executable, "-m", "robench", "eval", str(weights), "--model", "smallcnn",
               "--threat", "Linf:0.06", "--attack", "autoattack", "--limit", str(LIMIT),
               "--precision", "ieee", "--device", "cpu", "--quiet", "--out", "out", *options]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    _, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return err


def verdicts(folder):
    (line,) = (folder / "out" / "results.jsonl").read_text().splitlines()
    record = json.loads(line)
    with np.load(folder / "out" / record["flags"]) as flags:
        return record, {name: flags[name].tolist() for name in flags}


@pytest.fixture(scope="module")
def undisturbed(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    seconds = seconds_of_writing(start(folder, weights), folder)
    record, flags = verdicts(folder)
    assert 3 < record["n_robust"] < record["n_correct"] <= LIMIT
    return seconds, record, flags


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(tmp_path, weights, undisturbed, check_files, kills):
    seconds, record, flags = undisturbed

    def ended():  # it went on where the one before was killed, and got to the end
        assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
        again, same = verdicts(tmp_path)
        assert same == flags
        names = ("n_correct", "n_robust", "breakers", "max_distance")
        assert [again[name] for name in names] == [record[name] for name in names]
        shutil.rmtree(tmp_path / "out")

    kill_until(kills, lambda: start(tmp_path, weights), tmp_path, 0.6 * seconds,
               killed=lambda: check_files(tmp_path), ended=ended)
    finish(start(tmp_path, weights))
    ended()


def test_a_budget_ends_with_exit_code_5_and_the_next_run_goes_on(tmp_path, weights, undisturbed):
    _, _, flags = undisturbed
    error = finish(start(tmp_path, weights, "--budget", "0.5s"), code=5)
    assert "images are open; run the same command again to go on" in error
    partial, some = verdicts(tmp_path)
    assert partial["status"] == "partial"
    assert 0 < partial["n_open"] <= partial["n_robust"]
    assert np.all(np.array(some["robust"]) >= np.array(flags["robust"]))  # an upper bound
    assert "out of time" in (tmp_path / "out" / "leaderboard.csv").read_text()
    finish(start(tmp_path, weights))
    whole, same = verdicts(tmp_path)
    assert (whole["status"], whole["n_open"], same) == ("ok", 0, flags)
