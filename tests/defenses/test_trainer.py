"""The training loop: its schedule, what it keeps, and that an interruption changes nothing."""

import os
import signal
from dataclasses import asdict, dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.attacks.threat import ThreatModel
from robench.defenses import Defense, Losses, Remembered, make_defense
from robench.defenses.config import TrainConfig
from robench.defenses.trainer import TrainingFailed, Watcher, accuracies, fit
from robench.errors import UsageError

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
        self.begun, self.steps, self.means, self.epochs, self.warnings = [], [], [], [], []
        self.ended = 0

    def begin(self, history):
        self.begun.append(list(history))

    def losses(self, means):
        self.means.append(means)

    def warn(self, text):
        self.warnings.append(text)

    def end(self):
        self.ended += 1

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


def test_one_cycle_is_torchs(train, monkeypatch):
    rates = LearningRates(monkeypatch)
    train(epochs=4, lr=0.2, schedule="one-cycle", pct_start=0.4)
    seen = list(rates.seen)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12,
                                                 pct_start=0.4)
    for lr in seen:
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if torchs.last_epoch < 11:
            torchs.step()


def test_clipping_bounds_the_length_of_each_networks_gradient(train, make_net):
    options = {"epochs": 1, "n": 8, "momentum": 0, "weight_decay": 0, "lr": 2.0, "clip": 1e-3}
    _, nets, _ = train("peeraid", select="last", **options)
    for seed, name in enumerate(("student", "peer")):  # one step from its initial weights
        moved = [(p - q).flatten() for p, q in zip(nets[name].parameters(),
                                                   make_net(seed).parameters(), strict=True)]
        assert torch.cat(moved).norm().item() == pytest.approx(2e-3, rel=1e-3)


def test_a_loose_clip_changes_nothing(train):
    plain, clipped = train()[1], train(clip=1e6)[1]
    assert equal(plain["student"].state_dict(), clipped["student"].state_dict())


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
    for name, options in (("swa", {"swa_start": 1}), ("ema", {"ema": 0.9, "ema_start": 1})):
        Scripted(monkeypatch, [0.5, 0.1, 0.3, 0.2, 0.2])
        history, _, keeper = train(epochs=3, **options)
        assert keeper.epochs == {"best": 0, name: 1, "last": 2, f"{name}-last": 2}
        assert [log.averages for log in history] == [{}, {name: (0.9, 0.3)}, {name: (0.9, 0.2)}]


def test_both_averages_at_once(train, monkeypatch):
    # Epoch 0 measures the student and ema; 1 and 2 the student, swa and ema.
    Scripted(monkeypatch, [0.5, 0.1, 0.3, 0.6, 0.2, 0.4, 0.5, 0.1])
    history, _, keeper = train(epochs=3, swa_start=1, ema=0.9)
    assert [log.averages for log in history] == [
        {"ema": (0.9, 0.1)},
        {"swa": (0.9, 0.6), "ema": (0.9, 0.2)},
        {"swa": (0.9, 0.5), "ema": (0.9, 0.1)},
    ]
    assert keeper.epochs == {"best": 0, "swa": 1, "ema": 1,
                             "last": 2, "swa-last": 2, "ema-last": 2}


@pytest.mark.parametrize("start", [0, 1])
def test_the_moving_average_follows_every_step(train, make_net, start):
    seen = []

    class Follow(Watcher):
        def step(self, epoch, step, steps):
            if epoch >= start:
                seen.append({k: v.clone() for k, v in nets["student"].state_dict().items()})

    nets = {"student": make_net()}
    _, _, keeper = train(Plain(), nets=nets, epochs=2, select="last", ema=0.8, ema_start=start,
                         watcher=Follow())
    average = keeper.networks["ema-last"][1]
    for name, value in average.items():
        expected = seen[0][name]
        for weights in seen[1:]:
            expected = (0.8 * expected + 0.2 * weights[name] if value.is_floating_point()
                        else weights[name])
        torch.testing.assert_close(value, expected)
    assert len(seen) == 3 * (2 - start)


def test_a_robust_accuracy_of_zero_is_a_best_too(train, monkeypatch):
    Scripted(monkeypatch, [0.0, 0.0], clean=[0.0, 0.0])
    assert train(epochs=2)[2].epochs == {"best": 1, "last": 1}


def test_the_peer_is_the_partner_of_the_best_student(train, monkeypatch):
    Scripted(monkeypatch, [0.1, 0.4, 0.3])
    assert train("peeraid", epochs=3)[2].epochs == {"best": 1, "peer": 1, "last": 2}


def test_select_last_keeps_the_last_networks_only(train):
    for options in ({}, {"swa_start": 1}, {"swa_start": 1, "ema": 0.5}):
        history, _, keeper = train("peeraid", epochs=3, select="last", **options)
        averages = {"swa_start": "swa-last", "ema": "ema-last"}
        assert keeper.epochs == {"last": 2, "peer": 2, **{averages[k]: 2 for k in options}}
        assert all(log.robust is None and log.clean is None for log in history)
        config = TrainConfig(epochs=3, select="last", **options)
        assert set(config.ranked) == keeper.epochs.keys() - {"peer"}


def test_what_is_kept_is_what_the_configuration_names(train):
    for options in ({}, {"swa_start": 0.5}, {"ema": 0.5}, {"swa_start": 0, "ema": 0.5},
                    {"swa_start": 1, "select": "last"}):
        kept = train(**options)[2].epochs
        config = TrainConfig(epochs=3, **options)
        assert {*config.ranked, *config.unranked} == kept.keys()


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


@dataclass(frozen=True, kw_only=True)
class Remembering(Plain):
    """Weights its loss by what it saw before, in a memory that every step and epoch changes."""

    def memory(self, nets, classes):
        return {"seen": Remembered(loss=torch.ones(()), epochs=torch.zeros(()))}

    def loss(self, nets, x, x_adv, y):
        losses, seen = super().loss(nets, x, x_adv, y), nets["seen"]
        ce = losses.parts["ce"]
        return Losses({"ce": ce / (seen.loss + seen.epochs)}, {"ce": ce.detach()})

    def after_step(self, nets, x, y, losses):
        nets["seen"].loss.lerp_(losses.seen["ce"], 0.3)

    def after_epoch(self, nets):
        nets["seen"].epochs += 1


CASES = {
    "milestones": ("pgd-at", {"milestones": (0.5,), "momentum": 0.9}),
    "two networks and swa": ("peeraid", {"swa_start": 0.5, "milestones": (2,)}),
    "ema": ("pgd-at", {"ema": 0.9, "ema_start": 1, "warmup": 2, "schedule": "cosine"}),
    "memory": (Remembering(), {"swa_start": 1, "ema": 0.7, "schedule": "one-cycle"}),
    "adamw": ("trades", {"optimizer": "adamw", "lr": 1e-3, "clip": 0.5, "select_every": 2}),
}


@pytest.fixture(scope="module")
def uninterrupted(train):
    return {name: train(defense, epochs=4, augment=noisy, **options)
            for name, (defense, options) in CASES.items()}


def noisy(x):
    return (x + 0.01 * torch.randn_like(x)).clamp(0, 1)


class StopInEpoch(Watcher):
    """Presses Ctrl-C when an epoch has been kept."""

    def epoch(self, log):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", CASES)
@given(stops=st.lists(st.integers(0, 11) | st.none(), min_size=1, max_size=5))
@settings(max_examples=6)
def test_a_run_that_is_interrupted_and_resumed_ends_with_the_same_bits(
    train, stop_after, make_keeper, uninterrupted, name, stops
):
    history, nets, whole = uninterrupted[name]
    (defense, options), keeper = CASES[name], make_keeper()
    again = None
    for steps in (*stops, 100):  # steps taken until the next Ctrl-C; 12 finish the run
        watcher = StopInEpoch() if steps is None else stop_after(steps)
        try:
            again, resumed, _ = train(defense, epochs=4, augment=noisy, keeper=keeper,
                                      watcher=watcher, **options)
        except KeyboardInterrupt:
            torch.manual_seed(steps or 99)  # another process has other random numbers
    assert strip(again) == strip(history)
    assert all(equal(net.state_dict(), resumed[k].state_dict()) for k, net in nets.items())
    assert keeper.epochs == whole.epochs
    for checkpoint, (_, weights) in whole.networks.items():
        assert equal(weights, keeper.networks[checkpoint][1]), checkpoint


class Signal(Watcher):
    """Sends a signal after so many steps, and counts them."""

    def __init__(self, kind=None, after=0):
        self.kind, self.after, self.steps = kind, after, 0

    def step(self, epoch, step, steps):
        self.steps += 1
        if self.steps == self.after:
            os.kill(os.getpid(), self.kind)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 3, 5, 12])  # of 12; an epoch has 3
def test_a_signal_ends_a_training_after_the_step_it_is_at_and_nothing_is_lost(
    train, make_keeper, uninterrupted, name, steps
):
    history, nets, _ = uninterrupted[name]
    (defense, options), keeper = CASES[name], make_keeper()
    kind = signal.SIGTERM if steps == 5 else signal.SIGINT
    # Also where SIGINT is ignored, as it is for what a shell starts in the background.
    before = signal.signal(kind, signal.default_int_handler)
    try:
        first = Signal(kind, steps)
        with pytest.raises(KeyboardInterrupt):
            train(defense, epochs=4, augment=noisy, keeper=keeper, watcher=first, **options)
    finally:
        signal.signal(kind, before)
    torch.manual_seed(99)
    second = Signal()
    again, resumed, _ = train(defense, epochs=4, augment=noisy, keeper=keeper, watcher=second,
                              **options)
    assert (first.steps, second.steps) == (steps, 12 - steps)
    assert strip(again) == strip(history)
    assert all(equal(net.state_dict(), resumed[k].state_dict()) for k, net in nets.items())


def test_a_state_of_another_version_is_refused(train, make_keeper):
    keeper = make_keeper()
    train(epochs=1, keeper=keeper)
    keeper.save_state({**keeper.load_state(), "epoch": 1})
    with pytest.raises(UsageError, match="delete its state.pt"):
        train(epochs=2, keeper=keeper)


def test_a_finished_run_has_nothing_left_to_do(train):
    history, _, keeper = train(epochs=2)
    watcher = Steps()
    again, _, _ = train(epochs=2, keeper=keeper, watcher=watcher)
    assert again == history
    assert watcher.steps == watcher.epochs == []
    assert (watcher.begun, watcher.ended) == ([history], 1)


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
    assert len(state["history"]) == epoch
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


# What a watcher is told


@pytest.mark.parametrize("every", [1, 2, 3, 50])
def test_losses_on_the_way(train, monkeypatch, every):
    monkeypatch.setattr("robench.defenses.trainer.CHECK_EVERY", every)
    watcher = Steps()
    history, _, _ = train(n=40, epochs=2, watcher=watcher)  # five steps
    sizes = [min(every, 5 - first) for first in range(0, 5, every)]
    assert len(watcher.means) == 2 * len(sizes)
    for log, means in zip(history, (watcher.means[: len(sizes)], watcher.means[len(sizes) :]),
                          strict=True):
        for name, value in log.losses.items():
            whole = sum(m[name] * n for m, n in zip(means, sizes, strict=True)) / 5
            assert value == pytest.approx(whole, rel=1e-5)
    with pytest.raises(TrainingFailed, match="epoch 0, step 3 "):
        train(Plain(nan_at=3), n=40)


def test_an_end_follows_every_beginning(train):
    watcher = Steps()
    with pytest.raises(TrainingFailed):
        train(Plain(nan_at=4), watcher=watcher)
    assert (watcher.begun, watcher.ended, len(watcher.epochs)) == ([[]], 1, 1)


@pytest.mark.parametrize(("n", "images"), [(16, 16), (17, 16), (18, 18)])
def test_images_are_counted(train, n, images):
    (log,), _, _ = train(n=n, epochs=1)
    assert log.images == images
    assert log.images_per_second == images / log.seconds


def test_a_loss_that_does_not_move_is_reported_once(train, make_keeper):
    watcher, keeper = Steps(), make_keeper()
    options = {"select": "last", "keeper": keeper, "watcher": watcher, "lr": 1e-9}
    train(epochs=4, **options)
    assert watcher.warnings == []
    for epochs in (6, 7):
        train(epochs=epochs, **options)
        (text,) = watcher.warnings
    assert "the loss has not fallen by more than 1% in 5 epochs" in text and "\n" not in text


def test_a_collapse_is_reported_once(train, monkeypatch):
    Scripted(monkeypatch, [0.3, 0.4, 0.0, 0.0], clean=[0.5, 0.6, 0.7, 0.8])
    watcher = Steps()
    train(epochs=4, watcher=watcher)
    (text,) = watcher.warnings
    assert "catastrophic overfitting in epoch 2: robust accuracy fell to 0.0%" in text


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


def test_the_watcher_is_ended_after_an_error_before_the_first_step(train, make_keeper, monkeypatch):
    """Loggers are open by then: a damaged state, say, must not leave them so."""
    keeper, steps = make_keeper(), Steps()

    def damaged():
        raise OSError("damaged")

    monkeypatch.setattr(keeper, "load_state", damaged)
    with pytest.raises(OSError, match="damaged"):
        train(keeper=keeper, watcher=steps)
    assert steps.ended == 1 and not steps.begun
