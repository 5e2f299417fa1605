"""Record: one measured number with everything needed to trust it. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# JSON has no NaN: a diverged loss is written as the string "NaN" and read back as a float.
_CONFIG = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

# What tables can hold and add up.
Int = Annotated[int, Field(gt=-(2**63), lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
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
    seed: Int
    # where
    robench: str
    torch: str
    device: str
    commit: str  # of the robench checkout; "" if unknown, "+dirty" appended if changed
    # on what
    dataset: str
    split: str
    n: Int
    data_sha256: str  # of exactly the images and labels evaluated
    classes: Int
    # the network
    model: str
    source: str  # "trained", or where the weights came from
    parameters: Int
    weights_sha256: str
    fingerprint: tuple[float, ...]  # the largest logit of each of the first 8 test images
    # how it was trained
    defense: str
    defense_config: dict[str, Any]
    recipe: str
    epochs: Int
    train_seconds: Number
    teacher_seconds: Number  # training time of the teachers it needed; 0 without
    robust_overfitting: Number | None = None  # best minus last robust accuracy while training
    catastrophic_epoch: Int | None = None  # where robust accuracy collapsed; None: it did not
    selection: str  # "val", "test", "none"; "unknown" for weights from outside
    checkpoint: str  # "best", "last", "swa", "swa-last", "ema", "ema-last", "peer"
    epoch: Int  # 0-based epoch of the weights; -1 if unknown
    notes: tuple[str, ...] = ()  # what a reader of a table must know about the recipe
    ranked: bool  # a row of the leaderboard: the checkpoint its recipe names
    baseline: bool  # asked for as --baseline
    role: Literal["table", "curve"]  # "curve": a point of the accuracy-over-eps figure only
    teacher_sha256: dict[str, str]
    # how it was attacked
    attack: str
    attack_config: dict[str, Any]
    attack_seed: Int
    threat: str  # "Linf:8/255", the key to group by; of a union "Linf:8/255+L2:0.5"
    n_correct: Int  # clean
    n_robust: Int  # correct on the clean image and not fooled
    n_open: Int = 0  # of these, images that were not attacked to the end
    breakers: dict[str, Int] = {}  # images that each part of the attack was the first to fool
    forwards: Number | None = None  # passes per attacked image; None: not counted
    backwards: Number | None = None
    seconds: Number
    precision: str  # of the search, see robench.attacks.network; verdicts are fp32 always
    prepared: str = ""  # what the search did to the network: "batch-norm folded, ..."
    threads: Int
    batch_size: Int
    peak_bytes: Int  # of the process (CPU) or the device (CUDA)
    max_distance: Number  # of the counted examples; of a union all in shares of the first eps
    violations: Int  # claimed examples outside the threat model; never counted as fooled
    warnings: tuple[str, ...]
    status: Literal["ok", "partial", "failed"]  # partial: out of time, see n_open
    error: str | None = None
    flags: str = ""  # path of the .npz with the survival flags, relative to results.jsonl

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if not (self.n >= 1 and 0 <= self.n_open <= self.n_robust <= self.n_correct <= self.n):
            raise ValueError("counts must be 0 <= n_open <= n_robust <= n_correct <= n, n >= 1")
        return self


class Transfer(BaseModel):
    """One row of the Rob_f analysis: network f on examples crafted against f and the student."""

    model_config = _CONFIG

    schema_version: Literal[1] = 1
    run: str
    seed: Int
    dataset: str
    model: str
    defense: str
    recipe: str
    checkpoint: str  # of the student
    network: str  # f: "student", "peer" or a teacher's name
    attack: str
    attack_config: dict[str, Any]
    threat: str
    n: Int
    data_sha256: str
    clean: Int  # f right on the clean image
    self_crafted: Int  # f right on x_f*: examples crafted against f itself
    student_crafted: Int  # f right on x_S*: examples crafted against the student
    student_robust: Int  # the student right on x_S*
    created: str = ""  # UTC, ISO 8601; "" in old files
    settings: str = ""  # hash of all that trainings share but their seed; "" in old files

    @model_validator(mode="after")
    def _counts(self) -> Self:
        counts = (self.clean, self.self_crafted, self.student_crafted, self.student_robust)
        if not (self.n >= 1 and all(0 <= count <= self.n for count in counts)):
            raise ValueError("counts must be from 0 to n, n >= 1")
        return self


class Epoch(BaseModel):
    """One epoch of a training run, one line of training.jsonl."""

    model_config = _CONFIG

    schema_version: Literal[1] = 1
    run: str
    seed: Int
    dataset: str
    model: str
    defense: str
    recipe: str
    epoch: Int  # 0-based
    lr: Number  # at the end of the epoch
    seconds: Number  # of training, without the validation
    losses: dict[str, float]  # mean of every loss part, "total" among them
    selection: str  # the split behind the accuracies: "val" or "test"
    clean: Number | None  # the student's accuracy in [0, 1]; None where it was not measured
    robust: Number | None  # under the selection attack
    averages: Mapping[str, tuple[float | None, float | None]] = {}  # of averaged weights, as above
    rob_f: Mapping[str, tuple[Number, Number]] = {}  # of each network f, on x_f* and on x_S*
    # Old files do not say the following.
    created: str = ""  # when the training ended, UTC, ISO 8601
    settings: str = ""  # hash of all that trainings share but their seed
    threat: str = ""  # of the selection attack
    attack: str = ""
    attack_config: dict[str, Any] = {}
    n: Int | None = None  # images of the split that the accuracies are of
    data_sha256: str = ""  # of these, or for "val" of the training images they were taken from

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


class Network(BaseModel):
    """A network, as far as those who measure it need to know."""

    model_config = _CONFIG

    run: str  # key of the cell that trained it; "" if it is not known
    seed: Int  # of the training
    dataset: str
    model: str
    source: str  # where it came from
    weights_sha256: str
    defense: str
    defense_config: dict[str, Any]
    recipe: str
    selection: str
    checkpoint: str


class Survey(Network):
    """What a command of its own measured on a network, how and where."""

    schema_version: Literal[1] = 1
    created: str  # UTC, ISO 8601
    # where
    robench: str
    torch: str
    device: str
    commit: str
    threads: Int
    seconds: Number
    # on what
    split: Literal["train", "test"]
    n: Int
    data_sha256: str
    fingerprint: tuple[float, ...]
    # under what
    threat: str
    attack: str  # "" for none
    attack_config: dict[str, Any]


class Landscape(Survey):
    """The loss around one network, one line of landscape.jsonl.

    `attack` is the one whose examples are crafted anew for each displacement, "" around images.
    `losses` are mean cross-entropies over the images, in nats. Kind "weight" has a line for each
    random direction in the space of weights; the others are a grid, alphas[j] along the first and
    alphas[i] along the second direction at losses[i][j]. Around weights an alpha of 1 is a step as
    long as each filter; around images, as eps.
    """

    kind: Surface
    direction_seed: Int
    alphas: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

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


class Shown(Network):
    """A network on examples crafted against another: how many of the images it gets right."""

    clean: Int  # on the clean image
    right: Int  # on the example, wrong when clean or not
    kept: Int  # on both


class Crossing(Survey):
    """The examples of one network, and all networks of its seed on them, itself among these.

    One line of crossing.jsonl. The survey's network is the one that was attacked.
    """

    attack_seed: Int
    shown: tuple[Shown, ...]


class Steps(Survey):
    """When PGD first fools the images of a network, one line of steps.jsonl.

    fell_at[k]: images, right when clean, of which iterate k is the first that is misclassified; 0
    is the random start. PGD with k steps sees the iterates up to k.
    """

    attack_seed: Int
    n_correct: Int
    fell_at: tuple[Int, ...]


class Corruptions(Survey):
    """A network on corrupted versions of n images, one line of corruptions.jsonl.

    right[name][s - 1]: images that it classifies right under a corruption at severity s. `threat`
    and `attack` are empty; `data_sha256` is of all versions.
    """

    clean: Int  # of the n images without corruption
    right: dict[str, tuple[Int, ...]]

    @model_validator(mode="after")
    def _counts(self) -> Self:
        severities = {len(counts) for counts in self.right.values()}
        if len(severities) != 1 or severities == {0}:
            raise ValueError("there must be corruptions, all of the same severities")
        counts = (self.clean, *(count for some in self.right.values() for count in some))
        if not (self.n >= 1 and all(0 <= count <= self.n for count in counts)):
            raise ValueError("counts must be from 0 to n, n >= 1")
        return self


class Picture(BaseModel):
    """An image that is right when clean, and what an attack made of it."""

    model_config = _CONFIG

    image: Int  # its place in the test set
    label: Int  # also what the clean image is taken for
    clean_confidence: float  # the softmax probability of the clean prediction
    predicted: Int  # of the exact x_adv, in fp32; -1 where the logits are not finite
    confidence: float  # the softmax probability of this prediction
    fooled: bool  # inside the threat model and misclassified
    distance: Number  # of x_adv, in the norm of the threat model


class Gallery(Survey):
    """Images before and after an attack on one network, one line of gallery.jsonl.

    `sheet` is a PNG with a row for each picture and three columns, each (H, W): the clean image,
    128 + 127 (x_adv - x) / scale, and x_adv. It is rounded to 8 bits, so that a network may see
    something else in it than in the exact x_adv, of which the predictions are.
    """

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    attack_seed: Int
    classes: tuple[str, ...]  # names; label k means classes[k]
    shape: tuple[Int, Int, Int]  # (C, H, W), C is 1 or 3
    scale: Number  # largest change of a pixel in all pictures, in [0, 1]
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
