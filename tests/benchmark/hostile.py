"""Every kind of file that robench reads from others: one that is well, and how it is read."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from robench.attacks.state import read_state
from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import Cell
from robench.benchmark.checkpoints import CellFolder, Header, read_weights, save_checkpoint
from robench.benchmark.data import load_dataset
from robench.benchmark.examples import Examples
from robench.benchmark.kept import kept_record, kept_survey, kept_transfers
from robench.benchmark.recipe import ModelSpec
from robench.benchmark.sources import load_network
from robench.benchmark.spec import (
    AttackSpec,
    RunSpec,
    check_attacks,
    parse_value,
    read_config,
    threat_models,
)
from robench.errors import RobenchError
from robench.files import pack_arrays
from robench.randomness import seeded
from robench.reports import load, render
from robench.reports.compare import survival
from robench.reports.embed import embed
from robench.reports.jsonfile import from_json
from robench.reports.record import Landscape
from robench.reports.tables import from_csv

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
    digits, threat = load_dataset("digits"), ThreatModel("Linf", 0.1)
    lines = {name: (COMMITTED / name).read_bytes().splitlines(keepends=True)
             for name in ("results.jsonl", "transfer.jsonl", "training.jsonl")}
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
    landscape = json.dumps({
        **{name: "x" for name in ("run", "created", "robench", "torch", "device", "commit",
                                  "dataset", "data_sha256", "model", "source", "weights_sha256",
                                  "defense", "recipe", "selection", "checkpoint", "attack")},
        "threat": "Linf:0.1", "seed": 0, "threads": 1, "split": "test", "n": 3,
        "fingerprint": [1.0], "defense_config": {}, "kind": "weight", "attack_config": {},
        "direction_seed": 0, "alphas": [-1, 0, 1], "losses": [[1, 2, 3]], "seconds": 1}).encode()

    def run_folder(path):
        home = path.parent
        for name, text in few.items():
            if name != path.name:
                (home / name).write_bytes(text)
        render(load([home]), home / "out", ["csv", "md", "tex", "json", "html", "robustbench"])

    def config(path):
        spec = RunSpec.create(read_config(path))
        check_attacks(spec.attacks, threat_models(spec))

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
        "done.json": (json.dumps({"seconds": 1.5, "history": [], "devices": 1}).encode(),
                      lambda path: Cell.result(SimpleNamespace(folder=path.parent))),
        "kept.json": (lines["results.jsonl"][0], lambda path: [
            read(path, *more) for read, more in ((kept_record, (record.fingerprint,)),
                                                 (kept_transfers, ()),
                                                 (kept_survey, (Landscape, record.fingerprint)))]),
        "search.partial": (pack_arrays({"identity": np.array("x"), "fingerprint": np.ones(3)}),
                           lambda path: read_state(path, "x", np.ones(3))),
        "leaderboard.csv": ((COMMITTED / "leaderboard.csv").read_bytes(), lambda path: from_csv(
            path.read_bytes().decode(errors="surrogateescape"))),
        "leaderboard.json": ((COMMITTED / "leaderboard.json").read_bytes(), lambda path: from_json(
            path.read_bytes().decode(errors="surrogateescape"))),
        "README.md": (b"<!-- robench: . leaderboard -->\n<!-- /robench -->\n", embedding),
        "option": (b"pgd,steps=50,restarts=5", texts),
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
