"""A file over HTTP that goes on where it broke off: what all downloads of robench share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.request import Request, urlopen

TIMEOUT = 60.0  # seconds without an answer
BLOCK = 2**20  # bytes


def opened(url: str, begun: int) -> HTTPResponse:
    """The answer of a place that is asked for a file from byte `begun` on.

    Raises OSError or HTTPException: there is none.
    """
    headers = {"User-Agent": "robench"} | ({"Range": f"bytes={begun}-"} if begun else {})
    response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    return response


def extent(response: HTTPResponse, begun: int) -> tuple[int, int | None]:
    """(at which byte of the file the answer begins, the length of the whole if it is told).

    A place that knows no ranges begins at 0. Raises HTTPException for another part of the file
    than was asked for, which nobody could put together.
    """
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status == 206:
        if told is None or int(told[1]) != begun:
            raise HTTPException("another part of the file came than was asked for")
        return begun, None if told[2] == "*" else int(told[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length is not None else None


def received(response: HTTPResponse, part: Path, start: int) -> Iterator[int]:
    """Write the answer into `part` from byte `start` on; yields how many bytes are there."""
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        while block := response.read(BLOCK):
            file.write(block)
            start += len(block)
            yield start


def size_of(file: Path) -> int:
    """In bytes; 0 where it is not there."""
    return file.stat().st_size if file.exists() else 0


def checksum(file: Path, name: str) -> str:
    """The md5 or sha256 of a file, in hex."""
    with file.open("rb") as content:
        # MD5 is what publishers give: it tells damage and other files, which is what is asked.
        return hashlib.file_digest(
            content, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
