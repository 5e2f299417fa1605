"""Galleries: what the sheet says is what is shown, and hostile lines are refused."""

import base64
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from robench.errors import RobenchError, UsageError
from robench.reports import Gallery, Results, load, save
from robench.reports.analyses import ANALYSES
from robench.reports.gallery import draw_all
from robench.reports.page import page
from robench.reports.pictures import draw_pictures, pictures, read_sheet
from robench.reports.style import to_svg

HOSTILE = "<img src=x onerror=alert(1)>"


def sheet(n, shape):
    """Pixels (n, 3, H, W, C) and the PNG of them."""
    c, h, w = shape
    pixels = np.random.default_rng(0).integers(256, size=(n, 3, h, w, c), dtype=np.uint8)
    rows = pixels.transpose(0, 2, 1, 3, 4).reshape(n * h, 3 * w, c)
    buffer = io.BytesIO()
    Image.fromarray(rows[:, :, 0] if c == 1 else rows).save(buffer, "PNG")
    return pixels, buffer.getvalue()


def make(n=3, shape=(3, 4, 5), **changes):
    some = [{"image": 2 * i, "label": i % 3, "clean_confidence": 0.9, "predicted": (i + 1) % 3,
             "confidence": 0.5, "fooled": True, "distance": 0.03} for i in range(n)]
    some[-1] |= {"predicted": (n - 1) % 3, "fooled": False}
    return Gallery(**{
        "run": "", "created": "2026-11-20T10:00:00+00:00", "seed": 0, "robench": "0.1.0",
        "torch": "2.15.0", "device": "cpu", "commit": "", "threads": 1, "dataset": "digits",
        "split": "test", "n": n, "data_sha256": "images", "model": "resnet18", "source": "a.pt",
        "weights_sha256": "weights", "fingerprint": (1.0,), "defense": "trades",
        "defense_config": {}, "recipe": "unified", "selection": "val", "checkpoint": "best",
        "threat": "Linf:8/255", "attack": "pgd-20", "attack_config": {}, "attack_seed": 0,
        "seconds": 1.0, "classes": ("cat", "dog", "emu"), "shape": shape, "scale": 8 / 255,
        "pictures": tuple(some), "sheet": sheet(n, shape)[1], **changes})


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 3, 3)])
def test_the_sheet_comes_back_pixel_for_pixel(shape, tmp_path):
    gallery = make(shape=shape)
    save(tmp_path, Results(galleries=[gallery]))
    (back,) = load([tmp_path, tmp_path]).galleries
    assert back == gallery
    assert (read_sheet(back) == sheet(3, shape)[0]).all()


@pytest.mark.parametrize("change", [
    {"n": 2}, {"n": 0, "pictures": []}, {"shape": [2, 4, 5]}, {"shape": [3, 0, 5]},
    {"shape": [3, 10**6, 10**6]}, {"scale": 2.0}, {"scale": "NaN"}, {"sheet": "not base64!"},
    {"sheet": 5}, {"pictures": [{"image": 1}]}, {"surprise": 1},
])
def test_hostile_lines_are_refused(tmp_path, change):
    save(tmp_path, Results(galleries=[make()]))
    line = {**json.loads(make().model_dump_json()), **change}
    (tmp_path / "gallery.jsonl").write_text(f"{json.dumps(line)}\n")
    with pytest.raises(UsageError) as error:
        load([tmp_path])
    assert str(error.value).startswith(f"{tmp_path}/gallery.jsonl:1: not a Gallery: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", sheet(3, (1, 4, 5))[1],
                                  sheet(3, (3, 5, 4))[1], sheet(3, (3, 4, 5))[1][:-40]])
def test_a_sheet_that_is_none_is_an_error_in_one_line(data):
    with pytest.raises(RobenchError, match="cannot read the pictures") as error:
        list(draw_pictures(Results(galleries=[make(sheet=data)])))
    assert "\n" not in str(error.value)


def test_the_figure_shows_the_pixels_and_says_what_they_are_taken_for():
    gallery = make(n=10)
    (drawing,) = draw_all(Results(galleries=[gallery]))
    assert drawing.name == "gallery-digits-test-linf-8-255-pgd-20-trades-best-seed-0"
    shown = [axes for axes in drawing.figure.axes if axes.get_visible()]
    assert len(shown) == 30 and len(drawing.figure.axes) == 48
    clean = [axes for axes in shown if axes.get_title()]
    assert [axes.get_title().split("\n")[0] for axes in clean[:4]] == ["cat", "dog", "emu", "cat"]
    assert (np.asarray(clean[1].images[0].get_array()) == read_sheet(gallery)[1, 0]).all()
    under = [axes.get_xlabel() for axes in shown if axes.get_xlabel()]
    assert under[0] == "dog\n50 %\nfooled" and under[-1] == "cat\n50 %\nwithstands"
    assert "perturbation\n× 15.9" in {axes.get_ylabel() for axes in shown}
    assert "-8/255 to +8/255" in drawing.caption and "8 bits" in drawing.caption
    assert drawing.alt.startswith("cat taken for dog; ") and drawing.alt.endswith("cat withstands")


def test_nothing_was_changed():
    (drawing,) = draw_pictures(Results(galleries=[make(scale=0.0)]))
    assert "what was added: nothing;" in drawing.caption


def test_tables_say_the_same():
    hidden = make().pictures[0].model_copy(update={"predicted": -1, "confidence": float("nan")})
    gallery = make(pictures=(hidden, *make().pictures[1:]), classes=("cat",))
    frame = pictures(Results(galleries=[gallery]))
    assert list(frame["true_name"]) == ["cat", "1", "2"]
    assert list(frame["predicted_name"]) == ["nothing", "2", "2"]
    assert list(frame["fooled"]) == [True, True, False] and list(frame["image"]) == [0, 2, 4]
    text = ANALYSES["gallery"].text(Results(galleries=[gallery]))
    assert "2 of 3 images are fooled" in text and "nothing" in text and "nan" not in text
    assert load([]).galleries == []


def test_records_of_the_run_name_the_defense(make_record):
    records = [make_record(run=f"r{b}", defense_config={"beta": b}) for b in (1.0, 6.0)]
    results = Results(records, galleries=[make(run="r6.0")])
    assert set(pictures(results)["label"]) == {"trades (beta=6.0)"}


def test_the_page_holds_the_pictures_and_no_hostile_name():
    known = {"defense": HOSTILE, "source": HOSTILE, "checkpoint": HOSTILE, "attack": HOSTILE}
    results = Results(galleries=[make(classes=(HOSTILE,) * 3, **known), make()])
    html = page(results)
    assert "<img" not in html and "img-src data:" in html
    links = re.findall(r'(?:xlink:)?href="([^"#][^"]*)"', html)
    assert len(links) == 18 and all(link.startswith("data:image/png;base64,") for link in links)
    first = Image.open(io.BytesIO(base64.b64decode(links[0].partition(",")[2])))
    assert first.size == (5, 4)  # pixel for pixel
    one, other = ([to_svg(d.figure, d.name) for d in draw_all(results)] for _ in range(2))
    assert one == other and len(one) == 2
    for svg in one:
        ElementTree.fromstring(svg)
        assert "<img" not in svg
