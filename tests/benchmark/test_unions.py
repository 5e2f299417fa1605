"""Several threat models in one run, through the command line."""

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


def test_threat_models_one_after_the_other(run, robench, tmp_path):
    for threat in ("Linf:0.02", "L2:0.2"):
        run("--threat", threat, "--attack", "apgd-ce")
    linf, l2 = load([tmp_path / "run"]).records
    done = robench("analyze", "union", tmp_path / "run")
    assert done.code == 0
    table = pd.read_csv(tmp_path / "run" / "union.csv").set_index("threat")["accuracy"]
    assert (table["Linf:0.02"], table["L2:0.2"]) == (10 * linf.n_robust, 10 * l2.n_robust)
    assert table["all"] <= min(table["Linf:0.02"], table["L2:0.2"])
