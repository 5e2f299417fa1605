"""Attack a network and count what is left. Every claim is verified in fp32."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from robench.attacks.base import Attack, Classifier, frozen, memory_format
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import full_precision, verify
from robench.benchmark.checks import check_finite, check_logits
from robench.benchmark.data import Images, check_images
from robench.benchmark.spec import DEFAULT_ATTACKS, AttackSpec, check_attacks
from robench.errors import UsageError
from robench.files import write_atomic
from robench.randomness import seeded

Flags = npt.NDArray[np.bool_]
Progress = Callable[[int, int, int], None]  # images done, images in all, still robust


@dataclass(frozen=True)
class Measurement:
    """One attack on one network over N images.

    Attributes:
        correct: (N,) right on the clean image. robust: (N,) and not fooled either.
        max_distance: largest perturbation among the counted examples, in the threat's norm.
        violations: claimed examples outside the threat model; none of them was counted.
    """

    attack: AttackSpec
    config: dict[str, Any]
    threat: ThreatModel
    correct: Flags
    robust: Flags
    seconds: float
    max_distance: float
    violations: int
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the attack noted, and claimed examples that were not counted."""
        if not self.violations:
            return self.notes
        return (*self.notes, f"outside: {self.violations} claimed examples were outside "
                f"{self.threat} and were not counted")


@dataclass(frozen=True)
class Scores:
    """What `robench.evaluate` returns: accuracies in [0, 1] and the flags behind them."""

    clean: float
    robust: dict[str, float]
    measurements: tuple[Measurement, ...] = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def worst_case(self) -> float:
        """The share of images that no attack fooled, over the images that all attacks saw."""
        n = min(len(m.robust) for m in self.measurements)
        survived = np.logical_and.reduce([m.robust[:n] for m in self.measurements])
        return float(survived.mean())


def evaluate(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    threat: str | ThreatModel = "Linf:8/255",
    attacks: Sequence[str | AttackSpec] = DEFAULT_ATTACKS,
    seed: int = 0,
    batch_size: int = 500,
) -> Scores:
    """Measure clean and robust accuracy.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K); normalization is inside. Modules
            are attacked in eval mode and get their modes back.
        images: (N, C, H, W) float. labels: (N,) int64. Batches move to the model's device.
        threat: for example "Linf:8/255" or "L2:0.5".
        attacks: names, for example "pgd-20", "pgd,steps=50,restarts=5",
            "pyautoattack:standard,limit=1000".

    Raises:
        UsageError: images outside [0, 1], wrong labels, an unknown attack, no logits.
    """
    threat = ThreatModel.parse(threat) if isinstance(threat, str) else threat
    specs = [AttackSpec.parse(a) if isinstance(a, str) else a for a in attacks]
    if not specs:
        raise UsageError("name at least one attack")
    check_attacks(specs, threat)
    # check_images refuses other labels; the model's outputs decide about these later.
    classes = int(labels.max()) + 1 if labels.numel() and labels.dtype == torch.int64 else 1
    data = Images(*check_images(images, labels, classes))
    target = Target(model, data, batch_size)
    measurements = tuple(measure(target, spec, threat, seed=seed) for spec in specs)
    return Scores(
        clean=float(target.correct.mean()),
        robust={m.attack.label: float(m.robust.mean()) for m in measurements},
        measurements=measurements,
        warnings=(*target.warnings, *(w for m in measurements for w in m.warnings)),
    )


class Target:
    """A network and the images it is attacked on; the clean pass is made once."""

    def __init__(self, model: Classifier, data: Images, batch_size: int) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = data.x.device if parameter is None else parameter.device
        self.warnings = check_logits(model, self.batch(0, batch_size)[0], data.y)
        with torch.no_grad(), frozen(model), full_precision():
            self.correct: Flags = np.concatenate([
                (check_finite(model(x)).argmax(1) == y).cpu().numpy()
                for x, y in (self.batch(i, i + batch_size) for i in range(0, len(data), batch_size))
            ])

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        x = self.data.x[start:stop].contiguous(memory_format=memory_format(self.model))
        return x.to(self.device), self.data.y[start:stop].to(self.device)


def measure(
    target: Target,
    spec: AttackSpec,
    threat: ThreatModel,
    *,
    seed: int = 0,
    partial: Path | None = None,
    progress: Progress = lambda done, total, robust: None,
) -> Measurement:
    """Run one attack on the images that are right when clean.

    `partial` is a file in which finished batches are kept, so that an interrupted measurement
    goes on after them; the caller deletes it. The noise of a batch depends on (seed, attack,
    first image of the batch) and on nothing that ran before.
    """
    attack = spec.build(threat)
    n = min(spec.limit or len(target.data), len(target.data))
    kept = _load_partial(partial, target.correct[:n], target.batch_size)
    done, robust, seconds, farthest, violations, notes = kept
    for start in range(done, n, target.batch_size):
        stop = min(start + target.batch_size, n)
        began = time.perf_counter()
        x, y = target.batch(start, stop)
        todo = torch.from_numpy(target.correct[start:stop]).to(target.device)
        if bool(todo.any()):
            x, y = x[todo], y[todo]
            # In TF32 an attack would stop at examples that fp32 does not confirm.
            with seeded(seed, "attack", spec.label, start), full_precision():
                x_adv = attack(target.model, x, y)
            notes += [note for note in getattr(attack, "notes", ()) if note not in notes]
            verdict = verify(target.model, x, x_adv, y, threat)
            robust[start:stop][todo.cpu().numpy()] = ~verdict.fooled.cpu().numpy()
            violations += int(verdict.outside.sum())
            if bool(verdict.fooled.any()):
                farthest = max(farthest, float(verdict.distance[verdict.fooled].max()))
        seconds += time.perf_counter() - began
        _save_partial(partial, done=stop, robust=robust, seconds=seconds, farthest=farthest,
                      violations=violations, batch_size=target.batch_size,
                      notes=np.array(notes, dtype=str))
        progress(stop, n, int(robust[:stop].sum()))
    return Measurement(
        attack=spec,
        config=attack_config(attack),
        threat=threat,
        correct=target.correct[:n],
        robust=robust,
        seconds=seconds,
        max_distance=farthest,
        violations=violations,
        notes=tuple(notes),
    )


def attack_config(attack: Attack) -> dict[str, Any]:
    """The fields of the attack that are plain values, for the record."""
    if not is_dataclass(attack):
        return {}
    values = {f.name: getattr(attack, f.name) for f in fields(attack)}
    plain = (str, int, float, bool, type(None))
    config = {k: v for k, v in values.items() if isinstance(v, plain)}
    for name, value in values.items():
        if isinstance(value, Mapping):
            config[name] = {k: v for k, v in value.items() if isinstance(v, plain)}
    return config


def save_flags(path: Path, correct: Flags, robust: Flags) -> None:
    """Per-image flags, as .npz with the bool arrays `correct` and `robust`."""
    write_atomic(path, _npz(correct=correct, robust=robust))


def _npz(**arrays: Any) -> bytes:
    """Like numpy.savez, but with the same bytes for the same arrays: no time stamps."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.save(entry, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return buffer.getvalue()


def _load_partial(
    path: Path | None, correct: Flags, batch_size: int
) -> tuple[int, Flags, float, float, int, list[str]]:
    """(images done, robust flags, seconds, largest distance, violations, notes) so far."""
    if path is not None and path.exists():
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
                if len(kept["robust"]) == len(correct) and int(kept["batch_size"]) == batch_size:
                    return (int(kept["done"]), kept["robust"].copy(), float(kept["seconds"]),
                            float(kept["farthest"]), int(kept["violations"]),
                            [str(note) for note in kept["notes"]])
        except Exception:  # damaged bytes may raise anything in a parser
            pass  # a file of finished batches only saves time: start over
    return 0, correct.copy(), 0.0, 0.0, 0, []


def _save_partial(path: Path | None, **state: Any) -> None:
    if path is not None:
        write_atomic(path, _npz(**state))
