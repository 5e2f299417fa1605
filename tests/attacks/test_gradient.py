"""Gradient attacks on a linear model, whose nearest boundary point is known in closed form."""

import pytest
import torch
from torch import nn

from robench.attacks import ThreatModel, make_attack, verify
from robench.attacks.gradient import PGD
from robench.attacks.search import Search
from robench.errors import UsageError

SHAPE = (3, 8, 8)
DUAL = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}
GAP = {"Linf": 1.0, "L2": 0.1, "L1": 0.01}  # keeps every boundary point inside [0, 1]


class Linear(nn.Module):
    """Two classes with scores +-(w x + b) / 2; a third one with a low, constant score."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        d = SHAPE[0] * SHAPE[1] * SHAPE[2]
        sign = torch.where(torch.rand(d, generator=generator) < 0.5, -1.0, 1.0)
        # Entries between 0.9 and 1 in size: in L1 one pixel is nearly as good as another.
        w = sign * (0.9 + 0.1 * torch.rand(d, generator=generator))
        self.register_buffer("w", w.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = (x.flatten(1) - 0.5) @ self.w / 2
        return torch.stack([half, -half, torch.full_like(half, -30.0)], 1)


def images_at_distance(model: Linear, norm: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Images near mid gray with labels, all at the same distance from the boundary."""
    w = model.w
    x = 0.5 + 0.05 * torch.randn(6, w.numel(), generator=torch.Generator().manual_seed(1)).to(w)
    y = torch.arange(6) % 2
    side = torch.where(y == 0, GAP[norm], -GAP[norm]).to(w)
    x = x + ((side - (x - 0.5) @ w) / (w @ w))[:, None] * w
    # |w x + b| = GAP, so the boundary is GAP / ||w||_dual away (Hoelder).
    margin = GAP[norm] / float(torch.linalg.vector_norm(w, ord=DUAL[norm]))
    return x.view(-1, *SHAPE), y, margin


ATTACKS = [
    ("fgsm", {}),
    ("pgd", {"steps": 40}),
    ("pgd", {"steps": 40, "loss": "dlr", "start": "none"}),
    ("pgd", {"steps": 20, "loss": "cw", "restarts": 2}),
    ("cw", {"steps": 40}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "options", "norm"), [
    (name, options, norm) for name, options in ATTACKS for norm in ("Linf", "L2", "L1")
    # One step spreads over 1 % of the pixels and is no longer optimal in L1.
    if (name, norm) != ("fgsm", "L1")
])
def test_budget_decides(name, options, norm, dtype):
    """A little more than the margin flips every label, a little less flips none."""
    model = Linear(dtype)
    x, y, margin = images_at_distance(model, norm)
    assert (model(x).argmax(1) == y).all()
    enough = ThreatModel(norm, margin * (1.2 if norm == "L1" else 1.05))
    x_adv = make_attack(name, enough, **options)(model, x, y)
    assert x_adv.dtype == dtype
    assert ((x_adv > 0) & (x_adv < 1)).all()  # the box was never in the way
    assert verify(model, x, x_adv, y, enough).fooled.all()
    too_little = ThreatModel(norm, margin * 0.95)
    x_adv = make_attack(name, too_little, **options)(model, x, y)
    verdict = verify(model, x, x_adv, y, too_little)
    assert not verdict.fooled.any() and not verdict.outside.any()


def banded(x: torch.Tensor) -> torch.Tensor:
    """Wrong only where the mean lies in a band; the gradient points through it and beyond."""
    mean = x.flatten(1).mean(1)
    in_band = ((mean > 0.54) & (mean < 0.57)).to(x)
    return torch.stack([1 - mean, mean - 1 + 10 * in_band], 1)


def test_an_earlier_adversarial_iterate_counts():
    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    attack = make_attack(
        "pgd", ThreatModel("Linf", 0.1), steps=5, step_size=0.02, start="none"
    )
    assert (banded(x + 0.1).argmax(1) == y).all()  # where the ascent ends
    x_adv = attack(banded, x, y)
    assert (banded(x_adv).argmax(1) != y).all()
    torch.testing.assert_close(x_adv, torch.full_like(x, 0.56))


def test_a_misclassified_image_is_returned_as_it_is():
    model = Linear(torch.float32)
    x, y, _ = images_at_distance(model, "Linf")
    attack = make_attack("pgd", ThreatModel("Linf", 0.01), start="none")
    assert torch.equal(attack(model, x, 1 - y), x)


def test_restarts_stop_when_all_have_fallen():
    model = Linear(torch.float32)
    x, y, margin = images_at_distance(model, "Linf")
    enough, weak = ThreatModel("Linf", margin * 1.05), ThreatModel("Linf", margin / 2)
    found = Search(PGD(enough, steps=40, restarts=9), model, x, y, seed=0, slots=6).run()
    assert not found.standing.any() and found.backwards <= 6 * 40
    found = Search(PGD(weak, steps=1, restarts=3), model, x, y, seed=0, slots=6).run()
    assert found.standing.all() and (found.forwards, found.backwards) == (6 * 3 * 2, 6 * 3)


def test_momentum_goes_on_where_the_gradient_turns():
    """Dong et al. 2018. With decay 1 the first pixel takes .55, .60, .65, .65; without it
    oscillates about the maximum at 0.56."""
    def model(z):
        first = z.flatten(1)[:, 0]
        return torch.stack([1 + 10 * (first - 0.56).abs(), 0 * first, 0 * first - 9], 1)

    x, y = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    options = {"steps": 4, "step_size": 0.05, "start": "none", "loss": "cw"}
    for momentum, wanted in ((0.0, 0.6), (1.0, 0.65)):
        attack = make_attack("pgd", ThreatModel("Linf", 0.4), momentum=momentum, **options)
        torch.testing.assert_close(attack(model, x, y), torch.tensor([[[[wanted, 0.5]]]]))
    assert make_attack("mifgsm", ThreatModel("Linf", 0.4), steps=8) == PGD(
        ThreatModel("Linf", 0.4), 8, 0.05, start="none", momentum=1.0)


def test_targeted_losses_pull_towards_one_class_after_the_other():
    """The runner-up is out of reach; the third class is not."""
    w = torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 0]])
    bias = torch.tensor([1.0, 0.9, 0.2, 0.1])

    def model(z):
        return z.flatten(1) @ w.T + bias

    x, y = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    threat = ThreatModel("Linf", 0.4)
    for loss in ("targeted-ce", "targeted-cw", "targeted-dlr"):
        one = make_attack("pgd", threat, loss=loss, targets=1, start="none")(model, x, y)
        assert loss == "targeted-dlr" or torch.equal(model(one).argmax(1), y)
        both = make_attack("pgd", threat, loss=loss, targets=2, start="none")(model, x, y)
        assert model(both).argmax(1) == 2


def test_steps_in_the_name():
    threat = ThreatModel("Linf", 0.1)
    assert make_attack("pgd-7", threat) == make_attack("pgd", threat, steps=7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pdg", {}, "Did you mean: pgd"),
        ("pgd-x", {}, "unknown attack"),
        ("pgd", {"stepsize": 1}, "stepsize"),
        ("pgd", {"loss": "cwe"}, "loss: Input should be 'ce', 'cw'"),
        ("pgd", {"restarts": 0}, "restarts must be >= 1"),
        ("pgd", {"steps": 0}, "steps must be >= 1"),
        ("pgd", {"step_size": float("nan")}, "step_size must be >= 0"),
        ("pgd", {"start": "zero"}, "not 'zero'"),
        ("nosuchlibrary:PGD", {}, "unknown attack adapter"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_attack(name, ThreatModel("Linf", 0.1), **options)
