"""The download of zoo weights, from a local server that plays Google Drive."""

import hashlib
import importlib
import io
import os
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Augment, Dataset, Images
from robench.benchmark.models import build_model
from robench.benchmark.sources import load_network
from robench.benchmark.zoo import fetch as drive
from robench.benchmark.zoo.fetch import Page, fetch
from robench.benchmark.zoo.load import load_robustbench
from robench.errors import DiskError, RobenchError, UsageError

NAME = "Sehwag2021Proxy_R18"
QUOTA = b"""<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or
 downloaded this file recently.</p></body></html>"""
CONFIRM = b"""<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>
<body><form id="download-form" action="/confirmed" method="get">
<input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="the-id"><input type="hidden" name="uuid" value="a b"></form>
</body></html>"""


class Drive(BaseHTTPRequestHandler):
    """Answers as the test asks: `mode`, and the `content` of every file."""

    mode, content = "good", b""
    requests: list[tuple[str, str | None]] = []

    def do_GET(self):
        kind = type(self)
        wanted = self.headers.get("Range")
        kind.requests.append((self.path, wanted))
        confirmed = urlsplit(self.path).path == "/confirmed"
        if kind.mode == "missing":
            return self.send_error(404)
        if kind.mode == "quota" or (kind.mode == "confirm" and not confirmed):
            return self.reply(200, QUOTA if kind.mode == "quota" else CONFIRM,
                              {"Content-Type": "text/html; charset=utf-8"})
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        size, headers = len(kind.content), {"Content-Type": "application/octet-stream"}
        if start >= size:
            return self.send_error(416)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            return self.reply(206, kind.content[start:], headers)
        return self.reply(200, kind.content, headers)

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if type(self).mode == "short" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, serving):
    """The handler, whose `mode` and `content` the test sets."""
    handler = type("Handler", (Drive,), {"requests": []})
    monkeypatch.setattr(drive, "DRIVE", f"{serving(handler)}/download")
    return handler


def packed(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def good(path):
    torch.load(path, weights_only=True)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def failure(path, check=good):
    with pytest.raises(RobenchError) as error:
        fetch("the-id", path, check)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_file(server, tmp_path):
    server.content = packed({"w": torch.arange(1000.0)})
    seen = []
    path = tmp_path / "new" / "a.pt"
    digest = fetch("the-id", path, good, lambda share, text: seen.append(share))
    assert path.read_bytes() == server.content
    assert digest == hashlib.sha256(server.content).hexdigest() and seen[-1] == 1.0
    assert files(tmp_path) == ["a.pt"]
    query = parse_qs(urlsplit(server.requests[0][0]).query)
    assert query == {"id": ["the-id"], "export": ["download"], "confirm": ["t"]}


def test_a_page_that_asks_for_confirmation(server, tmp_path):
    server.content, server.mode = packed({"w": torch.zeros(3)}), "confirm"
    fetch("the-id", tmp_path / "a.pt", good)
    assert [urlsplit(path).path for path, _ in server.requests] == ["/download", "/confirmed"]
    assert parse_qs(urlsplit(server.requests[1][0]).query) == {"id": ["the-id"], "uuid": ["a b"]}
    assert files(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(("mode", "reason"), [
    ("quota", "the answer is a web page, no weights: Too many users have viewed or downloaded this "
              "file recently."),
    ("missing", "HTTP Error 404: Not Found"),
])
def test_an_answer_without_a_file(server, tmp_path, mode, reason):
    server.mode = mode
    message = failure(tmp_path / "a.pt")
    assert message.startswith("a.pt could not be downloaded (") and reason in message
    assert message.endswith("fetch https://drive.google.com/file/d/the-id in a browser and save it "
                            f"as {tmp_path}/a.pt")
    assert files(tmp_path) == []


def test_no_server(tmp_path, server, monkeypatch):
    monkeypatch.setattr(drive, "DRIVE", "http://127.0.0.1:1/download")
    assert "refused" in failure(tmp_path / "a.pt").lower()
    assert files(tmp_path) == []


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.content, server.mode = packed({"w": torch.randn(50_000)}), "short"
    size, half = len(server.content), len(server.content) // 2
    message = failure(tmp_path / "a.pt")
    assert f"only {half:,} of {size:,} bytes came; run it again to go on" in message
    assert files(tmp_path) == ["a.pt.part"]  # which nobody takes for weights
    server.mode = "good"
    fetch("the-id", tmp_path / "a.pt", good)
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={half}-"]
    assert (tmp_path / "a.pt").read_bytes() == server.content and files(tmp_path) == ["a.pt"]


def test_parts_of_different_files_are_not_put_together(server, tmp_path):
    (tmp_path / "a.pt.part").write_bytes(packed({"w": torch.zeros(50_000)})[:100_000])
    server.content = packed({"w": torch.randn(50_000)})
    assert "do not fit together; run it again to start over" in failure(tmp_path / "a.pt")
    assert files(tmp_path) == []
    fetch("the-id", tmp_path / "a.pt", good)
    assert (tmp_path / "a.pt").read_bytes() == server.content


def test_a_part_that_is_longer_than_the_file(server, tmp_path):
    server.content = packed({"w": torch.zeros(3)})
    (tmp_path / "a.pt.part").write_bytes(b"PK\x03\x04" + bytes(len(server.content)))
    fetch("the-id", tmp_path / "a.pt", good)
    assert [wanted is None for _, wanted in server.requests] == [False, True]
    assert (tmp_path / "a.pt").read_bytes() == server.content


def test_a_file_without_checksums_does_not_go_on(server, tmp_path):
    """Another file's first half would not be noticed: same tensors, other numbers."""
    other, server.content = (packed({"w": torch.full((50_000,), value)},
                                    _use_new_zipfile_serialization=False) for value in (1.0, 2.0))
    (tmp_path / "a.pt.part").write_bytes(other[: len(other) // 2])
    fetch("the-id", tmp_path / "a.pt", good)
    assert server.requests[0][1] is None
    assert (tmp_path / "a.pt").read_bytes() == server.content


def test_what_is_not_wanted_is_removed(server, tmp_path):
    server.content = b"no weights at all"

    def refuse(path):
        raise UsageError("no")

    assert failure(tmp_path / "a.pt", refuse) == "no"
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write"):
        fetch("the-id", tmp_path / "file" / "a.pt", good)
    server.content = packed({"w": torch.zeros(3)})
    (tmp_path / "a.pt.part").mkdir()
    with pytest.raises(DiskError, match="cannot write .*a.pt.part"):
        fetch("the-id", tmp_path / "a.pt", good)


def test_what_a_page_says():
    assert Page.read(b"<title>Sign\n in</title><p>other</p>").message == "Sign in"
    assert Page.read(b"").message == ""


# Through robustbench's own loader


@pytest.fixture(scope="module")
def weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model("resnet18", classes=10, channels=3, size=32).eval()


def test_weights_that_are_not_there_are_downloaded_once(
    robustbench, server, tmp_path, weights, capfd
):
    from robench.benchmark.progress import Reporter

    server.content = packed({"state_dict": {
        f"module.{name}": value for name, value in weights.state_dict().items()}})
    x, y = torch.rand(2, 3, 32, 32), torch.arange(2)
    data = Dataset("cifar10", Images(x, y), Images(x, y), tuple("abcdefghij"), Augment())
    before = torch.load, importlib.import_module("robustbench.utils").download_gdrive_new
    for _ in range(2):
        net = load_network(f"robustbench:{NAME}", data, ThreatModel("Linf", 8 / 255), zoo=tmp_path,
                           reporter=Reporter()).net
        with torch.no_grad():
            torch.testing.assert_close(net(x), weights(x))
    assert len(server.requests) == 1
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    ids = [m[NAME]["gdrive_id"] for t in models.values() for m in t.values() if NAME in m]
    assert parse_qs(urlsplit(server.requests[0][0]).query)["id"][0] in ids
    assert files(tmp_path) == [f"{NAME}.pt"]
    out, err = capfd.readouterr()
    assert out == "" and f"sha256 {hashlib.sha256(server.content).hexdigest()}" in err
    assert "license of the weights: MIT" in err
    assert before == (torch.load, importlib.import_module("robustbench.utils").download_gdrive_new)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(("content", "kind", "message"), [
    (packed({"state_dict": Evil()}), UsageError, "it holds more than weights"),
    (b"neither a page nor weights", RobenchError, "it is damaged, or no file of weights"),
])
def test_what_is_downloaded_must_be_weights(
    robustbench, server, tmp_path, content, kind, message
):
    server.content = content
    with pytest.raises(kind, match=message) as error:
        load_robustbench(NAME, "cifar10", "Linf", tmp_path)
    assert "it was removed; the same command downloads it again" in str(error.value)
    assert files(tmp_path) == []
