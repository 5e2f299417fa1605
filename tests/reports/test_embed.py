"""Tables of runs inside Markdown files."""

import pytest

from robench.errors import UsageError
from robench.reports import Results, save
from robench.reports.analyses import ANALYSES
from robench.reports.embed import embed, embedded
from robench.reports.text import Board, Cell, Column, condensed

MARKED = "# Title\n\n<!-- robench: run leaderboard -->\n{}<!-- /robench -->\n\nAnd more.\n"


@pytest.fixture
def file(make_record, tmp_path):
    records = [make_record(defense=name, attack=attack, n_robust=count)
               for name, count in (("trades", 200), ("peeraid", 210))
               for attack in ("pgd-20", "fgsm")]
    save(tmp_path / "run", Results(records))
    path = tmp_path / "README.md"
    path.write_text(MARKED.format("anything\n"), encoding="utf-8")
    return path


def test_the_table_of_the_run_takes_the_place_of_what_was_there(file):
    embed(file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- robench: run leaderboard -->\n")
    assert text.endswith("<!-- /robench -->\n\nAnd more.\n")
    assert "anything" not in text and "| trades" in text and "| peeraid" in text
    assert "\n## " not in text
    embed(file)  # and again the same
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(("mark", "words"), [
    ("run leader", "unknown analysis 'leader'.*Did you mean: leaderboard"),
    ("elsewhere leaderboard", "no results.jsonl"),
])
def test_a_wrong_mark_is_named_and_the_file_stays(file, mark, words):
    text = MARKED.format("old\n").replace("run leaderboard", mark)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        embed(file)
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["# Title\n", "<!-- robench: run leaderboard -->\nno end\n"])
def test_a_file_without_a_mark_is_refused(tmp_path, text):
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="has no mark"):
        embed(tmp_path / "a.md")
    with pytest.raises(UsageError, match="cannot read"):
        embed(tmp_path / "b.md")


def test_two_tables_of_one_file(file):
    text = MARKED.format("") + MARKED.format("").replace("leaderboard", "rob-f")
    made, count = embedded(text, file.parent)
    assert count == 2 and made.count("<!-- /robench -->") == 2 and made.count("| trades") == 1


def test_every_analysis_can_be_embedded(file):
    for name in ANALYSES:
        _, count = embedded(MARKED.format("").replace("leaderboard", name), file.parent)
        assert count == 1


def test_of_several_seeds_a_file_has_the_means(make_transfer, tmp_path):
    several = [make_transfer(seed=seed, run=str(seed), network=name)
               for seed in (0, 1) for name in ("student", "peer")]
    save(tmp_path / "run", Results(transfers=several))
    made, _ = embedded(MARKED.format("").replace("leaderboard", "rob-f"), tmp_path)
    assert made.count("**digits, ") == 1 and ": means over seeds**" in made
    assert ANALYSES["rob-f"].text(Results(transfers=several)).count("## digits, ") == 2


def test_what_all_rows_share_is_said_once():
    def column(title, *texts):
        return Column(title, tuple(map(Cell, texts)))

    columns = (column("#", "1", "2"), column("Seeds", "3", "3"), column("AA", "50", "40"),
               column("Worst", "50", "40"))
    made = condensed(Board("T", columns, ("a fact",), lead="AA"))
    assert [c.title for c in made.columns] == ["#", "AA"]
    assert made.facts == ("a fact", "Seeds: 3")
    one = Board("T", (column("Seeds", "3"), column("AA", "50")), lead="AA")
    assert condensed(one) == one  # of a single row nothing is shared
