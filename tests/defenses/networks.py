"""Networks, data and comparisons of the tests that transcribe every defense a second time.

The networks are random and tiny, with batch-norm, in float64, so that both sides agree to
rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robench.attacks import ThreatModel
from robench.defenses import Moment, make_defense

EPS = 8 / 255
THREAT = ThreatModel("Linf", EPS)
CLOSE = 1e-9  # relative, float64
NOW = Moment(epoch=120, epochs=200, step=3, steps=10)  # where schedules are tested if not said

Nets = dict[str, nn.Module]


# ------------------------------------------------------------------ networks and data


class Net(nn.Module):
    """Two convolutions with batch-norm on 3x6x6 images, everything random, the statistics too."""

    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(54, classes)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, std=0.3)
            nn.init.normal_(bn.running_mean, std=0.3)
            nn.init.uniform_(bn.running_var, 0.3, 1.0)
        with torch.no_grad():
            self.head.weight.mul_(2.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.flatten(1))


def make_memory(defense: Any, nets: Nets, classes: int) -> Nets:
    """What the defense remembers, as the loop makes it, but in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        memory = defense.memory(nets, classes)
    finally:
        torch.set_default_dtype(torch.float32)
    return {name: module.eval().requires_grad_(False) for name, module in memory.items()}


def make_nets(defense: Any, classes: int) -> Nets:
    nets: Nets = {name: Net(classes).train() for name in defense.trained}
    for name in defense.given:
        nets[name] = Net(classes, width=5).eval().requires_grad_(False)
    memory = make_memory(defense, nets, classes)
    for module in memory.values():
        if isinstance(module, Net):  # an average, which soon differs from the network
            module.load_state_dict(Net(classes).state_dict())
    return nets | memory


def make_images(size: int = 8) -> tuple[Tensor, Tensor]:
    """x with many pixels at exactly 0 and 1, x_adv within EPS of it."""
    x = (torch.rand(size, 3, 6, 6, dtype=torch.float64) * 1.3 - 0.15).clamp(0, 1)
    return x, near(x)


def near(x: Tensor) -> Tensor:
    return (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)


def make_batch(classes: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return *make_images(size), torch.randint(classes, (size,))


def setup(
    name: str, classes: int = 10, now: Moment = NOW, **options: Any
) -> tuple[Any, Nets, tuple[Tensor, ...]]:
    """The defense of this moment, networks, and (x, x_adv, y)."""
    defense = make_defense(name, THREAT, **options).at(now)
    nets, (x, x_adv, y) = make_nets(defense, classes), make_batch(classes)
    if name == "cat":  # one attack for each of its networks
        x_adv = torch.cat([x_adv, near(x)])
    return defense, nets, (x, x_adv, y)


# ------------------------------------------------------------------ comparisons


def assert_close(got: Tensor, want: Tensor, what: str, tol: float = CLOSE) -> None:
    """Largest difference relative to the largest wanted entry."""
    assert got.shape == want.shape, what
    error = float((got - want).detach().abs().max())
    scale = float(want.detach().abs().max())
    assert error <= tol * scale + 1e-14, f"{what}: off by {error:.3g} at scale {scale:.3g}"


def grads_of(total: Tensor, net: nn.Module) -> dict[str, Tensor]:
    """The gradient for every parameter; zero where the graph does not reach it."""
    names, params = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(param) if grad is None else grad
        for name, param, grad in zip(names, params, grads, strict=True)
    }


def assert_grads_close(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], f"{what}, gradient of {name}")


def assert_buffers_close(got: nn.Module, want: nn.Module, what: str) -> None:
    wanted = dict(want.named_buffers())
    for name, value in got.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert int(value) == int(wanted[name]), f"{what}: {name}"
        else:
            assert_close(value, wanted[name], f"{what}: {name}")


def norm(grads: dict[str, Tensor]) -> float:
    return float(sum(grad.square().sum() for grad in grads.values())) ** 0.5


def bn_updates(net: nn.Module) -> int:
    counts = {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(counts) == 1
    return counts.pop()


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_bit_identical(net: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


@contextmanager
def inputs_of(net: nn.Module) -> Iterator[list[Tensor]]:
    """The batches that `net` is given meanwhile."""
    seen: list[Tensor] = []
    hook = net.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    try:
        yield seen
    finally:
        hook.remove()


def distinct(batches: list[Tensor]) -> list[Tensor]:
    return [b for i, b in enumerate(batches) if not any(map(b.equal, batches[:i]))]


def assert_same_batches(got: list[Tensor], want: list[Tensor], what: str) -> None:
    """The same batches, in any order and number."""
    for batch in distinct(got + want):
        sides = [any(torch.allclose(batch, other, rtol=0, atol=1e-12) for other in side
                     if other.shape == batch.shape) for side in (got, want)]
        assert all(sides), f"{what}: a batch is forwarded by one side only"
