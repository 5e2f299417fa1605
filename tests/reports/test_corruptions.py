"""Accuracy under corruptions: means, what is comparable, figures."""

import pytest

from robench.reports import Corruptions, Results, load, save
from robench.reports.corruptions import STANDARD, corruption_boards, corruptions
from robench.reports.gallery import draw_all
from robench.reports.page import page
from robench.reports.style import to_png, to_svg
from robench.reports.text import markdown

FEW = {"fog": (320, 240), "saturate": (400, 400), "snow": (80, 0)}


@pytest.fixture
def make(make_steps):
    known = make_steps().model_dump(exclude={"fell_at", "n_correct", "attack_seed"})

    def make(right=None, **changes) -> Corruptions:
        values = {**known, "threat": "", "attack": "", "attack_config": {}, "clean": 360,
                  "right": FEW if right is None else right}
        return Corruptions(**{**values, **changes})

    return make


def cell(frame, corruption, severity, name=None):
    lines = frame[(frame["corruption"] == corruption) & (frame["severity"] == severity)]
    return (lines if name is None else lines[lines["name"] == name])["accuracy"].item()


def test_means_are_over_the_corruptions_of_the_paper(make):
    frame = corruptions(Results(corruptions=[make()]))
    assert cell(frame, "(none)", "") == 90
    assert (cell(frame, "fog", "1"), cell(frame, "fog", "2"), cell(frame, "fog", "mean")) == (
        80, 60, 70)
    assert cell(frame, "mean", "mean") == (70 + 10) / 2  # saturate is no part of it
    assert cell(frame, "mean", "1") == 50 and cell(frame, "saturate", "mean") == 100
    assert list(dict.fromkeys(frame["corruption"])) == ["(none)", "mean", "snow", "fog",
                                                        "saturate"]
    assert set(frame[frame["corruption"] == "mean"]["averaged"]) == {2}


def test_others_are_averaged_where_there_are_no_others(make):
    frame = corruptions(Results(corruptions=[make({"saturate": (40,), "rain": (80,)})]))
    assert cell(frame, "mean", "mean") == 15
    board, = corruption_boards(Results(corruptions=[make({"rain": (80,)})]))
    assert "over 1 corruptions, not the paper's 15," in markdown(board)
    whole = make({name: (200,) * 5 for name in STANDARD})
    board, = corruption_boards(Results(corruptions=[whole]))
    text = markdown(board)
    assert "over the 15 corruptions of the paper" in text and "it is no mCE" in text
    assert "| mean of 15" in text and "elastic transform" in text


def test_seeds_are_averaged_and_networks_told_apart(make):
    other = {"fog": (160, 80), "saturate": (0, 0), "snow": (80, 0)}
    frame = corruptions(Results(corruptions=[
        make(), make(other, seed=1, weights_sha256="v"),
        make(defense="pgd-at", weights_sha256="u")]))
    assert cell(frame, "fog", "mean", "trades") == 50
    assert cell(frame, "fog", "mean", "pgd-at") == 70
    assert set(frame["group"]) == {1}
    assert set(frame[frame["name"] == "trades"]["seeds"]) == {2}


@pytest.mark.parametrize("change", [{"data_sha256": "other"}, {"dataset": "cifar100"}, {"n": 500}])
def test_what_is_not_comparable_is_another_board(make, change):
    results = Results(corruptions=[make(), make(weights_sha256="v", **change)])
    assert len(corruption_boards(results)) == 2


def test_the_spread_of_the_seeds_is_in_the_board(make):
    other = {"fog": (160, 80), "saturate": (0, 0), "snow": (80, 0)}
    two = Results(corruptions=[make(), make(other, seed=1, weights_sha256="v")])
    assert "| fog" in (text := markdown(corruption_boards(two)[0]))
    assert "50.0 ± 28.3" in text and "± is the standard deviation over seeds" in text
    assert "±" not in markdown(corruption_boards(Results(corruptions=[make()]))[0])


def test_figures_say_whose_and_of_what_they_are(make):
    heat, curve = draw_all(Results(corruptions=[make(weights_sha256="u")]))
    assert heat.figure.axes[0].get_title().endswith("corrupted: trades")
    assert curve.figure.axes[0].get_ylabel() == "mean accuracy over 2 corruptions (%)"
    heat, _ = draw_all(Results(corruptions=[make(), make(defense="mart", weights_sha256="u")]))
    assert heat.figure.axes[0].get_title().endswith("mean over the severities")


def test_all_that_a_tall_heat_map_says_is_inside(make):
    for some in ([make({name: (200,) * 5 for name in STANDARD}, defense=defense,
                       weights_sha256=defense) for defense in names]
                 for names in (["trades"], ["trades", "mart", "pgd-at"])):
        heat = draw_all(Results(corruptions=some))[0].figure
        heat.draw_without_rendering()
        axes, (width, height) = heat.axes[0], heat.get_size_inches() * heat.dpi
        assert height < 8 * heat.dpi
        for text in (*axes.get_yticklabels(), *axes.get_xticklabels(), axes.yaxis.label,
                     axes.xaxis.label, axes.title):
            box = text.get_window_extent()
            assert -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1


def test_figures_and_page(make):
    one, several = [make()], [make(), make(defense="pgd-at", weights_sha256="u")]
    for some, words in ((one, "1 80.0, 2 60.0"), (several, "trades 70.0, pgd-at 70.0")):
        results = Results(corruptions=some)
        heat, curve = draw_all(results)
        assert heat.name.startswith("corruptions-") and words in heat.alt
        assert curve.name.startswith("accuracy-over-severity-")
        assert "trades 90.0 at 0, 50.0 at 1, 30.0 at 2" in curve.alt
        for drawing in (heat, curve):
            assert "<image" not in to_svg(drawing.figure, drawing.name) and to_png(drawing.figure)
    assert "it is no mCE" in page(results)


def test_they_are_kept_and_merged(make, tmp_path):
    first, second = make(), make(defense="pgd-at", weights_sha256="u")
    save(tmp_path / "a", Results(corruptions=[first]))
    save(tmp_path / "b", Results(corruptions=[first, second]))
    assert load([tmp_path / "a", tmp_path / "b"]).corruptions == [first, second]
    save(tmp_path / "empty", Results())
    assert not (tmp_path / "empty" / "corruptions.jsonl").exists()


@pytest.mark.parametrize("wrong", [{"right": {}}, {"right": {"fog": (1,), "snow": (1, 2)}},
                                   {"right": {"fog": (401,)}}, {"clean": -1},
                                   {"right": {"fog": ()}}])
def test_impossible_counts_are_refused(make, wrong):
    with pytest.raises(ValueError, match="must be"):
        make(**wrong)
