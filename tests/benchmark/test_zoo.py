"""RobustBench's models: loaded from a folder, without a network, whatever the packages do."""

import base64
import hashlib
import importlib
import os
import pickle
import socket
import sys

import numpy as np
import pytest
import torch

from robench.attacks.threat import ThreatModel
from robench.benchmark import external
from robench.benchmark.checkpoints import weights_sha256
from robench.benchmark.data import Augment, Dataset, Images
from robench.benchmark.models import build_model
from robench.benchmark.sources import load_network
from robench.benchmark.zoo import load as zoo
from robench.benchmark.zoo import package
from robench.errors import RobenchError, UsageError
from robench.reports.store import load, save

NAME = "Sehwag2021Proxy_R18"  # a ResNet-18 with the CIFAR stem, the same as robench's own
THREAT = ThreatModel("Linf", 8 / 255)


pytestmark = pytest.mark.usefixtures("robustbench")


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
    assert f"{NAME}.pt could not be downloaded (" in message and "network is off" in message
    assert f"save it as {tmp_path}/cifar10/Linf/{NAME}.pt" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """cifar(labels) writes that many images as CIFAR-10 to tmp_path/data; returns them as x."""
    def write(labels):
        pixels = np.random.RandomState(0).randint(0, 256, (len(labels), 3072), dtype=np.uint8)
        data = tmp_path / "data" / "cifar-10-batches-py"
        data.mkdir(parents=True, exist_ok=True)
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            (data / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(labels)}))
        (data / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        return torch.from_numpy(pixels).view(-1, 3, 32, 32) / 255

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    monkeypatch.setattr(external, "render", lambda results, out: save(out, results))
    monkeypatch.chdir(tmp_path)
    return write


COMMON = ("--dataset", "cifar10", "--attack", "fgsm", "--device", "cpu")


def test_eval_on_the_command_line(tmp_path, folder, robench, own, offline, cifar):
    with torch.no_grad():
        labels = own(cifar([0] * 8)).argmax(1).tolist()
    cifar([(labels[0] + 1) % 10, *labels[1:]])
    done = robench("eval", f"robustbench:{NAME}", *COMMON, "--zoo", folder)
    assert done.code == 0, done.err
    assert f"robustbench:{NAME}: license of the weights: MIT" in done.err
    (record,) = load([tmp_path / "runs" / "eval"]).records
    assert (record.source, record.model, record.threat) == (
        f"robustbench:{NAME}", NAME, "Linf:8/255")
    assert (record.n, record.n_correct, record.parameters) == (8, 7, 11_173_962)
    assert record.notes == ("license of the weights: MIT",)

    done = robench("eval", "robustbench:Wong2020Fast", *COMMON, "--zoo", "zoo", "--quiet")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "Wong2020Fast.pt could not be downloaded (" in done.err
    assert "save it as zoo/cifar10/Linf/Wong2020Fast.pt" in done.err
    assert not list((tmp_path / "zoo").rglob("*.p*"))


# Five architectures as their authors saved them: what is around the tensors, the prefix of their
# names, and what RobustBench's class has beside them.
ARCHITECTURES = {
    "Wong2020Fast": ("PreActResNet", lambda s: s, ("mu", "sigma")),
    "Sehwag2021Proxy_R18": ("ResNet", lambda s: {"state_dict": prefixed(s, "module."),
                                                 "epoch": 3}, ()),
    "Rebuffi2021Fixing_R18_ddpm": ("DMPreActResNet", lambda s: s, ()),
    "L2/Ding2020MMA": ("Ding2020MMANet", lambda s: {"state_dict": s}, ()),
    "corruptions/Hendrycks2020AugMix_WRN": (
        "Hendrycks2020AugMixWRNNet", lambda s: {"state_dict": prefixed(s, "module.")},
        ("mu", "sigma")),
}


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def test_five_architectures_of_the_zoo(tmp_path, robench, offline, cifar):
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    enums = importlib.import_module("robustbench.model_zoo.enums")
    kinds, hashes, sizes = set(), {}, {}
    for name, (kind, wrapped, absent) in ARCHITECTURES.items():
        listed, model = zoo.split_name(name, "Linf")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = models[enums.BenchmarkDataset.cifar_10][enums.ThreatModel(listed)][model][
                "model"]().eval()
        kinds.add(type(net).__name__)
        assert kind in {one.__name__ for one in type(net).__mro__}
        state = {key: value for key, value in net.state_dict().items() if key not in absent}
        assert len(state) == len(net.state_dict()) - len(absent)
        path = tmp_path / "zoo" / "cifar10" / listed / f"{model}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(wrapped(state), path)
        hashes[f"robustbench:{name}"] = weights_sha256(net)
        sizes[f"robustbench:{name}"] = sum(p.numel() for p in net.parameters())
    assert len(kinds) == 5
    cifar([0, 1])
    done = robench("eval", *hashes, *COMMON, "--zoo", "zoo")
    assert done.code == 0, done.err
    records = load([tmp_path / "runs" / "eval"]).records
    assert {r.source: r.weights_sha256 for r in records} == hashes
    assert {r.source: r.parameters for r in records} == sizes
    assert {(r.status, r.n, r.threat, r.attack) for r in records} == {
        ("ok", 2, "Linf:8/255", "fgsm")}
    assert "Attribution-NonCommercial-ShareAlike 4.0" in done.err  # of Ding2020MMA


# Files that are not what they should be


class Evil:
    def __reduce__(self):
        return os.system, ("echo broken into > broken-into",)


def placed(folder, content):
    path = folder / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    content(path) if callable(content) else path.write_bytes(content)
    return path


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("unsafe", ["0", "1"])
def test_a_file_that_would_run_code_is_refused(
    tmp_path, robench, offline, cifar, monkeypatch, new_format, unsafe
):
    cifar([0])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", unsafe)
    load_before = torch.load
    path = placed(tmp_path / "zoo", lambda path: torch.save(
        {"state_dict": Evil()}, path, _use_new_zipfile_serialization=new_format))
    done = robench("eval", f"robustbench:{NAME}", *COMMON, "--zoo", "zoo", "--quiet")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"{path.relative_to(tmp_path)}: it holds more than weights" in done.err
    assert "system would have to run" in done.err
    assert not (tmp_path / "broken-into").exists() and torch.load is load_before


@pytest.mark.parametrize(("content", "message"), [
    (b"<!DOCTYPE html><html><title>Quota</title></html>", "it is a web page, no weights: delete"),
    (b"PK\x03\x04 and then nothing", "it is damaged, or no file of weights"),
])
def test_a_file_that_holds_no_weights(tmp_path, offline, content, message):
    path = placed(tmp_path, content)
    with pytest.raises(RobenchError, match=message) as error:
        zoo.load_robustbench(NAME, "cifar10", "Linf", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.exists()  # it is the user's: only they remove it


def test_weights_of_another_model(tmp_path, offline):
    placed(tmp_path, lambda path: torch.save({"conv1.weight": torch.zeros(3)}, path))
    assert "could not be loaded from" in refused(RobenchError, NAME, "cifar10", "Linf", tmp_path)


@pytest.mark.parametrize("wanting", ["model.fc.weight", "model.bn1.running_mean", "all"])
def test_a_file_that_lacks_weights(tmp_path, offline, wanting):
    """RobustBench takes any file for its ImageNet models: their normalization is missing anyway."""
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    enums = importlib.import_module("robustbench.model_zoo.enums")
    name = "Salman2020Do_R18"
    net = models[enums.BenchmarkDataset("imagenet")][enums.ThreatModel("Linf")][name]["model"]()
    state = {key.removeprefix("model."): value for key, value in net.state_dict().items()
             if key.startswith("model.")}
    path = tmp_path / "imagenet" / "Linf" / f"{name}.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    read = zoo.load_robustbench(name, "imagenet", "Linf", tmp_path)
    assert weights_sha256(read) == weights_sha256(net)
    torch.save({key: value for key, value in state.items()
                if wanting not in ("all", f"model.{key}")}, path)
    message = refused(RobenchError, name, "imagenet", "Linf", tmp_path)
    assert f"{path} (ValueError: it is of another network: model." in message
    assert (f"{wanting} is missing, 1 in all" in message) != (wanting == "all")


@pytest.fixture
def photos():
    """photos(name, classes) is a data set of two images of ImageNet's size."""
    def made(name, classes=1000):
        data = Images(torch.rand(2, 3, 224, 224), torch.tensor([0, classes - 1]))
        return Dataset(name, data, data, tuple(map(str, range(classes))), Augment())

    return made


@pytest.fixture
def salman(tmp_path):
    """A file for an ImageNet model of the zoo, in tmp_path."""
    models = importlib.import_module("torchvision.models")
    path = tmp_path / "imagenet" / "Linf" / "Salman2020Do_R18.pt"
    path.parent.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), path)
    return "robustbench:Salman2020Do_R18"


def test_images_as_the_zoo_has_them_and_others(salman, photos, tmp_path, offline):
    usual, other = (load_network(salman, photos(name), THREAT, zoo=tmp_path)
                    for name in ("imagenet", "imagenet,interpolation=bicubic"))
    assert usual.notes == ("license of the weights: MIT",)
    assert other.notes == (
        f"{salman}: published numbers are on imagenet, these on imagenet,interpolation=bicubic",
        *usual.notes)


def test_a_part_of_imagenet_has_other_labels(salman, photos, tmp_path, offline):
    message = "tells 1,000 classes apart, imagenet has 100: labels would mean other classes"
    with pytest.raises(UsageError, match=message):
        load_network(salman, photos("imagenet", classes=100), THREAT, zoo=tmp_path)


def test_the_images_of_every_imagenet_model_are_known():
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    enums = importlib.import_module("robustbench.model_zoo.enums")
    timm = importlib.import_module("timm")
    told, built = {}, 0
    for threat in (enums.ThreatModel.Linf, enums.ThreatModel.corruptions):
        for name in models[enums.BenchmarkDataset.imagenet][threat]:
            net = torch.nn.Identity()
            theirs = f"{name.lower().replace('-', '_')}_imagenet_{threat.value.lower()}"
            if timm.is_model(theirs):
                net.default_cfg = timm.models.get_pretrained_cfg(theirs).to_dict()
                built += 1
            told[name] = zoo.published_on(net, name, threat.value)
    assert told["Salman2020Do_R50"] == told["Hendrycks2020AugMix"] == "imagenet"
    assert told["Singh2023Revisiting_ViT-S-ConvStem"] == "imagenet,interpolation=bicubic"
    assert told["Debenedetti2022Light_XCiT-S12"] == "imagenet,resize=224,interpolation=bicubic"
    assert built > 3 and set(told.values()) == {*zoo.PREPARED.values(),
                                                told["Debenedetti2022Light_XCiT-S12"]}


# The package itself


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """installation(code, of="code", without=()) puts a robustbench of that code at the front of
    the path; its RECORD says that it was installed with the code `of`. Other modules are gone."""
    def pretend(code, of=None, without=()):
        site = tmp_path / "site"
        info = site / "robustbench-9.9.dist-info"
        for folder in (site / "robustbench", info):
            folder.mkdir(parents=True)
        (site / "robustbench" / "__init__.py").write_text(code)
        (site / "robustbench" / "utils.py").write_text(code)
        digest = hashlib.sha256((code if of is None else of).encode()).digest()
        text = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robustbench\nVersion: 9.9\n")
        (info / "RECORD").write_text(f"robustbench/utils.py,sha256={text},{len(code)}\n")
        monkeypatch.syspath_prepend(site)
        for name in list(sys.modules):
            if name.partition(".")[0] in ("robustbench", "autoattack"):
                monkeypatch.delitem(sys.modules, name)
        for name in without:
            monkeypatch.setitem(sys.modules, name, None)

    yield pretend
    importlib.invalidate_caches()


def findings(robench):
    """Exit code, the lines about what is bad, and the last line."""
    done = robench("doctor")
    bad = [line for line in done.out.splitlines() if line.startswith("BAD")]
    return done.code, bad, done.err


def test_a_sound_installation(installation, robench):
    installation("import autoattack, autoattack.state, pkg_resources", without=["torchattacks"])
    assert findings(robench) == (0, [], "")
    assert sys.modules["autoattack"].__name__ in ("autoattack", "pyautoattack")


def test_it_is_overwritten_by_torchattacks(installation, robench):
    installation("old = True", of="new = True")
    code, bad, err = findings(robench)
    assert (code, bad) == (1, ["BAD  robustbench: is overwritten by torchattacks' own old copy"])
    assert err.endswith(f"robustbench: {package.CURE}\n")
    with pytest.raises(UsageError, match="repair it: pip install --force-reinstall --no-deps"):
        package.import_robustbench()
    assert "robustbench" not in sys.modules


def test_autoattack_has_no_stand_in(installation, robench):
    installation("import autoattack", without=["autoattack", "pyautoattack"])
    code, bad, err = findings(robench)
    assert code == 1 and [line.partition(": ")[0] for line in bad] == ["BAD  autoattack"]
    assert err.endswith('autoattack: pip install "pyautoattack>=0.2"\n')
    with pytest.raises(UsageError, match="autoattack is missing.*repair it: pip install"):
        package.import_robustbench()


def test_pkg_resources_is_gone(installation, robench):
    installation("import pkg_resources", without=["pkg_resources"])
    code, bad, err = findings(robench)
    assert code == 1 and [line.partition(": ")[0] for line in bad] == ["BAD  pkg_resources"]
    assert err.endswith('pkg_resources: pip install "setuptools<81"\n')
    with pytest.raises(UsageError, match='repair it: pip install "setuptools<81"'):
        package.import_robustbench()


def test_several_hazards_are_told_together(installation, robench):
    installation("old", of="new", without=["pkg_resources", "autoattack", "pyautoattack"])
    code, bad, err = findings(robench)
    assert (code, len(bad)) == (1, 3) and err.startswith("robench: 3 problems.")


def test_another_import_that_fails(installation):
    installation("import no_such_module")
    with pytest.raises(UsageError, match="No module named 'no_such_module'"):
        package.import_robustbench()


def test_the_installed_package_is_its_own():
    assert not package.overwritten()


def test_without_the_package(monkeypatch, tmp_path):
    from importlib.metadata import PackageNotFoundError

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(package, "distribution", missing)
    monkeypatch.delitem(sys.modules, "robustbench")
    assert not package.overwritten()
    with pytest.raises(UsageError, match=r'is not installed.*pip install "robench\[zoo\]"'):
        package.import_robustbench()
