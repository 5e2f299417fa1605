"""Recipes: what overrides what, and that the published settings are what is written there."""

from functools import partial

import pytest
from pydantic import ValidationError

from robench.attacks.threat import ThreatModel
from robench.benchmark.data import DATASETS
from robench.benchmark.models import MODELS, NORMALIZE
from robench.benchmark.recipe import (
    ModelSpec,
    Recipe,
    Settings,
    default_threat,
    explain,
    load_recipe,
    recipe_names,
    settings_for,
    train_config,
)
from robench.defenses import DEFENSES, Moment, make_defense
from robench.defenses.trainer import TrainConfig
from robench.errors import UsageError

NAMED = [name for name in DATASETS.names() if ":" not in name]
PAIRS = [("unified", defense, dataset) for defense in DEFENSES.names() for dataset in NAMED]
PAIRS += [("as-released", defense, dataset)
          for defense, settings in load_recipe("as-released").defenses.items()
          for dataset in settings.datasets]


def resolved(recipe, defense, dataset):
    """(the settings, the training configuration, the threat model, the defense)"""
    settings = settings_for(recipe, defense, dataset)
    threat = ThreatModel.parse(settings.threat)
    made = make_defense(defense, threat, **settings.options)
    return settings, train_config(settings, {}), threat, made


# Merging


def test_special_settings_override_general_ones_key_by_key():
    def settings(model, lr, **train):
        return {"model": model, "options": {"a": model}, "train": {"lr": lr, **train},
                "notes": (model,)}

    recipe = Recipe.model_validate({
        "description": "", **settings("general", 1, epochs=1),
        "datasets": {"d": settings("data", 2, batch_size=2)},
        "defenses": {"m": {**settings("method", 3, gamma=0.3),
                           "datasets": {"d": settings("both", 4, momentum=0.4)}}},
    })
    both = recipe.resolve("m", "d")
    assert (both.model, both.options) == ("both", {"a": "both"})
    assert both.train == {"lr": 4, "epochs": 1, "batch_size": 2, "gamma": 0.3, "momentum": 0.4}
    assert both.notes == ("general", "data", "method", "both")
    assert recipe.resolve("m", "other").train == {"lr": 3, "epochs": 1, "gamma": 0.3}
    assert recipe.resolve("other", "d").train == {"lr": 2, "epochs": 1, "batch_size": 2}
    assert recipe.resolve("other", "other").notes == ("general",)


def test_what_is_not_set_does_not_override():
    base = Settings(model="a", threat="L2:1", options={"x": 1}, train={"lr": 1}, notes=("n",))
    assert Settings().over(base) == base == base.over(Settings())


def test_a_falsy_value_overrides():
    assert Settings(train={"lr": 0}).over(Settings(train={"lr": 1})).train == {"lr": 0}


def test_overrides_of_the_user_come_last():
    settings = settings_for("unified", "trades", "digits")
    assert train_config(settings, {"epochs": 3, "lr": "1e-3"}).lr == 1e-3
    assert train_config(settings, {"epochs": 3}).epochs == 3


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(load_recipe, "unifed"), "unknown recipe 'unifed'. Did you mean: unified?"),
        (partial(settings_for, "as-released", "standard", "cifar10"),
         "documents 'standard' nowhere, not on 'cifar10'; use --recipe unified"),
        (partial(settings_for, "as-released", "rslad", "digits"),
         "only on cifar10, cifar100, not on 'digits'"),
        (partial(train_config, Settings(train={"epochs": 1}), {"epoch": 3}),
         "unknown training setting 'epoch'. Did you mean: epochs?"),
        (partial(train_config, Settings(train={"epochs": 1}), {"lr": -1}),
         "train.lr: Input should be greater than 0, not '-1'"),
        (partial(train_config, Settings(train={"epochs": 1}), {"lr": -1, "gamma": 3}),
         "(and 1 more)"),
        (partial(train_config, Settings(train={"epochs": 1}), {"milestones": [1, "x"]}),
         "train.milestones.1: "),
    ],
)
def test_errors_have_one_line(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", [(), ("datasets", "d"), ("defenses", "m")])
def test_unknown_keys_in_a_recipe_are_errors(where):
    content = node = {"description": ""}
    for key in where:
        node = node.setdefault(key, {})
    node["trian"] = {}
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate(content)
    path = ".".join(("recipe", *where, "trian"))
    assert explain(error.value, "recipe") == f"unknown setting {path}"


# What is written there


@pytest.mark.parametrize(("recipe", "defense", "dataset"), PAIRS)
def test_every_pair_resolves(recipe, defense, dataset):
    settings, config, threat, made = resolved(recipe, defense, dataset)
    model = settings.model if isinstance(settings.model, ModelSpec) else ModelSpec(
        name=settings.model)
    assert model.name in MODELS
    assert model.normalize in (None, *NORMALIZE)
    assert config.select != "val" or config.validation
    assert all(config.moment(point) < config.epochs for point in config.milestones
               if (recipe, defense) != ("as-released", "trades"))  # it stops before its decays
    assert getattr(made, "threat", threat) == threat
    assert set(made.given.values()) <= set(DEFENSES.names())


def test_recipes_name_what_exists():
    assert recipe_names() == ("as-released", "unified")
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.description
        assert {base.partition("+")[0] for base in recipe.defenses} <= set(DEFENSES.names())
        for settings in (recipe, *recipe.datasets.values()):
            train_config(Settings(train={"epochs": 1}), dict(settings.train))
        for defense, method in recipe.defenses.items():
            threat = ThreatModel("Linf", 0.1)
            for settings in (method, *method.datasets.values()):
                make_defense(defense, threat, **settings.options)
                train_config(Settings(train={"epochs": 1}), dict(settings.train))


@pytest.mark.parametrize("dataset", [*NAMED, "tiny-imagenet", "folder:somewhere"])
def test_unified_is_one_protocol(dataset):
    """Same schedule, budget, network and selection for all; standard has nothing to select by."""
    settings = {d: settings_for("unified", d, dataset) for d in DEFENSES.names()}
    configs = {d: train_config(s, {}) for d, s in settings.items()}
    assert configs.pop("standard") == configs["trades"].model_copy(update={"select": "last"})
    assert set(configs.values()) == {configs["trades"]}
    assert configs["trades"].select == "val"
    assert len({(str(s.model), s.threat, s.notes) for s in settings.values()}) == 1


def test_unified_changes_options_only_where_a_method_is_published_that_way():
    for _, defense, dataset in PAIRS:
        if "+" in defense:  # see test_a_wrapped_defense_has_the_settings_of_what_it_wraps
            continue
        options = settings_for("unified", defense, dataset).options
        if defense not in ("adaad", "adr", "igdm", "peeraid", "saad"):
            assert options == {}
            continue
        try:
            released = settings_for("as-released", defense, dataset)
        except UsageError:  # not a data set of theirs: the defaults are their CIFAR-10 settings
            released, options = settings_for("as-released", defense, "cifar10"), {}
        threat = ThreatModel("Linf", 8 / 255)
        assert make_defense(defense, threat, **options) == make_defense(
            defense, threat, **released.options)


def test_threats():
    assert default_threat("digits") == "Linf:0.2"
    assert default_threat("mnist") == "Linf:0.3"
    assert default_threat("cifar10") == default_threat("folder:x") == "Linf:8/255"


# As released: METHODS.md, sections 1.3 and 2.1 to 2.11


def rates(config):
    """[(learning rate, how many epochs it lasts)]"""
    curve = [round(config.lr_at(epoch), 10) for epoch in range(config.epochs)]
    return [(rate, curve.count(rate)) for rate in dict.fromkeys(curve)]


def test_rice_2020():
    settings, config, threat, made = resolved("as-released", "pgd-at", "cifar10")
    assert settings.model == ModelSpec(name="preactresnet18", normalize="cifar10")
    assert (threat, made.steps, made.ascent.step_size) == (
        ThreatModel("Linf", 8 / 255), 10, 2 / 255)
    assert (made.start, made.clamp_start, made.craft_mode) == ("uniform", True, "train")
    assert made.extra_clean_forward
    assert (config.epochs, config.batch_size, config.weight_decay) == (200, 128, 5e-4)
    assert (config.select, config.validation, config.swa_start) == ("test", 0, None)
    # Piecewise in epoch + (i + 1) / n: below half 0.1, below three quarters 0.01, then 0.001.
    assert config.lr_per_iteration
    assert [config.lr_at(t) for t in (0.01, 99.99, 100, 149.99, 150, 200)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_trades():
    settings, config, threat, made = resolved("as-released", "trades", "cifar10")
    assert settings.model == "wrn-34-10"
    assert (threat, made.steps, made.ascent.step_size) == (ThreatModel("Linf", 0.031), 10, 0.007)
    assert (made.beta, made.start, made.clamp_start) == (6, "normal", False)
    assert (config.batch_size, config.weight_decay) == (128, 2e-4)
    assert rates(config) == [(0.1, 74), (0.01, 2)]  # /10 in epochs 75 and 76, counted from 1
    assert config.ranked == ("last",)


@pytest.mark.parametrize(("dataset", "batch"), [("cifar10", 128), ("cifar100", 256)])
def test_ard_keeps_its_learning_rate_bug(dataset, batch):
    _, config, threat, made = resolved("as-released", "ard", dataset)
    assert rates(config) == [(0.1, 100), (0.01, 100)]
    assert (config.batch_size, config.weight_decay, config.select) == (batch, 2e-4, "last")
    assert (made.temperature, made.alpha, made.craft_mode) == (30, 1, "train")
    assert (made.start, made.clamp_start) == ("uniform", False)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_rslad(dataset):
    _, config, _, made = resolved("as-released", "rslad", dataset)
    assert rates(config) == [(0.1, 215), (0.01, 45), (0.001, 25), (0.0001, 15)]
    assert (made.weight, made.adversarial_share) == (0.1, pytest.approx(5 / 6))
    assert (config.select, config.select_steps, config.select_step_size) == ("test", 20, 0.003)
    assert (config.weight_decay, made.start) == (2e-4, "normal")
    measured = [epoch for epoch in range(300) if config.measures(epoch)]
    assert [e for e in measured if e < 214] == list(range(0, 214, 20))
    assert measured[-86:] == list(range(214, 300))  # in every epoch from the 215th on


@pytest.mark.parametrize(("dataset", "reduction"), [("cifar10", "mean"), ("cifar100", "batchmean")])
def test_adaad(dataset, reduction):
    _, config, threat, made = resolved("as-released", "adaad", dataset)
    assert rates(config) == [(0.1, 100), (0.01, 50), (0.001, 50)]
    assert (made.reduction, made.alpha, config.weight_decay) == (reduction, 1, 5e-4)
    assert (threat, made.ascent.step_size) == (ThreatModel("Linf", 8 / 255), 2 / 255)


@pytest.mark.parametrize(
    ("dataset", "weights", "curve", "averaged"),
    [
        ("cifar10", (5, 0.1, 0, 1, 1), [(0.1, 214), (0.01, 45), (0.001, 25), (0.0001, 16)], 86),
        ("cifar100", (5, 1, 0, 1, 1), [(0.1, 214), (0.01, 45), (0.001, 25), (0.0001, 16)], 86),
        ("tiny-imagenet", (1, 100, 0.035, 35, 20), [(0.1, 99), (0.01, 50), (0.001, 51)], 101),
    ],
)
def test_peeraid(dataset, weights, curve, averaged):
    _, config, threat, made = resolved("as-released", "peeraid", dataset)
    assert (made.temperature, made.gamma2, made.lambda1, made.lambda2, made.lambda3) == weights
    assert (made.gamma1, made.peer_temperature) == (1, 1)
    assert not (made.detach_student or made.detach_clean)
    assert rates(config) == curve
    assert sum(config.averages(epoch) for epoch in range(config.epochs)) == averaged
    assert (config.batch_size, config.weight_decay, config.nesterov) == (128, 2e-4, False)
    assert (threat, made.steps, made.start) == (ThreatModel("Linf", 8 / 255), 10, "normal")
    assert config.ranked == ("best", "swa")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_at_awp_is_rice_2020_with_awp(dataset):
    settings, config, _, made = resolved("as-released", "pgd-at+awp", dataset)
    base, plain, _, inner = resolved("as-released", "pgd-at", "cifar10")
    assert settings.model == ModelSpec(name=base.model.name, normalize=dataset)
    assert config == plain.model_copy(update={"select_steps": 20})
    assert (made.inner, made.gamma, made.warm_up) == (inner, 0.01, 0)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_trades_awp(dataset):
    settings, config, threat, made = resolved("as-released", "trades+awp", dataset)
    assert settings.model == "wrn-34-10"
    assert (threat, made.inner.ascent.step_size) == (ThreatModel("Linf", 8 / 255), 2 / 255)
    assert (made.inner.beta, made.inner.start, made.gamma) == (6, "normal", 0.005)
    # Counted from 1: perturbed from epoch 10 on, decays in epochs 100 and 150.
    assert made.at(Moment(8, 200)) == made.inner and made.at(Moment(9, 200)) == made
    assert rates(config) == [(0.1, 99), (0.01, 50), (0.001, 51)]
    assert (config.weight_decay, config.ranked) == (5e-4, ("last",))


def test_mart():
    _, config, threat, made = resolved("as-released", "mart", "cifar10")
    assert (threat, made.ascent.step_size, made.steps) == (ThreatModel("Linf", 0.031), 0.007, 10)
    assert (made.beta, made.start, made.craft_mode) == (5, "normal", "eval")
    assert rates(config) == [(0.01, 74), (0.001, 15), (1e-4, 10), (1e-5, 21)]
    assert (config.weight_decay, config.ranked) == (3.5e-3, ("last",))


@pytest.mark.parametrize(("dataset", "held_out"), [
    ("cifar10", 5000), ("cifar100", 5000), ("tiny-imagenet", 10000)])
def test_akd2(dataset, held_out):
    _, config, threat, made = resolved("as-released", "akd2", dataset)
    assert (made.label_weight, made.natural_weight, made.teacher_weight) == (0.3, 0.1, 0.6)
    assert (made.temperature, made.start, made.craft_mode) == (2, "uniform", "train")
    assert rates(config) == [(0.1, 50), (0.01, 100), (0.001, 50)]
    assert [epoch for epoch in range(200) if config.averages(epoch)] == list(range(55, 200))
    assert (config.select, config.validation, config.weight_decay) == ("val", held_out, 5e-4)


@pytest.mark.parametrize(("name", "begin"), [("iad", 60), ("iad-ii", 40)])
def test_iad_keeps_the_learning_rate_bug_of_ard(name, begin):
    _, config, threat, made = resolved("as-released", name, "cifar10")
    assert rates(config) == [(0.1, 100), (0.01, 100)]
    assert (config.weight_decay, config.select, config.select_steps) == (2e-4, "test", 10)
    assert (made.temperature, made.beta, made.start, made.craft_mode) == (
        1, 0.1, "uniform", "train")
    assert made.at(Moment(begin - 1, 200)) != made and made.at(Moment(begin, 200)) == made
    default = make_defense(name, threat)  # a share of all epochs: the same point in 200
    assert default.at(Moment(begin - 1, 200)) != default
    assert default.at(Moment(begin, 200)) == default


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_mtard_has_the_schedule_of_rslad(dataset):
    _, config, _, made = resolved("as-released", "mtard", dataset)
    assert config == resolved("as-released", "rslad", dataset)[1]
    assert (made.rate, made.weight, made.start) == (0.025, 0.1, "normal")


def test_cat():
    _, config, threat, made = resolved("as-released", "cat", "cifar10")
    assert (made.beta, made.cross_weight) == (6, pytest.approx(19 / 20))
    assert rates(config) == [(0.1, 99), (0.01, 50), (0.001, 51)]
    assert (config.weight_decay, config.select, config.batch_size) == (5e-4, "test", 128)


def test_defaults_of_the_configuration_are_those_of_the_recipes():
    assert TrainConfig(epochs=1).gamma == 0.1
    assert TrainConfig(epochs=1).select_steps == 10


def test_a_wrapped_defense_has_the_settings_of_what_it_wraps_in_a_recipe_for_all():
    plain, wrapped = (resolved("unified", name, "cifar100") for name in ("peeraid", "peeraid+awp"))
    assert wrapped[0] == plain[0] and wrapped[3].inner == plain[3]
    assert resolved("unified", "pgd-at+awp", "cifar10")[3].gamma == 0.01
    assert resolved("unified", "trades+awp", "cifar10")[3].gamma == 0.005
    with pytest.raises(UsageError, match="nowhere"):
        settings_for("as-released", "rslad+awp", "cifar10")


# As released: METHODS.md, sections 2.12 to 2.14, 2.16 and 2.17


@pytest.mark.parametrize(("dataset", "beta"), [("cifar10", 0), ("cifar100", 6)])
def test_lbgat(dataset, beta):
    _, config, threat, made = resolved("as-released", "lbgat", dataset)
    assert (threat, made.ascent.step_size) == (ThreatModel("Linf", 0.031), 0.007)
    assert (made.beta, config.weight_decay, config.select) == (beta, 2e-4, "last")
    assert [config.lr_of(epoch, 0, 391) for epoch in (1, 74, 75, 89, 90, 99)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_hat():
    _, config, _, made = resolved("as-released", "hat", "cifar10")
    assert (made.overshoot, made.beta, made.gamma) == (2, 2.5, 0.5)
    assert (config.epochs, config.lr, config.schedule) == (50, 0.21, "one-cycle")
    assert [epoch for epoch in range(50) if config.measures(epoch)] == [0, 30, *range(45, 50)]


@pytest.mark.parametrize(("dataset", "temperatures", "trust", "stages"), [
    ("cifar10", (2.5, 2), (0.7, 0.95), (100, 50, 50)),
    ("cifar100", (1.5, 1), (0.7, 0.95), (100, 50, 50)),
    ("tiny-imagenet", (2, 1.5), (0.5, 0.9), (40, 20, 20)),
])
def test_adr(dataset, temperatures, trust, stages):
    _, config, _, made = resolved("as-released", "adr", dataset)
    assert (made.temperature_start, made.temperature_end) == temperatures
    assert (made.trust_start, made.trust_end) == trust
    assert rates(config) == list(zip((0.1, 0.01, 0.001), stages, strict=True))
    assert config.ema == made.ema_decay == 0.995 and config.ranked == ("best", "ema")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_ikl_awp(dataset):
    _, config, _, made = resolved("as-released", "ikl+awp", dataset)
    assert made.gamma == 0.005
    first, last = (made.at(Moment(epoch, 200)) for epoch in (8, 199))  # counted from 0
    assert not hasattr(first, "gamma") and last.gamma == made.gamma
    assert first.threat.eps == pytest.approx(9 / 200 * 8 / 255)
    assert last.inner.threat.eps == 8 / 255 and last.inner.ascent.step_size == 4 / 255
    assert (config.schedule, config.lr, config.ema_start) == ("cosine", 0.2, 150)


@pytest.mark.parametrize(("dataset", "alpha"), [("cifar10", 1), ("cifar100", 10)])
def test_igdm_and_saad_at_the_intended_budget(dataset, alpha):
    for name in ("igdm", "saad"):
        _, config, threat, made = resolved("as-released", name, dataset)
        assert (threat, made.ascent.step_size) == (ThreatModel("Linf", 8 / 255), 2 / 255)
        assert getattr(made, "alpha" if name == "igdm" else "igdm_alpha") == alpha
        assert rates(config) == [(0.1, 100), (0.01, 50), (0.001, 50)]
        assert sum(map(config.averages, range(200))) == (106 if name == "saad" else 0)
        assert (config.weight_decay, config.select) == (2e-4, "last")
