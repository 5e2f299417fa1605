"""The command line. Results go to stdout, messages to stderr; heavy imports wait inside."""

from __future__ import annotations

import sys

import click

from robench import __version__
from robench.benchmark.commands.attack import evaluate, parity, verify
from robench.benchmark.commands.gallery import gallery
from robench.benchmark.commands.landscape import landscape
from robench.benchmark.commands.report import doctor, list_, report
from robench.benchmark.commands.speed import speed
from robench.benchmark.commands.train import run
from robench.errors import RobenchError

INTERRUPTED = 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 failure, 2 wrong usage, 5 out of time with a partial result, "
    "130 interrupted (run it again to go on).",
)
@click.version_option(__version__, prog_name="robench")
def cli() -> None:
    """Benchmark adversarial defenses against adversarial attacks on image classifiers."""


for _command in (run, evaluate, parity, verify, speed, landscape, gallery, report, list_, doctor):
    cli.add_command(_command)


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
