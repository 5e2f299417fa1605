import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.reports import Results
from robench.reports.gallery import draw_all
from robench.reports.tradeoff import on_front, tradeoff

POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points):
    front = [point for point, on in zip(points, on_front(points), strict=True) if on]
    assert max(points) in front  # the best in the first number, then in the second
    for x, y in points:
        better = [other for other in front if other != (x, y) and other[0] >= x and other[1] >= y]
        assert bool(better) == ((x, y) not in front)
    robust = [y for _, y in sorted(set(front))]
    assert robust == sorted(set(robust), reverse=True)


@pytest.fixture
def three(make_record):
    """One that is best in clean, one in robust accuracy, and one that is behind the first."""
    return [make_record(run=name, defense=name, n_correct=clean, n_robust=robust, seconds=seconds,
                        train_seconds=600.0, teacher_seconds=teacher)
            for name, clean, robust, seconds, teacher in (
                ("clean", 360, 180, 20.0, 0.0), ("robust", 300, 220, 40.0, 1200.0),
                ("behind", 350, 180, 30.0, 0.0))]


def test_time_and_front_of_each_row(three):
    frame = tradeoff([*three, three[0].model_copy(update={"seed": 1, "seconds": 60.0})])
    frame = frame.set_index("label")
    assert dict(frame["pareto"]) == {"clean": True, "robust": True, "behind": False}
    assert dict(frame["attack_seconds"]) == {"clean": 40, "robust": 40, "behind": 30}
    assert set(frame["machine"]) == {"cpu with 2 threads"}


def test_the_caption_names_the_front_and_the_line_draws_it(three):
    drawing = draw_all(Results(three))[0]
    assert "line: robust, clean. The" in drawing.caption
    (step,) = [line for line in drawing.figure.axes[0].lines if line.get_linestyle() == "--"]
    assert list(step.get_xdata()[1:]) == [75, 90, 90]
    assert list(step.get_ydata()[:3]) == pytest.approx([55, 55, 45])


def test_cost_in_units_on_logarithmic_axes(three):
    training, evaluation = draw_all(Results(three))[1].figure.axes
    for axes, times in ((training, [30, 10, 10]), (evaluation, [40, 20, 30])):
        assert axes.get_xscale() == "log"
        points = [c.lines[0].get_xdata()[0] for c in axes.containers]
        assert points == times
        low, high = axes.get_xlim()
        shown = [x for x in axes.xaxis.get_majorticklocs() if low <= x <= high]
        assert len(shown) >= 2
    assert "(minutes)" in training.get_xlabel() and "(seconds)" in evaluation.get_xlabel()


def test_weights_from_outside_have_no_training_time(three):
    outside = [record.model_copy(update={"train_seconds": 0.0, "teacher_seconds": 0.0})
               for record in three]
    drawing = draw_all(Results(outside))[1]
    (axes,) = drawing.figure.axes
    assert "(seconds)" in axes.get_xlabel() and "unknown" in drawing.alt
    mixed = draw_all(Results([three[0], *outside[1:]]))[1].figure.axes
    assert [len(axes.containers) for axes in mixed] == [1, 3]


def test_times_of_several_machines_are_not_compared(three):
    other = three[0].model_copy(update={"device": "cuda"})
    assert "do not compare" in draw_all(Results([other, *three[1:]]))[1].caption
    assert "do not compare" not in draw_all(Results(three))[1].caption
