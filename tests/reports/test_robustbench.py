"""RobustBench's model files, in and out."""

import dataclasses
import importlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.errors import UsageError
from robench.reports import Results, load, render, save
from robench.reports.beside import published_boards
from robench.reports.robustbench import model_files, read

# As in model_info/cifar10/Linf of RobustBench, every field that it uses.
ENTRY = {
    "link": "https://example.org/paper", "name": "A title", "authors": "A. Author",
    "additional_data": True, "number_forward_passes": 2, "dataset": "cifar10", "venue": "ICML 2024",
    "architecture": "WideResNet-34-10", "eps": "8/255", "clean_acc": "85.36", "reported": "57.0",
    "autoattack_acc": "56.17", "external": "55.9", "footnote": "It uses more.", "unreliable": True,
}
FULL = {"dataset": "cifar10", "n": 10_000, "data_sha256": "full", "n_correct": 8536,
        "n_robust": 5617, "attack": "pyautoattack:standard"}


@pytest.fixture
def write(tmp_path):
    def write(entry, *parts):
        path = tmp_path.joinpath(*(parts or ("cifar10", "Linf", "Author2024Title.json")))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(entry if isinstance(entry, str) else json.dumps(entry), encoding="utf-8")
        return path

    return write


# In


def test_a_file_becomes_a_published_number(write):
    number = read(write(ENTRY))
    assert (number.source, number.certainty) == ("RobustBench", "model file")
    assert (number.dataset, number.threat) == ("cifar10", "Linf:8/255")
    assert (number.method, number.model) == ("Author2024Title", "WideResNet-34-10")
    assert (number.attack, number.clean, number.robust) == ("autoattack", 85.36, 56.17)
    assert number.notes == ("A title; ICML 2024; It uses more.; external evaluation: 55.9; "
                            "additional training data; marked as unreliable")


def test_old_files_and_other_evaluations(write):
    short = {key: ENTRY[key] for key in ("dataset", "eps", "clean_acc", "architecture")}
    number = read(write({**short, "external": 50, "footnote": None}, "L2", "a.json"))
    assert (number.attack, number.robust, number.threat) == ("external evaluation", 50, "L2:8/255")


@pytest.mark.parametrize(("entry", "words"), [
    ("{", "not a RobustBench model file"), ("[]", "not a RobustBench model file"),
    ({"eps": "0.5"}, "dataset: Field required"), ({**ENTRY, "eps": "N/A"}, "eps: 'N/A'"),
    ({**ENTRY, "clean_acc": "853.6"}, "clean_acc: .*less than or equal to 100"),
    ({**ENTRY, "clean_acc": None, "autoattack_acc": None, "external": None}, "neither"),
])
def test_another_file_is_refused_in_one_line(write, entry, words):
    with pytest.raises(UsageError, match=words) as error:
        read(write(entry))
    assert "Title.json: " in str(error.value) and "\n" not in str(error.value)


def test_the_folder_must_name_the_norm(write):
    with pytest.raises(UsageError, match="name of its folder, Linf or L2, not 'corruptions'"):
        read(write(ENTRY, "cifar10", "corruptions", "a.json"))
    with pytest.raises(UsageError, match="cannot read"):
        read(write(ENTRY).with_name("missing.json"))


def test_they_merge_with_runs_and_stay_apart(write, make_record, tmp_path):
    save(tmp_path / "run", Results([make_record(dataset="cifar10")]))
    file = write({**ENTRY, "architecture": "<img src=x onerror=alert(1)>"})
    results = load([file, tmp_path / "run", file])
    assert len(results.records) == len(results.published) == 1
    (board,) = published_boards(results)
    methods = next(c for c in board.columns if c.title == "Method")
    assert {cell.text for cell in methods.cells} == {"Author2024Title", "trades"}
    render(results, tmp_path / "out", ["md", "tex", "csv"])
    assert load([tmp_path / "out"]) == dataclasses.replace(results, published=[])
    for name in ("leaderboard.md", "leaderboard.tex"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Author2024Title" in text and "<img" not in text.replace(r"\<", "")


# Out


def entries(records):
    return {path.as_posix(): json.loads(text) for path, text in model_files(records).items()}


def test_a_network_measured_on_the_whole_test_set(make_record):
    records = [make_record(**FULL), make_record(**{**FULL, "attack": "fgsm", "n_robust": 6000})]
    ((path, entry),) = entries(records).items()
    assert path == "model_info/cifar10/Linf/trades_resnet18_best.json"
    assert (entry["clean_acc"], entry["autoattack_acc"]) == ("85.36", "56.17")
    assert (entry["dataset"], entry["eps"], entry["architecture"]) == (
        "cifar10", "8/255", "resnet18")
    assert entry["additional_data"] is False and entry["number_forward_passes"] == 1
    assert "fgsm on 10,000 test images: 60.00" in entry["footnote"]
    # Nobody claimed anything, and there is no paper about this network.
    assert not {"reported", "link", "authors", "venue", "external", "unreliable"} & entry.keys()


def test_what_the_records_do_not_say_is_left_out(make_record):
    few = {**FULL, "n": 1000, "data_sha256": "first 1000", "n_correct": 850, "n_robust": 560}
    records = [make_record(**few), make_record(**{**FULL, "attack": "pgd-20"})]
    (entry,) = entries(records).values()
    assert "autoattack_acc" not in entry and entry["clean_acc"] == "85.36"
    assert "pyautoattack:standard on 1,000 test images: 56.00" in entry["footnote"]
    (entry,) = entries([make_record(**few)]).values()
    assert "clean_acc" not in entry
    (entry,) = entries([make_record(**FULL, teacher_sha256={"teacher": "ab"})]).values()
    assert "additional_data" not in entry and entry["number_forward_passes"] == 1
    (entry,) = entries([make_record(**FULL, source="net.pt", warnings=("odd",))]).values()
    assert not {"additional_data", "number_forward_passes"} & entry.keys()
    assert entry["footnote"].endswith(". odd")
    failed = make_record(**{**FULL, "status": "failed", "n_robust": 0})
    assert entries([failed]) == {}


@pytest.mark.parametrize("change", [
    {"dataset": "svhn"}, {"threat": "Linf:4/255"}, {"threat": "L1:12"}, {"split": "val"},
    {"ranked": False}, {"role": "curve"},
])
def test_what_robustbench_has_no_list_for_gets_no_file(make_record, change):
    assert entries([make_record(**{**FULL, **change})]) == {}


def test_each_seed_is_a_network_of_its_own(make_record):
    records = [make_record(**FULL, seed=seed, weights_sha256=f"w{seed}") for seed in (0, 3)]
    assert [path.rpartition("/")[2] for path in entries(records)] == [
        "trades_resnet18_best_seed0.json", "trades_resnet18_best_seed3.json"]


@given(names=st.lists(st.text(max_size=20) | st.sampled_from(["../../x", "/etc", "..", "a/b"]),
                      min_size=1, max_size=4, unique=True))
def test_no_name_leaves_the_folder_or_hides_another(make_record, names):
    records = [make_record(**FULL, defense=name) for name in names]
    files = model_files(records)
    assert len(files) == len(names)
    assert {path.parent.as_posix() for path in files} == {"model_info/cifar10/Linf"}
    assert all(path.name.isascii() and not path.name.startswith(".") for path in files)


def test_out_and_in_again_does_not_pass_as_robustbench(make_record, tmp_path):
    (path, *_) = [p for p in render(Results([make_record(**FULL)]), tmp_path, ["robustbench"])
                  if p.suffix == ".json"]
    number = read(path)
    assert (number.source, number.clean, number.robust) == ("robench 0.1.0, file", 85.36, 56.17)
    assert (number.dataset, number.threat) == ("cifar10", "Linf:8/255")


@pytest.mark.filterwarnings("ignore")
def test_robustbench_knows_the_fields(make_record, robustbench):
    utils = importlib.import_module("robustbench.utils")
    (entry,) = entries([make_record(**FULL)]).values()
    known = {field.name for field in dataclasses.fields(utils.ModelInfo)}
    assert entry.keys() - known <= {"evaluated_by"}  # which its page does not print
    assert float(entry[utils.ACC_FIELDS[utils.ThreatModel.Linf][-1]]) == 56.17
