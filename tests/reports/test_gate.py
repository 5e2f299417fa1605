"""The verdicts of the gate, what it compares with what, and what it says about it."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from robench.errors import UsageError
from robench.reports.drop import mcnemar, regressed
from robench.reports.gate import check
from robench.reports.measured import Measured
from robench.reports.trust import CHECKS, Finding, texts
from robench.reports.verdict import outcome_json, outcome_junit, outcome_markdown, outcome_text

N = 1000


def flags(n=N, *ranges):
    found = np.zeros(n, bool)
    for start, stop in ranges:
        found[start:stop] = True
    return found


def measured(robust=None, *, n=N, **changes):
    """All images are right; the first half survives unless told otherwise."""
    robust = flags(n, (0, n // 2)) if robust is None else robust
    values = dict(
        network="trades", model="resnet18", checkpoint="best", seed=0, weights_sha256="a" * 64,
        dataset="cifar10", split="test", n=n, data_sha256=f"images-{n}", threat="Linf:8/255",
        attack="autoattack", attack_config={"stages": {"square": {"queries": 5000}}},
        attack_seed=0, precision="exact", n_correct=n, n_robust=int(robust.sum()),
        robench="0.1.0", torch="2.15.0", created="2026-11-22T10:00:00+00:00",
        correct=np.ones(n, bool), robust=robust)
    return Measured(**{**values, **changes})


def verdict(current, baseline, **options):
    return check(current, baseline, **options).verdict


BASE = measured()


@pytest.mark.parametrize(("lost", "gained", "max_drop", "expected"), [
    (0, 0, 0.0, "pass"),  # no flag differs
    (0, 0, 0.5, "pass"),
    (20, 5, 0.5, "regressed"),
    (20, 5, 1.5, "inconclusive"),  # significant, but not larger than max-drop
    (20, 5, 3.0, "pass"),
    (6, 2, 0.3, "inconclusive"),
    (5, 0, 0.5, "inconclusive"),  # p = 1/32, but 0.5 points are tolerated
    (5, 0, 0.4, "regressed"),
    (4, 0, 0.0, "inconclusive"),  # p = 1/16
    (5, 20, 0.5, "improved"),
    (0, 1, 0.5, "pass"),
    (1, 1, 0.0, "inconclusive"),
])
def test_verdicts(lost, gained, max_drop, expected):
    now = measured(flags(N, (lost, N // 2), (N // 2, N // 2 + gained)))
    outcome = check([now], [BASE], max_drop=max_drop)
    (one,) = outcome.comparisons
    assert (outcome.verdict, one.verdict, one.paired) == (expected, expected, True)
    assert one.drop.points == pytest.approx(100 * (lost - gained) / N)
    assert (one.drop.lost, one.drop.gained) == (lost, gained)


def test_draws_get_the_verdict_that_is_simulated_in_test_power():
    random = np.random.default_rng(0)
    for lost, gained, _ in random.multinomial(N, [0.02, 0.008, 0.972], 40):
        now = measured(flags(N, (lost, N // 2), (N // 2, N // 2 + gained)))
        alarm = bool(regressed(mcnemar(lost, gained), 100 * (lost - gained) / N, max_drop=0.5,
                               alpha=0.05))
        assert (verdict([now], [BASE]) == "regressed") is alarm


def test_alpha_is_the_level_of_the_test():
    now = measured(flags(N, (9, N // 2), (N // 2, N // 2 + 2)))  # p = 0.033
    assert verdict([now], [BASE]) == "regressed"
    assert verdict([now], [BASE], alpha=0.01) == "inconclusive"


@pytest.mark.parametrize(("changes", "reason"), [
    ({"threat": "Linf:4/255"}, "threat: Linf:4/255, baseline Linf:8/255"),
    ({"dataset": "cifar100"}, "dataset: cifar100, baseline cifar10"),
    ({"split": "val"}, "split: val, baseline test"),
    ({"precision": "bf16"}, "precision: bf16, baseline exact"),
    ({"attack": "pyautoattack:standard"}, "attack: pyautoattack:standard, baseline autoattack"),
    ({"attack": "pgd-20"}, "not measured now: autoattack on trades, best"),
    ({"attack_config": {"stages": {"square": {"queries": 100}}}},
     "attack option stages.square.queries: 100, baseline 5000"),
    ({"attack_config": {}}, "attack option stages.square.queries: not there, baseline 5000"),
    ({"status": "partial", "n_open": 7}, "current: 7 of 1000 images were not attacked to the end"),
    ({"n_open": 7}, "current: 7 of 1000 images were not attacked to the end"),
    ({"status": "failed", "error": "out of luck"}, "current: autoattack failed: out of luck"),
])
def test_what_is_incomparable_names_what_differs(changes, reason):
    outcome = check([measured(**changes)], [BASE])
    assert outcome.verdict == "incomparable"
    assert outcome.comparisons[0].reasons == (reason,)


def test_a_baseline_that_was_not_attacked_to_the_end_is_none():
    outcome = check([BASE], [measured(status="partial", n_open=3)])
    assert outcome.comparisons[0].reasons == (
        "baseline: 3 of 1000 images were not attacked to the end",)


def test_other_images_of_the_data_set_are_compared_unpaired():
    outcome = check([measured(flags(2000, (0, 800)), n=2000)], [BASE])
    (one,) = outcome.comparisons
    assert (outcome.verdict, one.paired) == ("regressed", False)
    assert one.drop.points == pytest.approx(10)
    assert "the images are others" in one.notes[-1]


def test_lost_flags_are_compared_unpaired():
    bare = BASE.model_copy(update={"correct": None, "robust": None})
    (one,) = check([bare], [BASE]).comparisons
    assert not one.paired and "survival flags are lost" in one.notes[-1]


def test_autoattack_is_compared_or_else_the_strongest_of_the_baseline():
    pgd, fgsm = measured(flags(N, (0, 600)), attack="pgd-20"), measured(attack="fgsm")
    weak = measured(flags(N, (0, 100)), attack="pgd-20")
    assert [c.metric for c in check([BASE, pgd], [BASE, pgd, fgsm]).comparisons] == ["autoattack"]
    # fgsm leaves the baseline less, whatever the current network does.
    assert [c.metric for c in check([weak, fgsm], [pgd, fgsm]).comparisons] == ["fgsm"]


def test_what_the_baseline_lacks_is_said_and_guards_nothing():
    pgd = measured(attack="pgd-20", network="peeraid")
    now = [BASE, measured(attack="autoattack", network="peeraid"), pgd]
    some = check(now, [BASE, pgd], metrics=["autoattack", "pgd-20"])
    assert [(c.network, c.metric, c.verdict) for c in some.comparisons] == [
        ("trades, best", "autoattack", "pass"), ("peeraid, best", "pgd-20", "pass")]
    for one, lacking in zip(some.comparisons, ("pgd-20", "autoattack"), strict=True):
        assert one.notes[-1] == f"not compared, for the baseline does not have it: {lacking}"
    none = check(now, [BASE, pgd], metrics=["autoattack"])
    assert [c.verdict for c in none.comparisons] == ["pass", "incomparable"]
    for text in (outcome_text(none), outcome_markdown(none), outcome_junit(none)):
        assert "the baseline has no autoattack on peeraid, best" in text
    assert json.loads(outcome_json(none))["verdict"] == "incomparable"


def test_several_metrics_are_corrected_and_the_worst_counts():
    pgd = measured(attack="pgd-20")
    now = [measured(flags(N, (9, N // 2), (N // 2, N // 2 + 2))), pgd]  # p = 0.033
    outcome = check(now, [BASE, pgd], metrics=["autoattack", "pgd-20", "clean"])
    assert [one.verdict for one in outcome.comparisons] == ["inconclusive", "pass", "pass"]
    assert outcome.comparisons[0].p == pytest.approx(3 * 0.03271, rel=1e-3)
    assert outcome.verdict == "inconclusive"


def test_clean_accuracy_is_a_metric_that_needs_no_attack():
    wrong = flags(N, (30, N))
    now = measured(wrong & flags(N, (0, 500)), attack="fgsm", correct=wrong, n_correct=970)
    outcome = check([now], [BASE], metrics=["clean"])
    assert outcome.verdict == "regressed"
    assert outcome.comparisons[0].drop.points == pytest.approx(3)


def test_networks_of_several_are_found_by_their_names():
    other = measured(network="peeraid")
    worse = measured(flags(N, (40, 500)), network="peeraid")
    outcome = check([BASE, worse], [other, BASE])
    assert [(one.network, one.verdict) for one in outcome.comparisons] == [
        ("peeraid, best", "regressed"), ("trades, best", "pass")]
    assert verdict([worse], [BASE]) == "regressed"  # one and one, whatever they are called
    missing = check([BASE], [BASE, other])
    assert [one.verdict for one in missing.comparisons] == ["pass", "incomparable"]


def test_several_seeds_are_tested_over_images_and_over_seeds():
    random = np.random.default_rng(1)
    seeds = [measured(random.random(N) < 0.5 + 0.02 * i, seed=i) for i in range(3)]
    now = measured(random.random(N) < 0.3)
    (one,) = check([now], seeds).comparisons
    assert one.verdict == "regressed" and one.seeds is not None
    before = [side.n_robust / N for side in seeds]
    assert one.seeds.points == pytest.approx(one.drop.points) == pytest.approx(
        100 * (np.mean(before) - now.n_robust / N))
    text = outcome_text(check([now], seeds))
    assert "are these networks less robust on other images, too?" in text
    assert "would other training runs be?" in text and "3 and 1 seeds" in text


def test_an_inconclusive_verdict_says_how_many_images_would_decide():
    now = measured(flags(N, (6, N // 2), (N // 2, N // 2 + 2)))  # 0.4 points
    (drop,) = check([now], [BASE], max_drop=0.0).comparisons
    assert 1500 < drop.needed < 4500  # (1.64 + 0.84)^2 * 0.008 / 0.004^2 = 3090
    (room,) = check([now], [BASE], max_drop=0.6).comparisons
    assert 10_000 < room.needed < 14_000  # the same over 0.002^2
    (never,) = check([now], [BASE], max_drop=0.4).comparisons
    assert never.needed is None
    assert "about 3," in outcome_text(check([now], [BASE], max_drop=0.0))
    assert "no number of images" in outcome_text(check([now], [BASE], max_drop=0.4))


def test_what_a_reader_must_know_is_noted():
    now = measured(torch="2.16.0", attack_seed=1, warnings=("zero gradient", "old"))
    (one,) = check([now], [measured(warnings=("old",))]).comparisons
    assert one.notes == ("the weights are the same on both sides", "torch: 2.16.0, baseline 2.15.0",
                         "attack seed: 1, baseline 0", "warning: zero gradient")


def test_an_unreliable_baseline_is_noted_where_it_was_attacked():
    old = measured(warnings=texts([Finding(CHECKS["zero-grad"], 1.0)]))
    attacked, clean = check([BASE], [old], metrics=["autoattack", "clean"]).comparisons
    assert "the baseline is unreliable: zero-grad; it may be too high" in attacked.notes
    assert not [note for note in clean.notes if "unreliable" in note]


@pytest.mark.parametrize(("options", "words"), [
    ({"metrics": ["autoatack"]}, "unknown metric 'autoatack'. Did you mean: autoattack?"),
    ({"max_drop": -1}, "write points from 0 to 100"),
    ({"max_drop": float("nan")}, "write points from 0 to 100"),
    ({"alpha": 0.5}, "write a probability between 0 and 0.5"),
    ({"alpha": float("nan")}, "write a probability between 0 and 0.5"),
])
def test_wrong_rules_are_refused(options, words):
    with pytest.raises(UsageError) as error:
        check([BASE], [BASE], **options)
    assert words in str(error.value)


EVIL = "x\x1b[2J<img src=x>|]]>&\x00\nend"


@pytest.mark.parametrize("lost", [0, 30])
def test_names_from_files_stay_text(lost):
    now = measured(flags(N, (lost, 500)), network=EVIL, warnings=(EVIL,))
    outcome = check([now], [measured(network=EVIL)])
    assert all(c.isprintable() or c == "\n" for c in outcome_text(outcome))
    page = outcome_markdown(outcome)
    assert all(c.isprintable() or c == "\n" for c in page) and "<img" not in page.replace("\\<", "")
    suite = ElementTree.fromstring(outcome_junit(outcome))
    assert suite.find("testcase").get("classname").startswith("x")
    assert json.loads(outcome_json(outcome))["comparisons"][0]["network"].startswith("x")


def test_junit_counts_what_fails():
    outcome = check([measured(flags(N, (30, 500))), measured(attack="fgsm", threat="L2:1")],
                    [BASE, measured(attack="fgsm"), measured(attack="cw")],
                    metrics=["autoattack", "fgsm", "clean"])
    suite = ElementTree.fromstring(outcome_junit(outcome))
    assert {k: suite.get(k) for k in ("tests", "failures", "errors")} == {
        "tests": "3", "failures": "1", "errors": "1"}
    assert [case[0].tag for case in suite] == ["failure", "error", "system-out"]


def test_json_holds_every_number():
    content = json.loads(outcome_json(check([measured(flags(N, (30, 500)))], [BASE])))
    (one,) = content["comparisons"]
    assert (content["verdict"], one["verdict"], one["paired"]) == ("regressed", "regressed", True)
    assert (one["baseline"]["share"], one["current"]["share"]) == (0.5, 0.47)
    assert (one["drop"]["points"], one["drop"]["lost"]) == (pytest.approx(3), 30)
