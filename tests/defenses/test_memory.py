"""What defenses remember from step to step, against a second transcription."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from robench.defenses import make_defense

from .networks import (
    NOW,
    THREAT,
    Net,
    Nets,
    assert_close,
    make_batch,
    make_images,
    make_memory,
    make_nets,
    setup,
    snapshot,
)
from .transcribed_losses import LOSSES, ikl_loss, mtard_terms


def interrupted(defense: Any, nets: Nets, classes: int) -> Nets:
    """The same networks with a memory that went through its state_dict."""
    fresh = make_memory(defense, nets, classes)
    for name, module in fresh.items():
        module.load_state_dict(copy.deepcopy(nets[name].state_dict()))
    return nets | fresh


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_which_defenses_remember(name: str) -> None:
    defense = make_defense(name, THREAT)
    nets: Nets = {key: Net(10) for key in (*defense.trained, *defense.given)}
    wanted = {"mtard": {"balance"}, "adr": {"ema"}, "ikl": {"classes"}}
    assert set(defense.memory(nets, 10)) == wanted.get(name, set())


# ------------------------------------------------------------------ MTARD


@pytest.mark.parametrize("options", [{}, dict(rate=0.5, weight=1.0)])
@pytest.mark.parametrize("classes", [10, 100])
def test_mtard_balances_its_teachers(options: dict[str, Any], classes: int) -> None:
    """Section 2.11: w_n += -rate (w_n - r_n / (r_a + r_n)), r = loss / very first loss."""
    defense = make_defense("mtard", THREAT, **options)
    rate, weight = options.get("rate", 0.025), options.get("weight", 0.1)
    nets, share = make_nets(defense, classes), 0.5
    first: tuple[Tensor, Tensor] | None = None
    for step, lr_share in enumerate((1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 1.0)):
        now = defense.at(NOW._replace(step=step, lr_share=lr_share))
        x, x_adv, y = make_batch(classes, size=4 + 3 * step)
        with torch.no_grad():
            robust, natural = mtard_terms(copy.deepcopy(nets), x, x_adv)
        first = first or (robust, natural)
        losses = now.loss(nets, x, x_adv, y)
        want = weight * classes * ((1 - share) * robust + share * natural)
        assert_close(losses.total, want, f"total of step {step}")
        with torch.no_grad():
            now.after_step(nets, x, y, losses)
        r_a, r_n = robust / first[0], natural / first[1]
        share = share - rate * lr_share * (share - float(r_n / (r_a + r_n)))
        nets = interrupted(defense, nets, classes)
    assert abs(share - 0.5) > 1e-4


# ------------------------------------------------------------------ ADR


def test_adr_begins_with_a_copy_of_the_student() -> None:
    defense = make_defense("adr", THREAT)
    nets: Nets = {"student": Net(10).train()}
    average = defense.memory(nets, 10)["ema"]
    student = snapshot(nets["student"])
    assert average.state_dict().keys() == student.keys()
    assert all(value.equal(student[key]) for key, value in average.state_dict().items())
    own = {value.data_ptr() for value in average.state_dict().values()}
    assert own.isdisjoint(v.data_ptr() for v in nets["student"].state_dict().values())


@pytest.mark.parametrize(("options", "decay"), [({}, 0.995), (dict(ema_decay=0.9), 0.9)])
def test_adr_follows_the_student(options: dict[str, Any], decay: float) -> None:
    """Section 2.16, EMA of the whole state: old decay + new (1 - decay), integers copied."""
    defense, nets, (x, x_adv, y) = setup("adr", **options)
    mine = snapshot(nets["ema"])
    for _ in range(3):
        nets["student"].load_state_dict(Net(10).state_dict())
        losses = defense.loss(nets, x, x_adv, y)  # moves the statistics
        student = snapshot(nets["student"])
        with torch.no_grad():
            defense.after_step(nets, x, y, losses)
        for key, new in student.items():
            floating = new.is_floating_point()
            mine[key] = decay * mine[key] + (1 - decay) * new if floating else new
            assert torch.equal(nets["student"].state_dict()[key], new)
        nets = interrupted(defense, nets, 10)
        for key, value in nets["ema"].state_dict().items():
            assert_close(value.double(), mine[key].double(), key)


# ------------------------------------------------------------------ IKL


@pytest.mark.parametrize(
    ("name", "options"), [("ikl", {}), ("ikl", dict(temperature=2.0)), ("ikl+awp", {})]
)
def test_ikl_weighs_by_the_class_means_of_the_epoch_before(
    name: str, options: dict[str, Any]
) -> None:
    """Section 2.14: w_y is the mean softmax at T of the images of class y; first 1/C."""
    classes, temperature = 10, options.get("temperature", 4.0)
    defense = make_defense(name, THREAT, **options)
    nets = make_nets(defense, classes)
    means: Tensor | None = None
    for epoch in range(3):
        sums, counts = torch.zeros(classes, classes).double(), torch.zeros(classes, 1).double()
        for step, size in enumerate((10, 24, 7)):
            now = defense.at(NOW._replace(epoch=epoch, step=step, steps=3))
            x, x_adv = make_images(size)
            y = torch.arange(size) * 7 % classes if step == 0 else torch.randint(classes, (size,))
            mine = copy.deepcopy(nets)
            losses = now.loss(nets, x, x_adv, y)
            want = ikl_loss(mine, x, x_adv, y, class_means=means)
            assert_close(losses.total, want, f"total of epoch {epoch}, step {step}")
            soft = torch.softmax(mine["student"](x).detach() / temperature, 1)
            for row, label in zip(soft, y, strict=True):
                sums[label] += row
                counts[label] += 1
            with torch.no_grad():
                now.after_step(nets, x, y, losses)
            nets = interrupted(defense, nets, classes)
        with torch.no_grad():
            now.after_epoch(nets)
        means = sums / counts
        nets = interrupted(defense, nets, classes)


def test_ikl_stays_finite_where_an_epoch_has_not_seen_a_class() -> None:
    defense, nets, (x, x_adv, y) = setup("ikl")
    with torch.no_grad():
        defense.after_step(nets, x, y % 3, defense.loss(nets, x, x_adv, y % 3))
        defense.after_epoch(nets)
    assert defense.loss(nets, x, x_adv, y).total.isfinite()
