"""robench run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from robench.benchmark.commands.options import (
    integers,
    require_trust,
    shared,
    show,
    values_of,
    workers,
)
from robench.errors import UsageError

if TYPE_CHECKING:
    from robench.benchmark.spec import RunSpec


@click.command(epilog="""\b
Examples:
  robench run --defense peeraid --baseline trades
  robench run --defense all --baseline pgd-at --seeds 0,1,2
  robench run --defense trades --dataset cifar10 --data-root data --model resnet18
  robench run --defense pgd-at --model my_package.nets:build --set epochs=5 --set lr=0.05
""")
@click.option("--defense", "defenses", multiple=True, metavar="NAME",
              help="Repeatable; `all` is every one.")
@click.option("--baseline", "baselines", multiple=True, metavar="NAME",
              help="A defense to compare with; differences are to the first one.")
@click.option("--recipe", metavar="NAME", help="unified (default) or as-released.")
@click.option("--seeds", metavar="0,1,2", help="Training seeds.  [default: 0]")
@click.option("--epochs", type=int, metavar="N", help="Instead of the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="A training setting (lr=0.05) or a method's option (trades.beta=3).")
@click.option("--train-limit", type=int, metavar="N", help="Train on N images only.")
@click.option("--log", "logs", multiple=True, metavar="NAME",
              help="Repeatable: tensorboard, mlflow, wandb or package.module:Class. Each cell has "
              "its training.csv in any case.")
@click.option("--teacher", metavar="WHAT", help="A checkpoint, module:factory or robustbench:NAME "
              "instead of a trained teacher.")
@click.option("--devices", type=int, metavar="N",
              help="GPUs that train one network together; with --device cpu, processes.")
@click.option("--smoke", is_flag=True, default=None, help="Two batches through everything.")
@workers("the CPU cores, at most 4; GPUs: one for each")
@shared(several=True)
def run(quiet: bool, **given: Any) -> None:
    """Train defenses, attack them, and write a leaderboard. Goes on where it was stopped."""
    specs = specs_of(given)

    from robench.benchmark.matrix import run as run_matrix

    results = run_matrix(specs, quiet=quiet)
    show(results, {"out": specs[0].out})
    require_trust(results.records)


def specs_of(given: dict[str, Any]) -> list[RunSpec]:
    """A request for each data set and model, from the options of `run`."""
    from robench.benchmark.sources import default_jobs
    from robench.benchmark.spec import RunSpec, parse_value

    settings, seeds = given.pop("settings"), given.pop("seeds")
    values = values_of(given)
    if seeds is not None:
        values["seeds"] = integers(seeds)
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: write KEY=VALUE")
        defense, dot, option = key.rpartition(".")
        parsed = parse_value(value, f"--set {text}")
        group = values
        for name in ("options", defense) if dot and defense != "train" else ("train",):
            group = group.setdefault(name, {})
            if not isinstance(group, dict):  # written so in the file of --config
                raise UsageError(f"{name}: write settings, one `name: value` a line, not {group!r}")
        group[option] = parsed

    if "jobs" not in values and values.get("devices", 1) == 1:
        values["jobs"] = default_jobs(str(values.get("device", "auto")))
    models = _each(values, "model")
    return [RunSpec.create({**values, **dataset, **model})
            for dataset in _each(values, "dataset") for model in models]


def _each(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A setting that may have several values, taken out: one setting for each of them."""
    given = values.pop(name, None)
    many = list(given) if isinstance(given, list | tuple) else [given]
    return [{} if one is None else {name: one}
            for index, one in enumerate(many or [None]) if one not in many[:index]]
