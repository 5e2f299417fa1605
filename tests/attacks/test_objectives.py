"""Objectives against plain definitions, one image at a time."""

import math

import pytest
import torch

from robench.attacks.objectives import UNTARGETED, ce, cw_margin, dlr, kl, targeted_dlr
from robench.errors import UsageError

LOGITS = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 7
TARGET = (Y + 1 + torch.arange(40) % 6) % 7


def rows(*tensors: torch.Tensor):
    return zip(*(t.tolist() for t in tensors), strict=True)


def close(got: torch.Tensor, expected: list[float], **tolerance: float) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), **tolerance)


def test_ce():
    close(ce(LOGITS, Y), [math.log(sum(map(math.exp, z))) - z[y] for z, y in rows(LOGITS, Y)])


def test_cw_margin():
    expected = [max(v for k, v in enumerate(z) if k != y) - z[y] for z, y in rows(LOGITS, Y)]
    close(cw_margin(LOGITS, Y), expected)
    assert torch.equal(cw_margin(LOGITS, Y) > 0, LOGITS.argmax(1) != Y)


def test_dlr():
    """Eq. 6: -(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3)."""
    expected = []
    for z, y in rows(LOGITS, Y):
        top = sorted(z, reverse=True)
        other = max(v for k, v in enumerate(z) if k != y)
        expected.append(-(z[y] - other) / (top[0] - top[2]))
    close(dlr(LOGITS, Y), expected)


def test_targeted_dlr():
    """Eq. 7: -(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2)."""
    expected = []
    for z, y, t in rows(LOGITS, Y, TARGET):
        top = sorted(z, reverse=True)
        expected.append(-(z[y] - z[t]) / (top[0] - (top[2] + top[3]) / 2))
    close(targeted_dlr(LOGITS, Y, TARGET), expected)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_dlr_does_not_see_shift_and_scale(scale):
    moved = scale * LOGITS + 5
    torch.testing.assert_close(dlr(moved, Y), dlr(LOGITS, Y))
    torch.testing.assert_close(targeted_dlr(moved, Y, TARGET), targeted_dlr(LOGITS, Y, TARGET))


def test_dlr_needs_classes():
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UsageError, match="at least 3 classes, not 2"):
        dlr(torch.randn(2, 2), y)
    with pytest.raises(UsageError, match="at least 4 classes, not 3"):
        targeted_dlr(torch.randn(2, 3), y, y + 1)
    dlr(torch.randn(2, 3), y)
    targeted_dlr(torch.randn(2, 4), y, y + 1)


@pytest.mark.parametrize("temperature", [1.0, 30.0])
def test_kl(temperature):
    other = LOGITS.flip(0)
    expected = []
    for target, logits in rows(LOGITS, other):
        p = [math.exp(v / temperature) for v in target]
        q = [math.exp(v / temperature) for v in logits]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    close(kl(LOGITS, other, temperature), expected)


def test_kl_sends_gradient_into_both_sides():
    target, logits = LOGITS.clone().requires_grad_(), LOGITS.flip(0).requires_grad_()
    kl(target, logits).sum().backward()
    assert target.grad.abs().sum() > 0 and logits.grad.abs().sum() > 0
    same = LOGITS.clone().requires_grad_()
    kl(same, same.detach()).sum().backward()
    assert same.grad.abs().max() < 1e-12  # the minimum


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    half, other = LOGITS.to(dtype), LOGITS.flip(0).to(dtype)
    for objective in UNTARGETED.values():
        assert torch.equal(objective(half, Y), objective(half.float(), Y))
    assert torch.equal(targeted_dlr(half, Y, TARGET), targeted_dlr(half.float(), Y, TARGET))
    value = kl(half, other)
    assert value.dtype == torch.float32
    assert torch.equal(value, kl(half.float(), other.float()))


def test_large_logits_stay_finite():
    extreme = torch.tensor([[1e4, -1e4, 0.0, 5.0]])
    for y in range(4):
        label = torch.tensor([y])
        for objective in UNTARGETED.values():
            assert torch.isfinite(objective(extreme, label)).all()
    assert torch.isfinite(kl(extreme, -extreme)).all()
