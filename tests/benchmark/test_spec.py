"""Requests: how they are read, what is refused, and what the name of a cell depends on."""

import sys
from pathlib import Path

import pytest

from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import plan
from robench.benchmark.data import load_dataset
from robench.benchmark.recipe import ModelSpec
from robench.benchmark.spec import (
    DEFAULT_ATTACKS,
    AttackSpec,
    CellSpec,
    RunSpec,
    check_attacks,
    digest,
    parse_value,
    read_config,
)
from robench.defenses.base import make_defense, options_of
from robench.defenses.config import TrainConfig
from robench.errors import UsageError
from robench.reports.later import LATER

THREAT = ThreatModel("Linf", 0.1)


def refused(action, *arguments):
    """The message of the UsageError, which has one line."""
    with pytest.raises(UsageError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Attacks


@pytest.mark.parametrize(
    ("text", "spec", "label"),
    [
        ("pgd-20", AttackSpec(name="pgd-20"), "pgd-20"),
        ("pgd,steps=50,restarts=5", AttackSpec(name="pgd", options={"steps": 50, "restarts": 5}),
         "pgd,restarts=5,steps=50"),
        (" pgd , steps = 3 ", AttackSpec(name="pgd", options={"steps": 3}), "pgd,steps=3"),
        ("pyautoattack:standard,limit=1000", AttackSpec(name="pyautoattack:standard", limit=1000),
         "pyautoattack:standard"),
        ("pgd,step_size=1e-2", AttackSpec(name="pgd", options={"step_size": 0.01}),
         "pgd,step_size=0.01"),
        ("pgd,loss=cw", AttackSpec(name="pgd", options={"loss": "cw"}), "pgd,loss=cw"),
        ("torchattacks:PGD,random_start=false",
         AttackSpec(name="torchattacks:PGD", options={"random_start": False}),
         "torchattacks:PGD,random_start=False"),
    ],
)
def test_parse(text, spec, label):
    assert AttackSpec.parse(text) == spec
    assert spec.label == label
    assert AttackSpec.parse(label) == spec.model_copy(update={"limit": None})


def test_parsed_attacks_can_be_built():
    attack = AttackSpec.parse("pgd,steps=7,step_size=1e-2").build(THREAT)
    assert (attack.steps, attack.step_size, attack.threat) == (7, 0.01, THREAT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd,steps", "write NAME,key=value,..., not 'steps'"),
        ("pgd,", "not ''"),
        ("pgd,limit=0", "attack pgd.limit: Input should be greater than or equal to 1"),
        ("pgd,limit=many", "attack pgd.limit"),
        ("pgd,steps=[", "cannot read the value '['"),
    ],
)
def test_wrong_attack_texts(text, message):
    assert message in refused(AttackSpec.parse, text)
    assert message in refused(RunSpec.create, {"attacks": [text]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgdd", "unknown attack 'pgdd'. Did you mean: pgd?"),
        ("", "unknown attack ''"),
        ("pgd,stpes=3", "stpes"),
        ("pgd,steps=abc", "attack 'pgd'"),
        ("pgd,name=3", "name"),
        ("pgd,threat=3", "threat"),
        ("pgd,loss=x", "loss: Input should be 'ce'"),
        ("pyautoattack:standrad", "Did you mean: standard?"),
        ("pyautoattack:standard,steps=3", "has no option 'steps'"),
        ("pyautoattack:standard,name=3", "has no option 'name'"),
    ],
)
def test_wrong_attacks_are_found_before_anything_runs(text, message):
    assert message in refused(check_attacks, [AttackSpec.parse(text)], [THREAT])


def test_the_same_attack_twice():
    attacks = [AttackSpec.parse(t) for t in ("fgsm", "pgd,steps=3", "pgd,limit=5,steps=3")]
    check_attacks(attacks[:2], [THREAT])
    assert "'pgd,steps=3' is listed twice" in refused(check_attacks, attacks, [THREAT])


def test_the_default_attacks_exist():
    check_attacks(DEFAULT_ATTACKS, [THREAT])


# Values and configuration files


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("1e-3", 0.001), ("1E5", 1e5), ("true", True), ("null", None),
     ("[0.5, 0.75]", [0.5, 0.75]), ("uniform", "uniform"), ("", None)],
)
def test_values(text, value):
    assert parse_value(text, "x") == value
    assert type(parse_value(text, "x")) is type(value)


@pytest.mark.parametrize("text", ["[", "{a: b", "'", "a: b: c", "!!python/object:os.system x"])
def test_values_that_cannot_be_read(text):
    assert "--set lr=" in refused(parse_value, text, f"--set lr={text}")


def test_configuration_files(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("defense: [trades, ard]\ntrain: {lr: 1e-3}\nattacks: pgd-5\nseeds: 3\n")
    spec = RunSpec.create(read_config(path))
    assert spec.defenses == ("trades", "ard")
    assert spec.attacks == (AttackSpec(name="pgd-5"),)
    assert spec.seeds == (3,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- a\n- b\n", "must hold settings, one `name: value` a line"),
        (b"", "must hold settings"),
        (b"!!python/object/apply:os.mkdir [owned]", "is not valid YAML"),
    ],
)
def test_wrong_configuration_files(tmp_path, content, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert message in refused(read_config, path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_configuration_files_that_are_not_there(tmp_path):
    assert "No such file" in refused(read_config, tmp_path / "x.yaml")
    assert "cannot read" in refused(read_config, tmp_path)


# Requests


def test_one_is_many():
    spec = RunSpec.create({"defenses": "trades", "baselines": "pgd-at", "seeds": 1,
                           "attacks": AttackSpec(name="fgsm")})
    assert (spec.defenses, spec.baselines, spec.seeds) == (("trades",), ("pgd-at",), (1,))
    assert spec.attacks == RunSpec.create({"attacks": "fgsm"}).attacks
    assert spec.attacks == RunSpec.create({"attacks": {"name": "fgsm"}}).attacks
    assert RunSpec.create({"attacks": ["fgsm", {"name": "pgd", "limit": 3}]}).attacks == (
        AttackSpec(name="fgsm"), AttackSpec(name="pgd", limit=3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"defence": "trades"}, "unknown setting 'defence'. Did you mean: defenses?"),
        ({"smokee": True}, "Did you mean: smoke?"),
        ({1: 2}, "1: Keys should be strings"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1, not '0'"),
        ({"epochs": "many"}, "epochs: "),
        ({"limit": 0}, "limit: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"train_limit": 1}, "train_limit: "),
        ({"seeds": "0,x"}, "seeds.0: "),
        ({"seeds": []}, "seeds: "),
        ({"train": 3}, "train: "),
        ({"options": {"trades": 3}}, "options.trades: "),
        ({"attacks": 3}, "attacks"),
        ({"attacks": [{"nam": "x"}]}, "nam"),
        ({"attacks": None}, "attacks"),
        ({"attacks": []}, "attacks: "),
    ],
)
def test_wrong_requests(values, message):
    assert message in refused(RunSpec.create, values)


# What the name of a cell depends on


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def key(digits):
    """The key of the one cell that is no teacher, for a request with these changes."""

    def make(defense="rslad", teacher=None, **changes):
        request = RunSpec.create({"defenses": (defense,), **changes})
        return plan(request, digits, teacher)[1][0].spec.key()

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": (1,)}, {"epochs": 3}, {"model": "resnet18"}, {"threat": "Linf:0.1"},
        {"threat": "L2:0.2"}, {"train_limit": 100}, {"smoke": True}, {"defense": "adaad"},
        {"train": {"lr": 0.1}}, {"train": {"nesterov": True}}, {"train": {"milestones": [0.5]}},
        {"train": {"swa_start": None}}, {"train": {"validation": 100}},
        {"train": {"select_steps": 5}}, {"options": {"rslad": {"weight": 1.0}}},
        {"train": {"optimizer": "adamw"}}, {"train": {"schedule": "cosine"}},
        {"train": {"ema": 0.99}}, {"train": {"clip": 1.0}}, {"train": {"warmup": 1}},
        {"options": {"rslad": {"label_smoothing": 0.1}}},
        {"options": {"trades": {"beta": 3.0}}},  # of its teacher
    ],
    ids=str,
)
def test_the_key_changes_with_what_changes_the_weights(key, changes):
    assert key(**changes) != key()


@pytest.mark.parametrize(
    "changes",
    [
        {"out": "elsewhere"}, {"limit": 7}, {"attacks": ("fgsm",)}, {"batch_size": 3},
        {"device": "cpu"}, {"data_root": "elsewhere"}, {"download": True},
        {"baselines": ("pgd-at",)}, {"options": {"peeraid": {"gamma2": 1.0}}},
        {"train": {"lr": 0.05}}, {"epochs": 40}, {"model": "smallcnn"},  # the recipe's own
        {"train": {"optimizer": "sgd", "ema": None, "warmup": 0}},  # the defaults
        {"options": {"rslad": {"label_smoothing": 0}}},
        {"threat": "Linf:0.2"},
    ],
    ids=str,
)
def test_the_key_does_not_change_with_the_rest(digits, key, changes):
    request = RunSpec.create({"defenses": ("rslad",), **changes})
    keys = [cell.spec.key() for cell in plan(request, digits, None)[1]]
    assert key() in keys


def test_the_key_depends_on_a_given_teacher(key, make_network):
    from robench.benchmark.sources import Network

    first, again, other = (Network(make_network(seed), "x", "smallcnn") for seed in (0, 0, 1))
    assert len({key(), key(teacher=first), key(teacher=other)}) == 3
    assert key(teacher=first) == key(teacher=again)
    with pytest.raises(UsageError, match="none of these defenses takes a teacher"):
        key("trades", teacher=first)


def test_the_key_depends_on_the_source_of_a_users_network(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = ("from torch import nn\n\ndef net(classes):\n"
              "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes, bias={bias}))\n")
    keys = []
    for bias in (True, False, True):
        Path("users_net.py").write_text(source.format(bias=bias))
        sys.modules.pop("users_net", None)
        keys.append(key("standard", model="users_net:net"))
    sys.modules.pop("users_net")
    assert keys[0] == keys[2] != keys[1]


def test_the_key_of_a_cell_is_stable():
    """Finished runs are found by it: a change of this number orphans all of them."""
    spec = CellSpec(
        dataset="digits", data_sha256="0" * 64, model=ModelSpec(name="smallcnn"), defense="trades",
        options={"beta": 6.0}, threat="Linf:0.2", recipe="unified", train=TrainConfig(epochs=3),
        train_limit=None, seed=0, teachers={},
    )
    assert spec.key() == spec.model_copy(update={"notes": ("a note",)}).key() == "ae6a2b23f7b5"


# The training settings of the first networks that were kept.
FIRST_SETTINGS = {
    "epochs", "batch_size", "lr", "momentum", "nesterov", "weight_decay", "milestones", "gamma",
    "lr_per_iteration", "swa_start", "validation", "select", "select_steps", "select_step_size",
    "select_every", "select_dense_from",
}


def test_settings_that_came_later_are_no_part_of_the_key_at_their_defaults():
    """A new field of TrainConfig must be listed, or every finished cell has another name."""
    later = TrainConfig.model_fields.keys() - FIRST_SETTINGS
    defaults = TrainConfig(epochs=1).model_dump(mode="json")
    assert LATER["train"] == {name: defaults[name] for name in later}


KEPT = sorted((Path(__file__).parents[2] / "results").glob("*/cells/*/spec.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_the_cells_in_results_keep_their_names(path):
    spec = CellSpec.model_validate_json(path.read_text())
    defense = make_defense(spec.defense, ThreatModel.parse(spec.threat), **spec.options)
    today = spec.model_copy(update={"options": options_of(defense)})
    assert spec.key() == today.key() == path.parent.name


def test_digests_do_not_depend_on_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert len(digest("x", 20)) == 20


# Plans


def names(cells):
    return [(cell.spec.defense, cell.spec.seed) for cell in cells]


def planned(digits, **request):
    return plan(RunSpec.create(request), digits, None)


def test_teachers_come_first_and_are_shared(digits):
    cells, rows = planned(digits, defenses=("ard", "rslad", "trades"), seeds=(0, 1))
    assert names(cells) == [("trades", 0), ("ard", 0), ("trades", 1), ("ard", 1), ("rslad", 0),
                            ("rslad", 1)]
    assert names(rows) == [("ard", 0), ("ard", 1), ("rslad", 0), ("rslad", 1), ("trades", 0),
                           ("trades", 1)]
    by_name = {(c.spec.defense, c.spec.seed): c for c in cells}
    for name in ("ard", "rslad"):
        teacher = by_name["trades", 1]
        assert by_name[name, 1].spec.teachers == {"teacher": teacher.spec.key()}
        assert by_name[name, 1].teachers["teacher"].folder == teacher.folder


def test_baselines_come_first_and_repetitions_count_once(digits):
    cells, rows = planned(digits, defenses=("trades", "ard", "ard"), baselines=("trades",),
                          seeds=(0, 0))
    assert names(rows) == names(cells) == [("trades", 0), ("ard", 0)]
    assert [cell.baseline for cell in cells] == [cell.baseline for cell in rows] == [True, False]


def test_a_teacher_that_is_a_baseline_too_is_one_cell(digits):
    cells, rows = planned(digits, defenses=("ard",), baselines=("pgd-at", "trades"))
    assert names(rows) == [("pgd-at", 0), ("trades", 0), ("ard", 0)]
    assert [(c.spec.defense, c.baseline) for c in cells] == [
        ("pgd-at", True), ("trades", True), ("ard", False)]


def test_all(digits):
    from robench.defenses import DEFENSES

    assert names(planned(digits, defenses="all")[1]) == [(n, 0) for n in DEFENSES.names()]


def test_folders_are_named_by_keys(digits):
    cells, _ = planned(digits, defenses=("ard", "peeraid"), out="somewhere")
    assert all(c.folder == Path("somewhere") / "cells" / c.spec.key() for c in cells)
    assert len({c.folder for c in cells}) == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "name at least one --defense"),
        ({"defenses": "trads"}, "unknown defense 'trads'. Did you mean: trades?"),
        ({"defenses": "trades", "options": {"trads": {}}}, "Did you mean: trades?"),
        ({"defenses": "trades", "options": {"trades": {"bta": 3}}},
         "defense 'trades' has no option 'bta'; it has steps"),
        ({"defenses": "trades", "options": {"trades": {"threat": "L2:1"}}},
         "defense 'trades' has no option 'threat'"),
        ({"defenses": "trades", "options": {"trades": {"name": 1}}}, "has no option 'name'"),
        ({"defenses": "trades", "options": {"trades": {"beta": "abc"}}}, "option beta: "),
        ({"defenses": "trades", "options": {"trades": {"steps": 2.5}}}, "option steps: "),
        ({"defenses": "trades", "options": {"trades": {"start": "x"}}}, "option start: "),
        ({"defenses": "trades", "train": {"lrr": 3}}, "Did you mean: lr?"),
        ({"defenses": "trades", "train": {"validation": 0}}, "select: val needs validation"),
        ({"defenses": "trades", "train": {"validation": 10**6}}, "cannot hold out 1000000 of 1437"),
        ({"defenses": "trades", "train": {"batch_size": 1}}, "train.batch_size: "),
        ({"defenses": "trades", "epochs": 5, "train": {"swa_start": 7}}, "5 epochs end before"),
        ({"defenses": "trades", "epochs": 5, "train": {"ema": 0.9, "ema_start": 7}},
         "train.ema_start: 5 epochs end before epoch 7; add --set ema_start=0.5, or ema=null"),
        ({"defenses": "trades", "train": {"select": "test"}}, "train.select: test is for recipes"),
        ({"defenses": "trades", "train": {"nesterov": True, "momentum": 0}},
         "train.nesterov: Value error, needs optimizer sgd and a momentum above 0"),
        ({"defenses": "trades", "logs": "tensorbord"}, "Did you mean: tensorboard?"),
        ({"defenses": "trades", "model": "torch.nn:Identity"}, "must return logits (N, K)"),
        ({"defenses": "trades", "recipe": "unifide"}, "Did you mean: unified?"),
        ({"defenses": "rslad", "recipe": "as-released"}, "only on cifar10, cifar100"),
        ({"defenses": "trades", "threat": "Linf:8"}, "write Linf:8/255"),
    ],
    ids=str,
)
def test_wrong_plans(digits, request_, message):
    assert message in refused(lambda: planned(digits, **request_))


def test_no_validation_images_are_needed_to_select_the_last(digits):
    cells, _ = planned(digits, defenses="trades", train={"validation": 0, "select": "last"})
    assert cells[0].spec.train.validation == 0


def test_options_are_read_as_what_they_are(digits):
    cells, _ = planned(digits, defenses="trades", options={"trades": {"beta": "1e-1", "steps": 3}})
    assert (cells[0].defense.beta, cells[0].defense.steps) == (0.1, 3)


def test_a_smoke_run_is_small_whatever_the_recipe_selects_on(digits):
    cells, _ = planned(digits, defenses="trades", smoke=True, train={"select": "test"})
    spec = cells[0].spec
    assert (spec.train.epochs, spec.train_limit, spec.train.select) == (1, 64, "val")
    last, _ = planned(digits, defenses="standard", smoke=True)
    assert last[0].spec.train.select == "last"
