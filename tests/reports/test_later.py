"""Records of older versions, which do not name the options that came later."""

import json
from pathlib import Path

import pytest

from robench.reports import Record, Results
from robench.reports.grouping import rows
from robench.reports.later import earlier_attack
from robench.reports.surveys import grouped

# The first line of its kind in results/cifar10-small-resnet, as a first version wrote it.
COMMITTED = Path(__file__).parents[2] / "results/cifar10-small-resnet/results.jsonl"
STAGE = {"momentum": 0.0, "targets": 9, "units": 1, "share": 1.0}
TRAIN = {"optimizer": "sgd", "beta2": 0.999, "clip": None, "precision": "fp32",
         "schedule": "multistep", "pct_start": 0.3, "warmup": 0.0, "ema": None, "ema_start": 0.0}


@pytest.fixture(params=["fgsm", "pgd-20"])
def old(request):
    lines = map(json.loads, COMMITTED.read_text(encoding="utf-8").splitlines())
    return next(Record(**line) for line in lines if line["attack"] == request.param)


def newer(record, stage=STAGE, train=TRAIN, **options):
    """The record of seed 1 as the present version writes it, with options as given."""
    config = {"label_smoothing": 0.0, **record.defense_config}
    return record.model_copy(update={
        "seed": 1, "attack_config": {"precision": "exact", **options, "stages": {
            "pgd": {**record.attack_config, **stage}}},
        "defense_config": {**config, "train": {**config["train"], **train}}})


def test_an_old_and_a_new_record_share_row_and_column(old):
    assert "stages" not in old.attack_config and "label_smoothing" not in old.defense_config
    for records in ([old, newer(old)], [newer(old), old]):
        (row,) = rows(records)
        assert row.label == "pgd-at" and list(row.cells) == [old.attack]
        assert sorted(row.cells[old.attack]) == [0, 1]


@pytest.mark.parametrize(("changes", "shown"), [
    ({"train": {**TRAIN, "precision": "bf16"}}, "train.precision=bf16"),
    ({"train": {**TRAIN, "ema": 0.99}}, "train.ema=0.99"),
])
def test_what_is_not_as_it_was_before_is_another_row(old, changes, shown):
    assert [row.label for row in rows([old, newer(old, **changes)])] == [
        "pgd-at", f"pgd-at ({shown})"]


@pytest.mark.parametrize(("changes", "shown"), [
    ({"stage": {**STAGE, "momentum": 1.0}}, "momentum=1.0"),
    ({"precision": "bf16"}, "precision=bf16"),
    ({"stage": {**STAGE, "share": 0.5}}, "share=0.5"),
])
def test_an_attack_that_is_not_as_it_was_before_is_another_column(old, changes, shown):
    (row,) = rows([old, newer(old, **changes)])
    first, second = row.cells
    assert first.startswith(old.attack) and shown in second and first != second


def test_several_stages_and_other_libraries_stay_as_they_are():
    stages = {"apgd-ce": {"steps": 100, "units": 1}, "square": {"queries": 5000, "units": 1}}
    assert earlier_attack({"precision": "exact", "stages": stages}) == {"stages": stages}
    assert earlier_attack({"name": "standard", "precision": "exact"}) == {
        "name": "standard", "precision": "exact"}
    assert earlier_attack({"stages": None}) == {"stages": None}


def test_surveys_of_old_and_new_networks_are_one_row(make_steps):
    before, now = (make_steps(seed=seed, weights_sha256=str(seed), defense_config=config)
                   for seed, config in enumerate(({"train": {"lr": 0.1}}, {
                       "train": {"lr": 0.1, **TRAIN}, "label_smoothing": 0.0})))
    ((nets),) = grouped(Results(steps=[before, now]).steps, lambda one: 0).values()
    assert [len(some) for some in nets.values()] == [2]
