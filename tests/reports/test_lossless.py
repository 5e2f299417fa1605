"""CSV and JSON hold all of a table: what is read back is what was written."""

import csv
import io
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from robench.reports import render, tables
from robench.reports.jsonfile import from_json, to_json

# Names that a careless reader or writer would take for something else.
TEXT = st.text(max_size=8) | st.sampled_from(
    ["", "NA", "nan", "failed", "None", "True", " 1", '"', 'a "b",\r\nc', "\r", "\n", "1e5"])
RECORDS = st.lists(st.fixed_dictionaries({
    "defense": TEXT, "model": TEXT, "recipe": TEXT, "source": TEXT,
    "notes": st.lists(TEXT, max_size=2).map(tuple), "error": st.none() | TEXT,
    "seed": st.integers(0, 2), "attack": st.sampled_from(["pgd-20", "cw", "mifgsm"]),
    "status": st.sampled_from(["ok", "ok", "failed"]), "n_robust": st.integers(0, 300),
    "train_seconds": st.floats(0, 1e9), "baseline": st.booleans(),
    "catastrophic_epoch": st.none() | st.integers(0, 300),
    "robust_overfitting": st.none() | st.floats(-1, 1), "ranked": st.booleans(),
}), max_size=5)
COLUMNS = {
    "float64": st.floats(),
    "Int64": st.integers(-2**63, 2**63 - 1) | st.none(),
    "bool": st.booleans(),
    "object": TEXT | st.none(),
}


@settings(max_examples=10)
@given(several=RECORDS)
def test_tables_survive_csv_and_json(make_record, several):
    records = [make_record(**some) for some in several]
    for frame in (tables.leaderboard(records), tables.other_checkpoints(records)):
        assert_frame_equal(tables.from_csv(tables.to_csv(frame)), frame, check_exact=True)
        assert_frame_equal(from_json(to_json({"a": frame}))["a"], frame, check_exact=True)


@st.composite
def frames(draw):
    """Tables of any columns, with missing, infinite and huge values."""
    kinds = draw(st.dictionaries(TEXT, st.sampled_from(sorted(COLUMNS)), max_size=4))
    rows = draw(st.integers(0, 4)) if kinds else 0
    return pd.DataFrame({
        name: pd.Series(draw(st.lists(COLUMNS[kind], min_size=rows, max_size=rows)), dtype=kind)
        for name, kind in kinds.items()
    })


@settings(max_examples=50)
@given(st.dictionaries(TEXT, frames(), max_size=2))
def test_any_table_survives_json(several):
    text = to_json(several)
    read = from_json(text)
    assert list(read) == list(several)
    for name, frame in several.items():
        assert_frame_equal(read[name], frame, check_exact=True, check_column_type=False)
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_csv_is_what_others_read(make_record):
    """Python's own reader agrees, and so does pandas where nothing is ambiguous."""
    frame = tables.leaderboard([make_record(defense='a "b", c', notes=("two\nlines",))])
    (line,) = csv.DictReader(io.StringIO(tables.to_csv(frame), newline=""))
    assert (line["label"], line["notes"]) == ('a "b", c', "two\nlines")
    (read,) = pd.read_csv(io.StringIO(tables.to_csv(frame))).to_dict("records")
    assert read["label"] == 'a "b", c' and read["pgd-20"] == frame.loc[0, "pgd-20"]


def test_the_files_of_a_report_hold_the_tables(campaign, tmp_path):
    render(campaign, tmp_path, ["csv", "json"])
    read = from_json((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    expected = {
        "leaderboard": tables.leaderboard(campaign.records),
        "other_checkpoints": tables.other_checkpoints(campaign.records),
        "rob_f": tables.rob_f(campaign.transfers, campaign.records),
    }
    assert list(read) == [*expected, "published"] and len(expected["leaderboard"]) == 3
    for name, frame in expected.items():
        assert_frame_equal(read[name], frame, check_exact=True)
    with (tmp_path / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        assert_frame_equal(tables.from_csv(file.read()), expected["leaderboard"], check_exact=True)
