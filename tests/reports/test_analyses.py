"""Every analysis: as a table, as figures, on the page, and through the real command line."""

import sys

import pandas as pd
import pytest

from robench.benchmark import cli
from robench.reports import Results, load, save
from robench.reports.analyses import ANALYSES
from robench.reports.curves import over_eps
from robench.reports.gallery import draw, looks_of
from robench.reports.page import sections
from robench.reports.tables import rob_f_training, training

WITH_DATA = {"leaderboard", "rob-f", "rob-f-training", "others", "trade-off", "cost", "over-eps",
             "overlap", "training"}


@pytest.fixture
def analyze(tmp_path, monkeypatch, capsys, campaign):
    """analyze("rob-f", "run") -> exit code, stdout, stderr; in a folder with the run."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run", campaign)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["robench", "analyze", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("one", ANALYSES.values(), ids=ANALYSES)
def test_every_analysis_takes_results_without_rows(one):
    frame = one.frame(Results())
    assert frame.empty and len(frame.columns) > 5
    assert not list(one.draw(Results(), {})) and isinstance(one.text(Results()), str)
    assert one.description and one.file == one.name.replace("-", "_") + ".csv"


@pytest.mark.parametrize("one", ANALYSES.values(), ids=ANALYSES)
def test_every_analysis_of_a_campaign(one, campaign):
    frame, drawings = one.frame(campaign), draw(one, campaign, looks_of(campaign))
    assert (not frame.empty) == (one.name in WITH_DATA)
    assert drawings == [] or one.name in WITH_DATA
    assert ("trades" in one.text(campaign)) == (
        one.name in WITH_DATA - {"rob-f", "rob-f-training"})


def test_the_page_has_a_tab_for_each_with_something_to_see(campaign):
    shown = [section.id for section in sections(campaign)]
    assert shown == [name for name in ANALYSES if name in WITH_DATA] + ["measured", "records"]


def test_without_a_name_they_are_listed(analyze):
    code, out, err = analyze()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(ANALYSES)


def test_a_table_and_its_figures(analyze, tmp_path, campaign):
    code, out, err = analyze("trade-off", "run", "--out", "new")
    assert code == 0 and out.startswith("## Trade-off\n") and "| peeraid" in out
    files = {path.relative_to(tmp_path / "new").as_posix()
             for path in (tmp_path / "new").rglob("*") if path.is_file()}
    stems = {f"figures/{kind}-vs-robust-digits-test-linf-8-255" for kind in ("clean", "cost")}
    assert files == {"trade_off.csv", *(f"{stem}.{end}" for stem in stems
                                        for end in ("png", "svg"))}
    assert err.endswith("to new/\n") and all(name.rpartition("/")[2] in err for name in files)
    read = pd.read_csv(tmp_path / "new/trade_off.csv")
    frame = ANALYSES["trade-off"].frame(load([tmp_path / "run"]))
    assert list(read["robust"]) == list(frame["robust"]) and list(read.columns) == list(frame)


def test_runs_are_merged_and_the_first_takes_the_files(analyze, tmp_path, make_record):
    save(tmp_path / "other", Results([make_record(defense="mart", ranked=False)]))
    code, out, _ = analyze("others", "other", "run")
    assert code == 0 and "| mart" in out and "| trades" in out
    assert (tmp_path / "other/others.csv").exists() and not (tmp_path / "run/others.csv").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (("rob_f", "run"), "unknown analysis 'rob_f'. Did you mean: rob-f?"),
    (("rob-f",), "name a RUN: robench analyze rob-f RUN"),
    (("transfer", "run"), "these runs have no data for 'transfer': "),
    (("rob-f", "elsewhere"), "no results.jsonl"),
])
def test_a_mistake_is_one_line_and_writes_nothing(analyze, tmp_path, arguments, words):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = analyze(*arguments)
    assert (code, out) == (2, "") and words in err
    assert err.startswith("robench: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_over_eps_begins_at_clean_accuracy_and_knows_its_seeds(campaign):
    frame = over_eps(campaign)
    trades = frame[frame["name"] == "trades"]
    assert list(trades["eps"] * 255) == pytest.approx([0, 2, 4, 8, 12])
    assert list(trades["accuracy"]) == pytest.approx([82, 74.5, 67, 52, 37])
    assert set(trades["seeds"]) == {2} and set(trades["n"]) == {200}
    assert (frame["low"] <= frame["accuracy"]).all() and (frame["accuracy"] <= frame["high"]).all()


def test_rob_f_over_training_has_a_line_for_each_network_epoch_and_run(campaign):
    frame = rob_f_training(campaign.epochs, campaign.records)
    assert len(frame) == 2 * 2 * 30 and set(frame["label"]) == {"peeraid"}
    peer = frame[(frame["network"] == "peer") & (frame["seed"] == 1) & (frame["epoch"] == 10)]
    assert list(peer["rob_f_self"]) == pytest.approx([1])
    assert list(peer["rob_f_student"]) == pytest.approx([54])


def test_training_has_a_line_for_each_epoch_and_run(campaign):
    frame = training(campaign.epochs, campaign.records)
    assert len(frame) == 3 * 2 * 30 and set(frame["label"]) == {"trades", "peeraid", "pgd_at"}
    one = frame[(frame["run"] == "run-peeraid-0") & (frame["epoch"] == 20)].iloc[0]
    assert (one["swa_clean"], one["swa_robust"]) == pytest.approx((84, 56))
    assert one["loss"] == pytest.approx(2.3 * 0.93**20)
    early = frame[(frame["run"] == "run-peeraid-0") & (frame["epoch"] == 19)].iloc[0]
    assert pd.isna(early["swa_clean"]) and early["clean"] == pytest.approx(84 * (1 - 0.8**20))
