"""What `landscape` and `gallery` share: networks from anywhere, results beside what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from robench.benchmark.cells import selection_of
from robench.benchmark.checks import check_logits
from robench.benchmark.matrix import Matrix, Subject
from robench.benchmark.sources import Network, load_network
from robench.benchmark.spec import CellSpec
from robench.reports import render
from robench.reports.record import Study
from robench.reports.store import RECORDS, Results, load

S = TypeVar("S", bound=Study)


def load_networks(sources: Sequence[str], matrix: Matrix, zoo: Path) -> list[Network]:
    """Each once, on the device of the matrix. Raises UsageError as `eval` does."""
    networks = [load_network(source, matrix.dataset, matrix.threat, model=matrix.spec.model,
                             zoo=zoo) for source in dict.fromkeys(sources)]
    for network in networks:
        check_logits(network.net.to(matrix.device), matrix.probe, matrix.test.y)
    return networks


def subject_of(network: Network, matrix: Matrix, folder: str) -> Subject:
    """The network, what is known about it, and where in the output its study is kept."""
    return Subject(network.net, matrix.spec.out / folder, network.source, _facts(network),
                   matrix.probe)


def add(
    out: Path, name: Literal["landscapes", "galleries"], found: Sequence[S],
    identity: Callable[[S], object],
) -> Results:
    """Write the reports of a folder again, with what was found in place of what has the same
    identity and beside all other results. Returns all that the folder holds."""
    earlier = load([out]) if (out / RECORDS).exists() else Results()
    again = {identity(one) for one in found}
    kept = [one for one in getattr(earlier, name) if identity(one) not in again]
    results = replace(earlier, **{name: [*kept, *found]})
    render(results, out)
    return results


def _facts(network: Network) -> dict[str, Any]:
    """What is known about a network; the cell in whose folder it lies says most."""
    header, cell = network.header, _cell(network)
    return {
        "run": cell.key() if cell else "",
        "seed": header.seed if header else 0,
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
    try:
        cell = CellSpec.model_validate_json(Path(network.source).with_name("spec.json").read_text())
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    header = network.header
    same = (cell.defense, cell.recipe, cell.seed) == (header.defense, header.recipe, header.seed)
    return cell if same else None
