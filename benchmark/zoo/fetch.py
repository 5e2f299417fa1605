"""A file from Google Drive, where RobustBench keeps its weights: whole, or not there.

The download goes to NAME.part beside its place and goes on there when it is run again. Google
answers with a page instead of the file when too many people fetched it; such a page is never taken
for weights. RobustBench publishes no checksums, so what can be checked is checked: the length, that
the file can be read as weights, and after an interruption the checksums inside it. Files of
before torch 1.6 have none inside: such a download begins anew.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode, urljoin

from robench.benchmark.ranged import BLOCK, checksum, extent, opened, received, size_of
from robench.errors import DiskError, RobenchError, one_line
from robench.files import locked

DRIVE = "https://drive.usercontent.google.com/download"
BY_HAND = "https://drive.google.com/file/d/{id}"
Progress = Callable[[float, str], None]  # share done in [0, 1], what to say about it


def fetch(
    drive_id: str, path: Path, check: Callable[[Path], object],
    progress: Progress = lambda share, text: None,
) -> str:
    """Download a file to its place; returns its SHA-256.

    Args:
        check: raises RobenchError for a file that does not hold what is wanted; the file is then
            removed.

    Raises:
        RobenchError: no answer, a page instead of a file, or fewer bytes than were announced. The
            message says how to get the file by hand. DiskError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    with locked(path.parent):
        try:
            resumed = _download(drive_id, part, progress)
        except (HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.filename == str(part):
                raise DiskError(f"cannot write {part}: {error.strerror or error}") from None
            raise _failed(drive_id, path, one_line(error)) from None
        try:
            if resumed and not _sound(part):
                raise RobenchError(f"{path.name}: the parts of the interrupted download do not fit "
                                   "together; run it again to start over")
            check(part)
        except RobenchError:
            part.unlink(missing_ok=True)
            raise
        digest = checksum(part, "sha256")
        part.replace(path)
    return digest


def _download(drive_id: str, part: Path, progress: Progress) -> bool:
    """Bring `part` to its full length. Returns whether it was begun earlier."""
    begun = size_of(part) if _checkable(part) else 0
    with _open(drive_id, part, begun) as response:
        start, total = extent(response, begun)
        done = start
        for done in received(response, part, start):
            progress(done / total if total else 0.0, f"{done / 1e6:,.0f} MB")
    if total is not None and done != total:
        raise _failed(drive_id, part.with_suffix(""), f"only {done:,} of {total:,} bytes came; run "
                      "it again to go on")
    return start > 0


def _open(drive_id: str, part: Path, begun: int) -> HTTPResponse:
    """The answer that holds the file, of the page that asks for a confirmation if there is one."""
    url = f"{DRIVE}?{urlencode({'id': drive_id, 'export': 'download', 'confirm': 't'})}"
    for _ in range(2):
        try:
            response = opened(url, begun)
        except HTTPError as error:
            error.close()
            if error.code == 416 and begun:  # nothing is left, or it is another file now
                part.unlink(missing_ok=True)
                begun = 0
                continue
            raise
        if response.headers.get_content_type() != "text/html":
            return response
        with response:
            page = Page.read(response.read(BLOCK))
        if page.form is None:
            break
        url = f"{urljoin(url, page.form)}?{urlencode(page.hidden)}"
        if not url.startswith(("https:", "http:")):
            break
    raise _failed(drive_id, part.with_suffix(""), f"the answer is a web page, no weights: "
                  f"{page.message or 'it says nothing'}")


class Page(HTMLParser):
    """What a page of Google Drive says: its message, or the form that confirms a download."""

    def __init__(self) -> None:
        super().__init__()
        self.form: str | None = None
        self.hidden: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._inside = ""

    @classmethod
    def read(cls, content: bytes) -> Page:
        page = cls()
        page.feed(content.decode(errors="replace"))
        return page

    @property
    def message(self) -> str:
        text = self._texts.get("uc-error-subcaption") or self._texts.get("title", "")
        return " ".join(text.split())[:200]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._inside = "title" if tag == "title" else values.get("class", "")
        if tag == "form" and values.get("id") == "download-form":
            self.form = values.get("action")
        elif tag == "input" and values.get("type") == "hidden" and self.form:
            self.hidden[values.get("name", "")] = values.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self._texts[self._inside] = self._texts.get(self._inside, "") + data


def _checkable(part: Path) -> bool:
    """Whether it is the beginning of a zip file, as torch.save writes them, with checksums."""
    if not part.exists():
        return False
    with part.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _sound(path: Path) -> bool:
    """Whether the checksums in a file of torch.save are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


def _failed(drive_id: str, path: Path, reason: str) -> RobenchError:
    link = BY_HAND.format(id=drive_id)
    return RobenchError(f"{path.name} could not be downloaded ({reason}); or fetch {link} in a "
                        f"browser and save it as {path}")
