"""Made-up results: factories for single rows, and a small campaign with flags on disk."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robench.reports import Crossing, Epoch, Record, Results, Steps, Transfer

ATTACKS = {"fgsm": (400, 0.08), "pgd-20": (400, 0.0), "cw": (400, -0.01),
           "pyautoattack:standard": (100, -0.04)}
LEVELS = {"trades": (0.82, 0.52), "peeraid": (0.84, 0.55), "pgd_at": (0.85, 0.47)}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    """A valid record; keyword arguments replace its fields."""

    def make(**changes: Any) -> Record:
        values: dict[str, Any] = {
            "run": "0123456789ab", "created": "2026-11-20T10:00:00+00:00", "seed": 0,
            "robench": "0.1.0", "torch": "2.15.0", "device": "cpu", "commit": "1ba326d0" * 5,
            "dataset": "digits", "split": "test", "n": 400, "data_sha256": _sha("400"),
            "classes": 10, "model": "resnet18", "source": "trained", "parameters": 11_173_962,
            "weights_sha256": _sha("weights"), "fingerprint": (1.5, -2.0), "attack_seed": 0,
            "defense": "trades", "defense_config": {"beta": 6.0},
            "recipe": "unified", "epochs": 30, "train_seconds": 4000.0, "teacher_seconds": 0.0,
            "selection": "val", "checkpoint": "best", "epoch": 27, "ranked": True,
            "baseline": False, "role": "table", "teacher_sha256": {}, "attack": "pgd-20",
            "attack_config": {"steps": 20, "restarts": 1}, "threat": "Linf:8/255",
            "n_correct": 320, "n_robust": 200, "seconds": 30.0, "precision": "fp32", "threads": 2,
            "batch_size": 250, "peak_bytes": 10**9, "max_distance": 8 / 255, "violations": 0,
            "warnings": (), "status": "ok",
        }
        values |= changes
        for count, most in (("n_correct", "n"), ("n_robust", "n_correct")):
            if count not in changes:
                values[count] = min(values[count], values[most])
        return Record(**values)

    return make


@pytest.fixture(scope="session")
def make_transfer() -> Callable[..., Transfer]:
    def make(**changes: Any) -> Transfer:
        values: dict[str, Any] = {
            "run": "run-peeraid-0", "seed": 0, "dataset": "digits", "model": "resnet18",
            "defense": "peeraid", "recipe": "unified", "checkpoint": "best", "network": "peer",
            "attack": "pgd-10", "attack_config": {"steps": 10}, "threat": "Linf:8/255", "n": 400,
            "data_sha256": _sha("400"), "clean": 360, "self_crafted": 4, "student_crafted": 300,
            "student_robust": 220,
        }
        values |= changes
        for count in ("clean", "self_crafted", "student_crafted", "student_robust"):
            if count not in changes:
                values[count] = min(values[count], values["n"])
        return Transfer(**values)

    return make


@pytest.fixture(scope="session")
def make_epoch() -> Callable[..., Epoch]:
    def make(**changes: Any) -> Epoch:
        values: dict[str, Any] = {
            "run": "run-peeraid-0", "seed": 0, "dataset": "digits", "model": "resnet18",
            "defense": "peeraid", "recipe": "unified", "epoch": 0, "lr": 0.1, "seconds": 9.0,
            "losses": {"total": 2.0}, "selection": "val", "clean": 0.5, "robust": 0.3,
        }
        return Epoch(**{**values, **changes})

    return make


SURVEY: dict[str, Any] = {
    "run": "", "seed": 0, "dataset": "digits", "model": "resnet18", "source": "a.safetensors",
    "weights_sha256": "w", "defense": "trades", "defense_config": {}, "recipe": "unified",
    "selection": "val", "checkpoint": "best", "created": "2026-11-20T10:00:00+00:00",
    "robench": "0.1.0", "torch": "2.15.0", "device": "cpu", "commit": "", "threads": 1,
    "seconds": 60.0, "split": "test", "n": 400, "data_sha256": _sha("400"), "fingerprint": (1.0,),
    "threat": "Linf:8/255",
}


@pytest.fixture(scope="session")
def make_steps() -> Callable[..., Steps]:
    def make(**changes: Any) -> Steps:
        values = {**SURVEY, "attack": "pgd-3", "attack_seed": 0, "n_correct": 320,
                  "attack_config": {"steps": 3, "step_size": 2 / 255, "start": "uniform"},
                  "fell_at": (10, 50, 30, 10)}
        return Steps(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_crossings() -> Callable[..., list[Crossing]]:
    """make({"a": {"a": 100, "b": 200}, ...}): right on examples against a, by defense."""

    def make(right: dict[str, dict[str, int]], clean: int = 320, **changes: Any) -> list[Crossing]:
        def network(name: str) -> dict[str, Any]:
            seed = changes.get("seed", 0)
            return {**{field: SURVEY[field] for field in (
                "run", "dataset", "model", "defense_config", "recipe", "selection", "checkpoint")},
                "source": f"{name}{seed}", "weights_sha256": f"{name}{seed}", "defense": name,
                "seed": seed}

        return [
            Crossing(**{**SURVEY, "attack": "pgd-10", "attack_config": {"steps": 10},
                        "attack_seed": 0, **network(source), **changes,
                        "shown": [{**network(name), "clean": clean, "right": count,
                                   "kept": min(clean, count)} for name, count in shown.items()]})
            for source, shown in right.items()
        ]

    return make


@pytest.fixture(scope="session")
def write_flags() -> Callable[[Path, Any, Any], str]:
    """Writes (correct, robust) as the .npz of a record; returns its path."""

    def write(path: Path, correct: Any, robust: Any) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, correct=np.asarray(correct, bool), robust=np.asarray(robust, bool))
        return str(path)

    return write


@pytest.fixture
def predicted(make_record: Callable[..., Record], tmp_path: Path) -> Callable[..., Record]:
    """A record whose file says what each image is taken for: (label, clean, predicted)."""

    def make(label: Any, clean: Any, taken: Any, names: Any = (), **changes: Any) -> Record:
        arrays = {name: np.asarray(some, np.int8) for name, some in
                  {"label": label, "clean": clean, "predicted": taken}.items()}
        right = {"correct": arrays["clean"] == arrays["label"],
                 "robust": arrays["predicted"] == arrays["label"]}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        np.savez(path, **arrays, **right, **({"classes": np.array(names)} if names else {}))
        return make_record(**{
            "n": len(label), "n_correct": int(right["correct"].sum()),
            "n_robust": int(right["robust"].sum()), "flags": str(path), **changes})

    return make


@pytest.fixture(scope="session")
def campaign(
    tmp_path_factory: pytest.TempPathFactory,
    make_record: Callable[..., Record],
    make_transfer: Callable[..., Transfer],
    make_epoch: Callable[..., Epoch],
    write_flags: Callable[[Path, Any, Any], str],
) -> Results:
    """Three defenses, two seeds, four attacks, an eps curve, a peer, Rob_f and training logs."""
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "results.jsonl").touch()  # flags of elsewhere must be those of a run
    results = Results()
    for defense, (clean, robust) in LEVELS.items():
        for seed in (0, 1):
            run = f"run-{defense}-{seed}"
            random = np.random.default_rng(len(run) * 31 + seed)
            score = random.random(400)  # how hard an image is for this network
            known = dict(run=run, seed=seed, defense=defense, baseline=defense == "trades",
                         defense_config={"beta": 6.0} if defense == "trades" else {},
                         weights_sha256=_sha(run), train_seconds=3000.0 + 400 * seed,
                         teacher_seconds=1800.0 if defense == "peeraid" else 0.0)
            for attack, (n, shift) in ATTACKS.items():
                correct, survived = score[:n] < clean, score[:n] < robust + shift
                flags = folder / f"{run}-{attack.replace(':', '_')}.npz"
                results.records.append(make_record(
                    **known, attack=attack, attack_config={"steps": 20}, n=n,
                    data_sha256=_sha(str(n)), n_correct=int(correct.sum()),
                    n_robust=int(survived.sum()), flags=write_flags(flags, correct, survived)))
            for eighth in (2, 4, 8, 12):
                results.records.append(make_record(
                    **known, role="curve", threat=f"Linf:{eighth}/255", n=200,
                    data_sha256=_sha("200"), n_correct=int(200 * clean),
                    n_robust=int(200 * (clean - (clean - robust) * eighth / 8))))
            results.records.append(make_record(**known, ranked=False, checkpoint="last"))
            results.epochs.extend(
                make_epoch(run=run, seed=seed, defense=defense, epoch=epoch,
                           seconds=known["train_seconds"] / 30,
                           losses={"total": 2.3 * 0.93**epoch + 0.1 * seed},
                           clean=clean * (1 - 0.8 ** (epoch + 1)),
                           robust=robust * (1 - 0.8 ** (epoch + 1)),
                           averages={"swa": (clean, robust + 0.01)} if epoch >= 20 else {},
                           rob_f={"student": (robust, robust), "peer": (0.01, 0.5 + 0.004 * epoch)}
                           if defense == "peeraid" else {})
                for epoch in range(30))
            if defense == "peeraid":
                results.transfers.extend([
                    make_transfer(run=run, seed=seed),
                    make_transfer(run=run, seed=seed, network="student", self_crafted=220,
                                  student_crafted=220)])
    return results


@pytest.fixture(scope="session")
def run_python() -> Callable[..., int]:
    """Runs code in a fresh interpreter that finds robench; returns the exit code."""

    def run(code: str, *arguments: str) -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([sys.executable, "-c", code, *arguments], env=environment).returncode

    return run
