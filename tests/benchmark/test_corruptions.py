"""robench corruptions: what is read, what is counted, what is kept."""

import numpy as np
import pytest
import torch
from torch import nn

from robench.benchmark import corruptions as module
from robench.benchmark.checkpoints import save_checkpoint
from robench.benchmark.data import load_dataset
from robench.benchmark.data.corrupted import ARCHIVES, FOLDERS, corrupted
from robench.errors import UsageError
from robench.reports import load

NAMES = ("fog", "gaussian_noise", "saturate")


def versions() -> dict[str, np.ndarray]:
    """The 360 test digits under three corruptions, in CIFAR-10-C's layout; severity 1 is clean."""
    test = load_dataset("digits").test
    clean = (test.x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rng, found = np.random.RandomState(0), {}
    for name in NAMES:
        noise = rng.randint(-120, 121, clean.shape)
        found[name] = np.concatenate([
            np.clip(clean + noise * severity / 4, 0, 255).astype(np.uint8)
            for severity in range(5)])
    return found


def write(folder, arrays, labels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in arrays.items():
        np.save(folder / f"{name}.npy", pixels)
    np.save(folder / "labels.npy", labels)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits-c")
    write(folder, versions(), np.tile(load_dataset("digits").test.y.numpy(), 5).astype(np.uint8))
    return folder


@pytest.fixture
def files(tmp_path, make_network, make_header, monkeypatch):
    from robench.benchmark import surveys
    from robench.reports.store import save

    monkeypatch.setattr(surveys, "render", lambda results, out: save(out, results))
    monkeypatch.chdir(tmp_path)
    for number, defense in enumerate(("a", "b")):
        save_checkpoint(tmp_path / f"{defense}.safetensors", make_network(number),
                        make_header(defense=defense))
    return ["a.safetensors", "b.safetensors"]


def read(root, test=None, **options):
    how = {"room": 10**6, "download": False, "task": None, **options}
    return corrupted("digits", test or load_dataset("digits").test, root, **how)


def test_severities_are_read_in_order(root):
    arrays, found = versions(), read(root)
    assert tuple(found) == NAMES
    for name, images in found.items():
        assert len(images) == 5
        for severity, one in enumerate(images):
            part = arrays[name][360 * severity : 360 * (severity + 1)]
            assert torch.equal(one.x[:], torch.from_numpy(part).permute(0, 3, 1, 2) / 255)
            assert torch.equal(one.y, load_dataset("digits").test.y)
    assert tuple(read(root, only=("fog",))) == ("fog",)


def test_counts_are_those_of_a_plain_pass(root, files, robench, tmp_path, make_network):
    done = robench("corruptions", *files, "--corruptions-root", root, "--limit", 50, "--device",
                   "cpu", "--quiet", "--batch-size", 16)
    assert done.code == 0, done.err
    assert "| mean of 2" in done.out and "it is no mCE" in done.out
    assert "runs/corruptions/corruptions.csv" in done.err
    found = load([tmp_path / "runs/corruptions"]).corruptions
    arrays, y = versions(), load_dataset("digits").test.y[:50]
    for number, one in enumerate(found):
        net = make_network(number).eval()
        assert (one.n, one.threat, one.attack) == (50, "", "") and set(one.right) == set(NAMES)
        for name, counts in one.right.items():
            for severity, count in enumerate(counts):
                part = arrays[name][360 * severity : 360 * severity + 50]
                x = torch.from_numpy(part).permute(0, 3, 1, 2) / 255
                with torch.no_grad():
                    assert count == int((net(x).argmax(1) == y).sum())
    assert len({one.data_sha256 for one in found}) == 1 and len(found) == 2


def test_it_goes_on_after_the_last_corruption(root, files, robench, tmp_path, monkeypatch):
    def call(out):
        return robench("corruptions", files[0], "--corruptions-root", root, "--limit", 20,
                       "--device", "cpu", "--quiet", "--out", out)

    whole = call("whole")
    calls, original = [], module.right

    def interrupted(net: nn.Module, images, size):
        calls.append(len(images))
        if len(calls) == 9:  # in the second corruption
            raise KeyboardInterrupt
        return original(net, images, size)

    monkeypatch.setattr(module, "right", interrupted)
    assert call("parts").code == 130
    assert len(list((tmp_path / "parts/corruptions").glob("*.partial"))) == 1
    assert call("parts").out == whole.out
    assert len(calls) == 9 + 1 + 10  # the clean images, and two corruptions of five severities
    assert not list((tmp_path / "parts/corruptions").glob("*.partial"))
    assert call("parts").out == whole.out and len(calls) == 20
    one, other = (load([tmp_path / out]).corruptions[0] for out in ("whole", "parts"))
    assert (one.right, one.clean, one.data_sha256) == (other.right, other.clean, other.data_sha256)


def test_a_folder_that_is_no_download_is_in_the_way(tmp_path):
    (tmp_path / "CIFAR-10-C").mkdir()
    with pytest.raises(UsageError, match="or remove .*CIFAR-10-C and add --download"):
        corrupted("cifar10", load_dataset("digits").test, tmp_path, room=1, download=True,
                  task=None)


def labels_of_others(folder):
    np.save(folder / "labels.npy", np.zeros(1800, dtype=np.uint8))


def too_few(folder):
    np.save(folder / "labels.npy", np.zeros(1799, dtype=np.uint8))


def floats(folder):
    np.save(folder / "fog.npy", np.zeros((1800, 8, 8, 1), dtype=np.float32))


def short(folder):
    np.save(folder / "fog.npy", np.zeros((1799, 8, 8, 1), dtype=np.uint8))


def pickled(folder):
    np.save(folder / "fog.npy", np.array([{}], dtype=object), allow_pickle=True)


def truncated(folder):
    (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:5000])


def alone(folder):
    for name in NAMES:
        (folder / f"{name}.npy").unlink()


@pytest.mark.parametrize(("spoil", "message"), [
    (labels_of_others, r"labels\.npy does not hold the 360 labels of the test set of digits"),
    (too_few, "does not hold"), (floats, r"fog\.npy holds float32 \(1800, 8, 8, 1\), not uint8"),
    (short, r"fog\.npy holds uint8 \(1799"),
    (pickled, r"cannot read .*fog\.npy .*(pickle|Python objects)"),
    (truncated, r"cannot read .*fog\.npy"), (alone, "no corruptions in"),
    (lambda folder: (folder / "labels.npy").unlink(), "name the folder .*--corruptions-root DIR"),
])
def test_what_does_not_fit_is_refused(tmp_path, spoil, message):
    write(tmp_path, versions(), np.tile(load_dataset("digits").test.y.numpy(), 5))
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_corruptions_get_a_suggestion(root):
    with pytest.raises(UsageError, match="unknown corruption 'fogg'.*Did you mean: fog"):
        read(root, only=("fogg",))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_official_folder_is_found(tmp_path, name):
    from robench.benchmark.data import Images

    rng = np.random.RandomState(0)
    test = Images(torch.rand(4, 3, 32, 32), torch.tensor([3, 8, 8, 0]))
    pixels = rng.randint(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    write(tmp_path / FOLDERS[name], {"fog": pixels}, np.tile([3, 8, 8, 0], 5))
    for root in (tmp_path, tmp_path / FOLDERS[name]):
        found = corrupted(name, test, root, room=10**6, download=True, task=None)
        assert torch.equal(found["fog"][4].x[:],
                           torch.from_numpy(pixels[16:]).permute(0, 3, 1, 2) / 255)
    assert ARCHIVES[name].name == f"{FOLDERS[name]}.tar" and ARCHIVES[name].size > 2.9e9
