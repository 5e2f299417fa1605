"""Sharpness against closed forms; what is compared with what; figures of landscapes."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.errors import UsageError
from robench.reports import Landscape, Results, load, render, save
from robench.reports.gallery import draw_all
from robench.reports.landscape import (
    landscape_boards,
    seed_interval,
    sharpness,
    sharpness_by_direction,
    sharpness_text,
)
from robench.reports.style import to_png, to_svg
from robench.reports.text import markdown

HOSTILE = ["<img src=x onerror=alert(1)>", "$\\frac{1", "_hidden", "x" * 200, "模型", "a|b\nc"]


def grid(points=21):
    half = points // 2
    return tuple(i / half for i in range(-half, half + 1))


def bowl(depth, curvature, alphas):
    return tuple(depth + curvature * a * a for a in alphas)


def make(depth=1.5, curvature=1.2, directions=2, points=21, **changes):
    """A bowl along each direction, the k-th k + 1 times as steep as the first."""
    alphas = grid(points)
    values = {
        "run": "", "created": "2026-11-20T10:00:00+00:00", "seed": 0, "robench": "0.1.0",
        "torch": "2.15.0", "device": "cpu", "commit": "", "threads": 1, "dataset": "digits",
        "split": "test", "n": 200, "data_sha256": "ab" * 32, "model": "resnet18",
        "source": "cells/a/swa.safetensors", "weights_sha256": "w", "fingerprint": (1.0,),
        "defense": "trades", "defense_config": {}, "recipe": "unified", "selection": "val",
        "checkpoint": "swa", "kind": "weight", "threat": "Linf:8/255", "attack": "pgd-10",
        "attack_config": {"steps": 10}, "direction_seed": 0, "alphas": alphas, "seconds": 60.0,
        "losses": tuple(bowl(depth, curvature * (k + 1), alphas) for k in range(directions)),
    }
    return Landscape(**{**values, **changes})


def plane(kind="weight-2d", points=9, **changes):
    a = np.array(grid(points))
    losses = 1.5 + a[:, None] ** 2 + 3 * a[None] ** 2
    values = {"losses": tuple(map(tuple, losses.tolist())), **changes}
    return make(points=points, kind=kind, **values)


# The number


def test_the_sharpness_of_a_parabola():
    """The mean of c a^2 over |a| <= 1/2 is c / 12, but for the trapezoids."""
    numbers = sharpness_by_direction(make(curvature=1.2, points=201))
    assert numbers == pytest.approx([0.1, 0.2], rel=1e-3)


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([3, 5, 21, 51]))
def test_neither_the_loss_itself_nor_a_slope_is_sharpness(depth, slope, other, points):
    alphas = grid(points)
    losses = tuple(tuple(depth + s * a for a in alphas) for s in (slope, other))
    numbers = sharpness_by_direction(make(points=points, losses=losses))
    assert numbers == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("points", [3, 5, 7, 21, 51])
def test_the_range_is_the_same_for_any_number_of_points(points):
    """|a| has the mean 1/4 over |a| <= 1/2, whether or not 1/2 is a point."""
    losses = (tuple(2 + 3 * abs(a) for a in grid(points)),)
    assert sharpness_by_direction(make(points=points, losses=losses)) == pytest.approx([0.75])


def test_what_is_beyond_half_a_filter_does_not_count():
    losses = list(bowl(1, 1, grid()))
    expected = sharpness_by_direction(make(losses=(tuple(losses),)))
    losses[0] = losses[-1] = 1e9
    assert sharpness_by_direction(make(losses=(tuple(losses),))) == expected


def test_students_interval():
    low, high = seed_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert seed_interval([1.0, 1.0]) == (1.0, 1.0)
    assert all(map(math.isnan, seed_interval([1.0])))


# The table


def seeds(curvatures, **changes):
    return [make(curvature=c, seed=i, weights_sha256=f"{changes}{i}", source=f"{changes}{i}",
                 **changes) for i, c in enumerate(curvatures)]


def test_networks_that_differ_in_the_seed_are_one_row():
    frame = sharpness([*seeds([1.2, 2.4, 3.6]), *seeds([0.6], defense="peeraid")])
    assert list(frame["label"]) == ["peeraid", "trades"] and list(frame["rank"]) == [1, 2]
    one, three = frame.to_dict("records")
    assert (one["seeds"], three["seeds"]) == (1, 3)
    assert three["sharpness"] == pytest.approx(0.3, rel=0.05)
    assert three["sharpness_std"] == pytest.approx(0.15, rel=0.05)
    half = 4.302653 * three["sharpness_std"] / 3**0.5
    assert three["sharpness_high"] - three["sharpness"] == pytest.approx(half)
    assert one["sharpness_directions_std"] == pytest.approx(0.05 / 2**0.5, rel=0.05)
    assert math.isnan(one["sharpness_low"]) and math.isnan(one["sharpness_std"])
    assert three["loss"] == 1.5 and three["loss_std"] == 0
    assert (three["directions"], three["points"], three["n"]) == (2, 21, 200)


@pytest.mark.parametrize("change", [
    {"dataset": "cifar10"}, {"split": "train"}, {"data_sha256": "cd" * 32},
    {"threat": "L2:0.5"}, {"attack": "pgd-20", "attack_config": {"steps": 20}},
    {"attack_config": {"steps": 10, "start": "none"}}, {"model": "wrn-34-10"},
    {"direction_seed": 1}, {"directions": 3}, {"points": 51},
])
def test_what_is_not_comparable_is_never_in_one_ranking(change):
    frame = sharpness([make(), make(defense="peeraid", **change)])
    assert list(frame["group"]) == [1, 2] and list(frame["rank"]) == [1, 1]
    assert len(landscape_boards(frame)) == 2


def test_only_lines_have_a_sharpness():
    assert sharpness([plane(), plane("input")]).empty
    assert sharpness_text(Results(landscapes=[plane()])) == ""


def test_the_newest_survey_of_a_network_counts():
    old, new = make(curvature=9.0), make(created="2026-11-21T10:00:00+00:00")
    for order in ([old, new], [new, old]):
        (line,) = sharpness(order).to_dict("records")
        assert line["seeds"] == 1 and line["sharpness"] == pytest.approx(0.15, rel=0.05)


def test_two_networks_of_one_seed_are_never_averaged():
    frame = sharpness([make(source="a"), make(source="b", weights_sha256="other", curvature=3)])
    assert list(frame["label"]) == ["trades (a w)", "trades"]
    assert list(frame["seeds"]) == [1, 1]


def test_a_copy_of_a_network_is_no_second_seed():
    (line,) = sharpness([make(source="a"), make(source="copy/of/a")]).to_dict("records")
    assert line["seeds"] == 1


def test_options_tell_defenses_apart_and_records_name_them(make_record):
    two = [make(run=f"r{b}", defense_config={"beta": b}, weights_sha256=str(b)) for b in (1.0, 6.0)]
    assert set(sharpness(two)["label"]) == {"trades (beta=1.0)", "trades (beta=6.0)"}
    records = [make_record(run="r6.0", defense_config={"beta": 6.0})]
    assert list(sharpness(two[1:], records)["label"]) == ["trades"]


def test_a_loss_that_is_no_number_has_no_rank():
    broken = make(defense="broken", losses=((math.nan,) * 21,))
    frame = sharpness([broken, make(directions=1)])
    assert list(frame["label"]) == ["trades", "broken"]
    assert list(frame["rank"].isna()) == [False, True]
    (board,) = landscape_boards(frame)
    assert board.rows[1][0].text == "–" and "nan" not in markdown(board)


def test_the_board_says_what_was_measured():
    frame = sharpness([*seeds([1.2, 2.4]), make(defense="flat", curvature=-0.5)])
    text = markdown(landscape_boards(frame)[0])
    assert "## digits test, Linf:8/255, resnet18" in text
    assert "pgd-10 on 200 images, 2 directions, 21 points on each" in text
    assert "| −0.06" in " ".join(text.split()) and "± 0.1" in text and "[" in text


# Files


def test_round_trip_and_merging(tmp_path):
    one, other = make(losses=((math.inf, *(1.0,) * 20),)), make(seed=1)
    save(tmp_path / "a", Results(landscapes=[one]))
    save(tmp_path / "b", Results(landscapes=[one, other]))
    assert load([tmp_path / "a", tmp_path / "b"]).landscapes == [one, other]


@pytest.mark.parametrize("change", [
    {"losses": []}, {"losses": [[1.0] * 20]}, {"losses": [[1.0] * 21, [1.0]]},
    {"losses": "x"}, {"alphas": []}, {"alphas": [0.0], "losses": [[1.0]]},
    {"alphas": [-1.0, 0.5, 1.0], "losses": [[1.0] * 3]},
    {"alphas": [-1.0, 0.0, 0.0, 1.0], "losses": [[1.0] * 4]},
    {"alphas": [1.0, 0.0, -1.0], "losses": [[1.0] * 3]},
    {"alphas": [-1.0, 0.0, "NaN"], "losses": [[1.0] * 3]},
    {"kind": "input"}, {"kind": "3d"}, {"split": "all"}, {"surprise": 1},
])
def test_hostile_lines_are_refused(tmp_path, change):
    save(tmp_path, Results(landscapes=[make()]))
    line = {**make().model_dump(mode="json"), **change}
    (tmp_path / "landscape.jsonl").write_text(f"\n{json.dumps(line)}\n")
    with pytest.raises(UsageError) as error:
        load([tmp_path])
    assert str(error.value).startswith(f"{tmp_path}/landscape.jsonl:2: not a Landscape: ")
    assert "\n" not in str(error.value)


def test_the_csv_has_full_precision(tmp_path):
    results = Results(landscapes=seeds([1.1, 2.3]))
    assert tmp_path / "landscape.csv" in render(results, tmp_path)
    read, frame = pd.read_csv(tmp_path / "landscape.csv"), sharpness(results.landscapes)
    assert list(read["sharpness"]) == list(frame["sharpness"])


# Figures


@pytest.fixture
def drawings():
    nets = [*seeds([1.2, 2.4]), make(defense="peeraid", curvature=0.6)]
    planes = [plane(kind, defense=d) for kind in ("weight-2d", "input") for d in "abcd"]
    return draw_all(Results(landscapes=[*nets, *planes]))


def test_every_kind_has_its_figure(drawings):
    lines, weights, inputs = drawings
    assert lines.name == "weight-landscape-digits-test-linf-8-255-pgd-10-resnet18"
    assert weights.name.startswith("weight-2d-landscape") and inputs.name.startswith("input-")
    assert "peeraid 0.07" in lines.alt and "a 1.500, 1.500 to 5.500" in weights.alt


def test_axes_have_units(drawings):
    for drawing in drawings:
        shown = [axes for axes in drawing.figure.axes if axes.get_visible()]
        labels = [label for axes in shown for label in (axes.get_xlabel(), axes.get_ylabel())]
        assert len([label for label in labels if label]) >= 3
        assert all(label.endswith(")") for label in labels if label)


def test_curves_are_medians_over_directions_and_seeds(drawings):
    whole, near = drawings[0].figure.axes
    first = whole.lines[0]
    assert list(first.get_xdata()) == list(grid())
    # Steepness of 1.2 and 2.4 along the first directions, twice as much along the second.
    assert first.get_ydata()[-1] == pytest.approx(1.5 + 2.4)
    assert abs(near.lines[0].get_xdata()).max() == 0.5 and min(near.lines[0].get_ydata()) == 0


def test_panels_have_one_scale(drawings):
    for drawing in drawings[1:]:
        filled = [axes.collections[0] for axes in drawing.figure.axes if axes.collections]
        assert len({tuple(one.levels) for one in filled if hasattr(one, "levels")}) == 1


def test_hostile_names_are_text_and_bytes_are_the_same(make_record):
    nets = [make(defense=name, source=name, weights_sha256=name) for name in HOSTILE]
    planes = [plane(defense=name, weights_sha256=name) for name in HOSTILE]
    nets.append(make(defense="nan", losses=((math.nan,) * 21, (math.inf,) * 21)))
    planes.append(plane("input", losses=((math.nan,) * 9,) * 9))
    results = Results(landscapes=[*nets, *planes])
    drawn = [[(d.name, to_svg(d.figure, d.name), to_png(d.figure)) for d in draw_all(results)]
             for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3
    for _, svg, _ in drawn[0]:
        ElementTree.fromstring(svg)
        assert "<img" not in svg


def test_surveys_of_several_kinds_with_other_options_are_drawn_together(make_steps):
    """Found by merging two runs: each kind of survey labels its networks for itself."""
    results = Results(landscapes=[make(run="1", defense_config={"beta": 1})],
                      steps=[make_steps(run="2", defense_config={"beta": 2})])
    assert len(draw_all(results)) == 2
