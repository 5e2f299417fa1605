"""Published numbers: the curated file, and that they stand beside the measured ones, not among."""

import pytest
from pandas.testing import assert_frame_equal
from pydantic import ValidationError

from robench.attacks import ThreatModel
from robench.benchmark.data import DATASETS
from robench.defenses import DEFENSES
from robench.errors import UsageError
from robench.reports import Results, render, summary, tables
from robench.reports.beside import published, published_boards
from robench.reports.published import Published, curated
from robench.reports.robustbench import LISTED

FACTS = {"source": "A paper", "certainty": "secondary", "dataset": "cifar10",
         "threat": "Linf:8/255", "attack": "autoattack", "method": "trades", "model": "resnet18",
         "clean": 84.0, "robust": 50.0}


@pytest.mark.parametrize("number", curated(), ids=lambda p: f"{p.source}: {p.method} {p.model}")
def test_every_curated_number_is_sound(number):
    assert number.dataset in {*DATASETS.names(), "tiny-imagenet"}
    assert str(ThreatModel.parse(number.threat)) == number.threat
    accuracies = [a for a in (number.clean, number.robust) if a is not None]
    assert all(1 < a < 100 for a in accuracies)  # percent, not shares
    assert len(accuracies) < 2 or number.robust < number.clean
    if number.decimals == 0:
        assert all(a == round(a) for a in accuracies)
    else:
        assert any(a != round(a) for a in accuracies)
    assert all(" ".join(text.split()) == text for text in (number.source, number.notes))
    # A robench name, or one that cannot be taken for it.
    base = number.method.removesuffix("+awp")
    assert base in DEFENSES or base.lower().replace("_", "-") not in DEFENSES.names()


def test_the_curated_file_repeats_nothing():
    facts = [p.model_dump(exclude={"clean", "robust", "notes", "decimals"}) for p in curated()]
    several = [p for p, fact in zip(curated(), facts, strict=True) if facts.count(fact) > 1]
    # Variants of a method that only the notes tell apart, and two runs of IKL.
    assert {p.method for p in several} == {"lbgat", "adr", "ikl"}
    assert len(set(curated())) == len(curated()) > 100


@pytest.mark.parametrize(("change", "words"), [
    ({"clean": 101.0}, "less than or equal to 100"), ({"robust": -1.0}, "greater than or equal"),
    ({"clean": None, "robust": None}, "neither"), ({"threat": "8/255"}, "write Linf:8/255"),
    ({"threat": "Linf:big"}, "is not a number"), ({"source": ""}, "at least 1 character"),
    ({"certainty": "hearsay"}, "Input should be"), ({"eps": "8/255"}, "Extra inputs"),
])
def test_a_number_that_makes_no_sense_is_refused(change, words):
    with pytest.raises(ValidationError, match=words):
        Published(**{**FACTS, **change})


@pytest.fixture
def results(make_record):
    """Two defenses on CIFAR-10, a third data set that nobody published about."""
    return Results([make_record(dataset="cifar10"),
                    make_record(dataset="cifar10", defense="peeraid", n_robust=210),
                    make_record()])


def test_only_what_is_about_the_same_data_and_threat_model_is_shown(results, make_record):
    frame = published(results)
    assert set(frame["dataset"]) == {"cifar10"} and set(frame["threat"]) == {"Linf:8/255"}
    assert len(frame) == sum(p.dataset == "cifar10" and p.threat == "Linf:8/255" for p in curated())
    (board,) = published_boards(results)
    assert board.title.startswith("Published: ") and "not" in board.facts[0]
    methods = {cell.text for cell in board.columns[0].cells}
    assert methods == {"trades", "peeraid"}  # the others are in the file, and that is said
    assert f"{len(frame) - len(board.rows)} more" in board.facts[1]
    for other in ({"threat": "L2:0.5"}, {"split": "val"}, {"role": "curve"}):
        assert published(Results([make_record(dataset="cifar10", **other)])).empty
    written_otherwise = make_record(dataset="cifar10", threat="Linf:0.03137254901960784")
    assert len(published(Results([written_otherwise]))) == len(frame)


def test_a_published_number_changes_no_measured_one(results):
    """Not a row, a rank or a difference of the leaderboard; not the terminal's summary."""
    given = Results(results.records, published=[Published(**{**FACTS, "robust": 99.0})])
    assert_frame_equal(tables.leaderboard(given.records), tables.leaderboard(results.records))
    assert summary(given) == summary(results) and "Published" not in summary(given)
    board = published_boards(given)[0]
    assert not any(column.contest for column in board.columns) and board.lead is None
    assert "A paper" in {cell.text for column in board.columns for cell in column.cells}


def test_numbers_keep_the_digits_they_were_published_with():
    numbers = [Published(**{**FACTS, "clean": 83.0}),
               Published(**{**FACTS, "clean": 46.0, "decimals": 0})]
    (board,) = published_boards(Results(published=numbers))
    cells = {c.title: [cell.text for cell in c.cells] for c in board.columns}
    assert cells["Clean %"] == ["83.00", "46"] and cells["Robust %"] == ["50.00", "50"]


def test_every_format_shows_them_apart_from_the_measured(results, tmp_path):
    render(results, tmp_path, ["md", "tex", "json", "csv"])
    for name, heading in (("leaderboard.md", "## Published: cifar10"),
                          ("leaderboard.tex", "{Published: cifar10")):
        measured, _, others = (tmp_path / name).read_text(encoding="utf-8").partition(heading)
        assert "PeerAiD, CVPR 2024" in others and "PeerAiD, CVPR 2024" not in measured
    with (tmp_path / "published.csv").open(encoding="utf-8", newline="") as file:
        assert_frame_equal(tables.from_csv(file.read()), published(results))
    assert "PeerAiD" not in (tmp_path / "leaderboard.csv").read_text(encoding="utf-8")


def test_the_lists_of_robustbench_are_threat_models():
    for _, norm, eps in LISTED:
        assert ThreatModel(norm, eps)
    with pytest.raises(UsageError):
        ThreatModel.parse("corruptions")
