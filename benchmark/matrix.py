"""run: train every cell, attack every network, write the reports. Idempotent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import robench
from robench.attacks.base import frozen
from robench.attacks.search import Pooled
from robench.attacks.threat import ThreatModel
from robench.attacks.union import Union, joint
from robench.attacks.verify import full_precision
from robench.benchmark.cells import SMOKE_IMAGES, Cell, Result, plan, selection_of, train
from robench.benchmark.checkpoints import Header, read_header, weights_sha256
from robench.benchmark.checks import check_logits
from robench.benchmark.data import load_dataset
from robench.benchmark.evaluate import BATCH, Target, attack_config, measure, save_flags
from robench.benchmark.examples import Examples
from robench.benchmark.kept import discard, kept_record, kept_transfers
from robench.benchmark.progress import Reporter
from robench.benchmark.provenance import environment, peak_bytes
from robench.benchmark.recipe import default_threat
from robench.benchmark.sources import Network, load_network, pick_device
from robench.benchmark.spec import AttackSpec, RunSpec, check_attacks, digest
from robench.benchmark.transfer import crafting, rob_f
from robench.defenses.trainer import TrainingFailed
from robench.errors import DiskError, RobenchError, UsageError, one_line
from robench.files import locked, write_atomic
from robench.reports import render
from robench.reports.judge import judged
from robench.reports.record import Epoch, Record, Transfer
from robench.reports.store import Results, anchored

CURVE = AttackSpec(name="pgd-20", limit=1000)  # for the figure of accuracy over eps
CURVE_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
UNRANKED = AttackSpec(name="pgd-20")


def run(spec: RunSpec | Mapping[str, Any], *, quiet: bool = True) -> Results:
    """Run a matrix and write its reports to `spec.out`. Finished parts are not run again.

    Raises:
        UsageError: the request is wrong; nothing was written.
        RobenchError: a training or an attack failed; the reports hold all the rest.
    """
    spec = spec if isinstance(spec, RunSpec) else RunSpec.create(spec)
    return Matrix(spec, Reporter(quiet=quiet)).run()


@dataclass(frozen=True)
class Subject:
    """A network under attack, and the part of its records that does not change."""

    net: nn.Module
    folder: Path  # where its measurements are kept
    label: str
    facts: dict[str, Any]

    images: Tensor  # (8, C, H, W) for the fingerprint

    @cached_property
    def weights(self) -> str:
        return weights_sha256(self.net)

    @cached_property
    def fingerprint(self) -> tuple[float, ...]:
        """The largest logit of each image: the same weights may be used in another way."""
        with torch.no_grad(), frozen(self.net), full_precision():
            top = self.net(self.images).amax(1)
        return tuple(float(f"{value:.6g}") for value in top.tolist())


Pair = tuple[AttackSpec, ThreatModel, Literal["table", "curve"]]


class Matrix:
    """A checked request: everything that can be wrong with it is found in the constructor."""

    def __init__(self, spec: RunSpec, reporter: Reporter) -> None:
        self.spec, self.reporter = spec, reporter
        self.device = pick_device(spec.device)
        self.threat = ThreatModel.parse(spec.threat or default_threat(spec.dataset))
        self.attacks = tuple(attack.at(spec.precision) for attack in spec.attacks)
        check_attacks(self.attacks, self.threat)
        if spec.keep_examples:
            self.check_pooled("keeps no examples")
        self.dataset = load_dataset(
            spec.dataset, spec.data_root, download=spec.download, room=spec.memory_limit,
            device=self.device, jobs=spec.jobs, task=reporter.task)
        limit = SMOKE_IMAGES if spec.smoke else spec.limit
        self.test = self.dataset.test.take(limit).fitted().checked(len(self.dataset.classes))
        self.probe = self.test.x[:8].to(self.device)
        self.test_sha256: dict[int, str] = {}
        self.failures: list[str] = []
        self.partial: list[str] = []
        self.deadline: float | None = None  # of time.monotonic(), for the attacks
        self.starts: Tensor | None = None  # examples that are looked at before every attack
        self.starts_sha256 = ""
        self.measured = 0

    def check_pooled(self, otherwise: str) -> None:
        """Raises UsageError for attacks of other libraries, and under several threat models."""
        for attack in self.attacks:
            made = attack.build(self.threat)
            if not isinstance(made, Pooled):
                raise UsageError(f"{attack.label} is no attack of robench: it {otherwise}")
            if isinstance(made, Union):
                raise UsageError(f"{attack.label} has several threat models: it {otherwise}")

    def run(self) -> Results:
        cells, rows = self.plan()
        with locked(self.spec.out):
            return self._run(cells, rows)

    def _run(self, cells: list[Cell], rows: list[Cell]) -> Results:
        spec = self.spec
        todo = [cell for cell in cells if cell.result() is None]
        self.reporter.say(
            f"{len(rows)} rows, {len(cells)} trainings ({len(cells) - len(todo)} finished before), "
            f"{len(spec.attacks)} attacks at {self.threat} on {len(self.test)} images of "
            f"{spec.dataset}, {self.device}"
        )
        if spec.jobs > 1:
            from robench.benchmark.parallel import work_ahead

            self.measured += work_ahead(self, cells, rows)
        done: dict[str, Result] = {}
        for cell in cells:
            self._train(cell, done)
        records: list[Record] = []
        transfers: list[Transfer] = []
        epochs: list[Epoch] = []
        for cell in rows:
            result = done.get(cell.spec.key())
            if result is not None:
                epochs += self._epochs(cell, result)
                try:
                    for name in cell.checkpoints:
                        records += self.records(cell, name)
                    transfers += self.transfers(cell)
                except UsageError as error:  # its weights are damaged, or give NaN
                    self.failures.append(f"{cell.label}: {error}")
        results = anchored(Results(judged(records, transfers), transfers, epochs), spec.out)
        render(results, spec.out)
        if not todo and not self.measured:
            self.reporter.say("nothing to do: every training and every measurement is there "
                              f"already; {spec.out}/ holds the reports")
        if self.failures:
            raise RobenchError("; ".join(self.failures))
        return results

    def plan(self) -> tuple[list[Cell], list[Cell]]:
        """(cells to train in order, teachers first; those among them that are rows)."""
        return plan(self.spec, self.dataset, self._teacher())

    def _teacher(self) -> Network | None:
        """What --teacher names. --model is the student's, unless the file does not name its own."""
        source = self.spec.teacher
        if source is None:
            return None
        path = Path(source)
        header = read_header(path) if path.suffix == ".safetensors" else None
        named = header is not None and header.model.name != self.spec.model
        teacher = load_network(source, self.dataset, self.threat,
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

    def records(self, cell: Cell, name: str) -> list[Record]:
        """All attacks on one checkpoint of a trained cell."""
        return list(self.attack(*self._subject(cell, name), cell.spec.seed))

    def pending(self, cell: Cell, name: str) -> bool:
        """Whether an attack on this checkpoint is still to be measured."""
        subject, pairs = self._subject(cell, name)
        return any(kept_record(path, subject.fingerprint) is None
                   for *_, path in self._places(subject, pairs, cell.spec.seed))

    def _subject(self, cell: Cell, name: str) -> tuple[Subject, list[Pair]]:
        ranked = name in cell.ranked
        net, header = cell.network(name, self.device)
        subject = Subject(net, cell.folder / "eval", f"{cell.label} {name}",
                          self._facts(cell, header, net, ranked), self.probe)
        attacks = self.attacks if ranked else (UNRANKED,)
        pairs: list[Pair] = [(attack, self.threat, "table") for attack in attacks]
        if ranked:
            pairs += [(CURVE, self.threat.scaled(factor), "curve") for factor in CURVE_FACTORS
                      if self.threat.norm != "Linf" or self.threat.eps * factor <= 1]
        return subject, pairs

    def _facts(
        self, cell: Cell, header: Header, net: nn.Module, ranked: bool
    ) -> dict[str, Any]:
        spec, result = cell.spec, cell.result()
        assert result is not None, "records are of trained cells"
        return {
            "run": spec.key(),
            "seed": spec.seed,
            "model": str(spec.model),
            "source": "trained",
            "defense": spec.defense,
            "defense_config": spec.config,
            "recipe": spec.recipe,
            "epochs": spec.train.epochs,
            "train_seconds": result.seconds,
            "teacher_seconds": cell.teacher_seconds(),
            **result.overfitting(header.checkpoint),
            "selection": selection_of(spec.train),
            "checkpoint": header.checkpoint,
            "epoch": header.epoch,
            "ranked": ranked,
            "baseline": cell.baseline,
            "teacher_sha256": {name: weights_sha256(teacher) for name, teacher
                               in cell.teacher_networks(self.device).items()},
            "notes": spec.notes,
        }

    def _places(
        self, subject: Subject, pairs: list[Pair], seed: int
    ) -> Iterator[tuple[AttackSpec, ThreatModel, str, Path]]:
        """Each attack with the file of its record, named by everything the outcome depends on."""
        for spec, threat, role in pairs:
            n = min(spec.limit or len(self.test), len(self.test))
            attack = spec.build(threat)
            # Outside the pool, noise is drawn per batch.
            size = None if isinstance(attack, Pooled) else self.spec.batch_size or BATCH
            identity = {
                "weights": subject.weights,
                "network": [subject.facts["source"], subject.facts["model"]],
                "attack": spec.model_dump(mode="json"),
                # defaults and versions included
                "config": attack_config(attack, len(self.dataset.classes)),
                "batch_size": size,
                "seed": seed,
                "threat": str(threat),
                "data": self._test_hash(n),
                # An upgrade may mend an attack of ours; a library's version is in its options.
                **({"robench": robench.__version__} if size is None else {}),
                **({"starts": self.starts_sha256} if self.starts is not None else {}),
            }
            path = subject.folder / f"{spec.slug}-{digest(identity)}.json"
            yield spec, threat, role, path

    def attack(self, subject: Subject, pairs: list[Pair], seed: int) -> Iterator[Record]:
        """Records of the attacks on a network, measured or taken from an earlier run."""
        target: Target | None = None
        for spec, threat, role, path in self._places(subject, pairs, seed):
            facts = {**subject.facts, "role": role}
            record = kept_record(path, subject.fingerprint)
            if self.spec.keep_examples and not path.with_suffix(".safetensors").exists():
                record = None
            if record is not None:
                record = record.model_copy(update=facts)
            else:
                if target is None:
                    target = Target(subject.net, self.test, self.spec.batch_size)
                    for warning in target.warnings:
                        self.reporter.warn(f"{subject.label}: {warning}")
                record = self._measure(subject, target, spec, threat, path, seed, facts)
            yield record

    def _measure(
        self, subject: Subject, target: Target, spec: AttackSpec, threat: ThreatModel,
        path: Path, seed: int, facts: dict[str, Any],
    ) -> Record:
        self.measured += 1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        n = min(spec.limit or len(self.test), len(self.test))
        flags, partial = path.with_suffix(".npz"), path.with_suffix(".partial")
        known = {
            **facts,
            **environment(self.device),
            "dataset": self.dataset.name,
            "split": "test",
            "n": n,
            "data_sha256": self._test_hash(n),
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
            with self.reporter.task(f"{subject.label}: {spec.label} at {threat}") as update:
                m = measure(target, spec, threat, seed=seed, partial=partial, progress=update,
                            deadline=self.deadline, keep=self.spec.keep_examples,
                            starts=self.starts)
        except DiskError:  # nothing could be kept from here on
            raise
        except Exception as error:  # third-party attacks raise whatever they like
            reason = one_line(error)
            self.failures.append(f"{subject.label}, {spec.label}: {reason}")
            return Record(**known, attack_config={}, n_robust=0, seconds=0, max_distance=0,
                          precision="fp32", batch_size=0, violations=0, warnings=target.warnings,
                          status="failed", error=reason)
        known["peak_bytes"] = peak_bytes(self.device)
        record = Record(
            **known,
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
            kept = Examples(*m.examples, str(threat), self._test_hash(n))
            kept.save(flags.with_suffix(".safetensors"))
        if m.open:  # what has ended is in `partial`: the next run goes on there
            self.partial.append(f"{subject.label}, {spec.label}: {m.open} of {n} images are open")
            return record
        write_atomic(path, record.model_dump_json(indent=1) + "\n")
        discard(partial)
        return record

    def _test_hash(self, n: int) -> str:
        if n not in self.test_sha256:
            self.test_sha256[n] = self.test.take(n).sha256()
        return self.test_sha256[n]

    def transfers(self, cell: Cell) -> list[Transfer]:
        """The Rob_f rows of a cell with a peer or a teacher; none for the others."""
        partners = [name for name in cell.defense.trained if name != "student"]
        if not partners and not cell.teachers:
            return []
        spec, student = cell.spec, cell.ranked[0]
        ascent = crafting(self.threat)
        config = {"steps": ascent.steps, "step_size": ascent.step_size, "start": ascent.start}
        identity = {"threat": str(self.threat), "data": self._test_hash(len(self.test)), **config}
        path = cell.folder / "eval" / f"rob_f-{digest(identity)}.json"
        rows = kept_transfers(path)
        if rows is None:
            self.measured += 1
            nets = {name: cell.network(name, self.device)[0] for name in partners}
            nets |= cell.teacher_networks(self.device)
            nets["student"] = cell.network(student, self.device)[0]
            with self.reporter.task(f"{cell.label}: Rob_f of {', '.join(nets)}"):
                measured = rob_f(nets, self.test, self.threat, seed=spec.seed,
                                 batch_size=self.spec.batch_size or BATCH)
            rows = [
                Transfer(
                    run=spec.key(), seed=spec.seed, dataset=spec.dataset, model=str(spec.model),
                    defense=spec.defense, recipe=spec.recipe, checkpoint=student, network=name,
                    attack=f"pgd-{ascent.steps}", attack_config=config, threat=str(self.threat),
                    n=len(self.test), data_sha256=self._test_hash(len(self.test)),
                    clean=row.clean, self_crafted=row.self_crafted,
                    student_crafted=row.student_crafted, student_robust=row.student_robust,
                )
                for name, row in measured.items()
            ]
            write_atomic(path, "".join(row.model_dump_json() + "\n" for row in rows))
        return rows

    @staticmethod
    def _epochs(cell: Cell, result: Result) -> list[Epoch]:
        spec = cell.spec
        return [
            Epoch(
                run=spec.key(), seed=spec.seed, dataset=spec.dataset, model=str(spec.model),
                defense=spec.defense, recipe=spec.recipe, epoch=log.epoch, lr=log.lr,
                seconds=log.seconds, losses=log.losses, selection=spec.train.select,
                clean=log.clean, robust=log.robust, averages=log.averages, rob_f=log.rob_f,
            )
            for log in result.history
        ]
