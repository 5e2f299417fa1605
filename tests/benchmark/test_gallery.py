"""Galleries: the examples that are counted, shown as they are, computed once."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robench.attacks.base import ATTACKS
from robench.attacks.gradient import PGD
from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Images, load_dataset
from robench.benchmark.evaluate import Target, measure
from robench.benchmark.gallery import Attacked, attacked, first_right
from robench.benchmark.models import build_model
from robench.benchmark.spec import AttackSpec
from robench.reports import load, save
from robench.reports.pictures import read_sheet

THREAT = ThreatModel("Linf", 0.1)


@pytest.fixture(scope="module")
def trained():
    """A smallcnn that knows the digits a little."""
    data = load_dataset("digits").train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model("smallcnn", classes=10, channels=1, size=8)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(40):
            rows = torch.randint(len(data), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture
def weights(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(trained.state_dict(), tmp_path / "net.pt")
    return "net.pt"


@pytest.fixture
def no_figures(monkeypatch):
    for one in ("external", "surveys"):
        monkeypatch.setattr(f"robench.benchmark.{one}.render",
                            lambda results, out: save(out, results))


COMMON = ("--model", "smallcnn", "--threat", "Linf:0.1", "--device", "cpu", "--quiet")


def test_the_first_images_that_are_right(trained):
    data = load_dataset("digits").test
    right = (trained(data.x).argmax(1) == data.y).nonzero().flatten()
    assert 0 < len(right) < len(data)
    assert first_right(trained, data, 7, torch.device("cpu")).equal(right[:7])
    assert first_right(trained, data, 10**6, torch.device("cpu")).equal(right)
    none = Images(data.x, torch.full_like(data.y, 10))
    assert first_right(trained, none, 7, torch.device("cpu")).tolist() == []


@pytest.mark.parametrize("name", ["pgd-20", "apgd-t"])
def test_the_examples_are_those_that_an_evaluation_counts(trained, name):
    """To the bit in a precision in which no result depends on the batch."""
    data, spec = load_dataset("digits").test.take(60), AttackSpec.parse(f"{name},precision=ieee")
    m = measure(Target(trained, data), spec, THREAT, seed=3, keep=True)
    rows = first_right(trained, data, 20, torch.device("cpu"))
    shown = attacked(trained, spec.build(THREAT), data.select(rows), THREAT, 3, name)
    assert shown.fooled.tolist() == (~m.robust[rows]).tolist() and 0 < shown.fooled.sum()
    assert shown.predicted.tolist() == m.predicted[rows].tolist()
    image, examples = m.examples
    for place, fell, x_adv in zip(rows, shown.fooled, shown.x_adv, strict=True):
        if fell:
            assert x_adv.equal(examples[image == place][0])


def test_predictions_are_of_the_exact_examples_inside_the_threat_model(trained):
    data = load_dataset("digits").test
    data = data.select(first_right(trained, data, 12, torch.device("cpu")))
    shown = attacked(trained, PGD(THREAT, 5), data, THREAT, 0, "pgd")
    chances = trained(shown.x_adv).softmax(1)
    assert shown.predicted.equal(chances.argmax(1))
    assert torch.allclose(shown.confidence.float(), chances.amax(1), atol=1e-4)
    assert torch.allclose(shown.clean_confidence.float(), trained(data.x).softmax(1).amax(1),
                          atol=1e-4)
    assert shown.distance.max() == pytest.approx(shown.scale)
    assert 0.05 < shown.scale <= 0.1 * (1 + 1e-5)
    assert (shown.fooled == (shown.predicted != data.y)).all()


def test_what_lies_outside_is_not_shown(trained):
    data = load_dataset("digits").test
    data = data.select(first_right(trained, data, 5, torch.device("cpu")))
    shown = attacked(trained, lambda model, x, y: 1 - x, data, THREAT, 0, "negative")
    assert shown.x_adv.equal(data.x) and not shown.fooled.any() and shown.scale == 0
    assert shown.predicted.equal(data.y)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 2, 2)])
def test_the_sheet_is_the_images_in_8_bits_and_the_change_fills_the_range(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    change = 0.02 * (2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1)
    change[0, 0, 0, 0], change[0, 0, 0, 1], change[0, 0, 1, 1] = 0.02, -0.02, 0.0
    n = torch.zeros(shape[0])
    shown = Attacked(x, x + change, n, n, n, n, n)
    n, c, h, w = shape
    pixels = np.asarray(Image.open(io.BytesIO(shown.sheet()))).reshape(n, h, 3, w, c)
    clean, scaled, adversarial = pixels.transpose(2, 0, 4, 1, 3).astype(float)
    assert abs(clean / 255 - x.numpy()).max() <= 0.5 / 255 + 1e-6
    assert abs(adversarial / 255 - (x + change).clamp(0, 1).numpy()).max() <= 0.5 / 255 + 1e-6
    assert abs((scaled - 128) / 127 * shown.scale - change.numpy()).max() <= 0.02 * 0.5 / 127 + 1e-6
    assert (scaled[0, 0, 0, 0], scaled[0, 0, 0, 1], scaled[0, 0, 1, 1]) == (255, 1, 128)


# The command


def test_the_command_writes_a_record_and_a_figure(weights, robench, tmp_path):
    done = robench("gallery", weights, *COMMON, "--images", 5, "--seed", 3)
    assert done.code == 0, done.err
    assert done.out.startswith("## digits test, Linf:0.1, pgd-20")
    assert "of 5 images are fooled" in done.out
    (one,) = load([tmp_path / "runs/gallery"]).galleries
    assert (one.attack, one.threat, one.n, one.attack_seed) == ("pgd-20", "Linf:0.1", 5, 3)
    assert one.classes == tuple("0123456789") and one.shape == (1, 8, 8)
    assert read_sheet(one).shape == (5, 3, 8, 8, 1) and len(one.model_dump_json()) < 10_000
    data = load_dataset("digits").test
    assert [p.label for p in one.pictures] == data.y[[p.image for p in one.pictures]].tolist()
    kept = data.x[[p.image for p in one.pictures]].permute(0, 2, 3, 1).numpy()
    assert abs(read_sheet(one)[:, 0] / 255 - kept).max() <= 0.5 / 255 + 1e-6
    names = [p.name for p in (tmp_path / "runs/gallery/figures").iterdir()]
    assert len(names) == 2 and all(name.startswith("gallery-digits-test") for name in names)
    assert "runs/gallery/gallery.csv" in done.err


def test_galleries_stand_beside_each_other_and_are_computed_once(
    weights, robench, monkeypatch, tmp_path, no_figures
):
    shown = ("gallery", weights, *COMMON, "--images", 3, "--out", "runs", "--attack")
    assert robench("eval", weights, *COMMON, "--limit", 10, "--attack", "fgsm", "--out",
                   "runs").code == 0
    for attack in ("fgsm", "pgd-2"):
        assert robench(*shown, attack).code == 0
    before = load([tmp_path / "runs"])
    assert [one.attack for one in before.galleries] == ["fgsm", "pgd-2"]
    assert [record.attack for record in before.records] == ["fgsm"]

    def never(*_):
        raise AssertionError("attacked again")

    monkeypatch.setattr("robench.benchmark.gallery.attacked", never)
    assert robench(*shown, "fgsm").code == 0
    assert sorted(one.attack for one in load([tmp_path / "runs"]).galleries) == ["fgsm", "pgd-2"]
    for path in (tmp_path / "runs/gallery").iterdir():
        path.write_text("damaged")
    done = robench(*shown, "fgsm")  # of what fails in an attack the command says one line
    assert (done.code, done.err.count("\n")) == (1, 1) and "attacked again" in done.err


@pytest.mark.parametrize(("options", "message"), [
    (("--images", 0), "--images 0: a gallery shows 1 to 64"),
    (("--images", 65), "--images 65: a gallery shows 1 to 64"),
    (("--attack", "pdg"), "unknown attack 'pdg'. Did you mean: pgd?"),
    (("--attack", "union"), "union has several threat models: a gallery shows one"),
    (("--dataset", "cifar10"), "cannot read cifar10"),
    (("no.pt",), "there is no file no.pt"),
])
def test_mistakes_are_one_line(weights, robench, tmp_path, options, message):
    done = robench("gallery", weights, *COMMON, *options)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_attack_that_fails_is_one_line(weights, robench, monkeypatch):
    def make(threat):
        def fail(model, x, y):
            raise ValueError("no\nluck")

        fail.threat = threat
        return fail

    ATTACKS.names()
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    ATTACKS.register("failing", description="for a test")(make)
    done = robench("gallery", weights, *COMMON, "--attack", "failing")
    assert done.code == 1 and done.err == "robench: net.pt, failing: ValueError: no luck\n"


def test_a_network_that_gets_nothing_right(robench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "class Wrong(torch.nn.Module):\n"
        "    def forward(self, x):  # an eleventh class is always the largest\n"
        "        return torch.cat([x.flatten(1)[:, :10] - 1, x.flatten(1)[:, :1] + 9], 1)\n"
        "def wrong():\n"
        "    return Wrong()\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = robench("gallery", "nets:wrong", *COMMON)
    assert done.code == 1 and done.err.count("\n") == 1
    assert "nets:wrong gets no image of the test set right" in done.err
