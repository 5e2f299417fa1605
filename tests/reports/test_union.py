"""Several threat models: each alone, and all of them over the same images."""

from pathlib import Path

import numpy as np
import pytest

from robench.reports import Results
from robench.reports.boards import leaderboards
from robench.reports.tables import leaderboard
from robench.reports.text import markdown
from robench.reports.union import standings, union, union_boards

LINF, L2, L1 = "Linf:8/255", "L2:0.5", "L1:12"


@pytest.fixture
def measured(make_record, write_flags, tmp_path):
    """measured("Linf:8/255", robust, correct) -> a record with these flags as 0 and 1."""
    def make(threat, robust, correct="11111110", **changes):
        flags = [np.array([c == "1" for c in text]) for text in (correct, robust)]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        return make_record(**{
            "threat": threat, "attack": "autoattack", "n": len(robust),
            "data_sha256": f"n{len(robust)}",
            "n_correct": int(flags[0].sum()), "n_robust": int(flags[1].sum()),
            "flags": write_flags(path, *flags), **changes})

    return make


@pytest.fixture
def joint(measured):
    """A record of the attack `union`; `breaker` says which part each image fell to."""
    def make(threat, stages, breaker, correct="11111110", **changes):
        robust = "".join("1" if c == "1" and b < 0 else "0"
                         for c, b in zip(correct, breaker, strict=True))
        record = measured(threat, robust, correct, attack="union,also=...", **changes)
        with np.load(record.flags) as arrays:
            kept = dict(arrays)
        np.savez(record.flags, **kept, breaker=np.array(breaker, np.int8), stages=np.array(stages))
        return record

    return make


def table(records):
    """threat -> (right images, whether all of them were attacked)."""
    frame = union(records)
    assert frame["label"].nunique() <= 1
    return {line["threat"]: (round(line["accuracy"] * line["n"] / 100), line["whole"])
            for line in frame.to_dict("records")}


def test_an_image_must_withstand_all(measured):
    records = [measured(LINF, "11110000"), measured(L2, "11001100"), measured(L1, "10101010")]
    assert table(records) == {"clean": (7, True), LINF: (4, True), L2: (4, True), L1: (4, True),
                              "all": (1, True)}


def test_every_attack_under_a_threat_model_counts(measured):
    records = [measured(LINF, "11110000"), measured(LINF, "01111000", attack="cw"),
               measured(L2, "11111100")]
    assert table(records)[LINF] == (3, True) and table(records)["all"] == (3, True)
    frame = union(records)
    assert frame[frame["threat"] == LINF]["attacks"].item() == "autoattack + cw"


def test_an_attack_on_fewer_images_sets_their_number(measured):
    records = [measured(LINF, "11110000"), measured(L2, "1110", "1111")]
    assert table(records) == {"clean": (4, True), LINF: (4, True), L2: (3, True), "all": (3, True)}
    assert set(union(records)["n"]) == {4}


def test_one_threat_model_is_no_union(measured):
    assert union([measured(LINF, "11110000"), measured(LINF, "11110000", attack="cw")]).empty
    assert union_boards(Results([measured(LINF, "11110000")])) == []


def test_networks_are_known_by_their_weights(measured):
    records = [measured(LINF, "11110000"),
               measured(L2, "11110000", weights_sha256="other"),
               # by `robench eval`, which knows the file and not the run
               measured(L2, "11001100", run="", source="runs/best.safetensors", recipe="")]
    (one,), reasons = standings(records)
    assert one.record.source == "trained" and reasons == []
    assert table(records)["all"] == (2, True)


def test_what_cannot_be_put_together_is_said(measured):
    kept = [measured(LINF, "11110000", weights_sha256="b"), measured(L2, "11110000",
                                                                     weights_sha256="b")]
    other = [*kept, measured(LINF, "11110000"), measured(L2, "1111000", "1111100", n=7)]
    assert len(union(other)) == 5 - 1  # clean, two, all: of the one network
    (board,) = union_boards(Results(other))
    assert "trades (best): left out, its threat models were measured on different images" in (
        markdown(board))
    sets = [*kept, measured(LINF, "11110000"), measured(L2, "11110000", data_sha256="others")]
    assert standings(sets)[1] == [
        "trades (best): left out, its threat models were measured on different images"]
    lost = [*kept, measured(LINF, "11110000"), measured(L2, "11110000")]
    Path(lost[-1].flags).unlink()
    assert standings(lost)[1] == [
        f"trades (best): left out, the survival flags of autoattack at {L2} are lost"]


def test_what_did_not_end_well_does_not_count(measured):
    records = [measured(LINF, "11110000"), measured(L2, "11110000", status="partial", n_open=2),
               measured(L2, "00000000", status="failed", error="no"),
               measured(L2, "11110000", role="curve"), measured(L2, "11110000", ranked=False)]
    assert union(records).empty


def test_a_rounded_fingerprint_is_of_the_same_network(measured):
    """Another machine: the last digits of the logits differ."""
    records = [measured(LINF, "11110000"), measured(L2, "11001100", fingerprint=(1.50001, -2.0))]
    assert table(records)["all"] == (2, True) and standings(records)[1] == []


def test_weights_that_are_used_in_another_way_are_another_network(measured):
    records = [measured(LINF, "11110000"), measured(L2, "11110000"),
               measured(L1, "11001100", fingerprint=(7.0, 1.0))]
    (one,), (reason,) = standings(records)
    assert set(one.under) == {LINF, L2}
    assert reason == (f"trades (best): {L1} left out, with other logits than under other threat "
                      "models: the same weights, used in another way")
    found, reasons = standings(records[1:])
    assert found == [] and len(reasons) == 2
    other = [measured(LINF, "11110000"), measured(L2, "11110000", model="with-normalization")]
    assert standings(other) == ([], [])


def test_a_measurement_that_did_not_end_is_said(measured):
    records = [measured(LINF, "11110000"), measured(L2, "11001100"),
               measured(L1, "00000000", status="failed", error="no"),
               measured(L2, "11110000", attack="cw", status="partial", n_open=1),
               # again, and well
               measured(LINF, "11110000", status="failed", created="2026-11-01")]
    assert table(records)["all"] == (2, True)
    (board,) = union_boards(Results(records))
    assert board.remarks == (
        f"trades (best): autoattack at {L1} left out, it failed",
        f"trades (best): cw at {L2} left out, it did not end")


# The attack `union`

STAGES = [f"{threat} {part}" for threat in (LINF, L2, L1) for part in ("apgd-ce", "square")]


def test_a_union_says_what_is_known_of_each(joint):
    # fell to: Linf, Linf, L2, L1, nothing...; the last image was wrong before
    record = joint(f"{LINF}+{L2}+{L1}", STAGES, [0, 1, 2, 5, -1, -1, -1, -1])
    assert table([record]) == {
        "clean": (7, True), LINF: (5, True),  # all seven were attacked, two fell
        L2: (6, False), L1: (6, False),  # two and three of them were not attacked
        "all": (3, True)}
    (board,) = union_boards(Results([record]))
    text = markdown(board)
    assert "≤ 75.0" in text and "≤: under this threat model only the images" in text


def test_a_union_and_a_record_of_one_threat_model(joint, measured):
    records = [joint(f"{LINF}+{L2}", STAGES[:4], [0, 1, 2, 3, -1, -1, -1, -1]),
               measured(L2, "01001110")]
    assert table(records) == {"clean": (7, True), LINF: (5, True), L2: (4, True), "all": (3, True)}


def test_where_nothing_fell_all_were_attacked_under_all(joint):
    assert table([joint(f"{LINF}+{L2}", STAGES[:4], [-1] * 8)]) == {
        "clean": (7, True), LINF: (7, True), L2: (7, True), "all": (7, True)}


def test_a_union_that_does_not_say_what_fell_to_what(measured):
    found, (reason,) = standings([measured(f"{LINF}+{L2}", "11110000", attack="union")])
    assert found == [] and reason.endswith("do not say what the images fell to")


def test_a_union_is_ranked_apart(joint, measured):
    """Neither in a ranking nor in a worst case of one of its threat models."""
    records = [measured(LINF, "11111100"), measured(LINF, "11111110", attack="fgsm"),
               joint(f"{LINF}+{L2}", STAGES[:4], [0, 1, 2, 3, -1, -1, -1, -1])]
    frame = leaderboard(records)
    assert list(frame["threat"]) == [LINF, f"{LINF}+{L2}"]
    assert list(frame["group"]) == [1, 2]
    assert frame["worst"].iloc[0] == frame["autoattack"].iloc[0] == 75.0
    assert [board.title for board in leaderboards(frame)] == [
        f"digits test, {LINF}", f"digits test, {LINF}+{L2}"]


def test_the_board_is_sorted_and_says_how_it_was_attacked(measured):
    records = [measured(threat, robust, weights_sha256=name, defense=name)
               for name, robust in (("weak", "11000000"), ("strong", "11111000"))
               for threat in (LINF, L2)]
    (board,) = union_boards(Results(records))
    assert board.title == f"digits test, {LINF}+{L2}"
    assert board.facts == ("n = 8, sha256 n8", f"{LINF}: autoattack", f"{L2}: autoattack")
    assert [cell.text for cell in board.columns[0].cells] == ["strong", "weak"]
    assert board.columns[-1].title == "All of them %"
    assert [cell.text for cell in board.columns[-1].cells] == ["62.5", "25.0"]
