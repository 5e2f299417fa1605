"""RobustBench's models: loaded from a folder, without a network, whatever the packages do."""

import base64
import hashlib
import pickle
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from robench.attacks.threat import ThreatModel
from robench.benchmark import external, zoo
from robench.benchmark.data import Augment, Dataset, Images
from robench.benchmark.models import build_model
from robench.benchmark.sources import load_network
from robench.errors import RobenchError, UsageError
from robench.reports.store import load, save

NAME = "Sehwag2021Proxy_R18"  # a ResNet-18 with the CIFAR stem, the same as robench's own
THREAT = ThreatModel("Linf", 8 / 255)


@pytest.fixture(scope="module", autouse=True)
def _robustbench():
    try:
        zoo.import_robustbench()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def own():
    """Our own network of that architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model("resnet18", classes=10, channels=3, size=32)
        net(torch.rand(8, 3, 32, 32))
    return net.eval()


@pytest.fixture(scope="module")
def folder(own, tmp_path_factory):
    """A folder with the weights of that one network, as RobustBench lays it out."""
    folder = tmp_path_factory.mktemp("zoo")
    path = folder / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.state_dict().items()}}, path)
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("the network is off")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def refused(kind, *arguments):
    """The message of an error of exactly this kind, which has one line."""
    with pytest.raises(kind) as error:
        zoo.load_robustbench(*arguments)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_network_is_read_from_the_folder(folder, own, offline, capfd):
    net = zoo.load_robustbench(NAME, "cifar10", "Linf", folder)
    assert not any(module.training for module in net.modules())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), own(x))
    assert capfd.readouterr() == ("", "")  # its loaders print


def test_it_is_a_source_of_networks(folder):
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    data = Dataset("cifar10", Images(x, y), Images(x, y), tuple("abcdefghij"), Augment())
    network = load_network(f"robustbench:{NAME}", data, THREAT, zoo=folder)
    assert (network.source, network.model, network.header) == (f"robustbench:{NAME}", NAME, None)


def test_an_unknown_name(tmp_path):
    message = refused(UsageError, "Sehwag2021Proxy_R81", "cifar10", "Linf", tmp_path)
    assert f"unknown RobustBench model 'Sehwag2021Proxy_R81'. Did you mean: {NAME}?" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dataset", "norm"), [("digits", "Linf"), ("cifar10", "L1"),
                                               ("imagenet", "L1")])
def test_data_and_norms_without_models(tmp_path, dataset, norm):
    message = refused(UsageError, NAME, dataset, norm, tmp_path)
    assert message == f"the RobustBench zoo has no models for {dataset} under {norm}"


def test_weights_that_cannot_be_fetched(tmp_path, offline):
    message = refused(RobenchError, NAME, "cifar10", "Linf", tmp_path)
    assert f"robustbench:{NAME} could not be loaded from {tmp_path}/cifar10/Linf/{NAME}.pt" in (
        message)


def test_weights_that_are_damaged(tmp_path, offline):
    path = tmp_path / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage")
    assert f"could not be loaded from {path}" in refused(
        RobenchError, NAME, "cifar10", "Linf", tmp_path)


def test_eval_on_the_command_line(tmp_path, folder, robench, own, offline, monkeypatch):
    pixels = np.random.RandomState(0).randint(0, 256, (8, 3072), dtype=np.uint8)
    with torch.no_grad():
        x = torch.from_numpy(pixels).view(8, 3, 32, 32) / 255
        labels = own(x).argmax(1).tolist()
    labels[0] = (labels[0] + 1) % 10
    data = tmp_path / "data" / "cifar-10-batches-py"
    data.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (data / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (data / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    monkeypatch.setattr(external, "render", lambda results, out: save(out, results))
    monkeypatch.chdir(tmp_path)
    common = ("--dataset", "cifar10", "--attack", "fgsm", "--quiet", "--device", "cpu")
    done = robench("eval", f"robustbench:{NAME}", *common, "--zoo", folder)
    assert done.code == 0, done.err
    (record,) = load([tmp_path / "runs" / "eval"]).records
    assert (record.source, record.model, record.threat) == (
        f"robustbench:{NAME}", NAME, "Linf:8/255")
    assert (record.n, record.n_correct, record.parameters) == (8, 7, 11_173_962)

    done = robench("eval", "robustbench:Wong2020Fast", *common, "--zoo", "zoo")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "robustbench:Wong2020Fast could not be loaded from zoo/cifar10/Linf" in done.err


# The package itself


@dataclass
class File:
    """What importlib.metadata knows about an installed file."""

    path: Path
    digest: str | None

    def __str__(self):
        return "robustbench/utils.py"

    def locate(self):
        return self.path

    @property
    def hash(self):
        return None if self.digest is None else type("Hash", (), {"value": self.digest})()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Pretends that robustbench's utils.py has this content, and was installed with that one."""
    def pretend(content, recorded):
        path = tmp_path / "utils.py"
        path.write_text(content)
        digest = hashlib.sha256(recorded.encode()).digest()
        text = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        fake = type("Distribution", (), {"files": [File(path, text)]})()
        monkeypatch.setattr(zoo, "distribution", lambda name: fake)

    return pretend


def test_an_overwritten_package_is_noticed(installed):
    installed("theirs", recorded="theirs")
    assert not zoo.overwritten()
    installed("of torchattacks", recorded="theirs")
    assert zoo.overwritten()


def test_the_installed_package_is_its_own():
    assert not zoo.overwritten()


def test_a_package_that_is_not_there_is_not_overwritten(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(zoo, "distribution", missing)
    assert not zoo.overwritten()


def test_an_overwritten_package_is_refused_with_its_cure(installed, monkeypatch, tmp_path):
    from robench.benchmark.doctor import examine

    installed("of torchattacks", recorded="theirs")
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)
    with pytest.raises(UsageError, match="repair it: pip install --force-reinstall --no-deps"):
        zoo.import_robustbench()
    assert "robustbench" not in sys.modules
    (finding,) = [f for f in examine() if f.name == "robustbench"]
    assert (finding.ok, finding.cure) == (False, zoo.CURE)


def test_a_missing_package_names_the_extra(monkeypatch):
    original = zoo.importlib.import_module

    def missing(name, *arguments):
        if name == "robustbench":
            raise ImportError("No module named 'robustbench'")
        return original(name, *arguments)

    monkeypatch.delitem(sys.modules, "robustbench")
    monkeypatch.setattr(zoo.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r'install it: pip install "robench\[zoo\]"'):
        zoo.import_robustbench()
