"""landscape: survey networks, keep what was surveyed, write the reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import robench
from robench.attacks.threat import ThreatModel
from robench.benchmark.evaluate import BATCH
from robench.benchmark.kept import kept_survey
from robench.benchmark.landscape import Line, Survey, survey_lines
from robench.benchmark.sources import Network
from robench.benchmark.spec import RunSpec, digest
from robench.benchmark.surveys import Bench, Split, attack_facts, write
from robench.files import write_atomic
from robench.reports.compare import alike
from robench.reports.record import Landscape
from robench.reports.store import Results

LIMIT = 200


def landscapes(
    sources: Sequence[str], spec: RunSpec, survey: Survey, *, split: Split = "test",
    zoo: Path = Path("models"), quiet: bool = True,
) -> Results:
    """Survey networks given as for `eval`, or as runs, and write the reports to `spec.out`.

    Finished networks are taken as they are; one that was interrupted goes on after its last
    line. Other results in the folder stay. Returns all that the folder holds. Raises like `eval`.
    """
    bench = Bench.create(sources, spec, LIMIT, split=split, zoo=zoo, quiet=quiet)
    found = (_landscape(network, bench, survey) for network in bench.networks)
    return write(spec.out, "landscapes", found, _identity)


def _landscape(network: Network, bench: Bench, survey: Survey) -> Landscape:
    """The landscape of one network, computed or taken from an earlier run."""
    matrix, images = bench.matrix, bench.images
    seed, subject = matrix.spec.seeds[0], bench.subject(network, "landscape")
    how = {**_how(survey, matrix.threat), "data_sha256": images.sha256(), "split": bench.split,
           "direction_seed": seed, "weights_sha256": subject.weights}
    name = digest({**how, "network": [network.source, network.model],
                   "lines": survey.lines, "robench": robench.__version__})
    path = subject.folder / f"{survey.kind}-{name}.json"
    landscape = kept_survey(path, Landscape, subject.fingerprint)
    if landscape is not None:
        return landscape.model_copy(update=subject.facts)
    label = f"{network.source}: {survey.kind} landscape on {len(images)} {bench.split} images"
    with matrix.reporter.task(label) as update:
        begun = Begun.read(path.with_suffix(".partial"), subject.fingerprint)
        lines, began = list(begun.losses), time.perf_counter() - begun.seconds
        for line in survey_lines(
            survey, network.net, images, matrix.threat, seed=seed, first=len(lines), show=update,
            batch_size=matrix.spec.batch_size or BATCH,
        ):
            lines.append(line)
            begun = Begun(fingerprint=subject.fingerprint, losses=tuple(lines),
                          seconds=time.perf_counter() - began)
            write_atomic(path.with_suffix(".partial"), begun.model_dump_json())
    landscape = Landscape(**{**bench.survey(subject), **how}, losses=begun.losses,
                          seconds=begun.seconds)
    write_atomic(path, landscape.model_dump_json(indent=1) + "\n")
    path.with_suffix(".partial").unlink(missing_ok=True)
    return landscape


class Begun(BaseModel):
    """The lines of a landscape that an interrupted run had finished."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    fingerprint: tuple[float, ...] = ()
    losses: tuple[Line, ...] = ()
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path, fingerprint: tuple[float, ...]) -> Begun:
        """Nothing if it is not there, damaged, or of a network that gives other logits."""
        try:
            begun = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return cls()
        return begun if alike(begun.fingerprint, fingerprint) else cls()


def _how(survey: Survey, threat: ThreatModel) -> dict[str, Any]:
    """The fields of a Landscape that say what was looked at."""
    how: dict[str, Any] = {"kind": survey.kind, "threat": str(threat), "alphas": survey.alphas,
                           "attack": "", "attack_config": {}}
    return how | (attack_facts(survey.attack(threat)) if survey.steps else {})


def _identity(landscape: Landscape) -> tuple[object, ...]:
    """What a later survey replaces."""
    return (landscape.source, landscape.weights_sha256, landscape.kind, landscape.threat,
            landscape.attack, landscape.data_sha256, landscape.split, landscape.direction_seed,
            landscape.alphas, len(landscape.losses))
