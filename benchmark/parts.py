"""Parts of an attack: what it does to a slice of the images. Parts are kept, and put together."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from robench.benchmark.checks import check_finite, check_logits, examine
from robench.benchmark.data import Images
from robench.benchmark.pieces import found_by
from robench.benchmark.spec import AttackSpec
from robench.files import pack_arrays, write_atomic
from robench.randomness import seeded
from robench.reports.trust import Finding, texts
from robench.reports.uncertainty import wilson

Flags = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]
Progress = Callable[[float, str], None]  # share done in [0, 1], what to say about it
BATCH = 500  # images per call of an attack that has no pool
_TEXT = ("stages", "notes")
_NUMBERS = ("start", "stop", "seconds", "max_distance", "violations", "batch_size", "attacked",
            "forwards", "backwards", "seen", "broke", "open")


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


@dataclass(frozen=True)
class Part:
    """What an attack did to the images [start, stop).

    Attributes:
        predicted: (stop - start,) as in `Measurement`.
        breaker: (stop - start,) index into `stages` of the part that fooled the image, else -1;
            None of an attack without parts, or where no image was right.
        attacked: images that were right when clean. forwards, backwards: passes of all of them;
            -1 where an attack does not count them.
        seen, broke: images that the stages with a share of the images saw, and broke; -1: there
            are no such stages.
        open: images that stand but were not attacked to the end.
        examples: (M,) places among all images and (M, C, H, W), where asked for.
    """

    start: int
    stop: int
    predicted: Labels
    seconds: float = 0.0
    max_distance: float = 0.0
    violations: int = 0
    batch_size: int = BATCH
    attacked: int = 0
    forwards: int = -1
    backwards: int = -1
    seen: int = -1
    broke: int = -1
    open: int = 0
    stages: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    prepared: str = ""
    breaker: npt.NDArray[np.int8] | None = None
    examples: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write it with facts about the network and the machine: values of JSON."""
        arrays: dict[str, Any] = {
            "predicted": self.predicted,
            **{name: np.array(getattr(self, name)) for name in _NUMBERS},
            **{name: np.array(getattr(self, name), dtype=str) for name in _TEXT},
            "prepared": np.array(self.prepared), "facts": np.array(json.dumps(facts)),
        }
        if self.breaker is not None:
            arrays["breaker"] = self.breaker
        if self.examples is not None:
            arrays |= {"image": self.examples[0].numpy(), "x_adv": self.examples[1].numpy()}
        write_atomic(path, pack_arrays(arrays))

    @classmethod
    def load(cls, path: Path, span: tuple[int, int]) -> tuple[Part, dict[str, Any]] | None:
        """What `save` wrote; None if it is not there, damaged or of another slice."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
                numbers = {name: kept[name].item() for name in _NUMBERS}
                stages, notes = (tuple(str(text) for text in kept[name]) for name in _TEXT)
                examples = None
                if "image" in kept:
                    examples = torch.from_numpy(kept["image"]), torch.from_numpy(kept["x_adv"])
                part = cls(predicted=kept["predicted"], prepared=str(kept["prepared"]),
                           breaker=kept["breaker"] if "breaker" in kept else None,
                           examples=examples, stages=stages, notes=notes, **numbers)
                facts: dict[str, Any] = json.loads(str(kept["facts"]))
        except Exception:  # damaged bytes may raise anything in a parser
            return None  # the file only saves time
        fits = (part.start, part.stop) == span and len(part.predicted) == span[1] - span[0]
        return (part, facts) if fits else None


def slices(n: int, shards: int, step: int = 1) -> list[tuple[int, int]]:
    """[0, n) in at most that many slices of about the same size, cut at multiples of `step`."""
    blocks = -(-n // step)
    cuts = [min(n, step * (k * blocks // shards)) for k in range(shards + 1)]
    return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def attack_part(
    target: Target, spec: AttackSpec, threat: ThreatModel, span: tuple[int, int], *,
    seed: int = 0, partial: Path | None = None,
    progress: Progress = lambda share, text: None, deadline: float | None = None,
    keep: bool = False, starts: Tensor | None = None,
) -> Part:
    """Attack those of the images [start, stop) that are right when clean; see `measure`."""
    attack, how = spec.build(threat), (seed, partial, progress, deadline)
    if isinstance(attack, Pooled):
        return _pooled(target, attack, span, *how, keep, starts)
    return _batched(target, spec, attack, threat, span, *how)


def _pooled(
    target: Target, attack: Pooled, span: tuple[int, int], seed: int, partial: Path | None,
    progress: Progress, deadline: float | None, keep: bool, starts: Tensor | None,
) -> Part:
    """An attack that runs in the pool: its noise belongs to the images, its work is resumable."""
    here, n = slice(*span), span[1] - span[0]
    correct, predicted = target.correct[here], target.predicted[here].copy()
    rows = span[0] + torch.from_numpy(correct).nonzero().flatten()
    if not len(rows):
        return Part(*span, predicted)
    data = target.data.select(rows).to(target.device)

    def show(now: SearchProgress) -> None:
        low, high = wilson(now.standing / n, n)
        progress(now.done, f"{now.stage}: {now.left} runs left, robust {now.standing}/{n} "
                 f"({low:.1%} to {high:.1%})")

    found = found_by(attack, target.model, data, target.clean[rows], seed=seed, keep=keep,
                     slots=target.batch_size, state=partial, deadline=deadline, progress=show,
                     starts=None if starts is None else starts[rows])
    predicted[correct] = found.predicted
    breaker = np.full(n, -1, dtype=np.int8)
    breaker[correct] = found.fell_to
    seen, broke = found.sampled or (-1, -1)
    return Part(
        *span, predicted, breaker=breaker, attacked=len(data), seen=seen, broke=broke,
        seconds=sum(found.seconds), max_distance=float(found.distance.max()),
        violations=found.violations, batch_size=found.slots, forwards=found.forwards,
        backwards=found.backwards, stages=found.stages, open=found.open, prepared=found.prepared,
        examples=_examples(found, rows) if keep else None,
    )


def _examples(found: Found, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which of all images fell, by the places of the attacked ones, and their examples."""
    fell = torch.from_numpy(found.fell_to >= 0)
    return rows[fell], found.x_adv.cpu()[fell]


def _batched(
    target: Target, spec: AttackSpec, attack: Attack, threat: ThreatModel,
    span: tuple[int, int], seed: int, partial: Path | None, progress: Progress,
    deadline: float | None,
) -> Part:
    """An attack from elsewhere, batch by batch. The noise of a batch depends on (seed, attack,
    first image of the batch) and on nothing that ran before."""
    size, (first, stop) = target.batch_size or BATCH, span
    label, clean = target.label[first:stop], target.predicted[first:stop]
    kept = _load_partial(partial, clean, target.fingerprint, size)
    done, predicted, seconds, farthest, violations, notes = kept
    batches = Batches(size)
    for start in range(first + done, stop, size):
        if deadline is not None and time.monotonic() >= deadline:
            break
        end = min(start + size, stop)
        done, here = end - first, slice(start - first, end - first)
        began = time.perf_counter()
        x, y = target.batch(start, end)
        todo = torch.from_numpy(target.correct[start:end]).to(target.device)
        if bool(todo.any()):
            x, y = x[todo], y[todo]
            # In TF32 an attack would stop at examples that fp32 does not confirm.
            with seeded(seed, "attack", spec.label, start), full_precision():
                x_adv = batches(lambda x, y: attack(target.model, x, y), x, y)
            notes += [note for note in getattr(attack, "notes", ()) if note not in notes]
            verdict = verify(target.model, x, x_adv, y, threat)
            fell = torch.where(verdict.fooled, verdict.predicted, y)
            predicted[here][todo.cpu().numpy()] = fell.cpu().numpy()
            violations += int(verdict.outside.sum())
            if bool(verdict.fooled.any()):
                farthest = max(farthest, float(verdict.distance[verdict.fooled].max()))
        seconds += time.perf_counter() - began
        _save_partial(partial, done=done, predicted=predicted, seconds=seconds, farthest=farthest,
                      violations=violations, batch_size=size, fingerprint=target.fingerprint,
                      notes=np.array(notes, dtype=str))
        progress(done / len(label), f"robust {int((predicted == label)[:done].sum())}/{done}")
    if batches.halved:
        notes.append(f"memory: only {batches.size} images at a time fitted; what this attack draws "
                     "at random depends on it")
    return Part(
        *span, predicted, seconds=seconds, max_distance=farthest, violations=violations,
        notes=tuple(notes), batch_size=size, attacked=int(target.correct[first:stop].sum()),
        open=int((predicted == label)[done:].sum()),
    )


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


def together(parts: Sequence[Part]) -> Part:
    """The parts of one attack, in order and without a gap, as one.

    Verdicts are those of one process. Passes and seconds are sums; the batch is the largest.
    """
    if len(parts) == 1:
        return parts[0]
    tried = [part for part in parts if part.attacked]
    named = max((part.stages for part in parts), key=len)

    def total(name: str) -> int:
        counts = [getattr(part, name) for part in tried]
        return sum(counts) if counts and min(counts) >= 0 else -1

    blank = [np.full(len(part.predicted), -1, dtype=np.int8) for part in parts]
    examples = [part.examples for part in parts if part.examples is not None]
    return Part(
        parts[0].start, parts[-1].stop, np.concatenate([part.predicted for part in parts]),
        seconds=sum(part.seconds for part in parts),
        max_distance=max(part.max_distance for part in parts),
        violations=sum(part.violations for part in parts),
        batch_size=max(part.batch_size for part in tried or parts),
        attacked=sum(part.attacked for part in parts), forwards=total("forwards"),
        backwards=total("backwards"), seen=total("seen"), broke=total("broke"),
        open=sum(part.open for part in parts), stages=named,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        prepared="; ".join(dict.fromkeys(part.prepared for part in tried)),
        breaker=np.concatenate([none if part.breaker is None else part.breaker
                                for part, none in zip(parts, blank, strict=True)])
        if named else None,
        examples=(torch.cat([image for image, _ in examples]),
                  torch.cat([x_adv for _, x_adv in examples])) if examples else None,
    )
