"""robench speed train: the passes that are timed, and what the command leaves behind.

No test asserts how long anything takes.
"""

import csv

import pytest
import torch
from torch import nn

from robench.attacks.threat import ThreatModel
from robench.benchmark import speed_train
from robench.benchmark.data import Augment, Images
from robench.benchmark.gauge import Counter, Spread
from robench.benchmark.speed_train import Case, Line, Loop
from robench.defenses import make_defense
from robench.defenses.base import clean_logits
from robench.defenses.fast import View

TINY = ("--batch-size", 4, "--steps", 1, "--repeats", 2, "--quiet", "--device", "cpu")
NAMES = ["plain loop", "plain loop, channels_last", "robench, fp32", "robench, bf16"]
# Passes per training image, with ten steps of ascent: METHODS of the released code, but that
# clean logits are computed once per batch.
PASSES = {
    "pgd-at": ("student=11", "student=11"),
    "trades": ("student=14", "student=13"),
    "rslad": ("student=12;teacher=1", "student=12;teacher=0"),
    "peeraid": ("student=13;peer=2", "student=13;peer=1"),
}


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    monkeypatch.setattr(speed_train, "WORKERS", (0,))


def case(**changes):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, 3, 8, 8), generator=generator) / 255
    values = {"dataset": "random", "images": Images(pixels, torch.arange(8)),
              "augment": Augment(), "classes": 10, "model": "small-resnet",
              "threat": ThreatModel("Linf", 8 / 255), "batch_size": 4, **changes}
    return Case(**values)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("name", PASSES)
def test_everybody_makes_the_passes_of_the_method(name):
    defense, found = make_defense(name, ThreatModel("Linf", 8 / 255)), {}
    for loop in (speed_train._plain(defense, case(), torch.contiguous_format, "plain loop"),
                 speed_train._ours(defense, case(), "bf16")):
        loop.warm_up()
        assert loop.run(1) > 0
        line = speed_train._line(loop, [1.0], [2.0], 4, 4)
        found[loop.name] = tuple(
            ";".join(f"{net}={number:g}" for net, number in passes.items())
            for passes in (line.forwards, line.backwards))
        assert line.ratio == Spread(2, 2, 2) and line.rate == Spread(4, 4, 4)
    assert found == {"plain loop": PASSES[name], "robench, bf16": PASSES[name]}


def test_networks_of_the_plain_loop_ask_for_gradients_while_crafting():
    defense = make_defense("pgd-at", ThreatModel("Linf", 8 / 255), steps=1)
    loop = speed_train._plain(defense, case(), torch.contiguous_format, "plain loop")
    student, asked = loop.views["student"], []

    def note(net, *_):
        asked.append((net.training, all(p.requires_grad for p in net.parameters())))

    student.net.register_forward_hook(note)
    loop.run(1)
    assert asked == [(False, True), (True, True)]
    assert all(p.is_contiguous() for p in student.net.parameters())


def test_the_plain_loop_begins_where_ours_does():
    defense = make_defense("rslad", ThreatModel("Linf", 8 / 255))
    plain = speed_train._plain(defense, case(), torch.contiguous_format, "plain loop")
    ours = speed_train._ours(defense, case(), "bf16")
    x = case().images.x
    for name in ("student", "teacher"):
        assert isinstance(ours.views[name], View)
        wanted = clean_logits(plain.views[name], x)
        torch.testing.assert_close(clean_logits(ours.views[name], x), wanted, rtol=0.1, atol=0.1)
    assert plain.views["student"].training and not plain.views["teacher"].training


@pytest.mark.parametrize("channels", [1, 3])
def test_photos_are_the_images(channels):
    x = case().images.x[:, :channels]
    photos = speed_train._Photos(case(images=Images(x, torch.arange(8))))
    assert len(photos) == 8
    for index in range(8):
        image, label = photos[index]
        assert label == index
        torch.testing.assert_close(image, x[index], rtol=0, atol=1e-6)


def test_photos_are_cropped_and_flipped():
    x = torch.arange(1, 65).view(1, 1, 8, 8) / 255
    photos = speed_train._Photos(case(images=Images(x, torch.zeros(1, dtype=torch.int64)),
                                      augment=Augment(pad=2, flip=True)))
    draws = torch.stack([photos[0][0] for _ in range(40)])
    assert draws.shape == (40, 1, 8, 8) and len(draws.unique(dim=0)) > 10
    assert set((draws * 255).round().unique().tolist()) <= set(range(65))


def test_the_better_number_of_workers_is_taken(monkeypatch):
    monkeypatch.setattr(speed_train, "WORKERS", (0, 2))
    counter, seconds = Counter(nn.Identity()), {0: 3.0, 2: 1.0}
    loop = Loop("plain loop", None, {}, [], {"student": counter}, lambda workers: None, 0)
    monkeypatch.setattr(Loop, "run", lambda self, steps: seconds[self.workers])
    counter.forwards = 7
    loop.warm_up()
    assert (loop.workers, loop.steps, counter.forwards) == (2, 0, 0)


def test_a_difference_of_passes_is_said():
    one = Spread(1, 1, 1)
    plain = Line("plain loop", one, one, {"student": 11, "teacher": 1}, {"student": 11})
    ours = Line("robench", one, one, {"student": 11, "teacher": 2}, {"student": 11})
    assert list(speed_train._differences([plain, plain])) == []
    assert list(speed_train._differences([plain, ours])) == [
        "robench: 2 forwards of the teacher per image, the plain loop 1"]


def test_speed_train_writes_tables(tmp_path, monkeypatch, robench):
    monkeypatch.chdir(tmp_path)
    done = robench("speed", "train", "--model", "small-resnet", "--defense", "pgd-at",
                   "--defense", "rslad", "--threads", 1, "--out", "there", *TINY)
    assert done.code == 0, done.err
    assert done.err == "wrote there/speed-train.md and .csv\n"
    assert done.out == (tmp_path / "there" / "speed-train.md").read_text()
    rows = read(tmp_path / "there" / "speed-train.csv")
    assert [row["contender"] for row in rows] == NAMES * 2
    for row in rows:
        assert (row["batch_size"], row["steps"], row["threads"]) == ("4", "1", "1")
        assert (row["dataset"], row["threat"]) == ("random images", "Linf:8/255")
        low, middle, high = (float(row[name]) for name in ("ratio_min", "ratio", "ratio_max"))
        assert 0 < low <= middle <= high and float(row["images_per_second"]) > 0
        if row["contender"] != "robench, fp32":
            assert (row["forwards"], row["backwards"]) == PASSES[row["defense"]]
    assert [row["workers"] for row in rows[:4]] == ["0", "0", "", ""]
    assert rows[0]["ratio"] == "1.0"
    assert "robench, fp32: 2 forwards of the teacher per image, the plain loop 1" in done.out


def test_a_data_set_may_be_named(tmp_path, monkeypatch, robench):
    monkeypatch.chdir(tmp_path)
    done = robench("speed", "train", "--model", "smallcnn", "--dataset", "digits", "--defense",
                   "standard", *TINY)
    assert done.code == 0, done.err
    rows = read(tmp_path / "runs" / "speed" / "speed-train.csv")
    assert {row["dataset"] for row in rows} == {"digits"}
    assert "smallcnn on digits (1, 8, 8), batches of 4; Linf:0.2" in done.out


@pytest.mark.parametrize(("arguments", "message"), [
    (("--defense", "pgd-at", "--defense", "trade"), "Did you mean: trades"),
    (("--model", "resnet19"), "resnet18"),
    (("--batch-size", 1), "1 is not in the range"),
    (("--device", "nowhere"), "device 'nowhere' is not there"),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, robench, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = robench("speed", "train", *TINY, *arguments)
    assert done.code == 2 and done.out == ""
    assert message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
