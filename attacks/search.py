"""The search: the stages of an attack over a set of images, resumable to the unit of work."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import robench
from robench.attacks.base import Classifier
from robench.attacks.found import CLEAN, STANDS, Found, Progress
from robench.attacks.network import Precision
from robench.attacks.noise import stream_keys, words
from robench.attacks.pool import Images, Pool, Stepper, Units
from robench.attacks.prepare import Prepared, auto_slots, prepared
from robench.attacks.state import read_state, units_of, write_state
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import verify
from robench.signals import waiting

FORMAT = 4  # of the state file: counts up when it, or a stepper's state, changes


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of an attack.

    Attributes:
        share: the part runs on this share of the images that stand, chosen by their hash.
    """

    stepper: Stepper
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled(ABC):
    """An attack made of stages that run in the pool. Subclasses have the field `threat` first.

    Attributes:
        precision: of the search, see `Network`; what counts is confirmed in float32 always.
    """

    precision: Precision = "exact"

    @property
    @abstractmethod
    def threat(self) -> ThreatModel: ...

    @abstractmethod
    def stages(self, classes: int) -> tuple[Stage, ...]:
        """The stages for a network with that many classes, in order."""

    def notes(self, classes: int) -> tuple[str, ...]:
        """What differs from what the attack's name promises, a sentence each."""
        return ()

    def __call__(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        if not len(x):
            return x.detach().clone()
        seed = int(torch.randint(2**31, ()))
        return Search(self, model, x, y, seed=seed).run().x_adv

    def config(self, classes: int) -> dict[str, Any]:
        """Every parameter of every stage, for the record."""
        stages = {}
        for stage in self.stages(classes):
            options = asdict(stage.stepper)  # type: ignore[call-overload]
            plain = {k: v for k, v in options.items() if k not in ("threat", "precision")}
            units = stage.stepper.units(classes)
            stages[stage.stepper.name] = plain | {"units": units, "share": stage.share}
        return {"precision": self.precision, "stages": stages}


class OneStage(Pooled):
    """An attack that is its own stepper: subclasses have the other members of `Stepper`."""

    __slots__ = ()

    def rank(self, number: int) -> int:
        """Of a part without targets: the runner-up."""
        return 0

    def stages(self, classes: int) -> tuple[Stage, ...]:
        return (Stage(cast(Stepper, self)),)


class Search:
    """Runs a pooled attack on images (N, C, H, W), N >= 1, with labels (N,).

    Args:
        seed: of every random stream; results depend on it, the images and the network alone.
        slots: units in flight; None chooses by the device's memory.
        state: file in which a search that is interrupted is kept, and from which it goes on. It
            belongs to one attack, seed, network and set of images; another's is ignored.
        keep: keep the examples in that file too.
        clean: (N, K) logits of the images, from `clean_logits`, where the caller has them.
        deadline: time.monotonic() at which to stop with what is known by then.
        save_every, show_every (attributes): seconds between writes of that file, and between
            calls of `progress`.
        starts: (N, C, H, W) examples from elsewhere, looked at before anything else, as a stage
            "replay". They may only break images: what stands was attacked in full.
    """

    save_every, show_every = 5.0, 0.2

    def __init__(
        self, attack: Pooled, model: Classifier, x: Tensor, y: Tensor, *, seed: int,
        slots: int | None = None, state: Path | None = None, keep: bool = False,
        deadline: float | None = None, starts: Tensor | None = None, clean: Tensor | None = None,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._attack, self._model, self._x, self._y = attack, model, x.detach(), y
        self._seed, self._slots, self._file, self._keep = seed, slots, state, keep
        self._deadline, self._starts, self._progress = deadline, starts, progress
        self._clean, n = clean, len(x)
        self._fell_to = np.full(n, STANDS, dtype=np.int16)
        self._distance = np.zeros(n)
        self._x_adv = self._x.clone()
        self._ended: list[npt.NDArray[np.bool_]] = []
        self._passes = np.zeros(2, dtype=np.int64)
        self._violations = self._stage = 0
        self._under_way: tuple[int, Units] | None = None  # stage, units
        self._saved = self._shown = time.monotonic()
        self._saving = 0.0  # seconds that it took

    def run(self) -> Found:
        """Raises what the model raises; then the state file holds what had ended."""
        with prepared(
            self._attack.precision, self._model, self._x, self._y, self._clean
        ) as ready:
            self._net, self._judge_model = ready.net, ready.judge
            self._fell_to[~ready.correct.cpu().numpy()] = CLEAN
            self._predicted = ready.predicted.cpu().numpy()
            self._standing = ready.correct
            self._prepare(ready)
            try:
                self._run(ready.images)
            finally:
                self.save()
        return self._found()

    def _prepare(self, ready: Prepared) -> None:
        images = ready.images
        n, self._classes = len(self._x), images.ranked.shape[1] + 1
        self._stages = self._attack.stages(self._classes)
        units = [stage.stepper.units(self._classes) for stage in self._stages]
        self._chosen = [_share(images.ids, stage.share, self._seed) for stage in self._stages]
        self._ended = [np.zeros((n, u), dtype=bool) for u in units]
        self._seconds = [0.0] * len(self._stages)
        self._costs = [s.stepper.steps * u * s.share
                       for s, u in zip(self._stages, units, strict=True)]
        self._net.batch = self._slots or auto_slots(self._net, self._x, n * max(units))
        self._identity = self._describe(images)
        self._fingerprint = ready.fingerprint.cpu().numpy()
        self._load(images)

    def _run(self, images: Images) -> None:
        self._lap = time.perf_counter()
        if self._starts is not None:
            self._stage = len(self._stages)  # one more name than there are stages
            for rows in torch.split(torch.arange(len(self._x), device=self._y.device), 256):
                self.judge(rows, self._starts[rows].to(self._x))
        for index, stage in enumerate(self._stages):
            self._stage, self._lap = index, time.perf_counter()
            todo, begun = self._todo()
            complete = Pool(stage.stepper, self._net, images, self, todo, slots=self._net.batch,
                            seed=self._seed, waiting=begun).run()
            self._count_seconds()
            if not complete:
                return
            if self._under_way is not None and self._under_way[0] == index:
                self._under_way = None

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        if self._stage < len(self._seconds):
            self._seconds[self._stage] += now - self._lap
        self._lap = now

    def _todo(self) -> tuple[list[tuple[int, int]], Units | None]:
        """The units of this stage that have not begun, and those that are under way.

        First all first targets, then all second ones, so that few units of an image are in
        flight when it falls.
        """
        chosen = self._chosen[self._stage] & (self._fell_to == STANDS)
        left = ~self._ended[self._stage] & chosen[:, None]
        begun = None
        if self._under_way is not None and self._under_way[0] == self._stage:
            units = self._under_way[1]
            image, number = units.image.cpu().numpy(), units.number.cpu().numpy()
            rows = np.flatnonzero(left[image, number])
            left[image, number] = False
            if len(rows):
                begun = units.take(torch.from_numpy(rows).to(units.image.device))
        number, image = np.nonzero(left.T)
        return list(zip(image.tolist(), number.tolist(), strict=True)), begun

    def _passed(self) -> npt.NDArray[np.int64]:
        return np.array([self._net.forwards, self._net.backwards], dtype=np.int64)

    # The board of the pool

    @property
    def standing(self) -> Tensor:
        return self._standing

    def judge(self, image: Tensor, candidate: Tensor) -> Tensor:
        x, y = self._x[image], self._y[image]
        threat = self._attack.threat
        if self._stage < len(self._stages):
            threat = self._stages[self._stage].stepper.threat
        verdict = verify(self._judge_model, x, candidate, y, threat)
        self._passes[0] += len(y)
        self._violations += int(verdict.outside.sum())
        fooled = verdict.fooled | ~self._standing[image]
        # Of several examples of an image the first counts.
        names, fell = image.cpu().numpy(), (verdict.fooled & self._standing[image]).cpu().numpy()
        first = np.flatnonzero(fell)[np.unique(names[fell], return_index=True)[1]]
        rows = torch.from_numpy(first).to(image.device)
        self._x_adv[image[rows]] = candidate[rows]
        self._standing[image[rows]] = False
        self._predicted[names[first]] = verdict.predicted[rows].cpu().numpy()
        distance = verdict.distance[rows].cpu().numpy()
        if threat != self._attack.threat:  # of a union: the same share of its eps
            distance *= self._attack.threat.eps / threat.eps
        self._distance[names[first]] = distance
        self._fell_to[names[first]] = self._stage  # last: what is saved must be whole
        return fooled

    def ended(self, image: Tensor, number: Tensor, last: Tensor) -> None:
        stands = self._standing[image]
        self._x_adv[image[stands]] = last[stands]
        self._ended[self._stage][image.cpu().numpy(), number.cpu().numpy()] = True

    def tick(self, under_way: Callable[[], Units | None]) -> bool:
        now = time.monotonic()
        out_of_time = self._deadline is not None and now >= self._deadline
        if out_of_time or waiting() or now - self._saved >= max(self.save_every, 20 * self._saving):
            units = under_way() if self._file is not None else None
            self._under_way = None if units is None else (self._stage, units)
            self.save()
            self._saved = time.monotonic()
            self._saving = self._saved - now
        if now - self._shown >= self.show_every:
            self._shown = now
            self._progress(self._where())
        return not out_of_time

    def _where(self) -> Progress:
        stands = self._fell_to == STANDS
        ended, chosen = self._ended[self._stage], self._chosen[self._stage] & stands
        left = int((~ended[chosen]).sum())
        share = left / max(1, int(chosen.sum()) * ended.shape[1])
        before, here = sum(self._costs[: self._stage]), self._costs[self._stage]
        done = (before + (1 - share) * here) / sum(self._costs)
        name = self._stages[self._stage].stepper.name
        return Progress(name, left, done, int(stands.sum()), len(stands))

    # What survives a kill

    def _describe(self, images: Images) -> str:
        config, threat = self._attack.config(self._classes), str(self._attack.threat)
        facts = [FORMAT, config, threat, self._seed, robench.__version__]
        text = json.dumps(facts, sort_keys=True, default=str)
        pixels = images.ids.cpu().numpy().tobytes() + self._y.cpu().numpy().tobytes()
        return hashlib.sha256(text.encode() + pixels).hexdigest()

    def save(self) -> None:
        """Write the state file, if there is one."""
        self._count_seconds()
        if self._file is None:
            return
        stage, units = self._under_way or (-1, None)
        arrays = {
            "identity": np.array(self._identity), "fingerprint": self._fingerprint,
            "fell_to": self._fell_to, "distance": self._distance,
            "predicted": self._predicted,
            "passes": self._passes + self._passed(), "violations": np.array(self._violations),
            "seconds": np.array(self._seconds), "stage": np.array(stage),
            **{f"ended{i}": array for i, array in enumerate(self._ended)},
        }
        if self._keep:
            examples = self._x_adv[torch.from_numpy(self._fell_to >= 0)]
            arrays["examples"] = examples.cpu().numpy()
        write_state(self._file, arrays, units)

    def _load(self, images: Images) -> None:
        kept = read_state(self._file, self._identity, self._fingerprint) if self._file else None
        if kept is None or (self._keep and "examples" not in kept):
            return
        try:
            ended = [kept[f"ended{i}"] for i in range(len(self._ended))]
            under_way = units_of(kept, images)
            fell_to, distance, passes = kept["fell_to"], kept["distance"], kept["passes"]
            violations, seconds = int(kept["violations"]), kept["seconds"].tolist()
            predicted = kept["predicted"]
            if self._keep:
                broken = torch.from_numpy(fell_to >= 0)
                self._x_adv[broken] = torch.from_numpy(kept["examples"]).to(self._x)
        except Exception:  # the names are right, what they hold is not
            return
        self._fell_to, self._distance, self._passes = fell_to, distance, passes
        self._violations, self._seconds, self._ended = violations, seconds, ended
        self._predicted = predicted
        self._standing = torch.from_numpy(fell_to == STANDS).to(self._y.device)
        self._under_way = None if under_way is None else (int(kept["stage"]), under_way)

    def _found(self) -> Found:
        passes = self._passes + self._passed()
        stands = self._fell_to == STANDS
        unended = [chosen & ~ended.all(1)
                   for chosen, ended in zip(self._chosen, self._ended, strict=True)]
        names = [stage.stepper.name for stage in self._stages]
        return Found(
            x_adv=self._x_adv, fell_to=self._fell_to, predicted=self._predicted,
            stages=(*names, "replay") if self._starts is not None else tuple(names),
            distance=self._distance, violations=self._violations, forwards=int(passes[0]),
            backwards=int(passes[1]), seconds=tuple(self._seconds),
            open=int((stands & np.logical_or.reduce(unended)).sum()),
            prepared=self._net.prepared, slots=self._net.batch,
            sampled=self._sampled(),
        )

    def _sampled(self) -> tuple[int, int] | None:
        """(images that the stages with a share saw, images that they broke)."""
        parts = [i for i, stage in enumerate(self._stages) if stage.share < 1]
        if not parts:
            return None
        broke = np.isin(self._fell_to, parts)
        seen = self._chosen[parts[0]] & ((self._fell_to == STANDS) | broke)
        return int(seen.sum()), int(broke.sum())


def _share(ids: Tensor, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """(N,) bool: a random share of the images, chosen by their names."""
    draw = words(stream_keys(ids, seed, "share"), 0, 1)[:, 0]
    chosen: npt.NDArray[np.bool_] = (draw < share * 2**32).cpu().numpy()
    return chosen
