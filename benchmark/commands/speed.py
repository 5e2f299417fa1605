"""robench speed attack, train and scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robench.benchmark.commands.attack import of_eval
from robench.benchmark.commands.options import integers, values_of


@click.group()
def speed() -> None:
    """Measure how long things take."""


@speed.command(params=of_eval("batch_size"), epilog="""\b
Examples:
  robench speed attack runs/cells/*/best.safetensors --precision exact,bf16
  robench speed attack --dataset cifar10 --data-root data --model resnet18 --train-steps 300
""")
@click.argument("sources", nargs=-1, metavar="[NETWORK...]")
@click.option("--attack", "task", default="autoattack", show_default=True, metavar="NAME",
              help="autoattack, against pyautoattack, or pgd-20, against torchattacks.")
@click.option("--precision", "precisions", default="exact", show_default=True, metavar="LIST",
              help="Of ours: exact,bf16,ieee, or some of them.")
@click.option("--limit", type=int, metavar="N",
              help="Attack the first N test images.  [default: 32, or all there are]")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Runs of each implementation, in turn.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of torch.")
@click.option("--train-steps", type=click.IntRange(min=1), metavar="N",
              help="Without a NETWORK: train --model that long, by pgd-at and standard.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where speed.md and speed.csv go, and what was trained.  "
              "[default: runs/speed]")
def attack(
    sources: tuple[str, ...], task: str, precisions: str, repeats: int, threads: int | None,
    train_steps: int | None, zoo: Path, quiet: bool, **given: Any,
) -> None:
    """Time an attack here and in the library that everybody uses, on the same images."""
    values = {"out": Path("runs/speed"), **values_of(given)}

    from robench.benchmark.spec import RunSpec
    from robench.benchmark.speed import speed_attack

    spec = RunSpec.create(values)
    click.echo(speed_attack(
        sources, spec, task=task, precisions=precisions.split(","), repeats=repeats,
        threads=threads, train_steps=train_steps, zoo=zoo, quiet=quiet,
    ), nl=False)
    click.echo(f"wrote {spec.out}/speed.md and .csv", err=True)


@speed.command(params=[option for option in of_eval() if option.name != "zoo"], epilog="""\b
Examples:
  robench speed train --model small-resnet --threads 1
  robench speed train --defense trades --dataset cifar10 --data-root data --steps 20
""")
@click.option("--defense", "defenses", multiple=True, metavar="NAME",
              help="Repeatable.  [default: pgd-at, trades, rslad, peeraid]")
@click.option("--batch-size", type=click.IntRange(min=2), default=128, show_default=True,
              metavar="N", help="Of the training.")
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True, metavar="N",
              help="Of each implementation in each repeat.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Runs of each implementation, in turn.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of torch.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where speed-train.md and .csv go.  [default: runs/speed]")
def train(
    batch_size: int, steps: int, repeats: int, threads: int | None, quiet: bool,
    **given: Any,
) -> None:
    """Time trainings, of resnet18 if not told otherwise, here and in a plain loop.

    On random images unless a --dataset is named.
    """
    values = {"out": Path("runs/speed"), **values_of(given)}

    from robench.benchmark.spec import RunSpec
    from robench.benchmark.speed_train import speed_train

    spec = RunSpec.create(values)
    click.echo(speed_train(spec, batch_size=batch_size, steps=steps, repeats=repeats,
                           threads=threads, quiet=quiet), nl=False)
    click.echo(f"wrote {spec.out}/speed-train.md and .csv", err=True)


@speed.command(params=[option for option in of_eval("limit", "batch_size")
                       if option.name != "zoo"], epilog="""\b
Examples:
  robench speed scale
  robench speed scale --tasks 200 --shards 1,4 --attack pgd-20 --limit 100
""")
@click.option("--tasks", type=click.IntRange(min=2), default=1000, show_default=True, metavar="N",
              help="At most so many for each executor, which find their files.")
@click.option("--shards", default="1,2,4,8", show_default=True, metavar="LIST",
              help="Numbers of shards of the attack.")
@click.option("--attack", default="autoattack", show_default=True, metavar="NAME[,key=value...]",
              help="The one that is cut into shards.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Runs of each, in turn.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Of torch, in each process.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where speed-scale.csv, .md, .png and .svg go, and what was trained.  "
              "[default: runs/speed-scale]")
def scale(
    tasks: int, shards: str, attack: str, repeats: int, quiet: bool, **given: Any
) -> None:
    """Time what executors and shards take besides the work: seconds for each task and shard."""
    values = {"out": Path("runs/speed-scale"), **values_of({**given, "attacks": (attack,)})}

    from robench.benchmark.spec import RunSpec
    from robench.benchmark.speed_scale import speed_scale

    spec = RunSpec.create(values)
    click.echo(speed_scale(spec, tasks=tasks, shards=integers(shards, "--shards"),
                           repeats=repeats, quiet=quiet), nl=False)
    click.echo(f"wrote {spec.out}/speed-scale.md, .csv, .png and .svg", err=True)
