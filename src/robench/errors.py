"""The ways in which robench fails on purpose. Each prints as one line and sets the exit code."""


class RobenchError(Exception):
    """Something went wrong while working (exit code 1). The message says what to do."""

    exit_code = 1


class UsageError(RobenchError, ValueError):
    """The request itself is wrong (exit code 2): nothing was started, nothing written."""

    exit_code = 2


class Unreliable(RobenchError):
    """What was measured is not to be relied on (exit code 4)."""

    exit_code = 4


class Partial(RobenchError):
    """The time budget ended before the work did (exit code 5); `results` are what was found."""

    exit_code = 5

    def __init__(self, message: str, results: object) -> None:
        super().__init__(message)
        self.results = results


def one_line(error: BaseException, length: int = 200) -> str:
    """Type and message of an error of somebody else's code, fit for the end of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]
