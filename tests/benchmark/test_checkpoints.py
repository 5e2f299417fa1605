"""Checkpoints: what is written is read back, and nothing else is trusted."""

import copy
import os
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robench.benchmark.checkpoints import (
    CellFolder,
    load_checkpoint,
    load_weights,
    read_header,
    read_weights,
    save_checkpoint,
    weights_sha256,
)
from robench.benchmark.models import build_model
from robench.benchmark.recipe import ModelSpec
from robench.benchmark.zoo.load import read_tensors
from robench.errors import RobenchError, UsageError


def refused(action, *arguments):
    """The message of the UsageError, which has one line."""
    with pytest.raises(UsageError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# Our own


def test_round_trip(checkpoint, make_network, make_header):
    net, header = load_checkpoint(checkpoint)
    assert header == make_header() == read_header(checkpoint)
    assert not any(module.training for module in net.modules())
    original = make_network()
    assert same(net.state_dict(), original.state_dict())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(net(x), original(x))


def test_round_trip_with_a_normalization_in_front(tmp_path, make_network, make_header):
    changes = {"model": ModelSpec(name="small-resnet", normalize="cifar10"), "channels": 3,
               "classes": 7}
    original = make_network(**changes)
    save_checkpoint(tmp_path / "a.safetensors", original, make_header(**changes))
    net, _ = load_checkpoint(tmp_path / "a.safetensors")
    assert net.normalize.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert same(net.state_dict(), original.state_dict())


def test_the_memory_format_leaves_no_trace_in_the_file(tmp_path, make_network, make_header):
    net = make_network()
    save_checkpoint(tmp_path / "a.safetensors", net, make_header())
    save_checkpoint(tmp_path / "b.safetensors", net.to(memory_format=torch.channels_last),
                    make_header())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_plain_pytorch_can_read_it(checkpoint, make_network):
    assert same(load_file(checkpoint), make_network().state_dict())


def test_the_hash_sees_every_value(make_network):
    net = make_network()
    seen = {weights_sha256(net)}
    for value in net.state_dict().values():  # parameters, statistics and counters
        corner = tuple(size - 1 for size in value.shape)
        kept = value[corner].clone()
        value[corner] = kept + 1 if not value.is_floating_point() else kept.nextafter(
            torch.tensor(torch.inf))
        seen.add(weights_sha256(net))
        value[corner] = kept
    assert len(seen) == 1 + len(net.state_dict())
    assert weights_sha256(net) in seen


def test_the_hash_sees_names_shapes_and_types_but_no_memory_format(make_network):
    net = make_network()
    before = weights_sha256(net)
    assert weights_sha256(net.to(memory_format=torch.channels_last)) == before
    assert weights_sha256(make_network()) == before
    assert weights_sha256(nn.Sequential(OrderedDict(other=net))) != before
    assert weights_sha256(net.double()) != before
    flat, column = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)
    column.weight.data = flat.weight.data.view(4, 1)
    assert weights_sha256(flat) != weights_sha256(column)


# Files of others


@pytest.fixture
def net():
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"net": state},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {**state, "sub_block1.layer.0.conv1.weight": torch.rand(3)},
        lambda state: {**{f"module.{k}": v for k, v in state.items()},
                       "module.sub_block1.layer.0.bn1.bias": torch.rand(3)},
    ],
    ids=["plain", "state_dict", "model_state_dict", "model", "net", "parallel",
         "parallel in state_dict", "dead block", "parallel and dead block"],
)
def test_layouts_of_state_dicts(tmp_path, net, wrap, zipped):
    path = tmp_path / "net.pt"
    torch.save(wrap(net.state_dict()), path, _use_new_zipfile_serialization=zipped)
    other = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2)))
    load_weights(other, path)
    assert same(other.state_dict(), net.state_dict())


def test_safetensors_of_others(tmp_path, net):
    path = tmp_path / "net.safetensors"
    save_file({f"module.{k}": v for k, v in net.state_dict().items()}, path)
    assert read_header(path) is None
    fresh = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_weights(fresh, path)
    assert same(dict(fresh.state_dict()), dict(net.state_dict()))
    assert "does not say which network it holds: add --model" in refused(load_checkpoint, path)


def test_names_that_the_network_has_itself_are_kept(tmp_path, net):
    own = nn.Sequential(OrderedDict(module=net, sub_block1=nn.Linear(1, 1)))
    torch.save(own.state_dict(), tmp_path / "net.pt")
    before = {k: v.clone() for k, v in own.state_dict().items()}
    for p in own.parameters():
        nn.init.zeros_(p)
    load_weights(own, tmp_path / "net.pt")
    assert same(own.state_dict(), before)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin"])
@pytest.mark.parametrize("how", ["torch", "torch legacy", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, net, name, how):
    content = {**net.state_dict(), "extra": Evil(tmp_path / "owned")}
    path = tmp_path / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    assert "does not unpickle code" in refused(load_weights, net, path)
    assert not (tmp_path / "owned").exists()


def test_a_few_bytes_do_not_fill_the_memory(tmp_path, net):
    whole = tmp_path / "whole.pt"
    torch.save({"x": torch.zeros(10**6)}, whole)
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(whole) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as one:
        for entry in stored.infolist():
            one.writestr(entry.filename, stored.read(entry.filename))
    assert path.stat().st_size < 10**5
    assert "it unpacks to more than it is" in refused(load_weights, net, path)
    with pytest.raises(RobenchError, match="it unpacks to more than it is"):
        read_tensors(torch.load, path)


def test_a_whole_network_is_refused(tmp_path, net):
    torch.save(net, tmp_path / "a.pt")
    assert "torch.save(model.state_dict(), path)" in refused(read_weights, tmp_path / "a.pt")


@pytest.mark.parametrize("content", [3, [1, 2], {"a": 1}, {1: torch.rand(1)}, torch.rand(2)])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert "holds no state dict of tensors" in refused(read_weights, tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("content", [b"", b"garbage", bytes(100), b"\xff" * 20, b"PK\x03\x04"])
def test_garbage_is_refused(tmp_path, net, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert str(path) in refused(load_weights, net, path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_missing_files_and_folders(tmp_path, net, suffix):
    path = tmp_path / f"a.{suffix}"
    assert refused(load_weights, net, path) == f"there is no file {path}"
    path.mkdir()
    assert str(path) in refused(load_weights, net, path)


def damaged(content, rng):
    """Cut off, or with some bytes changed near one of its ends."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    near_the_end = rng.random() < 0.5
    for _ in range(rng.randrange(1, 10)):
        place = rng.randrange(min(len(content), 2000))
        changed[-1 - place if near_the_end else place] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "legacy.pt", "state.pt"])
def test_damaged_files_are_refused_in_one_line_or_read(tmp_path, make_network, make_header, name):
    """Bytes may change where nobody looks; whatever a parser thinks of them, it is a UsageError."""
    net, path = make_network(), tmp_path / name
    folder = CellFolder(tmp_path, make_header(), torch.device("cpu"))
    if name == "state.pt":
        folder.save_state({"epoch": 1, "nets": {"student": net.state_dict()}})
    elif path.suffix == ".pt":
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=name == "a.pt")
    else:
        save_checkpoint(path, net, make_header())
    whole, rng, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(120):
        path.write_bytes(damaged(whole, rng))
        try:
            if name == "state.pt":
                folder.load_state()
            elif path.suffix == ".safetensors":
                load_checkpoint(path)
            else:
                load_weights(net, path)
        except UsageError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 30


def test_a_damaged_header_says_so(tmp_path, net):
    path = tmp_path / "a.safetensors"
    save_file(net.state_dict(), path, {"robench": '{"model": 3}'})
    assert "header is damaged or of another version" in refused(load_checkpoint, path)


# Other architectures


def test_the_first_mismatch_is_named(tmp_path, net):
    path = tmp_path / "a.pt"

    def complaint(**changes):
        state = {**net.state_dict(), **changes}
        torch.save({k: v for k, v in state.items() if v is not None}, path)
        return refused(load_weights, net, path)

    assert "bn.bias is (3,), not (2,)" in complaint(**{"bn.bias": torch.rand(3)})
    assert "bn.weight is missing (1 missing, 0 unknown, 0 of another shape)" in complaint(
        **{"bn.weight": None})
    assert "fc.bias is unknown to it (0 missing, 2 unknown" in complaint(
        **{"fc.weight": torch.rand(1), "fc.bias": torch.rand(1)})


def test_a_refused_file_leaves_the_network_alone(tmp_path, net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.save({**net.state_dict(), "conv.bias": torch.ones(2), "bn.bias": torch.ones(3)},
               tmp_path / "a.pt")
    refused(load_weights, net, tmp_path / "a.pt")
    assert same(net.state_dict(), before)


def test_the_wide_resnet_of_trades_fits_without_its_dead_block(tmp_path):
    """The names that its released checkpoint has, the weights thinned out."""
    with torch.device("meta"):
        wide = build_model("wrn-34-10", classes=10, channels=3, size=32)
    names = {f"module.{k}" for k in wide.state_dict()}
    dead = {k.replace("block1", "sub_block1") for k in names if ".block1." in k}
    assert len(dead) > 50
    torch.save({k: torch.zeros(()) for k in names | dead}, tmp_path / "a.pt")
    message = refused(load_weights, wide, tmp_path / "a.pt")
    assert "(0 missing, 0 unknown" in message  # only the shapes are wrong


# The folder of a cell


def test_the_keeper_of_a_cell(tmp_path, make_network, make_header):
    folder = CellFolder(tmp_path / "cell", make_header(), torch.device("cpu"))
    assert folder.load_state() is None
    net = make_network()
    state = {"epoch": 2, "nets": {"student": net.state_dict()}, "history": [{"lr": 0.1}]}
    folder.save_state(state)
    kept = folder.load_state()
    assert same(kept["nets"]["student"], net.state_dict())
    assert (kept["epoch"], kept["history"]) == (2, [{"lr": 0.1}])

    folder.save_network("swa", net, 7)
    again, header = load_checkpoint(folder.path("swa"))
    assert header == make_header(checkpoint="swa", epoch=7)
    assert same(again.state_dict(), net.state_dict())
    assert sorted(p.name for p in (tmp_path / "cell").iterdir()) == ["state.pt", "swa.safetensors"]
