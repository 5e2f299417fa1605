"""robench zoo."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from robench.benchmark.zoo.entries import ZooModel


@click.group()
def zoo() -> None:
    """Show the models that others trained."""


@zoo.command("list", epilog="""\b
Examples:
  robench zoo list --dataset cifar10 --threat Linf
  robench zoo list --format json
  robench eval robustbench:Rice2020Overfitting --dataset cifar10 --data-root data
""")
@click.option("--dataset", metavar="NAME", help="cifar10, cifar100 or imagenet.")
@click.option("--threat", metavar="NORM[:EPS]", help="Linf, L2, corruptions, or Linf:8/255.")
@click.option("--format", "form", type=click.Choice(("table", "csv", "json")), default="table",
              show_default=True, help="How to write it to stdout.")
def list_(dataset: str | None, threat: str | None, form: str) -> None:
    """The models of the installed robustbench: architecture, published accuracy, license.

    Accuracies are RobustBench's, in percent, none of them measured here. Robust is under
    AutoAttack or under an attack of others that was found to be stronger, and for corruptions on
    the corrupted images.
    """
    from robench.benchmark.zoo.entries import zoo_models

    click.echo(WRITERS[form](zoo_models(dataset, threat)), nl=False)


def as_table(models: Sequence[ZooModel]) -> str:
    from robench.reports.text import NOTHING, Board, Cell, Column, markdown

    def words(title: str, texts: Sequence[str]) -> Column:
        return Column(title, tuple(Cell(text or NOTHING) for text in texts), words=True)

    def numbers(title: str, values: Sequence[float | None]) -> Column:
        return Column(title, tuple(Cell(NOTHING if v is None else f"{v:.2f}") for v in values))

    return markdown(Board(
        f"{len(models)} models of the RobustBench zoo", (
            words("Model", [m.name for m in models]),
            words("Data", [m.dataset for m in models]),
            words("Threat model", [f"{m.threat}:{m.eps}".rstrip(":") for m in models]),
            words("Architecture", [m.architecture for m in models]),
            numbers("Clean %", [m.clean for m in models]),
            numbers("Robust %", [m.robust for m in models]),
            words("License of the weights", [m.license for m in models]),
        ), ("Accuracies as RobustBench publishes them; nothing here was measured by robench",)))


def as_csv(models: Sequence[ZooModel]) -> str:
    from dataclasses import asdict

    out = io.StringIO()
    writer = csv.DictWriter(out, asdict(models[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(model) for model in models)
    return out.getvalue()


def as_json(models: Sequence[ZooModel]) -> str:
    from dataclasses import asdict

    return json.dumps([asdict(model) for model in models], indent=1, ensure_ascii=False) + "\n"


WRITERS = {"table": as_table, "csv": as_csv, "json": as_json}
