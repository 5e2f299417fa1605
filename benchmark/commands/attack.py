"""robench eval, parity and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robench.benchmark.commands.options import (
    require_trust,
    seconds_of,
    shared,
    show,
    values_of,
    workers,
)
from robench.errors import Partial


@click.command("eval", epilog="""\b
Examples:
  robench eval runs/cells/*/best.safetensors
  robench eval my_package.nets:trained --dataset cifar10 --data-root data --limit 1000
  robench eval weights.pt --model resnet18 --dataset cifar10 --data-root data
  robench eval robustbench:Carmon2019Unlabeled --dataset cifar10 --data-root data
  robench eval timm:resnet18,file=weights.safetensors --dataset cifar10 --data-root data
""")
@click.argument("sources", nargs=-1, required=True, metavar="NETWORK...")
@click.option("--seed", type=int, help="Of the attacks.  [default: 0]")
@click.option("--budget", metavar="TIME", help="Stop the attacks after 90s, 10m or 2h and report "
              "what is known by then.")
@click.option("--replay", type=click.Path(path_type=Path), metavar="FILE",
              help="Examples of --keep-examples to look at first; tables say so.")
@click.option("--zoo", type=click.Path(path_type=Path), default=Path("models"), metavar="DIR",
              show_default=True, help="Where RobustBench's weights lie or are put.")
@workers("1")
@shared()
def evaluate(
    sources: tuple[str, ...], budget: str | None, replay: Path | None, zoo: Path,
    quiet: bool, **given: Any,
) -> None:
    """Attack networks: files, package.module:factory, robustbench:NAME, timm:NAME,
    torchvision:NAME, hf:ORG/REPO."""
    values = {"out": Path("runs/eval"), **values_of(given)}

    from robench.benchmark.external import evaluate_external
    from robench.benchmark.spec import RunSpec

    seconds = None if budget is None else seconds_of(budget)
    spec = RunSpec.create(values)
    try:
        results = evaluate_external(sources, spec, zoo=zoo, quiet=quiet, budget=seconds,
                                    replay=replay)
    except Partial as error:
        show(error.results, values)
        raise
    show(results, values)
    require_trust(r for r in results.records if r.source in sources)


def of_eval(*names: str) -> list[click.Parameter]:
    """The options that mean what they mean for `eval`, and one threat model."""
    names = ("config", "dataset", "data_root", "download", "model", "device", "seed",
             "memory_limit", "zoo", "quiet", *names)
    one = click.Option(["--threat", "threats"], metavar="NORM:EPS",
                       help="For example Linf:8/255 or L2:0.5.")
    return [one if parameter.name == "threats" else parameter
            for parameter in evaluate.params if parameter.name in ("threats", *names)]


@click.command(params=of_eval("sources", "precision"), epilog="""\b
Examples:
  robench parity runs/cells/*/best.safetensors
  robench parity weights.pt --model resnet18 --dataset cifar10 --data-root data --limit 1000
""")
@click.option("--limit", type=int, metavar="N",
              help="Compare on the first N test images.  [default: 1000, or all there are]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where parity.md, parity.csv and parity-images.csv go.  "
              "[default: runs/parity]")
def parity(
    sources: tuple[str, ...], zoo: Path, quiet: bool, **given: Any
) -> None:
    """Compare AutoAttack, PGD, DDN and FMN with other libraries', image by image."""
    values = {"out": Path("runs/parity"), **values_of(given)}

    from robench.benchmark.parity import parity as compare
    from robench.benchmark.spec import RunSpec

    spec = RunSpec.create(values)
    click.echo(compare(sources, spec, zoo=zoo, quiet=quiet), nl=False)
    click.echo(f"wrote {spec.out}/parity.md and .csv", err=True)


@click.command(params=of_eval("sources", "limit"), epilog="""\b
Example:
  robench verify weights.pt --model resnet18 --examples runs/eval/eval/autoattack-0a1b.safetensors
""")
@click.option("--examples", type=click.Path(path_type=Path), metavar="FILE", required=True,
              help="What --keep-examples wrote.")
def verify(
    examples: Path, sources: tuple[str, ...], zoo: Path, quiet: bool,
    **given: Any,
) -> None:
    """Check the examples that --keep-examples wrote again, on the same network or another."""
    from robench.benchmark.examples import verify_file
    from robench.benchmark.spec import RunSpec

    click.echo(verify_file(examples, sources, RunSpec.create(values_of(given)), zoo=zoo), nl=False)
