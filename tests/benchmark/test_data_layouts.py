"""Tiny-ImageNet in both orders, ImageNet's validation folder, folders of images that differ."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robench.benchmark.checkpoints import save_checkpoint
from robench.benchmark.data import Augment, class_order, load_dataset
from robench.benchmark.data.registry import Request
from robench.benchmark.recipe import ModelSpec, default_threat, settings_for
from robench.errors import UsageError

# In the order of the file, which is not that of their names.
WNIDS = {"n02124075": "Egyptian cat", "n01443537": "goldfish, Carassius auratus",
         "n07734744": "mushroom", "n01944390": "snail, a slow one"}
GREY = "n07734744"
PER_CLASS, TESTED, SIZE = 6, 5, 16


def paint(wnid: str, number: int) -> np.ndarray:
    """A flat color that tells the class and the number, in steps that JPEG keeps apart."""
    return np.array([20 + 60 * sorted(WNIDS).index(wnid), 30 * number, 128], dtype=np.uint8)


def write_tiny(root: Path) -> Path:
    """The official layout with four classes; one of them is grey."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (folder / "words.txt").write_text("n00000001\tentity\n" + "".join(
        f"{wnid}\t{words}\n" for wnid, words in WNIDS.items()))
    lines = []
    for wnid in WNIDS:
        place = folder / "train" / wnid / "images"
        place.mkdir(parents=True)
        (place.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        for number in range(PER_CLASS):
            draw(place / f"{wnid}_{number}.JPEG", wnid, number)
    for number in range(TESTED):  # classes in turn, as the official ones are mixed
        for wnid in WNIDS:
            name = f"val_{len(lines)}.JPEG"
            draw(folder / "val" / "images" / name, wnid, number)
            lines.append(f"{name}\t{wnid}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def draw(path: Path, wnid: str, number: int) -> None:
    pixels = np.broadcast_to(paint(wnid, number), (SIZE, SIZE, 3))
    image = Image.fromarray(pixels[..., 0]) if wnid == GREY else Image.fromarray(pixels)
    image.save(path, quality=100, subsampling=0)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    from robench.reports.store import save

    for module in ("matrix", "external"):
        monkeypatch.setattr(f"robench.benchmark.{module}.render",
                            lambda results, out: save(out, results))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_tiny(root)
    return root


def painted(x: torch.Tensor) -> list[str]:
    """The class that each image was painted for, from its pixels."""
    return [sorted(WNIDS)[round((float(level) * 255 - 20) / 60)] for level in x[:, 0, 8, 8]]


@pytest.mark.parametrize("room", [None, 1])
@pytest.mark.parametrize(("name", "order"), [
    ("tiny-imagenet", list(WNIDS)), ("tiny-imagenet,order=sorted", sorted(WNIDS))])
def test_labels_of_tiny_imagenet_in_both_orders(tiny, name, order, room):
    data = load_dataset(name, tiny, room=room)
    assert (data.name, data.channels, data.size) == (name, 3, SIZE)
    assert data.classes == tuple(WNIDS[wnid].split(",")[0] for wnid in order)
    assert data.augment == Augment(pad=4, flip=True)
    assert (len(data.train), len(data.test)) == (4 * PER_CLASS, 4 * TESTED)
    for part in (data.train, data.test):
        assert [order[k] for k in part.y] == painted(part.x[:])
        grey = part.x[part.y == order.index(GREY)]
        assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
        color = part.x[part.y == order.index("n01443537")]
        assert not torch.equal(color[:, 0], color[:, 2])
    assert [order[k] for k in data.test.y[:4]] == list(WNIDS)  # in the order of the annotations


def test_the_order_is_part_of_the_identity(tiny):
    mine, theirs = (load_dataset(f"tiny-imagenet{order}", tiny)
                    for order in (",order=wnids", ",order=sorted"))
    assert mine.name == "tiny-imagenet" != theirs.name
    for one, other in ((mine.train, theirs.train), (mine.test, theirs.test)):
        assert torch.equal(one.x, other.x) and not torch.equal(one.y, other.y)
        assert one.sha256() != other.sha256()
    assert class_order(mine.name)[0] == class_order(theirs.name)[0]
    with pytest.raises(UsageError, match="order is one of wnids, sorted, not 'sort'"):
        load_dataset("tiny-imagenet,order=sort", tiny)


@pytest.mark.parametrize(("trained", "asked"), [
    ("tiny-imagenet", "tiny-imagenet,order=sorted"), ("tiny-imagenet,order=sorted",
                                                      "tiny-imagenet")])
def test_a_checkpoint_of_the_other_order_is_refused(
    tiny, tmp_path, robench, make_header, monkeypatch, trained, asked
):
    from robench.benchmark.models import build_model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = build_model("smallcnn", classes=4, channels=3, size=SIZE)
    save_checkpoint(tmp_path / "net.safetensors", net, make_header(
        model=ModelSpec(name="smallcnn"), classes=4, channels=3, size=SIZE, dataset=trained))
    options = ("--data-root", tiny, "--attack", "fgsm", "--device", "cpu", "--quiet")
    done = robench("eval", "net.safetensors", "--dataset", asked, *options)
    assert done.code == 2 and f"net.safetensors was trained on {trained}: its classes are in " \
        f"another order than those of {asked}" in done.err and not (tmp_path / "runs").exists()
    assert robench("eval", "net.safetensors", "--dataset", trained, *options).code in (0, 4)


def test_tiny_imagenet_trains_and_evaluates(tiny, tmp_path, robench, monkeypatch):
    """The recipe's settings for it, on a small network."""
    monkeypatch.chdir(tmp_path)
    done = robench("run", "--defense", "adr", "--dataset", "tiny-imagenet,order=sorted",
                   "--data-root", tiny, "--model", "smallcnn", "--epochs", "2", "--attack",
                   "pgd-5", "--set", "validation=4", "--set", "batch_size=10",
                   "--set", "select_steps=1", "--device", "cpu", "--quiet")
    assert done.code in (0, 4), done.err
    assert "tiny-imagenet,order=sorted" in (tmp_path / "runs/results.jsonl").read_text()
    options = settings_for("unified", "adr", "tiny-imagenet,order=sorted").options
    assert options == settings_for("unified", "adr", "tiny-imagenet").options != {}


def spoil_missing(folder):
    (folder / "wnids.txt").unlink()


def spoil_class(folder):
    (folder / "train" / GREY).rename(folder / "train" / "n1")


def spoil_annotation(folder):
    with (folder / "val/val_annotations.txt").open("a") as file:
        file.write("val_0.JPEG\tn1\t0\t0\t9\t9\n")


def spoil_twice(folder):
    (folder / "wnids.txt").write_text(f"{GREY}\n{GREY}\n")


@pytest.mark.parametrize(("spoil", "message"), [
    (spoil_missing, "cannot read tiny-imagenet .*--data-root DIR, or add --download"),
    (spoil_class, f"class '{GREY}' .*do not fit"), (spoil_annotation, "class 'n1' .*do not fit"),
    (spoil_twice, "do not fit"),
])
def test_damaged_tiny_imagenet(tmp_path, spoil, message):
    spoil(write_tiny(tmp_path))
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset("tiny-imagenet", tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_tiny_imagenet(tmp_path):
    for root in (None, tmp_path):
        with pytest.raises(UsageError, match="--data-root DIR, or add --download"):
            load_dataset("tiny-imagenet", root)


# ImageNet and other folders


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """Photos of several sizes and modes: left third red, middle green, right third blue."""
    root = tmp_path_factory.mktemp("imagenet")
    for wnid, sizes in (("n02", [(400, 300), (300, 400)]), ("n01", [(500, 260), (224, 224)])):
        (root / "val" / wnid).mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            for third in range(3):
                pixels[:, third * width // 3 : (third + 1) * width // 3, third] = 200
            mode = {("n01", 0): "L", ("n01", 1): "CMYK"}.get((wnid, i), "RGB")
            Image.fromarray(pixels).convert(mode).save(root / "val" / wnid / f"{i}.JPEG")
    return root


def test_imagenet_is_resized_and_cropped_as_torchvision_does(imagenet):
    from torchvision import transforms

    data = load_dataset(f"imagenet:{imagenet}")
    assert (data.name, data.channels, data.size) == ("imagenet", 3, 224)
    assert data.classes == ("n01", "n02") and data.test.y.bincount().tolist() == [2, 2]
    usual = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224),
                                transforms.ToTensor()])
    expected = []
    for file in sorted((imagenet / "val").rglob("*.JPEG")):
        with Image.open(file) as image:
            expected.append(usual(image.convert("RGB")))
    order = np.random.RandomState(0).permutation(4)
    assert torch.equal(data.test.x[:], torch.stack(expected)[order])
    assert data.test.y.tolist() == [[0, 0, 1, 1][i] for i in order]


def test_another_interpolation_is_another_data_set(imagenet):
    usual = load_dataset(f"imagenet:{imagenet}")
    other = load_dataset(f"imagenet:{imagenet},interpolation=bicubic,resize=256")
    assert other.name == "imagenet,interpolation=bicubic"
    assert other.test.sha256() != usual.test.sha256()
    small = load_dataset(f"imagenet:{imagenet},resize=40,crop=32", room=1)
    assert (small.name, small.size) == ("imagenet,resize=40,crop=32", 32)
    assert default_threat(f"imagenet:{imagenet},crop=32") == default_threat("imagenet")


def test_a_test_set_alone_is_evaluated_and_not_trained_on(
    imagenet, tmp_path, robench, monkeypatch, make_header
):
    from robench.benchmark.models import build_model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = build_model("smallcnn", classes=2, channels=3, size=32)
    save_checkpoint(tmp_path / "net.safetensors", net, make_header(
        classes=2, channels=3, size=32, dataset="imagenet"))
    name = f"imagenet:{imagenet},resize=36,crop=32"
    for options in ((), ("--memory-limit", "20k")):
        done = robench("eval", "net.safetensors", "--dataset", name, "--attack", "pgd-5",
                       "--device", "cpu", "--quiet", *options)
        assert done.code in (0, 4), done.err
    assert "imagenet,resize=36,crop=32 test, Linf:4/255" in done.out
    done = robench("run", "--defense", "trades", "--dataset", name, "--model", "smallcnn",
                   "--device", "cpu", "--quiet")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "imagenet,resize=36,crop=32 has test images only" in done.err


def test_flat_imagenet_says_what_is_missing(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (300, 300)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UsageError, match=r"no class folders in .*val: images go to .*<class>"):
        load_dataset(f"imagenet:{tmp_path}")


def test_folders_of_images_that_differ_need_options(imagenet):
    path = imagenet / "val"
    with pytest.raises(UsageError, match="has the mode CMYK"):
        load_dataset(f"folder:{path}")
    with pytest.raises(UsageError, match=r"400x300|300x400.*add ,resize=N,crop=N"):
        load_dataset(f"folder:{_only(path, 'n02')}")
    data = load_dataset(f"folder:{_only(path, 'n02')},resize=30,crop=24")
    assert data.name.endswith(",resize=30,crop=24") and data.test.x.shape == (2, 3, 24, 24)
    with pytest.raises(UsageError, match="has test images only"):
        _ = data.train


def test_a_folder_has_what_torchvisions_image_folder_finds(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    for level, suffix in enumerate(IMG_EXTENSIONS):
        for group, deeper in (("a", "."), ("b", "images/more")):
            (tmp_path / group / deeper).mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 20 * level).save(tmp_path / group / deeper / f"x{suffix}")
    theirs, mine = ImageFolder(tmp_path), load_dataset(f"folder:{tmp_path}")
    assert (len(mine.test), list(mine.classes)) == (len(theirs) == 18 and 18, theirs.classes)
    assert mine.test.y.bincount().tolist() == [9, 9]


def _only(path: Path, group: str) -> Path:
    """A folder beside it with this class alone."""
    place = path.parent / f"only-{group}"
    if not place.exists():
        (place / group).mkdir(parents=True)
        for file in (path / group).iterdir():
            (place / group / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize(("options", "message"), [
    ("crop=400", r"is \d+x\d+: cannot crop 400 pixels; add ,resize=N"),
    ("resize=20,crop=30", "cannot crop 30 of 20"), ("resize=20", "is 26x20|is 20x26"),
    ("interpolation=bicubic", "interpolation belongs to resize=N"),
    ("resize=20,interpolation=best", "interpolation is one of bilinear, bicubic"),
    ("resize=-3", "resize is a number of pixels"), ("order=sorted", "does not know 'order'"),
    ("crop=3,crop=4", "names crop twice"),
])
def test_wrong_options(imagenet, options, message):
    with pytest.raises(UsageError, match=message):
        load_dataset(f"folder:{_only(imagenet / 'val', 'n02')},{options}")


def test_val_is_a_test_set_and_test_comes_first(tmp_path):
    for split, level in (("train", 1), ("val", 2), ("test", 3)):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (4, 4), level).save(tmp_path / split / "a" / "0.png")
    levels = [round(float(part.x[:].max()) * 255)
              for data in [load_dataset(f"folder:{tmp_path}")] for part in (data.train, data.test)]
    assert levels == [1, 3]
    (tmp_path / "test").rename(tmp_path / "other")
    assert round(float(load_dataset(f"folder:{tmp_path}").test.x[:].max()) * 255) == 2


def test_names_with_options_and_commas():
    request = Request.parse("folder:/a,b/c=d,resize=8,crop=4")
    assert (request.kind, request.path) == ("folder", "/a,b/c=d")
    assert request.options == {"resize": "8", "crop": "4"}
    with pytest.raises(UsageError, match="digits does not know 'crop': it has no options"):
        load_dataset("digits,crop=4")
    with pytest.raises(UsageError, match=re.escape("Did you mean: digits")):
        load_dataset("digitz,crop=4")
