"""robench report, analyze and list."""

from __future__ import annotations

from pathlib import Path

import click

from robench.errors import UsageError


@click.command(epilog="""\b
Example:
  robench report runs other-machine/runs --out merged
  robench report runs --format tex,json --baseline trades
  robench report runs model_info/cifar10/Linf/*.json
  robench report results --site docs/site
  robench report --into README.md
""")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the reports go.  [default: the first RUN]")
@click.option("--format", "formats", metavar="LIST", help="Some of csv, md, tex, json, html, "
              "figures, robustbench, with commas.  [default: all but robustbench]")
@click.option("--baseline", metavar="LABEL", help="The row that differences are taken to, by its "
              "name in the tables.  [default: the baselines of the runs]")
@click.option("--into", type=click.Path(path_type=Path), metavar="FILE", help="Instead: write "
              "the tables that a Markdown file marks, <!-- robench: RUN leaderboard -->, anew.")
@click.option("--site", "pages", type=click.Path(path_type=Path), metavar="DIR", help="Instead: "
              "a web page for each RUN, or for each run in a folder, and one that leads to them.")
def report(runs: tuple[Path, ...], out: Path | None, formats: str | None, baseline: str | None,
           into: Path | None, pages: Path | None) -> None:
    """Write the tables and figures of finished runs again, merging several.

    A RUN is a folder, its results.jsonl, or a model file of RobustBench, whose numbers are shown
    as published.
    """
    from robench.files import locked
    from robench.reports import render, summary
    from robench.reports.baseline import with_baseline
    from robench.reports.cost import cost, in_words
    from robench.reports.embed import embed
    from robench.reports.site import site
    from robench.reports.store import load

    if bool(runs) == bool(into) or ((into or pages) and (out or formats or baseline)):
        raise UsageError("name one RUN or several, or a file with --into; --into and --site take "
                         "no other options")
    if into:
        return embed(into)
    if pages:
        click.echo(f"wrote {site(runs, pages)[0]}", err=True)
        return None
    out = out or _folder(runs)
    with locked(out):
        results = load(runs)
        if baseline is not None:
            results = with_baseline(results, baseline)
        render(results, out, [name.strip() for name in (formats or "").split(",") if name.strip()])
    click.echo(summary(results))
    for line in in_words(cost(results)):
        click.echo(f"cost: {line}", err=True)
    click.echo(f"wrote the reports to {out}/", err=True)


@click.command(epilog="""\b
Examples:
  robench analyze
  robench analyze trade-off runs
  robench analyze rob-f runs other-machine/runs --out merged
""")
@click.argument("name", required=False)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the files go.  [default: the first RUN]")
def analyze(name: str | None, runs: tuple[Path, ...], out: Path | None) -> None:
    """Print one analysis of finished runs and write its table and figures; without NAME, list them.

    The table becomes NAME.csv, the figures are PNG and SVG in figures/.
    """
    from robench.reports.analyses import ANALYSES, find_analysis
    from robench.reports.store import load
    from robench.reports.writers import analyze as write

    if name is None:
        width = max(map(len, ANALYSES))
        for one in ANALYSES.values():
            click.echo(f"{one.name:<{width}}  {one.description}")
        return
    one = find_analysis(name)
    if not runs:
        raise UsageError(f"name a RUN: robench analyze {name} RUN")
    results, out = load(runs), out or _folder(runs)
    paths = write(one, results, out)
    click.echo(one.text(results), nl=False)
    click.echo(f"wrote {', '.join(path.name for path in paths)} to {out}/", err=True)


def _folder(runs: tuple[Path, ...]) -> Path:
    """The folder of the first run."""
    run = next((run for run in runs if run.suffix != ".json"), None)
    if run is None:
        raise UsageError("there is no run to write the reports to: add --out DIR")
    return run if run.is_dir() else run.parent


KINDS = ("attacks", "defenses", "datasets", "models", "recipes")


@click.command("list")
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
