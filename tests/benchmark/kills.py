"""Processes that are waited for, and ended: kill -9 at random moments, until enough of them ended
one that was at its files."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

from robench.files import LOCK

PATIENCE = 1200  # seconds for the first file, or for the end: the machine may be busy with others


def until(condition: Callable[[], object], process: Popen[str], seconds: float = 900) -> None:
    """Wait for something that a process does."""
    last = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < last
        time.sleep(0.02)


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def written(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """The files in a folder, half-written ones too, and what a write changes of them. Its lock is
    held from the start and says nothing."""
    found = {}
    for path in folder.rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:  # moved to its name just now
            continue
        if path.is_file() and path.name != LOCK:
            found[path] = state.st_ino, state.st_mtime_ns, state.st_size
    return found


def until_it_writes(process: Popen[str], folder: Path, before: dict[Path, tuple[int, ...]]) -> None:
    """Wait for a file in the folder that is new or another than before, or for the end."""
    last = time.monotonic() + PATIENCE
    while process.poll() is None and not written(folder).items() - before.items():
        assert time.monotonic() < last, "it writes nothing"
        time.sleep(0.005)


def seconds_of_writing(process: Popen[str], folder: Path) -> float:
    """From the first write of a process that nobody disturbs to its end."""
    until_it_writes(process, folder, written(folder))
    began = time.monotonic()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return time.monotonic() - began


def kill_until(
    kills: int, begin: Callable[[], "Popen[str]"], folder: Path, seconds: float, *,
    killed: Callable[[], object], ended: Callable[[], object],
) -> None:
    """Begin processes on a folder and kill -9 each up to `seconds` after its first write, until
    `kills` of them were ended by it. Those that came to their end before do not count.

    killed, ended: called after either, to look at what is there; `ended` makes room for the next.
    """
    rng, late = random.Random(kills), 0
    for effective in range(kills):
        while True:
            before = written(folder)
            process = begin()
            until_it_writes(process, folder, before)
            time.sleep(rng.uniform(0, seconds))
            process.kill()
            _, err = process.communicate(timeout=PATIENCE)  # its workers hold stderr, too
            if process.returncode == -signal.SIGKILL:
                break
            assert process.returncode == 0, err
            ended()
            late += 1
            assert late <= 2 * kills + 3, f"{late} kills came too late, {effective} did not"
        killed()
    print(f"kill -9: {kills} of {kills} survived; {late} more came after the end")
