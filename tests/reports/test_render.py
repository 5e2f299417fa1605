import pandas as pd
import pytest

from robench.errors import RobenchError, UsageError
from robench.reports import REPORTS, Results, load, render
from robench.reports.base import ASKED, Report, format_of

FILES = {"results.jsonl", "transfer.jsonl", "training.jsonl", "landscape.jsonl",
         "leaderboard.md", "leaderboard.html", "leaderboard.tex", "leaderboard.json"}
TABLES = {"leaderboard.csv", "rob_f.csv", "others.csv", "trade_off.csv", "cost.csv",
          "rob_f_training.csv", "over_eps.csv", "overlap.csv", "training.csv"}


@pytest.fixture(scope="session")
def rendered(campaign, tmp_path_factory):
    """The folder and the paths of a rendered campaign."""
    out = tmp_path_factory.mktemp("rendered")
    return out, render(campaign, out)


def test_all_files_are_written(rendered):
    out, paths = rendered
    names = {path.relative_to(out).as_posix() for path in paths}
    figures = {name for name in names if name.startswith("figures/")}
    assert names - figures == FILES | TABLES and len(figures) == 14
    empty = {path.name for path in paths if not path.stat().st_size}
    assert empty == {"landscape.jsonl"}  # of which the campaign has none
    assert [path.name for path in paths[:4]] == ["results.jsonl", "transfer.jsonl",
                                                 "training.jsonl", "landscape.jsonl"]
    assert set(out.rglob("*")) - set(paths) == {out / "figures"}


def test_only_the_named_formats_are_written(campaign, tmp_path):
    paths = render(campaign, tmp_path, ["csv", "tex"])
    assert {path.name for path in paths if path.suffix != ".jsonl"} == {
        *TABLES, "leaderboard.tex"}
    with pytest.raises(UsageError, match="unknown format 'text'. Did you mean: tex?"):
        render(campaign, tmp_path / "new", ["csv", "text"])
    assert not (tmp_path / "new").exists()


def test_every_report_has_a_format_and_robustbench_is_asked_for():
    formats = {format_of(entry) for entry in REPORTS}
    assert formats == {"csv", "md", "tex", "json", "html", "figures", "robustbench"}
    assert ASKED == {"robustbench"}


def test_a_second_render_changes_no_byte(rendered):
    out, paths = rendered
    before = {path: path.read_bytes() for path in paths}
    assert render(load([out]), out) == paths
    for path in paths:
        assert path.read_bytes() == before[path], path.name


def test_relative_flags_are_found_beside_the_results(make_record, write_flags, tmp_path):
    records = []
    for name, count in (("trades", 200), ("peeraid", 210)):
        write_flags(tmp_path / "eval" / f"{name}.npz", [True] * 400,
                    [i < count for i in range(400)])
        records.append(make_record(defense=name, n_correct=400, n_robust=count,
                                   baseline=name == "trades", flags=f"eval/{name}.npz"))
    render(Results(records), tmp_path)
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    assert list(frame["delta_p"].dropna()) == [pytest.approx(2 / 2**10)]


def test_without_results_there_are_no_tables_and_old_ones_become_headers(campaign, tmp_path):
    render(Results(), tmp_path)
    assert not list(tmp_path.glob("*.csv")) and not (tmp_path / "figures").exists()
    render(campaign, tmp_path, ["csv"])
    render(Results(), tmp_path, ["csv"])
    assert {path.name for path in tmp_path.glob("*.csv")} == TABLES
    assert all(len(path.read_text().splitlines()) == 1 for path in tmp_path.glob("*.csv"))


def test_data_are_safe_when_a_report_fails(campaign, tmp_path, write_flags):
    first, *others = campaign.records
    flags = write_flags(tmp_path / "out/other.npz", [True], [True])
    results = Results([first.model_copy(update={"flags": flags}), *others])
    with pytest.raises(RobenchError, match="do not fit"):
        render(results, tmp_path / "out")
    assert load([tmp_path / "out"]) == results


@pytest.mark.parametrize("entry", list(REPORTS), ids=lambda entry: entry.name)
def test_every_report_takes_results_without_rows(entry, tmp_path):
    report: Report = entry.value
    assert all(path.is_file() for path in report(Results(), tmp_path))
    assert entry.description


@pytest.mark.parametrize("heavy", ["torch", "pandas", "matplotlib"])
def test_importing_reports_is_light(run_python, heavy):
    assert run_python(f"import sys, robench.reports; sys.exit({heavy!r} in sys.modules)") == 0


def test_rendering_never_imports_torch(run_python, tmp_path):
    code = ("import sys, pathlib; from robench.reports import Results, render, summary;"
            "render(Results(), pathlib.Path(sys.argv[1])); summary(Results());"
            "sys.exit('torch' in sys.modules)")
    assert run_python(code, str(tmp_path)) == 0
