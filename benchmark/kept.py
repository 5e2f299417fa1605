"""Measurements of earlier runs, taken as they are where they still hold."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import ValidationError

from robench.reports.record import Record, Survey, Transfer

S = TypeVar("S", bound=Survey)


def kept_record(path: Path, fingerprint: tuple[float, ...]) -> Record | None:
    """The record of an earlier run, if the network still gives the same logits."""
    try:
        record = Record.model_validate_json(path.read_bytes())
        same = alike(record.fingerprint, fingerprint)
        return record if same and path.with_suffix(".npz").exists() else None
    except (OSError, ValidationError):  # not there, or damaged: measure again
        return None


def kept_transfers(path: Path) -> list[Transfer] | None:
    try:
        lines = path.read_bytes().splitlines()
        return [Transfer.model_validate_json(line) for line in lines] or None
    except (OSError, ValidationError):
        return None


def kept_survey(path: Path, kind: type[S], fingerprint: tuple[float, ...]) -> S | None:
    """The survey of an earlier run, if the network still gives the same logits."""
    try:
        survey = kind.model_validate_json(path.read_bytes())
        return survey if alike(survey.fingerprint, fingerprint) else None
    except (OSError, ValidationError):
        return None


def alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two fingerprints are of the same network, on whatever device."""
    return len(one) == len(other) and np.allclose(one, other, rtol=1e-3, atol=1e-3)


def discard(state: Path) -> None:
    """Delete the files in which an attack kept what was finished."""
    for file in state.parent.glob(f"{state.stem}.*partial"):
        file.unlink()
