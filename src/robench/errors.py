"""The ways in which robench fails on purpose. Each prints as one line and sets the exit code.

The codes are a contract: scripts rely on them, and a code keeps its meaning (docs/exit-codes.md).
"""

EXIT_CODES = {
    0: "ok",
    1: "failure",
    2: "wrong usage, or not comparable",
    3: "robustness has regressed",
    4: "unreliable or inconclusive",
    5: "out of time with a partial result",
    130: "interrupted (run it again to go on)",
}


class RobenchError(Exception):
    """Something went wrong while working (exit code 1). The message says what to do."""

    exit_code = 1


class UsageError(RobenchError, ValueError):
    """The request itself is wrong (exit code 2): nothing was started, nothing written."""

    exit_code = 2


class Regression(RobenchError):
    """Robust accuracy is lower than it was (exit code 3)."""

    exit_code = 3


class Unreliable(RobenchError):
    """What was measured carries no verdict: unreliable or inconclusive (exit code 4)."""

    exit_code = 4


class DiskError(RobenchError):
    """A file could not be written: the disk is full, or the folder not ours. Nothing is lost."""


class Partial(RobenchError):
    """The time budget ended before the work did (exit code 5); `results` are what was found."""

    exit_code = 5

    def __init__(self, message: str, results: object) -> None:
        super().__init__(message)
        self.results = results


def one_line(error: BaseException, length: int = 200) -> str:
    """Type and message of an error of somebody else's code, fit for the end of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]
