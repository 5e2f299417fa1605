"""Models, images and labels at the edges: the right number, or one line that says what is wrong."""

import numpy as np
import pytest
import torch
from torch import nn

import robench
from robench.errors import UsageError

ATTACKS = ("fgsm", "pgd-3", "cw,steps=3", "apgd-ce,steps=6", "square,queries=10")
SHORT = ("fgsm", "pgd-3")


def linear(classes=4, shape=(1, 4, 4)):
    torch.manual_seed(0)
    if shape[-1] > 100:
        return nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(3 * 64, classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), classes))


def labelled(net, n=6, shape=(1, 4, 4)):
    """Random images with the labels that the network gives them."""
    torch.manual_seed(1)
    x = torch.rand(n, *shape)
    with torch.no_grad():
        return x, net(x).argmax(1)


class Constant(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits + 0 * x.flatten(1).sum(1, keepdim=True)


class NanAround(nn.Module):
    """A linear network that answers NaN for every image but those of the list."""

    def __init__(self, net, known):
        super().__init__()
        self.net, self.known = net, known

    def forward(self, x):
        new = (x[:, None] - self.known[None]).flatten(2).abs().amax(2).amin(1) > 1e-7
        return torch.where(new[:, None], torch.nan, self.net(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_on_clean_images_are_refused(value):
    x, y = torch.rand(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(UsageError, match="NaN or infinite logits for clean images"):
        robench.evaluate(Constant([0.0, value]), x, y, attacks=SHORT)


def test_nan_only_on_attacked_images_is_no_robustness():
    net = linear()
    x, y = labelled(net)
    scores = robench.evaluate(NanAround(net, x), x, y, threat="Linf:0.1", attacks=ATTACKS)
    assert scores.clean == 1
    assert scores.robust == {name: 0 for name in scores.robust}


def test_a_constant_model_is_as_robust_as_it_is_right():
    x, y = torch.rand(8, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    scores = robench.evaluate(Constant([1.0, 0.0, -1.0]), x, y, threat="Linf:0.5", attacks=ATTACKS)
    assert scores.clean == 0.5
    assert set(scores.robust.values()) == {0.5} and scores.worst_case == 0.5


def test_equal_logits_are_an_answer_too():
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    scores = robench.evaluate(Constant([0.0, 0.0, 0.0]), x, y, threat="Linf:0.5", attacks=ATTACKS)
    assert scores.clean == 0.5 and set(scores.robust.values()) == {0.5}


def test_a_model_with_one_output_is_refused():
    x, y = torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UsageError, match="one output"):
        robench.evaluate(linear(1), x, y, attacks=SHORT)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    net = linear(classes)
    x, y = labelled(net, 12)
    scores = robench.evaluate(net, x, y, threat="Linf:0.02",
                              attacks=(*ATTACKS, "apgd-t,steps=4", "fab-t,steps=4"))
    assert scores.clean == 1 and 0 <= scores.worst_case <= scores.robust["fgsm"] <= 1


def test_images_of_one_class_and_no_right_answer():
    net = linear()
    x, y = labelled(net)
    one = torch.full_like(y, int(y[0]))
    scores = robench.evaluate(net, x, one, threat="Linf:0.01", attacks=SHORT)
    assert scores.clean == float((y == one).double().mean())
    wrong = robench.evaluate(net, x, (y + 1) % 4, threat="Linf:0.01", attacks=ATTACKS)
    assert wrong.clean == 0 and set(wrong.robust.values()) == {0}


@pytest.mark.parametrize("threat", ["Linf:0.05", "L2:0.1", "L1:0.5"])
def test_one_image_and_a_batch_of_one(threat):
    net = linear()
    x, y = labelled(net, 5)
    attacks = ("fgsm", "pgd-5", "apgd-ce,steps=6")
    together = robench.evaluate(net, x, y, threat=threat, attacks=attacks)
    single = robench.evaluate(net, x, y, threat=threat, attacks=attacks, batch_size=1)
    apart = [robench.evaluate(net, x[i : i + 1], y[i : i + 1], threat=threat, attacks=attacks)
             for i in range(5)]
    for number, name in enumerate(attacks):
        flags = together.measurements[number].robust
        assert np.array_equal(single.measurements[number].robust, flags), name
        assert [bool(a.measurements[number].robust[0]) for a in apart] == flags.tolist(), name


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("attack", [
    *ATTACKS, "apgd-t,steps=4", "fab-t,steps=4", "fab,steps=4", "mifgsm", "ddn,steps=4",
    "fmn,steps=4", "autoattack"])
def test_with_an_eps_of_zero_nothing_falls(norm, attack):
    net = linear()
    x, y = labelled(net, 4)
    try:
        scores = robench.evaluate(net, x, torch.cat([y[:3], 1 - y[3:].clamp_max(1)]),
                                  threat=f"{norm}:0", attacks=[attack])
    except UsageError as error:  # the attack has another norm, or another name
        assert "\n" not in str(error)
        return
    (measured,) = scores.measurements
    assert scores.robust == {attack: scores.clean} and scores.clean >= 0.75
    assert (measured.max_distance, measured.violations) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_another_float_type(dtype):
    net = linear()
    x, y = labelled(net)
    x = x.to(dtype)
    scores = robench.evaluate(net, x, y, threat="Linf:0.02", attacks=SHORT)
    same = robench.evaluate(net, x.float(), y, threat="Linf:0.02", attacks=SHORT)
    assert scores.robust == same.robust


def test_a_network_of_another_float_type_is_one_line():
    x, y = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UsageError, match="cannot take images of shape"):
        robench.evaluate(linear().half(), x, y, attacks=SHORT)


@pytest.mark.parametrize(("shape", "classes"), [
    ((1, 8, 8), 10), ((3, 224, 224), 1000), ((3, 5, 9), 3), ((1, 1, 1), 2), ((7, 3, 3), 1000)])
def test_shapes_and_many_classes(shape, classes):
    net = linear(classes, shape)
    x, y = labelled(net, 3, shape)
    attacks = ("fgsm", "pgd-2", "apgd-t,steps=3", "square,queries=5")
    scores = robench.evaluate(net, x, y, threat="Linf:8/255", attacks=attacks)
    assert scores.clean == 1
    for measured in scores.measurements:
        assert measured.violations == 0
        assert measured.max_distance <= 8 / 255 * (1 + 1e-5)


@pytest.mark.parametrize(("labels", "message"), [
    ([0, 1, 9], "the model has 4 outputs, but there are labels up to 9"),
    ([0, -1, 1], "labels must be in 0..1, not -1..1"),
    ([0, 1], "3 images need labels of shape"),
    ([0.0, 1.0, 2.0], "labels must be int64"),
    ([2**62, 0, 0], "there are labels up to"),
])
def test_labels_out_of_range(labels, message):
    with pytest.raises(UsageError, match=message):
        robench.evaluate(linear(), torch.rand(3, 1, 4, 4), torch.tensor(labels), attacks=SHORT)


@pytest.mark.parametrize(("images", "message"), [
    (torch.rand(0, 1, 4, 4), "shape"), (torch.full((2, 1, 4, 4), torch.nan), "NaN"),
    (torch.full((2, 1, 4, 4), torch.inf), r"\[0, 1\]"), (torch.rand(2, 4, 4), "shape"),
    (255 * torch.rand(2, 1, 4, 4).round(), "divide"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "divide by 255"),
])
def test_images_that_are_none(images, message):
    with pytest.raises(UsageError, match=message):
        robench.evaluate(linear(), images, torch.zeros(len(images), dtype=torch.int64),
                         attacks=SHORT)


def test_the_command_line_says_the_same(robench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edges.py").write_text("""
import torch
from torch import nn

class Nan(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 10))
    def forward(self, x):
        return self.w.expand(len(x), 10) + float("nan")

def one(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
def constant():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(net[1].weight)
    nn.init.constant_(net[1].bias, 0)
    return net
nan = Nan
""")
    for name, message in (("edges:nan", "NaN or infinite"), ("edges:one", "outputs")):
        done = robench("eval", name, "--attack", "fgsm", "--device", "cpu", "--quiet")
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert message in done.err or "one output" in done.err
    done = robench("eval", "edges:constant", "--attack", "fgsm", "--threat", "Linf:0", "--limit", 1,
                   "--device", "cpu", "--quiet", "--batch-size", 1)
    # Measured, but nothing to rely on: it has no gradient.
    assert done.code == 4 and "zero-grad" in done.err, done.err


