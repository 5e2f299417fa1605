"""Whose examples fool whom, and accuracy over steps: closed forms, seeds, figures."""

import re

import pandas as pd
import pytest

from robench.reports import Results, load, save
from robench.reports.crossing import crossing, crossing_boards
from robench.reports.curves import over_steps
from robench.reports.gallery import draw_all
from robench.reports.page import page
from robench.reports.style import to_png, to_svg
from robench.reports.text import markdown

PAIRS = {"a": {"a": 100, "b": 300}, "b": {"a": 200, "b": 40}}


def matrix(frame, column="accuracy"):
    return {(line["crafted_against"], line["evaluated_on"]): line[column]
            for line in frame.to_dict("records")}


def test_percentages_of_pairs(make_crossings):
    frame = crossing(Results(crossings=make_crossings(PAIRS)))
    assert matrix(frame) == {("a", "a"): 25, ("a", "b"): 75, ("b", "a"): 50, ("b", "b"): 10}
    assert matrix(frame, "kept")["a", "a"] == 31.25 and set(frame["clean"]) == {80}
    assert frame["accuracy_std"].isna().all() and set(frame["seeds"]) == {1}
    assert (frame["accuracy_low"] < frame["accuracy"]).all()


def test_means_over_seeds_of_pairs_of_one_seed(make_crossings):
    other = {"a": {"a": 140, "b": 300}, "b": {"a": 200, "b": 80}}
    frame = crossing(Results(crossings=make_crossings(PAIRS) + make_crossings(other, seed=1)))
    assert matrix(frame) == pytest.approx(
        {("a", "a"): 30, ("a", "b"): 75, ("b", "a"): 50, ("b", "b"): 15})
    assert set(frame["seeds"]) == {2}
    assert matrix(frame, "accuracy_std")["a", "a"] == pytest.approx(10 / 2**0.5)


@pytest.mark.parametrize("change", [
    {"data_sha256": "other"}, {"threat": "L2:0.5"}, {"attack": "pgd-20"}, {"dataset": "cifar10"},
    {"attack_config": {"steps": 10, "start": "none"}}, {"split": "train"},
])
def test_what_is_not_comparable_is_another_matrix(make_crossings, change):
    results = Results(crossings=make_crossings(PAIRS) + make_crossings(PAIRS, **change))
    assert list(crossing(results)["group"].unique()) == [1, 2]
    assert len(crossing_boards(results)) == 2 and len(draw_all(results)) == 2


def test_two_networks_of_one_seed_are_told_apart(make_crossings):
    """Another training of the same settings: its files have another name."""
    again = [one.model_copy(update={
        "weights_sha256": f"again {one.weights_sha256}", "source": f"again {one.source}",
        "shown": tuple(shown.model_copy(update={
            "weights_sha256": f"again {shown.weights_sha256}", "source": f"again {shown.source}"})
            for shown in one.shown)}) for one in make_crossings(PAIRS)]
    frame = crossing(Results(crossings=make_crossings(PAIRS) + again))
    assert len(frame) == 8 and set(frame["seeds"]) == {1}
    assert set(frame["evaluated_on"]) == {  # the row of all seeds keeps the one surveyed last
        *"ab", *(f"{name} (source={name}0 {name}0)" for name in "ab")}


def test_networks_that_were_only_shown_are_told_apart(make_crossings):
    """Two of one seed and one name, one after the other: neither is a second seed of the other."""
    (one,) = make_crossings({"a": {"a": 100, "b": 300}})
    own, b = one.shown
    again = b.model_copy(update={"weights_sha256": "again", "source": "again", "right": 100})
    both = one.model_copy(update={"shown": (own, b, again)})
    (later,) = make_crossings({"a": {"a": 120, "b": 200}}, seed=1)
    frame = crossing(Results(crossings=[both, later]))
    found = {line["evaluated_on"]: (line["seeds"], line["accuracy"])
             for line in frame.to_dict("records")}
    assert found == {"a": (2, pytest.approx(27.5)), "b": (2, 62.5),
                     "b (source=again again)": (1, 25)}
    # of one name with the network that was attacked
    twin = own.model_copy(update={"weights_sha256": "twin", "source": "twin", "right": 400})
    frame = crossing(Results(crossings=[one.model_copy(update={"shown": (own, twin)})]))
    assert matrix(frame) == {("a", "a"): 25, ("a", "a (source=twin twin)"): 100}


def test_another_network_of_a_seed_leaves_the_seeds_together(make_steps):
    seeds = [make_steps(seed=seed, weights_sha256=str(seed)) for seed in range(3)]
    extra = make_steps(weights_sha256="old", created="2026-11-01T10:00:00+00:00",
                       fell_at=(100, 0, 0, 0))
    frame = over_steps(Results(steps=[extra, *seeds]))
    assert dict(zip(frame["name"], frame["seeds"], strict=True)) == {
        "trades": 3, "trades (source=a.safetensors old)": 1}
    assert frame["accuracy"].iloc[-1] == pytest.approx(55) and len(frame) == 8


def test_the_newest_measurement_counts(make_crossings):
    new = make_crossings({"a": {"a": 80, "b": 300}}, created="2026-11-21T10:00:00+00:00")
    old = make_crossings(PAIRS)
    for order in (old + new, new + old):
        assert matrix(crossing(Results(crossings=order)))["a", "a"] == 20


def test_labels_are_those_of_the_records(make_crossings, make_record):
    one, two = make_crossings(PAIRS)
    one = one.model_copy(update={"run": "r"})
    record = make_record(run="r", defense="a", defense_config={"beta": 6.0})
    other = make_record(run="s", defense="a", defense_config={"beta": 1.0})
    frame = crossing(Results([record, other], crossings=[one, two]))
    assert "a (beta=6.0)" in set(frame["crafted_against"])


def test_the_board_and_the_files(make_crossings, make_steps, tmp_path):
    results = Results(crossings=make_crossings(PAIRS), steps=[make_steps()])
    text = " ".join(markdown(crossing_boards(results)[0]).split())
    assert "| Crafted against | a % | b % |" in text and "| a | 25.0 | 75.0 |" in text
    save(tmp_path, results)
    assert load([tmp_path]) == results
    save(tmp_path / "empty", Results())
    assert not {"crossing.jsonl", "steps.jsonl"} & {p.name for p in (tmp_path / "empty").iterdir()}
    save(tmp_path, Results())  # of what was there, nothing is left
    assert load([tmp_path]) == Results()


def test_a_heat_map_of_cells_with_their_numbers(make_crossings):
    (drawing,) = draw_all(Results(crossings=make_crossings(PAIRS)))
    assert drawing.name == "transfer-digits-test-linf-8-255-pgd-10"
    assert "examples against a: a 25.0, b 75.0" in drawing.alt
    axes = drawing.figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["25.0", "75.0", "50.0", "10.0"]
    assert len({patch.get_facecolor() for patch in axes.patches}) == 4
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors["10.0"] == "#fefefe" and colors["75.0"] == "#000000"


def test_one_network_needs_no_heat_map(make_crossings):
    assert draw_all(Results(crossings=make_crossings({"a": {"a": 100}}))) == []


def test_a_heat_map_of_twenty_with_hostile_names_is_drawn_not_painted(make_crossings):
    names = [f"a defense with a long name {i} <img src=x onerror=alert(1)>" for i in range(20)]
    results = Results(crossings=make_crossings(
        {source: {name: 20 * (i + j) % 400 for j, name in enumerate(names)}
         for i, source in enumerate(names)}))
    (drawing,) = draw_all(results)
    svg = to_svg(drawing.figure, drawing.name)
    assert "<image" not in svg and "<img" not in svg and to_png(drawing.figure)
    axes = drawing.figure.axes[0]
    box, (width, height) = axes.get_position(), drawing.figure.get_size_inches()
    assert box.width * width > 20 * 0.3 and box.height * height > 20 * 0.3
    html = page(Results(crossings=make_crossings(PAIRS)))
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and sum("on-cell-" in one for one in ids) == 4


# Steps


def test_accuracy_over_steps(make_steps):
    frame = over_steps(Results(steps=[make_steps()]))
    assert list(frame["steps"]) == [0, 1, 2, 3]
    assert list(frame["accuracy"]) == pytest.approx([77.5, 65, 57.5, 55])
    two = over_steps(Results(steps=[make_steps(), make_steps(
        seed=1, weights_sha256="v", fell_at=(10, 90, 30, 10))]))
    assert list(two["accuracy"]) == pytest.approx([77.5, 60, 52.5, 50])
    assert set(two["seeds"]) == {2}


@pytest.mark.parametrize("change", [
    {"data_sha256": "other"}, {"threat": "L2:0.5"}, {"fell_at": (1, 2), "attack": "pgd-1"},
    {"attack_config": {"steps": 3, "step_size": 1 / 255, "start": "uniform"}},
])
def test_other_runs_of_pgd_are_another_figure(make_steps, change):
    assert len(draw_all(Results(steps=[make_steps(), make_steps(defense="a", **change)]))) == 2


def test_the_steps_of_a_long_run_are_a_ladder_on_a_logarithmic_axis(make_steps):
    fell = (0,) * 100 + (20,)
    (drawing,) = draw_all(Results(steps=[make_steps(fell_at=fell, attack="pgd-100")]))
    axes = drawing.figure.axes[0]
    assert list(axes.get_xticks()) == [0, 1, 2, 5, 10, 20, 50, 100]
    (line,) = axes.lines
    assert list(line.get_ydata()) == [80] * 7 + [75]
    assert pd.Series(line.get_xdata()).is_monotonic_increasing and "75.0 at 100" in drawing.alt
