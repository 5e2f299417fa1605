"""Networks that lie on disk: which ones a run left, and what is known about each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robench.benchmark.cells import selection_of
from robench.benchmark.sources import Network
from robench.benchmark.spec import CellSpec
from robench.errors import UsageError


def expand(sources: Sequence[str], *, partners: bool = False) -> list[str]:
    """The sources of networks, each once, in which a run stands for its cells.

    Of each finished cell: the checkpoint that is ranked first, and with `partners` also the
    networks that were trained beside the student. Teachers that the run trained are cells
    themselves. Raises UsageError for a folder that holds no trained cell.
    """
    found: list[str] = []
    for source in sources:
        run = Path(source)
        if not run.is_dir():
            found.append(source)
            continue
        paths = [path for done in sorted(run.glob("cells/*/done.json"))
                 for path in _networks(done.parent, partners)]
        if not paths:
            raise UsageError(f"{run}: no run with trained networks, that is, no cells/ in it")
        found += map(str, paths)
    return list(dict.fromkeys(found))


def _networks(folder: Path, partners: bool) -> list[Path]:
    cell = _spec(folder)
    if cell is None:
        raise UsageError(f"{folder}/spec.json is missing or damaged: name the files of this run")
    students = {*cell.train.ranked, *cell.train.unranked}
    others = sorted(path for path in folder.glob("*.safetensors") if path.stem not in students)
    return [folder / f"{cell.train.ranked[0]}.safetensors", *(others if partners else ())]


def facts(network: Network, dataset: str) -> dict[str, Any]:
    """The fields of a `reports.record.Network` but the hash of its weights; the cell in whose
    folder it lies says most."""
    header, cell = network.header, _cell(network)
    return {
        "run": cell.key() if cell else "",
        "seed": header.seed if header else 0,
        "dataset": dataset,
        "model": network.model,
        "source": network.source,
        "defense": header.defense if header else network.source,
        "defense_config": cell.config if cell else {},
        "recipe": header.recipe if header else "",
        "selection": selection_of(cell.train) if cell
        else header.selection if header else "unknown",
        "checkpoint": header.checkpoint if header else "",
    }


def _cell(network: Network) -> CellSpec | None:
    """What trained a network, from the spec.json beside it."""
    if network.header is None:
        return None
    cell, header = _spec(Path(network.source).parent), network.header
    same = cell and (cell.defense, cell.recipe, cell.seed) == (
        header.defense, header.recipe, header.seed)
    return cell if same else None


def _spec(folder: Path) -> CellSpec | None:
    try:
        return CellSpec.model_validate_json((folder / "spec.json").read_bytes())
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
