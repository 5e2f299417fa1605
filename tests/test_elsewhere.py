"""The commands on a device that is not the CPU: the same numbers, and no tensor left behind."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch knows no devices that are written in Python")
Python = Callable[..., "subprocess.CompletedProcess[str]"]
DEVICES = {"cpu": ("-m", "robench"), "elsewhere:0": ("tests/elsewhere.py",)}
DEFENSES = ("trades", "trades+awp", "mart", "ard", "rslad", "adaad", "akd2", "iad", "iad-ii", "cat",
            "lbgat", "hat", "mtard", "adr", "ikl", "igdm", "saad", "standard")
ATTACKS = ("fgsm", "pgd,steps=3,restarts=2", "mifgsm-3", "cw-3", "apgd-ce-5", "apgd-dlr-5",
           "apgd-t,steps=5,targets=3", "fab-5", "fab-t,steps=5,targets=3", "square,queries=30",
           "fmn-5")
THREATS = ("Linf:0.1", "L2:0.8", "L1:5")


def both(python: Python, folder: Path, *command: str) -> list[Path]:
    """Run the command on both devices; their folders."""
    outs = [folder / device.partition(":")[0] for device in DEVICES]
    for (device, program), out in zip(DEVICES.items(), outs, strict=True):
        done = python(*program, *command, "--device", device, "--quiet", "--out", str(out))
        assert done.returncode == 0, done.stderr[-3000:]
    return outs


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def numbers(out: Path) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """What must be the same, by training, checkpoint, attack and threat model."""
    found = {}
    for row in records(out):
        assert row["status"] == "ok"
        key = row["defense"], row["run"], row["checkpoint"], row["attack"], row["threat"]
        found[key] = row["weights_sha256"], row["n_correct"], row["n_robust"]
    return found


@pytest.fixture(scope="module")
def trained(python: Python, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of all defenses, one epoch on a few digits."""
    names = [word for name in DEFENSES for word in ("--defense", name)]
    return both(python, tmp_path_factory.mktemp("trained"), "run", "--defense", "peeraid", *names,
                "--baseline", "pgd-at", "--epochs", "1", "--train-limit", "64", "--limit", "8",
                "--set", "validation=16", "--set", "select_steps=2", "--attack", "pgd-2",
                "--precision", "ieee", "--jobs", "1")


def test_every_defense_learns_the_same_weights(trained: list[Path]) -> None:
    cpu, elsewhere = map(numbers, trained)
    assert {key[0] for key in cpu} == {*DEFENSES, "peeraid", "pgd-at"}
    assert elsewhere == cpu
    assert {row["device"] for row in records(trained[1])} == {"elsewhere"}


def test_every_attack_finds_the_same_examples(python: Python, tmp_path: Path) -> None:
    job = ("--epochs", "6", "--set", "validation=16", "--attack", "fgsm", "--limit", "16")
    done = python("-m", "robench", "run", "--baseline", "standard", *job, "--jobs", "1", "--quiet",
                  "--out", str(tmp_path / "trained"))
    assert done.returncode == 0, done.stderr
    network = next(tmp_path.glob("trained/cells/*/last.safetensors"))
    words = [word for attack in ATTACKS for word in ("--attack", attack)]
    words += [word for threat in THREATS for word in ("--threat", threat)]
    outs = both(python, tmp_path, "eval", str(network), *words, "--limit", "16",
                "--precision", "ieee", "--keep-examples")
    cpu, elsewhere = map(numbers, outs)
    assert len(cpu) == len(ATTACKS) * len(THREATS)
    assert len({robust for _, _, robust in cpu.values()}) > 4  # neither all nor none
    assert elsewhere == cpu
    mine, theirs = (sorted(out.glob("**/*.safetensors")) for out in outs)
    assert [path.name for path in mine] == [path.name for path in theirs]
    assert len(mine) == len(cpu)
    for pair in zip(mine, theirs, strict=True):
        kept, again = map(load_file, pair)
        assert kept.keys() == again.keys()
        assert all(kept[key].equal(again[key]) for key in kept)


def test_fast_modes_run(python: Python, tmp_path: Path) -> None:
    """Other kernels than the CPU's, so other digits."""
    cpu, elsewhere = both(
        python, tmp_path, "run", "--defense", "peeraid", "--baseline", "pgd-at", "--epochs", "1",
        "--train-limit", "64", "--limit", "8", "--set", "validation=16", "--jobs", "1",
        "--set", "precision=bf16", "--precision", "bf16", "--attack", "autoattack-lite,limit=2")
    assert numbers(cpu).keys() != set()
    assert len(numbers(elsewhere)) == len(numbers(cpu))


def test_what_is_left_on_the_cpu_is_found(python: Python) -> None:
    """The check can fail: of operations, indices, generators and numpy."""
    code = """
import sys
import torch
sys.path.insert(0, "tests")
from elsewhere import Dispatch, register
kept = register()
with Dispatch():
    here, there = torch.rand(3, 2), torch.rand(3, 2, device="elsewhere:0")
    assert torch.equal((there * 2 + 1).cpu(), there.cpu() * 2 + 1)
    assert there[torch.tensor([1])].device.type == "elsewhere"
    generator = torch.Generator()
    wrong = [lambda: here + there, lambda: torch.cat([there, here]), lambda: there.numpy(),
             lambda: here[torch.tensor([1], device="elsewhere:0")],
             lambda: torch.rand(2, device="elsewhere:0", generator=generator)]
    for call in wrong:
        try:
            call()
        except RuntimeError:
            print("found")
"""
    done = python("-c", code)
    assert done.stdout.split() == ["found"] * 5, done.stderr
