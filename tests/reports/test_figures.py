import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from robench.reports import Results, load
from robench.reports.gallery import draw_all
from robench.reports.style import PALETTE, looks, to_png, to_svg

NAMES = ["<img src=x onerror=alert(1)>", "$\\frac{1", "_hidden", "x" * 200, "模型", "a--b&c"]


@pytest.fixture
def hostile(make_record, make_epoch, make_transfer):
    results = Results()
    for i, name in enumerate(NAMES):
        known = dict(run=f"run-{i}", defense=name)
        results.records.append(make_record(**known, n_robust=200 + i))
        results.records.append(make_record(**known, role="curve", threat="L2:0.5"))
        results.epochs.append(make_epoch(**known, losses={"total": float("nan")}, robust=None))
        results.transfers.append(make_transfer(**known))
    return results


def texts(svg):
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def test_every_kind_of_figure_is_drawn(campaign):
    drawings = draw_all(campaign)
    assert [d.name for d in drawings] == [
        "rob-f-digits-linf-8-255-pgd-10-resnet18-unified", "rob-f-training-digits-resnet18-unified",
        "clean-vs-robust-digits-test-linf-8-255",
        "cost-vs-robust-digits-test-linf-8-255", "accuracy-over-eps-digits-test-linf-pgd-20",
        "overlap-digits-test-linf-8-255", "training-digits-resnet18-unified",
    ]
    assert all("peeraid" in d.alt for d in drawings)


def test_no_data_no_figures():
    assert draw_all(Results()) == []


def test_axes_have_units(campaign):
    for drawing in draw_all(campaign):
        for axes in drawing.figure.axes:
            above = drawing.name.startswith("overlap") and axes is drawing.figure.axes[0]
            assert above or axes.get_xlabel() == "epoch" or "(" in axes.get_xlabel()
            bars = drawing.name.startswith(("rob-f", "overlap"))  # with names along one axis
            assert bars or "(%)" in axes.get_ylabel() or "loss" in axes.get_ylabel()


def test_hostile_names_are_text_in_valid_svg(hostile):
    drawings = draw_all(hostile)
    assert len(drawings) == 5
    for drawing in drawings:
        svg = to_svg(drawing.figure, drawing.name)
        assert "<img" not in svg
        assert any("<img src=x" in text for text in texts(svg))  # parsed back
        assert any("$\\frac{1" in text for text in texts(svg))


@pytest.mark.parametrize("count", [1, 20])
def test_axes_have_room_with_many_defenses(make_record, make_epoch, make_transfer, count):
    """matplotlib warns where they have none, and warnings are errors."""
    results = Results()
    for i in range(count):
        known = dict(run=f"run-{i}", defense=f"a defense with a long name {i}")
        results.records.extend([
            make_record(**known, n_robust=200 + i),
            make_record(**known, role="curve", threat="L2:0.5")])
        results.epochs.extend(make_epoch(**known, epoch=e, averages={"swa": (0.5, 0.4)})
                              for e in range(3))
        results.transfers.append(make_transfer(**known))
    for drawing in draw_all(results):
        to_svg(drawing.figure, drawing.name)
        width, height = drawing.figure.get_size_inches()
        for axes in drawing.figure.axes:
            box = axes.get_position()
            assert box.width * width > 1.8 and box.height * height > 0.5, drawing.name
        for legend in drawing.figure.legends:
            box = legend.get_window_extent().transformed(drawing.figure.transFigure.inverted())
            assert box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0, drawing.name


def test_the_same_data_give_the_same_bytes(hostile):
    one, other = (
        [(to_svg(d.figure, d.name), to_png(d.figure)) for d in draw_all(hostile)[:2]]
        for _ in range(2)
    )
    assert one == other


def test_figures_of_two_groups_have_their_own_names(make_record):
    records = [make_record(data_sha256=images) for images in ("a", "b")]
    records.append(make_record(threat="L2:0.5"))
    names = [d.name for d in draw_all(Results(records))]
    assert len(names) == 6 and len(set(names)) == 6


def test_rob_f_of_other_images_is_another_figure(make_transfer):
    quick = make_transfer(n=10, data_sha256="10", clean=9, self_crafted=0, student_crafted=8)
    assert len(draw_all(Results(transfers=[make_transfer(), quick]))) == 2


def test_a_defense_keeps_its_look():
    several = looks(["trades", "peeraid", "trades"])
    assert several["peeraid"].color == PALETTE[0] and several["trades"].color == PALETTE[1]
    many = looks(f"defense {i}" for i in range(50))
    assert len({(look.color, look.marker) for look in many.values()}) == 50


def test_eps_zero_is_clean_accuracy(make_record):
    records = [make_record(role="curve", threat=f"Linf:{e}/255", n_robust=300 - 20 * e)
               for e in (8, 2)]
    (drawing,) = draw_all(Results(records))
    (line,) = drawing.figure.axes[0].lines
    assert list(line.get_xdata()) == [0, 2, 8]
    assert list(line.get_ydata()) == [80.0, 65.0, 35.0]


def test_drawing_leaves_matplotlib_as_it_was(campaign):
    before = dict(matplotlib.rcParams)
    draw_all(campaign)
    assert dict(matplotlib.rcParams) == before


def test_no_pyplot(run_python):
    code = "import sys, robench.reports.writers; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert run_python(code) == 0


def test_the_documentation_shows_every_figure_of_the_committed_campaign():
    page = Path(__file__).parents[2] / "docs" / "figures.md"
    shown = [page.parent / link for link in re.findall(r"!\[.+\]\((.+)\)", page.read_text())]
    folder = page.parents[1] / "results" / "cifar10-small-resnet"
    # Of what that run has no data for.
    others = {path for path in folder.parent.glob("*/figures/*.png")
              if folder not in path.parents}
    shown = {path.resolve() for path in shown}
    assert shown - others == set((folder / "figures").glob("*.png"))
    drawn = {drawing.name for drawing in draw_all(load([folder]))}
    assert {path.stem for path in shown - others} == drawn
