"""Networks, checkpoints and small jobs; the command line, called in this process."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robench.benchmark import cli
from robench.benchmark.checkpoints import Header, read_weights, save_checkpoint
from robench.benchmark.recipe import ModelSpec
from robench.reports import load

# One small training of two epochs, and attacks on 20 images: a second or two.
JOB: dict[str, Any] = {
    "defenses": ("trades",), "dataset": "digits", "epochs": 2, "train_limit": 128, "limit": 20,
    "attacks": ("fgsm", "pgd-5"), "device": "cpu",
    "train": {"validation": 20, "select_steps": 2},
}


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type], str]]:
    """handler -> the address of a server on this machine, until the test ends."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(handler: type[BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def job() -> Callable[..., dict[str, Any]]:
    """The settings of a small run; `train` is added to, everything else replaced."""

    def make(**changes: Any) -> dict[str, Any]:
        train = {**JOB["train"], **changes.pop("train", {})}
        return {**JOB, **changes, "train": train}

    return make


@pytest.fixture(scope="session")
def make_header() -> Callable[..., Header]:
    def make(**changes: Any) -> Header:
        values: dict[str, Any] = {
            "model": ModelSpec(name="smallcnn"), "classes": 10, "channels": 1, "size": 8,
            "dataset": "digits", "defense": "trades", "recipe": "unified", "seed": 0,
            "checkpoint": "best", "epoch": 3,
        }
        return Header(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_network(make_header: Callable[..., Header]) -> Callable[..., nn.Module]:
    """seed -> a smallcnn for digits with random weights and statistics, in eval mode."""

    def make(seed: int = 0, **changes: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = make_header(**changes).build()
            net(torch.rand(8, *_shape(net)))
        return net.eval()

    return make


def _shape(net: nn.Module) -> tuple[int, int, int]:
    return next(m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)), 8, 8


@pytest.fixture
def checkpoint(
    tmp_path: Path, make_network: Callable[..., nn.Module], make_header: Callable[..., Header]
) -> Path:
    """A robench checkpoint of a random network for digits."""
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, make_network(), make_header())
    return path


def _arrays(path: Path) -> None:
    with np.load(path, allow_pickle=False) as arrays:
        assert all(arrays[name].size >= 0 for name in arrays)


def _picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _text(path: Path) -> None:
    assert path.read_text(encoding="utf-8").endswith("</html>" if path.suffix == ".html" else "\n")


READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": read_weights, ".npz": _arrays, ".partial": _arrays, ".png": _picture,
    ".pt": lambda path: torch.load(path, weights_only=True), ".svg": ElementTree.parse,
    ".json": lambda path: [json.loads(line) for line in [path.read_text()]
                           if not path.name.startswith("rob_f")], ".md": _text, ".csv": _text,
    ".tex": _text, ".jsonl": _text, ".html": _text,
}


@pytest.fixture(scope="session")
def check_files() -> Callable[[Path], int]:
    """Reads every file in a folder, as after a kill -9; returns how many there are."""

    def check(folder: Path) -> int:
        files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        for path in files:
            if path.stat().st_size:  # a run without rows has files without lines
                READERS[path.suffix](path)
        for path in files:
            if path.name == "results.jsonl":
                load([path])
        return len(files)

    return check


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def robench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The command line in this process: robench("list", "models") -> code, out, err."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["robench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return Done(stop.value.code or 0, out, err)

    return call
