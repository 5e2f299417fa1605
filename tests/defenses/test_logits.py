"""Properties that the losses have for any logits, however large."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robench.defenses import make_defense

from .networks import NOW, THREAT, Nets, assert_close, grads_of, norm
from .transcribed_losses import LOSSES, mart_loss


class TwoLogits(nn.Module):
    """Gives one table of logits for the all-zero images and another for the all-one images."""

    def __init__(self, clean: Tensor, adv: Tensor) -> None:
        super().__init__()
        self.clean, self.adv = nn.Parameter(clean.clone()), nn.Parameter(adv.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.adv if float(x.mean()) > 0.5 else self.clean


def loss_of_logits(
    name: str, student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], **options: Any
) -> tuple[Tensor, Nets]:
    """The total for given logits (clean, adversarial); other: those of the other networks."""
    defense = make_defense(name, THREAT, **options).at(NOW)
    nets: Nets = {"student": TwoLogits(*student).train()}
    for key in set(defense.trained) - {"student"}:
        nets[key] = TwoLogits(*other).train()
    for key in defense.given:
        nets[key] = TwoLogits(*other).eval().requires_grad_(False)
    rows, classes = student[0].shape
    nets |= defense.memory(nets, classes)
    x = torch.zeros(rows, 3, 2, 2, dtype=student[0].dtype)
    x_adv = torch.ones_like(torch.cat([x, x]) if name == "cat" else x)
    total = defense.loss(nets, x, x_adv, torch.arange(rows) % classes).total
    return total, nets


def logits(bound: float) -> st.SearchStrategy[Tensor]:
    value = st.floats(-bound, bound, allow_nan=False)
    table = st.lists(st.lists(value, min_size=4, max_size=4), min_size=3, max_size=3)
    return table.map(lambda rows: torch.tensor(rows, dtype=torch.float64))


def pairs(bound: float) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    return st.tuples(logits(bound), logits(bound))


quick = settings(max_examples=25, deadline=None, derandomize=True)


@quick
@given(student=pairs(30), other=pairs(30), shift=st.floats(-20, 20))
def test_losses_of_any_logits(
    student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], shift: float
) -> None:
    """Reduction (KLm = KLb / C), temperature, sign, zero and shift of the distillation losses."""
    def total(name: str, s: Any = student, o: Any = other, **options: Any) -> float:
        return float(loss_of_logits(name, s, o, **options)[0].detach())

    def near(value: float) -> Any:
        return pytest.approx(value, rel=1e-9, abs=1e-10)

    batchmean = total("adaad", reduction="batchmean", alpha=0.6)
    assert total("adaad", reduction="mean", alpha=0.6) == near(batchmean / 4)
    cooled = [tuple(t / 30 for t in pair) for pair in (student, other)]
    assert total("ard") == near(900 * total("ard", *cooled, temperature=1.0))
    everything = dict(gamma1=0.0, gamma2=1.0, lambda1=0.0)
    for name, options in (
        ("ard", {}), ("rslad", {}), ("adaad", {}), ("peeraid", everything), ("mtard", {}),
        ("igdm", {}), ("saad", dict(clean_weight=0.5)), ("saad", dict(entropy_order=2.0)),
    ):  # fmt: skip
        value = total(name, **options)
        assert value >= -1e-10
        moved = student[0] + shift, student[1] - shift
        assert total(name, s=moved, **options) == near(value)
        same = (student[0], student[0])
        assert total(name, s=same, o=same, **options) == near(0)


@quick
@given(student=pairs(30), other=pairs(30))
def test_adaad_gradient_of_any_logits(
    student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> None:
    """d KLm(p || softmax(z)) / dz = (softmax(z) - p) / (B C)."""
    total, nets = loss_of_logits("adaad", student, other)
    grads = grads_of(total, nets["student"])
    want = (student[1].softmax(1) - other[1].softmax(1)) / 12
    assert float((grads["adv"] - want).abs().max()) <= 1e-12
    assert norm({"clean": grads["clean"]}) == 0


@pytest.mark.parametrize("gap", [1.0, 20.0, 60.0])
def test_mart_caps_its_logarithms(gap: float) -> None:
    """Section 2.6: 1e-12 inside the logarithms of probabilities, 1.0001 before the wrong one."""
    clean, adv = gap * torch.eye(3, 4).double(), gap * torch.eye(4, 4)[1:].double()
    total, nets = loss_of_logits("mart", (clean, adv), (clean, adv))
    x, y = torch.zeros(3, 3, 2, 2), torch.arange(3)
    assert_close(total, mart_loss(nets, x, torch.ones_like(x), y), "mart", tol=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
@quick
@given(student=pairs(1e4), other=pairs(1e4))
def test_losses_stay_finite_for_extreme_logits(
    name: str, student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> None:
    """In float32, value and gradients."""
    single = [tuple(t.float() for t in pair) for pair in (student, other)]
    total, nets = loss_of_logits(name, *single)
    assert total.isfinite()
    for net in nets.values():
        if any(p.requires_grad for p in net.parameters()):
            assert all(grad.isfinite().all() for grad in grads_of(total, net).values())
