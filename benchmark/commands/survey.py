"""robench gallery, transfer, steps and corruptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robench.benchmark.commands.attack import of_eval
from robench.benchmark.commands.options import values_of

if TYPE_CHECKING:
    from robench.benchmark.spec import RunSpec

GIVEN = of_eval("sources", "batch_size")
LIMIT = click.option("--limit", type=int, metavar="N",
                     help="The first N test images.  [default: 1000, or all there are]")
OUT = click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
                   help="Where the reports go, beside what is there.  [default: the run that is "
                   "named first, else runs/NAME, the name of the command]")


@click.command(params=of_eval("sources", "precision"), epilog="""\b
Examples:
  robench gallery runs
  robench gallery a.safetensors --attack autoattack --images 16 --dataset cifar10 --data-root data
""")
@click.option("--attack", default="pgd-20", show_default=True, metavar="NAME[,key=value...]",
              help="As for `robench eval`.")
@click.option("--images", type=int, default=8, show_default=True, metavar="N",
              help="The first N images of the test set that the network gets right.")
@OUT
def gallery(
    sources: tuple[str, ...], attack: str, images: int, zoo: Path, quiet: bool,
    **given: Any,
) -> None:
    """Show images before and after an attack: on networks, or the ranked ones of a run."""
    from robench.benchmark.gallery import galleries

    spec = _spec("gallery", sources, {**given, "attacks": (attack,)})
    _tell("gallery", galleries(sources, spec, images, zoo=zoo, quiet=quiet), spec)


@click.command(params=list(GIVEN), epilog="""\b
Examples:
  robench transfer runs
  robench transfer runs/cells/*/best.safetensors other.safetensors --out runs/transfer
""")
@LIMIT
@OUT
def transfer(
    sources: tuple[str, ...], zoo: Path, quiet: bool, **given: Any
) -> None:
    """Show the examples of each network to every other: networks, or all of a run."""
    from robench.benchmark.crossings import crossings

    spec = _spec("transfer", sources, given)
    _tell("transfer", crossings(sources, spec, zoo=zoo, quiet=quiet), spec)


@click.command(params=list(GIVEN), epilog="""\b
Examples:
  robench steps runs
  robench steps runs/cells/*/swa.safetensors --steps 1000 --limit 200
""")
@click.option("--steps", type=int, default=100, show_default=True, metavar="N",
              help="Of PGD, eps / 4 each; fewer are looked at on the way.")
@LIMIT
@OUT
def steps(
    sources: tuple[str, ...], steps: int, zoo: Path, quiet: bool, **given: Any
) -> None:
    """Measure robust accuracy over the steps of PGD: networks, or the ranked ones of a run."""
    from robench.benchmark.steps import over_steps

    spec = _spec("steps", sources, given)
    _tell("over-steps", over_steps(sources, spec, steps, zoo=zoo, quiet=quiet), spec)


@click.command(params=list(GIVEN), epilog="""\b
Examples:
  robench corruptions runs --dataset cifar10 --data-root data --corruptions-root data/CIFAR-10-C
  robench corruptions weights.pt --model resnet18 --dataset cifar100 --data-root data --download
""")
@click.option("--corruptions-root", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder with <corruption>.npy and labels.npy in the layout of CIFAR-10-C, or "
              "the one that has CIFAR-10-C/ or CIFAR-100-C/ in it.  [default: --data-root]")
@click.option("--corruption", "only", multiple=True, metavar="NAME",
              help="Repeatable: these only, for example fog.  [default: all there are]")
@click.option("--limit", type=int, metavar="N",
              help="The first N test images in every version.  [default: all]")
@OUT
def corruptions(
    sources: tuple[str, ...], corruptions_root: Path | None, only: tuple[str, ...], zoo: Path,
    quiet: bool, **given: Any
) -> None:
    """Measure accuracy on corrupted images: networks, or the ranked ones of a run."""
    from robench.benchmark.corruptions import over_corruptions

    spec = _spec("corruptions", sources, given)
    _tell("corruptions", over_corruptions(sources, spec, corruptions_root, only, zoo=zoo,
                                          quiet=quiet), spec)


def _spec(
    name: str, sources: Sequence[str], given: dict[str, Any]
) -> RunSpec:
    from robench.benchmark.spec import RunSpec

    run = next((Path(source) for source in sources if Path(source).is_dir()), Path("runs", name))
    values = {"out": run, **values_of(given)}
    return RunSpec.create(values)


def _tell(name: str, results: Any, spec: RunSpec) -> None:
    from robench.reports.analyses import ANALYSES

    one = ANALYSES[name]
    click.echo(one.text(results), nl=False)
    click.echo(f"wrote {spec.out}/{one.file}, figures/ and leaderboard.html", err=True)
