import math

import pytest
from scipy import stats

from robench.reports import Results
from robench.reports.ablation import ablation, ablation_boards


@pytest.fixture
def runs(make_record):
    """Three seeds with two values of an option; robust images by (value, seed)."""
    counts = {("fp32", 0): 200, ("fp32", 1): 210, ("fp32", 2): 190,
              ("bf16", 0): 204, ("bf16", 1): 210, ("bf16", 2): 193}
    return [make_record(run=f"{value}-{seed}", seed=seed, weights_sha256=f"{value}{seed}",
                        defense_config={"precision": value}, n_robust=robust)
            for (value, seed), robust in counts.items()]


def test_differences_are_paired_by_seed(runs):
    frame = ablation(Results(runs))
    line = frame[frame["metric"] == "pgd-20"].iloc[0]
    deltas = [4 / 4, 0, 3 / 4]  # of 400 images, in points
    test = stats.ttest_1samp(deltas, 0).confidence_interval(0.95)
    assert (line["label"], line["delta_to"]) == ("trades (precision=bf16)",
                                                 "trades (precision=fp32)")
    assert line["delta"] == pytest.approx(sum(deltas) / 3)
    assert line["delta_std"] == pytest.approx(stats.tstd(deltas))
    assert (line["delta_from"], line["delta_until"]) == pytest.approx((test.low, test.high))
    clean = frame[frame["metric"] == "clean"].iloc[0]
    assert (clean["delta"], clean["delta_from"], clean["n"]) == (0, 0, 400)
    (board,) = ablation_boards(Results(runs))
    assert [cell.text for cell in board.columns[-2].cells] == ["+0.0", "+0.6"]


def test_only_what_is_alike_is_paired(runs, make_record):
    assert len(ablation(Results(runs))) == 2
    assert ablation(Results(runs[:4])).empty, "one seed in common has no spread"
    moved = [r.model_copy(update={"model": "resnet50"}) if r.run.startswith("bf16") else r
             for r in runs]
    assert ablation(Results(moved)).empty, "another network is no option"
    others = [r.model_copy(update={"data_sha256": "0" * 64}) if r.run.startswith("bf16") else r
              for r in runs]
    assert ablation(Results(others)).empty, "other images"
    failed = [r.model_copy(update={"status": "failed"}) if r.run == "bf16-2" else r for r in runs]
    assert list(ablation(Results(failed))["seeds"]) == [2, 2]
    assert not math.isnan(ablation(Results(failed))["delta"].sum())


def test_the_first_of_the_results_is_compared_with(runs):
    frame = ablation(Results(runs[::-1]))
    assert set(frame["delta_to"]) == {"trades (precision=bf16)"}
    assert frame["delta"].iloc[1] == pytest.approx(-1.75 / 3)
