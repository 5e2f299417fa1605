"""run: train every cell, attack every network, write the reports. Idempotent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robench.attacks.search import Pooled
from robench.attacks.threat import ThreatModel
from robench.attacks.union import Union, joint
from robench.benchmark import facts
from robench.benchmark.cells import SMOKE_IMAGES, Cell, plan, train
from robench.benchmark.checkpoints import read_header
from robench.benchmark.checks import check_logits
from robench.benchmark.data import load_dataset
from robench.benchmark.earlier import Earlier, Kept
from robench.benchmark.evaluate import Measurement, Target, measure, merged, save_flags
from robench.benchmark.examples import Examples
from robench.benchmark.executors import Request, check_executor, share_of, using, work_ahead
from robench.benchmark.facts import Subject as Subject
from robench.benchmark.graph import Pair, Task, cell_pairs, graph, request
from robench.benchmark.kept import (
    Place,
    discard,
    kept_record,
    shard_path,
)
from robench.benchmark.parts import Part, attack_part
from robench.benchmark.progress import Reporter
from robench.benchmark.provenance import environment, environments, peak_bytes
from robench.benchmark.result import Result
from robench.benchmark.robf import cell_transfers
from robench.benchmark.sources import Network, load_network, pick_device
from robench.benchmark.spec import AttackSpec, RunSpec, the_only
from robench.defenses.trainer import TrainingFailed
from robench.errors import DiskError, RobenchError, UsageError, one_line
from robench.files import locked, write_atomic
from robench.reports import render
from robench.reports.compare import alike
from robench.reports.judge import judged
from robench.reports.record import Epoch, Record, Transfer
from robench.reports.store import Results, anchored


def run(
    spec: RunSpec | Mapping[str, Any] | Sequence[RunSpec], *, quiet: bool = True
) -> Results:
    """Run a matrix and write its reports to `spec.out`. Finished parts are not run again.

    Several specs, of other data sets or models, are one run into the folder of the first.

    Raises:
        UsageError: the request is wrong; nothing was written.
        RobenchError: a training or an attack failed; the reports hold all the rest.
    """
    if isinstance(spec, RunSpec | Mapping):
        spec = [spec if isinstance(spec, RunSpec) else RunSpec.create(spec)]
    reporter = Reporter(quiet=quiet)
    return complete(spec, reporter, Matrix(spec[0], reporter) if len(spec) == 1 else None)


def complete(specs: Sequence[RunSpec], reporter: Reporter, only: Matrix | None) -> Results:
    """Do all that is left of the requests, and write the reports of all of them.

    only: the matrix of the one request there is. Of several, one data set at a time is in memory.
    """
    failures: list[str] = []

    def planned(index: int) -> tuple[list[Cell], list[Cell], list[Task], str]:
        matrix = only or Matrix(specs[index], reporter)
        cells, rows = matrix.plan()
        return cells, rows, matrix.tasks(cells, rows, run=index), matrix.summary(cells, rows)

    def collected(index: int, cells: Sequence[Cell], rows: Sequence[Cell]) -> tuple[Results, int]:
        matrix = only or Matrix(specs[index], reporter)
        results = matrix.collect(cells, rows)
        where = f"{matrix.dataset.name} {matrix.spec.model}: " if only is None else ""
        failures.extend(where + failure for failure in matrix.failures)
        return results, matrix.measured

    plans = [planned(index) for index in range(len(specs))]  # all that is wrong is found here
    tasks = [task for plan in plans for task in plan[2]]
    out, results = specs[0].out, Results()
    with locked(out), using(specs[0]):
        for *_, saying in plans:
            reporter.say(saying)
        measured = work_ahead(Request(tuple(specs)), tasks, reporter)
        for index, (cells, rows, *_) in enumerate(plans):
            found, made = collected(index, cells, rows)
            measured += made
            results = Results(results.records + found.records,
                              results.transfers + found.transfers, results.epochs + found.epochs)
        results = replace(results, records=judged(results.records, results.transfers))
        results = anchored(results, out)
        render(results, out)
    if not measured and all(task.done for task in tasks if task.kind == "train"):
        reporter.say("nothing to do: every training and every measurement is there already; "
                     f"{out}/ holds the reports")
    if failures:
        raise RobenchError("; ".join(failures))
    return results


class Matrix:
    """A checked request: everything that can be wrong with it is found in the constructor."""

    def __init__(self, spec: RunSpec, reporter: Reporter) -> None:
        self.spec, self.reporter = spec, reporter
        check_executor(spec)
        self.device = pick_device(spec.device)
        self.threats, self.attacks = request(spec)
        if spec.keep_examples:
            self.check_pooled("keeps no examples")
        self.dataset = load_dataset(
            spec.dataset, spec.data_root, download=spec.download, room=spec.memory_limit,
            device=self.device, jobs=spec.jobs, task=reporter.task)
        limit = SMOKE_IMAGES if spec.smoke else spec.limit
        self.test = self.dataset.test.take(limit).fitted().checked(len(self.dataset.classes))
        self.probe = self.test.x[:8].to(self.device)
        self.share = share_of(spec, self.device)
        self.test_sha256: dict[int, str] = {}
        self.failures: list[str] = []
        self.partial: list[str] = []
        self.deadline: float | None = None  # of time.monotonic(), for the attacks
        self.starts: Tensor | None = None  # examples that are looked at before every attack
        self.starts_sha256 = ""
        self.measured = 0
        self._target: tuple[Subject, Target] | None = None
        self._warned: Subject | None = None

    def check_pooled(self, otherwise: str) -> None:
        """Raises UsageError for attacks of other libraries, and under several threat models."""
        for attack in self.attacks:
            made = attack.build(self.threats[0])
            if not isinstance(made, Pooled):
                raise UsageError(f"{attack.label} is no attack of robench: it {otherwise}")
            if isinstance(made, Union):
                raise UsageError(f"{attack.label} has several threat models: it {otherwise}")

    @property
    def threat(self) -> ThreatModel:
        """Of what works under one alone. Raises UsageError if there are several."""
        return the_only(self.threats)

    def run(self) -> Results:
        return complete([self.spec], self.reporter, self)

    def plan(self) -> tuple[list[Cell], list[Cell]]:
        """(cells to train in order, teachers first; those among them that are rows)."""
        return plan(self.spec, self.dataset, self._teacher())

    def tasks(self, cells: Sequence[Cell], rows: Sequence[Cell], run: int = 0) -> list[Task]:
        """All that there is to do, done or not."""
        known = Earlier(self.spec, Kept.read(self.spec.out), self.device.type, self.threats,
                        len(self.dataset.train), len(self.dataset.classes), len(self.test),
                        lambda n: [self.test_hash(n)])
        return graph(cells, rows, self.attacks, self.threats, len(self.test), self.share, known,
                     run)

    def summary(self, cells: Sequence[Cell], rows: Sequence[Cell]) -> str:
        finished = sum(cell.result() is not None for cell in cells)
        return (f"{len(rows)} rows, {len(cells)} trainings ({finished} finished before), "
                f"{len(self.spec.attacks)} attacks at {' and '.join(map(str, self.threats))} on "
                f"{len(self.test)} images of {self.spec.dataset}, {self.device}")

    def collect(self, cells: Sequence[Cell], rows: Sequence[Cell]) -> Results:
        """Everything that is there, and what is not there made."""
        done: dict[str, Result] = {}
        for cell in cells:
            self._train(cell, done)
        records: list[Record] = []
        transfers: list[Transfer] = []
        epochs: list[Epoch] = []
        for cell in rows:
            result = done.get(cell.spec.key())
            if result is not None:
                epochs += facts.epochs(cell, result, len(self.dataset.test))
                try:
                    for name in cell.checkpoints:
                        records += self.attack(self.subject(cell, name), self.pairs(cell, name),
                                               cell.spec.seed)
                    transfers += self.transfers(cell)
                except UsageError as error:  # its weights are damaged, or give NaN
                    self.failures.append(f"{cell.label}: {error}")
        return Results(records, transfers, epochs)

    def _teacher(self) -> Network | None:
        """What --teacher names. --model is the student's, unless the file does not name its own."""
        source = self.spec.teacher
        if source is None:
            return None
        path = Path(source)
        header = read_header(path) if path.suffix == ".safetensors" else None
        named = header is not None and header.model.name != self.spec.model
        teacher = load_network(source, self.dataset, self.threats[0],
                               model=None if named else self.spec.model,
                               reporter=self.reporter)
        check_logits(teacher.net, self.test.x[:2], self.test.y)
        return teacher

    def _train(self, cell: Cell, done: dict[str, Result]) -> None:
        missing = [name for name, teacher in cell.teachers.items()
                   if isinstance(teacher, Cell) and teacher.spec.key() not in done]
        if missing:
            self.failures.append(f"{cell.label}: not trained, its {missing[0]} failed")
            return
        try:
            done[cell.spec.key()] = self.train(cell)
        except TrainingFailed as error:
            self.failures.append(f"{cell.label}: {error}")

    def train(self, cell: Cell) -> Result:
        return train(cell, self.dataset, self.device, self.reporter)

    def pairs(self, cell: Cell, name: str) -> list[Pair]:
        return cell_pairs(self.attacks, self.threats, ranked=name in cell.ranked)

    def subject(self, cell: Cell, name: str) -> Subject:
        """One checkpoint of a trained cell."""
        net, header = cell.network(name, self.device)
        known = facts.cell_facts(cell, header, cell.teacher_networks(self.device),
                                 ranked=name in cell.ranked)
        return Subject(net, cell.folder / "eval", f"{cell.label} {name}", known, self.probe)

    def place(self, subject: Subject, seed: int) -> Place:
        return Place(subject.folder, subject.weights, subject.facts["source"],
                     subject.facts["model"], len(self.dataset.classes), seed,
                     self.spec.batch_size, self.starts_sha256)

    def images(self, spec: AttackSpec) -> int:
        """How many are attacked."""
        return min(spec.limit or len(self.test), len(self.test))

    def path(self, subject: Subject, pair: Pair, seed: int) -> Path:
        """The file of an attack's record."""
        spec, threat, _ = pair
        return self.place(subject, seed).record(spec, threat, self.test_hash(self.images(spec)))

    def kept(self, subject: Subject, pair: Pair, seed: int) -> Record | None:
        """The record of an earlier run, with its examples where they are wanted."""
        path = self.path(subject, pair, seed)
        if self.spec.keep_examples and not path.with_suffix(".safetensors").exists():
            return None
        return kept_record(path, subject.fingerprint)

    def attack(self, subject: Subject, chosen: Sequence[Pair], seed: int) -> Iterator[Record]:
        """Records of the attacks on a network, measured or taken from an earlier run."""
        for pair in chosen:
            known = {**subject.facts, "role": pair[2]}
            record = self.kept(subject, pair, seed)
            if record is not None:
                yield record.model_copy(update=known)
            else:
                yield self._measure(subject, pair, seed, known)

    def shard(self, subject: Subject, pair: Pair, seed: int, span: tuple[int, int]) -> None:
        """Make a shard of an attack, if neither it nor the whole is there."""
        if self.kept(subject, pair, seed) is None:
            self._part(subject, pair, seed, span)

    def target(self, subject: Subject) -> Target:
        """The network on the test images; the last one is kept."""
        if self._target is None or self._target[0] is not subject:
            self._target = subject, Target(subject.net, self.test, self.spec.batch_size)
        return self._target[1]

    def _part(
        self, subject: Subject, pair: Pair, seed: int, span: tuple[int, int]
    ) -> tuple[Part, dict[str, Any]]:
        """A shard, measured or taken from an earlier run, with the machine it was made on."""
        (spec, threat, _), file = pair, shard_path(self.path(subject, pair, seed), span)
        kept = Part.load(file, span)
        if kept is not None and alike(tuple(kept[1].pop("fingerprint")), subject.fingerprint) and (
                kept[0].examples is not None or not self.spec.keep_examples):
            return kept
        self.measured += 1
        target, partial = self.target(subject), file.with_suffix(".partial")
        label = f"{subject.label}: {spec.label} at {threat}, images {span[0]} to {span[1] - 1}"
        with self.reporter.task(label) as update:
            part = attack_part(target, spec, threat, span, seed=seed, partial=partial,
                               progress=update, deadline=self.deadline, starts=self.starts,
                               keep=self.spec.keep_examples)
        made = environment(self.device)
        if not part.open:
            part.save(file, {**made, "fingerprint": subject.fingerprint})
            partial.unlink(missing_ok=True)
        return part, made

    def _made(
        self, subject: Subject, target: Target, pair: Pair, seed: int
    ) -> tuple[Measurement, dict[str, Any]]:
        """The measurement of an attack, whole or from its shards, and where it was made."""
        spec, threat, _ = pair
        spans = self.share.spans(spec, threat, len(self.test))
        if len(spans) > 1:
            parts = [self._part(subject, pair, seed, span) for span in spans]
            made, notes = environments([machine for _, machine in parts])
            m = merged(target, spec, threat, [part for part, _ in parts])
            return replace(m, notes=(*m.notes, *notes)), made
        self.measured += 1
        with self.reporter.task(f"{subject.label}: {spec.label} at {threat}") as update:
            m = measure(target, spec, threat, seed=seed,
                        partial=self.path(subject, pair, seed).with_suffix(".partial"),
                        progress=update, deadline=self.deadline, keep=self.spec.keep_examples,
                        starts=self.starts)
        return m, {"peak_bytes": peak_bytes(self.device)}

    def _measure(
        self, subject: Subject, pair: Pair, seed: int, known: dict[str, Any]
    ) -> Record:
        (spec, threat, _), path = pair, self.path(subject, pair, seed)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        target, n, flags = self.target(subject), self.images(spec), path.with_suffix(".npz")
        if self._warned is not subject:
            self._warned = subject
            for warning in target.warnings:
                self.reporter.warn(f"{subject.label}: {warning}")
        known = {
            **known,
            **environment(self.device),
            "dataset": self.dataset.name,
            "split": "test",
            "n": n,
            "data_sha256": self.test_hash(n),
            "classes": len(self.dataset.classes),
            "parameters": sum(p.numel() for p in subject.net.parameters()),
            "weights_sha256": subject.weights,
            "fingerprint": subject.fingerprint,
            "attack": spec.label + (",replay" if self.starts is not None else ""),
            "attack_seed": seed,
            "threat": joint(spec.build(threat), threat),
            "n_correct": int(target.correct[:n].sum()),
        }
        try:
            m, made = self._made(subject, target, pair, seed)
        except DiskError:  # nothing could be kept from here on
            raise
        except Exception as error:  # third-party attacks raise whatever they like
            reason = one_line(error)
            self.failures.append(f"{subject.label}, {spec.label}: {reason}")
            return Record(**known, attack_config={}, n_robust=0, seconds=0, max_distance=0,
                          precision="fp32", batch_size=0, violations=0, warnings=target.warnings,
                          status="failed", error=reason)
        record = Record(
            **{**known, **made},
            attack_config=m.config,
            n_robust=int(m.robust.sum()),
            n_open=m.open,
            precision=m.precision,
            prepared=m.prepared,
            batch_size=m.batch_size,
            forwards=m.forwards,
            backwards=m.backwards,
            breakers=m.breakers,
            seconds=m.seconds,
            max_distance=m.max_distance,
            violations=m.violations,
            warnings=(*target.warnings, *m.warnings),
            status="partial" if m.open else "ok",
            flags=str(flags.relative_to(self.spec.out)),
        )
        save_flags(flags, m, self.dataset.classes)
        if m.examples is not None:
            kept = Examples(*m.examples, str(threat), self.test_hash(n))
            kept.save(flags.with_suffix(".safetensors"))
        if m.open:  # what has ended is in `.partial`: the next run goes on there
            self.partial.append(f"{subject.label}, {spec.label}: {m.open} of {n} images are open")
            return record
        write_atomic(path, record.model_dump_json(indent=1) + "\n")
        discard(path)
        return record

    def test_hash(self, n: int) -> str:
        if n not in self.test_sha256:
            self.test_sha256[n] = self.test.take(n).sha256()
        return self.test_sha256[n]

    def transfers(self, cell: Cell) -> list[Transfer]:
        """The Rob_f rows of a cell with a peer or a teacher; none for the others."""
        found = list[Transfer]()
        for threat in self.threats if cell.crossed else ():
            rows, made = cell_transfers(cell, self.test, self.test_hash(len(self.test)), threat,
                                        self.device, self.spec.batch_size, self.reporter)
            found += rows
            self.measured += made
        return found
