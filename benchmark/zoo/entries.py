"""What the installed robustbench says about its models: published accuracies and licenses.

Both stand in the files that every installation has beside the package: its README holds the
tables of the leaderboards, its LICENSE the terms of the weights. Nothing is imported, and nothing
is known that they do not say. The package ships no `model_info`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from robench.benchmark.zoo.package import INSTALL
from robench.errors import UsageError

UNKNOWN = "unknown"
# Entries of its ImageNet tables whose weights are torchvision's, which states no license for them.
TORCHVISION = {("imagenet", "Standard_R50"), ("imagenet", "AlexNet")}

_SECTION = re.compile(r"### (CIFAR-100|CIFAR-10|ImageNet)\s*")
_TABLE = re.compile(r"#### (?:(Linf|L2), eps=([\d./]+)|(?:Common )?Corruptions\b.*)\s*")
_DEFAULT = re.compile(r"All weights .*?Model Zoo are released under the (\S+) license except", re.S)
_TERMS = re.compile(r"- (?P<datasets>[\w/-]+), (?P<threats>[\w/]+), (?P<name>[\w-]+\*?): "
                    r"(?P<license>[^;]+); *(?P<copyright>.*)")


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo, with what RobustBench publishes about it; None where it does not.

    Attributes:
        threat, eps: of the table it is in; "corruptions" has no eps.
        clean: accuracy in percent on the test images.
        robust: accuracy in percent: under AutoAttack, or under an attack of others that was found
            to be stronger, or on the corrupted images.
        license: of the weights, as RobustBench states it, else "unknown".
    """

    name: str
    dataset: str
    threat: str
    eps: str
    architecture: str
    clean: float | None
    robust: float | None
    venue: str
    paper: str
    license: str


def zoo_models(dataset: str | None = None, threat: str | None = None) -> list[ZooModel]:
    """The models of the installed robustbench, in the order of its tables.

    threat is "Linf", "L2", "corruptions", or with the eps, "Linf:8/255". Raises UsageError: it is
    not installed, its README is of another form, or there are no such models.
    """
    installed = _installed()
    terms = Terms.read(installed)
    every = [_model(place, cells, terms) for place, cells in _rows(_text(installed, "METADATA"))]
    if not every:
        raise UsageError(f"robustbench {installed.version} describes its models in another form "
                         "than 1.1.1: they can be loaded, but not listed")
    norm, _, eps = (threat or "").partition(":")
    found = [m for m in every if dataset in (None, m.dataset) and norm in ("", m.threat)
             and eps in ("", m.eps)]
    if not found:
        known = sorted({f"{m.dataset} {m.threat}" + f":{m.eps}" * bool(m.eps) for m in every})
        raise UsageError(f"the zoo has no models for {dataset or 'any data set'} under "
                         f"{threat or 'any threat'}; it has them for {', '.join(known)}")
    return found


def license_of(name: str, dataset: str, threat: str) -> str:
    """The license of a model's weights, as the installed robustbench states it, or "unknown"."""
    try:
        return Terms.read(_installed()).of(name, dataset, threat)
    except UsageError:
        return UNKNOWN


@dataclass(frozen=True)
class Terms:
    """The LICENSE of robustbench: a license for all weights, and the exceptions to it."""

    default: str
    exceptions: tuple[re.Match[str], ...]

    @classmethod
    def read(cls, installed: Distribution) -> Terms:
        text = _text(installed, "LICENSE", "licenses/LICENSE")
        default = _DEFAULT.search(text)
        lines = (_TERMS.fullmatch(line.strip()) for line in text.splitlines())
        return cls(default[1] if default else UNKNOWN, tuple(line for line in lines if line))

    def of(self, name: str, dataset: str, threat: str) -> str:
        if (dataset, name) in TORCHVISION:
            return UNKNOWN
        for line in self.exceptions:
            datasets = line["datasets"].lower().replace("-", "").split("/")
            if (dataset in datasets and threat in line["threats"].split("/")
                    and fnmatchcase(name, line["name"])):
                return f"{line['license']}; {line['copyright']}".strip("; ")
        return self.default


def _installed() -> Distribution:
    try:
        return distribution("robustbench")
    except PackageNotFoundError:
        raise UsageError(f"robustbench is not installed: {INSTALL}") from None


def _text(installed: Distribution, *names: str) -> str:
    return next(filter(None, map(installed.read_text, names)), "")


def _rows(readme: str) -> Iterable[tuple[tuple[str, str, str], list[str]]]:
    """((data set, threat, eps), cells) of each row of its tables, without their markup."""
    dataset, table = "", None
    for line in readme.splitlines():
        if line.startswith("#"):
            section, table = _SECTION.fullmatch(line), _TABLE.fullmatch(line)
            if section:
                dataset = section[1].lower().replace("-", "")
            elif table is None and not line.startswith("####"):
                dataset = ""
        elif table and dataset and line.startswith("| <sub>**"):
            plain = re.sub(r"</?su[bp]>|<br>", "", line).strip().strip("|")
            cells = [cell.strip().strip("*") for cell in plain.split("|")]
            if len(cells) == 7:
                yield (dataset, table[1] or "corruptions", table[2] or ""), cells


def _model(place: tuple[str, str, str], cells: list[str], terms: Terms) -> ZooModel:
    dataset, threat, eps = place
    _, name, paper, clean, robust, architecture, venue = cells
    link = re.fullmatch(r"\[.*\]\((.*)\)", paper)
    return ZooModel(name, dataset, threat, eps, architecture, _percent(clean), _percent(robust),
                    venue, link[1] if link else "", terms.of(name, dataset, threat))


def _percent(text: str) -> float | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    return float(found[1]) if found else None
