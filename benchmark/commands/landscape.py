"""robench landscape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robench.benchmark.commands.attack import of_eval
from robench.benchmark.commands.options import values_of


@click.command(params=of_eval("sources", "batch_size"), epilog="""\b
Examples:
  robench landscape runs/cells/*/swa.safetensors
  robench landscape a.safetensors b.safetensors --kind weight-2d --dataset cifar10 --data-root data
""")
@click.option("--kind", type=click.Choice(["weight", "weight-2d", "input"]), default="weight",
              show_default=True, help="Around the weights, along lines or over a plane; or over a "
              "plane around each image.")
@click.option("--points", type=int, metavar="N",
              help="On each axis, odd.  [default: 51, on a plane 21]")
@click.option("--directions", type=int, metavar="N",
              help="Random ones, of the kind weight.  [default: 5]")
@click.option("--steps", type=int, metavar="N",
              help="Of PGD, whose examples are crafted anew at every point.  [default: 10]")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True,
              help="Whose images.")
@click.option("--limit", type=int, metavar="N",
              help="The first N images.  [default: 200, or all there are]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where landscape.jsonl and the reports go, beside what is there.  "
              "[default: runs/landscape]")
def landscape(
    sources: tuple[str, ...], kind: Any, points: int | None, directions: int | None,
    steps: int | None, split: Any, zoo: Path, quiet: bool, **given: Any,
) -> None:
    """Draw the loss around networks and say how sharp it is."""
    values = {"out": Path("runs/landscape"), **values_of(given)}

    from robench.benchmark.landscape import Survey
    from robench.benchmark.landscapes import landscapes
    from robench.benchmark.spec import RunSpec
    from robench.reports.landscape import sharpness_text

    spec = RunSpec.create(values)
    survey = Survey.create(kind, points, directions, steps)
    results = landscapes(sources, spec, survey, split=split, zoo=zoo, quiet=quiet)
    click.echo(sharpness_text(results), nl=False)
    click.echo(f"wrote {spec.out}/landscape.jsonl, landscape.csv and figures/", err=True)
