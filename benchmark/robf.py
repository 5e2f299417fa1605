"""Rob_f of trained cells: measured once, then taken from the file it left."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import Cell
from robench.benchmark.data import Images
from robench.benchmark.evaluate import BATCH
from robench.benchmark.kept import kept_transfers, transfer_config, transfers_path
from robench.benchmark.progress import Reporter
from robench.benchmark.provenance import now
from robench.benchmark.spec import digest
from robench.benchmark.transfer import RobF, rob_f
from robench.files import write_atomic
from robench.reports.record import Transfer


def cell_transfers(
    cell: Cell, test: Images, test_sha256: str, threat: ThreatModel, device: torch.device,
    batch_size: int | None, reporter: Reporter,
) -> tuple[list[Transfer], bool]:
    """(a row for each network of a cell with a peer or a teacher; whether they were measured)."""
    path = transfers_path(cell.folder, threat, test_sha256)
    rows = kept_transfers(path)
    if rows is not None:
        return rows, False
    nets = {name: cell.network(name, device)[0] for name in cell.partners}
    nets |= cell.teacher_networks(device)
    nets["student"] = cell.network(cell.ranked[0], device)[0]
    with reporter.task(f"{cell.label}: Rob_f of {', '.join(nets)} at {threat}"):
        measured = rob_f(nets, test, threat, seed=cell.spec.seed, batch_size=batch_size or BATCH)
    rows = _rows(cell, measured, threat, len(test), test_sha256)
    write_atomic(path, "".join(row.model_dump_json() + "\n" for row in rows))
    return rows, True


def _rows(
    cell: Cell, measured: Mapping[str, RobF], threat: ThreatModel, n: int, data_sha256: str
) -> list[Transfer]:
    spec, config = cell.spec, transfer_config(threat)
    return [
        Transfer(
            run=spec.key(), seed=spec.seed, dataset=spec.dataset, model=str(spec.model),
            defense=spec.defense, recipe=spec.recipe, checkpoint=cell.ranked[0], network=name,
            attack=f"pgd-{config['steps']}", attack_config=config, threat=str(threat), n=n,
            data_sha256=data_sha256, clean=row.clean, self_crafted=row.self_crafted,
            student_crafted=row.student_crafted, student_robust=row.student_robust,
            created=now(), settings=digest(spec.config),
        )
        for name, row in measured.items()
    ]
