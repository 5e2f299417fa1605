"""The training loop: its schedule, what it keeps, and that an interruption changes nothing."""

from dataclasses import asdict, dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from robench.attacks.threat import ThreatModel
from robench.defenses import Defense, Losses, make_defense
from robench.defenses.trainer import TrainConfig, TrainingFailed, Watcher, accuracies, fit

THREAT = ThreatModel("Linf", 0.1)


@dataclass(frozen=True, kw_only=True)
class Plain(Defense):
    """Cross-entropy on clean images; `nan_at` names the step whose loss is NaN, from 0."""

    nan_at: int = -1

    def craft(self, nets, x, y):
        return x

    def loss(self, nets, x, x_adv, y):
        ce = F.cross_entropy(nets["student"](x), y)
        return Losses({"ce": ce * float("nan") if steps_taken(nets) == self.nan_at else ce})


def steps_taken(nets):
    """Batch-norm counts the batches, one a step for Plain; this one has been counted already."""
    return int(nets["student"][1].num_batches_tracked) - 1


@pytest.fixture(scope="session")
def train(make_net, make_data, make_keeper):
    """Fits tiny networks; returns (history, nets, keeper)."""

    def run(defense="standard", n=24, keeper=None, nets=None, **options):
        if isinstance(defense, str):
            defense = make_defense(defense, THREAT)
        keeper = keeper or make_keeper()
        known = {"selection", "seed", "watcher", "augment"}
        others = {key: options.pop(key) for key in known & options.keys()}
        config = TrainConfig(**{"epochs": 3, "batch_size": 8, "select_steps": 2, **options})
        if config.select != "last":
            others.setdefault("selection", make_data(20, seed=1))
        if nets is None:
            names = (*defense.trained, *defense.given)
            nets = {name: make_net(seed) for seed, name in enumerate(names)}
        history = fit(defense, nets, make_data(n), config, threat=THREAT, keeper=keeper, **others)
        return history, nets, keeper

    return run


class Steps(Watcher):
    """Writes down what it is told."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def step(self, epoch, step, steps):
        self.steps.append((epoch, step, steps))

    def epoch(self, log):
        self.epochs.append(log)


class LearningRates:
    """Writes down the learning rate of every optimizer step."""

    def __init__(self, monkeypatch):
        self.seen, original = [], torch.optim.SGD.step

        def step(optimizer, closure=None):
            self.seen.append(optimizer.param_groups[0]["lr"])
            return original(optimizer, closure)

        monkeypatch.setattr(torch.optim.SGD, "step", step)


# The schedule


def curve(config):
    return [config.lr_at(epoch) for epoch in range(config.epochs)]


def test_milestones_count_from_0_and_include_their_epoch():
    config = TrainConfig(epochs=6, lr=1.0, milestones=(2, 4))
    assert curve(config) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert config.lr_at(1.999) == 1
    assert config.lr_at(2) == pytest.approx(0.1)


def test_fractions_are_of_all_epochs():
    config = TrainConfig(epochs=8, lr=1.0, milestones=(0.5, 0.75), swa_start=0.5)
    assert curve(config) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [config.averages(epoch) for epoch in range(8)] == [False] * 4 + [True] * 4
    assert config == config.model_validate(config.model_dump())


def test_the_order_of_milestones_and_gamma():
    config = TrainConfig(epochs=4, lr=1.0, milestones=(3, 1), gamma=0.5)
    assert curve(config) == pytest.approx([1, 0.5, 0.5, 0.25])
    # 0 and 1 are epochs, not fractions.
    assert curve(TrainConfig(epochs=2, lr=1.0, milestones=(0, 1))) == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("point", [0, 1, 3, 0.25, 0.5])
def test_averaging_starts_at_its_epoch(point):
    config = TrainConfig(epochs=4, swa_start=point)
    first = config.moment(point)
    assert [config.averages(e) for e in range(4)] == [e >= first for e in range(4)]
    assert not any(TrainConfig(epochs=4).averages(epoch) for epoch in range(4))


def test_the_optimizer_gets_the_curve(train, monkeypatch):
    rates = LearningRates(monkeypatch)
    history, _, _ = train(epochs=3, lr=0.4, milestones=(1, 2), gamma=0.5)
    assert rates.seen == [0.4] * 3 + [0.2] * 3 + [0.1] * 3  # 24 images, batches of 8
    assert [log.lr for log in history] == [0.4, 0.2, 0.1]


def test_per_iteration_looks_the_rate_up_at_the_end_of_each_step(train, monkeypatch):
    """Rice et al. 2020: epoch + (i + 1) / n, so the last step of an epoch has the next one's."""
    rates = LearningRates(monkeypatch)
    history, _, _ = train(epochs=2, lr=1e-2, milestones=(1, 2), lr_per_iteration=True)
    assert rates.seen == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-4])
    assert [log.lr for log in history] == pytest.approx([1e-3, 1e-4])


@dataclass(frozen=True, kw_only=True)
class Scheduled(Plain):
    """Writes its own share of the training into the log."""

    share: float = -1.0

    def at(self, now):
        return replace(self, share=now.share)

    def loss(self, nets, x, x_adv, y):
        losses = super().loss(nets, x, x_adv, y)
        return Losses({**losses.parts, "share": torch.tensor(self.share)})


def test_a_defense_may_have_a_schedule_of_its_own(train):
    history, _, _ = train(Scheduled(), epochs=4)
    assert [log.losses["share"] for log in history] == pytest.approx(
        [(3 * epoch + 1) / 12 for epoch in range(4)])  # the mean of three steps


def test_every_trained_network_has_the_same_rate(train, monkeypatch):
    rates = LearningRates(monkeypatch)
    train("peeraid", epochs=2, lr=0.1, milestones=(1,))
    assert rates.seen == pytest.approx([0.1] * 6 + [0.01] * 6)  # two networks, three steps


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_which_epochs_take_part_in_the_selection(epochs, every):
    config = TrainConfig(epochs=epochs, select_every=every, select_dense_from=3)
    measured = {epoch for epoch in range(epochs) if config.measures(epoch)}
    assert measured == {*range(0, epochs, every), *range(3, epochs), epochs - 1}


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"epochs": 1.5}, {"lr": 0}, {"lr": "fast"}, {"batch_size": 1}, {"gamma": 2},
     {"momentum": 1}, {"select": "best"}, {"validation": -1}, {"epoch": 3}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"epochs": 2, **wrong})


# What is kept


class Scripted:
    """Replaces `accuracies`: gives out prepared (clean, robust) pairs, one a call."""

    def __init__(self, monkeypatch, robust, clean=None):
        self.pairs = iter(list(zip(clean or [0.9] * len(robust), robust, strict=True)))
        monkeypatch.setattr("robench.defenses.trainer.accuracies", self)

    def __call__(self, net, data, attack):
        return next(self.pairs)


def test_best_is_the_epoch_with_the_highest_robust_accuracy(train, monkeypatch):
    Scripted(monkeypatch, [0.1, 0.4, 0.3, 0.39, 0.2], clean=[0.5, 0.6, 0.7, 0.9, 0.9])
    history, nets, keeper = train(epochs=5)
    assert [log.robust for log in history] == [0.1, 0.4, 0.3, 0.39, 0.2]
    assert keeper.epochs == {"best": 1, "last": 4}
    last = keeper.networks["last"][1]
    assert all(torch.equal(v, last[k]) for k, v in nets["student"].state_dict().items())
    assert not torch.equal(keeper.networks["best"][1]["4.weight"], last["4.weight"])


@pytest.mark.parametrize(
    ("clean", "best"),
    [([0.9, 0.8, 0.7], 0), ([0.7, 0.8, 0.7], 1), ([0.7, 0.8, 0.8], 2), ([0.9, 0.9, 0.9], 2)],
)
def test_clean_accuracy_decides_a_tie_and_then_the_later_epoch(train, monkeypatch, clean, best):
    Scripted(monkeypatch, [0.4, 0.4, 0.4], clean)
    assert train(epochs=3)[2].epochs == {"best": best, "last": 2}


def test_the_kept_best_is_the_network_of_that_epoch(train, monkeypatch):
    Scripted(monkeypatch, [0.1, 0.4, 0.3, 0.2])
    _, _, keeper = train(epochs=4, lr=0.05)
    _, nets, _ = train(epochs=2, lr=0.05, select="last")
    best = keeper.networks["best"][1]
    assert all(torch.equal(v, best[k]) for k, v in nets["student"].state_dict().items())


def test_the_average_has_a_best_of_its_own(train, monkeypatch):
    # Epoch 0 measures the student; 1 and 2 the student and then the average.
    Scripted(monkeypatch, [0.5, 0.1, 0.3, 0.2, 0.2])
    history, _, keeper = train(epochs=3, swa_start=1)
    assert keeper.epochs == {"best": 0, "swa": 1, "last": 2, "swa-last": 2}
    assert [log.swa_robust for log in history] == [None, 0.3, 0.2]


def test_a_robust_accuracy_of_zero_is_a_best_too(train, monkeypatch):
    Scripted(monkeypatch, [0.0, 0.0], clean=[0.0, 0.0])
    assert train(epochs=2)[2].epochs == {"best": 1, "last": 1}


def test_the_peer_is_the_partner_of_the_best_student(train, monkeypatch):
    Scripted(monkeypatch, [0.1, 0.4, 0.3])
    assert train("peeraid", epochs=3)[2].epochs == {"best": 1, "peer": 1, "last": 2}


def test_select_last_keeps_the_last_networks_only(train):
    for options in ({}, {"swa_start": 1}):
        history, _, keeper = train("peeraid", epochs=3, select="last", **options)
        swa = {"swa-last": 2} if options else {}
        assert keeper.epochs == {"last": 2, "peer": 2, **swa}
        assert all(log.robust is None and log.clean is None for log in history)
        config = TrainConfig(epochs=3, select="last", **options)
        assert set(config.ranked) == keeper.epochs.keys() - {"peer"}


def test_ranked_checkpoints_are_kept(train):
    for options in ({}, {"swa_start": 0.5}):
        kept = train(**options)[2].epochs
        assert set(TrainConfig(epochs=3, **options).ranked) <= kept.keys()


def test_accuracies_against_a_direct_count(make_net, make_data):
    net, (x, y) = make_net().eval(), make_data(40)

    def shift(net, x, y):  # an "attack" that is easy to follow
        return x.flip(2)

    with torch.no_grad():
        right = net(x).argmax(1) == y
        robust = right & (net(x.flip(2)).argmax(1) == y)
    assert accuracies(net, (x, y), shift) == (int(right.sum()) / 40, int(robust.sum()) / 40)


def test_accuracies_does_not_attack_what_is_wrong_anyway(make_net, make_data):
    net, (x, _) = make_net().eval(), make_data(40)
    with torch.no_grad():
        wrong = (net(x).argmax(1) + 1) % 3  # no label is right

    def attack(net, x, y):
        raise AssertionError("there is nothing to attack")

    assert accuracies(net, (x, wrong), attack) == (0, 0)


# Interruptions


def strip(history):
    """Without the seconds."""
    return [asdict(replace(log, seconds=0.0)) for log in history]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


CASES = {
    "pgd-at": {"milestones": (0.5,), "momentum": 0.9},
    "peeraid": {"swa_start": 0.5, "milestones": (2,)},
}


@pytest.fixture(scope="module")
def uninterrupted(train):
    return {name: train(name, epochs=4, augment=noisy, **options)
            for name, options in CASES.items()}


def noisy(x):
    return (x + 0.01 * torch.randn_like(x)).clamp(0, 1)


@pytest.mark.parametrize("name", CASES)
@given(stops=st.lists(st.integers(0, 11), min_size=1, max_size=3))
@settings(max_examples=8)
def test_a_run_that_is_interrupted_and_resumed_ends_with_the_same_bits(
    train, stop_after, make_keeper, uninterrupted, name, stops
):
    history, nets, whole = uninterrupted[name]
    keeper = make_keeper()
    for steps in (*stops, 100):  # steps taken until the next Ctrl-C; 12 finish the run
        try:
            again, resumed, _ = train(name, epochs=4, augment=noisy, keeper=keeper,
                                      watcher=stop_after(steps), **CASES[name])
        except KeyboardInterrupt:
            torch.manual_seed(steps)  # another process has other random numbers
    assert strip(again) == strip(history)
    assert all(equal(net.state_dict(), resumed[k].state_dict()) for k, net in nets.items())
    assert keeper.epochs == whole.epochs
    for checkpoint, (_, weights) in whole.networks.items():
        assert equal(weights, keeper.networks[checkpoint][1]), checkpoint


def test_a_finished_run_has_nothing_left_to_do(train):
    history, _, keeper = train(epochs=2)
    watcher = Steps()
    again, _, _ = train(epochs=2, keeper=keeper, watcher=watcher)
    assert again == history
    assert watcher.steps == watcher.epochs == []


def test_the_seed_decides_and_nothing_else_does(train):
    weights = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        _, nets, _ = train("pgd-at", seed=seed)
        weights.append(nets["student"].state_dict())
    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


def test_the_callers_random_numbers_are_not_disturbed(train):
    before = torch.get_rng_state()
    train("peeraid", swa_start=0.5, augment=noisy)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TrainingFailed):
        train(Plain(nan_at=0))
    assert torch.equal(torch.get_rng_state(), before)


# Failures


@pytest.mark.parametrize("step", [0, 3, 5, 8])
def test_a_loss_that_is_no_number_stops_the_training(train, make_keeper, step):
    keeper = make_keeper()
    with pytest.raises(TrainingFailed) as failure:
        train(Plain(nan_at=step), keeper=keeper)
    epoch, in_epoch = divmod(step, 3)
    assert f"in epoch {epoch}, step {in_epoch} ({{'total': 'nan'" in str(failure.value)
    assert "\n" not in str(failure.value)
    state = keeper.load_state()
    if epoch == 0:
        assert "no epoch was finished" in str(failure.value)
        assert state is None and not keeper.networks
        return
    assert f"the state after epoch {epoch - 1} is kept" in str(failure.value)
    _, nets, _ = train(Plain(), epochs=epoch)  # the good epochs alone
    assert state["epoch"] == epoch
    assert equal(state["nets"]["student"], nets["student"].state_dict())


def test_nan_is_noticed_in_an_epoch_whose_last_batch_is_left_out(train):
    """17 images in batches of 8 are two steps and one image that batch-norm cannot use."""
    with pytest.raises(TrainingFailed, match="epoch 0, step 1"):
        train(Plain(nan_at=1), n=17)


@pytest.mark.parametrize(("n", "steps"), [(16, 2), (17, 2), (18, 3), (2, 1), (1, 1)])
def test_a_last_batch_of_one_image_is_left_out(train, n, steps):
    watcher = Steps()
    history, nets, _ = train(Plain(), n=n, epochs=2, select="last", watcher=watcher,
                             lr_per_iteration=True, milestones=(1,))
    assert watcher.steps == [(e, s + 1, steps) for e in range(2) for s in range(steps)]
    assert watcher.epochs == history
    assert int(nets["student"][1].num_batches_tracked) == 2 * steps
    assert history[0].lr == pytest.approx(0.01)  # the last step of an epoch has the next one's


# Networks that are given


@pytest.mark.parametrize("name", ["ard", "rslad", "adaad"])
def test_the_teacher_stays_as_it_was(train, make_net, name):
    nets = {"student": make_net(0), "teacher": make_net(1)}
    before = {k: v.clone() for k, v in nets["teacher"].state_dict().items()}
    student = {k: v.clone() for k, v in nets["student"].state_dict().items()}
    train(name, nets=nets, swa_start=1)
    assert equal(before, nets["teacher"].state_dict())
    assert not any(module.training for module in nets["teacher"].modules())
    assert all(p.grad is None for p in nets["teacher"].parameters())
    assert not equal(student, nets["student"].state_dict())


def test_the_state_holds_nothing_of_the_teacher(train):
    keeper = train("rslad")[2]
    assert keeper.load_state()["nets"].keys() == {"student"}
    assert "teacher" not in keeper.networks


def test_an_average_from_the_first_epoch_of_one_is_that_network(train):
    _, nets, keeper = train(epochs=1, swa_start=0, select="last")
    average = keeper.networks["swa-last"][1]
    for name, p in nets["student"].named_parameters():
        assert torch.equal(average[name], p)
    statistics = [k for k in average if "running" in k]
    assert statistics and not any(
        torch.equal(average[k], nets["student"].state_dict()[k]) for k in statistics
    )
