"""Attack a network and count what is left. Every claim is verified in fp32."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from robench.attacks.base import Attack, Classifier, memory_format
from robench.attacks.found import Found
from robench.attacks.found import Progress as SearchProgress
from robench.attacks.memory import Batches
from robench.attacks.prepare import clean_logits
from robench.attacks.search import Pooled
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import full_precision, verify
from robench.benchmark.checks import check_finite, check_logits, eps_unit, examine
from robench.benchmark.data import Images, check_images
from robench.benchmark.pieces import found_by
from robench.benchmark.spec import DEFAULT_ATTACKS, AttackSpec, check_attacks
from robench.errors import UsageError
from robench.files import pack_arrays, write_atomic
from robench.randomness import seeded
from robench.reports.trust import Finding, beyond_luck, flag, texts
from robench.reports.uncertainty import wilson

Flags = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]
Progress = Callable[[float, str], None]  # share done in [0, 1], what to say about it
BATCH = 500  # images per call of an attack that has no pool


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

    def __init__(self, model: Classifier, data: Images, batch_size: int | None = None) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = data.x.device if parameter is None else parameter.device
        check_logits(model, self.batch(0, BATCH)[0], data.y)
        self.clean = torch.cat([check_finite(clean_logits(model, self.batch(i, i + BATCH)[0])).cpu()
                                for i in range(0, len(data), BATCH)])
        self.label: Labels = data.y.cpu().numpy()
        self.predicted: Labels = self.clean.argmax(1).numpy()
        self.correct: Flags = self.predicted == self.label
        self.classes = self.clean.shape[1]
        # The same weights may be used in another way.
        self.fingerprint = self.clean[:64].amax(1).numpy()

    @cached_property
    def findings(self) -> list[Finding]:
        """The checks of the network, made when they are first asked for."""
        return examine(self.model, *self.batch(0, BATCH))

    @property
    def warnings(self) -> tuple[str, ...]:
        return texts(self.findings)

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
    attack = spec.build(threat)
    n = min(spec.limit or len(target.data), len(target.data))
    if isinstance(attack, Pooled):
        m = _pooled(target, spec, attack, n, seed, partial, progress, deadline, keep, starts)
    else:
        m = _batched(target, spec, attack, threat, n, seed, partial, progress, deadline)
    return replace(m, notes=(*m.notes, *flag("eps-unit", eps_unit(threat, target.data.x))))


def _pooled(
    target: Target, spec: AttackSpec, attack: Pooled, n: int, seed: int, partial: Path | None,
    progress: Progress, deadline: float | None, keep: bool, starts: Tensor | None,
) -> Measurement:
    """An attack that runs in the pool: its noise belongs to the images, its work is resumable."""
    correct = target.correct[:n]
    rows, notes = torch.from_numpy(correct), attack.notes(target.classes)
    common: dict[str, Any] = {
        "attack": spec, "config": attack.config(target.classes), "threat": attack.threat,
        "label": target.label[:n], "clean": target.predicted[:n], "precision": attack.precision,
    }
    predicted = target.predicted[:n].copy()
    if not correct.any():
        return Measurement(**common, predicted=predicted, seconds=0.0, max_distance=0.0,
                           violations=0, notes=notes)

    def show(now: SearchProgress) -> None:
        low, high = wilson(now.standing / n, n)
        progress(now.done, f"{now.stage}: {now.left} runs left, robust {now.standing}/{n} "
                 f"({low:.1%} to {high:.1%})")

    data = target.data.take(n).select(rows).to(target.device)
    found = found_by(attack, target.model, data, target.clean[:n][rows], seed=seed, keep=keep,
                     slots=target.batch_size, state=partial, deadline=deadline, progress=show,
                     starts=None if starts is None else starts[:n][rows])
    predicted[correct] = found.predicted
    breaker = np.full(n, -1, dtype=np.int8)
    breaker[correct] = found.fell_to
    return Measurement(
        **common,
        predicted=predicted,
        seconds=sum(found.seconds),
        max_distance=float(found.distance.max()),
        violations=found.violations,
        notes=(*notes, *_sentinel(found, n), *_masking(found, n)),
        batch_size=found.slots,
        forwards=found.forwards / len(data),
        backwards=found.backwards / len(data),
        stages=found.stages,
        breaker=breaker,
        open=found.open,
        prepared=found.prepared,
        examples=_examples(found, rows) if keep else None,
    )


def _examples(found: Found, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which of all images fell, by the places of the attacked ones, and their examples."""
    fell = torch.from_numpy(found.fell_to >= 0)
    return rows.nonzero().flatten()[fell], found.x_adv.cpu()[fell]


def _sentinel(found: Found, n: int) -> list[str]:
    """What the parts that saw a share of the images say about all that stood before them."""
    if found.sampled is None or found.open:
        return []
    seen, broke = found.sampled
    stood = int(found.standing.sum()) + broke
    low, high = wilson(broke / seen, seen) if seen else (0.0, 1.0)
    return [f"sentinel: FAB-T and Square ran on {seen} of the {stood} images that stood and broke "
            f"{broke}; on all of them robust accuracy would be {stood * (1 - high) / n:.1%} to "
            f"{stood * (1 - low) / n:.1%} (95 % interval)"]


def _masking(found: Found, n: int) -> list[str]:
    """AutoAttack's own check: random search should find nothing that gradients do not find."""
    if "square" not in found.stages[1:]:
        return []
    broke = int((found.fell_to == found.stages.index("square")).sum())
    return list(flag("masking", beyond_luck(broke, n)))


def _batched(
    target: Target, spec: AttackSpec, attack: Attack, threat: ThreatModel, n: int, seed: int,
    partial: Path | None, progress: Progress, deadline: float | None,
) -> Measurement:
    """An attack from elsewhere, batch by batch. The noise of a batch depends on (seed, attack,
    first image of the batch) and on nothing that ran before."""
    size = target.batch_size or BATCH
    label, clean = target.label[:n], target.predicted[:n]
    kept = _load_partial(partial, clean, target.fingerprint, size)
    done, predicted, seconds, farthest, violations, notes = kept
    batches = Batches(size)
    for start in range(done, n, size):
        if deadline is not None and time.monotonic() >= deadline:
            break
        done = min(start + size, n)
        began = time.perf_counter()
        x, y = target.batch(start, done)
        todo = torch.from_numpy(target.correct[start:done]).to(target.device)
        if bool(todo.any()):
            x, y = x[todo], y[todo]
            # In TF32 an attack would stop at examples that fp32 does not confirm.
            with seeded(seed, "attack", spec.label, start), full_precision():
                x_adv = batches(lambda x, y: attack(target.model, x, y), x, y)
            notes += [note for note in getattr(attack, "notes", ()) if note not in notes]
            verdict = verify(target.model, x, x_adv, y, threat)
            fell = torch.where(verdict.fooled, verdict.predicted, y)
            predicted[start:done][todo.cpu().numpy()] = fell.cpu().numpy()
            violations += int(verdict.outside.sum())
            if bool(verdict.fooled.any()):
                farthest = max(farthest, float(verdict.distance[verdict.fooled].max()))
        seconds += time.perf_counter() - began
        _save_partial(partial, done=done, predicted=predicted, seconds=seconds, farthest=farthest,
                      violations=violations, batch_size=size, fingerprint=target.fingerprint,
                      notes=np.array(notes, dtype=str))
        progress(done / n, f"robust {int((predicted == label)[:done].sum())}/{done}")
    if batches.halved:
        notes.append(f"memory: only {batches.size} images at a time fitted; what this attack draws "
                     "at random depends on it")
    return Measurement(
        attack=spec,
        config=attack_config(attack, target.classes),
        threat=threat,
        label=label, clean=clean, predicted=predicted,
        seconds=seconds,
        max_distance=farthest,
        violations=violations,
        notes=tuple(notes),
        batch_size=size,
        open=int((predicted == label)[done:].sum()),
    )


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


def _load_partial(
    path: Path | None, clean: Labels, fingerprint: npt.NDArray[Any], batch_size: int
) -> tuple[int, Labels, float, float, int, list[str]]:
    """(images done, predictions, seconds, largest distance, violations, notes) so far."""
    if path is not None and path.exists():
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
                same = np.allclose(kept["fingerprint"], fingerprint, rtol=1e-3, atol=1e-3)
                if same and (len(kept["predicted"]), int(kept["batch_size"])) == (
                        len(clean), batch_size):
                    return (int(kept["done"]), kept["predicted"].copy(), float(kept["seconds"]),
                            float(kept["farthest"]), int(kept["violations"]),
                            [str(note) for note in kept["notes"]])
        except Exception:  # damaged bytes may raise anything in a parser
            pass  # a file of finished batches only saves time: start over
    return 0, clean.copy(), 0.0, 0.0, 0, []


def _save_partial(path: Path | None, **state: Any) -> None:
    if path is not None:
        write_atomic(path, pack_arrays(state))
