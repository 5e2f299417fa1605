"""robench report: formats, the baseline and RobustBench's files through the real command line."""

import json
import sys

import pytest

from robench.benchmark import cli
from robench.reports import Results, load, save
from robench.reports.base import REPORTS, format_of


@pytest.fixture
def report(tmp_path, monkeypatch, capsys, make_record):
    """report("run", "--format", "csv") -> exit code, stdout, stderr; in a folder with runs."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run", Results([
        make_record(dataset="cifar10", baseline=True),
        make_record(dataset="cifar10", defense="peeraid", n_robust=220)]))
    save(tmp_path / "other", Results([
        make_record(dataset="cifar10", defense="cat", n=100, n_correct=90, n_robust=60,
                    data_sha256="other")]))
    (tmp_path / "Linf").mkdir()
    (tmp_path / "Linf" / "Author2024Title.json").write_text(json.dumps({
        "dataset": "cifar10", "eps": "8/255", "clean_acc": "90.00", "autoattack_acc": "70.00"}))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["robench", "report", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


def written(folder):
    return {path.name for path in folder.iterdir()} - {
        "results.jsonl", "transfer.jsonl", "training.jsonl", "landscape.jsonl"}


def test_only_the_formats_that_are_named(report, tmp_path):
    code, out, err = report("run", "--format", "tex, json", "--out", "new")
    assert code == 0 and "| peeraid" in out
    *costs, last = err.splitlines()
    assert last == "wrote the reports to new/" and all(line.startswith("cost: ") for line in costs)
    assert written(tmp_path / "new") == {"leaderboard.tex", "leaderboard.json"}


def test_the_help_names_every_format(report):
    _, out, _ = report("--help")
    text = " ".join(out.split())
    for name in {format_of(entry) for entry in REPORTS}:
        assert name in text.partition("Some of ")[2].partition("with commas")[0]


def test_the_baseline_of_the_differences(report, tmp_path):
    code, out, _ = report("run", "--format", "md", "--baseline", "peeraid", "--out", "new")
    assert code == 0 and "Δ to peeraid, points" in out
    assert [r.baseline for r in load([tmp_path / "new"]).records] == [False, True]
    assert [r.baseline for r in load([tmp_path / "run"]).records] == [True, False]


def test_files_of_robustbench_are_shown_as_published(report, tmp_path):
    code, out, _ = report("run", "Linf/Author2024Title.json", "--format", "md,csv")
    assert code == 0 and "Author2024Title" not in out
    measured, _, others = (tmp_path / "run/leaderboard.md").read_text(encoding="utf-8").partition(
        "## Published: cifar10")
    assert "Author2024Title" in others and "Author2024Title" not in measured
    code, _, err = report("Linf/Author2024Title.json", "--out", "new", "--format", "md")
    assert code == 0 and err.splitlines()[-1] == "wrote the reports to new/"
    assert "Author2024Title" in (tmp_path / "new/leaderboard.md").read_text(encoding="utf-8")


def test_files_for_robustbench(report, tmp_path):
    code, _, err = report("run", "--format", "robustbench", "--out", "new")
    assert code == 0 and written(tmp_path / "new") == {"model_info"}
    folder = tmp_path / "new/model_info/cifar10/Linf"
    assert {path.name for path in folder.iterdir()} == {
        "trades_resnet18_best.json", "peeraid_resnet18_best.json"}


@pytest.mark.parametrize(("arguments", "words"), [
    (("run", "--format", "text"), "unknown format 'text'. Did you mean: tex?"),
    (("run", "--baseline", "peerad"), "unknown baseline 'peerad'. Did you mean: peeraid?"),
    (("run", "other", "--baseline", "trades"), "nothing of it may be compared with cat on cifar10 "
                                               "test, Linf:8/255: other images"),
    (("Linf/Author2024Title.json",), "there is no run to write the reports to: add --out DIR"),
    (("run", "results.json"), "the norm of a RobustBench file is the name of its folder"),
    (("--into", "README.md", "--format", "md"), "name one RUN or several, or a file with --into"),
    (("--into", "README.md", "--baseline", "cat"), "name one RUN or several"),
])
def test_a_mistake_is_one_line_and_writes_nothing(report, tmp_path, arguments, words):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = report(*arguments)
    assert (code, out) == (2, "") and words in err
    assert err.startswith("robench: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
