"""The command line. Results go to stdout, messages to stderr; heavy imports wait inside."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from robench import __version__
from robench.errors import Partial, RobenchError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
INTERRUPTED = 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 failure, 2 wrong usage, 5 out of time with a partial result, "
    "130 interrupted (run it again to go on).",
)
@click.version_option(__version__, prog_name="robench")
def cli() -> None:
    """Benchmark adversarial defenses against adversarial attacks on image classifiers."""


def _shared(function: F) -> F:
    """The options of `run` and `eval`: what is attacked, and how."""
    options = [
        click.option("--config", type=click.Path(path_type=Path), metavar="FILE",
                     help="Settings as YAML, such as `defense: [peeraid]`; options override it."),
        click.option("--dataset", metavar="NAME",
                     help="digits (default), cifar10, ..., folder:PATH. See `robench list`."),
        click.option("--data-root", type=click.Path(path_type=Path), metavar="DIR",
                     help="Folder in torchvision's layout.  [default: data]"),
        click.option("--download", is_flag=True, default=None, help="Let torchvision download."),
        click.option("--model", metavar="NAME",
                     help="A registered model or package.module:factory."),
        click.option("--threat", metavar="NORM:EPS", help="For example Linf:8/255 or L2:0.5."),
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
    for option in reversed(options):
        function = option(function)
    return function


@cli.command(epilog="""\b
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
@click.option("--jobs", type=int, metavar="N",
              help="Processes that share the work.  [default: the CPU cores, at most 4; GPU: 1]")
@click.option("--devices", type=int, metavar="N",
              help="GPUs that train one network together; with --device cpu, processes.")
@click.option("--smoke", is_flag=True, default=None, help="Two batches through everything.")
@_shared
def run(settings: tuple[str, ...], seeds: str | None, quiet: bool, **given: Any) -> None:
    """Train defenses, attack them, and write a leaderboard. Goes on where it was stopped."""
    from robench.benchmark.spec import RunSpec, parse_value

    values = _values(given)
    if seeds is not None:
        values["seeds"] = _integers(seeds)
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

    from robench.benchmark.matrix import run as run_matrix
    from robench.benchmark.sources import default_jobs

    if "jobs" not in values and values.get("devices", 1) == 1:
        values["jobs"] = default_jobs(str(values.get("device", "auto")))
    _show(run_matrix(RunSpec.create(values), quiet=quiet), values)


@cli.command("eval", epilog="""\b
Examples:
  robench eval runs/cells/*/best.safetensors
  robench eval my_package.nets:trained --dataset cifar10 --data-root data --limit 1000
  robench eval weights.pt --model resnet18 --dataset cifar10 --data-root data
  robench eval robustbench:Carmon2019Unlabeled --dataset cifar10 --data-root data
""")
@click.argument("sources", nargs=-1, required=True, metavar="NETWORK...")
@click.option("--seed", type=int, help="Of the attacks.  [default: 0]")
@click.option("--budget", metavar="TIME", help="Stop the attacks after 90s, 10m or 2h and report "
              "what is known by then.")
@click.option("--replay", type=click.Path(path_type=Path), metavar="FILE",
              help="Examples of --keep-examples to look at first; tables say so.")
@click.option("--zoo", type=click.Path(path_type=Path), default=Path("models"), metavar="DIR",
              show_default=True, help="Where RobustBench's weights lie or are put.")
@_shared
def evaluate(
    sources: tuple[str, ...], seed: int | None, budget: str | None, replay: Path | None, zoo: Path,
    quiet: bool, **given: Any,
) -> None:
    """Attack networks: checkpoints, package.module:factory, robustbench:NAME."""
    values = {"out": Path("runs/eval"), **_values(given)}
    if seed is not None:
        values["seeds"] = (seed,)

    from robench.benchmark.external import evaluate_external
    from robench.benchmark.spec import RunSpec

    seconds = None if budget is None else _seconds(budget)
    spec = RunSpec.create(values)
    try:
        _show(evaluate_external(sources, spec, zoo=zoo, quiet=quiet, budget=seconds,
                                replay=replay), values)
    except Partial as error:
        _show(error.results, values)
        raise


def _of_eval(*names: str) -> list[click.Parameter]:
    """The options that mean what they mean for `eval`."""
    names = ("config", "dataset", "data_root", "download", "model", "threat", "device", "seed",
             "zoo", "quiet", *names)
    return [parameter for parameter in evaluate.params if parameter.name in names]


@cli.command(params=_of_eval("sources", "precision"), epilog="""\b
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
    sources: tuple[str, ...], seed: int | None, zoo: Path, quiet: bool, **given: Any
) -> None:
    """Compare AutoAttack, PGD, DDN and FMN with other libraries', image by image."""
    values = {"out": Path("runs/parity"), **_values(given)}
    if seed is not None:
        values["seeds"] = (seed,)

    from robench.benchmark.parity import parity as compare
    from robench.benchmark.spec import RunSpec

    spec = RunSpec.create(values)
    click.echo(compare(sources, spec, zoo=zoo, quiet=quiet), nl=False)
    click.echo(f"wrote {spec.out}/parity.md and .csv", err=True)


@cli.command(params=_of_eval("sources", "limit"), epilog="""\b
Example:
  robench verify weights.pt --model resnet18 --examples runs/eval/eval/autoattack-0a1b.safetensors
""")
@click.option("--examples", type=click.Path(path_type=Path), metavar="FILE", required=True,
              help="What --keep-examples wrote.")
def verify(
    examples: Path, sources: tuple[str, ...], seed: int | None, zoo: Path, quiet: bool,
    **given: Any,
) -> None:
    """Check the examples that --keep-examples wrote again, on the same network or another."""
    from robench.benchmark.examples import verify_file
    from robench.benchmark.spec import RunSpec

    click.echo(verify_file(examples, sources, RunSpec.create(_values(given)), zoo=zoo), nl=False)


@cli.group()
def speed() -> None:
    """Measure how long things take."""


@speed.command(params=_of_eval("batch_size"), epilog="""\b
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
    train_steps: int | None, seed: int | None, zoo: Path, quiet: bool, **given: Any,
) -> None:
    """Time an attack here and in the library that everybody uses, on the same images."""
    values = {"out": Path("runs/speed"), **_values(given)}
    if seed is not None:
        values["seeds"] = (seed,)

    from robench.benchmark.spec import RunSpec
    from robench.benchmark.speed import speed_attack

    spec = RunSpec.create(values)
    click.echo(speed_attack(
        sources, spec, task=task, precisions=precisions.split(","), repeats=repeats,
        threads=threads, train_steps=train_steps, zoo=zoo, quiet=quiet,
    ), nl=False)
    click.echo(f"wrote {spec.out}/speed.md and .csv", err=True)


@speed.command(params=[option for option in _of_eval() if option.name != "zoo"], epilog="""\b
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
    batch_size: int, steps: int, repeats: int, threads: int | None, seed: int | None, quiet: bool,
    **given: Any,
) -> None:
    """Time trainings, of resnet18 if not told otherwise, here and in a plain loop.

    On random images unless a --dataset is named.
    """
    values = {"out": Path("runs/speed"), **_values(given)}
    if seed is not None:
        values["seeds"] = (seed,)

    from robench.benchmark.spec import RunSpec
    from robench.benchmark.speed_train import speed_train

    spec = RunSpec.create(values)
    click.echo(speed_train(spec, batch_size=batch_size, steps=steps, repeats=repeats,
                           threads=threads, quiet=quiet), nl=False)
    click.echo(f"wrote {spec.out}/speed-train.md and .csv", err=True)


@cli.command(epilog="""\b
Example:
  robench report runs other-machine/runs --out merged
  robench report --into README.md
""")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the reports go.  [default: the first RUN]")
@click.option("--into", type=click.Path(path_type=Path), metavar="FILE", help="Instead: write "
              "the tables that a Markdown file marks, <!-- robench: RUN leaderboard -->, anew.")
def report(runs: tuple[Path, ...], out: Path | None, into: Path | None) -> None:
    """Write the tables and figures of finished runs again, merging several."""
    from robench.reports import render, summary
    from robench.reports.embed import embed
    from robench.reports.store import load

    if bool(runs) == bool(into) or (into and out):
        raise UsageError("name one RUN or several, or a file with --into")
    if into:
        return embed(into)
    results = load(runs)
    out = out or (runs[0] if runs[0].is_dir() else runs[0].parent)
    render(results, out)
    click.echo(summary(results))
    click.echo(f"wrote the reports to {out}/", err=True)


KINDS = ("attacks", "defenses", "datasets", "models", "recipes")


@cli.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
def list_(kind: str | None) -> None:
    """Show what can be named: attacks, defenses, datasets, models, recipes."""
    from robench.benchmark.catalog import catalog

    for name in (kind,) if kind else KINDS:
        rows = catalog(name)
        width = max(len(row.name) for row in rows)
        click.echo(f"{name}:" if kind is None else "", nl=kind is None)
        for row in rows:
            paper = f"  [{row.paper}]" if row.paper else ""
            click.echo(f"  {row.name:<{width}}  {row.description}{paper}")


@cli.command()
@click.option("--data-root", type=click.Path(path_type=Path), metavar="DIR")
def doctor(data_root: Path | None) -> None:
    """Check the installation and say how to cure what is wrong."""
    from robench.benchmark.doctor import examine

    findings = examine(data_root)
    for finding in findings:
        click.echo(f"{'ok ' if finding.ok else 'BAD'}  {finding.name}: {finding.text}")
    bad = [f for f in findings if not f.ok]
    if bad:
        cures = "; ".join(f"{f.name}: {f.cure}" for f in bad)
        raise RobenchError(f"{len(bad)} problems. {cures}")


def _values(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of --config, overridden by the options that were given."""
    values: dict[str, Any] = {}
    config = given.pop("config")
    if config is not None:
        from robench.benchmark.spec import read_config

        values = read_config(config)
    values |= {key: value for key, value in given.items() if value not in (None, ())}
    values.setdefault("data_root", Path("data"))
    return values


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text.strip())
    if match is None:
        raise UsageError(f"--budget {text}: write 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--seeds {text}: write whole numbers, for example 0,1,2") from None


def _show(results: Any, values: dict[str, Any]) -> None:
    from robench.reports import summary

    click.echo(summary(results))
    click.echo(f"reports: {values.get('out', 'runs')}/leaderboard.html", err=True)


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit code."""
    try:
        sys.exit(cli.main(prog_name="robench", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        message, code = " ".join(error.format_message().split()), error.exit_code
    except RobenchError as error:
        message, code = " ".join(str(error).split()), error.exit_code
    except (KeyboardInterrupt, click.Abort):
        message, code = "interrupted; run the same command again to go on", INTERRUPTED
    click.echo(f"robench: {message}", err=True)
    sys.exit(code)
