"""plan: what a run would do, what it would take, and what is there already. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from robench.benchmark.cells import SMOKE_IMAGES, Cell
from robench.benchmark.cells import plan as plan_cells
from robench.benchmark.earlier import Earlier, Kept
from robench.benchmark.executors import check_executor, share_of
from robench.benchmark.graph import Task, critical_path, graph, request
from robench.benchmark.outline import Outline, outline
from robench.benchmark.spec import RunSpec
from robench.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """A request as a graph. cells: in the order of training, with the request each is of."""

    specs: tuple[RunSpec, ...]
    outlines: tuple[Outline, ...]
    cells: tuple[tuple[int, Cell], ...]
    rows: int
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, specs: Sequence[RunSpec]) -> Plan:
        """Reads the folder of earlier runs, and data sets only whose shape it does not know.

        Raises UsageError for what is wrong with the requests, as far as that can be seen.
        """
        kept, device = Kept.read(specs[0].out), _device(specs[0].device)
        outlines, cells, tasks, rows = list[Outline](), list[tuple[int, Cell]](), list[Task](), 0
        for run, spec in enumerate(specs):
            check_executor(spec)
            if spec.teacher is not None:
                raise UsageError("plan reads no weights: leave --teacher out, which is then "
                                 "planned as a training")
            data = outline(spec)
            threats, attacks = request(spec)
            test = min(SMOKE_IMAGES if spec.smoke else spec.limit or data.test, data.test)
            known = Earlier(spec, kept, device.type, threats, data.train, data.classes, test,
                            partial(kept.hashes, data.name))
            made, wanted = plan_cells(spec, data, None)
            tasks += graph(made, wanted, attacks, threats, test, share_of(spec, device), known, run)
            cells += [(run, cell) for cell in made]
            rows += len(wanted)
            outlines.append(data)
        return cls(tuple(specs), tuple(outlines), tuple(cells), rows, tuple(tasks))

    def text(self) -> str:
        """As text: a line for each cell, then the sums."""
        return "\n".join([*self._table(), "", *self._sums(), *self._remarks()]) + "\n"

    def _table(self) -> list[str]:
        of_cell: dict[tuple[int, str], list[Task]] = {}
        for task in self.tasks:
            of_cell.setdefault((task.run, task.owner), []).append(task)
        lines = [("cell", "data set", "model", "defense", "seed", "waits for", "training",
                  "attacks", "done", "time", "from")]
        for run, cell in self.cells:
            training, *measured = of_cell[run, cell.spec.key()]
            attacks = [task for task in measured if task.kind == "attack"]
            estimate = training.estimate
            basis = dict.fromkeys(task.estimate.basis for task in measured
                                  if not task.done and task.estimate.basis)
            lines.append((
                cell.spec.key() if self.outlines[run].train_sha256 else "unknown",
                cell.spec.dataset, str(cell.spec.model), cell.spec.defense, str(cell.spec.seed),
                ", ".join(_teachers(cell)) or "-",
                "done" if training.done else _time([training]),
                str(len(attacks)), str(sum(task.done for task in attacks)), _time(measured),
                "; ".join(dict.fromkeys([*([estimate.basis] if estimate.basis and not training.done
                                           else []), *basis])) or "-",
            ))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
                .rstrip() for line in lines]

    def _sums(self) -> list[str]:
        first = self.tasks[0]
        kinds = {kind: [task for task in self.tasks if task.kind == kind]
                 for kind in ("train", "attack", "shard", "transfer")}
        names = {"train": "trainings", "attack": "attacks", "shard": "shards of them",
                 "transfer": "Rob_f analyses"}
        counts = ", ".join(f"{len(tasks)} {names[kind]} ({sum(t.done for t in tasks)} done)"
                           for kind, tasks in kinds.items() if tasks)
        chain = critical_path(self.tasks)
        gpu = f", {first.gpu:g} of a GPU" if first.gpu else ""
        memory = max((task.estimate.memory or 0 for task in self.tasks), default=0)
        return [
            f"{self.rows} rows, {counts}",
            f"a task has {first.threads} thread{'s' if first.threads > 1 else ''}{gpu}; "
            + (f"{memory / 2**30:.1f} GiB at the peak of earlier ones" if memory
               else "memory unknown"),
            f"total: {_time(self.tasks)}",
            f"longest chain: {_time(chain)} ({self._where(chain)}{' -> '.join(_steps(chain))})",
        ]

    def _where(self, chain: Sequence[Task]) -> str:
        """Which of several requests it is of."""
        spec = self.specs[chain[0].run]
        return f"{spec.dataset} {spec.model or ''}: " if len(self.specs) > 1 else ""

    def _remarks(self) -> list[str]:
        seen = {data.name: data for data in self.outlines}
        return [
            *(f"{name}: the data were not read, so that the keys of cells are unknown, and none "
              "was trained before" for name, data in seen.items() if not data.train_sha256),
            *(f"{name}: the data were not read; keys are those of {data.basis} in "
              f"{self.specs[0].out}" for name, data in seen.items() if data.basis),
        ]


def _device(name: str) -> torch.device:
    """Without a look at whether it is there: it may be that of another machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: write auto, cpu, cuda or cuda:1") from None


def _teachers(cell: Cell) -> list[str]:
    return [teacher.spec.defense for teacher in cell.teachers.values() if isinstance(teacher, Cell)]


def _steps(chain: Sequence[Task]) -> list[str]:
    return [task.label for task in chain if not task.done] or ["nothing"]


def _time(tasks: Sequence[Task]) -> str:
    """What is left, as far as it is known."""
    left = [task.estimate.seconds for task in tasks if not task.done]
    known = [seconds for seconds in left if seconds is not None]
    if not left:
        return "0 s"
    if not known:
        return "unknown"
    missing = len(left) - len(known)
    return _duration(sum(known)) + (f" + {missing} unknown" if missing else "")


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
