"""Trainings of merged runs: what is one curve, what is told apart, what is left out."""

import pytest

from robench.reports import Results
from robench.reports.drawings import draw_rob_f, draw_rob_f_training, draw_training
from robench.reports.gallery import looks_of
from robench.reports.runs import panels, trainings
from robench.reports.tables import rob_f, rob_f_training, training

KNOWN = {"threat": "Linf:8/255", "attack": "pgd-10", "attack_config": {"steps": 10}, "n": 500,
         "data_sha256": "d" * 64, "settings": "s1"}


@pytest.fixture
def train(make_epoch):
    """The rows of a training of three epochs, all of one accuracy."""
    def make(clean, **changes):
        return [make_epoch(**{**KNOWN, "epoch": epoch, "clean": clean, "seconds": 10 * clean,
                              "rob_f": {"student": (clean, clean)}, **changes})
                for epoch in range(3)]

    return make


def curves(results, draw=draw_training):
    """By title and label the first curve of each figure, and the captions."""
    drawings = list(draw(results, looks_of(results)))
    found = [[list(line.get_ydata()) for line in d.figure.axes[0].lines] for d in drawings]
    return found, [d.caption for d in drawings]


@pytest.mark.parametrize("draw", [draw_training, draw_rob_f_training])
def test_a_second_training_of_a_seed_is_no_second_seed(train, draw):
    old, new = (train(clean, created=f"2026-11-{day}") for clean, day in ((0.9, 10), (0.5, 20)))
    for epochs in (old + new, new + old):
        found, (caption,) = curves(Results(epochs=epochs), draw)
        assert found == [[[0.5] * 3]]
        assert caption.endswith("Older ones of the same seed, left out: 1.")
    found, (caption,) = curves(Results(epochs=new + train(0.7, run="other", seed=1)), draw)
    assert found == [[[pytest.approx(0.6)] * 3]] and "left out" not in caption


@pytest.mark.parametrize("change", [
    {"threat": "L2:0.5"}, {"attack": "pgd-20"}, {"attack_config": {"steps": 10, "start": "none"}},
    {"n": 100}, {"data_sha256": "e" * 64}, {"selection": "test"},
])
def test_what_was_measured_in_another_way_is_another_panel(train, change):
    epochs = train(0.5) + train(0.9, run="other", seed=1, **change)
    found = panels(epochs, [])
    assert len(found) == len({panel.title for panel in found}) == 2
    assert curves(Results(epochs=epochs))[0] == [[[0.5] * 3], [[0.9] * 3]]
    assert panels(train(0.5), [])[0].title == "digits, resnet18, unified"


def test_other_settings_are_another_curve(train, make_record):
    epochs = train(0.5) + train(0.9, run="other", settings="s2")
    (panel,) = panels(epochs, [])
    assert list(panel.runs) == ["peeraid (settings=s1)", "peeraid (settings=s2)"]
    records = [make_record(run=run, defense="peeraid", defense_config={"train": {"epochs": n}})
               for run, n in (("run-peeraid-0", 3), ("other", 9))]
    (panel,) = panels(epochs, records)
    assert list(panel.runs) == ["peeraid (train.epochs=3)", "peeraid (train.epochs=9)"]
    assert panel.left_out == 0


def test_one_training_in_an_old_and_a_new_file_is_one(train, make_epoch):
    new = train(0.5, created="2026-11-20")
    old = [make_epoch(**epoch.model_dump(exclude={*KNOWN, "created"})) for epoch in new]
    for epochs in (old + new, new + old):
        (one,) = trainings(epochs)
        assert list(one.epochs) == new
    again = trainings(old + train(0.9, **dict.fromkeys(("threat", "attack", "settings"), "")))
    assert [[epoch.epoch for epoch in one.epochs] for one in again] == [[0, 1, 2]] * 2


def test_one_training_in_an_old_and_a_new_file_is_listed_once(train, make_epoch):
    new = train(0.5, created="2026-11-20")
    old = [make_epoch(**epoch.model_dump(exclude={*KNOWN, "created"})) for epoch in new]
    for table in (training, rob_f_training):
        once = table(new)
        assert list(once["epoch"]) == [0, 1, 2]
        assert table(old + new).equals(once) and table(new + old).equals(once)
        assert list(table(new + train(0.9))["epoch"]) == [0, 1, 2] * 2  # on another machine


# Rob_f


def bars(transfers):
    results = Results(transfers=transfers)
    drawings = list(draw_rob_f(results, looks_of(results)))
    return [[label.get_text() for label in d.figure.axes[0].get_yticklabels()] for d in drawings], [
        [round(bar.get_width(), 1) for bar in d.figure.axes[0].patches] for d in drawings], drawings


def test_the_bars_are_of_the_newest_of_each_seed(make_transfer):
    old, new = (make_transfer(created=f"2026-11-{day}", student_crafted=count)
                for day, count in ((10, 300), (20, 100)))
    for transfers in ([old, new], [new, old]):
        names, widths, (drawing,) = bars(transfers)
        assert names == [["peeraid: peer"]] and widths == [[1.0, 25.0]]
        assert drawing.caption.endswith("left out: 1.")
    other = make_transfer(run="b", seed=1, student_crafted=300)
    assert bars([new, other])[1] == [[1.0, 50.0]]
    assert len(rob_f([old, new, other])) == 3  # the table has them all


def test_bars_of_other_students_settings_or_images_are_told_apart(make_transfer):
    names, _, _ = bars([make_transfer(), make_transfer(checkpoint="last")])
    assert names == [["peeraid: peer (student=best)", "peeraid: peer (student=last)"]]
    names, _, _ = bars([make_transfer(settings="s1"), make_transfer(settings="s2", run="b")])
    assert names == [["peeraid (settings=s1): peer", "peeraid (settings=s2): peer"]]
    for change in ({"data_sha256": "x"}, {"attack_config": {"steps": 10, "start": "none"}}):
        _, _, drawings = bars([make_transfer(), make_transfer(**change)])
        assert len({drawing.name for drawing in drawings}) == 2
