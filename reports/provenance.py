"""How it was measured: networks, defenses and attacks behind the numbers, as boards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from robench.reports.columns import mark
from robench.reports.grouping import canonical
from robench.reports.record import Record
from robench.reports.tables import run_labels
from robench.reports.text import NOTHING, Board, Cell, Column, duration

SHORT = 12  # hex digits shown of a hash


def provenance(records: Sequence[Record]) -> list[Board]:
    """The boards of the section "How was this measured?"; none without records."""
    return [_networks(records), _training(records), _attacks(records)] if records else []


def _networks(records: Sequence[Record]) -> Board:
    """A row for each network that was attacked."""
    labels = run_labels(records)
    found = {(r.run, r.seed, r.model, r.checkpoint, r.weights_sha256): r for r in records}
    networks = list(found.values())
    return Board("Networks", (
        _words("Defense", networks, lambda r: labels.get(r.run, r.defense)),
        _words("Model", networks, lambda r: r.model),
        _words("Checkpoint", networks, lambda r: r.checkpoint),
        _words("Selected on", networks, lambda r: mark(r.selection)),
        _numbers("Seed", networks, lambda r: Cell(str(r.seed))),
        _numbers("Epoch", networks, lambda r: Cell(str(r.epoch + 1) if r.epoch >= 0 else NOTHING)),
        _words("Source", networks, lambda r: r.source),
        _words("Run", networks, lambda r: r.run),
        _words("Weights", networks, lambda r: r.weights_sha256[:SHORT]),
        _words("Teachers", networks, lambda r: ", ".join(
            f"{name} {sha[:SHORT]}" for name, sha in sorted(r.teacher_sha256.items()))),
        _words("robench", networks, lambda r: r.robench),
        _words("torch", networks, lambda r: r.torch),
        _words("Commit", networks, lambda r: r.commit[:SHORT] + "+dirty" * ("+" in r.commit)),
        _words("Device", networks, lambda r: r.device),
        _words("Measured (UTC)", networks, lambda r: r.created),
    ))


def _training(records: Sequence[Record]) -> Board:
    """A row for each way a defense was trained."""
    labels = run_labels(records)
    found = {(r.defense, canonical(r.defense_config), r.recipe, r.epochs, r.model, r.dataset): r
             for r in records}
    ways = list(found.values())
    return Board("Training", (
        _words("Defense", ways, lambda r: labels.get(r.run, r.defense)),
        _words("Data", ways, lambda r: r.dataset),
        _words("Model", ways, lambda r: r.model),
        _words("Recipe", ways, lambda r: r.recipe),
        _numbers("Epochs", ways, lambda r: Cell(str(r.epochs))),
        _words("Options", ways, lambda r: canonical(r.defense_config)),
    ))


def _attacks(records: Sequence[Record]) -> Board:
    """A row for each attack, threat model and set of images."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        place = (r.attack, r.threat, r.dataset, r.data_sha256, canonical(r.attack_config))
        found.setdefault(place, []).append(r)
    runs = list(found.values())
    firsts = [some[0] for some in runs]
    seconds = [sum(r.seconds for r in some) for some in runs]
    failed = [sum(r.status == "failed" for r in some) for some in runs]
    return Board("Attacks", (
        _words("Attack", firsts, lambda r: r.attack),
        _words("Threat model", firsts, lambda r: r.threat),
        _words("Images", firsts, lambda r: f"{r.dataset} {r.split}, {r.data_sha256[:SHORT]}"),
        _numbers("n", firsts, lambda r: Cell(f"{r.n:,}", sort=r.n)),
        Column("Networks", tuple(Cell(str(len(some))) for some in runs)),
        Column("Failed", tuple(Cell(str(number)) for number in failed)),
        Column("Time in all", tuple(Cell(duration(time), sort=time) for time in seconds)),
        _numbers("Batch", firsts, lambda r: Cell(str(r.batch_size))),
        _words("Precision", firsts, lambda r: r.precision),
        _numbers("Threads", firsts, lambda r: Cell(str(r.threads))),
        Column("Largest distance",
               tuple(Cell(f"{max(r.max_distance for r in some):.4g}") for some in runs)),
        Column("Outside", tuple(Cell(str(sum(r.violations for r in some))) for some in runs)),
        _words("Options", firsts, lambda r: canonical(r.attack_config)),
    ))


def _words(title: str, records: Sequence[Record], text: Callable[[Record], str]) -> Column:
    return Column(title, tuple(Cell(text(r) or NOTHING) for r in records), words=True)


def _numbers(title: str, records: Sequence[Record], cell: Callable[[Record], Cell]) -> Column:
    return Column(title, tuple(map(cell, records)))
