"""Attacks of other libraries by name, such as `torchattacks:MIFGSM`; and what the adapters share.

The libraries flip modes, seed every global generator, print, and leave gradients behind. Here
they meet a `Shield` instead of the model, inside `isolated`, so that none of it gets out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks.base import Classifier, frozen
from robench.attacks.threat import ThreatModel
from robench.errors import UsageError
from robench.randomness import cuda_devices


def library(name: str) -> ModuleType:
    """Import an optional library; raises UsageError, naming the extra, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f'{name} cannot be imported ({error}): pip install "robench[attacks]"'
        ) from None


def draw_seed() -> int:
    """A seed in [0, 2**31) from torch's global generator, which moves on."""
    return int(torch.randint(2**31, ()))


class Shield(nn.Module):
    """A classifier as the nn.Module that a library asks for, without access to what is inside.

    The model is no sub-module: switching modes or collecting parameters finds nothing. The
    libraries compute in float32; the model still sees images of the dtype of `x`.
    """

    _logits: Classifier

    def __init__(self, model: Classifier, x: Tensor) -> None:
        super().__init__()
        # torchattacks reads the device off the first parameter.
        self.anchor = nn.Parameter(torch.zeros((), device=x.device), requires_grad=False)
        # Past nn.Module's __setattr__, which would make the model a sub-module.
        self.__dict__["_logits"] = model if isinstance(model, nn.Module) else _images_only(model)
        self._dtype = x.dtype

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            # A channels_last network returns gradients that the libraries' view() refuses.
            images = images.view_as(images)
            images.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
        return self._logits(images.to(self._dtype)).float()


class _ImageGradient(torch.autograd.Function):
    """Backward reaches the images and nothing else."""

    @staticmethod
    def forward(ctx: Any, model: Classifier, images: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_(True)
            ctx.logits = model(ctx.images)
        logits: Tensor = ctx.logits.detach()
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        # FAB goes back through one graph once per class.
        (grad,) = torch.autograd.grad(ctx.logits, ctx.images, grads[0], retain_graph=True)
        return None, grad


def _images_only(model: Classifier) -> Classifier:
    """Keep `backward` (FAB, CW) from leaving .grad in parameters inside a plain callable.

    `frozen` cannot find those. It does it for modules, at less memory.
    """

    def logits(images: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return model(images)
        result: Tensor = _ImageGradient.apply(model, images)
        return result

    return logits


@contextlib.contextmanager
def isolated(model: Classifier, seed: int) -> Iterator[None]:
    """Run foreign code: `model` is frozen, nothing is printed, and every global comes back.

    Inside, the generators of torch, numpy and Python start from `seed`. Afterwards their states
    are as before, and so is the trace function (pyautoattack's checks switch coverage off).
    """
    python, numpy, trace = random.getstate(), np.random.get_state(), sys.gettrace()
    try:
        with (
            frozen(model),
            torch.random.fork_rng(devices=cuda_devices()),
            torch.enable_grad(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        sys.settrace(trace)


@contextlib.contextmanager
def logged_warnings(logger: str) -> Iterator[list[str]]:
    """Collect what a library logs as a warning, one line each, instead of printing it."""
    source, found = logging.getLogger(logger), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(" ".join(record.getMessage().split()))  # type: ignore[method-assign]
    propagate = source.propagate
    source.addHandler(handler)
    source.propagate = False
    try:
        yield found
    finally:
        source.removeHandler(handler)
        source.propagate = propagate


def allowed(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """What a library returned, as images inside the threat model: detached, dtype of x (N,C,H,W).

    Minimum-norm attacks return any distance. The nearest allowed image is what such an attack
    offers this adversary; whether it still fools is for `verify` to say. Where an entry is not
    finite, the attack found nothing: x.
    """
    x_adv = x_adv.detach().to(x)
    return threat.project(torch.where(torch.isfinite(x_adv), x_adv, x), x)
