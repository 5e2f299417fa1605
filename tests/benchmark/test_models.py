"""Networks: sizes as published, any image size, factories of the user's own."""

import sys

import pytest
import torch
from torch import nn

from robench.benchmark.models import MODELS, NORMALIZE, Normalize, build_model, load_factory
from robench.errors import UsageError

CUSTOM = """
from torch import nn

def net(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

class Net(nn.Linear):
    def __init__(self, **options):
        super().__init__(options["channels"] * options["size"] ** 2, options["classes"])

def fixed():
    return nn.Identity()

def number(classes): return classes
def broken(classes): raise KeyError("first line\\nsecond line")
constant = 3
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A module custom_nets in the current directory, which is not on sys.path."""
    (tmp_path / "custom_nets.py").write_text(CUSTOM)
    (tmp_path / "custom_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    yield
    sys.modules.pop("custom_nets", None)


def parameters(name: str, classes: int = 10, channels: int = 3, size: int = 32) -> int:
    with torch.device("meta"):  # shapes without memory or time
        network = build_model(name, classes=classes, channels=channels, size=size)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("resnet18", 10, 11_173_962),
        ("resnet18", 100, 11_220_132),
        ("resnet18", 200, 11_271_432),
        ("preactresnet18", 10, 11_172_170),
        ("wrn-28-10", 10, 36_479_194),
        ("wrn-34-10", 10, 46_160_474),
        ("wrn-34-10", 100, 46_218_164),
        ("wrn-34-10", 200, 46_282_264),
        ("mobilenetv2", 10, 2_296_922),
        ("mobilenetv2", 100, 2_412_212),
        ("mobilenetv2", 200, 2_540_312),
        ("small-resnet", 10, 78_042),
    ],
)
def test_published_number_of_parameters(name, classes, count):
    assert parameters(name, classes) == count


def test_smallcnn_is_small():
    assert parameters("smallcnn", channels=1, size=8) < 70_000
    assert parameters("smallcnn", channels=3, size=32) < 110_000


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("name", MODELS.names())
def test_logits_have_one_column_per_class(name, size, channels):
    with torch.device("meta"):
        network = build_model(name, classes=7, channels=channels, size=size)
        logits = network(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", MODELS.names())
def test_eval_mode_is_deterministic_per_image_and_runs_channels_last(name):
    torch.manual_seed(0)
    network = build_model(name, classes=5, channels=3, size=8).eval()
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        logits = network(x)
        assert torch.equal(network(x), logits)
        torch.testing.assert_close(network(x[1:2]), logits[1:2], rtol=1e-3, atol=1e-4)
        network.to(memory_format=torch.channels_last)
        last = network(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, logits, rtol=1e-3, atol=1e-4)
    assert logits.std() > 0


@pytest.mark.parametrize("name", ["smallcnn", "small-resnet", "mobilenetv2"])
def test_every_parameter_gets_a_gradient(name):
    network = build_model(name, classes=5, channels=3, size=16)
    network(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_no_parameter_of_the_large_networks_is_dead():
    """TRADES' sub_block1 would show here: parameters that no forward pass reaches."""
    for name in ("resnet18", "preactresnet18", "wrn-28-10", "wrn-34-10"):
        with torch.device("meta"):
            network = build_model(name, classes=5, channels=3, size=16)
            network(torch.rand(2, 3, 16, 16)).sum().backward()
        assert all(p.grad is not None for p in network.parameters()), name


def test_same_seed_same_network():
    def weights():
        torch.manual_seed(3)
        return build_model("smallcnn", classes=10, channels=1, size=8).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_wide_resnet_initialization():
    torch.manual_seed(0)
    network = build_model("wrn-28-10", classes=10, channels=3, size=32)
    weight = network.get_submodule("block2.layer.1.conv1").weight  # 320 channels out, 3x3
    assert weight.std().item() == pytest.approx((2 / (9 * 320)) ** 0.5, rel=0.01)
    assert not network.get_submodule("fc").bias.any()


def test_smallcnn_learns_digits():
    from robench.benchmark.data import load_dataset

    torch.manual_seed(0)
    data = load_dataset("digits")
    network = build_model("smallcnn", classes=10, channels=1, size=8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for index in torch.randperm(len(data.train)).split(64):
            loss = nn.functional.cross_entropy(network(data.train.x[index]), data.train.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    hits = network.eval()(data.test.x).argmax(1) == data.test.y
    assert hits.float().mean() > 0.95


@pytest.mark.parametrize("name", NORMALIZE)
def test_normalization_is_the_first_layer(name):
    torch.manual_seed(0)
    network = build_model("smallcnn", classes=10, channels=3, size=8, normalize=name).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZE[name])
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(network(x), network.get_submodule("network")((x - mean) / std))
    assert {"normalize.mean", "normalize.std"} <= set(network.state_dict())
    assert isinstance(network.get_submodule("normalize"), Normalize)


def test_normalization_errors():
    with pytest.raises(UsageError, match="Did you mean: cifar10"):
        build_model("smallcnn", classes=2, channels=3, size=8, normalize="cifar-10")
    with pytest.raises(UsageError, match="3 channels, the images have 1"):
        build_model("smallcnn", classes=2, channels=1, size=8, normalize="cifar10")


def test_unknown_model():
    with pytest.raises(UsageError, match="unknown model 'resnet-18'.*Did you mean: resnet18"):
        build_model("resnet-18", classes=10, channels=3, size=32)


def test_factories_get_the_keywords_they_take(custom):
    before = list(sys.path)
    x = torch.rand(2, 3, 4, 4)
    assert build_model("custom_nets:net", classes=6, channels=3, size=4)(x).shape == (2, 6)
    linear = build_model("custom_nets:Net", classes=6, channels=3, size=4)
    assert linear.weight.shape == (6, 48)
    assert isinstance(build_model("custom_nets:fixed", classes=6, channels=3, size=4), nn.Identity)
    assert load_factory("custom_nets:nn.Flatten") is nn.Flatten
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("custom_nets:number", "returned int, not an nn.Module"),
        ("custom_nets:broken", "KeyError: 'first line"),
        ("custom_nets:missing", "module custom_nets has no 'missing'"),
        ("custom_nets:", "has no ''"),
        ("custom_nets:constant", "not a function"),
        ("custom_broken:net", "ZeroDivisionError"),
        ("no_such_module:net", "No module named 'no_such_module'"),
        (":net", "cannot import"),
    ],
)
def test_faults_of_factories_become_one_line(custom, name, message):
    before = list(sys.path)
    with pytest.raises(UsageError, match=message) as caught:
        build_model(name, classes=6, channels=3, size=4)
    assert "\n" not in str(caught.value)
    assert sys.path == before


def test_everything_is_described():
    assert all(entry.description for entry in MODELS)
