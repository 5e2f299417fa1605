"""RunSpec: what a user asks for. CellSpec: what determines one trained network, and its name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from robench.attacks.base import Attack, make_attack
from robench.attacks.network import Precision
from robench.attacks.threat import ThreatModel
from robench.benchmark.recipe import ModelSpec, default_threat, explain
from robench.defenses.config import TrainConfig
from robench.errors import UsageError
from robench.reports.later import earlier

MOST = 10_000  # values in the YAML of a user


def digest(content: Any, length: int = 12) -> str:
    """The first hex digits of the SHA-256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(text: str) -> Any:
    """What YAML says, if it is plain values, at most MOST of them. Raises ValueError."""
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # also of dates, of huge numbers, and of what is nested too deep
        raise ValueError(re.sub(r"\s+", " ", str(error))[:200]) from None
    todo, seen = [value], 0
    while todo:  # references are unfolded: a few lines can mean billions of values
        item, seen = todo.pop(), seen + 1
        if seen > MOST:
            raise ValueError(f"it holds more than {MOST} values")
        if isinstance(item, dict):
            todo += [*item, *item.values()]
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, str):
            if "\0" in item or any("\ud800" <= c <= "\udfff" for c in item):
                raise ValueError("it holds half a character, or a zero byte")
        elif not isinstance(item, int | float | None):
            raise ValueError(f"it holds a {type(item).__name__}")
    return value


def parse_value(text: str, where: str) -> Any:
    """The value in KEY=VALUE, as YAML. Raises UsageError that names `where`."""
    try:
        value = _plain(text)
    except ValueError:
        raise UsageError(f"{where}: cannot read the value {text!r}") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 takes 1e-3 for a text
    return value


class AttackSpec(BaseModel):
    """An attack by name, with options, perhaps on the first `limit` images only.

    Written `pgd-20`, `pgd,steps=50,restarts=5` or `autoattack,limit=1000`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)

    @classmethod
    def parse(cls, text: str) -> AttackSpec:
        name, *pairs = (part.strip() for part in text.split(","))
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"attack {text!r}: write NAME,key=value,..., not {pair!r}")
            options[key.strip()] = parse_value(value, f"attack {text!r}")
        limit = options.pop("limit", None)
        try:
            return cls(name=name, options=options, limit=limit)
        except ValidationError as error:
            raise UsageError(explain(error, f"attack {name}")) from None

    @property
    def label(self) -> str:
        """The name in tables; options are part of it, the number of images is not."""
        return ",".join([self.name, *(f"{k}={v}" for k, v in sorted(self.options.items()))])

    @property
    def slug(self) -> str:
        """The label as a part of a file's name."""
        return "".join(c if c.isalnum() or c in "-=." else "_" for c in self.label)[:80]

    def build(self, threat: ThreatModel) -> Attack:
        """Raises UsageError for an unknown name or option."""
        return make_attack(self.name, threat, **self.options)


    def at(self, precision: Precision) -> AttackSpec:
        """The attack with this precision of the search, unless it names its own. Attacks of
        other libraries have none."""
        if ":" in self.name or precision == "exact":
            return self
        return self.model_copy(update={"options": {"precision": precision, **self.options}})


DEFAULT_ATTACKS = tuple(AttackSpec(name=name) for name in ("fgsm", "pgd-20", "cw", "autoattack"))


class RunSpec(BaseModel):
    """A matrix of defenses and seeds on one data set, and how its networks are attacked.

    Attributes:
        defenses, baselines: names; "all" stands for every registered defense. Differences are
            taken to the first baseline.
        model: None means the recipe's.
        threats: networks are attacked under each of them, and trained at the first unless the
            recipe fixes what they are trained at; () means the data set's.
        epochs, train: override the recipe; `train` takes any field of TrainConfig.
        options: per defense, override the recipe's options.
        limit: evaluate on the first images of the test split only.
        train_limit: train on this many images only (those held out for validation apart).
        teacher: a checkpoint, `package.module:factory` or `robustbench:NAME`; None means that
            missing teachers are trained.
        device: "auto", "cpu", "cuda", "cuda:1".
        batch_size: images attacked at a time; None chooses by the device's memory.
        memory_limit: bytes of images in memory, or a text such as 8G; a data set that takes more
            is read when it is needed. None: half of the memory.
        precision: of the search for adversarial examples, see `robench.attacks.network`.
        keep_examples: write the adversarial examples beside the records.
        logs: watchers of the trainings beside training.csv, see `benchmark.logs`.
        jobs: processes that share the work; each gets its share of the cores.
        threads: of torch in each of them; None: OMP_NUM_THREADS, or the share of the cores.
        shards: parts of the images on which an attack is a task of its own.
        executor: who starts the processes, see `benchmark.executors`. ray_address: of a Ray that
            runs already. gpus_per_task: the share of a GPU that a task gets.
        devices: GPUs (or processes, on the CPU) that train one network together.
        smoke: one epoch on two batches, everything else on 32 images: does it all run?
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    defenses: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    dataset: str = "digits"
    data_root: Path | None = None
    download: bool = False
    model: str | None = None
    recipe: str = "unified"
    threats: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    attacks: tuple[AttackSpec, ...] = Field(default=DEFAULT_ATTACKS, min_length=1)
    epochs: int | None = Field(default=None, ge=1)
    train: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)
    train_limit: int | None = Field(default=None, ge=2)
    teacher: str | None = None
    device: str = "auto"
    batch_size: int | None = Field(default=None, ge=1)
    memory_limit: int | None = Field(default=None, ge=1)
    precision: Precision = "exact"
    keep_examples: bool = False
    logs: tuple[str, ...] = ()
    jobs: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    shards: int = Field(default=1, ge=1)
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    gpus_per_task: float = Field(default=1.0, gt=0, le=1)
    devices: int = Field(default=1, ge=1)
    out: Path = Path("runs")
    smoke: bool = False

    @field_validator("attacks", mode="before")
    @classmethod
    def _attack_texts(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(AttackSpec.parse(item) if isinstance(item, str) else item for item in value)

    # The last validator is the first to run.
    @field_validator("defenses", "baselines", "seeds", "attacks", "logs", "threats", mode="before")
    @classmethod
    def _one_is_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, int, dict, AttackSpec)) else value

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", str(value).strip(), re.IGNORECASE)
        if value is None or match is None:
            return value
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))

    @field_validator("devices")
    @classmethod
    def _one_training_at_a_time(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("jobs", 1) > 1:
            raise ValueError("several devices train one network after another: use --jobs 1")
        if value > 1 and info.data.get("executor") == "ray":
            raise ValueError("several devices are found by the local executor alone")
        return value

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> RunSpec:
        """Validate; raises UsageError in one line, with a suggestion for an unknown key."""
        try:
            return cls.model_validate(_plural(values))
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "extra_forbidden":
                from robench.registry import unknown

                raise unknown("setting", str(first["loc"][-1]), cls.model_fields) from None
            raise UsageError(explain(error, "")) from None


def read_config(path: Path) -> dict[str, Any]:
    """The YAML of --config. Raises UsageError if it is not a mapping."""
    try:
        values = _plain(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold settings, one `name: value` a line")
    values = _plural(values)
    for name in ("train", "options"):
        if not isinstance(values.get(name, {}), dict):
            raise UsageError(f"{path}: {name} must hold settings, not {values[name]!r}")
    return values


# What is repeatable may be named in a file, and from Python, as it is on the command line.
_PLURALS = {"defense": "defenses", "baseline": "baselines", "attack": "attacks", "seed": "seeds",
            "log": "logs", "threat": "threats"}


def _plural(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_PLURALS.get(name, name): value for name, value in values.items()}



class CellSpec(BaseModel):
    """Everything that determines the weights of one training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    data_sha256: str  # of the training images, the held-out ones included
    model: ModelSpec
    defense: str
    options: dict[str, Any]
    threat: str
    recipe: str
    train: TrainConfig
    train_limit: int | None
    seed: int
    teachers: dict[str, str]  # network name -> key of its cell, or hash of given weights
    augment: str = ""  # of the training images
    code: str = ""  # hash of the source of a user's network; "" for robench's own
    selection_sha256: str = ""  # of the test images, where the recipe selects on them
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """What cells share that differ only in their seed: they are one row of a table."""
        # Teachers that were brought: a hash of weights is longer than the key of a cell.
        brought = {role: name for role, name in self.teachers.items() if len(name) == 64}
        named = {"train_limit": self.train_limit, "teachers": brought or None}
        return {**self.options, "threat": self.threat, "train": self.train.model_dump(mode="json"),
                **{name: value for name, value in named.items() if value is not None}}

    def key(self) -> str:
        """The name of the cell's folder."""
        content = self.model_dump(mode="json", exclude={"notes"})
        for group in ("train", "options"):  # with those that came later a cell keeps its name
            content[group] = earlier(content[group], group)
        return digest(content)


def threat_models(spec: RunSpec, usual: str | None = None) -> tuple[ThreatModel, ...]:
    """Those of a request; where it names none the usual one, by default that of the data set.

    Raises UsageError for what is no threat model, and for one that is named twice.
    """
    texts = spec.threats or (usual or default_threat(spec.dataset),)
    threats = tuple(ThreatModel.parse(text) for text in texts)
    for threat in threats:
        if threats.count(threat) > 1:
            raise UsageError(f"threat model {threat} is listed twice")
    return threats


def the_only(threats: Sequence[ThreatModel]) -> ThreatModel:
    """For what works under one threat model. Raises UsageError if there are several."""
    if len(threats) > 1:
        raise UsageError(f"this takes one threat model: name one of {', '.join(map(str, threats))} "
                         "with --threat")
    return threats[0]


def check_attacks(attacks: Sequence[AttackSpec], threats: Sequence[ThreatModel]) -> None:
    """Build every attack under every threat model once, so that what is wrong is found before
    anything is run. Raises UsageError, with all pairs that there are not."""
    labels, wrong = [attack.label for attack in attacks], list[str]()
    for attack in attacks:
        if labels.count(attack.label) > 1:
            raise UsageError(f"attack {attack.label!r} is listed twice")
        for threat in threats:
            try:
                attack.build(threat)
            except UsageError as error:
                where = f"{attack.label} at {threat}: " if len(threats) > 1 else ""
                wrong.append(f"{where}{error}")
    if wrong:
        raise UsageError("; ".join(dict.fromkeys(wrong)))
