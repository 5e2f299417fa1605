"""Every defense's attack against a second transcription, step by step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.defenses import Moment

from .networks import (
    EPS,
    assert_bit_identical,
    assert_buffers_close,
    inputs_of,
    setup,
    snapshot,
)
from .transcribed_attacks import (
    ADVERSARIAL,
    CRAFTS,
    label_objective,
    normal_start,
    sign_pgd,
    trades_objective,
)

# (name, options for make_defense, start in words, mode). For uniform starts see further down.
CRAFT_CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("pgd-at", dict(start="none"), "none", "eval"),
    ("pgd-at", dict(start="none", craft_mode="train"), "none", "train"),
    ("ard", dict(start="none"), "none", "train"),
    ("ard", dict(start="none", craft_mode="eval"), "none", "eval"),
    ("trades", {}, "normal", "eval"),
    ("trades", dict(steps=1), "normal", "eval"),
    ("trades", dict(clamp_start=True), "clamped", "eval"),
    ("rslad", {}, "normal", "eval"),
    ("rslad", dict(start="none", craft_mode="train"), "none", "train"),
    ("adaad", {}, "normal", "eval"),
    ("adaad", dict(craft_mode="train"), "normal", "train"),
    ("adaad", dict(reduction="batchmean", alpha=0.5), "normal", "eval"),
    ("peeraid", {}, "normal", "eval"),
    ("peeraid", dict(temperature=2.0, peer_temperature=3.0), "normal", "eval"),
    ("peeraid", dict(craft_mode="train"), "normal", "train"),
    ("peeraid", dict(steps=3, step_size=1 / 255), "normal", "eval"),
    ("mart", {}, "normal", "eval"),
    ("mart", dict(beta=1.0, start="none", craft_mode="train"), "none", "train"),
    ("iad", dict(start="none"), "none", "train"),
    ("iad", dict(start="none", now=Moment(0, 200)), "none", "train"),
    ("iad-ii", dict(start="none"), "none", "train"),
    ("iad-ii", dict(start="none", now=Moment(0, 200)), "none", "train"),
    ("akd2", dict(start="none"), "none", "train"),
    ("akd2", dict(start="none", craft_mode="eval"), "none", "eval"),
    ("mtard", {}, "normal", "eval"),
    ("lbgat", {}, "normal", "eval"),
    ("lbgat", dict(beta=0.0), "normal", "eval"),
    ("hat", {}, "normal", "eval"),
    ("hat", dict(overshoot=4.0), "normal", "eval"),
    ("adr", dict(start="none"), "none", "train"),
    ("adr", dict(start="none", craft_mode="eval", now=Moment(0, 200)), "none", "eval"),
    ("adr", dict(start="none", trust_start=0.3, now=Moment(7, 20, 1, 2)), "none", "train"),
    ("igdm", {}, "normal", "eval"),
    ("igdm", dict(now=Moment(0, 200), alpha=10.0), "normal", "eval"),
    ("saad", {}, "normal", "eval"),
    ("saad", dict(correction=0.0), "normal", "eval"),
    ("saad", dict(correction=20.0, steps=4), "normal", "eval"),
    ("ikl", dict(ramp=False), "normal", "eval"),
    ("ikl", dict(ramp=False, alpha=1.0, beta=7.0, steps=2), "normal", "eval"),
]
BOX_OF_START = {"pgd-at": True, "ard": False, "iad": False, "iad-ii": False}  # 2.1, 2.3, 2.8


def assert_valid(x_adv: Tensor, x: Tensor, eps: float = EPS) -> None:
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert not x_adv.requires_grad and x_adv.grad_fn is None
    assert float((x_adv - x).abs().max()) <= eps + 1e-12
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1


def assert_uniform(start: Tensor, x: Tensor) -> None:
    assert float((start - x).abs().max()) <= EPS + 1e-12
    noise = (start - x)[(x > EPS) & (x < 1 - EPS)].sort().values
    empirical = torch.linspace(0, 1, len(noise), dtype=torch.float64)
    assert float((empirical - (noise / EPS + 1) / 2).abs().max()) < 0.08  # Kolmogorov-Smirnov


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(("name", "options", "start", "mode"), CRAFT_CASES)
def test_craft_maximizes_what_it_should(
    name: str, options: dict[str, Any], start: str, mode: str, classes: int
) -> None:
    defense, nets, (x, _, y) = setup(name, classes, **options)
    mine, modes = copy.deepcopy(nets), {key: net.training for key, net in nets.items()}

    torch.manual_seed(7)
    got = defense.craft(nets, x, y)
    torch.manual_seed(7)
    x_start = x if start == "none" else normal_start(x)
    x_start = x_start.clamp(0, 1) if start == "clamped" else x_start
    others = {key: value for key, value in options.items() if key != "start"}
    if name == "ikl":  # 5 steps of eps / 2, section 2.14
        others = dict(steps=5, step_size=EPS / 2) | others
    want = sign_pgd(CRAFTS[name], mine, x, y, x_start, mode, **others)

    assert_valid(got, x)
    assert float((got - x).abs().max()) > 0
    assert float((got - want).abs().max()) <= 1e-9
    for key in nets:
        assert_buffers_close(nets[key], mine[key], key)  # train mode updates, eval mode does not
        assert nets[key].training == modes[key]


@pytest.mark.parametrize("name", ["pgd-at", "ard", "iad", "iad-ii", "akd2", "adr"])
def test_craft_from_a_uniform_start(name: str) -> None:
    """The default start of section 5.1, seen as the first input of the student."""
    defense, nets, (x, _, y) = setup(name)
    mine = copy.deepcopy(nets)
    with inputs_of(nets["student"]) as seen:
        got = defense.craft(nets, x, y)

    x_start = seen[0]
    assert len(seen) in (10, 11)  # the last iterate needs no forward
    assert_uniform(x_start, x)
    if name in BOX_OF_START:
        outside = float(torch.maximum(-x_start, x_start - 1).max())
        assert (outside > 0) != BOX_OF_START[name]
    mode = "eval" if name == "pgd-at" else "train"
    assert_valid(got, x)
    assert float((got - sign_pgd(CRAFTS[name], mine, x, y, x_start, mode)).abs().max()) <= 1e-9


@pytest.mark.parametrize("classes", [10, 100])
def test_cat_attacks_each_of_its_networks(classes: int) -> None:
    """Sections 2.10 and 5.1: KL to itself from a normal start, CE from a uniform one; eval."""
    defense, nets, (x, _, y) = setup("cat", classes)
    mine = copy.deepcopy(nets)
    with inputs_of(nets["student"]) as of_student, inputs_of(nets["peer"]) as of_peer:
        got = defense.craft(nets, x, y)
    starts = [next(z for z in seen if not z.equal(x)) for seen in (of_student, of_peer)]
    assert 5e-4 < float((starts[0] - x).std()) < 2e-3
    assert_uniform(starts[1], x)

    for half, key, objective, start in zip(
        got.chunk(2), ("student", "peer"), (trades_objective, label_objective), starts, strict=True
    ):
        want = sign_pgd(objective, {"student": mine[key]}, x, y, start, "eval")
        assert_valid(half, x)
        assert float((half - want).abs().max()) <= 1e-9
        assert_buffers_close(nets[key], mine[key], key)
        assert nets[key].training


@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_the_ball_of_ikl_grows(epoch: int) -> None:
    """Section 2.14: eps in proportion to the epoch, 5 steps of half of it; the last has all."""
    defense, nets, (x, _, y) = setup("ikl", now=Moment(epoch, 10, 1, 2))
    mine, eps = copy.deepcopy(nets), EPS * (epoch + 1) / 10
    torch.manual_seed(7)
    got = defense.craft(nets, x, y)
    torch.manual_seed(7)
    want = sign_pgd(
        CRAFTS["ikl"], mine, x, y, normal_start(x), "eval", steps=5, step_size=eps / 2, eps=eps
    )
    assert_valid(got, x, eps)
    assert float((got - x).abs().max()) > 0.9 * eps
    assert float((got - want).abs().max()) <= 1e-9


def test_saad_sees_a_linear_teacher_as_it_is() -> None:
    """Section 2.17: a teacher that is linear has no second order, so the target is T(x~)."""
    defense, nets, (x, _, y) = setup("saad", correction=1.0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(108, 10)).double().eval().requires_grad_(False)
    linear[1].weight[1:] = 0  # the only logit that moves is the label's
    nets["teacher"], label = linear, torch.zeros_like(y)
    mine = copy.deepcopy(nets)
    torch.manual_seed(7)
    got = defense.craft(nets, x, label)
    torch.manual_seed(7)
    want = sign_pgd(CRAFTS["igdm"], mine, x, label, normal_start(x), "eval")
    assert float((got - want).abs().max()) <= 1e-9


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_craft_leaves_no_trace_on_the_networks(name: str, mode: str) -> None:
    """Sections 5.1 and 5.4: modes of every module, requires_grad and .grad as before."""
    defense, nets, (x, _, y) = setup(name, craft_mode=mode)
    attacked = ("student", "peer") if name == "cat" else ("student",)
    batch = x.clone(), y.clone()
    for key in defense.trained:
        net = nets[key]
        net.get_submodule("bn2").eval()  # a layer kept in another mode than the rest
        net.get_parameter("conv1.weight").requires_grad_(False)
        net.get_parameter("head.bias").grad = torch.randn_like(net.get_parameter("head.bias"))

    def state(net: nn.Module) -> tuple[Any, ...]:
        return (
            [m.training for m in net.modules()],
            [p.requires_grad for p in net.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        )

    before = {key: state(net) for key, net in nets.items()}
    values = {key: snapshot(net) for key, net in nets.items()}
    x_adv = defense.craft(nets, x, y)

    assert_valid(x_adv, torch.cat([x] * len(attacked)))
    assert torch.equal(x, batch[0]) and torch.equal(y, batch[1]) and not x.requires_grad
    for key, net in nets.items():
        assert state(net) == before[key], key
        if key in attacked and mode == "train":
            for name_, param in net.named_parameters():
                assert torch.equal(param, values[key][name_])
        else:
            assert_bit_identical(net, values[key])


def test_standard_training_crafts_nothing() -> None:
    defense, nets, (x, _, y) = setup("standard")
    before = snapshot(nets["student"])
    assert torch.equal(defense.craft(nets, x, y), x)
    assert_bit_identical(nets["student"], before)
