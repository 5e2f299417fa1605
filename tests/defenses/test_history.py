"""What the epochs of a training say together."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.defenses.history import (
    EpochLog,
    catastrophic_epoch,
    findings,
    is_best,
    robust_overfitting,
)


def history(robust, clean=None, losses=None):
    clean = clean or [None if r is None else 0.9 for r in robust]
    losses = losses or [1.0 - 0.1 * epoch for epoch in range(len(robust))]
    return [EpochLog(epoch, 0.1, 2.0, {"total": loss}, c, r)
            for epoch, (r, c, loss) in enumerate(zip(robust, clean, losses, strict=True))]


def test_a_log_survives_json():
    log = EpochLog(3, 0.1, 2.0, {"total": 1.5}, 0.9, 0.4, 100, {"swa": (0.8, 0.5)},
                   {"student": (0.3, 0.3), "peer": (0.0, 0.6)})
    assert EpochLog.read(json.loads(json.dumps(asdict(log)))) == log
    assert log.images_per_second == 50
    assert (log.score(), log.score("swa"), log.score("ema")) == ((0.4, 0.9), (0.5, 0.8), None)


@pytest.mark.parametrize(("swa", "averages"), [((0.8, 0.5), {"swa": (0.8, 0.5)}),
                                               ((None, None), {})])
def test_logs_of_the_time_when_swa_was_the_only_average(swa, averages):
    kept = {"epoch": 3, "lr": 0.1, "seconds": 2.0, "losses": {"total": 1.5}, "clean": 0.9,
            "robust": 0.4, "swa_clean": swa[0], "swa_robust": swa[1]}
    log = EpochLog.read(kept)
    assert log == EpochLog(3, 0.1, 2.0, {"total": 1.5}, 0.9, 0.4, averages=averages)


@pytest.mark.parametrize("damaged", [{}, {"epoch": 1}, "text", {"averages": 3}, None,
                                     {"averages": {"swa": 1}}, {"rob_f": {"peer": [0.1]}}])
def test_damaged_logs(damaged):
    with pytest.raises((ValueError, KeyError, TypeError)):
        EpochLog.read(damaged)


scores = st.none() | st.sampled_from([0.0, 0.1, 0.2, 0.3])


@given(robust=st.lists(scores, min_size=1, max_size=6))
def test_the_best_epoch_is_the_last_of_the_highest(robust):
    logs = history(robust)
    best = [epoch for epoch in range(len(logs)) if is_best(logs[: epoch + 1])]
    known = [r for r in robust if r is not None]
    if known:
        assert best[-1] == max(e for e, r in enumerate(robust) if r == max(known))
        assert robust_overfitting(logs) == max(known) - known[-1]
    else:
        assert best == [] and robust_overfitting(logs) is None


@pytest.mark.parametrize(
    ("robust", "clean", "epoch"),
    [
        ([0.3, 0.4, 0.0], [0.6, 0.7, 0.8], 2),
        ([0.3, 0.4, 0.25, 0.1, 0.0], [0.6, 0.7, 0.8, 0.8, 0.9], 3),  # slowly
        ([0.4, None, 0.1], [0.7, None, 0.7], 2),
        ([0.5, 0.45, 0.4], [0.8, 0.82, 0.85], None),  # robust overfitting
        ([0.4, 0.1], [0.7, 0.2], None),  # the network broke altogether
        ([0.1, 0.0], [0.1, 0.7], None),  # as robust as a constant
        ([0.4, 0.1, 0.4, 0.1], [0.7, 0.8, 0.8, 0.9], 1),
        ([None, None], [None, None], None),
    ],
)
def test_catastrophic_overfitting(robust, clean, epoch):
    logs = history(robust, clean)
    assert catastrophic_epoch(logs) == epoch
    told = [len(logs[: n + 1]) - 1 for n in range(len(logs))
            if any("catastrophic" in text for text in findings(logs[: n + 1]))]
    assert told == ([] if epoch is None else [epoch])


@pytest.mark.parametrize(
    ("losses", "stuck"),
    [
        ([2.3] * 5, True), ([2.3, 2.31, 2.29, 2.3, 2.3], True), ([2.3, 2.2, 2.3, 2.3, 2.3], False),
        ([1.0, 2.0, 3.0, 4.0, 5.0], True), ([-1.0, -1.1, -1.2, -1.3, -1.4], False),
        ([2.3] * 4, False), ([2.3] * 6, False), ([0.0] * 5, True),
    ],
)
def test_a_loss_that_does_not_move(losses, stuck):
    found = list(findings(history([None] * len(losses), losses=losses)))
    assert bool(found) == stuck
    assert all("\n" not in text for text in found)
