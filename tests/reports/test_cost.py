"""What a run cost: each training and teacher once, and nothing unknown taken for nothing."""

import pandas as pd
import pytest

from robench.reports import Results, save
from robench.reports.cost import cost, cost_boards, in_words
from robench.reports.provenance import provenance
from robench.reports.text import markdown


@pytest.fixture
def trained(make_record):
    """Records of run `key`: two attacks on its best network, one on its last."""
    def make(key, **changes):
        shared = {"run": key, "weights_sha256": key, "train_seconds": 100.0, "teacher_seconds": 0.0,
                  "forwards": 10.0, "backwards": 8.0, "n_correct": 300, "seconds": 7.0, **changes}
        return [make_record(**shared, attack="pgd-20"), make_record(**shared, attack="cw"),
                make_record(**{**shared, "weights_sha256": f"{key}-last"}, checkpoint="last")]

    return make


def of(frame, part):
    return frame[frame["part"] == part].to_dict("records")


def test_a_training_counts_once_whatever_was_attacked(trained):
    frame = cost(Results([*trained("a"), *trained("b", seed=1), *trained("c", defense="mart")]))
    trades, mart = of(frame, "training")
    assert (trades["what"], trades["networks"], trades["seconds"]) == ("trades", 2, 200.0)
    assert (mart["what"], mart["networks"], mart["seconds"]) == ("mart", 1, 100.0)
    assert of(frame, "teachers") == []


def test_a_training_without_records_is_in_its_log(make_epoch, trained):
    epochs = [make_epoch(run=run, epoch=i, seconds=2.0) for run in ("a", "z") for i in range(3)]
    frame = cost(Results(trained("a", train_seconds=6.0), epochs=epochs))
    assert sum(line["seconds"] for line in of(frame, "training")) == 12.0


def test_the_same_run_trained_on_two_machines_took_both_times(trained, make_epoch):
    results = Results([*trained("a"), *trained("a", device="cuda: X", train_seconds=3.0)],
                      epochs=[make_epoch(run="a", seconds=8.0)])  # a third, never attacked
    found = {line["device"]: (line["networks"], line["seconds"])
             for line in of(cost(results), "training")}
    assert found == {"cpu": (1, 100.0), "cuda: X": (1, 3.0), "": (1, 8.0)}


def test_networks_that_only_surveys_know_are_named(trained, make_steps):
    steps = [make_steps(run=run, weights_sha256=run, defense=name) for run, name in (
        ("a", "trades"), ("s", "mart"), ("s2", "mart"), ("", "elsewhere.pt"))]
    frame = cost(Results(trained("a"), steps=steps))
    lines = {line["what"]: line for line in of(frame, "training")}
    assert {what: (line["networks"], line["untimed"]) for what, line in lines.items()} == {
        "trades": (1, 0), "mart": (2, 2), "networks from outside": (1, 1)}
    assert pd.isna(lines["mart"]["seconds"]) and lines["trades"]["seconds"] == 100.0


def test_attacks_are_added_up(trained):
    frame = cost(Results(trained("a")))
    pgd, cw = of(frame, "attacks")
    assert (pgd["what"], pgd["measured"], pgd["networks"], pgd["seconds"]) == ("pgd-20", 2, 2, 14.0)
    assert (pgd["forwards"], pgd["backwards"]) == (2 * 300 * 10, 2 * 300 * 8)  # of single images
    assert (cw["forwards"], cw["uncounted"], cw["untimed"]) == (3000, 0, 0)


def test_a_measurement_counts_once_whatever_it_is_a_row_of(make_record):
    """The best epoch was the last: one network, attacked once, under two names."""
    one = make_record(attack="pgd-20", n_correct=100, forwards=2.0, backwards=1.0, seconds=5.0)
    twin = one.model_copy(update={"checkpoint": "last", "ranked": False})
    again = one.model_copy(update={"created": "2026-11-21T10:00:00+00:00"})
    point = one.model_copy(update={"role": "curve"})
    (line,) = of(cost(Results([one, twin, again, point])), "attacks")
    assert (line["measured"], line["seconds"], line["forwards"]) == (2, 10.0, 400)
    facts = dict(zip(*([cell.text for cell in column.cells]
                       for column in provenance([one, twin])[0].columns), strict=True))
    assert facts["Evaluation"] == "5 s in all"


def test_what_was_not_counted_is_not_nothing(make_record):
    known = dict(attack="cw", n_correct=100, seconds=1.0)
    frame = cost(Results([
        make_record(**known, forwards=2.0, backwards=1.0), make_record(**known, seed=1),
        make_record(**known, seed=2, status="failed", error="no", n_robust=0),
        make_record(attack="torchattacks:VNIFGSM", seconds=3.0),
        make_record(attack="fgsm", n_correct=0, seconds=0.0),  # nothing to attack
    ]))
    cw, others, fgsm = of(frame, "attacks")
    assert (cw["forwards"], cw["uncounted"], cw["untimed"], cw["seconds"]) == (200, 2, 1, 2.0)
    assert pd.isna(others["forwards"]) and others["uncounted"] == 1 and others["seconds"] == 3.0
    assert (fgsm["forwards"], fgsm["uncounted"]) == (0, 0)
    (line,) = of(cost(Results([make_record(status="failed", error="no", run="")])), "attacks")
    assert pd.isna(line["seconds"]) and pd.isna(line["forwards"]) and line["untimed"] == 1
    (board,) = cost_boards(Results([make_record(attack="torchattacks:VNIFGSM")]))
    text = markdown(board)
    assert " forward and " not in text
    assert "attacks, torchattacks:VNIFGSM: passes of 1" in text and "| –" in text


def test_a_network_from_outside_has_no_known_training(make_record, trained):
    outside = dict(run="", source="robustbench:X", train_seconds=0.0)
    frame = cost(Results([*trained("a"), make_record(**outside, weights_sha256="x"),
                          # the same network as the one that was trained here
                          make_record(**outside, weights_sha256="a")]))
    ours, others = of(frame, "training")
    assert ours["networks"] == 1
    assert (others["networks"], others["untimed"]) == (1, 1) and pd.isna(others["seconds"])
    assert "training, networks from outside: time of 1" in in_words(frame)[-1]


def teachers(records):
    return [(line["networks"], line["seconds"], line["untimed"])
            for line in of(cost(Results(records)), "teachers")]


def test_a_shared_teacher_counts_once(trained):
    taught = dict(teacher_seconds=40.0, teacher_sha256={"teacher": "t"})
    assert teachers([*trained("a", **taught), *trained("b", **taught, defense="ard")]) == [
        (1, 40.0, 0)]
    # under another name, and beside a second one
    both = dict(teacher_seconds=55.0, teacher_sha256={"robust": "t", "natural": "u"})
    assert teachers([*trained("b", **both), *trained("a", **taught)]) == [(2, 55.0, 0)]
    assert teachers(trained("b", **both)) == [(2, 55.0, 0)]


def test_a_teacher_that_is_a_row_is_no_cost_of_its_own(trained):
    taught = dict(teacher_seconds=100.0, teacher_sha256={"teacher": "t"})
    assert teachers([*trained("t"), *trained("a", **taught)]) == []
    both = dict(teacher_seconds=130.0, teacher_sha256={"robust": "t", "natural": "u"})
    assert teachers([*trained("t"), *trained("a", **both)]) == [(1, 30.0, 0)]


def test_teachers_belong_to_the_devices_of_their_students(trained):
    frame = cost(Results([
        *trained("a", teacher_seconds=40.0, teacher_sha256={"teacher": "t"}),
        *trained("b", teacher_seconds=5.0, teacher_sha256={"teacher": "u"}, device="cuda: X")]))
    found = {line["device"]: (line["networks"], line["seconds"]) for line in of(frame, "teachers")}
    assert found == {"cpu": (1, 40.0), "cuda: X": (1, 5.0)}


@pytest.mark.parametrize("other", ["s", "u"])  # the order of names decides nothing
def test_of_a_sum_nobody_knows_the_parts(trained, other):
    """One network in the company of two others: its time is in the first sum already."""
    def taught(one):
        return dict(teacher_seconds=55.0, teacher_sha256={"robust": one, "natural": "t"})

    both = [*trained("a", **taught("r")), *trained("b", **taught(other))]
    assert teachers(both)[:1] == [(2, 55.0, 0)]
    assert [untimed for *_, untimed in teachers(both)] == [0, 1]
    alone = trained("c", teacher_seconds=15.0, teacher_sha256={"helper": "t"})
    assert teachers([*both, *alone]) == [(3, 95.0, 0)]


def test_a_teacher_that_was_brought_is_no_part_of_the_time(trained):
    def taught(seed, **changes):
        return trained(f"a{seed}", seed=seed, teacher_seconds=30.0,
                       defense_config={"teachers": {"teacher": "t"}},
                       teacher_sha256={"teacher": "t", "natural": f"n{seed}"}, **changes)

    (timed, untimed) = teachers([*taught(0), *taught(1)])
    assert timed == (2, 60.0, 0) and untimed[::2] == (1, 1)
    assert teachers([*taught(0), *taught(1), *trained("t")]) == [(2, 60.0, 0)]  # a row


def test_a_teacher_from_outside_has_no_known_training(trained):
    ((networks, seconds, untimed),) = teachers(
        trained("a", teacher_sha256={"teacher": "t"}, teacher_seconds=0.0))
    assert (networks, untimed) == (1, 1) and pd.isna(seconds)


def test_by_device(trained):
    records = [*trained("a", peak_bytes=10**9), *trained("b", device="cuda: H200", seconds=1.0,
                                                         peak_bytes=5 * 10**9)]
    cpu, cuda = in_words(cost(Results(records)))
    assert cpu == ("cpu: training 1.7 min, attacks 21 s, 9.0 k forward and 7.2 k backward passes, "
                   "largest peak memory 1.00 GB")
    assert cuda.startswith("cuda: H200: training 1.7 min, attacks 3 s, ")
    assert cuda.endswith("largest peak memory 5.00 GB")


def test_surveys_have_times_and_rob_f_has_none(make_steps, make_transfer):
    frame = cost(Results(transfers=[make_transfer()], steps=[make_steps(seconds=4.0)] * 2))
    steps, rob_f = of(frame, "surveys")
    assert (steps["what"], steps["seconds"], steps["uncounted"]) == ("steps", 8.0, 2)
    assert (rob_f["what"], rob_f["untimed"]) == ("Rob_f", 1) and pd.isna(rob_f["seconds"])


def test_report_sums_it(trained, tmp_path, monkeypatch, capsys):
    import sys

    from robench.benchmark import cli

    save(tmp_path / "run", Results(trained("a")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robench", "report", "run", "--format", "csv"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "cost: cpu: training 1.7 min, attacks 21 s, " in capsys.readouterr().err
    read = pd.read_csv(tmp_path / "run" / "cost.csv")
    assert list(read["part"]) == ["training", "attacks", "attacks"]
    assert read["seconds"].sum() == 121.0
