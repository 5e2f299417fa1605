"""Files that are either whole or not there, and folders that one process at a time writes."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robench.errors import DiskError, RobenchError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

LOCK, UNFINISHED = ".robench.lock", ".robench.tmp"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a kill -9, sees the old content or the new, never half.

    What killed writers left in the folder is removed. Raises DiskError in one line if the disk is
    full or the folder cannot be written; the old file then stays as it was.
    """
    temporary = None
    try:
        blob = data.encode() if isinstance(data, str) else data
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        handle, temporary = _temporary(path)
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            if fcntl is None:  # Windows moves no open file
                file.close()
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DiskError(f"cannot write {path}: {_reason(error)}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an output folder for this process alone; made where it is not there, and gone again
    if nothing is written.

    The kernel lets go of it when the process ends, in whatever way; on NFS the server does.
    Windows, and file systems without locks, guard nothing. Raises RobenchError that names the
    holder, and DiskError if the folder cannot be written.
    """
    path, made = folder / LOCK, not os.path.lexists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _hold(path)
    except (OSError, ValueError) as error:
        raise DiskError(f"cannot write {folder}: {_reason(error)}") from None
    if handle is None:
        raise RobenchError(f"{folder} is in use by {_holder(path)}: wait for it, or name another "
                           "folder with --out")
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its text
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()} since {since}".encode())
        yield
    finally:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # before it is free: who waits for this file notices
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # which is refused where there is something in it


def _hold(path: Path) -> int | None:
    """An open handle that holds the file; None if another process does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(handle) is False:
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if fcntl is None or os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # of a file that its last holder has just removed


def _holder(path: Path) -> str:
    try:
        text = path.read_bytes()[:200].decode(errors="replace")
    except OSError:
        text = ""
    return "".join(c for c in text if c.isprintable()) or "another process"


def _lock(handle: int) -> bool | None:
    """Whether this process has the open file now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as some mounted ones are
        return None
    return True


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside the path, open. Its writer holds it, so that nobody takes it for left."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        if _lock(handle) is not False and os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # somebody swept it away before it was held


def _sweep(folder: Path) -> None:
    """Remove the files of writers that were killed: nobody holds them any more."""
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(UNFINISHED):
            with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                if _lock(file.fileno()):
                    os.unlink(entry.path)


def _sync(folder: Path) -> None:
    """The new name of a file survives a power cut, too."""
    with contextlib.suppress(OSError):  # not every system lets one open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def pack_arrays(arrays: Mapping[str, Any], *, compress: bool = True) -> bytes:
    """Like numpy.savez, but with the same bytes for the same arrays: no time stamps."""
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.save(entry, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue(), how)
    return buffer.getvalue()


def unpack_arrays(path: Path, limit: int) -> dict[str, Any]:
    """The arrays of a file of `pack_arrays` that takes at most `limit` bytes unpacked.

    Nothing in it is run. Raises ValueError for anything else, OSError if it cannot be read.
    """
    blob = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > limit:
                raise ValueError(f"it is larger than {limit:,} bytes")
            return {name.removesuffix(".npy"):
                    np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
                    for name in archive.namelist()}
    except Exception as error:  # damaged bytes may raise anything in a parser
        raise ValueError(str(error) or type(error).__name__) from None
