"""Checks of a network alone: a few passes over a few images, in every evaluation.

Each check is one function that measures one number; what it means is in `robench.reports.trust`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from robench.attacks.base import Classifier, frozen
from robench.attacks.memory import out_of_memory
from robench.attacks.objectives import ce, cw_margin
from robench.attacks.threat import ThreatModel, lengths
from robench.attacks.verify import full_precision
from robench.defenses.feed import Pixels
from robench.errors import UsageError, one_line
from robench.randomness import seeded
from robench.reports.trust import CHECKS, Finding

SAMPLE = 32  # images that the checks look at
STEP, COARSE = 1e-8, 1e-4  # of finite differences, in float64 and in float32
RADIUS, DRAWS = 1 / 255, 16  # of `unstable`, in Linf
# The least eps that is usual: half a level of 8 bits in Linf; nothing smaller is in the papers.
SMALLEST = {"Linf": 0.5 / 255, "L2": 0.1, "L1": 1.0}


@torch.no_grad()
def check_logits(model: Classifier, x: Tensor, y: Tensor) -> None:
    """Look at the outputs for a first batch x (N, C, H, W). y (M,) are the labels of all images.

    Raises UsageError if the output is no (N, K) tensor, holds NaN, or has no place for a label.
    """
    with frozen(model):
        try:
            logits = model(x)
        except Exception as error:  # a user's code may raise anything
            if out_of_memory(error) and len(x) > 1:
                return check_logits(model, x[: len(x) // 2], y)
            raise UsageError(f"the model cannot take images of shape {tuple(x.shape)}: "
                             f"{one_line(error)}") from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the model must return logits (N, K) for images (N, C, H, W), "
                         f"not {shape}")
    if logits.shape[1] < 2:
        raise UsageError("the model has one output: it needs a logit for each of two classes or "
                         "more")
    check_finite(logits)
    if int(y.max()) >= logits.shape[1]:
        raise UsageError(f"the model has {logits.shape[1]} outputs, but there are labels up to "
                         f"{int(y.max())}: is it of another data set?")


def check_finite(logits: Tensor) -> Tensor:
    """The same logits, or UsageError."""
    if not torch.isfinite(logits).all():
        raise UsageError("the model returns NaN or infinite logits for clean images")
    return logits


@dataclass(frozen=True)
class Probe:
    """A network in eval mode, in full precision, and a few images x (N, C, H, W) with labels y.

    Attributes:
        inner: (N, C, H, W) the images, moved a little: off the kinks of a clamp at 0 and 1, of a
            rounding to 8 bits and of a pooling over equal pixels.
    """

    model: Classifier
    x: Tensor
    y: Tensor
    inner: Tensor

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x)


def examine(model: Classifier, x: Tensor, y: Tensor) -> list[Finding]:
    """Every check of a network on images x (N, C, H, W), of which SAMPLE are looked at.

    The network comes with its modules in the modes in which it was given. A check that the
    network's code makes impossible is "not applicable" and says why.
    """
    x, y = x[:SAMPLE], y[:SAMPLE]
    findings = [Finding(CHECKS["eval-mode"], eval_mode(model))]
    # What the checks draw, and what a random network draws, is nobody else's.
    with seeded(0, "checks"), frozen(model), full_precision():
        inner = 0.02 + 0.96 * x + 0.002 * torch.rand_like(x)
        probe = Probe(model, x, y, inner)
        for id, measure in PROBES.items():
            flagged = {f.check.id for f in findings if f.flagged}
            before = flagged.intersection(CHECKS[id].unless)
            if before:
                findings.append(Finding(CHECKS[id], None, f"after {', '.join(sorted(before))}"))
                continue
            try:
                findings.append(Finding(CHECKS[id], measure(probe)))
            except Exception as error:  # a user's code may raise anything
                if out_of_memory(error) and len(x) > 1:
                    break
                findings.append(Finding(CHECKS[id], None, one_line(error)))
        else:
            return findings
    half = len(x) // 2  # here the error has let go of the tensors
    return examine(model, x[:half], y[:half])


def eval_mode(model: Classifier) -> float:
    """Modules in train mode whose class has code that asks for the mode; containers have none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return float(sum(module.training and _asks_for_mode(type(module)) for module in modules))


def _asks_for_mode(kind: type) -> bool:
    own = (base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module)
    return any("training" in value.__code__.co_names for base in own
               for value in vars(base).values() if isinstance(value, FunctionType))


def probabilities(probe: Probe) -> float:
    """1 if rows are in [0, 1] and sum to 1, as AutoAttack's check has it."""
    logits = probe.logits(probe.x)
    in_range = bool(logits.min() >= 0) and bool(logits.max() <= 1)
    return float(in_range and bool((logits.sum(1) - 1).abs().max() < 1e-3))


def random(probe: Probe) -> float:
    """Five passes over the same batch."""
    first, *others = (probe.logits(probe.x) for _ in range(5))
    return max(_apart(first, other) for other in others)


def batch_invariant(probe: Probe) -> float:
    """An image alone, repeated, and beside noisy copies, as attacks have them."""
    together, worst = probe.logits(probe.x), 0.0
    for i, image in enumerate(probe.x[:8]):
        copies = image.expand(8, *image.shape)
        noisy = (copies + 8 / 255 * (2 * torch.rand_like(copies) - 1)).clamp(0, 1)
        for batch in (image[None], copies, torch.cat([image[None], noisy])):
            worst = max(worst, _apart(together[i], probe.logits(batch.contiguous())[0],
                                      together.abs().max()))
    return worst


def _apart(one: Tensor, other: Tensor, size: Tensor | None = None) -> float:
    """The largest difference, relative to the largest logit where that is above 1."""
    size = one.abs().max() if size is None else size
    gap = float((one - other).abs().max() / size.clamp_min(1))
    return math.inf if math.isnan(gap) else gap  # max() passes over NaN


def zero_grad(probe: Probe) -> float:
    """Share of the images without any gradient. One that is not finite counts as none."""
    return float((_lost(probe, ce) & _lost(probe, cw_margin)).float().mean())


def saturated(probe: Probe) -> float:
    """Share of the images on which the cross-entropy alone has no gradient."""
    return float(_lost(probe, ce).float().mean())


def _lost(probe: Probe, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    grad = _gradient(probe.model, probe.inner, lambda logits: loss(logits, probe.y))[1].flatten(1)
    return ~torch.isfinite(grad).all(1) | (grad == 0).all(1)


def _gradient(
    model: Classifier, x: Tensor, value: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(value(logits) (N,), its gradient (N, C, H, W)); zero where no graph leads to x."""
    x = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        values = value(model(x))
        grad = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] \
            if values.requires_grad else None
    return values.detach(), torch.zeros_like(x) if grad is None else grad.detach()


def grad_vs_fd(probe: Probe) -> float:
    """Share of the images whose derivative in a random direction is not that of the function.

    In a float64 copy of the network, where there can be one and it computes in float64.
    """
    model, x, step = probe.model, probe.inner[:16], COARSE
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model).double()
        x = x.double()
        step = STEP if model(x[:1]).dtype == torch.float64 else COARSE
    y = probe.y[: len(x)]

    def margin(logits: Tensor) -> Tensor:
        return cw_margin(logits, y)

    way = torch.randint_like(x, 2) * 2 - 1
    values, grad = _gradient(model, x, margin)
    with torch.no_grad():
        found = (margin(model(x + step * way)) - margin(model(x - step * way))) / (2 * step)
    claimed = (grad * way).flatten(1).sum(1)
    rounding = 20 * torch.finfo(values.dtype).eps * values.abs().max().clamp_min(1) / step
    allowed = 0.1 * torch.maximum(found.abs(), claimed.abs()) + rounding
    return float(((found - claimed).abs() > allowed).float().mean())


def dynamic(probe: Probe) -> float:
    """Gradients that a forward pass asks for."""
    with _counting() as calls, torch.enable_grad():
        probe.model(probe.x[:2])
    return float(len(calls))


@contextmanager
def _counting() -> Iterator[list[str]]:
    """Notes every use of autograd inside."""
    calls: list[str] = []
    originals: dict[str, Any] = {name: getattr(torch.autograd, name)
                                 for name in ("grad", "backward")}

    def noting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return originals[name](*arguments, **options)
        return call

    try:
        for name in originals:
            setattr(torch.autograd, name, noting(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)


def unstable(probe: Probe) -> float:
    """Mean change of the margin in uniform noise of RADIUS, relative to its mean size.

    Pintor et al. 2022 take the change of the loss relative to the loss of the image; that of a
    confident image is next to 0, and a relative change says nothing.
    """
    x, y = probe.inner[:16], probe.y[:16]
    margin = cw_margin(probe.logits(x), y)
    noise = (RADIUS * (2 * torch.rand_like(x) - 1) for _ in range(DRAWS))
    moved = [(cw_margin(probe.logits(x + delta), y) - margin).abs().mean() for delta in noise]
    return float(torch.stack(moved).mean() / margin.abs().mean().clamp_min(1e-12))


# In the order in which they are made: `unless` looks back.
PROBES: dict[str, Callable[[Probe], float]] = {
    "probabilities": probabilities, "random": random, "batch-invariant": batch_invariant,
    "zero-grad": zero_grad, "saturated": saturated, "grad-vs-fd": grad_vs_fd, "dynamic": dynamic,
    "unstable": unstable,
}


def eps_unit(threat: ThreatModel, x: Pixels) -> float:
    """How far eps is beyond what is usual for images x (N, C, H, W): within it, at most 1.

    Where the ball around half of the images reaches uniform grey, nothing can be robust. Zero is
    no mistake of a unit.
    """
    grey = (threat.low + threat.high) / 2
    parts = [(x[i : i + 100].double() - grey).flatten(1) for i in range(0, min(len(x), 1000), 100)]
    largest = float(torch.cat([lengths(threat.norm, part) for part in parts]).median())
    small = SMALLEST[threat.norm] / threat.eps if threat.eps else 0.0
    return round(max(small, threat.eps / max(largest, 1e-12)), 6)  # a fraction is rounded
