import math

import pytest

from robench.reports import Results, summary
from robench.reports.boards import checkpoint_boards, leaderboards
from robench.reports.tables import from_csv, leaderboard, other_checkpoints, to_csv
from robench.reports.text import Board, Cell, Column, accuracy, count, duration, markdown, points

HOSTILE = "<img src=x onerror=alert(1)> | `rm` *b*\nnew & line"


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")]
            for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("n, text, detail", [
    (1000, "51.23 ± 0.46", "[49.77, 52.68]"), (999, "51.2 ± 0.5", "[49.8, 52.7]"),
])
def test_decimals_follow_the_number_of_images(n, text, detail):
    cell = accuracy(51.234, 0.456, 49.765, 52.677, n=n, failed=0, show_n=False)
    assert (cell.text, cell.detail) == (text, detail)


def test_one_seed_has_no_spread_and_failures_are_said():
    nan = math.nan
    assert accuracy(51.2, nan, 49, 53, n=9, failed=0, show_n=True).text == "51.2 (n = 9)"
    assert accuracy(51.2, nan, 49, 53, n=9, failed=1, show_n=False).text == "51.2 (1 failed)"
    assert accuracy(nan, nan, nan, nan, n=0, failed=2, show_n=False).text == "failed"
    assert accuracy(nan, nan, nan, nan, n=0, failed=0, show_n=False).text == "–"


def test_units():
    assert [duration(s) for s in (0.42, 12, 300, 11_520)] == ["0.42 s", "12 s", "5.0 min", "3.2 h"]
    assert [count(n) for n in (950, 12_345, 11_173_962)] == ["950", "12.3 k", "11.2 M"]
    assert (points(1.234, 1000), points(-1.234, 100)) == ("+1.23", "−1.2")


def test_names_mean_nothing_to_markdown():
    board = Board(HOSTILE, (Column(HOSTILE, (Cell(HOSTILE),), words=True),), remarks=(HOSTILE,))
    lines = markdown(board).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 3  # title, rule, one row
    for line in lines:
        assert "<img" not in line.replace(r"\<", "") and " | `" not in line


def test_the_summary_shows_what_matters(campaign):
    title, rule, best, *_ = cells(summary(campaign))
    line = dict(zip(title, best, strict=True))
    assert (line["#"], line["Defense"], line["Selected on"]) == ("1", "peeraid", "val")
    assert line["AutoAttack %, n = 100"] == "50.0 ± 5.7 [40.4, 59.6]"
    assert line["Δ to trades, points"].startswith("+11.0 (p = ")
    assert line["Training"] == "53.3 min + 30.0 min teacher"
    assert set(rule) <= {"-" * len(r) for r in rule} | {r for r in rule if ":" in r}


def test_columns_appear_only_where_rows_differ(make_record):
    (board,) = leaderboards(leaderboard([make_record(), make_record(model="wrn", defense="b")]))
    titles = [column.title for column in board.columns]
    assert "Model" in titles and "Recipe" not in titles
    assert any("Recipe: unified" in fact for fact in board.facts)


def test_a_training_at_another_threat_model_is_a_column(make_record):
    def trained(name, at, **changes):
        return make_record(defense=name, defense_config={"threat": at} if at else {}, **changes)

    def said(*records):
        """defense -> trained at, of the leaderboard under Linf:8/255 and of the unranked."""
        boards = [*leaderboards(leaderboard(records)),
                  *checkpoint_boards(other_checkpoints(records))]
        return [dict(zip(*([cell.text for cell in column.cells] for column in board.columns
                           if column.title in ("Defense", "Trained at")), strict=True))
                if any(column.title == "Trained at" for column in board.columns) else None
                for board in boards]

    alike = trained("a", "Linf:8/255"), trained("net.pt", None, source="net.pt")
    assert said(*alike) == [None]
    natural = trained("standard", "L2:0.5")  # no attack was in it
    assert said(*alike, natural) == [None]
    assert said(*alike, natural, trained("b", "L2:0.5")) == [
        {"a": "Linf:8/255", "b": "L2:0.5", "net.pt": "–", "standard": "–"}]
    assert said(trained("a", "Linf:8/255", threat="Linf:8/255+L2:0.5")) == [{"a": "Linf:8/255"}]
    assert said(trained("b", "L2:0.5", ranked=False)) == [{"b": "L2:0.5"}]
    # files say it in the options
    read = from_csv(to_csv(leaderboard([trained("b", "L2:0.5")])))
    assert leaderboards(read)[0].columns == leaderboards(
        leaderboard([trained("b", "L2:0.5")]))[0].columns


def test_failures_notes_and_test_selection_reach_the_reader(make_record):
    records = [make_record(selection="test", notes=("trained for 30 of 110 epochs",)),
               make_record(attack="fgsm", status="failed", n_robust=0, error="no memory")]
    text = summary(Results(records))
    title, _, row = cells(text)
    assert dict(zip(title, row, strict=True))["FGSM %"] == "failed"
    assert "test (!)" in row[title.index("Selected on")]
    assert "- trades (best): trained for 30 of 110 epochs" in text
    assert "- trades (best): fgsm: failed: no memory" in text


def test_nothing_is_ranked_yet():
    assert "Nothing is ranked yet" in summary(Results())
