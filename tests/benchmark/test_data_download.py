"""Downloads against a server here: broken connections, wrong bytes, archives that want out."""

import hashlib
import io
import os
import tarfile
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from robench.benchmark.data import bundled, corrupted, download, load_dataset, tiny_imagenet
from robench.benchmark.data.download import Archive, fetched
from robench.errors import RobenchError, UsageError


def zipped(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


CONTENT = zipped(**{"set/a.txt": "a" * 5000, "set/deep/b.txt": "b" * 3000})


class Handler(BaseHTTPRequestHandler):
    """/good, /wrong, /small, /gone, and /breaks (after 1,000 bytes)."""

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append((self.path, asked))
        name, content = self.path.strip("/"), type(self).content
        begin = int((asked or "bytes=0-")[6:-1])
        if name == "wrong":
            content = bytes(len(content))
        if name == "small":
            content = content[:-1]
        if name == "gone":
            return self.send_error(404)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = begin + 1000 if name == "breaks" else len(content)
        self.wfile.write(content[begin:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, serving):
    """The handler: where it is, what it was asked for, and what it has."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    handler = type("Handler", (Handler,), {"asked": [], "content": CONTENT})
    handler.place = serving(handler)
    return handler


def archive(server, *places: str, name: str = "set.zip") -> Archive:
    return Archive(name, len(server.content),
                   hashlib.md5(server.content, usedforsecurity=False).hexdigest(),
                   tuple(f"{server.place}/{place}" for place in places))


TOLD: list[tuple[float, str]] = []


@contextmanager
def task(label):
    yield lambda share, text: TOLD.append((share, text))


def fetch(server, root, *places):
    return fetched(archive(server, *places), root, "set", task)


def names(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_a_broken_connection_goes_on_where_it_broke(server, tmp_path):
    TOLD.clear()
    assert fetch(server, tmp_path, "breaks") == tmp_path / "set"
    assert names(tmp_path) == {"set/a.txt", "set/deep/b.txt"}
    starts = [int((header or "bytes=0-")[6:-1]) for _, header in server.asked]
    assert starts == list(range(0, len(CONTENT), 1000))
    assert TOLD[-1][0] == 1 and "127.0.0.1" in TOLD[-1][1]


def test_a_run_that_was_killed_goes_on(server, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:2222])
    (tmp_path / ".set.unpacking").mkdir()
    (tmp_path / ".set.unpacking" / "old").write_text("half")
    fetch(server, tmp_path, "good")
    assert server.asked == [("/good", "bytes=2222-")]
    assert names(tmp_path) == {"set/a.txt", "set/deep/b.txt"}
    fetch(server, tmp_path, "good")  # what is there is not fetched
    assert len(server.asked) == 1


@pytest.mark.parametrize("bad", ["wrong", "small", "gone"])
def test_the_next_place_is_tried(server, tmp_path, bad):
    fetch(server, tmp_path, bad, "good")
    assert [path for path, _ in server.asked] == [f"/{bad}", "/good"]
    assert (tmp_path / "set" / "a.txt").read_text() == "a" * 5000


def test_a_part_of_something_else_is_thrown_away(server, tmp_path):
    (tmp_path / "set.zip.part").write_bytes(b"?" * 500)
    fetch(server, tmp_path, "good")
    assert [header for _, header in server.asked] == ["bytes=500-", None]


def test_nothing_is_left_when_no_place_has_it(server, tmp_path):
    with pytest.raises(RobenchError) as caught:
        fetch(server, tmp_path, "wrong", "gone")
    text = str(caught.value)
    assert "/wrong: it sent other bytes than were published" in text and "404" in text
    assert str(tmp_path / "set.zip") in text and "\n" not in text
    assert names(tmp_path) == set()


def test_what_was_brought_by_hand_is_checked_and_stays(server, tmp_path):
    (tmp_path / "set.zip").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(RobenchError, match=r"set\.zip is not the published one"):
        fetch(server, tmp_path, "good")
    (tmp_path / "set.zip").write_bytes(CONTENT)
    fetch(server, tmp_path, "good")
    assert names(tmp_path) == {"set.zip", "set/a.txt", "set/deep/b.txt"} and not server.asked


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "set/../../out.txt", "set\\out.txt",
                                  "C:/out.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_nothing_is_written_outside_of_the_folder(tmp_path, name, kind):
    root = tmp_path / "root"
    root.mkdir()
    file = root / f"set.{kind}"
    if kind == "zip":
        file.write_bytes(zipped(**{"set/a.txt": "a", name: "out"}))
    else:
        with tarfile.open(file, "w") as archived:
            for path in ("set/a.txt", name):
                archived.addfile(tarfile.TarInfo(path))
    content = file.read_bytes()
    brought = Archive(file.name, len(content), hashlib.md5(content, usedforsecurity=False)
                      .hexdigest(), ())
    with pytest.raises(RobenchError, match="would write outside of its folder"):
        fetched(brought, root, "set", task)
    assert names(tmp_path) == {f"root/set.{kind}"}


def test_links_in_a_tar_are_left_out(tmp_path):
    file = tmp_path / "set.tar"
    with tarfile.open(file, "w") as archived:
        link = tarfile.TarInfo("set/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archived.addfile(link)
        inside = tarfile.TarInfo("set/a.txt")
        inside.size = 1
        archived.addfile(inside, io.BytesIO(b"a"))
    content = file.read_bytes()
    fetched(Archive("set.tar", len(content), hashlib.md5(content, usedforsecurity=False)
                    .hexdigest(), ()), tmp_path, "set", task)
    assert names(tmp_path) == {"set.tar", "set/a.txt"}


def test_tiny_imagenet_is_downloaded_once(server, tmp_path, robench, monkeypatch):
    """From the command line, with places of ours for the official ones."""
    server.content = zipped(**{f"{tiny_imagenet.FOLDER}/wnids.txt": "n1\n"})
    brought = archive(server, "breaks", "good", name="tiny-imagenet-200.zip")
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE", brought)
    done = robench("run", "--defense", "trades", "--dataset", "tiny-imagenet", "--data-root",
                   tmp_path / "data", "--download", "--device", "cpu")
    assert done.code == 2 and "cannot read tiny-imagenet" in done.err  # it has one file only
    assert names(tmp_path) == {"data/tiny-imagenet-200/wnids.txt"}


def test_cifar_is_downloaded_from_the_next_place_and_goes_on(server, tmp_path, monkeypatch):
    """What torchvision would do once, from one place."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archived:
        member = tarfile.TarInfo("cifar-10-batches-py/readme.html")
        member.size = 5000
        archived.addfile(member, io.BytesIO(os.urandom(5000)))
    server.content = buffer.getvalue()
    brought = archive(server, "gone", "breaks", name="cifar-10-python.tar.gz")
    monkeypatch.setitem(bundled.ARCHIVES, "CIFAR10", (brought, "cifar-10-batches-py"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", None)  # which would read it now
    for _ in range(2):
        with pytest.raises(UsageError, match="cannot read cifar10"):
            load_dataset("cifar10", tmp_path, download=True)
    assert server.asked[:3] == [("/gone", None), ("/breaks", None), ("/breaks", "bytes=1000-")]
    assert names(tmp_path) == {"cifar-10-batches-py/readme.html"}


def test_official_places_are_what_was_published():
    import torchvision

    for one in (tiny_imagenet.ARCHIVE, *corrupted.ARCHIVES.values()):
        assert len(one.md5) == 32 and one.size > 10**8 and len(one.urls) > 1
    for name, (one, folder) in bundled.ARCHIVES.items():
        theirs = getattr(torchvision.datasets, name)
        assert (one.name, one.md5, folder) == (theirs.filename, theirs.tgz_md5, theirs.base_folder)
        assert theirs.url in one.urls and len(one.urls) > 1
