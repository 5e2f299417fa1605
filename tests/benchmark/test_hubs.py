"""timm, torchvision and the Hugging Face Hub: by name, normalized inside, read as weights alone."""

import json
import os
import sys
import warnings
from http.server import BaseHTTPRequestHandler

import pytest
import torch
from safetensors.torch import save

from robench.attacks.threat import ThreatModel
from robench.benchmark.checkpoints import save_checkpoint
from robench.benchmark.data import Augment, Dataset, Images
from robench.benchmark.progress import Reporter
from robench.benchmark.sources import load_network
from robench.errors import RobenchError, UsageError

THREAT = ThreatModel("Linf", 8 / 255)
SQUEEZE = "squeezenet1_1-b8a52dc0.pth"  # as torchvision names the file


def images(classes, size, channels=3, name="photos"):
    x = torch.rand(2, channels, size, size)
    data = Images(x, torch.tensor([0, classes - 1]))
    return Dataset(name, data, data, tuple(map(str, range(classes))), Augment())


def load(source, data, **options):
    return load_network(source, data, THREAT, **options)


def refused(source, data, kind=UsageError):
    with pytest.raises(kind) as error:
        load(source, data)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


def same(network, plain, mean, std, x):
    """Whether a network is the plain one on normalized images."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain.eval()((x - mean) / std))


# torchvision


@pytest.fixture
def squeezenet(tmp_path, monkeypatch):
    """Random weights where torchvision's downloads lie; the network that they are of."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torchvision.models.squeezenet1_1()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / SQUEEZE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return net


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_torchvision_by_name(squeezenet, capfd):
    data = images(1000, 224)
    before = torch.load
    network = load("torchvision:squeezenet1_1", data, reporter=Reporter())
    same(network.net, squeezenet, *IMAGENET, data.test.x)
    assert torch.load is before and not network.net.training
    assert (network.source, network.model) == ("torchvision:squeezenet1_1",) * 2
    assert network.notes == ("license of the weights: unknown",)
    assert capfd.readouterr().err == (
        "torchvision:squeezenet1_1: license of the weights: unknown\n")
    same(load("torchvision:squeezenet1_1,weights=IMAGENET1K_V1", data).net, squeezenet, *IMAGENET,
         data.test.x)


def test_images_of_another_size_are_told(squeezenet, capfd):
    network = load("torchvision:squeezenet1_1", images(1000, 64), reporter=Reporter(quiet=True))
    told = "torchvision:squeezenet1_1 was trained on 224x224 images, photos has 64x64"
    assert network.notes == (told, "license of the weights: unknown")
    assert capfd.readouterr().err == f"warning: {told}\n"


def test_imagenet_that_is_prepared_in_another_way_is_told(squeezenet):
    usual, other = (load("torchvision:squeezenet1_1", images(1000, 224, name=name)).notes
                    for name in ("imagenet", "imagenet,resize=232"))
    assert other == ("torchvision:squeezenet1_1: published numbers are on imagenet, these on "
                     "imagenet,resize=232", *usual)


def test_data_that_do_not_fit(squeezenet):
    assert "tells 1,000 classes apart, photos has 10" in refused(
        "torchvision:squeezenet1_1", images(10, 32))
    assert "takes images with 3 channels, photos has 1" in refused(
        "torchvision:squeezenet1_1", images(1000, 224, channels=1))


def test_weights_of_a_file(tmp_path):
    import torchvision

    net = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "mine.pt")
    data = images(7, 64)
    network = load(f"torchvision:squeezenet1_1,file={tmp_path}/mine.pt", data)
    same(network.net, net, *IMAGENET, data.test.x)
    assert network.model == "torchvision:squeezenet1_1"
    assert "no file" in refused("torchvision:squeezenet1_1,file=none.pt", data).lower()


@pytest.mark.parametrize(("source", "message"), [
    ("torchvision:resnet5O", "unknown torchvision model 'resnet5O'. Did you mean: resnet50"),
    ("torchvision:resnet50,weights=V9", "unknown weights of torchvision:resnet50 'V9'"),
    ("torchvision:resnet50,wieghts=V1", "'wieghts' is none of weights=..., file=..."),
    ("torchvision:resnet50,weights=A,file=b", "give weights=... or file=..., not both"),
    ("torchvision:resnet50,file=", "'file' is none of"),
])
def test_what_torchvision_does_not_have(source, message):
    assert message in refused(source, images(1000, 224))


class Evil:
    def __reduce__(self):
        return os.system, ("echo broken into > broken-into",)


def test_a_downloaded_file_that_would_run_code(squeezenet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": Evil()}, tmp_path / "hub" / "checkpoints" / SQUEEZE)
    assert "it holds more than weights" in refused("torchvision:squeezenet1_1", images(1000, 224))
    assert not (tmp_path / "broken-into").exists()


def test_torchvision_without_a_network(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("the network is off")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    message = refused("torchvision:squeezenet1_1", images(1000, 224), RobenchError)
    assert message == ("torchvision:squeezenet1_1 could not be loaded (OSError: the network is "
                       "off)")


# timm


@pytest.fixture
def timm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts functions when it is imported
        return pytest.importorskip("timm")


def test_timm_by_name(timm, hub):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = timm.create_model("test_efficientnet")
    weights = {name: value.contiguous() for name, value in plain.state_dict().items()}
    hub["timm/test_efficientnet.r160_in1k", "model.safetensors"] = save(weights)
    data = images(1000, 160)
    network = load("timm:test_efficientnet", data)
    config = plain.pretrained_cfg
    same(network.net, plain, config["mean"], config["std"], data.test.x)
    assert network.model == "timm:test_efficientnet"
    assert network.notes == ("license of the weights: cc-by-4.0",)
    message = refused("timm:test_vit", data, UsageError)
    assert message.startswith("hf:timm/test_vit.r160_in1k/model.safetensors: timm/test_vit.r160_in"
                              "1k has no model.safetensors")


def test_timm_whose_first_weights_had_another_format(timm, hub):
    """The Hub has them as timm's own; the loader of the others would not read that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = timm.create_model("vit_tiny_patch16_224")
    repository = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert timm.models.get_pretrained_cfg("vit_tiny_patch16_224").custom_load
    hub[repository, "model.safetensors"] = save(plain.state_dict())
    data = images(1000, 224, name="imagenet,resize=248,interpolation=bicubic")
    network = load("timm:vit_tiny_patch16_224", data)
    same(network.net, plain, (0.5,) * 3, (0.5,) * 3, data.test.x)
    assert network.notes == ("license of the weights: cc-by-4.0",)


def test_timm_with_weights_of_a_file(timm, tmp_path):
    net = timm.create_model("test_efficientnet", num_classes=5)
    path = tmp_path / "mine.safetensors"
    path.write_bytes(save(net.state_dict()))
    data = images(5, 160)
    network = load(f"timm:test_efficientnet,file={path}", data)
    same(network.net, net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"], data.test.x)


def test_timm_that_takes_one_size(timm, tmp_path):
    path = tmp_path / "vit.safetensors"
    path.write_bytes(save(timm.create_model("test_vit", num_classes=5).state_dict()))
    message = refused(f"timm:test_vit,file={path}", images(5, 32))
    assert message.endswith("was trained on 160x160 images, photos has 32x32, and it takes no "
                            "others")


def test_what_timm_does_not_have(timm, monkeypatch):
    assert "unknown timm model 'resnet81'. Did you mean: resnet" in refused(
        "timm:resnet81", images(1000, 224))
    assert "Invalid pretrained tag (a9)" in refused("timm:resnet18.a9", images(1000, 224))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert 'pip install "robench[hub]"' in refused("timm:resnet18", images(1000, 224))


# The Hugging Face Hub


class Hub(BaseHTTPRequestHandler):
    """Repositories; `files` by repository and path in it. There is no org/other."""

    files: dict[tuple[str, str], bytes] = {}
    commit = "1" * 40

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer()

    def answer(self, body=True):
        content, headers = None, {"X-Repo-Commit": self.commit}
        if self.path.startswith("/api/models/"):
            content = json.dumps({
                "id": self.path.removeprefix("/api/models/"), "siblings": [], "tags": [],
                "cardData": {"license": "cc-by-4.0"}}).encode()
            headers["Content-Type"] = "application/json"
        for (repository, name), blob in self.files.items():
            if self.path.partition("?")[0] == f"/{repository}/resolve/main/{name}":
                content, headers["ETag"] = blob, f'"{len(blob)}-{name}"'
        if content is None:
            known = not self.path.startswith("/org/other/")
            headers["X-Error-Code"] = "EntryNotFound" if known else "RepoNotFound"
        self.send_response(404 if content is None else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content is not None:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch, serving):
    """The files on a local server that plays the Hub: hub["org/net", "model.safetensors"]."""
    client = pytest.importorskip("huggingface_hub")
    handler = type("Handler", (Hub,), {"files": {}})
    monkeypatch.setenv("HF_ENDPOINT", serving(handler))
    monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", False)
    yield handler.files
    client.close_session()


@pytest.fixture
def digits():
    return images(10, 8, channels=1, name="digits")


def test_a_checkpoint_of_the_hub(hub, tmp_path, make_network, make_header, digits, capfd):
    net = make_network()
    save_checkpoint(tmp_path / "net.safetensors", net, make_header())
    hub["org/net", "model.safetensors"] = (tmp_path / "net.safetensors").read_bytes()
    network = load("hf:org/net", digits, reporter=Reporter())
    with torch.no_grad():
        torch.testing.assert_close(network.net(digits.test.x), net(digits.test.x))
    assert (network.source, network.model) == ("hf:org/net", "smallcnn")
    assert network.header is not None and network.header.defense == "trades"
    assert network.notes == ("license of the weights: cc-by-4.0",)
    assert "hf:org/net: license of the weights: cc-by-4.0" in capfd.readouterr().err


def test_a_file_of_the_hub_for_a_named_architecture(hub, make_network, digits):
    net = make_network()
    hub["org/net", "weights/last.safetensors"] = save(
        {name: value.contiguous() for name, value in net.state_dict().items()})
    network = load("hf:org/net/weights/last.safetensors", digits, model="smallcnn")
    with torch.no_grad():
        torch.testing.assert_close(network.net(digits.test.x), net(digits.test.x))
    assert "add --model NAME" in refused("hf:org/net/weights/last.safetensors", digits)


def test_a_pickle_of_the_hub_runs_no_code(hub, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    hub["org/net", "evil.pt"] = (tmp_path / "evil.pt").read_bytes()
    with pytest.raises(UsageError, match="holds more than tensors"):
        load("hf:org/net/evil.pt", digits, model="smallcnn")
    assert not (tmp_path / "broken-into").exists()


def test_what_the_hub_does_not_have(hub, digits):
    assert "org/net has no model.safetensors: name the file, hf:org/net/FILE" in refused(
        "hf:org/net", digits)
    assert "hf:org/other could not be downloaded (RepositoryNotFoundError" in refused(
        "hf:org/other", digits, RobenchError)
    assert "write hf:ORG/REPO" in refused("hf:net", digits)
    assert "README.md is no file of weights" in refused("hf:org/net/README.md", digits)


def test_without_the_client(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "robench[hub]"' in refused("hf:org/net", digits)


def test_a_source_that_is_nothing(digits):
    message = refused("robustbench", digits)
    assert "'robustbench' is none of a file, package.module:factory, robustbench:NAME" in message
