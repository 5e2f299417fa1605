"""transfer: every network on the examples of every other, kept source by source."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import robench
from robench.benchmark.evaluate import BATCH
from robench.benchmark.kept import kept_survey
from robench.benchmark.matrix import Subject
from robench.benchmark.spec import RunSpec, digest
from robench.benchmark.surveys import Bench, attack_facts, write
from robench.benchmark.transfer import crafting, transferred
from robench.errors import UsageError
from robench.files import write_atomic
from robench.reports.record import Crossing, Shown
from robench.reports.store import Results

LIMIT = 1000


def crossings(
    sources: Sequence[str], spec: RunSpec, *, zoo: Path = Path("models"), quiet: bool = True
) -> Results:
    """Craft examples against each network, show them to all of its seed, and write the reports to
    `spec.out`.

    Sources are given as for `eval`, or as runs: then with peers and teachers. Networks whose
    examples were shown to the same ones before are taken as they are. Other results in the folder
    stay. Returns all that the folder holds. Raises like `eval`, and UsageError where no two
    networks share a seed.
    """
    bench = Bench.create(sources, spec, LIMIT, partners=True, zoo=zoo, quiet=quiet)
    subjects = {subject.weights: subject
                for network in bench.networks for subject in [bench.subject(network, "transfer")]}
    seeds = Counter(subject.facts["seed"] for subject in subjects.values())
    if max(seeds.values(), default=0) < 2:
        raise UsageError("name two networks or more that were trained with one seed")
    found = (
        _crossing(subject, bench, {key: other for key, other in subjects.items()
                                   if other.facts["seed"] == subject.facts["seed"]})
        for subject in subjects.values()
    )
    return write(spec.out, "crossings", found, _identity)


def _crossing(subject: Subject, bench: Bench, shown: Mapping[str, Subject]) -> Crossing:
    """The examples of one network on all of its seed, measured or taken from an earlier run."""
    matrix, how = bench.matrix, attack_facts(crafting(bench.matrix.threat))
    seed = matrix.spec.seeds[0]
    name = digest({
        **how, "threat": str(matrix.threat), "data": bench.images.sha256(), "seed": seed,
        "networks": [[key, other.facts["model"]] for key, other in
                     [(subject.weights, subject), *sorted(shown.items())]],
        "robench": robench.__version__,
    })
    path = subject.folder / f"{name}.json"
    crossing = kept_survey(path, Crossing, subject.fingerprint)
    if crossing is not None:
        known = [one.model_copy(update=shown[one.weights_sha256].facts) for one in crossing.shown]
        return crossing.model_copy(update={**subject.facts, "shown": tuple(known)})
    began = time.perf_counter()
    with matrix.reporter.task(f"{subject.label}: its examples on {len(shown)} networks") as update:
        counts = transferred(
            subject.net, {key: other.net for key, other in shown.items()}, bench.images,
            matrix.threat, seed=seed, batch_size=matrix.spec.batch_size or BATCH, show=update)
    crossing = Crossing(
        **bench.survey(subject), **how, attack_seed=seed, seconds=time.perf_counter() - began,
        shown=tuple(Shown(**other.facts, weights_sha256=key, clean=counts[key].clean,
                          right=counts[key].right, kept=counts[key].kept)
                    for key, other in shown.items()),
    )
    write_atomic(path, crossing.model_dump_json(indent=1) + "\n")
    return crossing


def _identity(one: Crossing) -> tuple[object, ...]:
    """What a later measurement replaces."""
    return (one.weights_sha256, one.threat, one.attack, one.data_sha256, one.attack_seed)
