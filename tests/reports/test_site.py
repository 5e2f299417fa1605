"""A site of several runs."""

import re
from pathlib import Path

import pytest

from robench.errors import UsageError
from robench.reports import Results, load, save
from robench.reports.page import sections
from robench.reports.site import site

REPOSITORY = Path(__file__).parents[2]
RUNS = sorted(path.parent for path in REPOSITORY.glob("results/*/results.jsonl"))


@pytest.fixture
def runs(make_record, tmp_path):
    for name, defense in (("one", "trades"), ("two & more", "peeraid")):
        records = [make_record(defense=defense), make_record(defense="pgd_at", n_robust=190)]
        save(tmp_path / "results" / name, Results(records))
    return tmp_path / "results"


def test_a_page_for_each_run_and_one_that_leads_to_them(runs, tmp_path):
    paths = site([runs], tmp_path / "docs")
    assert [path.name for path in paths] == ["index.html", "one.html", "two & more.html"]
    index = paths[0].read_text(encoding="utf-8")
    links = re.findall(r'<a href="\./([^"]+)">The whole report', index)
    assert links == ["one.html", "two%20%26%20more.html"]
    assert "trades" in index and "peeraid" in index and "2 runs" in index
    one = paths[1].read_text(encoding="utf-8")
    assert "trades" in one and "peeraid" not in one
    # Every link within a page leads somewhere.
    for path in paths:
        text = path.read_text(encoding="utf-8")
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        assert set(re.findall(r'href="#([^"]+)"', text)) <= ids


def test_single_runs_and_no_runs(runs, tmp_path):
    assert [p.name for p in site([runs / "one"], tmp_path / "a")] == ["index.html", "one.html"]
    with pytest.raises(UsageError, match="no run there"):
        site([tmp_path / "nothing"], tmp_path / "b")
    with pytest.raises(UsageError, match="two runs are called 'one'"):
        site([runs, runs / "one"], tmp_path / "b")
    (runs / "one").rename(runs / "index")
    with pytest.raises(UsageError, match="cannot be called 'index'"):
        site([runs], tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_committed_pages_have_the_tabs_of_today(run):
    """Else they are older than an analysis: `robench report` renders them again."""
    tabs = [section.id for section in sections(load([run]), run)]
    for page in (run / "leaderboard.html", REPOSITORY / "docs" / f"{run.name}.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<section id="([^"]+)"', text) == tabs, page
