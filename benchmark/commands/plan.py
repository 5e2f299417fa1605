"""robench plan."""

from __future__ import annotations

from typing import Any

import click

from robench.benchmark.commands.train import run, specs_of


@click.command(params=[option for option in run.params if option.name != "teacher"], epilog="""\b
Examples:
  robench plan --defense peeraid --baseline trades
  robench plan --defense all --dataset cifar10 --dataset cifar100 --model resnet18 --seeds 0,1,2
""")
def plan(quiet: bool, **given: Any) -> None:
    """Say what `run` with the same options would do, what is there already, and how long the rest
    may take. Runs nothing, and reads no data whose shape it knows."""
    specs = specs_of(given)

    from robench.benchmark.plan import Plan

    click.echo(Plan.of(specs).text(), nl=False)
