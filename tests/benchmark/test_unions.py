"""Several threat models in one run, through the command line."""

from collections import Counter
from shutil import rmtree

import pandas as pd
import pytest

from robench.reports.store import load


@pytest.fixture
def run(robench, tmp_path, checkpoint):
    """robench eval on ten digits, into the folder `run`."""
    def call(*arguments):
        done = robench("eval", checkpoint, *arguments, "--limit", 10, "--device", "cpu", "--quiet",
                       "--out", tmp_path / "run")
        assert done.code in (0, 4), done.err  # 4: a network of random weights is suspicious

    return call


def test_a_union_is_a_ranking_of_its_own(run, robench, tmp_path):
    run("--threat", "Linf:0.01", "--attack", "apgd-ce", "--attack", "union,also=L2:0.05")
    alone, both = load([tmp_path / "run"]).records
    assert (alone.threat, both.threat) == ("Linf:0.01", "Linf:0.01+L2:0.05")
    assert both.n_robust <= both.n_correct and both.status == "ok"
    board = pd.read_csv(tmp_path / "run" / "leaderboard.csv")
    assert dict(zip(board["threat"], board["rank_attack"], strict=True)) == {
        "Linf:0.01": "apgd-ce", "Linf:0.01+L2:0.05": "union,also=L2:0.05"}
    done = robench("analyze", "union", tmp_path / "run")
    assert done.code == 0 and "## digits test, Linf:0.01+L2:0.05" in done.out
    table = pd.read_csv(tmp_path / "run" / "union.csv").set_index("threat")
    assert list(table.index) == ["clean", "Linf:0.01", "L2:0.05", "all"]
    assert table.loc["all", "accuracy"] == 10 * both.n_robust <= 10 * alone.n_robust
    done = robench("baseline", "save", tmp_path / "run", "--out", tmp_path / "base.json")
    assert done.code == 0, done.err
    assert '"threat": "Linf:0.01+L2:0.05"' in (tmp_path / "base.json").read_text()


def test_several_threat_models_are_one_run(run, robench, tmp_path):
    """The numbers of a run for each of them; a ranking for each; the union of both."""
    both = ("--threat", "Linf:0.02", "--threat", "L2:0.2")
    attacks = ("--attack", "apgd-ce", "--attack", "fgsm")

    def measured():
        return {(r.threat, r.attack, r.n_robust) for r in load([tmp_path / "run"]).records}

    for threat in ("Linf:0.02", "L2:0.2"):
        run("--threat", threat, *attacks)
    alone, table = measured(), union_table(robench, tmp_path / "run")
    rmtree(tmp_path / "run")
    run(*both, *attacks, "--shards", 3)
    assert measured() == alone and len(alone) == 4
    assert union_table(robench, tmp_path / "run").equals(table)
    linf, l2 = (min(n for t, _, n in alone if t == threat) for threat in ("Linf:0.02", "L2:0.2"))
    assert (table["Linf:0.02"], table["L2:0.2"]) == (10 * linf, 10 * l2)
    assert table["all"] <= min(table["Linf:0.02"], table["L2:0.2"])
    board = pd.read_csv(tmp_path / "run" / "leaderboard.csv")
    assert sorted(board["threat"]) == ["L2:0.2", "Linf:0.02"] and set(board["rank"]) == {1}

    base = tmp_path / "base.json"
    assert robench("baseline", "save", tmp_path / "run", "--out", base).code == 0
    done = robench("check", tmp_path / "run", "--against", base, "--allow-inconclusive")
    for threat in ("Linf:0.02", "L2:0.2"):
        assert f"pass: apgd-ce on digits test, {threat} " in done.out, done.err


def union_table(robench, folder):
    """threat model -> accuracy."""
    assert robench("analyze", "union", folder).code == 0
    return pd.read_csv(folder / "union.csv").set_index("threat")["accuracy"]


def test_a_defense_is_trained_once_and_attacked_under_each(robench, tmp_path):
    job = ("--defense", "peeraid", "--epochs", 1, "--train-limit", 64, "--limit", 10, "--attack",
           "fgsm", "--set", "validation=10", "--set", "select_steps=1", "--set", "swa_start=null",
           "--device", "cpu", "--out", tmp_path / "run", "--quiet")
    linf, both = ("--threat", "Linf:0.1"), ("--threat", "Linf:0.1", "--threat", "L2:0.5")
    assert robench("run", *job, *linf, "--jobs", 1).code in (0, 4)
    first = load([tmp_path / "run"])
    done = robench("plan", *job, *both)
    # under each fgsm, pgd-20 on two networks that are not ranked, and six points of a curve
    assert "1 trainings (1 done), 18 attacks (9 done), 1 Rob_f analyses (0 done)" in done.out
    assert robench("run", *job, *both, "--jobs", 2).code in (0, 4)
    again = load([tmp_path / "run"])
    assert len(list((tmp_path / "run" / "cells").iterdir())) == 1
    assert {r.defense_config["threat"] for r in again.records} == {"Linf:0.1"}
    kept = [r for r in again.records if r.threat.startswith("Linf")]
    assert [(r.threat, r.attack, r.n_robust, r.created) for r in kept] == [
        (r.threat, r.attack, r.n_robust, r.created) for r in first.records]
    roles = Counter((r.role, r.ranked) for r in again.records if r.threat.startswith("L2"))
    assert roles == {("table", True): 1, ("table", False): 2, ("curve", True): 6}
    assert {t.threat for t in again.transfers} == {"Linf:0.1", "L2:0.5"}
    assert "18 attacks (18 done), 1 Rob_f analyses (1 done)" in robench("plan", *job, *both).out


@pytest.mark.parametrize("arguments, message", [
    (("--threat", "L2:0.2", "--threat", "l2:1/5"), "threat model L2:0.2 is listed twice"),
    (("--threat", "L2:0.2", "--threat", "Linf:0.1", "--attack", "ddn", "--attack", "fgsm"),
     "ddn at Linf:0.1: ddn attacks in L2 only"),
])
def test_wrong_threat_models_are_found_before_anything_runs(
    robench, tmp_path, checkpoint, arguments, message
):
    done = robench("eval", checkpoint, *arguments, "--out", tmp_path / "run")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_takes_one_threat_model_refuses_two(robench, tmp_path, checkpoint):
    (tmp_path / "two.yaml").write_text("threat: [Linf:0.1, L2:0.2]\n")
    done = robench("steps", checkpoint, "--config", tmp_path / "two.yaml", "--out", tmp_path)
    assert done.code == 2 and "name one of Linf:0.1, L2:0.2 with --threat" in done.err
    done = robench("steps", checkpoint, "--config", tmp_path / "two.yaml", "--out", tmp_path,
                   "--threat", "L2:0.2", "--steps", 1, "--limit", 5, "--quiet")
    assert done.code == 0, done.err
