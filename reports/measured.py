"""What a verdict is made of: networks under attack with their survival flags, and baseline files.

A baseline file is JSON that is committed next to a model. It holds what `robench check` compares,
one fact a line, so that a review sees what changed; the flags of 10,000 images take 2 kB:

    {"robench_baseline": 1, "measured": [
    {
     "network": "trades",
     "threat": "Linf:8/255",
     ...
     "robust": "eNpr..."
    }
    ]}

It comes from a repository that others may write to: it is validated, and nothing in it is run.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from robench.errors import UsageError
from robench.files import write_atomic
from robench.options import first_error
from robench.reports.compare import survival
from robench.reports.grouping import ALIASES, canonical, rows
from robench.reports.judge import failed
from robench.reports.record import Record
from robench.reports.store import load
from robench.reports.text import plain

Flags = npt.NDArray[np.bool_]
LARGEST = 64 * 2**20  # bytes of a file; 1,000 measurements on 50,000 images take less
MOST = 10**7  # images


class Measured(BaseModel):
    """One network under one attack. The flags are packed in files and arrays in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    network: str  # its label in tables
    model: str
    checkpoint: str
    seed: int  # of the training
    weights_sha256: str
    dataset: str
    split: str
    n: int = Field(ge=1, le=MOST)
    data_sha256: str
    threat: str
    attack: str
    attack_config: dict[str, Any]
    attack_seed: int
    precision: str
    status: Literal["ok", "partial", "failed"] = "ok"
    error: str | None = None
    n_open: int = Field(default=0, ge=0)
    n_correct: int = Field(ge=0)
    n_robust: int = Field(ge=0)
    warnings: tuple[str, ...] = ()
    robench: str
    torch: str
    created: str
    correct: Flags | None = None  # (n,), None if the file of flags is lost
    robust: Flags | None = None

    @property
    def metric(self) -> str:
        """The attack, whoever implements it."""
        return ALIASES.get(self.attack, self.attack)

    @property
    def failed(self) -> list[str]:
        """The checks for which the robust accuracy is not to be relied on."""
        return sorted(failed(self.warnings, self.attack_config))

    @model_validator(mode="before")
    @classmethod
    def _unpacked(cls, values: Any) -> Any:
        n = values.get("n") if isinstance(values, dict) else None
        if not isinstance(n, int) or not 1 <= n <= MOST:
            return values
        flags = {name: unpack(values[name], n) for name in ("correct", "robust")
                 if isinstance(values.get(name), str)}
        return {**values, **flags}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.n_robust <= self.n_correct <= self.n:
            raise ValueError("not n_robust <= n_correct <= n")
        if (self.correct is None) != (self.robust is None):
            raise ValueError("one of the flags is missing")
        if self.correct is not None and self.robust is not None:
            counts = int(self.correct.sum()), int(self.robust.sum())
            if (self.correct.shape, self.robust.shape) != ((self.n,), (self.n,)) or (
                    counts != (self.n_correct, self.n_robust)) or (
                    bool((self.robust & ~self.correct).any())):
                raise ValueError("the flags do not fit the counts")
        return self

    @field_serializer("correct", "robust")
    def _packed(self, flags: Flags | None) -> str | None:
        return None if flags is None else pack(flags)


class Baseline(BaseModel):
    """The content of a baseline file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    robench_baseline: Literal[1] = 1
    measured: tuple[Measured, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _once(self) -> Self:
        seen = [(m.network, m.model, m.checkpoint, m.seed, m.dataset, m.split, m.data_sha256,
                 m.threat, m.attack, canonical(m.attack_config)) for m in self.measured]
        if len(set(seen)) < len(seen):
            raise ValueError("a measurement is there twice")
        return self


def pack(flags: Flags) -> str:
    """(n,) bool as text: the bits, deflated, in base64."""
    return base64.b64encode(zlib.compress(np.packbits(flags).tobytes(), 9)).decode()


def unpack(text: str, n: int) -> Flags:
    """The n flags in a text. Raises ValueError if it holds anything else."""
    size = -(-n // 8)
    try:
        # No more than is wanted: a short text may deflate to gigabytes.
        found = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error, ValueError):
        found = b""
    bits = np.unpackbits(np.frombuffer(found, np.uint8)).astype(bool)
    if len(found) != size or bool(bits[n:].any()):
        raise ValueError(f"not the flags of {n} images")
    return bits[:n]


def measured(path: Path) -> list[Measured]:
    """What a baseline file, a run folder or its results.jsonl holds on the rows of its tables.

    Raises:
        UsageError: there is no such file, or it is damaged or of another kind.
        RobenchError: a file of flags is damaged.
    """
    found = list(read_baseline(path).measured) if path.suffix == ".json" else (
        of_records(load([path]).records))
    if not found:
        raise UsageError(f"{path}: no measurement of a ranked network there")
    return found


def of_records(records: Iterable[Record]) -> list[Measured]:
    """The newest record of each seed, with its flags where they are to be found.

    Raises UsageError for a record that contradicts itself, RobenchError for damaged flags.
    """
    found = []
    for row in rows([r for r in records if r.ranked and r.role == "table"]):
        for record in row.records:
            flags = survival(record) if record.status != "failed" else None
            shared = Measured.model_fields.keys() & Record.model_fields.keys()
            values = {name: getattr(record, name) for name in shared}
            if flags is not None:
                values |= {"correct": flags[0], "robust": flags[1]}
            try:
                found.append(Measured(**values, network=row.label))
            except ValidationError as error:
                raise UsageError(f"the record of {record.attack} on {row.label} cannot be: "
                                 f"{first_error(error)}") from None
    return found


def save_baseline(path: Path, entries: Iterable[Measured]) -> None:
    """Write a baseline file.

    Raises:
        UsageError: there is none, one did not end well, or its flags are lost.
        RobenchError: the disk refuses.
    """
    entries = list(entries)
    for one in entries:
        what = f"{one.metric} on {one.network}, {one.checkpoint}"
        if one.status != "ok":
            raise UsageError(f"{what}: {one.status}; a baseline needs whole measurements: "
                             "evaluate again, or choose attacks with --metric")
        if one.robust is None:
            raise UsageError(f"{what}: its survival flags are lost: evaluate again")
    try:
        baseline = Baseline(measured=tuple(entries))
    except ValidationError as error:
        raise UsageError(f"cannot make a baseline: {first_error(error)}") from None
    parts = []
    for values in baseline.model_dump(mode="json")["measured"]:
        facts = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}"
                            for name, value in values.items())
        parts.append(f"{{\n {facts}\n}}")
    listed = ",\n".join(parts)
    write_atomic(path, f'{{"robench_baseline": 1, "measured": [\n{listed}\n]}}\n')


def read_baseline(path: Path) -> Baseline:
    """Raises UsageError, in one line, for anything that is no baseline file."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) > LARGEST:
        raise UsageError(f"{path}: larger than any baseline file")
    try:
        return Baseline.model_validate_json(content)
    except ValidationError as error:
        raise UsageError(f"{path}: not a baseline file: {plain(first_error(error))}") from None
