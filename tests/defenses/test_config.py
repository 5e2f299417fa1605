"""The configuration of a training: its curves, its averages, its optimizers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from robench.benchmark.recipe import settings_for, train_config
from robench.defenses.config import TrainConfig, make_optimizer

# The curve of the learning rate


def curve(config):
    return [config.lr_at(epoch) for epoch in range(config.epochs)]


def steps_of(config, steps):
    """The learning rate of every step."""
    return [config.lr_of(epoch, step, steps)
            for epoch in range(config.epochs) for step in range(steps)]


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


def test_a_step_has_the_rate_of_its_epoch_or_of_its_end():
    config = TrainConfig(epochs=2, lr=1.0, milestones=(1,))
    assert steps_of(config, 3) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1])
    config = config.model_copy(update={"lr_per_iteration": True})
    assert steps_of(config, 3) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_ard_as_released_and_as_intended(dataset):
    """The released decay starts from the initial rate each time, so the second one is lost."""
    settings = settings_for("as-released", "ard", dataset)
    released = curve(train_config(settings, {}))
    assert released == pytest.approx([0.1] * 100 + [0.01] * 100)
    intended = curve(train_config(settings, {"milestones": [100, 150]}))
    assert intended == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50)


@given(epochs=st.integers(1, 60), lr=st.floats(1e-4, 1))
def test_cosine(epochs, lr):
    config = TrainConfig(epochs=epochs, lr=lr, schedule="cosine", milestones=(0.5,))
    rates = curve(config)
    assert rates == pytest.approx([lr * math.cos(math.pi * e / epochs / 2) ** 2
                                   for e in range(epochs)])
    assert config.lr_at(epochs) == pytest.approx(0, abs=1e-12)


@given(epochs=st.integers(1, 6), steps=st.integers(2, 9), share=st.sampled_from([0.1, 0.25, 0.3,
                                                                              0.55, 0.9]))
def test_one_cycle_is_torchs(epochs, steps, share):
    total = epochs * steps
    if share * total == 1:
        return  # torch divides by zero
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=total,
                                                 pct_start=share)
    expected = [torchs.get_last_lr()[0]]
    for _ in range(total - 1):
        optimizer.step()
        torchs.step()
        expected += torchs.get_last_lr()
    config = TrainConfig(epochs=epochs, lr=0.2, schedule="one-cycle", pct_start=share)
    assert steps_of(config, steps) == pytest.approx(expected, rel=1e-9)


def test_warm_up_is_a_ramp_over_whatever_follows():
    config = TrainConfig(epochs=4, lr=1.0, warmup=2, milestones=(3,))
    assert steps_of(config, 2) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1])
    half = TrainConfig(epochs=4, lr=1.0, warmup=0.5, milestones=(3,))
    assert steps_of(half, 2) == steps_of(config, 2)
    cosine = TrainConfig(epochs=4, lr=1.0, warmup=1, schedule="cosine", lr_per_iteration=True)
    plain = cosine.model_copy(update={"warmup": 0})
    assert steps_of(cosine, 2)[0] == pytest.approx(steps_of(plain, 2)[0] / 2)
    assert steps_of(cosine, 2)[1:] == steps_of(plain, 2)[1:]


# Averages and selection


@pytest.mark.parametrize("point", [0, 1, 3, 0.25, 0.5])
def test_averaging_starts_at_its_epoch(point):
    swa = TrainConfig(epochs=4, swa_start=point)
    ema = TrainConfig(epochs=4, ema=0.9, ema_start=point)
    first = swa.moment(point)
    assert [swa.averages(e) for e in range(4)] == [e >= first for e in range(4)]
    assert [ema.averages(e, "ema") for e in range(4)] == [e >= first for e in range(4)]
    assert not any(ema.averages(e) or swa.averages(e, "ema") for e in range(4))


def test_the_names_of_the_checkpoints():
    config = TrainConfig(epochs=4, swa_start=0.5, ema=0.9)
    assert config.starts == {"swa": 2, "ema": 0}
    assert config.ranked == ("best", "swa", "ema")
    assert config.unranked == ("last", "swa-last", "ema-last")
    last = config.model_copy(update={"select": "last"})
    assert (last.ranked, last.unranked) == (("last", "swa-last", "ema-last"), ())
    assert TrainConfig(epochs=4, ema_start=2).starts == {}


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_which_epochs_take_part_in_the_selection(epochs, every):
    config = TrainConfig(epochs=epochs, select_every=every, select_dense_from=3)
    measured = {epoch for epoch in range(epochs) if config.measures(epoch)}
    assert measured == {*range(0, epochs, every), *range(3, epochs), epochs - 1}


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"epochs": 1.5}, {"lr": 0}, {"lr": "fast"}, {"batch_size": 1}, {"gamma": 2},
     {"momentum": 1}, {"select": "best"}, {"validation": -1}, {"epoch": 3}, {"optimizer": "adam"},
     {"schedule": "linear"}, {"pct_start": 1}, {"warmup": -1}, {"ema": 1}, {"clip": 0},
     {"precision": "fp16"}, {"nesterov": True, "momentum": 0},
     {"nesterov": True, "optimizer": "adamw"}],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"epochs": 2, **wrong})


# Optimizers


def quadratic(config, steps=3):
    """The weight 1 after some steps on w^2 / 2, whose gradient is w."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    optimizer = make_optimizer(config, net)
    for _ in range(steps):
        optimizer.zero_grad()
        (net.weight**2 / 2).sum().backward()
        optimizer.step()
    return net.weight.item()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    w, velocity = 1.0, 0.0
    for _ in range(3):
        gradient = w + 0.1 * w
        velocity = 0.8 * velocity + gradient
        w -= 0.3 * (gradient + 0.8 * velocity if nesterov else velocity)
    config = TrainConfig(epochs=1, lr=0.3, momentum=0.8, weight_decay=0.1, nesterov=nesterov)
    assert quadratic(config) == pytest.approx(w, rel=1e-5)


def test_adamw():
    w, first, second = 1.0, 0.0, 0.0
    for t in range(1, 4):
        gradient = w
        w -= 0.3 * 0.1 * w
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        w -= 0.3 * first / (1 - 0.8**t) / (math.sqrt(second / (1 - 0.95**t)) + 1e-8)
    config = TrainConfig(epochs=1, lr=0.3, momentum=0.8, beta2=0.95, weight_decay=0.1,
                         optimizer="adamw")
    assert quadratic(config) == pytest.approx(w, rel=1e-5)
