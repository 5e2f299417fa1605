"""RobustBench's model_info/<data set>/<norm>/<Name>.json, in and out.

In: the file becomes a published number. Out: each ranked network of a data set and threat model
that RobustBench lists becomes a file. It says only what the records say: no paper, no authors, no
claim of theirs, and a robust accuracy only of the standard AutoAttack on the whole test set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from robench.errors import UsageError
from robench.options import first_error, parse_number
from robench.reports.grouping import Row, rows
from robench.reports.published import Percent, Published, place
from robench.reports.record import Record

# What its leaderboards are about, and the number of test images they are measured on.
LISTED = {
    place("cifar10", "Linf:8/255"): 10_000,
    place("cifar10", "L2:0.5"): 10_000,
    place("cifar100", "Linf:8/255"): 10_000,
    place("imagenet", "Linf:4/255"): 5_000,
}
NORMS = ("Linf", "L2")
STANDARD = ("autoattack", "pyautoattack:standard")


class Entry(BaseModel):
    """The fields of such a file that a table can use; it writes numbers as text."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dataset: str
    eps: str | float
    name: str | None = None  # of the paper
    venue: str | None = None
    architecture: str | None = None
    clean_acc: Percent | None = None
    autoattack_acc: Percent | None = None
    external: Percent | None = None  # another evaluation, which its leaderboard prefers
    additional_data: bool | None = None
    unreliable: bool | None = None
    footnote: str | None = None
    evaluated_by: str | None = None  # in the files of robench


def read(path: Path) -> Published:
    """A published number from one file.

    Raises UsageError: the file cannot be read, is no such file, or lies in no folder that is
    named after a norm, which the file itself does not say.
    """
    norm = path.absolute().parent.name
    if norm not in NORMS:
        raise UsageError(f"{path}: the norm of a RobustBench file is the name of its folder, "
                         f"{' or '.join(NORMS)}, not {norm!r}")
    try:
        entry = Entry.model_validate_json(path.read_bytes())
        parse_number(entry.eps)
        return _published(entry, path.stem, norm)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        raise UsageError(f"{path}: not a RobustBench model file: {first_error(error)}") from None
    except UsageError as error:
        raise UsageError(f"{path}: not a RobustBench model file: eps: {error}") from None


def _published(entry: Entry, name: str, norm: str) -> Published:
    attack, robust = "autoattack", entry.autoattack_acc
    notes = [entry.name, entry.venue, entry.footnote]
    if robust is None and entry.external is not None:
        attack, robust = "external evaluation", entry.external
    elif entry.external is not None:
        notes.append(f"external evaluation: {entry.external:g}")
    notes += ["additional training data"] * bool(entry.additional_data)
    notes += ["marked as unreliable"] * bool(entry.unreliable)
    return Published(
        source=f"{entry.evaluated_by}, file" if entry.evaluated_by else "RobustBench",
        certainty="model file", dataset=entry.dataset, threat=f"{norm}:{entry.eps}",
        attack=attack, method=name, model=entry.architecture or "", clean=entry.clean_acc,
        robust=robust, notes="; ".join(" ".join(note.split()) for note in notes if note),
    )


def model_files(records: Sequence[Record]) -> dict[Path, str]:
    """Relative path and text of a file for each ranked network that RobustBench has a list for."""
    found: dict[Path, str] = {}
    for row in rows([r for r in records if r.ranked and r.role == "table"]):
        size = LISTED.get(place(row.key.dataset, row.key.threat))
        if size is None or row.key.split != "test":
            continue
        seeds = sorted({record.seed for record in row.records})
        for seed in seeds:
            folder = Path("model_info", row.key.dataset, row.key.threat.partition(":")[0])
            name = _name(row, seed if len(seeds) > 1 else None)
            path = next(path for path in _free(folder, name) if path not in found)
            known = [cell[seed] for cell in row.cells.values() if seed in cell]
            entry = _entry([record for record in known if record.status == "ok"], size)
            if entry:
                found[path] = json.dumps(entry, indent=2) + "\n"
    return found


def _entry(records: Sequence[Record], size: int) -> dict[str, Any]:
    """The fields of one network; none where no attack on it ended well."""
    whole = [record for record in records if record.n == size]
    full = [record for record in whole if record.attack in STANDARD]
    if not records:
        return {}
    first = records[0]
    fields: dict[str, Any] = {"name": f"{first.defense}, trained by robench"
                              if first.source == "trained" else first.defense}
    if first.source == "trained":
        fields["number_forward_passes"] = 1
        if not first.teacher_sha256:  # what a teacher saw is not known
            fields["additional_data"] = False
    fields |= {"dataset": first.dataset, "architecture": first.model,
               "eps": first.threat.partition(":")[2]}
    if whole:
        fields["clean_acc"] = f"{100 * whole[0].n_correct / size:.2f}"
    if full:
        fields["autoattack_acc"] = f"{100 * full[0].n_robust / size:.2f}"
    others = [f"{r.attack} on {r.n:,} test images: {100 * r.n_robust / r.n:.2f}"
              for r in records if r not in full]
    warnings = dict.fromkeys(text for r in records for text in (*r.warnings, *r.notes))
    trained = f"recipe {first.recipe}, {first.epochs} epochs, " if first.recipe else ""
    fields["footnote"] = " ".join(". ".join([
        f"{trained}checkpoint {first.checkpoint or 'unknown'}, selected on {first.selection}, "
        f"seed {first.seed}, weights {first.weights_sha256}", *others, *warnings,
    ]).split())
    return {**fields, "evaluated_by": f"robench {first.robench}"}


def _name(row: Row, seed: int | None) -> str:
    """A file name of letters, digits, dots and dashes, whatever the names in the row are."""
    parts = [row.label.removeprefix("robustbench:"), row.key.model, row.key.checkpoint,
             "" if seed is None else f"seed{seed}"]
    text = re.sub(r"[^A-Za-z0-9.+-]+", "_", "_".join(filter(None, parts)))
    return text.strip("_.")[:100] or "unnamed"


def _free(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"{name}.json"
    number = 2
    while True:
        yield folder / f"{name}_{number}.json"
        number += 1
