"""Downloads that go on where they broke off, from several places, and are checked before use."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import tarfile
import time
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from robench.benchmark.ranged import checksum, extent, opened, received, size_of
from robench.errors import DiskError, RobenchError, one_line
from robench.files import locked

TRIES, PAUSE = 3, 1.0  # attempts that bring nothing; seconds between them
BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
          urllib.error.URLError)
# What a task is called -> the place where (share done, text) is told about it.
Task = Callable[[str], AbstractContextManager[Callable[[float, str], None]]]


@dataclass(frozen=True)
class Archive:
    """A .zip or .tar file, as its publisher describes it.

    Attributes:
        urls: places that have it, tried in turn. md5: as published.
    """

    name: str
    size: int
    md5: str
    urls: tuple[str, ...]


class _Wrong(Exception):
    """What a place offers is not the file."""


def fetched(archive: Archive, root: Path, folder: str, task: Task) -> Path:
    """root/folder, unpacked from the archive, which has this folder in it; whole or not there.

    Raises RobenchError if no place has the file, and says how to bring it by hand: as
    root/<name of the archive>, which is checked and used if it is there.
    """
    file = root / archive.name
    try:
        with locked(root):
            if (root / folder).is_dir():
                return root / folder
            brought = file.exists()
            if not brought:
                with task(f"download {archive.name}") as update:
                    _download(archive, file, update)
            elif not _matches(archive, file):
                raise RobenchError(f"{file} is not the published one (MD5 {archive.md5}, "
                                   f"{archive.size:,} bytes): delete it to fetch it anew")
            with task(f"unpack {archive.name}"):
                _unpack(file, root / folder)
            if not brought:
                file.unlink()
    except OSError as error:
        raise DiskError(f"cannot write {root}: {error.strerror or error}") from None
    return root / folder


def _download(archive: Archive, file: Path, update: Callable[[float, str], None]) -> None:
    part, reasons = file.with_name(f"{file.name}.part"), dict[str, str]()
    for url in archive.urls * 2:  # once more: a wrong place may have spoilt what a right one sent
        vain = 0
        while vain < TRIES:
            before = size_of(part)
            try:
                if before < archive.size:
                    _go_on(archive, url, part, update)
                if size_of(part) == archive.size and _matches(archive, part):
                    os.replace(part, file)
                    return
                if size_of(part) >= archive.size:
                    raise _Wrong("it sent other bytes than were published")
                reasons[url] = "it closed the connection too early"
            except _Wrong as error:
                part.unlink(missing_ok=True)
                reasons[url] = str(error)
                break
            except BROKEN as error:
                reasons[url] = one_line(error)
                if isinstance(error, urllib.error.HTTPError):
                    break
            vain = 0 if size_of(part) > before else vain + 1
            time.sleep(PAUSE * vain)
    told = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    raise RobenchError(f"could not download {archive.name} ({told}); try again, or fetch it by "
                       f"hand (MD5 {archive.md5}) as {file}")


def _go_on(archive: Archive, url: str, part: Path, update: Callable[[float, str], None]) -> None:
    """Read on from what is there, until the end or an error."""
    begun = size_of(part)
    with opened(url, begun) as response:
        start, whole = extent(response, begun)
        if whole not in (None, archive.size):
            raise _Wrong(f"it has {whole:,} bytes, not {archive.size:,}")
        for have in received(response, part, start):
            if have > archive.size:
                raise _Wrong(f"it has more than {archive.size:,} bytes")
            update(have / archive.size, f"{have / 2**20:,.0f} MB from {url.split('/')[2]}")


def _matches(archive: Archive, file: Path) -> bool:
    return size_of(file) == archive.size and checksum(file, "md5") == archive.md5


def _unpack(file: Path, folder: Path) -> None:
    """The plain files of an archive. Nothing is written outside of the folder."""
    place = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(place, ignore_errors=True)  # of one that was killed
    try:
        for name, content in _members(file):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                raise RobenchError(f"{file} would write outside of its folder ({name!r})")
            target = place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                shutil.copyfileobj(content, out)
        if not (place / folder.name).is_dir():
            raise RobenchError(f"{file} has no folder {folder.name} in it")
        os.replace(place / folder.name, folder)
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise RobenchError(f"cannot unpack {file} ({one_line(error)}): delete it") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _members(file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir():
                    with zipped.open(entry) as content:
                        yield entry.filename, content
    else:
        with tarfile.open(file) as tar:
            for member in tar:
                plain = tar.extractfile(member) if member.isfile() else None
                if plain is not None:
                    yield member.name, plain
