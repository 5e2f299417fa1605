"""How it was measured: the records, and the networks, trainings and attacks they speak of.

Each fact is said once: a record links to its network and its attack, a network to its training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeVar
from urllib.parse import quote

from robench.reports.columns import mark
from robench.reports.cost import measurements
from robench.reports.grouping import canonical
from robench.reports.record import Record, Transfer
from robench.reports.runs import run_labels
from robench.reports.store import Results, relative
from robench.reports.text import NOTHING, Board, Cell, Column, count, duration
from robench.reports.trace import record_id, short_id

T = TypeVar("T")
SHORT = 12  # hex digits shown of a hash


def provenance(records: Sequence[Record]) -> list[Board]:
    """The boards of the section "How was this measured?"; none without records."""
    return [
        _in_short(records), _attacks(records), _networks(records), _training(records)
    ] if records else []


def record_boards(results: Results, folder: Path | None = None) -> list[Board]:
    """Every record, once. Links to survival flags lead there from a page in `folder`."""
    boards = [_records(results.records, folder)] if results.records else []
    return boards + ([_transfers(results.transfers)] if results.transfers else [])


def _in_short(records: Sequence[Record]) -> Board:
    """Versions, devices, seeds and times of all records, in one look."""
    days = sorted(r.created for r in records)
    trained = {(r.run, r.train_seconds) for r in records if r.run}
    facts = {
        "Records": f"{len(records):,}, of which "
                   f"{sum(r.status == 'failed' for r in records):,} failed",
        "Trainings": f"{len(trained):,}, {duration(sum(seconds for _, seconds in trained))} in all",
        "Evaluation": f"{duration(sum(r.seconds for r in measurements(records)))} in all",
        "Measured (UTC)": " to ".join(day[:16].replace("T", " ") for day in (days[0], days[-1])),
        "Seeds": ", ".join(map(str, sorted({r.seed for r in records}))),
        "robench": _list(r.robench for r in records),
        "Commits": _list(r.commit[:SHORT] + "+dirty" * ("+" in r.commit) for r in records),
        "torch": _list(r.torch for r in records),
        "Devices": _list(r.device for r in records),
        "Precision of the search": _list(r.precision for r in records),
    }
    return Board("In short", (_words("Fact", facts, str),
                              _words("Value", facts, facts.__getitem__)))


def _records(records: Sequence[Record], folder: Path | None) -> Board:
    """A row for each record; seeds of one defense and attack one below the other."""
    labels = run_labels(records)
    found = sorted({record_id(r): r for r in records}.items(), key=lambda item: (
        item[1].dataset, item[1].threat, labels.get(item[1].run, item[1].defense),
        item[1].checkpoint, item[1].attack, item[1].seed))
    rows = [record for _, record in found]
    return Board("Records", (
        _ids(one for one, _ in found),
        _linked("Attack", rows, lambda r: r.attack, _attack_id),
        _linked("Network", rows, lambda r: f"{labels.get(r.run, r.defense)}, {r.checkpoint}",
                _network_id),
        _numbers("Seed", rows, lambda r: Cell(str(r.seed))),
        _words("Status", rows, lambda r: r.status + f": {r.error}" * (r.error is not None)),
        _numbers("Images", rows, lambda r: Cell(f"{r.n:,}", sort=r.n)),
        _numbers("Right, clean", rows, lambda r: Cell(f"{r.n_correct:,}", sort=r.n_correct)),
        _numbers("Robust", rows, lambda r: Cell(f"{r.n_robust:,}", sort=r.n_robust)),
        _numbers("Open", rows, lambda r: Cell(f"{r.n_open:,}", sort=r.n_open)),
        _words("First to fool", rows, lambda r: _pairs(r.breakers)),
        _numbers("Forward passes", rows, lambda r: _passes(r.forwards)),
        _numbers("Backward passes", rows, lambda r: _passes(r.backwards)),
        _numbers("Wall time", rows, lambda r: Cell(duration(r.seconds), sort=r.seconds)),
        _numbers("Attack seed", rows, lambda r: Cell(str(r.attack_seed))),
        _numbers("Largest distance", rows, lambda r: Cell(f"{r.max_distance:.6g}")),
        _numbers("Outside", rows, lambda r: Cell(str(r.violations))),
        _words("Used for", rows, _use),
        _words("Device", rows, lambda r: r.device),
        _numbers("Threads", rows, lambda r: Cell(str(r.threads))),
        _numbers("Batch", rows, lambda r: Cell(str(r.batch_size))),
        _numbers("Peak memory", rows, lambda r: Cell(count(r.peak_bytes) + "B", sort=r.peak_bytes)),
        _words("Precision", rows, lambda r: r.precision),
        _words("Prepared", rows, lambda r: r.prepared),
        _words("robench", rows, lambda r: r.robench),
        _words("torch", rows, lambda r: r.torch),
        _words("Commit", rows, lambda r: r.commit, code=True),
        _words("Measured (UTC)", rows, lambda r: r.created),
        Column("Per-example flags", tuple(_flags(r, folder) for r in rows), words=True, code=True),
        _words("Warnings", rows, lambda r: "; ".join(r.warnings), code=True),
    ), ids=tuple(one for one, _ in found), facets=_facets(rows))


def _transfers(transfers: Sequence[Transfer]) -> Board:
    """A row for each record of the Rob_f analysis."""
    found = {record_id(t): t for t in transfers}
    rows = list(found.values())
    return Board("Records of Rob_f", (
        _ids(found),
        _words("Student", rows, lambda t: f"{t.defense}, {t.checkpoint}"),
        _words("Network f", rows, lambda t: t.network),
        _words("Run", rows, lambda t: t.run),
        _numbers("Seed", rows, lambda t: Cell(str(t.seed))),
        _words("Model", rows, lambda t: t.model),
        _words("Recipe", rows, lambda t: t.recipe),
        _numbers("Images", rows, lambda t: Cell(f"{t.n:,}", sort=t.n)),
        _numbers("f right, clean", rows, lambda t: Cell(f"{t.clean:,}", sort=t.clean)),
        _numbers("f right on x_f*", rows,
                 lambda t: Cell(f"{t.self_crafted:,}", sort=t.self_crafted)),
        _numbers("f right on x_S*", rows,
                 lambda t: Cell(f"{t.student_crafted:,}", sort=t.student_crafted)),
        _numbers("S right on x_S*", rows,
                 lambda t: Cell(f"{t.student_robust:,}", sort=t.student_robust)),
        _words("Attack", rows, lambda t: t.attack),
        _words("Threat model", rows, lambda t: t.threat),
        _words("Data", rows, lambda t: t.dataset),
        _words("Images sha256", rows, lambda t: t.data_sha256, code=True),
        _words("Options", rows, lambda t: canonical(t.attack_config), code=True),
    ), ids=tuple(found), facets=_facets(rows))


def _networks(records: Sequence[Record]) -> Board:
    """A row for each network that was attacked."""
    labels = run_labels(records)
    found = {_network_id(r): r for r in records}
    rows = list(found.values())
    return Board("Networks", (
        _linked("Defense", rows, lambda r: labels.get(r.run, r.defense), _training_id),
        _words("Model", rows, lambda r: r.model),
        _words("Checkpoint", rows, lambda r: r.checkpoint),
        _words("Selected on", rows, lambda r: mark(r.selection)),
        _numbers("Seed", rows, lambda r: Cell(str(r.seed))),
        _numbers("Epoch", rows, lambda r: Cell(str(r.epoch + 1) if r.epoch >= 0 else NOTHING)),
        _numbers("Parameters", rows, lambda r: Cell(f"{r.parameters:,}", sort=r.parameters)),
        _numbers("Training time", rows,
                 lambda r: Cell(duration(r.train_seconds), sort=r.train_seconds)),
        _numbers("Teachers' time", rows,
                 lambda r: Cell(duration(r.teacher_seconds), sort=r.teacher_seconds)),
        _numbers("Robust overfitting, points", rows, lambda r: Cell(
            NOTHING if r.robust_overfitting is None else f"{100 * r.robust_overfitting:.2f}")),
        _numbers("Collapsed in epoch", rows, lambda r: Cell(
            NOTHING if r.catastrophic_epoch is None else str(r.catastrophic_epoch + 1))),
        _words("Source", rows, lambda r: r.source),
        _words("Run", rows, lambda r: r.run),
        _words("Weights sha256", rows, lambda r: r.weights_sha256, code=True),
        _words("Teachers sha256", rows, lambda r: _pairs(r.teacher_sha256), code=True),
        _words("Fingerprint", rows, lambda r: ", ".join(f"{logit:g}" for logit in r.fingerprint),
               code=True),
        _words("Notes", rows, lambda r: "; ".join(r.notes), code=True),
    ), ids=tuple(found), facets=_facets(rows, threat=False))


def _training(records: Sequence[Record]) -> Board:
    """A row for each way a defense was trained."""
    labels = run_labels(records)
    found = {_training_id(r): r for r in records}
    rows = list(found.values())
    return Board("Training", (
        _words("Defense", rows, lambda r: labels.get(r.run, r.defense)),
        _words("Data", rows, lambda r: r.dataset),
        _words("Model", rows, lambda r: r.model),
        _words("Recipe", rows, lambda r: r.recipe),
        _numbers("Epochs", rows, lambda r: Cell(str(r.epochs))),
        _words("Options", rows, lambda r: canonical(r.defense_config), code=True),
    ), ids=tuple(found), facets=_facets(rows, threat=False))


def _attacks(records: Sequence[Record]) -> Board:
    """A row for each attack, threat model and set of images."""
    found: dict[str, list[Record]] = {}
    for r in records:
        found.setdefault(_attack_id(r), []).append(r)
    runs = list(found.values())
    firsts = [some[0] for some in runs]
    seconds = [sum(r.seconds for r in some) for some in runs]
    failed = [sum(r.status == "failed" for r in some) for some in runs]
    return Board("Attacks", (
        _words("Attack", firsts, lambda r: r.attack),
        _words("Threat model", firsts, lambda r: r.threat),
        _words("Data", firsts, lambda r: f"{r.dataset} {r.split}"),
        _numbers("Images", firsts, lambda r: Cell(f"{r.n:,}", sort=r.n)),
        _words("Images sha256", firsts, lambda r: r.data_sha256, code=True),
        _numbers("Classes", firsts, lambda r: Cell(str(r.classes))),
        Column("Networks", tuple(Cell(str(len(some))) for some in runs)),
        Column("Failed", tuple(Cell(str(number)) for number in failed)),
        Column("Time in all", tuple(Cell(duration(time), sort=time) for time in seconds)),
        Column("Largest distance",
               tuple(Cell(f"{max(r.max_distance for r in some):.4g}") for some in runs)),
        Column("Outside", tuple(Cell(str(sum(r.violations for r in some))) for some in runs)),
        _words("Options", firsts, lambda r: canonical(r.attack_config), code=True),
    ), ids=tuple(found), facets=tuple({"dataset": r.dataset, "threat": r.threat} for r in firsts))


def _ids(ids: Iterable[str]) -> Column:
    """Links of the rows to themselves, to be copied."""
    return Column("Record", tuple(Cell(one, links=(f"#{one}",)) for one in ids), words=True,
                  code=True)


def _network_id(r: Record) -> str:
    return short_id("n", repr((r.run, r.seed, r.dataset, r.model, r.checkpoint, r.weights_sha256)))


def _training_id(r: Record) -> str:
    return short_id("t", repr((r.defense, canonical(r.defense_config), r.recipe, r.epochs, r.model,
                               r.dataset)))


def _attack_id(r: Record) -> str:
    return short_id("a", repr((r.attack, r.threat, r.dataset, r.data_sha256,
                               canonical(r.attack_config))))


def _facets(
    rows: Sequence[Record | Transfer], threat: bool = True
) -> tuple[Mapping[str, str], ...]:
    return tuple({"dataset": r.dataset, "model": r.model, "recipe": r.recipe}
                 | ({"threat": r.threat} if threat else {}) for r in rows)


def _flags(r: Record, folder: Path | None) -> Cell:
    """The path of the flags and a link to them; only their name where the page's place is unknown.

    A path is quoted and begins with a dot: no text can make it a script or another host.
    """
    if not r.flags or folder is None:
        return Cell(PurePath(r.flags).name or NOTHING)
    path = relative(r.flags, folder)
    return Cell(path, links=(f"./{quote(path)}",))


def _use(r: Record) -> str:
    uses = ("ranked" if r.ranked else "unranked", r.role, "baseline" if r.baseline else "")
    return ", ".join(filter(None, uses))


def _passes(number: float | None) -> Cell:
    return Cell("not counted") if number is None else Cell(f"{number:,.1f}", sort=number)


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def _list(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values) - {""})) or NOTHING


def _words(title: str, rows: Iterable[T], text: Callable[[T], str], code: bool = False) -> Column:
    return Column(title, tuple(Cell(text(r) or NOTHING) for r in rows), words=True, code=code)


def _linked(title: str, rows: Iterable[Record], text: Callable[[Record], str],
            to: Callable[[Record], str]) -> Column:
    return Column(title, tuple(Cell(text(r), links=(f"#{to(r)}",)) for r in rows), words=True)


def _numbers(title: str, rows: Iterable[T], cell: Callable[[T], Cell]) -> Column:
    return Column(title, tuple(map(cell, rows)))
