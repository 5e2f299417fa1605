"""Class by class: against counting by hand, intervals that hold, tables and figures."""

from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from robench.errors import RobenchError
from robench.files import pack_arrays
from robench.reports import Results
from robench.reports.class_boards import class_boards, extremes
from robench.reports.classes import class_accuracy, confusion, worst_class
from robench.reports.gallery import draw_all
from robench.reports.page import page, sections
from robench.reports.style import to_svg
from robench.reports.text import markdown
from robench.reports.trace import record_id
from robench.reports.uncertainty import lowest, wilson

NAMES = ("cat", "dog", "emu")
LABEL = [0, 0, 0, 0, 1, 1, 2, 2]
HOSTILE = "<img src=x onerror=alert(1)>"


def random_record(predicted, draw, classes=3, n=60, accuracy=0.6, names=(), **changes):
    """Clean accuracy above robust accuracy; the images that fall go to any class."""
    random = np.random.default_rng(draw)
    label = np.arange(n) % classes
    clean = np.where(random.random(n) < 0.85, label, random.integers(classes, size=n))
    falls = (clean == label) & (random.random(n) > accuracy)
    wrong = (label + 1 + random.integers(classes - 1, size=n)) % classes
    return predicted(label, clean, np.where(falls, wrong, clean), names,
                     **{"seed": draw, "run": f"r{draw}", **changes})


def drawings(results):
    return {d.name.partition(" ")[0].rpartition("-digits")[0]: d for d in draw_all(results)
            if d.name.startswith(("class-accuracy", "confusion"))}


# Numbers


def test_the_accuracy_of_each_class(predicted):
    one = predicted(LABEL, [0, 0, 0, 1, 1, 1, 2, 0], [0, 2, 0, 1, 0, 1, 2, 0], NAMES)
    other = predicted(LABEL, [0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, -1, 2], NAMES, seed=1)
    frame = class_accuracy([one, other]).set_index("class_name")
    assert frame["n"].to_dict() == {"cat": 4, "dog": 2, "emu": 2}
    assert frame["clean"].to_dict() == {"cat": 87.5, "dog": 100, "emu": 75}
    assert frame["robust"].to_dict() == {"cat": 37.5, "dog": 75, "emu": 50}
    assert frame.loc["cat", "robust_std"] == pytest.approx(100 * np.std([0.5, 0.25], ddof=1))
    low, high = wilson(0.375, 4)
    assert tuple(frame.loc["cat", ["robust_low", "robust_high"]]) == (100 * low, 100 * high)
    assert set(frame["seeds"]) == {2} and set(frame["attack"]) == {"pgd-20"}
    (worst,) = worst_class([one, other]).to_dict("records")
    assert (worst["worst_class"], worst["worst_name"], worst["worst_class_n"]) == (37.5, "cat", 4)
    assert (worst["best_class"], worst["best_name"], worst["robust"]) == (75, "dog", 50)
    cells = {(c["true_name"], c["predicted_name"]): (c["count"], c["clean_count"], c["share"])
             for c in confusion([one, other]).to_dict("records")}
    assert cells == {
        ("cat", "cat"): (1.5, 3.5, 37.5), ("cat", "dog"): (2, 0.5, 50),
        ("cat", "emu"): (0.5, 0, 12.5), ("dog", "dog"): (1.5, 2, 75), ("dog", "cat"): (0.5, 0, 25),
        ("emu", "emu"): (1, 1.5, 50), ("emu", "cat"): (0.5, 0.5, 25),
        ("emu", "nothing"): (0.5, 0, 25)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None,
          max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 12), seeds=st.integers(1, 3))
def test_tables_agree_with_the_counts_of_the_records(predicted, seed, classes, seeds):
    records = [random_record(predicted, seed + i, classes) for i in range(seeds)]
    accuracies, cells = class_accuracy(records), confusion(records)
    for name, count in (("clean", "n_correct"), ("robust", "n_robust")):
        right = (accuracies[name] * accuracies["n"]).sum() / 100
        assert right == pytest.approx(np.mean([getattr(r, count) for r in records]))
    assert cells["count"].sum() == pytest.approx(60)
    shares = cells.groupby("true")[["share", "clean_share"]].sum()
    assert np.allclose(shares, 100)
    diagonal = cells[cells["true"] == cells["predicted"]].set_index("true")["share"]
    robust = accuracies.set_index("class")["robust"]
    assert np.allclose(diagonal.reindex(robust.index).fillna(0), robust)
    (worst,) = worst_class(records).to_dict("records")
    assert worst["worst_class"] == accuracies["robust"].min()
    assert worst["worst_class_low"] <= worst["worst_class"] <= worst["worst_class_high"]


def test_the_interval_of_the_lowest_share_holds_though_it_is_chosen():
    """Ten equal classes: the lowest observed share is far below the truth, its own 95 % interval
    misses it often, the simultaneous one does not."""
    random, truth, n = np.random.default_rng(0), 0.5, 100
    held, naive = [], []
    for counts in random.binomial(n, truth, size=(400, 10)):
        low, high = lowest((counts / n).tolist(), [n] * 10)
        held.append(low <= truth <= high)
        naive.append(wilson(counts.min() / n, n)[1] >= truth)
    assert np.mean(held) > 0.94 > 0.85 > np.mean(naive)


def test_of_one_class_the_interval_is_the_usual_one():
    assert lowest([0.3], [50]) == pytest.approx(wilson(0.3, 50))
    wide = wilson(0.3, 50, 3.0)
    assert wide[0] < wilson(0.3, 50)[0] and wide[1] > wilson(0.3, 50)[1]
    assert binom.cdf(15, 50, wide[1]) < 0.01


def test_rows_are_of_the_ranking_attack_and_have_predictions_of_every_seed(
    predicted, make_record, write_flags, tmp_path
):
    first = [random_record(predicted, s, defense="new", accuracy=0.8) for s in (0, 1)]
    weak = random_record(predicted, 5, attack="fgsm", accuracy=1.0, defense="new", seed=0, run="r0")
    half = [random_record(predicted, 7, defense="half", seed=0, run="a")]
    flags = write_flags(tmp_path / "old.npz", [True] * 60, [False] * 60)
    half.append(make_record(defense="half", seed=1, n=60, n_correct=60, n_robust=0, flags=flags))
    frame = class_accuracy([*first, weak, *half])
    assert set(frame["label"]) == {"new"} and set(frame["attack"]) == {"pgd-20"}
    assert class_accuracy(half).empty and worst_class(half).empty and confusion(half).empty
    assert class_boards(half) == [] and drawings(Results(half)) == {}
    failed = make_record(defense="half", seed=1, n=60, n_correct=0, n_robust=0, status="failed")
    assert list(class_accuracy([half[0], failed])["seeds"]) == [1, 1, 1]


@pytest.mark.parametrize("damage", [
    {"label": [0, 1]}, {"label": [0, 0, -1]}, {"predicted": [0, 1, 1]}, {"predicted": [0, 1, -2]},
    {"clean": [0.0, 1.0, 2.0]}, {"clean": [0, 1, 1]},
])
def test_predictions_of_another_record_are_refused(predicted, damage):
    good = {"label": [0, 0, 1], "clean": [0, 1, 1], "predicted": [0, 1, 0]}
    record = predicted(*good.values())
    assert len(class_accuracy([record])) == 2
    arrays = {name: np.array(some) for name, some in {**good, **damage}.items()}
    flags = {"correct": [True, False, True], "robust": [True, False, False]}
    if damage == {"clean": [0, 1, 1]}:
        arrays["clean"][1] = 0
    with open(record.flags, "wb") as file:
        file.write(pack_arrays({**arrays, **flags}))
    with pytest.raises(RobenchError, match="do not fit their record"):
        class_accuracy([record])


# Tables


def test_networks_are_in_the_order_of_their_ranks_with_a_column_for_each_class(predicted):
    records = [random_record(predicted, i, defense=name, accuracy=accuracy, names=NAMES)
               for i, (name, accuracy) in enumerate({"b": 0.2, "a": 0.5, "c": 0.9}.items())]
    networks, confusions = class_boards(records)
    assert [row[0].text for row in networks.rows] == ["c", "a", "b"]
    titles = [column.title for column in networks.columns]
    assert titles[2:5] == ["PGD-20 %", "Worst class %", "Worst class"]
    assert titles[-3:] == ["cat %, n = 20", "dog %, n = 20", "emu %, n = 20"]
    assert networks.rows[0][3].detail.startswith("[")
    wrong = confusions.rows
    assert {row[0].text for row in wrong} == {"a", "b", "c"}
    assert all(row[1].text != row[2].text for row in wrong)
    assert "robust accuracy by class" in markdown(networks)


def test_of_many_classes_the_ends_and_the_most_frequent_confusions(predicted):
    record = random_record(predicted, 0, classes=40, n=400)
    networks, ends, confusions = class_boards([record])
    assert len(networks.columns) == 7 and len(ends.rows) == 20 and len(confusions.rows) == 10
    frame = class_accuracy([record])
    chosen = extremes(frame)
    assert list(chosen["robust"][:10]) == sorted(frame["robust"])[:10]
    assert list(chosen["robust"][10:]) == sorted(frame["robust"])[-10:]
    assert set(drawings(Results([record]))) == {"class-accuracy"}


def test_numbers_lead_to_their_records(predicted):
    records = [random_record(predicted, s, names=NAMES) for s in (0, 1)]
    board = next(s for s in sections(Results(records)) if s.id == "classes").boards[0]
    (links,) = {cell.links for cell in board.columns[2].cells}
    assert set(links) == {f"#{record_id(record)}" for record in records}


# Figures


def test_figures_show_the_numbers(predicted):
    records = [predicted(LABEL, LABEL, [0, 0, 0, 1, 0, 1, 2, 1], NAMES, baseline=True),
               predicted(LABEL, LABEL, [0, 1, 1, 1, 0, 1, 2, 1], NAMES, defense="new", run="n")]
    drawn = drawings(Results(records))
    dots, matrix = drawn["class-accuracy"].figure, drawn["confusion"].figure
    (axes,) = dots.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["dog", "emu", "cat"]
    robust = [line for line in axes.lines if line.get_markerfacecolor() not in ("none", None)
              and line.get_marker() not in ("None", None, "|")]
    assert [list(line.get_xdata()) for line in robust] == [[50, 50, 75], [50, 50, 25]]
    left, right, bar = matrix.axes
    assert (left.get_title(), right.get_title()) == ("trades", "new")
    assert {(t.get_position(), t.get_text()) for t in left.texts} == {
        ((0.5, 0.5), "75"), ((1.5, 0.5), "25"), ((0.5, 1.5), "50"), ((1.5, 1.5), "50"),
        ((1.5, 2.5), "50"), ((2.5, 2.5), "50")}
    assert left.get_ylabel() == "true class" and bar.get_ylabel().endswith("(%)")
    assert "dog taken for cat 50.0" in drawn["confusion"].alt


def test_hostile_names_are_text_and_bytes_are_the_same(predicted):
    names = (HOSTILE, "$\\frac{1", "_x", "x" * 80, "模型")
    results = Results([random_record(predicted, 0, 5, 200, names=names, defense=HOSTILE)])
    one, other = ([to_svg(d.figure, d.name) for d in drawings(results).values()] for _ in range(2))
    assert one == other and len(one) == 2
    for svg in one:
        ElementTree.fromstring(svg)
        assert "<img" not in svg
    html = page(results)
    assert "<img" not in html and "&lt;img src=x" in html
    assert '<a href="#classes">Classes</a>' in html


def test_what_gives_no_numbers_has_a_column_of_its_own(predicted):
    record = predicted(LABEL, LABEL, [0, 0, 0, -1, 1, 1, -1, 2], NAMES)
    axes = drawings(Results([record]))["confusion"].figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [*NAMES, "nothing"]
