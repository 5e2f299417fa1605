"""eval: attack a network that robench did not train in this run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from robench.benchmark.checks import check_logits
from robench.benchmark.data import Images
from robench.benchmark.examples import Examples
from robench.benchmark.executors import Request, using, work_ahead
from robench.benchmark.graph import Estimate, Pair, Span, Task, attack_tasks, pairs
from robench.benchmark.kept import shard_path
from robench.benchmark.matrix import Matrix, Subject
from robench.benchmark.progress import Reporter
from robench.benchmark.sources import Network, load_network
from robench.benchmark.spec import RunSpec
from robench.errors import Partial, RobenchError
from robench.files import locked
from robench.reports import render
from robench.reports.compare import alike
from robench.reports.judge import judged
from robench.reports.record import Record
from robench.reports.store import RECORDS, Results, anchored, load
from robench.reports.trust import flag


def evaluate_external(
    sources: tuple[str, ...], spec: RunSpec, *, zoo: Path = Path("models"), quiet: bool = True,
    budget: float | None = None, replay: Path | None = None,
) -> Results:
    """Attack networks, named as in `sources.SOURCES`.

    `spec` gives data set, threat models, attacks and output folder; `spec.model` the
    architecture of a checkpoint that does not name it. After `budget` seconds the attacks stop:
    what they know by then is reported as partial. The examples in the file `replay` are looked
    at first: a quick check of a later version of a model, labeled in every table. Raises like
    `run`, and Partial.
    """
    sources = tuple(dict.fromkeys(sources))
    end = None if budget is None else time.time() + budget
    request = Request((spec,), sources, zoo, replay, end)
    matrix = opened(request, 0, Reporter(quiet=quiet))
    subjects = [outside(matrix, load_network(source, matrix.dataset, matrix.threats[0],
                                             model=spec.model, zoo=zoo,
                                             reporter=matrix.reporter)) for source in sources]
    with locked(spec.out), using(spec):
        work_ahead(request, _tasks(matrix, subjects), matrix.reporter)
        results = _evaluated(matrix, subjects)
    if matrix.failures:
        raise RobenchError("; ".join(matrix.failures))
    if matrix.partial:
        raise Partial("; ".join(matrix.partial) + "; run the same command again to go on", results)
    return results


def opened(request: Request, run: int, reporter: Reporter) -> Matrix:
    """One of the matrices of a request, with what `eval` says about it."""
    matrix = Matrix(request.specs[run], reporter)
    if request.end is not None:
        matrix.deadline = time.monotonic() + request.end - time.time()
    if request.replay is not None:
        matrix.check_pooled("replays no examples")
        matrix.starts = Examples.load(request.replay).starts(matrix.test)
        matrix.starts_sha256 = Images(matrix.starts, matrix.test.y).sha256()
    return matrix


def outside(matrix: Matrix, network: Network) -> Subject:
    """A network that was not trained in this run. Raises UsageError: it gives no logits."""
    net = network.net.to(matrix.device)
    check_logits(net, matrix.probe, matrix.test.y)
    return Subject(net, matrix.spec.out / "eval", network.source, _facts(network), matrix.probe,
                   flag("eval-mode", network.in_train_mode))  # of the network as it came


def _tasks(matrix: Matrix, subjects: Sequence[Subject]) -> list[Task]:
    seed, share = matrix.spec.seeds[0], matrix.share
    return [
        task for subject in subjects
        for index, pair in enumerate(pairs(matrix.attacks, matrix.threats))
        for task in attack_tasks(
            f"0/{subject.label}", subject.label,
            Task("", "attack", "", owner=subject.label, pair=index, threads=share.threads,
                 gpu=share.gpu),
            pair, len(matrix.test), share, Estimate(),
            partial(_made, matrix, subject, pair, seed))
    ]


def _made(
    matrix: Matrix, subject: Subject, pair: Pair, seed: int, span: Span | None
) -> bool:
    """Whether an attack, or a shard of it, is there."""
    if span is None:
        return matrix.kept(subject, pair, seed) is not None
    keep = matrix.spec.keep_examples  # a shard without examples is made again
    return not keep and shard_path(matrix.path(subject, pair, seed), span).exists()


def _evaluated(matrix: Matrix, subjects: Sequence[Subject]) -> Results:
    """The records of the networks, with what was evaluated into the folder before; written."""
    spec, records = matrix.spec, list[Record]()
    for subject in subjects:
        chosen = pairs(matrix.attacks, matrix.threats)
        records += [record.model_copy(update={"warnings": (*subject.warnings, *record.warnings)})
                    for record in matrix.attack(subject, chosen, spec.seeds[0])]
    results = anchored(Results(judged(records)), spec.out)
    if (spec.out / RECORDS).exists():
        earlier = load([spec.out])
        again = {_identity(record) for record in records}
        now = {(record.source, record.checkpoint): record for record in records}
        kept = [record for record in earlier.records if _identity(record) not in again
                and _same(record, now.get((record.source, record.checkpoint), record))]
        results = replace(earlier, records=[*kept, *results.records])
    render(results, spec.out)
    return results


def _same(one: Record, other: Record) -> bool:
    """Whether they are of one network: a file may hold other weights than it did before."""
    return one.weights_sha256 == other.weights_sha256 and alike(one.fingerprint, other.fingerprint)


def _identity(record: Record) -> tuple[object, ...]:
    return (record.source, record.weights_sha256, record.attack, record.attack_seed, record.threat,
            record.data_sha256)


def _facts(network: Network) -> dict[str, Any]:
    """What is known about a network from outside; a robench checkpoint says more."""
    header = network.header
    return {
        "run": "",
        "seed": header.seed if header else 0,
        "model": network.model,
        "source": network.source,
        "defense": header.defense if header else network.source,
        "defense_config": {},
        "recipe": header.recipe if header else "",
        "epochs": 0,
        "train_seconds": 0.0,
        "teacher_seconds": 0.0,
        "selection": header.selection if header else "unknown",
        "checkpoint": header.checkpoint if header else "",
        "epoch": header.epoch if header else -1,
        "ranked": True,
        "baseline": False,
        "teacher_sha256": {},
        "notes": network.notes,
    }
