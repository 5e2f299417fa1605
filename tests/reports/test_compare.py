import math

import numpy as np
import pytest

from robench.errors import RobenchError
from robench.reports.compare import difference, find_baseline, strongest, survival, worst_case
from robench.reports.grouping import rows

AA = "pyautoattack:standard"


@pytest.fixture
def with_flags(make_record, write_flags, tmp_path):
    """A record whose network survives on the images named, of 100 that are all right."""

    def make(survivors, **changes):
        robust = np.zeros(100, bool)
        robust[list(survivors)] = True
        place = "-".join(str(changes.get(k, "")) for k in ("defense", "seed", "attack"))
        path = write_flags(tmp_path / f"{place.replace(':', '_')}.npz", np.ones(100), robust)
        return make_record(n=100, n_correct=100, n_robust=len(survivors), flags=path, **changes)

    return make


def test_autoattack_is_the_strongest_though_another_leaves_less(make_record):
    (row,) = rows([make_record(n_robust=10), make_record(attack=AA)])
    assert strongest([row]) == "autoattack"


def test_without_autoattack_the_lowest_common_attack_counts(make_record):
    table = rows([make_record(), make_record(attack="fgsm", n_robust=250),
                  make_record(attack="cw", n_robust=10), make_record(defense="b", attack="fgsm"),
                  make_record(defense="b", n_robust=190)])
    assert strongest(table) == "pgd-20"  # cw was not tried on b


def test_a_failed_attack_does_not_give_way_to_a_weaker_one(make_record):
    table = rows([make_record(), make_record(attack=AA, status="failed", n_robust=0),
                  make_record(defense="b"), make_record(defense="b", attack=AA)])
    assert strongest(table) == "autoattack"
    assert difference(table[0], table[1], "autoattack") is None


def test_the_difference_is_paired_image_by_image(with_flags):
    ours = with_flags(range(60), defense="peeraid")
    theirs = with_flags([*range(50), 98, 99], defense="trades")
    row, baseline = rows([ours, theirs])
    got = difference(row, baseline, "pgd-20")
    assert got is not None
    assert (got.baseline, got.attack, got.points) == ("trades", "pgd-20", pytest.approx(8.0))
    assert got.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)


def test_without_flags_or_the_same_seeds_there_is_no_p_value(with_flags, make_record):
    theirs = with_flags(range(50), defense="trades")
    for ours in (with_flags(range(60), defense="a", seed=1),
                 theirs.model_copy(update={"defense": "a", "flags": "nowhere.npz"})):
        got = difference(*rows([ours, theirs]), "pgd-20")
        assert got is not None and math.isnan(got.p)


def test_a_trained_network_is_compared_with_its_like_only(make_record):
    table = rows([make_record(defense="a", baseline=True, epochs=200),
                  make_record(defense="b", baseline=True, model="wrn"),
                  make_record(defense="c", baseline=True, checkpoint="swa"),
                  make_record(defense="d", baseline=True),
                  make_record(defense="e"), make_record(defense="e", checkpoint="swa"),
                  make_record(defense="e", checkpoint="ema"),
                  make_record(defense="e", model="mobilenet"),
                  make_record(defense="e", epochs=200)])
    found = {(row.key.checkpoint, row.key.model, row.key.epochs): find_baseline(row, table)
             for row in table if row.key.defense == "e"}
    own = next(row.key for row in table if row.key.defense == "d")
    labels = {key: None if other is None else other.key.defense for key, other in found.items()}
    assert labels == {
        (own.checkpoint, own.model, own.epochs): "d", ("swa", own.model, own.epochs): "c",
        ("ema", own.model, own.epochs): None, (own.checkpoint, "mobilenet", own.epochs): None,
        (own.checkpoint, own.model, 200): "a"}
    released = rows([make_record(defense="a", baseline=True, epochs=200, recipe="as-released"),
                     make_record(defense="b", epochs=100, recipe="as-released")])
    assert find_baseline(released[1], released).key.defense == "a"


def test_a_baseline_was_trained_at_the_same_threat_model(make_record):
    def at(threat, **changes):
        return make_record(**{"defense_config": {"threat": threat}, **changes})

    linf, l2 = at("Linf:8/255", defense="a", baseline=True), at("L2:0.5", defense="b")
    table = rows([linf, at("L2:0.5", defense="a", baseline=True), l2])
    assert find_baseline(table[2], table) is table[1]
    assert find_baseline(table[2], [table[0], table[2]]) is None
    released = rows([r.model_copy(update={"recipe": "as-released"}) for r in (linf, l2)])
    assert find_baseline(released[1], released) is released[0]  # each method has its own eps


def test_of_networks_from_outside_the_first_baseline_of_the_same_model_is_taken(make_record):
    table = rows([make_record(source="x", defense="a", model="wrn", baseline=True),
                  make_record(source="y", defense="b", baseline=True),
                  make_record(source="z", defense="c"),
                  make_record(source="w", defense="d", model="mobilenet")])
    assert [find_baseline(row, table).label for row in table] == ["a", "b", "b", "a"]
    assert find_baseline(table[2], table[2:]) is None


def test_the_worst_case_is_taken_per_image(with_flags):
    (row,) = rows([with_flags(range(50), attack="fgsm"), with_flags(range(20, 60), attack="cw")])
    assert worst_case(row) == ([30], 100)


def test_no_worst_case_where_an_attack_failed(with_flags, make_record):
    failed = make_record(attack="cw", n=100, status="failed", n_robust=0)
    (row,) = rows([with_flags(range(50), attack="fgsm"), failed])
    assert worst_case(row) is None


def test_flags_of_another_measurement_are_refused(with_flags):
    record = with_flags(range(50)).model_copy(update={"n_robust": 49})
    with pytest.raises(RobenchError, match="do not fit their record"):
        survival(record)


def test_damaged_flags_are_an_error_in_one_line(make_record, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(RobenchError, match="cannot read the survival flags") as error:
        survival(make_record(flags=str(tmp_path / "x.npz")))
    assert "\n" not in str(error.value)
