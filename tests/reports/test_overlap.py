import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robench.errors import RobenchError
from robench.reports import Results
from robench.reports.gallery import draw_all
from robench.reports.overlap import overlap
from robench.reports.tables import leaderboard

ATTACKS = ("cw", "fgsm", "pgd-20")


@pytest.fixture
def measure(make_record, write_flags, tmp_path):
    """Records of one network with flags on disk: attack -> robust flags."""

    def records(defense, correct, robust, seed=0, **changes):
        return [
            make_record(run=f"{defense}-{seed}", seed=seed, defense=defense, attack=attack,
                        n=len(flags), data_sha256=str(len(flags)), n_robust=int(sum(flags)),
                        n_correct=int(sum(correct[:len(flags)])), **changes,
                        flags=write_flags(tmp_path / f"{defense}-{seed}-{attack}.npz",
                                          correct[:len(flags)], flags))
            for attack, flags in robust.items()
        ]

    return records


def sets(frame):
    return dict(zip(frame["fooled_by"], frame["count"], strict=True))


def test_images_by_the_attacks_that_fool_them(measure):
    right = [1, 1, 1, 1, 1, 0]
    first = {"cw": [1, 0, 0, 0, 1, 0], "pgd-20": [1, 1, 0, 0, 1, 0]}
    second = {"cw": [1, 1, 0, 0, 1, 0], "pgd-20": [1, 1, 1, 1, 1, 0]}
    one = overlap(measure("trades", right, first))
    assert sets(one) == {(): 2, ("cw",): 1, ("cw", "pgd-20"): 2}
    both = overlap(measure("trades", right, first) + measure("trades", right, second, seed=1))
    assert sets(both) == {(): 2.5, ("cw",): 1.5, ("cw", "pgd-20"): 1}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None,
          max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(5, 40))
def test_the_sets_are_a_partition(measure, seed, limit):
    """Each image that is right lies in one set; sums over sets are what each attack fools."""
    random = np.random.default_rng(seed)
    correct = random.random(40) < 0.8
    robust = {name: (correct & (random.random(40) < 0.6))[:limit if name == "cw" else 40]
              for name in ATTACKS}
    frame = overlap(measure("trades", correct, robust))
    assert set(frame["n"]) == {limit} and frame["fooled_by"].is_unique
    assert frame["count"].sum() == correct[:limit].sum()
    for name in ATTACKS:
        fooled = frame["count"][[name in names for names in frame["fooled_by"]]].sum()
        assert fooled == (correct & ~np.resize(robust[name], 40))[:limit].sum()


def test_the_first_row_and_the_baseline(measure):
    def rows(**robust):
        return [record for name, (count, baseline) in robust.items()
                for record in measure(name, [1] * 9, dict.fromkeys(
                    ATTACKS, [1] * count + [0] * (9 - count)), baseline=baseline)]

    for robust, shown in (
        (dict(a=(5, False), b=(7, False), c=(3, True)), ["b", "c"]),
        (dict(a=(5, False), b=(6, False), c=(8, True)), ["c", "b"]),
        (dict(a=(5, False), b=(6, False)), ["b"]),
    ):
        assert list(dict.fromkeys(overlap(rows(**robust))["label"])) == shown


def test_the_first_row_is_that_of_the_leaderboard(measure):
    """Both withstand AutoAttack equally often; the one that is better without attacks is first."""
    right, kept = [1, 1, 1, 0], [1, 0, 0, 0]
    records = [record for name, clean in (("a", [1, 1, 0, 0]), ("b", right))
               for record in measure(name, clean, dict.fromkeys(ATTACKS, kept))]
    assert leaderboard(records)["label"].iloc[0] == "b"
    assert set(overlap(records)["label"]) == {"b"}


def test_only_attacks_that_saw_the_same_images_and_left_flags(measure):
    right, kept = [1, 1, 1, 0], [1, 0, 0, 0]
    cw, fgsm, pgd = measure("trades", right, dict.fromkeys(ATTACKS, kept))
    silent = fgsm.model_copy(update={"flags": ""})
    assert set(overlap([cw, silent, pgd])["attacks"]) == {("cw", "pgd-20")}
    assert overlap([cw, silent]).empty and overlap([]).empty
    (other,) = measure("other images", [1, 1, 0, 1], {"fgsm": kept})
    swapped = fgsm.model_copy(update={"flags": other.flags})
    assert overlap([cw, swapped]).empty
    with pytest.raises(RobenchError, match="do not fit"):
        overlap([cw, fgsm.model_copy(update={"n_robust": 2})])


def test_bars_stand_above_the_dots_that_name_them(measure):
    right = [1, 1, 1, 1, 1, 0, 0, 0]
    drawing = next(d for d in draw_all(Results(measure("trades", right, {
        "cw": [1, 0, 0, 0, 1, 0, 0, 0], "pgd-20": [1, 1, 0, 0, 1, 0, 0, 0]})))
        if d.name.startswith("overlap"))
    bars, dots = drawing.figure.axes
    assert [bar.get_height() for bar in bars.patches] == [25, 12.5]
    assert [list(line.get_ydata()) for line in dots.lines[1::2]] == [[0, 1], [0]]
    assert "Withstand all: trades 25.0 %" in drawing.caption
    assert drawing.alt.endswith("cw and pgd-20: trades 25.0; cw: trades 12.5")


def test_images_that_nothing_fools_need_no_figure(measure):
    records = measure("trades", [1, 1, 0], dict.fromkeys(ATTACKS, [1, 1, 0]))
    assert not any(d.name.startswith("overlap") for d in draw_all(Results(records)))
