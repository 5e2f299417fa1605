"""robench doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robench.benchmark.commands.attack import of_eval
from robench.benchmark.commands.options import values_of
from robench.errors import RobenchError, UsageError


@click.command(params=of_eval("attacks", "batch_size", "precision"), epilog="""\b
Examples:
  robench doctor
  robench doctor runs/cells/*/best.safetensors
  robench doctor my_package.nets:trained --dataset cifar10 --data-root data --attack pgd-50
""")
@click.argument("sources", nargs=-1, metavar="[NETWORK]...")
@click.option("--limit", type=int, metavar="N",
              help="Use the first N test images.  [default: 128, or all there are]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where doctor.md and doctor.json go.  [default: they are not written]")
def doctor(
    sources: tuple[str, ...], zoo: Path, quiet: bool, out: Path | None,
    **given: Any,
) -> None:
    """Check the installation; with networks, whether their evaluation can be trusted.

    The attacks put to the test are apgd-ce and apgd-dlr, or those of --attack. Exit code 4 where
    a check fails.
    """
    if not sources:
        data_root = given.pop("data_root")
        if any(value not in (None, ()) for value in given.values()) or out:
            raise UsageError("name a NETWORK to examine; without one only --data-root is used")
        return _installation(data_root)
    values = values_of(given)

    from robench.benchmark.spec import RunSpec
    from robench.benchmark.trust import diagnosis

    values.setdefault("attacks", diagnosis.ATTACKS)
    found = diagnosis.diagnose(sources, RunSpec.create(values), zoo=zoo, quiet=quiet)
    click.echo(diagnosis.report(found), nl=False)
    if out is not None:
        diagnosis.save(found, out)
        click.echo(f"wrote {out}/doctor.md and .json", err=True)
    diagnosis.require(found)
    return None


def _installation(data_root: Path | None) -> None:
    from robench.benchmark.doctor import examine

    findings = examine(data_root)
    for finding in findings:
        click.echo(f"{'ok ' if finding.ok else 'BAD'}  {finding.name}: {finding.text}")
    bad = [f for f in findings if not f.ok]
    if bad:
        cures = "; ".join(f"{f.name}: {f.cure}" for f in bad)
        raise RobenchError(f"{len(bad)} problems. {cures}")
