"""robench report, list and doctor."""

from __future__ import annotations

from pathlib import Path

import click

from robench.errors import RobenchError, UsageError


@click.command(epilog="""\b
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


@click.command()
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
