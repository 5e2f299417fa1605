"""Record: one measured number with everything needed to trust it. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

# JSON has no NaN: a diverged loss is written as the string "NaN" and read back as a float.
_CONFIG = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

PICTURES, PIXELS = 64, 2**24  # of a gallery; of all its clean images together
Surface = Literal["weight", "weight-2d", "input"]


class Record(BaseModel):
    """One row per (network, attack, threat model), one line of results.jsonl.

    Counts, not percentages: accuracies and intervals are derived in `reports.tables`. The
    per-image survival flags lie beside it, at `flags`.
    """

    model_config = _CONFIG

    schema_version: Literal[1] = 1
    run: str  # key of the cell that trained the network; "" for a network from outside
    created: str  # UTC, ISO 8601
    seed: int
    # where
    robench: str
    torch: str
    device: str
    commit: str  # of the robench checkout; "" if unknown, "+dirty" appended if changed
    # on what
    dataset: str
    split: str
    n: int
    data_sha256: str  # of exactly the images and labels evaluated
    classes: int
    # the network
    model: str
    source: str  # "trained", or where the weights came from
    parameters: int
    weights_sha256: str
    fingerprint: tuple[float, ...]  # the largest logit of each of the first 8 test images
    # how it was trained
    defense: str
    defense_config: dict[str, Any]
    recipe: str
    epochs: int
    train_seconds: float
    teacher_seconds: float  # training time of the teachers it needed; 0 without
    robust_overfitting: float | None = None  # best minus last robust accuracy while training
    catastrophic_epoch: int | None = None  # where robust accuracy collapsed; None: it did not
    selection: str  # "val", "test", "none"; "unknown" for weights from outside
    checkpoint: str  # "best", "last", "swa", "swa-last", "ema", "ema-last", "peer"
    epoch: int  # 0-based epoch of the weights; -1 if unknown
    notes: tuple[str, ...] = ()  # what a reader of a table must know about the recipe
    ranked: bool  # a row of the leaderboard: the checkpoint its recipe names
    baseline: bool  # asked for as --baseline
    role: Literal["table", "curve"]  # "curve": a point of the accuracy-over-eps figure only
    teacher_sha256: dict[str, str]
    # how it was attacked
    attack: str
    attack_config: dict[str, Any]
    attack_seed: int
    threat: str  # "Linf:8/255", the key to group by
    n_correct: int  # clean
    n_robust: int  # correct on the clean image and not fooled
    n_open: int = 0  # of these, images that were not attacked to the end
    breakers: dict[str, int] = {}  # images that each part of the attack was the first to fool
    forwards: float | None = None  # passes per attacked image; None: not counted
    backwards: float | None = None
    seconds: float
    precision: str  # of the search, see robench.attacks.network; verdicts are fp32 always
    prepared: str = ""  # what the search did to the network: "batch-norm folded, ..."
    threads: int
    batch_size: int
    peak_bytes: int  # of the process (CPU) or the device (CUDA)
    max_distance: float  # of the counted examples
    violations: int  # claimed examples outside the threat model; never counted as fooled
    warnings: tuple[str, ...]
    status: Literal["ok", "partial", "failed"]  # partial: out of time, see n_open
    error: str | None = None
    flags: str = ""  # path of the .npz with the survival flags, relative to results.jsonl


class Transfer(BaseModel):
    """One row of the Rob_f analysis: network f on examples crafted against f and the student."""

    model_config = _CONFIG

    schema_version: Literal[1] = 1
    run: str
    seed: int
    dataset: str
    model: str
    defense: str
    recipe: str
    checkpoint: str  # of the student
    network: str  # f: "student", "peer" or a teacher's name
    attack: str
    attack_config: dict[str, Any]
    threat: str
    n: int
    data_sha256: str
    clean: int  # f right on the clean image
    self_crafted: int  # f right on x_f*: examples crafted against f itself
    student_crafted: int  # f right on x_S*: examples crafted against the student
    student_robust: int  # the student right on x_S*


class Epoch(BaseModel):
    """One epoch of a training run, one line of training.jsonl."""

    model_config = _CONFIG

    schema_version: Literal[1] = 1
    run: str
    seed: int
    dataset: str
    model: str
    defense: str
    recipe: str
    epoch: int  # 0-based
    lr: float  # at the end of the epoch
    seconds: float  # of training, without the validation
    losses: dict[str, float]  # mean of every loss part, "total" among them
    selection: str  # the split behind the accuracies: "val" or "test"
    clean: float | None  # the student's accuracy in [0, 1]; None where it was not measured
    robust: float | None  # under the selection attack
    averages: Mapping[str, tuple[float | None, float | None]] = {}  # of averaged weights, as above

    @model_validator(mode="before")
    @classmethod
    def _of_old(cls, kept: Any) -> Any:
        """Files of before other averages existed name those of SWA alone."""
        if not isinstance(kept, dict) or "swa_clean" not in kept:
            return kept
        clean, robust = kept["swa_clean"], kept["swa_robust"]
        others = {name: value for name, value in kept.items() if not name.startswith("swa_")}
        return others if clean is None and robust is None else {
            **others, "averages": {"swa": (clean, robust)}}


class Study(BaseModel):
    """What the rows of `landscape` and of `gallery` have in common: the network, and on what."""

    model_config = _CONFIG

    schema_version: Literal[1] = 1
    run: str  # key of the cell that trained the network; "" if it is not known
    created: str  # UTC, ISO 8601
    seed: int  # of the training
    # where
    robench: str
    torch: str
    device: str
    commit: str
    threads: int
    # on what
    dataset: str
    split: Literal["train", "test"]
    n: int
    data_sha256: str
    # the network
    model: str
    source: str
    weights_sha256: str
    fingerprint: tuple[float, ...]
    defense: str
    defense_config: dict[str, Any]
    recipe: str
    selection: str
    checkpoint: str


class Landscape(Study):
    """The loss around one network, one line of landscape.jsonl.

    `losses` are mean cross-entropies over the images, in nats. Kind "weight" has a line for each
    random direction in the space of weights; the others are a grid, alphas[j] along the first and
    alphas[i] along the second direction at losses[i][j]. Around weights an alpha of 1 is a step as
    long as each filter; around images, as eps.
    """

    # how it was surveyed
    kind: Surface
    threat: str
    attack: str  # whose examples are crafted anew for each displacement; "" around images
    attack_config: dict[str, Any]
    direction_seed: int
    alphas: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    seconds: float

    @model_validator(mode="after")
    def _fits(self) -> Self:
        steps = self.alphas
        if not (steps and all(map(math.isfinite, steps)) and list(steps) == sorted(set(steps))
                and 0.0 in steps and (steps[0], steps[-1]) == (-1, 1)):
            raise ValueError("alphas must ascend from -1 through 0 to 1")
        if {len(line) for line in self.losses} != {len(steps)}:
            raise ValueError("losses must be lines with a number for each alpha")
        if self.kind != "weight" and len(self.losses) != len(steps):
            raise ValueError("losses must be a square grid")
        return self


class Picture(BaseModel):
    """An image that is right when clean, and what an attack made of it."""

    model_config = _CONFIG

    image: int  # its place in the test set
    label: int  # also what the clean image is taken for
    clean_confidence: float  # the softmax probability of the clean prediction
    predicted: int  # of the exact x_adv, in fp32; -1 where the logits are not finite
    confidence: float  # the softmax probability of this prediction
    fooled: bool  # inside the threat model and misclassified
    distance: float  # of x_adv, in the norm of the threat model


class Gallery(Study):
    """Images before and after an attack on one network, one line of gallery.jsonl.

    `sheet` is a PNG with a row for each picture and three columns, each (H, W): the clean image,
    128 + 127 (x_adv - x) / scale, and x_adv. It is rounded to 8 bits, so that a network may see
    something else in it than in the exact x_adv, of which the predictions are.
    """

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    # how it was attacked
    threat: str
    attack: str
    attack_config: dict[str, Any]
    attack_seed: int
    seconds: float
    # what was seen
    classes: tuple[str, ...]  # names; label k means classes[k]
    shape: tuple[int, int, int]  # (C, H, W), C is 1 or 3
    scale: float  # largest change of a pixel in all pictures, in [0, 1]
    pictures: tuple[Picture, ...]
    sheet: bytes

    @model_validator(mode="after")
    def _fits(self) -> Self:
        c, h, w = self.shape
        if not 1 <= len(self.pictures) == self.n <= PICTURES:
            raise ValueError(f"there must be n pictures, 1 to {PICTURES}")
        if c not in (1, 3) or min(h, w) < 1 or self.n * h * w > PIXELS:
            raise ValueError(f"pictures must be grey or color, of {PIXELS:,} pixels in all at most")
        if not 0 <= self.scale <= 1:
            raise ValueError("scale must be in [0, 1]")
        return self
