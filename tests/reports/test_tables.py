import io
import warnings

import pandas as pd
import pytest

from robench.reports import tables
from robench.reports.boards import rob_f_boards, rob_f_summary
from robench.reports.uncertainty import wilson

AA = "pyautoattack:standard"


def test_accuracies_are_percentages_with_their_errors(make_record):
    (line,) = tables.leaderboard([make_record()]).to_dict("records")
    low, high = wilson(0.5, 400)
    assert line["clean"] == 80.0 and line["pgd-20"] == 50.0 and line["pgd-20_n"] == 400
    assert (line["pgd-20_low"], line["pgd-20_high"]) == pytest.approx((100 * low, 100 * high))
    assert pd.isna(line["pgd-20_std"]) and line["seeds"] == 1


def test_seeds_are_averaged(make_record):
    records = [make_record(seed=s, n_robust=c, train_seconds=t, teacher_seconds=60.0)
               for s, c, t in ((0, 196, 100.0), (1, 204, 300.0))]
    (line,) = tables.leaderboard(records).to_dict("records")
    assert line["pgd-20"] == 50.0 and line["pgd-20_std"] == pytest.approx(2**0.5)
    assert (line["train_seconds"], line["train_and_teacher_seconds"]) == (200.0, 260.0)


def test_every_number_has_its_own_n(make_record):
    records = [make_record(n=10_000, n_robust=5_000, n_correct=8_000),
               make_record(attack=AA, n=1000, n_robust=450, n_correct=790, data_sha256="1000")]
    (line,) = tables.leaderboard(records).to_dict("records")
    assert (line["clean"], line["clean_n"]) == (80.0, 10_000)
    assert (line["pgd-20_n"], line["autoattack"], line["autoattack_n"]) == (10_000, 45.0, 1000)


def test_ranks_restart_in_each_group_and_equals_share_one(make_record):
    records = [make_record(defense=name, n_robust=count, threat=threat)
               for threat in ("Linf:8/255", "L2:0.5")
               for name, count in (("a", 150), ("b", 200), ("c", 150))]
    frame = tables.leaderboard(records)
    assert list(frame["group"]) == [1, 1, 1, 2, 2, 2]
    assert list(frame["defense"]) == ["b", "a", "c"] * 2
    assert list(frame["rank"]) == [1, 2, 2] * 2


def test_a_failure_is_shown_and_never_a_number(make_record):
    failed = make_record(defense="a", attack=AA, status="failed", n_robust=0,
                         error="out of\nmemory")
    records = [make_record(defense="a"), failed, make_record(defense="b"),
               make_record(defense="b", attack=AA)]
    frame = tables.leaderboard(records)
    b, a = frame.to_dict("records")
    assert (b["defense"], b["rank"]) == ("b", 1) and pd.isna(a["rank"])
    assert pd.isna(a["autoattack"]) and a["autoattack_failed"] == 1
    assert a["warning_text"] == "autoattack: failed: out of memory"
    read = pd.read_csv(io.StringIO(tables.to_csv(frame)))
    assert list(read["autoattack"]) == ["50.0", "failed"]


def test_one_failed_seed_is_counted(make_record):
    records = [make_record(), make_record(seed=1, status="failed", n_robust=0)]
    (line,) = tables.leaderboard(records).to_dict("records")
    assert (line["pgd-20"], line["pgd-20_failed"], line["clean_failed"]) == (50.0, 1, 1)


def test_a_network_on_which_everything_failed_stays(make_record):
    (line,) = tables.leaderboard([make_record(status="failed", n_robust=0)]).to_dict("records")
    assert pd.isna(line["clean"]) and line["clean_failed"] == 1 and pd.isna(line["rank"])


def test_only_ranked_networks_of_the_table_are_ranked(make_record):
    records = [make_record(), make_record(ranked=False, checkpoint="last", n_robust=180),
               make_record(ranked=False, checkpoint="peer", n_robust=2),
               make_record(role="curve", threat="Linf:2/255")]
    assert list(tables.leaderboard(records)["checkpoint"]) == ["best"]
    others = tables.other_checkpoints(records)
    assert list(others["checkpoint"]) == ["last", "peer"]
    assert list(others["clean"]) == [80.0, 80.0] and list(others["pgd-20"]) == [45.0, 0.5]


def test_a_selection_on_the_test_images_is_marked(make_record, make_transfer):
    records = [make_record(selection="test"), make_record(selection="test", ranked=False)]
    transfers = [make_transfer(run=records[0].run), make_transfer(run="unknown")]
    assert list(tables.leaderboard(records)["selection"]) == ["test (!)"]
    assert list(tables.other_checkpoints(records)["selection"]) == ["test (!)"]
    assert list(tables.rob_f(transfers, records)["selection"]) == ["test (!)", ""]


def test_the_difference_is_to_the_first_baseline_of_the_group(campaign):
    frame = tables.leaderboard(campaign.records).set_index("defense")
    assert pd.isna(frame.loc["trades", "delta"]) and frame.loc["trades", "baseline"]
    for name in ("peeraid", "pgd_at"):
        line = frame.loc[name]
        assert (line["delta_to"], line["delta_attack"]) == ("trades", "autoattack")
        assert line["delta"] == pytest.approx(
            line["autoattack"] - frame.loc["trades", "autoattack"])
        assert 0 < line["delta_p"] <= 1


def test_no_difference_across_images(make_record):
    frame = tables.leaderboard([make_record(baseline=True, defense="a"),
                                make_record(defense="b", data_sha256="others")])
    assert list(frame["group"]) == [1, 2] and frame["delta"].isna().all()


def test_a_warning_of_every_attack_is_said_once(make_record):
    warned = {"warnings": ("zero-grad: 12 % of the images",)}
    records = [make_record(**warned), make_record(attack="fgsm", **warned),
               make_record(attack="cw", defense="b", **warned), make_record(defense="b")]
    frame = tables.leaderboard(records).set_index("defense")
    assert frame.loc["trades", "warning_text"] == "zero-grad: 12 % of the images"
    assert frame.loc["b", "warning_text"] == "cw: zero-grad: 12 % of the images"


def test_rob_f_is_in_percent(make_transfer):
    (line,) = tables.rob_f([make_transfer()]).to_dict("records")
    assert (line["clean"], line["rob_f_self"], line["rob_f_student"], line["student_robust"]) == (
        90.0, 1.0, 75.0, 55.0)
    assert (line["network"], line["n"], line["label"]) == ("peer", 400, "peeraid")


def test_csv_keeps_full_precision(make_record):
    frame = tables.leaderboard([make_record(n=3, n_correct=2, n_robust=1, attack="mifgsm")])
    read = pd.read_csv(io.StringIO(tables.to_csv(frame)))
    assert read.loc[0, "mifgsm"] == 100 * (1 / 3) and read.loc[0, "mifgsm_n"] == 3
    assert "autoattack_low" in read and read["autoattack"].isna().all()


def test_empty_tables_have_their_columns_and_types(make_record):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty, full = tables.leaderboard([]), tables.leaderboard([make_record()])
    assert list(empty.columns) == list(full.columns)
    assert list(empty.dtypes) == list(full.dtypes)
    assert tables.to_csv(tables.rob_f([])).splitlines() == [",".join(tables.ROB_F)]


def test_overfitting_is_a_column(make_record):
    """Robust overfitting in points, the mean over seeds; the earliest collapse of any seed."""
    records = [make_record(seed=s, robust_overfitting=gap, catastrophic_epoch=epoch)
               for s, gap, epoch in ((0, 0.05, None), (1, 0.07, 12), (2, None, 9))]
    records += [make_record(defense="a", seed=0)]
    table = tables.leaderboard(records).set_index("defense")
    line = table.loc[table.index != "a"].iloc[0]
    assert line["robust_overfitting"] == pytest.approx(6.0) and line["catastrophic_epoch"] == 9
    assert table.loc["a"][["robust_overfitting", "catastrophic_epoch"]].isna().all()


def test_rob_f_has_a_line_of_means_for_each_network_with_several_seeds(make_transfer):
    transfers = [make_transfer(seed=seed, run=f"run-{seed}", self_crafted=crafted)
                 for seed, crafted in enumerate((4, 8, 12))]
    means, seeds = rob_f_boards(tables.rob_f(transfers))
    cells = {column.title: column.cells for column in means.columns}
    assert [cell.text for cell in cells["Seeds"]] == ["3"]
    assert cells["Rob_f(x_f*) %"][0].text == "2.0 ± 1.0"
    assert len(seeds.columns[0].cells) == 3
    assert len(rob_f_boards(tables.rob_f(transfers[:1]))) == 1
    assert rob_f_summary(tables.rob_f(transfers)) == [means]
    assert [len(board.rows) for board in rob_f_summary(tables.rob_f(transfers[:1]))] == [1]
