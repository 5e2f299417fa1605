"""Attack a network and count what is left. Every claim is verified in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robench.attacks.base import Attack, Classifier
from robench.attacks.search import Pooled
from robench.attacks.threat import ThreatModel
from robench.attacks.union import threats_of
from robench.benchmark.checks import eps_unit
from robench.benchmark.data import Images, check_images
from robench.benchmark.parts import BATCH as BATCH
from robench.benchmark.parts import Flags as Flags
from robench.benchmark.parts import Labels, Part, Progress, attack_part, together
from robench.benchmark.parts import Target as Target
from robench.benchmark.spec import DEFAULT_ATTACKS, AttackSpec, check_attacks
from robench.errors import UsageError
from robench.files import pack_arrays, write_atomic
from robench.reports.trust import beyond_luck, flag
from robench.reports.uncertainty import wilson


@dataclass(frozen=True)
class Measurement:
    """One attack on one network over N images.

    Attributes:
        label, clean: (N,) the true class, and what the clean image is taken for.
        predicted: (N,) what the counted adversarial example is taken for, in fp32, -1 where the
            network gives no finite logits; where there is no example, or need be none, as `clean`.
        max_distance: largest perturbation among the counted examples, in the threat's norm.
        violations: claimed examples outside the threat model; none of them was counted.
        precision: of the search; the verdicts are fp32 always.
        batch_size: images per call of the attack, or units in flight.
        forwards, backwards: passes per attacked image; None where an attack does not count them.
        breaker: (N,) index into `stages` of the part that fooled the image first, else -1.
        open: images that stand but were not attacked to the end, after a time budget.
        prepared: what the search did to the network, such as folding its batch-norm.
        examples: (M,) the images that fell and (M, C, H, W) what they fell to, where asked for.
    """

    attack: AttackSpec
    config: dict[str, Any]
    threat: ThreatModel
    label: Labels
    clean: Labels
    predicted: Labels
    seconds: float
    max_distance: float
    violations: int
    notes: tuple[str, ...] = ()
    precision: str = "fp32"
    batch_size: int = BATCH
    forwards: float | None = None
    backwards: float | None = None
    stages: tuple[str, ...] = ()
    breaker: npt.NDArray[np.int8] | None = None
    open: int = 0
    prepared: str = ""
    examples: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def correct(self) -> Flags:
        """(N,) right on the clean image."""
        flags: Flags = self.clean == self.label
        return flags

    @property
    def robust(self) -> Flags:
        """(N,) right on the clean image, and not fooled."""
        flags: Flags = self.predicted == self.label
        return flags

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the attack noted, and claimed examples that were not counted."""
        return (*self.notes, *flag("outside", self.violations))

    @property
    def breakers(self) -> dict[str, int]:
        """How many images each part of the attack was the first to fool."""
        if self.breaker is None:
            return {}
        return {name: int((self.breaker == i).sum()) for i, name in enumerate(self.stages)}


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
    batch_size: int | None = None,
) -> Scores:
    """Measure clean and robust accuracy.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K); normalization is inside. Modules
            are attacked in eval mode and get their modes back.
        images: (N, C, H, W) float. labels: (N,) int64. Batches move to the model's device.
        threat: for example "Linf:8/255" or "L2:0.5".
        attacks: names, for example "pgd-20", "pgd,steps=50,restarts=5",
            "autoattack,precision=bf16,limit=1000".
        batch_size: images attacked at a time; None chooses.

    Raises:
        UsageError: images outside [0, 1], wrong labels, an unknown attack, no logits.
    """
    threat = ThreatModel.parse(threat) if isinstance(threat, str) else threat
    specs = [AttackSpec.parse(a) if isinstance(a, str) else a for a in attacks]
    if not specs:
        raise UsageError("name at least one attack")
    check_attacks(specs, [threat])
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


def measure(
    target: Target,
    spec: AttackSpec,
    threat: ThreatModel,
    *,
    seed: int = 0,
    partial: Path | None = None,
    progress: Progress = lambda share, text: None,
    deadline: float | None = None,
    keep: bool = False,
    starts: Tensor | None = None,
) -> Measurement:
    """Run one attack on the images that are right when clean.

    `partial` is a file in which finished work is kept, so that an interrupted measurement goes
    on after it; the caller deletes it. `deadline`, of time.monotonic(), ends the measurement
    with what is known by then. `keep` returns the examples too. `starts` (N, C, H, W) are
    examples from elsewhere, which attacks of the pool look at first.
    """
    n = min(spec.limit or len(target.data), len(target.data))
    part = attack_part(target, spec, threat, (0, n), seed=seed, partial=partial, keep=keep,
                       progress=progress, deadline=deadline, starts=starts)
    return merged(target, spec, threat, [part])


def merged(
    target: Target, spec: AttackSpec, threat: ThreatModel, parts: Sequence[Part]
) -> Measurement:
    """The measurement of an attack from its parts, which cover the first images without a gap."""
    attack, found = spec.build(threat), together(parts)
    n, counted = found.stop, found.forwards >= 0
    notes = found.notes
    if isinstance(attack, Pooled):
        notes = (*attack.notes(target.classes), *notes, *_sentinel(found, target, n),
                 *_masking(found, n))
    return Measurement(
        attack=spec,
        config=attack_config(attack, target.classes),
        threat=attack.threat if isinstance(attack, Pooled) else threat,
        label=target.label[:n],
        clean=target.predicted[:n],
        predicted=found.predicted,
        seconds=found.seconds,
        max_distance=found.max_distance,
        violations=found.violations,
        notes=(*notes, *flag("eps-unit", max(eps_unit(one, target.data.x)
                                             for one in threats_of(attack, threat)))),
        precision=attack.precision if isinstance(attack, Pooled) else "fp32",
        batch_size=found.batch_size,
        forwards=found.forwards / found.attacked if counted else None,
        backwards=found.backwards / found.attacked if counted else None,
        stages=found.stages,
        breaker=found.breaker,
        open=found.open,
        prepared=found.prepared,
        examples=found.examples,
    )


def _sentinel(found: Part, target: Target, n: int) -> list[str]:
    """What the stages that saw a share of the images say about all that stood before them."""
    if found.seen < 0 or found.open:
        return []
    seen, broke = found.seen, found.broke
    stood = int((found.predicted == target.label[:n]).sum()) + broke
    low, high = wilson(broke / seen, seen) if seen else (0.0, 1.0)
    return [f"sentinel: FAB-T and Square ran on {seen} of the {stood} images that stood and broke "
            f"{broke}; on all of them robust accuracy would be {stood * (1 - high) / n:.1%} to "
            f"{stood * (1 - low) / n:.1%} (95 % interval)"]


def _masking(found: Part, n: int) -> list[str]:
    """AutoAttack's own check: random search should find nothing that gradients do not find; in a
    union, under any of its threat models."""
    broke = [int((found.breaker == i).sum()) for i, name in enumerate(found.stages)
             if i and name.rpartition(" ")[2] == "square" and found.breaker is not None]
    return list(flag("masking", beyond_luck(max(broke), n))) if broke else []


def attack_config(attack: Attack, classes: int) -> dict[str, Any]:
    """The options of the attack that are plain values, for the record."""
    if isinstance(attack, Pooled):
        return attack.config(classes)
    if not is_dataclass(attack):
        return {}
    values = {f.name: getattr(attack, f.name) for f in fields(attack)}
    plain = (str, int, float, bool, type(None))
    config = {k: v for k, v in values.items() if isinstance(v, plain)}
    for name, value in values.items():
        if isinstance(value, Mapping):
            config[name] = {k: v for k, v in value.items() if isinstance(v, plain)}
    return config


def save_flags(path: Path, measurement: Measurement, classes: Sequence[str] = ()) -> None:
    """What became of each image, as .npz: bool arrays `correct` and `robust`; `label`, `clean` and
    `predicted` as in Measurement, in the smallest integers; for attacks with parts also `breaker`,
    the index into `stages` of the part that fooled the image first, else -1; the names of the
    classes where they are known."""
    m = measurement
    labels = {"label": m.label, "clean": m.clean, "predicted": m.predicted}
    small = np.min_scalar_type(-1 - max(int(array.max()) for array in labels.values()))
    parts = {} if m.breaker is None else {"breaker": m.breaker, "stages": np.array(m.stages)}
    names = {"classes": np.array(classes)} if classes else {}
    write_atomic(path, pack_arrays({
        "correct": m.correct, "robust": m.robust,
        **{name: array.astype(small) for name, array in labels.items()}, **parts, **names,
    }))
