import json
import math

import pytest

from robench.errors import UsageError
from robench.reports import Results, load, save
from robench.reports.record import Epoch


def test_round_trip(campaign, tmp_path):
    save(tmp_path / "out", campaign)
    assert load([tmp_path / "out"]) == campaign


def test_a_results_file_stands_for_its_folder(campaign, tmp_path):
    save(tmp_path, campaign)
    assert load([tmp_path / "results.jsonl"]) == load([tmp_path])


def test_save_is_deterministic_and_keeps_the_order(campaign, tmp_path):
    save(tmp_path / "a", campaign)
    save(tmp_path / "b", load([tmp_path / "a"]))
    for name in ("results.jsonl", "transfer.jsonl", "training.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_merging_drops_duplicates_wherever_their_flags_lie(make_record, tmp_path):
    one, other = make_record(flags="x.npz"), make_record(seed=1)
    save(tmp_path / "a", Results([one]))
    save(tmp_path / "b", Results([one, other]))
    merged = load([tmp_path / "a", tmp_path / "b"]).records
    assert [r.seed for r in merged] == [0, 1]
    assert merged[0].flags == str(tmp_path / "a" / "x.npz")


def test_flags_are_stored_relative_so_that_a_folder_can_move(make_record, tmp_path):
    flags = tmp_path / "out" / "eval" / "x.npz"
    save(tmp_path / "out", Results([make_record(flags=str(flags))]))
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text())["flags"] == "eval/x.npz"
    (tmp_path / "out").rename(tmp_path / "moved")
    (record,) = load([tmp_path / "moved"]).records
    assert record.flags == str(tmp_path / "moved" / "eval" / "x.npz")


def test_a_diverged_loss_survives_in_valid_json(make_epoch, tmp_path):
    save(tmp_path, Results(epochs=[make_epoch(losses={"total": math.nan, "kl": math.inf})]))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "training.jsonl").read_text(), parse_constant=refuse)
    (epoch,) = load([tmp_path]).epochs
    assert math.isnan(epoch.losses["total"]) and epoch.losses["kl"] == math.inf


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("results.jsonl", b'{"seed": 1, "n":'),
        ("results.jsonl", b"\xff\xfe"),
        ("results.jsonl", b"[]"),
        ("transfer.jsonl", b'{"surprise": 1}'),
        ("training.jsonl", b"epoch 3"),
    ],
)
def test_a_broken_line_is_named(campaign, tmp_path, name, line):
    save(tmp_path, campaign)
    with (tmp_path / name).open("ab") as file:
        file.write(b"\n" + line)
    lines = (tmp_path / name).read_bytes().count(b"\n") + 1
    with pytest.raises(UsageError) as error:
        load([tmp_path])
    assert str(error.value).startswith(f"{tmp_path / name}:{lines}: ")
    assert "\n" not in str(error.value)


def test_only_results_jsonl_must_be_there(campaign, tmp_path):
    save(tmp_path, campaign)
    (tmp_path / "transfer.jsonl").unlink()
    (tmp_path / "training.jsonl").unlink()
    assert load([tmp_path]) == Results(campaign.records)
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(UsageError, match=r"no results\.jsonl"):
        load([tmp_path])


def test_epochs_of_the_time_when_swa_was_the_only_average(make_epoch):
    kept = make_epoch().model_dump(mode="json")
    kept.pop("averages")
    old = Epoch.model_validate({**kept, "swa_clean": 0.5, "swa_robust": 0.25})
    assert old.averages == {"swa": (0.5, 0.25)}
    none = Epoch.model_validate({**kept, "swa_clean": None, "swa_robust": None})
    assert none == make_epoch()
