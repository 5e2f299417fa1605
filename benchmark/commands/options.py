"""What several commands share: options, and what their values mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from robench.errors import Unreliable, UsageError

F = TypeVar("F", bound=Callable[..., Any])


def shared(*, several: bool = False) -> Callable[[F], F]:
    """The options of `run` and `eval`: what is attacked, and how.

    several: data sets and models may be named.
    """
    again = "Repeatable: " if several else ""
    options = [
        click.option("--config", type=click.Path(path_type=Path), metavar="FILE",
                     help="Settings as YAML, such as `defense: [peeraid]`; options override it."),
        click.option("--dataset", metavar="NAME", multiple=several,
                     help=f"{again}digits (default), cifar10, ..., folder:PATH; options follow, "
                     "such as tiny-imagenet,order=sorted. See `robench list` and docs/data.md."),
        click.option("--data-root", type=click.Path(path_type=Path), metavar="DIR",
                     help="Folder with the data sets.  [default: data]"),
        click.option("--download", is_flag=True, default=None,
                     help="Fetch a data set that is not there."),
        click.option("--memory-limit", metavar="SIZE",
                     help="For images, such as 8G; a larger data set is read when it is needed.  "
                     "[default: half of the memory]"),
        click.option("--model", metavar="NAME", multiple=several,
                     help=f"{again}a registered model or package.module:factory."),
        click.option("--threat", "threats", multiple=True, metavar="NORM:EPS",
                     help="Repeatable: Linf:8/255, L2:0.5 or L1:12. Every attack is run under "
                     "each; defenses are trained at the first. See docs/zoo.md."),
        click.option("--attack", "attacks", multiple=True, metavar="NAME[,key=value...]",
                     help="Repeatable. For example pgd-50, pgd,restarts=5, "
                     "torchattacks:MIFGSM, autoattack,limit=1000.  "
                     "[default: fgsm, pgd-20, cw, autoattack]"),
        click.option("--limit", type=int, metavar="N", help="Attack the first N test images only."),
        click.option("--batch-size", type=int, metavar="N",
                     help="Images attacked at a time.  [default: by the device's memory]"),
        click.option("--precision", metavar="MODE",
                     help="exact, bf16 or ieee: of the search for adversarial examples; what is "
                     "found is confirmed in fp32 always.  [default: exact]"),
        click.option("--keep-examples", is_flag=True, default=None,
                     help="Write the adversarial examples beside the records."),
        click.option("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:1."),
        click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
                     help="Where everything goes; its reports are about the last command.  "
                     "[default: runs, for eval runs/eval]"),
        click.option("--quiet", is_flag=True, help="No progress."),
    ]
    return _decorated(options)


def workers(default: str) -> Callable[[F], F]:
    """The options that say who does the work. default: how many processes without --jobs."""
    options = [
        click.option("--jobs", type=int, metavar="N",
                     help=f"Processes that share the work.  [default: {default}]"),
        click.option("--threads", type=int, metavar="N", help="Of torch, in each process.  "
                     "[default: OMP_NUM_THREADS, or its share of the cores]"),
        click.option("--shards", type=int, metavar="N",
                     help="Attack the images in N parts, each a task of its own.  [default: 1]"),
        click.option("--executor", metavar="NAME", help="local (default) or ray."),
        click.option("--ray-address", metavar="HOST:PORT",
                     help="Join this Ray, or the one that `auto` finds, instead of starting one."),
        click.option("--gpus-per-task", type=float, metavar="SHARE",
                     help="With ray: 0.25 lets four tasks share a GPU.  [default: 1]"),
    ]
    return _decorated(options)


def _decorated(options: list[Callable[[Any], Any]]) -> Callable[[F], F]:
    def decorated(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorated


def values_of(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of --config, overridden by the options that were given; a `seed` is the only
    one of `seeds`."""
    values: dict[str, Any] = {}
    config, seed = given.pop("config"), given.pop("seed", None)
    if config is not None:
        from robench.benchmark.spec import read_config

        values = read_config(config)
    values |= {key: value for key, value in given.items() if value not in (None, ())}
    values.setdefault("data_root", Path("data"))
    return values if seed is None else {**values, "seeds": (seed,)}


def seconds_of(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text.strip())
    if match is None:
        raise UsageError(f"--budget {text}: write 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def integers(text: str, option: str = "--seeds") -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: write whole numbers, for example 0,1,2") from None


def show(results: Any, values: dict[str, Any]) -> None:
    from robench.reports import summary

    click.echo(summary(results))
    click.echo(f"reports: {values.get('out', 'runs')}/leaderboard.html", err=True)


def require_trust(records: Iterable[Any]) -> None:
    """Raises Unreliable where a check of a ranked network failed; all was written before."""
    from robench.reports.judge import unreliable

    failed = unreliable(records)
    if failed:
        raise Unreliable(f"evaluation unreliable: {'; '.join(failed)} (see the warnings; "
                         "robench doctor NETWORK examines further)")
