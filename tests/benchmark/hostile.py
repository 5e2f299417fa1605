"""Every kind of file that robench reads from others: one that is well, and how it is read."""

import io
import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from robench.attacks.state import read_state
from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import Cell
from robench.benchmark.checkpoints import CellFolder, Header, read_weights, save_checkpoint
from robench.benchmark.corruptions import _unfinished
from robench.benchmark.data import load_dataset
from robench.benchmark.data.corrupted import corrupted
from robench.benchmark.earlier import Earlier, Kept
from robench.benchmark.examples import Examples
from robench.benchmark.kept import kept_record, kept_survey, kept_transfers
from robench.benchmark.landscapes import Begun
from robench.benchmark.origin import _spec
from robench.benchmark.outline import outline
from robench.benchmark.parts import Part, _load_partial, together
from robench.benchmark.recipe import ModelSpec
from robench.benchmark.sources import load_network
from robench.benchmark.spec import (
    AttackSpec,
    CellSpec,
    RunSpec,
    check_attacks,
    parse_value,
    read_config,
    threat_models,
)
from robench.benchmark.zoo.entries import Terms, _model, _rows
from robench.benchmark.zoo.fetch import Page, _sound
from robench.benchmark.zoo.load import _check
from robench.errors import RobenchError
from robench.files import pack_arrays
from robench.randomness import seeded
from robench.reports import load, render
from robench.reports.compare import survival
from robench.reports.embed import embed
from robench.reports.gate import check
from robench.reports.jsonfile import from_json
from robench.reports.measured import measured, of_records, save_baseline
from robench.reports.record import Landscape
from robench.reports.tables import from_csv
from robench.reports.verdict import (
    baseline_text,
    outcome_json,
    outcome_junit,
    outcome_markdown,
    outcome_text,
)

Case = tuple[bytes, Callable[[Path], object]]
COMMITTED = Path(__file__).parents[2] / "results" / "cifar10-small-resnet"
CONFIG = """\
defense: [peeraid, trades]
baseline: pgd-at
dataset: digits
threat: Linf:8/255
seeds: [0, 1]
epochs: 3
attacks: [fgsm, {name: pgd, options: {steps: 5, step_size: 2/255}, limit: 10}]
train: {lr: 0.1, batch_size: 64, milestones: [0.5, 0.75]}
options: {trades: {beta: 6.0}}
jobs: 2
out: runs/x
"""
ROBUSTBENCH = {
    "link": "https://arxiv.org", "name": "A name", "authors": "A, B", "venue": "V 2020",
    "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10",
    "architecture": "WideResNet-34-10", "eps": "8/255", "clean_acc": "85.34",
    "autoattack_acc": "53.42", "external": "52.9", "footnote": None, "unreliable": False,
}


def make_cases(folder: Path) -> dict[str, Case]:
    """name -> (a file that is well, a function that reads it as a command does)."""
    return {**_results(folder), **_kept(), **_data(folder), **_zoo(folder)}


def _results(folder: Path) -> dict[str, Case]:
    """Records and tables, networks, and what the command line names."""
    digits, threat = load_dataset("digits"), ThreatModel("Linf", 0.1)
    lines = {name: (COMMITTED / name).read_bytes().splitlines(keepends=True)
             for name in ("results.jsonl", "transfer.jsonl", "training.jsonl", "crossing.jsonl",
                          "steps.jsonl", "gallery.jsonl")}
    few = {name: b"".join(rows[::len(rows) // 4 or 1][:5]) for name, rows in lines.items()}
    record = load([COMMITTED]).records[0]
    header = Header(model=ModelSpec(name="smallcnn"), classes=10, channels=1, size=8,
                    dataset="digits", defense="trades", recipe="unified", seed=0,
                    checkpoint="best", epoch=3)
    with seeded(0, "hostile"):
        net = header.build()
    place = folder / "net.safetensors"
    save_checkpoint(place, net, header)
    torch.save(net.state_dict(), folder / "net.pt")
    torch.save({"nets": {}, "optimizers": {}, "memory": {}, "averages": {}, "history": []},
               folder / "state.pt")
    Examples(torch.arange(3), torch.rand(3, 1, 8, 8), "Linf:0.1", "0").save(folder / "examples")
    survey = {
        **{name: "x" for name in ("run", "created", "robench", "torch", "device", "commit",
                                  "dataset", "data_sha256", "model", "source", "weights_sha256",
                                  "defense", "recipe", "selection", "checkpoint", "attack")},
        "threat": "Linf:0.1", "seed": 0, "threads": 1, "split": "test", "n": 3,
        "fingerprint": [1.0], "defense_config": {}, "attack_config": {}, "seconds": 1}
    landscape = json.dumps({**survey, "kind": "weight", "direction_seed": 0, "alphas": [-1, 0, 1],
                            "losses": [[1, 2, 3]]}).encode()
    corruptions = json.dumps({**survey, "clean": 3, "right": {"fog": [3, 2, 1]}}).encode()
    save_baseline(folder / "baseline.json", [
        one.model_copy(update={name: np.arange(one.n) < getattr(one, f"n_{name}")
                               for name in ("correct", "robust")} | {"n_correct": one.n, "correct":
                               np.ones(one.n, bool)})
        for one in of_records([record.model_copy(update={"flags": ""})])])

    def run_folder(path):
        home = path.parent
        for name, text in few.items():
            if name != path.name:
                (home / name).write_bytes(text)
        render(load([home]), home / "out", ["csv", "md", "tex", "json", "html", "robustbench"])

    def config(path):
        spec = RunSpec.create(read_config(path))
        check_attacks(spec.attacks, threat_models(spec))

    def compared(path):
        baseline_text(measured(path))
        for current, old in ((path, folder / "baseline.json"), (folder / "baseline.json", path)):
            outcome = check(measured(current), measured(old), metrics=())
            for written in (outcome_text, outcome_markdown, outcome_junit, outcome_json):
                written(outcome)

    def texts(path):
        text = path.read_bytes().decode(errors="replace")
        for read in (ThreatModel.parse, AttackSpec.parse, lambda t: parse_value(t, "--set")):
            try:
                read(text)
            except RobenchError:
                pass

    def embedding(path):
        (path.parent / "results.jsonl").write_bytes(few["results.jsonl"])
        embed(path)

    def published(path):
        target = path.parent / "Linf" / "Name.json"
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
        render(load([target]), path.parent / "out", ["csv", "md", "html"])

    return {
        **{name: (text, run_folder) for name, text in few.items()},
        "landscape.jsonl": (landscape, run_folder),
        "corruptions.jsonl": (corruptions, run_folder),
        "baseline.json": ((folder / "baseline.json").read_bytes(), compared),
        "config.yaml": (CONFIG.encode(), config),
        "model.json": (json.dumps(ROBUSTBENCH).encode(), published),
        "flags.npz": (pack_arrays({"correct": np.ones(record.n, bool),
                                   "robust": np.arange(record.n) < record.n_robust}),
                      lambda path: survival(record.model_copy(update={"flags": str(path)}))),
        "net.safetensors": (place.read_bytes(),
                            lambda path: load_network(str(path), digits, threat)),
        "net.pt": ((folder / "net.pt").read_bytes(), read_weights),
        "state.pt": ((folder / "state.pt").read_bytes(),
                     lambda path: CellFolder(path.parent, None, "cpu").load_state()),
        "examples": ((folder / "examples").read_bytes(), Examples.load),
        "leaderboard.csv": ((COMMITTED / "leaderboard.csv").read_bytes(), lambda path: from_csv(
            path.read_bytes().decode(errors="surrogateescape"))),
        "leaderboard.json": ((COMMITTED / "leaderboard.json").read_bytes(), lambda path: from_json(
            path.read_bytes().decode(errors="surrogateescape"))),
        "README.md": (b"<!-- robench: . leaderboard -->\n<!-- /robench -->\n", embedding),
        "option": (b"pgd,steps=50,restarts=5", texts),
    }


def _kept() -> dict[str, Case]:
    """What a run finds in its output folder: of itself, of an interrupted or an earlier one."""
    record = COMMITTED.joinpath("results.jsonl").read_bytes().splitlines()[0]
    fingerprint = tuple(json.loads(record)["fingerprint"])
    spec = next(COMMITTED.glob("cells/*/spec.json")).read_bytes()
    cell = SimpleNamespace(spec=CellSpec.model_validate_json(spec), folder=Path("none"))
    threat, some = ThreatModel.parse(cell.spec.threat), np.arange(3)
    places = {"spec.json": "cells/a/spec.json", "done.json": "cells/a/done.json",
              "kept.json": "cells/a/eval/a.json", "speed.csv": "speed/speed.csv",
              "speed-train.csv": "speed/speed-train.csv"}
    speed = {"speed.csv": dict(attack="fgsm", contender="robench, exact", dataset=cell.spec.dataset,
                               device="cpu", network="none.pt", seconds="1.5", n="10"),
             "speed-train.csv": dict(dataset=cell.spec.dataset, defense=cell.spec.defense,
                                     model=cell.spec.model.name, device="cpu",
                                     contender=f"robench, {cell.spec.train.precision}",
                                     images_per_second="9.5")}
    well = {"spec.json": spec, "kept.json": record,
            "done.json": json.dumps({"seconds": 1.5, "history": [], "devices": 1}).encode(),
            **{name: f"{','.join(line)}\n{','.join(line.values())}\n".encode()
               for name, line in speed.items()}}

    def planned(path):
        """As `plan` and `run` ask how long it will take."""
        out, content = path.parent / "out", path.read_bytes()
        for name, place in places.items():
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            (out / place).write_bytes(content if name == path.name else well[name])
        kept = Kept.read(out)
        earlier = Earlier(RunSpec(out=out), kept, "cpu", threat, 100, 10, 100,
                          lambda n: kept.hashes("cifar10", n))
        earlier.training(cell)
        earlier.attack(cell, (AttackSpec(name="fgsm"), threat, None), 100)
        _spec(out / "cells" / "a")
        outline(RunSpec(out=out, dataset=cell.spec.dataset))
        Cell.result(SimpleNamespace(folder=out / "cells" / "a"))
        eval_ = out / places["kept.json"]
        for read, more in ((kept_record, (fingerprint,)), (kept_transfers, ()),
                           (kept_survey, (Landscape, fingerprint))):
            read(eval_, *more)

    def part(path):
        found = Part.load(path, (0, 3))
        if found is not None:
            together([found[0], Part(3, 6, some)])

    made = io.BytesIO()
    facts = {"classes": 10}
    Part(0, 3, some, breaker=np.zeros(3, np.int8), stages=("a",)).save(made_path := Path(
        tempfile.mkdtemp()) / "part.npz", facts)
    made.write(made_path.read_bytes())
    batches = dict(done=1, predicted=some, seconds=1.0, farthest=0.1, violations=0, batch_size=2,
                   fingerprint=np.ones(3), notes=np.array(["x"]))
    return {
        **{name: (content, planned) for name, content in well.items()},
        "part.npz": (made.getvalue(), part),
        "batches.partial": (pack_arrays(batches),
                            lambda path: _load_partial(path, some, np.ones(3), 2)),
        "search.partial": (pack_arrays({"identity": np.array("x"), "fingerprint": np.ones(3)}),
                           lambda path: read_state(path, "x", np.ones(3))),
        "lines.partial": (json.dumps({"fingerprint": [1.0], "losses": [], "seconds": 1}).encode(),
                          lambda path: Begun.read(path, (1.0,))),
        "counts.partial": (pack_arrays({"fingerprint": np.ones(3), "seconds": np.array(1.0),
                                        "fog": some}),
                           lambda path: _unfinished(path, np.ones(3))),
    }


def _data(folder: Path) -> dict[str, Case]:
    """Files of data sets. torchvision compares those of CIFAR with their MD5 sums."""
    digits = load_dataset("digits").test
    n, picture = len(digits), io.BytesIO()
    arrays = {"labels.npy": np.tile(digits.y.numpy(), 5).astype(np.uint8),
              "fog.npy": np.zeros((5 * n, 8, 8, 1), np.uint8)}
    well = {}
    for name, array in arrays.items():
        np.save(folder / name, array)
        well[name] = (folder / name).read_bytes()
    Image.new("RGB", (64, 64)).save(picture, "png")
    tiny = {"wnids.txt": b"n1\nn2\n", "words.txt": b"n1\tdog, hound\nn2\tcat\n",
            "val/val_annotations.txt": b"a.png\tn1\t0\t0\t1\t1\nb.png\tn2\t0\t0\t1\t1\n",
            **{f"train/{n}/images/{n}.JPEG": picture.getvalue() for n in ("n1", "n2")},
            **{f"val/images/{n}.png": picture.getvalue() for n in ("a", "b")}}
    mnist = {f"{split}-{what}-idx{dims}-ubyte": head + bytes(2 * 28 * 28 if dims == 3 else 2)
             for split in ("train", "t10k") for what, dims, head in (
                 ("images", 3, struct.pack(">4i", 0x803, 2, 28, 28)),
                 ("labels", 1, struct.pack(">2i", 0x801, 2)))}

    def lay(home, files, path, place):
        for name, content in files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(path.read_bytes() if name == place else content)
        return home

    def corruption(path):
        home = lay(path.parent / "c", well, path, path.name)
        found = corrupted("digits", digits, home, room=10**6, download=False, task=None)
        [images[0].x[:2] for images in found.values()]

    def tiny_imagenet(place):
        def read(path):
            lay(path.parent / "tiny-imagenet-200", tiny, path, place)
            load_dataset("tiny-imagenet", path.parent, room=1).test.x[:2]
        return read

    def digits_of_mnist(path):
        lay(path.parent / "MNIST" / "raw", mnist, path, path.name)
        load_dataset("mnist", path.parent)

    def image(path):
        for split in ("train", "test"):
            place = path.parent / "images" / split / "dog" / "a.png"
            place.parent.mkdir(parents=True)
            shutil.copy(path, place)
        load_dataset(f"folder:{path.parent / 'images'}", room=1).test.x[:1]

    return {
        **{name: (content, corruption) for name, content in well.items()},
        **{Path(name).name: (tiny[name], tiny_imagenet(name))
           for name in ("wnids.txt", "words.txt", "val/val_annotations.txt")},
        **{name: (mnist[name], digits_of_mnist) for name in ("t10k-images-idx3-ubyte",
                                                             "t10k-labels-idx1-ubyte")},
        "image.png": (picture.getvalue(), image),
    }


def _zoo(folder: Path) -> dict[str, Case]:
    """Of RobustBench and of who has its files: weights, web pages, the text about its models."""
    card = """### CIFAR-10

#### Linf, eps=8/255

| <sub>**1**</sub> | <sub><sup>**Old2020**</sup></sub> | <sub>*[Title](https://x.org/1)*</sub> \
|  <sub>85.10%</sub>  |  <sub>50.00%</sub>  |  <sub>ResNet-18</sub>  |  <sub>ICML, 2020</sub>  |

All weights of the models in the Model Zoo are released under the MIT license except the following
- CIFAR-10, Linf, Old2020*: Apache License 2.0; Copyright (c) 2021, Somebody
""".replace("\\\n", "")
    page = (b'<html><title>Virus scan warning</title><form id="download-form" action="/get">'
            b'<input type="hidden" name="id" value="1"></form></html>')

    def weights(path):
        _check(torch.load, path)
        _sound(path)

    def described(path):
        text = path.read_bytes().decode(errors="replace")
        terms = Terms.read(SimpleNamespace(read_text=lambda name: text))
        return [_model(place, cells, terms) for place, cells in _rows(text)]

    torch.save({"weight": torch.zeros(2)}, folder / "zoo.pt")
    return {
        "zoo.pt": ((folder / "zoo.pt").read_bytes(), weights),
        "page.html": (page, lambda path: Page.read(path.read_bytes()).message),
        "METADATA": (card.encode(), described),
    }


def survives(read: Callable[[Path], object], path: Path, content: bytes) -> None:
    """Whatever is wrong with the file, a RobenchError of one line says so."""
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows in a table are no tracebacks
        try:
            read(path)
        except RobenchError as error:
            assert str(error)
            assert len(str(error)) < 5000
