"""What commands that look at given networks share: from the command line to the files of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from robench.attacks.ascent import Ascent
from robench.benchmark.checks import check_logits
from robench.benchmark.data import Images
from robench.benchmark.matrix import Matrix, Subject
from robench.benchmark.origin import expand, facts
from robench.benchmark.progress import Reporter
from robench.benchmark.provenance import environment
from robench.benchmark.sources import Network, load_network
from robench.benchmark.spec import RunSpec
from robench.files import locked
from robench.reports import Results, load, render
from robench.reports.record import Survey
from robench.reports.store import RECORDS

Split = Literal["test", "train"]
S = TypeVar("S", bound=Survey)


@dataclass(frozen=True)
class Bench:
    """Networks on a device and the images that they are looked at on."""

    matrix: Matrix
    networks: list[Network]
    images: Images
    split: Split

    @classmethod
    def create(
        cls, sources: Sequence[str], spec: RunSpec, limit: int | None = None, *,
        split: Split = "test", partners: bool = False, zoo: Path = Path("models"),
        quiet: bool = True,
    ) -> Bench:
        """Load networks given as for `eval`, or as runs (see `origin.expand`).

        The first spec.limit images are looked at, else `limit` of them if that many are there, or
        all.
        Raises UsageError for what is wrong with the request.
        """
        # The number of images is the command's own: it may be of training images.
        matrix = Matrix(spec.model_copy(update={"limit": None}), Reporter(quiet=quiet))
        given = matrix.dataset.train if split == "train" else matrix.test
        images = given.take(spec.limit or min(limit or len(given), len(given))).fitted()
        images = images.checked(len(matrix.dataset.classes))
        networks = [load_network(source, matrix.dataset, matrix.threat, model=spec.model, zoo=zoo,
                             reporter=matrix.reporter)
                    for source in expand(sources, partners=partners)]
        for network in networks:
            check_logits(network.net.to(matrix.device), matrix.probe, matrix.test.y)
        return cls(matrix, networks, images, split)

    def subject(self, network: Network, folder: str) -> Subject:
        """A network with what is known about it; what is measured is kept in that folder."""
        return Subject(network.net, self.matrix.spec.out / folder, network.source,
                       facts(network, self.matrix.dataset.name), self.matrix.probe)

    def survey(self, subject: Subject) -> dict[str, Any]:
        """The fields of a Survey that are known before it, but for the attack and the time."""
        machine = environment(self.matrix.device)
        del machine["peak_bytes"]
        return {**subject.facts, **machine, "weights_sha256": subject.weights,
                "fingerprint": subject.fingerprint, "split": self.split, "n": len(self.images),
                "data_sha256": self.images.sha256(), "threat": str(self.matrix.threat)}


def attack_facts(attack: Ascent) -> dict[str, Any]:
    """The fields of a Survey that say what was attacked with."""
    return {"attack": f"pgd-{attack.steps}", "attack_config": {
        "steps": attack.steps, "step_size": attack.step_size, "start": attack.start}}


def write(out: Path, field: str, found: Iterable[S], identity: Callable[[S], object]) -> Results:
    """Write the reports of all that a folder holds, in which `found` takes the place of earlier
    surveys of the same identity in that field of Results. Nobody else works in the folder while
    they are made."""
    with locked(out):
        made = list(found)
        earlier = load([out]) if (out / RECORDS).exists() else Results()
        again = {identity(one) for one in made}
        kept = [one for one in getattr(earlier, field) if identity(one) not in again]
        changed: dict[str, Any] = {field: [*kept, *made]}
        results = replace(earlier, **changed)
        render(results, out)
    return results
