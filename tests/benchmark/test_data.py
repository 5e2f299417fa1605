"""Data sets: what is read, how it is split and augmented, and what is refused."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robench.benchmark.data import (
    DATASETS,
    Augment,
    Images,
    check_images,
    hold_out,
    load_dataset,
)
from robench.errors import UsageError


def some_images(n=6, channels=3, size=4, classes=3) -> Images:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, size, size, generator=generator)
    return Images(x, torch.arange(n) % classes)


# Images


def test_take_and_select():
    images = some_images(6)
    assert images.take(None) is images
    assert torch.equal(images.take(2).x, images.x[:2])
    assert images.select(torch.tensor([5, 0])).y.tolist() == [2, 0]
    assert images.to("meta").x.device.type == "meta"
    for n in (0, 7, -1):
        with pytest.raises(UsageError, match="ask for 1 to 6"):
            images.take(n)


def test_sha256_sees_every_pixel_label_and_shape():
    images = some_images(2, 1, 2)
    seen = {images.sha256()}
    for index in np.ndindex(*images.x.shape):
        x = images.x.clone()
        x[index] = x[index].nextafter(torch.tensor(2.0))
        seen.add(Images(x, images.y).sha256())
    seen.add(Images(images.x, images.y.flip(0)).sha256())
    seen.add(Images(images.x.view(2, 4, 1, 1), images.y).sha256())
    seen.add(images.take(1).sha256())
    assert len(seen) == 1 + 8 + 3


def test_sha256_ignores_the_memory_format():
    images = some_images()
    last = Images(images.x.to(memory_format=torch.channels_last), images.y)
    assert last.sha256() == images.sha256()


# Augment


def crops(image: torch.Tensor, pad: int, flip: bool) -> torch.Tensor:
    """Every image (M, C, H, W) that augmenting one image (C, H, W) may give."""
    h, w = image.shape[1:]
    padded = torch.nn.functional.pad(image, [pad] * 4)
    span = range(2 * pad + 1)
    found = [padded[:, top : top + h, left : left + w] for top in span for left in span]
    return torch.stack(found + [crop.flip(2) for crop in found if flip])


@given(
    pad=st.integers(0, 3),
    flip=st.booleans(),
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_output_is_a_crop_or_flip_of_its_own_input(pad, flip, shape, seed):
    torch.manual_seed(seed)
    x = torch.rand(shape)
    out = Augment(pad, flip)(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    for image, result in zip(x, out, strict=True):
        assert (crops(image, pad, flip) == result).flatten(1).all(1).any()


def test_each_image_gets_its_own_crop_and_flip_uniformly():
    torch.manual_seed(0)
    image = torch.rand(1, 4, 4)
    out = Augment(pad=1, flip=True)(image.expand(9_000, 1, 4, 4))
    counts = [(out == one).flatten(1).all(1).sum().item() for one in crops(image, 1, True)]
    assert sum(counts) == 9_000
    assert min(counts) > 400 and max(counts) < 600  # 18 outcomes, 500 expected, sigma 22


def test_augmentation_follows_the_global_generator():
    x = some_images(32).x
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(Augment(2, True)(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    state = torch.get_rng_state()
    assert Augment()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_never_waits_for_the_device():
    """Meta tensors have no values: reading one on the host would raise."""
    assert Augment(4, True)(torch.empty(5, 3, 32, 32, device="meta")).shape == (5, 3, 32, 32)


# check_images


def test_clean_images_pass_unchanged():
    images = some_images()
    x, y = check_images(images.x, images.y, 3)
    assert x is images.x and y is images.y
    assert check_images(images.x.double(), images.y, 3)[0].dtype == torch.float32


def test_rounding_is_clamped():
    images = some_images()
    x, _ = check_images(images.x * (1 + 2e-6) - 1e-6, images.y, 3)
    assert x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: ((x * 255).byte(), y), "divide by 255"),
        (lambda x, y: (x * 255, y), "divide pixels by 255"),
        (lambda x, y: ((x - 0.5) / 0.2, y), "normalization into the model"),
        (lambda x, y: (x.where(x < 0.9, torch.inf), y), "inf"),
        (lambda x, y: (x.where(x < 0.9, torch.nan), y), "NaN"),
        (lambda x, y: (x[0], y), r"\(N, C, H, W\)"),
        (lambda x, y: (x[:0], y[:0]), r"\(N, C, H, W\)"),
        (lambda x, y: (x, y[1:]), "6 images need labels"),
        (lambda x, y: (x, y[:, None]), "6 images need labels"),
        (lambda x, y: (x, y.float()), "int64"),
        (lambda x, y: (x, y + 1), r"0\.\.2, not 1\.\.3"),
        (lambda x, y: (x, y - 1), r"0\.\.2, not -1\.\.1"),
    ],
)
def test_faulty_images_are_refused(change, message):
    images = some_images()
    with pytest.raises(UsageError, match=message):
        check_images(*change(images.x, images.y), 3)


# hold_out


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    part=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_hold_out_is_stratified_disjoint_and_ordered(counts, part, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    total = len(labels)
    if total < 2:
        return
    n = min(max(1, round(part * total)), total - 1)
    x = torch.arange(total).float().view(-1, 1, 1, 1)  # each image tells its position
    train, validation = hold_out(Images(x, labels), n, seed)
    assert len(validation) == n
    positions = [part.x.flatten().tolist() for part in (train, validation)]
    assert sorted(positions[0] + positions[1]) == list(range(total))
    assert all(p == sorted(p) for p in positions)
    held = validation.y.bincount(minlength=len(counts)).tolist()
    assert all(abs(h - n * count / total) < 1 for h, count in zip(held, counts, strict=True))


def test_hold_out_depends_on_its_seed_alone():
    images = some_images(60)
    torch.manual_seed(0)
    first = hold_out(images, 20, seed=1)[1].sha256()
    torch.manual_seed(7)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert hold_out(images, 20, seed=1)[1].sha256() == first
    assert hold_out(images, 20, seed=2)[1].sha256() != first
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("n", [-1, 0, 6, 7])
def test_impossible_hold_outs(n):
    with pytest.raises(UsageError, match="ask for 1 to 5"):
        hold_out(some_images(6), n)


# Data sets by name


def test_digits():
    data = load_dataset("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert (data.channels, data.size, len(data.classes)) == (1, 8, 10)
    assert data.test.y.bincount().min() >= 34
    assert data.train.x.is_contiguous() and data.train.x.max() == 1
    assert data.augment == Augment()
    # The split must not change: results on digits would no longer compare.
    assert data.test.sha256() == load_dataset("digits").test.sha256()
    assert data.test.sha256()[:12] == "521ae862bb44"


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UsageError, match="unknown dataset 'cifar-10'.*Did you mean: cifar10"):
        load_dataset("cifar-10")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "svhn", "cifar10", "cifar100"])
def test_missing_data_say_where_and_how(name, tmp_path):
    with pytest.raises(UsageError, match="--data-root DIR.*--download"):
        load_dataset(name)
    with pytest.raises(UsageError, match="--data-root DIR.*--download") as caught:
        load_dataset(name, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def write_mnist(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        shape = struct.pack(f">{1 + x.ndim}i", 0x803, *x.shape)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(shape + x.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, len(y)) + y.astype(np.uint8).tobytes()
        )


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (4, 3, 32, 32), dtype=np.uint8)


LABELS = np.array([3, 0, 9, 1])


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_mnist_layout(name, folder, tmp_path, pixels):
    write_mnist(tmp_path / folder / "raw", pixels[:, 0, :28, :28], LABELS)
    data = load_dataset(name, tmp_path)
    assert data.train.x.shape == (4, 1, 28, 28) and data.train.y.tolist() == LABELS.tolist()
    assert torch.equal(data.test.x[:, 0], torch.from_numpy(pixels[:, 0, :28, :28]) / 255)


def test_damaged_mnist_becomes_one_line(tmp_path, pixels):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, pixels[:, 0], LABELS + 5)  # labels up to 14
    with pytest.raises(UsageError, match="labels must be in 0..9"):
        load_dataset("mnist", tmp_path)
    file = folder / "train-images-idx3-ubyte"
    for keep in (2000, 10, 0):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(UsageError, match="cannot read mnist in") as caught:
            load_dataset("mnist", tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_svhn_layout(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    labels = np.where(LABELS == 0, 10, LABELS)[:, None]  # the file calls the digit 0 class 10
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat",
                         {"X": pixels.transpose(2, 3, 1, 0), "y": labels})
    data = load_dataset("svhn", tmp_path)
    assert torch.equal(data.train.x, torch.from_numpy(pixels) / 255)
    assert data.train.x.is_contiguous() and data.test.y.tolist() == LABELS.tolist()


def write_cifar10(folder: Path, pixels: np.ndarray) -> None:
    folder.mkdir()
    batch = {"data": pixels.reshape(4, -1), "labels": LABELS.tolist()}
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_cifar_layout(tmp_path, pixels, monkeypatch):
    write_cifar10(tmp_path / "cifar-10-batches-py", pixels)
    with pytest.raises(UsageError, match="corrupted"):  # not the official files
        load_dataset("cifar10", tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    data = load_dataset("cifar10", tmp_path)
    assert len(data.train) == 20 and data.classes == tuple("abcdefghij")
    assert torch.equal(data.test.x, torch.from_numpy(pixels) / 255)
    assert data.test.x.is_contiguous() and data.augment == Augment(4, True)


def test_download_is_left_to_torchvision_and_keeps_stdout_clean(tmp_path, monkeypatch, capsys):
    class Reader:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            print("Files already downloaded and verified")
            assert root == tmp_path and download
            self.data, self.targets = torch.zeros(2, 28, 28, dtype=torch.uint8), [0, 1]

    monkeypatch.setattr(torchvision.datasets, "MNIST", Reader)
    assert load_dataset("mnist", tmp_path, download=True).classes == ("a", "b")
    assert capsys.readouterr().out == ""


# Folders of images


def write_folder(root: Path, mode: str = "RGB", count: int = 5, suffix: str = "png") -> None:
    rng = np.random.RandomState(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog", "eel")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (6, 6) if mode == "L" else (6, 6, 3)
                pixels = rng.randint(0, 256, shape, dtype=np.uint8)
                pixels[0, 0] = label  # the first pixel tells the class
                Image.fromarray(pixels).save(root / split / name / f"{i}.{suffix}")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_folder(tmp_path, mode, channels):
    write_folder(tmp_path, mode)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_dataset(f"folder:{tmp_path}")
    assert data.classes == ("cat", "dog", "eel") and (data.channels, data.size) == (channels, 6)
    for part in (data.train, data.test):
        assert part.x.shape == (15, channels, 6, 6) and part.x.is_contiguous()
        assert torch.equal((part.x[:, 0, 0, 0] * 255).round().long(), part.y)
        assert part.y.bincount().tolist() == [5, 5, 5]
        assert len(part.take(8).y.unique()) == 3  # shuffled
    again = load_dataset(f"folder:{tmp_path}")
    assert again.train.sha256() == data.train.sha256()


def test_folder_of_jpegs_with_some_grey_ones_is_color(tmp_path):
    write_folder(tmp_path, suffix="JPEG")
    Image.new("L", (6, 6), 200).save(tmp_path / "test" / "eel" / "grey.jpg")
    data = load_dataset(f"folder:{tmp_path}")
    assert data.channels == 3 and len(data.test) == 16


def spoil_size(root):
    Image.new("RGB", (6, 7)).save(root / "test" / "dog" / "1.png")


def spoil_bytes(root):
    file = root / "train" / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:60])


def spoil_mode(root):
    Image.new("RGBA", (6, 6)).save(root / "train" / "cat" / "2.png")


def spoil_class(root):
    (root / "test" / "eel").rename(root / "test" / "fox")


def spoil_empty(root):
    for file in (root / "test" / "dog").iterdir():
        file.unlink()


def spoil_shape(root):
    for file in root.rglob("*.png"):
        Image.new("RGB", (6, 7)).save(file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_size, r"test.dog.1\.png is 6x7, but .*0\.png is 6x6"),
        (spoil_bytes, r"cannot read .*train.dog.3\.png"),
        (spoil_mode, r"train.cat.2\.png has the mode RGBA"),
        (spoil_class, "class 'eel' is not in both"),
        (spoil_empty, "no images .* in .*dog"),
        (spoil_shape, "must be square"),
        (lambda root: (root / "test").rename(root / "tset"), "no folder .*test"),
    ],
)
def test_faulty_folders_are_refused(tmp_path, spoil, message):
    write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset(f"folder:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_folder_without_classes(tmp_path):
    (tmp_path / "test").mkdir()
    for path in (tmp_path, tmp_path / "test"):
        with pytest.raises(UsageError, match="no (class folders|images) .*in .*test"):
            load_dataset(f"folder:{path}")


def test_everything_is_described():
    assert all(entry.description for entry in DATASETS)


# The real thing


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "classes", "first"),
    [("cifar10", 10, [6, 9, 9, 4, 1, 1, 2, 7]), ("cifar100", 100, [19, 29, 0, 11, 1, 86, 90, 28])],
)
def test_official_cifar(name, classes, first):
    root = os.environ.get("ROBENCH_DATA")
    if not root:
        pytest.skip("set ROBENCH_DATA to a folder with the data in torchvision's layout")
    data = load_dataset(name, Path(root))
    assert (len(data.train), len(data.test), len(data.classes)) == (50_000, 10_000, classes)
    assert data.train.y[:8].tolist() == first  # the official order
    assert data.train.y.bincount().unique().tolist() == [50_000 // classes]
    levels = data.test.x * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
