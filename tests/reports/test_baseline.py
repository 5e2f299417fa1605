"""What may be compared, and a baseline chosen for a report."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robench.errors import UsageError
from robench.reports import Results, tables
from robench.reports.baseline import with_baseline
from robench.reports.grouping import groups, rows

FACTS = st.fixed_dictionaries({
    "defense": st.sampled_from(["trades", "peeraid", "cat"]),
    "baseline": st.booleans(),
    "attack": st.sampled_from(["pgd-20", "fgsm"]),
    "data_sha256": st.sampled_from(["a" * 64, "b" * 64]),
    "threat": st.sampled_from(["Linf:8/255", "L2:0.5"]),
    "split": st.sampled_from(["test", "val"]),
    "recipe": st.sampled_from(["unified", "own"]),
})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FACTS, max_size=10), st.none() | st.sampled_from(["trades", "peeraid"]))
def test_no_ranking_and_no_difference_mixes_what_is_not_comparable(make_record, several, label):
    """Whatever runs are merged, and whatever baseline is asked for."""
    results = Results([make_record(**some, created=f"2026-01-{i + 1:02}")
                       for i, some in enumerate(several)])
    if label:
        try:
            results = with_baseline(results, label)
        except UsageError:
            return
    frame = tables.leaderboard(results.records)
    for number, group in enumerate(groups(rows(results.records)), start=1):
        part = frame[frame["group"] == number]
        assert len(part) == len(group)
        assert len(part[["dataset", "split", "threat"]].drop_duplicates()) == 1
        attack = part["rank_attack"].iloc[0]
        if attack is not None:  # all of one ranking saw the same images
            assert len({row.images[attack] for row in group}) == 1
        for line in part.dropna(subset=["delta"]).to_dict("records"):
            partners = [row for row in group if row.baseline and row.label == line["delta_to"]
                        and line["delta_attack"] in row.cells]
            assert partners and (label is None or line["delta_to"] == label)


@pytest.fixture
def results(make_record):
    return Results([make_record(defense=name, n_robust=count, baseline=name == "trades")
                    for name, count in (("trades", 200), ("peeraid", 220), ("cat", 180))])


def deltas(results):
    frame = tables.leaderboard(results.records).dropna(subset=["delta"])
    return {line["defense"]: (line["delta_to"], round(line["delta"], 9))
            for line in frame.to_dict("records")}


def test_another_baseline(results):
    assert deltas(results) == {"peeraid": ("trades", 5.0), "cat": ("trades", -5.0)}
    assert deltas(with_baseline(results, "cat")) == {
        "trades": ("cat", 5.0), "peeraid": ("cat", 10.0)}
    assert results.records[0].baseline  # the ones given stay


def test_a_label_tells_configurations_apart(make_record):
    results = Results([make_record(defense_config={"beta": beta}, n_robust=count)
                       for beta, count in ((3.0, 200), (6.0, 220))])
    assert deltas(with_baseline(results, "trades (beta=3.0)")) == {
        "trades": ("trades (beta=3.0)", 5.0)}
    with pytest.raises(UsageError, match="unknown baseline 'trades'. Did you mean: trades "):
        with_baseline(results, "trades")


@pytest.mark.parametrize("change", [
    {"data_sha256": "other", "n": 300}, {"threat": "L2:0.5"}, {"split": "val"},
    {"dataset": "mnist"}, {"attack": "fgsm"}, {"recipe": "own"},
])
def test_a_baseline_that_is_not_comparable_is_refused(results, make_record, change):
    other = make_record(defense="ard", **change)
    merged = Results([*results.records, other])
    for label in ("peeraid", "ard"):
        if label == "peeraid" and change.keys() & {"attack", "recipe"}:
            continue  # of one group with others that may be compared with it
        with pytest.raises(UsageError, match=f"--baseline '{label}': nothing") as error:
            with_baseline(merged, label)
        message = str(error.value)
        assert message.endswith("report those runs by themselves") and "\n" not in message
