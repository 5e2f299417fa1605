"""Downloads that go on, against a server that knows ranges, does not, or answers with others."""

from http.client import HTTPException
from http.server import BaseHTTPRequestHandler

import pytest

from robench.benchmark.ranged import checksum, extent, opened, received, size_of

CONTENT = bytes(range(256)) * 20


class Handler(BaseHTTPRequestHandler):
    """/ranges, /plain (the whole file always), /shifted (one byte late), /silent (no range told),
    /unknown (of a length that nobody knows)."""

    def do_GET(self):
        kind, asked = self.path.strip("/"), self.headers.get("Range")
        begin = int(asked[6:-1]) + (kind == "shifted") if asked and kind != "plain" else 0
        total = "*" if kind == "unknown" else len(CONTENT)
        self.send_response(206 if begin else 200)
        if begin and kind != "silent":
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{total}")
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        self.wfile.write(CONTENT[begin:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fetch(serving, tmp_path):
    """(how many bytes were there after each block, what the place says of the length)."""
    place, part = serving(Handler), tmp_path / "file.part"

    def call(kind, begun):
        part.write_bytes(CONTENT[:begun])
        with opened(f"{place}/{kind}", size_of(part)) as response:
            start, total = extent(response, begun)
            sizes = list(received(response, part, start))
        assert part.read_bytes() == CONTENT
        return sizes, total

    return call


@pytest.mark.parametrize("begun", [0, 1, 1000, len(CONTENT) - 1])
@pytest.mark.parametrize("kind", ["ranges", "plain"])
def test_the_file_is_whole_whatever_was_there(fetch, kind, begun):
    sizes, total = fetch(kind, begun)
    assert sizes[-1] == total == len(CONTENT)


def test_a_length_that_is_not_told(fetch):
    assert fetch("unknown", 7) == ([len(CONTENT)], None)


@pytest.mark.parametrize("kind", ["shifted", "silent"])
def test_another_part_than_was_asked_for_is_refused(fetch, kind):
    with pytest.raises(HTTPException, match="another part of the file"):
        fetch(kind, 1000)


def test_checksums(tmp_path):
    assert size_of(tmp_path / "a") == 0
    (tmp_path / "a").write_bytes(b"abc")
    assert size_of(tmp_path / "a") == 3
    assert checksum(tmp_path / "a", "md5") == "900150983cd24fb0d6963f7d28e17f72"
    assert checksum(tmp_path / "a", "sha256").startswith("ba7816bf8f01cfea414140de5dae2223")
