import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robench.reports.grouping import groups, rows

facts = st.fixed_dictionaries({
    "defense": st.sampled_from(["trades", "peeraid"]),
    "seed": st.integers(0, 2),
    "attack": st.sampled_from(["pgd-20", "fgsm", "pyautoattack:standard"]),
    "data_sha256": st.sampled_from(["a" * 64, "b" * 64]),
    "threat": st.sampled_from(["Linf:8/255", "L2:0.5"]),
    "dataset": st.sampled_from(["digits", "mnist"]),
    "status": st.sampled_from(["ok", "failed"]),
})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(facts, max_size=25))
def test_groups_never_mix_images_or_threats(make_record, several):
    records = [make_record(**some, created=f"2026-01-{i + 1:02}") for i, some in enumerate(several)]
    kept = []
    for group in groups(rows(records)):
        members = [record for row in group for record in row.records]
        assert len({(r.dataset, r.split, r.threat) for r in members}) == 1
        for attack in {r.attack for r in members}:
            assert len({r.data_sha256 for r in members if r.attack == attack}) == 1
        kept += members
    newest = {(r.defense, r.seed, r.attack, r.data_sha256, r.threat, r.dataset): r
              for r in sorted(records, key=lambda r: r.status == "ok")}  # what failed gives way
    assert sorted(r.created for r in kept) == sorted(r.created for r in newest.values())


def test_seeds_are_one_row(make_record):
    (row,) = rows([make_record(seed=seed, weights_sha256=str(seed)) for seed in (2, 0, 1)])
    assert [r.seed for r in row.passed("pgd-20")] == [0, 1, 2]


@pytest.mark.parametrize("field, value", [
    ("recipe", "rice2020"), ("epochs", 110), ("model", "wrn-28-10"), ("checkpoint", "swa"),
    ("source", "other.pt"), ("split", "val"), ("defense_config", {"beta": 3.0}),
])
def test_other_networks_are_other_rows(make_record, field, value):
    assert len(rows([make_record(), make_record(**{field: value}, seed=1)])) == 2


def test_attacks_with_a_limit_share_the_row(make_record):
    (row,) = rows([make_record(), make_record(attack="pyautoattack:standard", n=100,
                                              data_sha256="first 100")])
    assert list(row.cells) == ["pgd-20", "autoattack"]


def test_a_quick_look_does_not_mix_with_the_full_measurement(make_record):
    quick = dict(n=100, data_sha256="100", n_correct=80, n_robust=50)
    full, look = make_record(), make_record(**quick)
    autoattack = make_record(attack="pyautoattack:standard", n=50, data_sha256="50")
    first, second = rows([look, full, autoattack])
    assert first.cells == {"pgd-20": {0: full}, "autoattack": {0: autoattack}}
    assert second.cells == {"pgd-20": {0: look}}
    assert len(groups([first, second])) == 2


def test_options_tell_configurations_apart(make_record):
    strong = make_record(defense_config={"beta": 6.0, "steps": 10})
    weak = make_record(defense_config={"beta": 1.0, "steps": 10})
    assert [row.label for row in rows([strong, weak])] == ["trades (beta=6.0)", "trades (beta=1.0)"]
    assert [row.label for row in rows([strong])] == ["trades"]


def test_options_of_a_part_are_named_alone(make_record):
    def record(steps, precision):
        return make_record(attack="autoattack", attack_config={
            "precision": precision, "stages": {"apgd-ce": {"steps": steps, "rho": 0.75}}})

    (row,) = rows([record(100, "exact"), record(100, "bf16"), record(9, "exact")])
    assert list(row.cells) == [
        "autoattack (stages.apgd-ce.steps=100)",
        "autoattack (precision=bf16, stages.apgd-ce.steps=100)",
        "autoattack (stages.apgd-ce.steps=9)"]


def test_two_implementations_of_autoattack_keep_their_own_columns(make_record):
    (row,) = rows([make_record(attack="autoattack"), make_record(attack="pyautoattack:standard")])
    assert list(row.cells) == ["autoattack", "autoattack (pyautoattack:standard)"]


def test_a_failure_without_options_joins_the_column_of_its_attack(make_record):
    failed = make_record(attack_config={}, status="failed", n_robust=0)
    passed = make_record(defense="peeraid")
    assert [list(row.cells) for row in rows([failed, passed])] == [["pgd-20"], ["pgd-20"]]


def test_the_newest_measurement_counts_and_the_row_says_so(make_record):
    new, old = (make_record(created=f"2026-11-{day}", n_robust=day) for day in (20, 10))
    (row,) = rows([new, old])
    assert row.passed("pgd-20") == [new]
    assert row.remarks == ("pgd-20: 1 older or failed measurement(s) of the same seed left out",)


def test_a_retry_that_failed_displaces_nothing(make_record):
    done = make_record(created="2026-11-10")
    failed = make_record(created="2026-11-20", status="failed", n_robust=0)
    (row,) = rows([done, failed])
    assert row.passed("pgd-20") == [done] and "1 older or failed" in row.remarks[0]


def test_attacks_on_different_weights_are_noticed(make_record):
    (row,) = rows([make_record(), make_record(attack="fgsm", weights_sha256="retrained")])
    assert row.remarks == ("seed 0: the attacks saw 2 different networks",)
