"""The command line. Results go to stdout, messages to stderr; heavy imports wait inside."""

from __future__ import annotations

import signal
import sys

import click

from robench import __version__
from robench.benchmark.commands.attack import evaluate, parity, verify
from robench.benchmark.commands.check import baseline, check
from robench.benchmark.commands.doctor import doctor
from robench.benchmark.commands.landscape import landscape
from robench.benchmark.commands.plan import plan
from robench.benchmark.commands.report import analyze, list_, report
from robench.benchmark.commands.speed import speed
from robench.benchmark.commands.survey import corruptions, gallery, steps, transfer
from robench.benchmark.commands.train import run
from robench.benchmark.commands.zoo import zoo
from robench.errors import EXIT_CODES, RobenchError

INTERRUPTED = 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"Exit codes: {', '.join(f'{code} {what}' for code, what in EXIT_CODES.items())}.",
)
@click.version_option(__version__, prog_name="robench")
def cli() -> None:
    """Benchmark adversarial defenses against adversarial attacks on image classifiers."""


for _command in (run, plan, evaluate, check, baseline, parity, verify, speed, landscape, gallery,
                 transfer, steps, corruptions, report, analyze, list_, zoo, doctor):
    cli.add_command(_command)


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit code.

    Schedulers end a job with SIGTERM; it stops a command as Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    # Names from files are in it: none may move the cursor or color the terminal.
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    click.echo(f"robench: {text}", err=True)
    sys.exit(code)
