"""robench gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robench.benchmark.commands.attack import of_eval
from robench.benchmark.commands.options import values_of


@click.command(params=of_eval("sources", "precision"), epilog="""\b
Examples:
  robench gallery runs/cells/*/swa.safetensors --out runs
  robench gallery a.safetensors --attack autoattack --images 16 --dataset cifar10 --data-root data
""")
@click.option("--attack", default="pgd-20", show_default=True, metavar="NAME[,key=value...]",
              help="As for `robench eval`.")
@click.option("--images", type=int, default=8, show_default=True, metavar="N",
              help="The first N images of the test set that the network gets right.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where gallery.jsonl and the reports go, beside what is there.  "
              "[default: runs/gallery]")
def gallery(
    sources: tuple[str, ...], attack: str, images: int, seed: int | None, zoo: Path, quiet: bool,
    **given: Any,
) -> None:
    """Show images before and after an attack on networks."""
    values = {"out": Path("runs/gallery"), **values_of(given), "attacks": (attack,)}
    if seed is not None:
        values["seeds"] = (seed,)

    from robench.benchmark.gallery import galleries
    from robench.benchmark.spec import RunSpec
    from robench.reports.pictures import pictures_text

    spec = RunSpec.create(values)
    results = galleries(sources, spec, images, zoo=zoo, quiet=quiet)
    click.echo(pictures_text(results), nl=False)
    click.echo(f"wrote {spec.out}/gallery.jsonl and figures/", err=True)
