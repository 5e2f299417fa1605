"""The loss around the weights of a network, and around its images.

Around weights (Li et al. 2018, arXiv 1712.09913, section 4): random Gaussian directions in which
every filter is as long as the network's own, so that the scale of the weights, which batch-norm and
ReLU make arbitrary, does not count. The loss is cross-entropy on PGD examples that are crafted
anew for each displacement (Wu et al. 2020, arXiv 2004.05884, section 3), in eval mode, with the
running statistics as they are. Around images: along the sign of the gradient and along random
signs, in units of eps.

Every random number is a function of (seed, name): directions, starts and signs are the same on
every device, in batches of any size, and, before their normalization, for all networks of one
architecture. Networks are compared along the same directions from the same starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robench.attacks.ascent import Ascent
from robench.attacks.base import frozen, memory_format
from robench.attacks.memory import Batches
from robench.attacks.noise import StreamNoise, image_ids, stream_keys
from robench.attacks.objectives import ce
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import full_precision
from robench.benchmark.data import Images
from robench.errors import UsageError
from robench.reports.record import Surface

POINTS, POINTS_2D, DIRECTIONS, STEPS = 51, 21, 5, 10
Direction = Mapping[str, Tensor]  # parameter name -> a step in it
Line = tuple[float, ...]  # a loss for each alpha
Show = Callable[[float, str], None]  # share done in [0, 1], what to say about it


@dataclass(frozen=True)
class Survey:
    """What to look at.

    Attributes:
        kind: "weight": along single directions. "weight-2d": over the plane of the first two.
            "input": over a plane around each image.
        points: on each axis; odd, so that one of them is the network itself.
        directions: random ones, of kind "weight".
        steps: of PGD with step eps / 4; 0 around images, where nothing is attacked.
    """

    kind: Surface
    points: int
    directions: int
    steps: int

    def __post_init__(self) -> None:
        if self.points < 3 or self.points % 2 == 0:
            raise UsageError(f"points must be odd and at least 3, not {self.points}: "
                             "the one in the middle is the network itself")
        if self.directions < 1:
            raise UsageError(f"directions must be >= 1, not {self.directions}")

    @classmethod
    def create(
        cls, kind: Surface = "weight", points: int | None = None, directions: int | None = None,
        steps: int | None = None,
    ) -> Survey:
        """With the defaults of its kind. Raises UsageError for what it does not have."""
        if directions is not None and kind != "weight":
            raise UsageError(f"--kind {kind} is a plane: --directions is for --kind weight")
        if steps is not None and kind == "input":
            raise UsageError("--kind input attacks nothing: it has no --steps")
        if steps is not None and steps < 1:
            raise UsageError(f"steps must be >= 1, not {steps}")
        return cls(
            kind,
            points=points if points is not None else POINTS if kind == "weight" else POINTS_2D,
            directions=directions if directions is not None
            else DIRECTIONS if kind == "weight" else 2,
            steps=0 if kind == "input" else steps or STEPS,
        )

    @property
    def alphas(self) -> Line:
        """From -1 to 1, exactly 0 in the middle."""
        half = self.points // 2
        return tuple(i / half for i in range(-half, half + 1))

    @property
    def lines(self) -> int:
        return self.directions if self.kind == "weight" else self.points

    def attack(self, threat: ThreatModel) -> Ascent:
        """PGD whose last iterate counts: one that stopped at the first success would understate
        the loss."""
        return Ascent(threat, self.steps, threat.eps / 4, "uniform")


def survey_lines(
    survey: Survey, net: nn.Module, data: Images, threat: ThreatModel, *, seed: int = 0,
    batch_size: int = 500, first: int = 0, show: Show = lambda share, text: None,
) -> Iterator[Line]:
    """The lines of a landscape from number `first` on, one after the other.

    The network is left as it was, bit for bit, whenever a line is not being computed.
    """
    if survey.kind == "input":
        plane = InputPlane(net, data, threat, seed=seed, batch_size=batch_size)
        losses = _over_plane(survey, plane, first)
    else:
        loss = AdversarialLoss(net, data, survey.attack(threat), seed=seed, batch_size=batch_size)
        losses = _over_weights(survey, net, loss, seed, first)
    for number in range(first, survey.lines):
        line: list[float] = []
        for alpha in survey.alphas:
            line.append(next(losses))
            done = (number * survey.points + len(line)) / (survey.lines * survey.points)
            show(done, f"line {number + 1}/{survey.lines}, loss {line[-1]:.3f} at {alpha:+.2f}")
        yield tuple(line)


def _over_weights(
    survey: Survey, net: nn.Module, loss: Callable[[], float], seed: int, first: int
) -> Iterator[float]:
    """The losses of all points, line by line."""
    center = loss()
    for number in range(first, survey.lines):
        moves: list[tuple[float, Direction]] = []
        along = filter_normalized(net, seed, number if survey.kind == "weight" else 0)
        if survey.kind == "weight-2d" and survey.alphas[number]:
            moves = [(survey.alphas[number], filter_normalized(net, seed, 1))]
        for alpha in survey.alphas:
            if alpha == 0 and not moves:
                yield center
                continue
            with displaced(net, (alpha, along), *moves):
                value = loss()
            yield value


def _over_plane(survey: Survey, plane: InputPlane, first: int) -> Iterator[float]:
    for beta in survey.alphas[first:]:
        for alpha in survey.alphas:
            yield plane.loss(alpha, beta)


def filter_normalized(net: nn.Module, seed: int, number: int) -> dict[str, Tensor]:
    """Random direction `number`: Gaussian, and each filter as long as the network's own.

    A filter is what a parameter of two dimensions or more holds for one index of its first: a
    convolution's output channel, a row of a linear layer. Biases and the weights of batch-norm
    do not move, nor do buffers, such as running statistics and a normalization in the model.
    """
    direction = {}
    for name, weight in net.named_parameters():
        if weight.ndim < 2:
            continue
        keys = stream_keys(torch.zeros(1, dtype=torch.int64), seed, "landscape", number, name)
        noise = StreamNoise(keys).normal(*weight.shape)[0]  # on the CPU, whatever the device
        own = weight.detach().cpu().float().flatten(1).norm(dim=1)
        scale = own / noise.flatten(1).norm(dim=1).clamp_min(1e-30)
        direction[name] = (noise * scale.view(-1, *[1] * (noise.ndim - 1))).to(weight)
    return direction


@contextmanager
def displaced(net: nn.Module, *moves: tuple[float, Direction]) -> Iterator[None]:
    """The network with alpha * direction added to its weights, for each (alpha, direction).

    Afterwards, also after an exception, the weights are back bit for bit.
    """
    weights = dict(net.named_parameters())
    before = {name: weights[name].detach().clone() for _, step in moves for name in step}
    try:
        with torch.no_grad():
            for alpha, direction in moves:
                for name, step in direction.items():
                    weights[name].add_(step, alpha=alpha)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                weights[name].copy_(value)


class AdversarialLoss:
    """Mean cross-entropy of a network, as it is at each call, on examples crafted against it.

    All images are attacked, also those that are wrong when clean; every call begins at the same
    random starts, which belong to the images.
    """

    def __init__(
        self, net: nn.Module, data: Images, ascent: Ascent, *, seed: int, batch_size: int
    ) -> None:
        self._net, self._ascent, self._fitting = net, ascent, Batches(batch_size)
        self._batches = [
            (x, y, ascent.threat.sample(x, _noise(x, seed, "start")))
            for x, y in _batches(net, data, batch_size)
        ]

    def __call__(self) -> float:
        total = n = 0.0
        with frozen(self._net), full_precision():
            for x, y, start in self._batches:
                total += float(self._fitting(self._after, x, y, start).sum())
                n += len(y)
        return total / n

    def _after(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """(N,) the loss on the examples."""
        x_adv = self._ascent.maximize(lambda z: ce(self._net(z), y), x, start)
        return _ce(self._net, x_adv, y)


class InputPlane:
    """Mean cross-entropy over a plane through each image, moved into the pixel range.

    The axes are eps long in the threat model's norm: its steepest direction at the image (for
    Linf the sign of the gradient) and the same of random signs.
    """

    def __init__(
        self, net: nn.Module, data: Images, threat: ThreatModel, *, seed: int, batch_size: int
    ) -> None:
        self._net, self._threat, self._fitting = net, threat, Batches(batch_size)
        self._batches = []
        for x, y in _batches(net, data, batch_size):
            signs = torch.where(_noise(x, seed, "signs").uniform(*x.shape[1:]) < 0.5, -1.0, 1.0)
            axes = [threat.eps * threat.ascent(d)
                    for d in (self._fitting(self._gradient, x, y), signs.to(x))]
            self._batches.append((x, y, *axes))

    def _gradient(self, x: Tensor, y: Tensor) -> Tensor:
        z = x.detach().clone().requires_grad_(True)
        with frozen(self._net), full_precision(), torch.enable_grad():
            (grad,) = torch.autograd.grad(ce(self._net(z), y).sum(), z)
        return grad.nan_to_num(0.0, 0.0, 0.0)

    def loss(self, alpha: float, beta: float) -> float:
        """At alpha along the gradient and beta along the random signs, in units of eps."""
        total = n = 0.0
        with frozen(self._net), full_precision():
            for x, y, along, across in self._batches:
                z = (x + alpha * along + beta * across).clamp(self._threat.low, self._threat.high)
                total += float(self._fitting(partial(_ce, self._net), z, y).sum())
                n += len(y)
        return total / n


def _batches(net: nn.Module, data: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """On the network's device, in its layout."""
    device = next((parameter.device for parameter in net.parameters()), data.x.device)
    for start in range(0, len(data), size):
        x, y = data.x[start : start + size], data.y[start : start + size]
        yield x.contiguous(memory_format=memory_format(net)).to(device), y.to(device)


def _noise(x: Tensor, seed: int, name: str) -> StreamNoise:
    return StreamNoise(stream_keys(image_ids(x), seed, "landscape", name))


@torch.no_grad()
def _ce(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:  # (N,) float64
    return ce(net(x), y).double()
