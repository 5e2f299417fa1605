"""The active test: plant an adversarial example, see whether the attack finds it.

Zimmermann, Brendel, Tramer and Carlini 2022, "Increasing Confidence in Adversarial Robustness
Evaluations" (arXiv 2206.13991): 11 of the 13 published evaluations that they looked at fail it.

For each image x a binary classifier is made on the features of the network under test, so that
whatever hides its gradients is still in the way:

- INNER points, x among them, are drawn from the ball of 0.95 eps: class 0.
- One point on the boundary of the ball, a random corner of it in Linf, is planted: class 1.
- A linear head separates the two. Its boundary is moved next to the planted point, so that little
  of the ball is class 1: the linear discriminant, in closed form, in float64, where the paper fits
  a logistic regression.

An example inside the ball then exists for certain, and an attack that is worth its name finds one:
it should fool nearly every such classifier. Where random search with as many looks as the attack
has steps finds it, too, the test says nothing and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robench.attacks.base import Attack, Classifier, frozen
from robench.attacks.folding import close, last_linear
from robench.attacks.memory import Batches
from robench.attacks.threat import ThreatModel, lengths
from robench.attacks.verify import full_precision, verify
from robench.benchmark.data import Held

INNER = 400  # points of class 0 per image; the paper has 999
SHARE = 0.95  # of eps: radius of the inner points
CLOSE = 0.9  # where the boundary lies between the outermost inner point and the planted one
SHRINK = 0.1  # of the covariance of the inner features towards a multiple of the identity
LOOKS = 200  # of random search, half of them at corners
EASY = 0.1  # share of the tests that random search may pass
FEW = 8  # tests that are needed for a verdict


@dataclass(frozen=True)
class Outcome:
    """Of an active test.

    Attributes:
        tests: classifiers that could be made.
        found: planted examples that an attack found, for each of them, by its name.
        missed: planted examples that none of them found. An image is robust that withstands all
            attacks, so that what counts is what they find together.
        easy: of them all, those that random search found. features: their number, per image.
    """

    tests: int
    found: dict[str, int]
    missed: int
    easy: int
    features: int

    @property
    def valid(self) -> bool:
        return self.tests >= FEW and self.easy <= EASY * self.tests

    def __str__(self) -> str:
        by = ", ".join(f"{n} by {name}" for name, n in self.found.items())
        text = (f"{self.tests - self.missed} of {self.tests} found, {by}; random search "
                f"{self.easy}; {self.features} features")
        few = f"; at least {FEW} tests are needed" if self.tests < FEW else "; too easy to tell"
        return text + ("" if self.valid else few)


def active_test(
    model: Classifier, images: Held, attacks: Mapping[str, Attack], threat: ThreatModel
) -> Outcome:
    """Plant an example next to each of these images (N, C, H, W) that lies apart from the others,
    and attack with each of the attacks. What it found counts once `verify` has seen it.

    Random numbers come from torch's global generator. Raises RobenchError where not even one image
    fits into memory.
    """
    with frozen(model), full_precision(), Features.of(model, images.x[:2]) as features:
        x, heads = _planted(features, images.x[_apart(images.x, threat)], threat)
        if not len(x):
            return Outcome(0, {}, 0, 0, heads.weight.shape[1])
        binary, y = Binary(features, x, heads, threat), _zeros(x)
        found, stands = {}, torch.ones_like(y, dtype=torch.bool)
        for name, attack in attacks.items():
            x_adv = Batches(len(x))(partial(attack, binary), x, y)
            fooled = verify(binary, x, x_adv, y, threat).fooled
            found[name], stands = int(fooled.sum()), stands & ~fooled
        lucky = _search(binary, x, y, threat)
    return Outcome(len(x), found, int(stands.sum()), int(lucky.sum()), heads.weight.shape[1])


class Features:
    """The features of images: what goes into the last linear layer, or else the logits.

    That layer is used only if its output is what the network returns.
    """

    def __init__(self, model: Classifier, layer: nn.Module | None) -> None:
        self._model, self._layer = model, layer

    @classmethod
    @contextmanager
    def of(cls, model: Classifier, sample: Tensor) -> Iterator[Features]:
        name = last_linear(model) if isinstance(model, nn.Module) else None
        layer = model.get_submodule(name) if name and isinstance(model, nn.Module) else None
        made = cls(model, layer)
        with torch.no_grad():
            if isinstance(layer, nn.Linear):
                inputs, logits = made._seen(sample), model(sample)
                if inputs is None or not close(layer(inputs), logits, 1e-4):
                    made = cls(model, None)
        yield made

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F); gradients pass."""
        inputs = self._seen(x)
        return self._model(x) if inputs is None else inputs

    def _seen(self, x: Tensor) -> Tensor | None:
        """What the layer got last, if it is one row per image."""
        if self._layer is None:
            return None
        got: list[Tensor] = []
        hook = self._layer.register_forward_pre_hook(
            lambda module, inputs: got.append(inputs[0]))
        try:
            self._model(x)
        finally:
            hook.remove()
        return got[-1] if got and got[-1].shape[:-1] == (len(x),) else None


@dataclass(frozen=True)
class Heads:
    """A linear head for each of N images: score = weight . features - bias, class 1 above 0."""

    weight: Tensor  # (N, F)
    bias: Tensor  # (N,)

    def take(self, rows: Tensor) -> Heads:
        """Those of rows (M,) int64, or of a mask (N,) bool."""
        return Heads(self.weight[rows], self.bias[rows])


class Binary:
    """All binary classifiers as one model: images to two logits, by the head of the clean image
    that is nearest in the norm of the threat model. As the clean images are more than 2 eps apart,
    that is the one in whose ball an example lies."""

    def __init__(self, features: Features, x: Tensor, heads: Heads, threat: ThreatModel) -> None:
        self._features, self._x, self._heads, self._threat = features, x, heads, threat

    def __call__(self, z: Tensor) -> Tensor:
        row = _distances(z.detach().to(self._x), self._x, self._threat).argmin(1)
        heads = self._heads.take(row)
        features = self._features(z)
        score = (features * heads.weight.to(features)).sum(1) - heads.bias.to(features)
        return torch.stack([-score, score], 1)


def _distances(z: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """(M, N) between images z (M, C, H, W) and x (N, C, H, W)."""
    return torch.stack([lengths(threat.norm, (z - one).flatten(1)) for one in x], 1)


def _apart(x: Tensor, threat: ThreatModel) -> Tensor:
    """Rows of images of which no two are within 2 eps, the first ones first."""
    near = _distances(x, x, threat) <= 2.01 * threat.eps
    rows: list[int] = []
    for i in range(len(x)):
        if not near[i, rows].any():
            rows.append(i)
    return torch.tensor(rows, dtype=torch.int64, device=x.device)


def _planted(features: Features, x: Tensor, threat: ThreatModel) -> tuple[Tensor, Heads]:
    """The images (M, C, H, W) next to which an example could be planted, and their heads: the
    image is class 0, and `verify` sees the planted one inside the ball and in class 1."""
    weights, biases, planted = list[Tensor](), list[Tensor](), list[Tensor]()
    batches = Batches(INNER + 1)
    for image in x:
        inner = threat.scaled(SHARE).sample(image.expand(INNER, *image.shape).contiguous())
        inner[0] = image
        planted.append(_boundary(image[None], threat))
        with torch.no_grad():
            known = batches(features, torch.cat([inner, planted[-1]])).double()
        weight, bias = _discriminant(known[:-1], known[-1])
        weights.append(weight)
        biases.append(bias)
    heads = Heads(torch.stack(weights), torch.stack(biases))
    binary, y = Binary(features, x, heads, threat), _zeros(x)
    with torch.no_grad():
        is_zero = batches(binary, x).argmax(1) == 0
    keep = verify(binary, x, torch.cat(planted), y, threat).fooled & is_zero
    return x[keep], heads.take(keep)


def _zeros(x: Tensor) -> Tensor:
    """The labels of images, for a binary classifier."""
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _discriminant(inner: Tensor, planted: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (F,) and bias () between features (M, F) and those of one point (F,), scaled so that
    the planted point is 10 from the mean. Above 0 is nothing if no line separates them."""
    center = inner.mean(0)
    spread = inner - center
    cov = spread.T @ spread / len(inner)
    size = cov.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    weight = torch.linalg.solve((1 - SHRINK) * cov + SHRINK * size * eye, planted - center)
    weight = weight * (10 / ((planted - center) @ weight).clamp_min(1e-300))
    outermost = (spread @ weight).max()
    return weight, center @ weight + outermost + CLOSE * (10 - outermost).abs()


def _boundary(x: Tensor, threat: ThreatModel) -> Tensor:
    """Images (N, C, H, W) at distance eps, but for what the box cuts off: corners in Linf."""
    way = torch.randn_like(x)
    if threat.norm == "Linf":
        way = way.sign()
    else:
        way = way / lengths(threat.norm, way.flatten(1)).view(-1, 1, 1, 1)
    return threat.project(x + threat.eps * way, x)


def _search(binary: Binary, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """(N,) bool: what LOOKS random images of the ball find."""
    found = torch.zeros_like(y, dtype=torch.bool)
    for look in range(LOOKS):
        z = _boundary(x, threat) if look % 2 else threat.sample(x)
        found |= verify(binary, x, z, y, threat).fooled
    return found
