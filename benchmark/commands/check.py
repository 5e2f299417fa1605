"""robench check and baseline."""

from __future__ import annotations

from pathlib import Path

import click

from robench.errors import Regression, Unreliable, UsageError

FILE = click.Path(path_type=Path)


@click.command(epilog="""\b
Examples:
  robench check runs/eval --against baseline.json
  robench check runs --against main/runs --metric autoattack,clean --max-drop 1
  robench check runs/eval --against baseline.json --markdown summary.md --junit check.xml
\b
Exit codes: 0 pass or improved, 2 incomparable, 3 regressed, 4 inconclusive.
""")
@click.argument("current", type=FILE)
@click.option("--against", type=FILE, metavar="BASELINE", required=True,
              help="A file of `robench baseline save`, a run folder or its results.jsonl.")
@click.option("--max-drop", type=float, default=0.5, show_default=True, metavar="POINTS",
              help="Smaller drops of accuracy are tolerated.")
@click.option("--alpha", type=float, default=0.05, show_default=True, metavar="P",
              help="How often chance alone may raise an alarm.")
@click.option("--metric", "metrics", multiple=True, metavar="LIST",
              help="Attacks, and `clean`, with commas.  [default: autoattack, or else the attack "
              "that leaves the baseline the least]")
@click.option("--allow-inconclusive", is_flag=True, help="Exit code 0 where too few images decide.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Also write a summary for a CI job.")
@click.option("--junit", type=FILE, metavar="FILE", help="Also write JUnit XML.")
@click.option("--json", "as_json", type=FILE, metavar="FILE", help="Also write all numbers.")
def check(
    current: Path, against: Path, max_drop: float, alpha: float, metrics: tuple[str, ...],
    allow_inconclusive: bool, markdown: Path | None, junit: Path | None, as_json: Path | None,
) -> None:
    """Is CURRENT less robust than a baseline? Paired and tested where the images are the same.

    CURRENT is a run folder, its results.jsonl or a baseline file.
    """
    from robench.files import write_atomic
    from robench.reports.gate import check as compare
    from robench.reports.measured import measured
    from robench.reports.verdict import (
        outcome_json,
        outcome_junit,
        outcome_markdown,
        outcome_text,
        summary,
    )

    outcome = compare(measured(current), measured(against), metrics=names_of(metrics),
                      max_drop=max_drop, alpha=alpha)
    if markdown is not None:
        write_atomic(markdown, outcome_markdown(outcome))
    if junit is not None:
        write_atomic(junit, outcome_junit(outcome, allow_inconclusive=allow_inconclusive))
    if as_json is not None:
        write_atomic(as_json, outcome_json(outcome))
    click.echo(outcome_text(outcome), nl=False)
    if outcome.verdict == "regressed":
        raise Regression(summary(outcome))
    if outcome.verdict == "incomparable":
        raise UsageError(summary(outcome))
    if outcome.verdict == "inconclusive" and not allow_inconclusive:
        raise Unreliable(f"{summary(outcome)}; --allow-inconclusive lets it pass")
    sides = [one.current for one in outcome.comparisons if one.current is not None]
    doubts = {id for side in sides for entry in side.entries for id in entry.failed}
    if doubts:  # a model that hides its gradients would always pass
        raise Unreliable(f"{outcome.verdict}, but the evaluation is unreliable: "
                         f"{', '.join(sorted(doubts))} (see the warnings; robench doctor NETWORK "
                         "examines further)")


@click.group()
def baseline() -> None:
    """Keep what `robench check` compares with in one small file."""


@baseline.command(epilog="""\b
Example:
  robench baseline save runs/eval --out baseline.json --metric autoattack
\b
Exit codes: 4 a trust check failed; nothing is written.
""")
@click.argument("run", type=FILE)
@click.option("--out", type=FILE, metavar="FILE", required=True, help="Ends in .json.")
@click.option("--metric", "metrics", multiple=True, metavar="LIST",
              help="Keep these attacks only.  [default: all]")
@click.option("--allow-unreliable", is_flag=True,
              help="Keep numbers that failed a trust check, too; `show` and `check` say so.")
def save(run: Path, out: Path, metrics: tuple[str, ...], allow_unreliable: bool) -> None:
    """Write the measurements of a run with their survival flags, to be committed."""
    from robench.registry import unknown
    from robench.reports.measured import measured, save_baseline

    if out.suffix != ".json":
        raise UsageError(f"--out {out}: name a file that ends in .json")
    entries, wanted = measured(run), names_of(metrics)
    known = {one.metric for one in entries}
    for name in wanted:
        if name not in known:
            raise unknown("metric", name, known)
    kept = [one for one in entries if not wanted or one.metric in wanted]
    doubts = dict.fromkeys(f"{', '.join(one.failed)} on {one.network}"
                           for one in kept if one.failed)
    if doubts and not allow_unreliable:
        raise Unreliable(f"nothing is saved, for its numbers are unreliable: {'; '.join(doubts)} "
                         "(robench doctor NETWORK examines further); --allow-unreliable keeps them")
    save_baseline(out, kept)
    click.echo(f"wrote {out}", err=True)


@baseline.command()
@click.argument("file", type=FILE)
def show(file: Path) -> None:
    """Show what a baseline file holds."""
    from robench.reports.measured import measured
    from robench.reports.verdict import baseline_text

    click.echo(baseline_text(measured(file)), nl=False)


def names_of(texts: tuple[str, ...]) -> list[str]:
    """Names with commas between them. What has an "=" belongs to the attack before it, as in
    `autoattack,pgd,steps=50,clean`."""
    names: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if "=" in part and names:
            names[-1] += f",{part}"
        elif part:
            names.append(part)
    return list(dict.fromkeys(names))
