"""Flags that several records raise together, and whether a number may be relied on."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.reports import load, save
from robench.reports.boards import checkpoint_boards, rob_f_boards
from robench.reports.judge import adaptive, judged, unreliable
from robench.reports.store import Results
from robench.reports.tables import other_checkpoints, rob_f
from robench.reports.trust import CHECKS, flag, id_of

RESULTS = Path(__file__).parents[2] / "results"


def ids(record):
    return [id_of(text) for text in record.warnings]


@pytest.fixture
def attacked(make_record):
    """A network under several attacks: robust images by (attack, threat)."""
    def make(counts, **changes):
        return [make_record(attack=attack, threat=threat, n_robust=robust, **changes)
                for (attack, threat), robust in counts.items()]

    return make


@pytest.mark.parametrize(("fgsm", "pgd", "found"), [
    (200, 190, []), (200, 206, []), (200, 207, ["iter>=single"]),
    (161, 15, ["catastrophic-overfitting"]), (161, 16, []), (160, 15, []),
])
def test_one_step_and_many(attacked, fgsm, pgd, found):
    records = attacked({("fgsm", "Linf:8/255"): fgsm, ("pgd-20", "Linf:8/255"): pgd})
    for record in judged(records):
        assert ids(record) == found


def test_other_images_another_network_and_other_threats_are_not_compared(make_record):
    fgsm = make_record(attack="fgsm", n_robust=100)
    for other in ({"data_sha256": "ab"}, {"weights_sha256": "ab"}, {"threat": "Linf:4/255"},
                  {"attack": "square"}, {"status": "failed"}, {"run": "other"}):
        pgd = make_record(**{"attack": "pgd-20", "n_robust": 300, **other})
        assert [ids(r) for r in judged([fgsm, pgd])] == [[], []]


def test_robustness_that_grows_with_eps_is_flagged_at_the_rows_of_the_table(attacked):
    curve = attacked({("pgd-20", "Linf:4/255"): 200, ("pgd-20", "Linf:16/255"): 209,
                      ("pgd-20", "L2:0.5"): 300}, role="curve")
    table = attacked({("autoattack", "Linf:8/255"): 100})
    found = judged([*table, *curve])
    assert [ids(r) for r in found] == [["monotone-eps"], [], [], []]
    assert "1.2 points and 4 images" in found[0].warnings[0]


def test_seeds_of_the_attack(make_record):
    records = [make_record(n_robust=n, attack_seed=seed) for seed, n in enumerate((200, 205, 209))]
    assert all(ids(r) == ["seed-spread"] for r in judged(records))
    trained = [r.model_copy(update={"seed": s, "weights_sha256": f"w{s}"})
               for s, r in enumerate(records)]
    assert all(ids(r) == [] for r in judged(trained))  # seeds of the training: see the spread


@pytest.mark.parametrize("asking", ["random", "dynamic", "masking"])
def test_a_flag_that_asks_for_an_adaptive_attack_is_answered_by_one(make_record, asking):
    warned = make_record(warnings=flag(asking, 1.0))
    assert ids(judged([warned])[0]) == [asking, "adaptive-hook"]
    for config in ({"adaptive": True}, {"stages": {"apgd-ce": {"eot": 20}}}):
        answer = make_record(attack="mine", attack_config=config)
        assert adaptive(answer.attack_config) and ids(judged([warned, answer])[0]) == [asking]


def test_a_peer_that_withstands_the_students_examples_alone(make_record, make_transfer):
    peer = make_record(run="r", checkpoint="peer", ranked=False)
    best = make_record(run="r", checkpoint="best", weights_sha256="other")
    transfers = [make_transfer(run="r", self_crafted=4, student_crafted=300),
                 make_transfer(run="r", network="student", self_crafted=4, student_crafted=300)]
    found = judged([peer, best], transfers)
    assert [ids(r) for r in found] == [["transfer-only"], []]
    assert unreliable(found) == []  # shown, never counted
    (board,) = checkpoint_boards(other_checkpoints(found))
    assert "no robustness" in board.columns[-1].cells[0].more
    (board,) = rob_f_boards(rob_f(transfers[:1]))
    assert (board.columns[-1].title, board.columns[-1].cells[0].text) == ("Warnings", "1")
    near = make_transfer(run="r", self_crafted=220, student_crafted=300)  # 20 points
    assert [ids(r) for r in judged([peer], [near])] == [[]]


def test_the_peer_of_the_committed_run_is_flagged_and_nothing_else():
    """Sound networks, PeerAiD's student and RSLAD's teacher among them, raise none."""
    results = load([RESULTS / "cifar10-small-resnet"])
    flagged = {(r.defense, r.checkpoint): ids(r) for r in results.records if r.warnings}
    assert flagged == {("peeraid", "peer"): ["transfer-only"]}
    assert unreliable(results.records) == []


def test_only_ranked_networks_with_a_failed_check_are_unreliable(make_record):
    failed, warned = flag("zero-grad", 1.0), flag("masking", 1.0)
    assert unreliable([make_record(warnings=failed)]) == ["trades: zero-grad"]
    assert unreliable([make_record(warnings=failed, source="net.pt")]) == ["net.pt: zero-grad"]
    for changes in ({"ranked": False}, {"role": "curve"}, {"warnings": warned},
                    {"warnings": ("a remark",)}):
        assert unreliable([make_record(**{"warnings": failed, **changes})]) == []
    noisy = flag("random", 1.0)
    assert unreliable([make_record(warnings=noisy)]) == ["trades: random"]
    averaged = {"stages": {"apgd-ce": {"eot": 20}}}
    assert unreliable([make_record(warnings=noisy, attack_config=averaged)]) == []


@given(st.lists(st.tuples(st.sampled_from(["fgsm", "pgd-20", "cw", "autoattack"]),
                          st.integers(0, 320), st.sampled_from(["Linf:4/255", "Linf:8/255", "x"]),
                          st.sampled_from(["table", "curve"])), max_size=6))
def test_judging_again_changes_nothing_and_keeps_what_was_there(make_record, rows):
    records = [make_record(attack=a, n_robust=n, threat=t, role=role, warnings=("own: stays",))
               for a, n, t, role in rows]
    once = judged(records)
    assert judged(once) == once
    assert all(r.warnings[0] == "own: stays" for r in once)
    strip = {"warnings": ()}
    assert [r.model_copy(update=strip) for r in once] == [
        r.model_copy(update=strip) for r in records]


def test_flags_of_an_earlier_call_are_replaced(attacked, tmp_path):
    wrong = judged(attacked({("fgsm", "Linf:8/255"): 100, ("pgd-20", "Linf:8/255"): 200}))
    assert ids(wrong[0]) == ["iter>=single"]
    save(tmp_path, Results(wrong[:1]))
    assert [ids(r) for r in load([tmp_path]).records] == [[]]


def test_every_flag_is_found_by_its_id_again():
    for id, check in CHECKS.items():
        if check.level != "report":
            assert [id_of(text) for text in flag(id, check.limit + 1)] == [id]
            assert flag(id, check.limit) == ()
    assert id_of("apgd-t: 8 classes leave 7 of the 9 targets.") == ""
