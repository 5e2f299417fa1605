"""robench speed: the arithmetic of the tables, the gauges, and what the command leaves behind.

No test asserts how long anything takes.
"""

import csv
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robench.attacks.network import Network
from robench.benchmark.gauge import (
    Counter,
    PassTime,
    PeakMemory,
    Spread,
    rotating,
    time_passes,
    using_threads,
)
from robench.benchmark.speed import Contender, Sample, summarize

NETS = """
import torch
from torch import nn
from robench.benchmark.data import load_dataset

def means(classes, size):
    train = load_dataset("digits").train
    centers = torch.stack([train.x[train.y == k].flatten(1).mean(0) for k in range(classes)])
    net = nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes))
    net[1].weight.data, net[1].bias.data = 2 * centers, -centers.square().sum(1)
    return net

def wrong(classes, size):
    net = means(classes, size)
    for part in (net[1].weight, net[1].bias):
        part.data *= -1
    return net
"""
# The linear network is right on most digits, and any attack fools it at this eps.
EASY = ("--threat", "Linf:0.4", "--limit", 6, "--repeats", 2, "--quiet", "--device", "cpu")


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_speed_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_speed_nets", None)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# Arithmetic


def sample(seconds, **changes):
    values = {"seconds": seconds, "robust": 3, "forwards": 1000, "backwards": 400,
              "peak": 2**20, "stages": {"a": seconds / 2}, **changes}
    return Sample(**values)


def contender(passes):
    return Contender("ours", lambda: None, 64, "as it is", passes)


def test_a_line_by_hand():
    mine = [sample(2.0), sample(5.0, peak=3 * 2**20), sample(4.0)]
    library = [sample(10.0), sample(10.0), sample(30.0)]
    line = summarize(contender(PassTime(1e-3, 4e-3)), mine, library, 10)
    assert line.seconds == Spread(4.0, 2.0, 5.0)
    assert line.ratio == Spread(5.0, 2.0, 7.5)  # run by run; that of the medians is 2.5
    assert (line.n, line.robust, line.forwards, line.backwards) == (10, 3, 100, 40)
    assert line.floor_seconds == pytest.approx(600 * 1e-3 + 400 * 4e-3)
    assert line.floor_share == pytest.approx(2.2 / 4)
    assert (line.forward_ms, line.both_ms, line.peak_mib) == (1, 4, 3)
    assert line.stages == {"a": 2.0}


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9))
def test_the_library_is_as_fast_as_itself(seconds):
    samples = [sample(value) for value in seconds]
    line = summarize(contender(PassTime(1.0, 2.0)), samples, samples, 1)
    assert line.ratio == Spread(1, 1, 1)
    assert line.seconds.low <= line.seconds.median <= line.seconds.high


@given(st.integers(1, 6), st.integers(1, 6))
def test_every_repeat_has_everyone_in_another_order(contenders, repeats):
    turns = list(rotating(contenders, repeats))
    rounds = [turns[k : k + contenders] for k in range(0, len(turns), contenders)]
    assert len(rounds) == repeats
    assert all(sorted(turn) == list(range(contenders)) for turn in rounds)
    firsts = [turn[0] for turn in rounds[:contenders]]
    assert len(set(firsts)) == len(firsts)


# Gauges


def test_counter():
    net = Counter(nn.Linear(3, 2).requires_grad_(False))
    x = torch.rand(5, 3)
    plain = net(x)
    assert (net.forwards, net.backwards) == (5, 0)
    x.requires_grad_(True)
    with torch.no_grad():
        net(x)
    assert (net.forwards, net.backwards) == (10, 0)
    logits = net(x)
    assert torch.equal(logits, plain)
    for column in range(2):  # as FAB does: once per class
        torch.autograd.grad(logits[:, column].sum(), x, retain_graph=True)
    assert (net.forwards, net.backwards) == (15, 10)


def test_passes_are_timed_at_the_size_asked_for():
    seen = []

    def model(x):
        seen.append(len(x))
        return x.flatten(1)[:, :3]

    passes = time_passes(Network(model, "exact", torch.rand(2, 1, 4, 4)), torch.rand(3, 1, 4, 4), 7)
    assert set(seen) == {7}
    assert passes.forward > 0 and passes.both > 0


def test_a_backward_pass_contains_its_forward_pass():
    assert PassTime(1.0, 3.0).floor(10, 4) == 6 * 1 + 4 * 3
    assert PassTime(1.0, 3.0).floor(4, 4) == 12


def test_memory_that_is_held_is_seen():
    with PeakMemory(torch.device("cpu")) as memory:
        held = torch.ones(32, 2**20)  # 128 MiB
    del held
    if math.isnan(memory.peak):
        pytest.skip("the system does not say how much memory is resident")
    assert 64 * 2**20 < memory.peak < 512 * 2**20


def test_threads_are_as_before():
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with using_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


# The command


@pytest.mark.parametrize(("attack", "library"), [("autoattack", "pyautoattack"),
                                                 ("pgd-20", "torchattacks")])
def test_speed_attack_writes_tables(here, robench, attack, library):
    pytest.importorskip(library)
    done = robench("speed", "attack", "my_speed_nets:means", "--attack", attack, *EASY,
                   "--precision", "exact,ieee", "--threads", 1, "--out", "there")
    assert done.code == 0, done.err
    assert done.err == "wrote there/speed.md and .csv\n"
    assert done.out == (here / "there" / "speed.md").read_text()
    rows = read(here / "there" / "speed.csv")
    assert [row["contender"] for row in rows] == [library, "robench, exact", "robench, ieee"]
    for row in rows:
        assert (row["robust"], row["attack"], row["threads"]) == ("0", attack, "1")
        assert row["network"] == "my_speed_nets:means" and row["torch"] == torch.__version__
        assert float(row["forwards"]) >= 1 and float(row["both_ms"]) > 0
        low, middle, high = (float(row[name]) for name in ("ratio_min", "ratio", "ratio_max"))
        assert 0 < low <= middle <= high
        expected = (float(row["forwards"]) - float(row["backwards"])) * float(row["forward_ms"])
        expected += float(row["backwards"]) * float(row["both_ms"])
        assert float(row["floor_seconds"]) == pytest.approx(int(row["n"]) * expected / 1e3)
    assert rows[0]["ratio"] == "1.0" and rows[0]["stages"] == ""
    assert rows[1]["stages"].startswith("apgd-ce=" if attack == "autoattack" else "pgd=")
    for title in ("Ratio", "Robust", "Floor, share", "Memory, MiB", "2 repeats"):
        assert title in done.out


def test_passes_of_the_library(here, robench):
    """PGD-20 of torchattacks: 20 gradients, a look at the result, and nothing else."""
    pytest.importorskip("torchattacks")
    robench("speed", "attack", "my_speed_nets:means", "--attack", "pgd-20", *EASY,
            "--batch-size", 4)
    library, ours = read(here / "runs" / "speed" / "speed.csv")
    assert (float(library["forwards"]), float(library["backwards"])) == (21, 20)
    assert float(ours["backwards"]) <= 20  # an image that has fallen is left alone
    assert library["batch"] == ours["batch"] == "4"


def test_networks_are_trained_once(here, robench):
    pytest.importorskip("torchattacks")
    arguments = ("speed", "attack", "--attack", "pgd-20", "--model", "smallcnn",
                 "--train-steps", 30, "--threat", "Linf:0.05", "--limit", 4, "--repeats", 1,
                 "--quiet", "--device", "cpu")
    done = robench(*arguments)
    assert done.code == 0, done.err
    weights = {p: p.stat().st_mtime_ns for p in (here / "runs").rglob("last.safetensors")}
    assert len(weights) == 2
    assert robench(*arguments).code == 0
    assert weights == {p: p.stat().st_mtime_ns for p in (here / "runs").rglob("last.safetensors")}
    rows = read(here / "runs" / "speed" / "speed.csv")
    assert len({row["network"] for row in rows}) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "name a NETWORK, or a --model and the --train-steps to train it with"),
    (("nowhere.pt",), "there is no file nowhere.pt"),
    (("my_speed_nets:means", "--attack", "cw"), "'cw' has no counterpart here: write autoattack"),
    (("my_speed_nets:means", "--precision", "exact,half"), "unknown precision 'half'"),
    (("my_speed_nets:means", "--repeats", 0), "0 is not in the range"),
    (("my_speed_nets:means", "--threads", 0), "0 is not in the range"),
    (("my_speed_nets:means", "--limit", 0), "limit: "),
    (("my_speed_nets:means", "--attack", "pgd-20", "--threat", "L1:1"), "has no PGD in L1"),
    (("my_speed_nets:wrong", "--limit", 5), "is right on none of the 5 images"),
])
def test_a_mistake_is_one_line(here, robench, arguments, message):
    pytest.importorskip("pyautoattack")
    pytest.importorskip("torchattacks")
    done = robench("speed", "attack", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(("attack", "library"), [("autoattack", "pyautoattack"),
                                                 ("pgd-20", "torchattacks")])
def test_without_the_library(here, robench, monkeypatch, attack, library):
    monkeypatch.setitem(sys.modules, library, None)
    done = robench("speed", "attack", "my_speed_nets:means", "--attack", attack)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert 'pip install "robench[attacks]"' in done.err
