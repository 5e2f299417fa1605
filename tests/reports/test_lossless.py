"""CSV and JSON hold all of a table: what is read back is what was written."""

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from robench.reports import Corruptions, Gallery, Landscape, Results, load, render, save, tables
from robench.reports.analyses import ANALYSES
from robench.reports.jsonfile import from_json, to_json
from robench.reports.record import Picture

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


HOSTILE = 'a "b", <i>c\r\nd</i>'  # in CSV and JSON at once
RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def made_up(predicted, make_record, make_transfer, make_epoch, make_steps, make_crossings):
    """Something for every analysis, with hostile names, missing values and losses of no number."""
    known = {"defense": HOSTILE, "recipe": HOSTILE, "dataset": "cifar10"}
    label, taken = [0, 0, 1, 1], [[0, 1, 1, 0], [0, -1, 1, 1], [0, 0, 0, 1]]
    records = [predicted(label, [0, 0, 1, 0], some, (HOSTILE, "b"), **known, **other)
               for some, other in zip(taken, ({}, {"attack": "cw"}, {"threat": "L2:0.5"}),
                                      strict=True)]
    records += [make_record(**known, role="curve"),
                make_record(**known, ranked=False, checkpoint="last", source=HOSTILE, notes=("",)),
                make_record(**known, attack="fgsm", status="failed", error=HOSTILE, n_robust=0)]
    records += [make_record(**{**known, "dataset": HOSTILE}, defense_config={"option": value},
                            seed=seed, weights_sha256=f"{value} {seed}")
                for value in (HOSTILE, None) for seed in (0, 1)]
    survey = make_steps(**known, run="r", source=HOSTILE)
    facts = survey.model_dump(exclude={"fell_at", "n_correct", "attack_seed"})
    picture = Picture(image=0, label=0, clean_confidence=float("nan"), predicted=-1,
                      confidence=float("nan"), fooled=True, distance=0.03)
    return Results(
        records, [make_transfer(**known)],
        [make_epoch(**known, epoch=i, clean=None, robust=None, rob_f={HOSTILE: (0.1, 0.2)},
                    losses={"total": loss}, averages={"swa": (None, 0.5)})
         for i, loss in enumerate((float("nan"), float("inf"), 1.0))],
        [Landscape(**facts, kind="weight", direction_seed=0, alphas=(-1, 0, 1),
                   losses=((loss, 1.0, 2.0),)) for loss in (float("nan"), float("inf"), 3.0)],
        make_crossings({HOSTILE: {HOSTILE: 0}}, clean=0), [survey],
        [Gallery(**{**facts, "n": 1}, attack_seed=0, classes=(HOSTILE,), shape=(1, 1, 1), scale=0,
                 pictures=(picture,), sheet=b"")],
        [Corruptions(**facts, clean=300, right={HOSTILE: (200,), "fog": (100,)})])


@pytest.mark.parametrize("one", ANALYSES.values(), ids=ANALYSES)
def test_the_table_of_every_analysis_survives_csv_and_json(one, made_up):
    runs = sorted(path.parent for path in RESULTS.glob("*/results.jsonl"))
    committed = [load([run]) for run in runs]
    assert not one.frame(made_up).empty and len(committed) >= 2
    for results in (made_up, *committed, Results()):
        frame = one.frame(results)
        assert_frame_equal(tables.from_csv(tables.to_csv(frame)), frame, check_exact=True)
        assert_frame_equal(from_json(to_json({"a": frame}))["a"], frame, check_exact=True)


def test_the_files_of_a_report_hold_all_tables(made_up, tmp_path):
    save(tmp_path, made_up)
    results = load([tmp_path])
    render(results, tmp_path, ["csv", "json"])
    read = from_json((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    assert list(read) == [one.stem for one in ANALYSES.values()]
    for one in ANALYSES.values():
        frame = one.frame(results)
        assert_frame_equal(read[one.stem], frame, check_exact=True)
        with (tmp_path / one.file).open(encoding="utf-8", newline="") as file:
            assert_frame_equal(tables.from_csv(file.read()), frame, check_exact=True)


def test_a_report_without_lines_has_no_table(make_transfer, tmp_path):
    render(Results(transfers=[make_transfer()]), tmp_path, ["json"])
    read = from_json((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    assert list(read) == ["rob_f", "cost"]
