"""robench zoo list: what the installed robustbench says about its models."""

import csv
import importlib
import io
import json
from importlib.metadata import PackageNotFoundError

import pytest

from robench.benchmark.zoo import entries
from robench.benchmark.zoo.entries import Terms, license_of, zoo_models
from robench.errors import UsageError


def row(number, name, *cells):
    """As the README has it."""
    return " | ".join(["", f"<sub>**{number}**</sub>", f"<sub><sup>**{name}**</sup></sub>",
                       f"<sub>*[Title](https://x.org/{number})*</sub>",
                       *(f"  <sub>{cell}</sub>  " for cell in cells), ""]).strip()


README = f"""\
### CIFAR-10

#### Linf, eps=8/255

| <sub>#</sub> | <sub>Model ID</sub> | <sub>Paper</sub> | ... |
|:---:|---|---|:---:|
{row(1, "New2024A", "too few cells")}
{row(2, "Old2020B_R18", "85.10%", "50.00%", "ResNet-18", "GitHub,<br>Oct 2019")}

#### Common Corruptions

{row(3, "Standard", "94.78%", "?", "WRN", "N/A")}

## Notebooks

{row(1, "No", "1%", "2%", "a", "b")}
"""
LICENSE = """\
All weights of the models in the Model Zoo are released under the MIT license except the following
models which are released under different licenses:
- CIFAR-10/CIFAR-100, Linf/L2/corruptions, Old2020*: Apache License 2.0; Copyright (c) 2021, Google
- CIFAR-10, L2, New2024A: BSD 3-Clause License; Copyright (c) 2018, Somebody
"""


class Fake:
    version = "9.9"

    def __init__(self, **files):
        self.files = files

    def read_text(self, name):
        return self.files.get(name)


@pytest.fixture
def fake(monkeypatch):
    def make(**files):
        monkeypatch.setattr(entries, "distribution", lambda name: Fake(**files))

    return make


def test_what_a_readme_says(fake):
    fake(METADATA=README, LICENSE=LICENSE)
    old, standard = zoo_models()
    assert (old.name, old.dataset, old.threat, old.eps) == (
        "Old2020B_R18", "cifar10", "Linf", "8/255")
    assert (old.architecture, old.clean, old.robust) == ("ResNet-18", 85.1, 50.0)
    assert (old.venue, old.paper) == ("GitHub,Oct 2019", "https://x.org/2")
    assert old.license == "Apache License 2.0; Copyright (c) 2021, Google"
    assert (standard.threat, standard.eps, standard.robust, standard.license) == (
        "corruptions", "", None, "MIT")


def test_the_terms_of_a_license():
    terms = Terms.read(Fake(LICENSE=LICENSE))
    assert terms.of("New2024A", "cifar10", "L2").startswith("BSD 3-Clause")
    assert terms.of("New2024A", "cifar10", "Linf") == "MIT"
    assert terms.of("Old2020B", "cifar100", "corruptions").startswith("Apache")
    assert terms.of("Old2020B", "imagenet", "Linf") == "MIT"
    assert terms.of("Standard_R50", "imagenet", "Linf") == "unknown"  # torchvision's weights


def test_a_license_of_another_form_says_nothing(fake):
    fake(LICENSE="Permission is hereby granted to all")
    assert license_of("Old2020B_R18", "cifar10", "Linf") == "unknown"
    fake()
    assert license_of("Old2020B_R18", "cifar10", "Linf") == "unknown"


def test_a_readme_of_another_form(fake):
    fake(METADATA="# RobustBench", LICENSE=LICENSE)
    with pytest.raises(UsageError, match="robustbench 9.9 describes its models in another form"):
        zoo_models()


def test_without_the_package(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(entries, "distribution", missing)
    with pytest.raises(UsageError, match="robustbench is not installed: pip install"):
        zoo_models()
    assert license_of("Standard", "cifar10", "Linf") == "unknown"


def test_models_that_are_not_there(fake):
    fake(METADATA=README, LICENSE=LICENSE)
    with pytest.raises(UsageError, match="no models for digits under any threat; it has them for "
                                         "cifar10 Linf:8/255, cifar10 corruptions"):
        zoo_models("digits")
    with pytest.raises(UsageError, match="no models for cifar10 under Linf:4/255"):
        zoo_models("cifar10", "Linf:4/255")
    assert [m.name for m in zoo_models("cifar10", "corruptions")] == ["Standard"]


# The installed one


def test_all_models_of_the_installed_package_are_listed(robustbench):
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    loadable = {(data.value, threat.value, name) for data, threats in models.items()
                for threat, some in threats.items() if threat.value != "corruptions_3d"
                for name in some}
    listed = zoo_models()
    assert {(m.dataset, m.threat, m.name) for m in listed} == loadable
    assert all(m.architecture and m.clean is not None and m.robust is not None for m in listed)


def test_the_command(robustbench, robench):
    done = robench("zoo", "list", "--dataset", "cifar10", "--threat", "L2:0.5")
    assert (done.code, done.err) == (0, "")
    line = next(line for line in done.out.splitlines() if "Rony2019Decoupling" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "Rony2019Decoupling", "cifar10", "L2:0.5", "WideResNet-28-10", "89.05", "66.44",
        "BSD 3-Clause License; Copyright (c) 2018, Jerome Rony"]

    done = robench("zoo", "list", "--threat", "Linf", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert {row["dataset"] for row in rows} == {"cifar10", "cifar100", "imagenet"}
    carmon = next(row for row in rows if row["name"] == "Carmon2019Unlabeled")
    assert (carmon["clean"], carmon["robust"], carmon["license"]) == ("89.69", "59.53", "MIT")

    done = robench("zoo", "list", "--dataset", "cifar100", "--format", "json")
    assert len(json.loads(done.out)) == len(zoo_models("cifar100"))

    done = robench("zoo", "list", "--dataset", "digits")
    assert (done.code, done.err.count("\n")) == (2, 1)
