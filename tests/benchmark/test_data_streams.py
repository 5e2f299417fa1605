"""Images that are read when they are needed: the same images, the same results, less memory."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import robench
from robench.attacks.base import make_attack
from robench.attacks.search import Search
from robench.attacks.threat import ThreatModel
from robench.benchmark.checks import eps_unit
from robench.benchmark.data import Images, hold_out, images, load_dataset
from robench.benchmark.data.streams import AHEAD, GROUP, Array, Streamed
from robench.benchmark.evaluate import Target
from robench.benchmark.kept import discard
from robench.benchmark.pieces import found_by
from robench.defenses.feed import shuffled, steps_of
from robench.errors import UsageError

ONE = 4 * 8 * 8  # bytes of an image of digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The first digits as files, in the layout of folder:PATH."""
    root, digits = tmp_path_factory.mktemp("digits"), load_dataset("digits")
    for split, part in (("train", digits.train.take(120)), ("test", digits.test.take(40))):
        for i, (x, y) in enumerate(zip(part.x, part.y, strict=True)):
            place = root / split / str(int(y))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((x[0] * 255).round().byte().numpy()).save(place / f"{i:03}.png")
    return root


@pytest.fixture
def both(folder):
    """The same data set in memory, and read when needed, five images in memory at a time."""
    return load_dataset(f"folder:{folder}"), load_dataset(f"folder:{folder}", room=4 * 5 * ONE)


def test_the_same_images_in_the_same_order(both, monkeypatch):
    held, streamed = both
    assert isinstance(held.train.x, torch.Tensor) and isinstance(streamed.train.x, Streamed)
    assert (streamed.channels, streamed.size, streamed.classes) == (1, 8, held.classes)
    for one, other in ((held.train, streamed.train), (held.test, streamed.test),
                       *zip(hold_out(held.train, 20), hold_out(streamed.train, 20), strict=True)):
        assert other.x.shape == one.x.shape and len(other) == len(other.x) == len(one)
        assert torch.equal(other.x[:], one.x) and torch.equal(other.y, one.y)
        assert other.sha256() == one.sha256()
        assert other.take(7).sha256() == one.take(7).sha256() != one.sha256()
        some = torch.tensor([9, 2, 2])
        assert other.select(some).sha256() == one.select(some).sha256()
        assert torch.equal(other.x[some], one.x[some]) and len(other.x[3:3]) == 0
        assert torch.equal(other.x[one.y == 3], one.x[one.y == 3])
    monkeypatch.setattr(images, "CHUNK", 3 * ONE)  # many chunks of three images
    again = pickle.loads(pickle.dumps(streamed.test.select(torch.arange(40))))
    assert again.sha256() == held.test.sha256()


def test_what_is_small_enough_is_held(both):
    _, streamed = both
    assert isinstance(streamed.test.take(5).fitted().x, torch.Tensor)
    assert streamed.test.take(6).fitted().x.pieces() == [slice(0, 5), slice(5, 10)]
    assert streamed.test.held().checked(10).x.shape == (40, 1, 8, 8)
    with pytest.raises(UsageError, match=r"0\.\.1, not 0\.\.9"):
        streamed.test.checked(2)


def test_batches_are_read_ahead_but_not_the_whole_epoch(both):
    """Each batch is asked for at most AHEAD batches before it is used, and none after the last."""
    class Spy:
        shape, read_rows = (1, 8, 8), 0

        def read(self, rows):
            Spy.read_rows += len(rows)
            return np.zeros((len(rows), 1, 8, 8), dtype=np.uint8)

    x = Streamed(Spy(), torch.arange(100 * GROUP), 1)
    batches = x.ahead(torch.split(torch.arange(100 * GROUP), GROUP))
    for done in range(1, 4):
        next(batches)
        assert Spy.read_rows <= (done + AHEAD) * GROUP
    batches.close()
    assert Spy.read_rows <= (3 + AHEAD) * GROUP


@pytest.mark.parametrize("size", [16, 17, 119, 120, 1])
def test_training_sees_the_same_batches(both, size):
    held, streamed = both
    seen = []
    for data in both:
        torch.manual_seed(1)
        seen.append([*shuffled((data.train.x, data.train.y), size)])
    assert len(seen[0]) == len(seen[1]) == steps_of(120, size) or size == 1
    for (x, y), (other_x, other_y) in zip(*seen, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def test_a_run_gives_the_same_weights_and_verdicts(folder, tmp_path, job, monkeypatch):
    monkeypatch.setattr("robench.benchmark.matrix.render", lambda results, out: None)
    spec = job(defenses=("trades",), dataset=f"folder:{folder}", model="smallcnn", epochs=1,
               threat="Linf:0.1", train={"swa_start": 0.0}, train_limit=None)
    held = robench.run({**spec, "out": tmp_path / "held"})
    streamed = robench.run({**spec, "out": tmp_path / "streamed", "memory_limit": 4 * 5 * ONE})
    table = [{(r.checkpoint, r.attack): (r.weights_sha256, r.data_sha256, r.n_correct, r.n_robust,
                                         r.n, r.forwards, r.backwards)
              for r in results.records if r.role == "table"} for results in (held, streamed)]
    assert len(table[0]) >= 4 and table[0] == table[1]
    assert [epoch.losses for epoch in held.epochs] == [epoch.losses for epoch in streamed.epochs]
    cells = [{p.name for p in (tmp_path / name / "cells").iterdir()}
             for name in ("held", "streamed")]
    assert cells[0] == cells[1]  # a finished cell is taken, however its images were read
    assert not list((tmp_path / "streamed").rglob("*.partial"))


def test_an_attack_in_pieces_goes_on_after_the_last_one(both, tmp_path, make_network, monkeypatch):
    held, streamed = both
    net, state = make_network(), tmp_path / "pgd-20.partial"
    attack = make_attack("pgd-20", ThreatModel("Linf", 0.05), precision="ieee")
    searched, run = [], Search.run

    def interrupted(search):
        searched.append(len(search._x))
        if len(searched) == 4:
            raise KeyboardInterrupt
        return run(search)

    def found(data, **options):
        with torch.no_grad():
            clean = net(data.x[:])  # all of which is right
        how = {"seed": 3, "slots": None, "state": None, "keep": False, "deadline": None,
               "starts": None, "progress": shown.append}
        return found_by(attack, net, Images(data.x, clean.argmax(1)), clean, **{**how, **options})

    shown = []
    whole = found(held.test, keep=True)
    monkeypatch.setattr(Search, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found(streamed.test, state=state, keep=True)
    assert len(list(tmp_path.iterdir())) == 3
    parts = found(streamed.test, state=state, keep=True)
    assert searched == [5] * 12  # of which the first three had nothing to do
    for name in ("fell_to", "predicted", "distance"):
        assert (getattr(parts, name) == getattr(whole, name)).all()
    fell = torch.from_numpy(whole.fell_to >= 0)
    assert 0 < fell.sum() < 40 and parts.x_adv[fell].equal(whole.x_adv[fell]) and parts.open == 0
    assert (parts.forwards, parts.backwards) == (whole.forwards, whole.backwards)
    assert not len(found(streamed.test).x_adv)
    assert all(0 <= p.done <= 1 and 0 <= p.standing <= p.n == 40 for p in shown)
    discard(state)
    assert not list(tmp_path.iterdir())


def test_a_target_reads_batches(both, make_network):
    held, streamed = both
    one, other = (Target(make_network(), data.test) for data in both)
    assert torch.equal(one.clean, other.clean) and (one.label == other.label).all()
    assert torch.equal(one.batch(3, 9)[0], other.batch(3, 9)[0])
    threat = ThreatModel("L2", 0.5)
    assert eps_unit(threat, held.test.x) == eps_unit(threat, streamed.test.x)


def test_a_file_that_breaks_later_is_one_line(folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / split / "a" / "0.png")
    data = load_dataset(f"folder:{tmp_path}", room=1)
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"no more")
    with pytest.raises(UsageError, match=r"cannot read .*0\.png") as caught:
        data.test.sha256()
    assert "\n" not in str(caught.value)


def test_arrays_are_mapped(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    x = Streamed(Array(tmp_path / "a.npy", 2, (3, 4, 4)), torch.arange(4), 1)
    expected = torch.from_numpy(pixels[2:].transpose(0, 3, 1, 2)) / 255
    assert torch.equal(x[:], expected) and torch.equal(x.at(slice(1, 3))[:], expected[1:3])


@pytest.mark.parametrize(("text", "size"), [
    ("8G", 8 * 2**30), ("1.5 MB", 3 * 2**19), ("300k", 300 * 1024), (77, 77), ("77", 77)])
def test_sizes(text, size):
    from robench.benchmark.spec import RunSpec

    assert RunSpec.create({"memory_limit": text}).memory_limit == size
    for wrong in ("8X", "-1", "0", "much"):
        with pytest.raises(UsageError, match="memory_limit"):
            RunSpec.create({"memory_limit": wrong})


LARGE = """
import resource, sys
sys.path.insert(0, ".")
import torch
import robench, robench.benchmark.matrix
import PIL.PngImagePlugin

def peak():
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most

spec = {"defenses": ("standard",), "model": "net:small", "dataset": "folder:.", "device": "cpu",
        "epochs": 1, "threat": "Linf:0.1", "attacks": ("fgsm",),
        "train": {"validation": 0, "batch_size": 50, "swa_start": None}}
robench.benchmark.matrix.render = lambda results, out: None
# All that such a run needs but for its images: here of few, and read when they are needed.
robench.run({**spec, "out": "first", "train_limit": 200, "memory_limit": "1M"})
before = peak()
results = robench.run({**spec, "memory_limit": sys.argv[1]})
print(before, peak(), [(r.n, r.n_robust, r.weights_sha256) for r in results.records])
"""
NET = """
from torch import nn
def small():
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is not told there")
def test_a_data_set_that_is_larger_than_the_limit(tmp_path, python):
    """5,400 images of 64x64, 265 MB, in 16 MB: training and evaluation, in a process of its own."""
    rng = np.random.RandomState(0)
    for split, count in (("train", 2500), ("test", 200)):
        for label in ("a", "b"):
            place = tmp_path / split / label
            place.mkdir(parents=True)
            for i in range(20):
                color = tuple(int(c) for c in rng.randint(0, 256, 3))
                Image.new("RGB", (64, 64), color).save(place / f"{i}.png")
            for i in range(20, count):
                os.link(place / f"{i % 20}.png", place / f"{i}.png")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "large.py").write_text(LARGE)
    done = python("large.py", "16M", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split()[:2])
    size = 5400 * 4 * 3 * 64 * 64
    assert peak - before < size / 2  # in memory it takes more than all of it
