"""Baseline files: what is written is read again, and nothing else is believed."""

import base64
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.errors import RobenchError, UsageError
from robench.reports import Results, save
from robench.reports.measured import (
    measured,
    of_records,
    pack,
    read_baseline,
    save_baseline,
    unpack,
)


@pytest.fixture
def run(make_record, write_flags, tmp_path):
    """A run folder: two attacks, two seeds, 100 images, and a row of no table."""
    records = []
    for seed in (0, 1):
        for attack, count in (("pgd-20", 60), ("fgsm", 70)):
            correct, robust = np.arange(100) < 90, np.arange(100) < count + seed
            path = write_flags(tmp_path / "run" / f"{attack}{seed}.npz", correct, robust)
            records.append(make_record(attack=attack, seed=seed, n=100, n_correct=90,
                                       n_robust=count + seed, flags=path))
    records.append(make_record(role="curve"))
    save(tmp_path / "run", Results(records))
    return tmp_path / "run"


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_flags_are_packed_without_loss(flags):
    array = np.array(flags)
    assert np.array_equal(unpack(pack(array), len(array)), array)


def test_what_is_saved_is_what_was_measured(run, tmp_path):
    path = tmp_path / "baseline.json"
    save_baseline(path, measured(run))
    before, after = measured(run), measured(path)
    assert len(after) == 4
    for one, other in zip(before, after, strict=True):
        assert one.model_dump() == other.model_dump()
        assert np.array_equal(one.robust, other.robust)
    text = path.read_text()
    save_baseline(path, after)
    assert path.read_text() == text
    assert max(map(len, text.splitlines())) < 200  # a fact a line, for a review


@pytest.mark.parametrize("lost", ["flags", "status"])
def test_a_baseline_needs_whole_measurements(run, tmp_path, lost):
    entries = measured(run)
    change = {"correct": None, "robust": None} if lost == "flags" else {"status": "partial"}
    entries[0] = entries[0].model_copy(update=change)
    with pytest.raises(UsageError, match="evaluate again"):
        save_baseline(tmp_path / "x.json", entries)
    with pytest.raises(UsageError, match="there twice"):
        save_baseline(tmp_path / "x.json", entries[1:2] * 2)
    assert not (tmp_path / "x.json").exists()


def test_the_newest_record_of_a_seed_counts(make_record):
    old = make_record(created="2026-01-01T00:00:00+00:00", n_robust=10)
    (one,) = of_records([make_record(), old])
    assert one.n_robust == 200 and one.robust is None


def test_a_record_that_contradicts_itself_is_refused(make_record):
    with pytest.raises(UsageError, match="cannot be: .*n_robust"):
        of_records([make_record().model_copy(update={"n_robust": 399})])


BOMB = base64.b64encode(zlib.compress(bytes(10**7), 9)).decode()


@pytest.mark.parametrize("change", [
    {"n": 0}, {"n": -1}, {"n": 10**30}, {"n": "many"}, {"n": 80}, {"n": 1.5}, {"n": None},
    {"n_robust": 61}, {"n_robust": -1}, {"n_correct": 10**6}, {"n_robust": 95},
    {"robust": "not base64!"}, {"robust": "AAAA"}, {"robust": BOMB}, {"robust": ""},
    {"robust": 7}, {"robust": [True]}, {"robust": None}, {"correct": "eA=="}, {"robust": "\u00e9"},
    {"correct": pack(np.arange(100) >= 10)}, {"network": 7}, {"attack_config": []},
    {"status": "fine"}, {"unknown": 1}, {"warnings": "text"}, {"seed": "x"},
])
def test_hostile_facts_are_refused_in_one_line(run, tmp_path, change):
    path = tmp_path / "baseline.json"
    save_baseline(path, measured(run))
    content = json.loads(path.read_text())
    content["measured"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="baseline.json: not a baseline file: ") as error:
        measured(path)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"robench_baseline": 1}',
    b'{"robench_baseline": 2, "measured": []}', b'{"robench_baseline": 1, "measured": []}',
    b'{"robench_baseline": 1, "measured": [1]}', b'{"a\\u001b[2J\\nb": 1}',
    b'{"clean_acc": "90.00", "eps": "8/255"}',
])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "baseline.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_baseline(path)
    assert str(error.value).isprintable()


@given(content=st.binary(max_size=60))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.json"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        read_baseline(path)


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="cannot read"):
        measured(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match=r"no results\.jsonl"):
        measured(tmp_path)
    monkeypatch.setattr("robench.reports.measured.LARGEST", 10)
    (tmp_path / "large.json").write_text(" " * 11)
    with pytest.raises(UsageError, match="larger than"):
        measured(tmp_path / "large.json")


def test_a_run_without_ranked_networks_is_no_side(make_record, tmp_path):
    save(tmp_path, Results([make_record(ranked=False)]))
    with pytest.raises(UsageError, match="no measurement of a ranked network"):
        measured(tmp_path)


def test_damaged_flags_are_an_error(run):
    (run / "fgsm0.npz").write_bytes(b"PK half")
    with pytest.raises(RobenchError, match="cannot read the survival flags"):
        measured(run)
