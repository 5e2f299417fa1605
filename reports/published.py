"""Numbers that others published, to be shown beside the measured ones, never ranked with them.

published.yaml holds the curated ones; files of RobustBench add to them (`reports.robustbench`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from robench.errors import UsageError
from robench.options import parse_number
from robench.reports.record import Record

Percent = Annotated[float, Field(ge=0, le=100)]


class Published(BaseModel):
    """One network as somebody else reports it; accuracies in percent, None where not reported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)  # who says so, and where
    certainty: Literal["repository", "poster", "abstract", "model file", "secondary"]
    dataset: str
    threat: str  # as in a record; the data set and it say beside which rows the number belongs
    attack: str  # "autoattack", "pgd-20", ...
    method: str  # a defense as robench names it, or another one
    model: str
    teacher: str = ""
    checkpoint: Literal["", "best", "last"] = ""
    epochs: int | None = None
    clean: Percent | None = None
    robust: Percent | None = None
    decimals: int = 2  # that were published; 0: rounded to whole points
    notes: str = ""

    @model_validator(mode="after")
    def _sound(self) -> Published:
        if self.clean is None and self.robust is None:
            raise ValueError("neither clean nor robust accuracy is given")
        norm, _, eps = self.threat.partition(":")
        if norm not in ("Linf", "L2", "L1"):
            raise ValueError(f"threat {self.threat!r}: write Linf:8/255 or L2:0.5")
        parse_number(eps)  # its error is a ValueError too
        return self


@cache
def curated() -> tuple[Published, ...]:
    """The numbers of published.yaml."""
    import yaml

    text = (files("robench.reports") / "published.yaml").read_text(encoding="utf-8")
    return tuple(Published(**expanded) for block in yaml.safe_load(text) for expanded in _of(block))


def beside(records: Iterable[Record], given: Sequence[Published] = ()) -> list[Published]:
    """The given numbers, then the curated ones for what the tables of the records are about.

    Those are the numbers for the same data set, its test split, and the same threat model.
    """
    places = {place(r.dataset, r.threat) for r in records
              if r.role == "table" and r.split == "test"}
    return [*given, *(p for p in curated() if place(p.dataset, p.threat) in places)]


def place(dataset: str, threat: str) -> tuple[object, ...]:
    """Equal for equal data sets and threat models, however eps is written."""
    norm, _, eps = threat.partition(":")
    try:
        return dataset, norm, parse_number(eps)
    except UsageError:
        return dataset, threat


def _of(block: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers of a block, each with what the block says of all of them."""
    shared = {key: value for key, value in block.items() if key != "numbers"}
    return [{**shared, **number} for number in block["numbers"]]
