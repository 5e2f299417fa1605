"""The conformance suite: what robench relies on in every attack and every defense.

    from robench.testing import check_attack, check_defense

    def test_my_attack():
        check_attack("my-attack")

    def test_my_defense():
        check_defense(MyDefense, beta=3.0)

Plain functions that raise AssertionError with a sentence that says what is wrong. They run on
the CPU in about a second, on random images and a small network.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks.base import Attack, Classifier, make_attack
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import Verdict, verify
from robench.defenses.base import (
    DEFENSES,
    Defense,
    Losses,
    Moment,
    Nets,
    Wrapper,
    make_defense,
    options_of,
    take_step,
)

CLASSES = 10
# Large enough for every sound attack to fool the small network on most images.
EASY = ThreatModel("Linf", 0.2)
USUAL = ThreatModel("Linf", 8 / 255)


@contextmanager
def _apart() -> Iterator[None]:
    """Seeds of our own, and one thread: more only get in each other's way on small images."""
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        np.random.set_state(numpy)
        random.setstate(python)


@_apart()
def check_attack(
    attack: str | Callable[[ThreatModel], Attack],
    *,
    threat: ThreatModel = EASY,
    shape: tuple[int, int, int] = (3, 8, 8),
    **options: Any,
) -> None:
    """Check that an attack keeps the contract of `robench.attacks.Attack`.

    Args:
        attack: a name for `make_attack`, or a function from threat model to attack.
        threat: what it is run under; generous, since the attack must fool a weak network.
        shape: (C, H, W) of the images.
        options: passed on to the attack.

    Raises AssertionError.
    """
    made = (
        make_attack(attack, threat, **options)
        if isinstance(attack, str)
        else attack(threat, **options)
    )
    _require(made.threat == threat, f"attack.threat is {made.threat}, not {threat}")
    net, x, y, clean_errors = _weak_network(shape)

    _seed(torch_seed=1, other=1)
    with _untouched({"model": net}, x, y):
        x_adv = made(net, x, y)
    verdict = _check_images(x_adv, x, y, net, threat)
    _require(
        int(verdict.fooled.sum()) > clean_errors,
        f"no image was fooled beyond the {clean_errors} that are misclassified anyway; a "
        f"misclassified iterate must be returned (is {threat} too small for this attack?)",
    )

    _seed(torch_seed=1, other=2)
    _require(
        torch.equal(made(net, x, y), x_adv),
        "the same torch seed gave another result: draw from torch's global generator only",
    )

    _check_images(made(net, x[:1], y[:1]), x[:1], y[:1], net, threat)

    def plain(images: Tensor) -> Tensor:
        logits: Tensor = net(images)
        return logits

    # Such a model has no modes that an attack could see: it comes in eval mode.
    net.eval()
    with _untouched({"the module inside a plain callable": net}, x, y):
        _check_images(made(plain, x, y), x, y, plain, threat)
    net.double()
    _check_images(made(net, x.double(), y), x.double(), y, net, threat)


@_apart()
def check_defense(
    defense: str | type[Defense],
    *,
    threat: ThreatModel = USUAL,
    shape: tuple[int, int, int] = (3, 8, 8),
    **options: Any,
) -> None:
    """Check that a defense keeps the contract of `robench.defenses.Defense`.

    Args:
        defense: a registered name, or the class itself.
        threat: given to defenses that have such a field.
        shape: (C, H, W) of the images.
        options: passed on to the defense.

    Raises AssertionError.
    """
    made = _make_defense(defense, threat, options)
    _check_round_trip(defense, made, threat)
    nets: dict[str, nn.Module] = {
        name: _network(shape, seed)
        for seed, name in enumerate([*made.trained, *made.given])
    }
    memory = made.memory(nets, CLASSES)
    _require(not memory.keys() & nets.keys(), "an entry of memory has the name of a network")
    nets |= {name: module.eval().requires_grad_(False) for name, module in memory.items()}
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % CLASSES
    _check_craft(made, nets, x, y, threat)
    _check_steps(made, nets, x, y)


def _check_craft(
    made: Defense, nets: Nets, x: Tensor, y: Tensor, threat: ThreatModel
) -> None:
    # Crafting in train mode is allowed to move batch-norm, but of the trained networks only.
    inner = made
    while isinstance(inner, Wrapper):
        inner = inner.inner
    may_move = made.trained if getattr(inner, "craft_mode", "eval") == "train" else ()
    _seed(torch_seed=1, other=1)
    with _untouched(nets, x, y, buffers_of=[name for name in nets if name not in may_move]):
        x_adv = made.craft(nets, x, y)
    # A method that attacks several networks returns a batch for each.
    for name, part in zip(made.trained, torch.split(x_adv, len(x)), strict=False):
        _check_images(part, x, y, nets[name], getattr(inner, "threat", threat))
    batches = len(x_adv) / len(x)
    _require(batches == int(batches) <= len(made.trained),
             f"{len(x_adv)} examples for {len(x)} images and {len(made.trained)} networks")


def _check_steps(made: Defense, nets: Nets, x: Tensor, y: Tensor) -> None:
    """Two steps as `fit` takes them."""
    for name in made.trained:
        nets[name].train().requires_grad_(True)
    for name in made.given:
        nets[name].eval().requires_grad_(False)
    for net in nets.values():
        net.zero_grad()
    before = {name: _copy(net.state_dict()) for name, net in nets.items()}
    optimizers = [torch.optim.SGD(nets[name].parameters(), lr=0.1) for name in made.trained]
    modes = [module.training for net in nets.values() for module in net.modules()]
    _check_losses(made.loss(nets, x, made.craft(nets, x, y), y))
    for step in range(2):
        take_step(made.at(Moment(0, 1, step, 2)), nets, optimizers, x, y)
        now = [module.training for net in nets.values() for module in net.modules()]
        _require(now == modes, "a step changed the mode of a network")
    with torch.no_grad():
        made.after_epoch(nets)

    for name in made.given:
        _require(
            _same(before[name], nets[name].state_dict()),
            f"{name} is given, but its parameters or buffers changed",
        )
        _require(
            not any(module.training for module in nets[name].modules()),
            f"{name} is given, but was left in train mode",
        )
    for name in made.trained:
        moved = any(not torch.equal(before[name][k], p) for k, p in nets[name].named_parameters())
        _require(moved, f"{name} is trained, but two steps left its parameters where they were")


def _check_losses(losses: Losses) -> None:
    _require(bool(losses.parts), "the loss has no parts")
    for name, part in losses.parts.items():
        _require(
            isinstance(part, Tensor) and part.shape == () and bool(torch.isfinite(part)),
            f"the part {name!r} of the loss is no finite scalar tensor: {part}",
        )
    _require(losses.total.requires_grad, "the total loss carries no gradient")


def _make_defense(
    defense: str | type[Defense], threat: ThreatModel, options: dict[str, Any]
) -> Defense:
    for entry in DEFENSES:
        if defense in (entry.name, entry.value):
            return make_defense(entry.name, threat, **options)
    if isinstance(defense, str):
        return make_defense(defense, threat, **options)  # raises the error for unknown names
    has_threat = any(field.name == "threat" for field in dataclasses.fields(defense))  # type: ignore[arg-type]
    return defense(**({"threat": threat} if has_threat else {}), **options)


def _check_round_trip(
    defense: str | type[Defense], made: Defense, threat: ThreatModel
) -> None:
    """A run folder keeps the options as JSON; they must build the same defense again."""
    stored = json.loads(json.dumps(options_of(made)))
    again = _make_defense(defense, threat, stored)
    _require(again == made, f"the options do not survive JSON: {made} became {again}")


def _check_images(
    x_adv: Tensor, x: Tensor, y: Tensor, model: Classifier, threat: ThreatModel
) -> Verdict:
    """x_adv as the contract wants it: like x, detached, in ball and box."""
    for what in ("shape", "dtype", "device"):
        got, wanted = getattr(x_adv, what), getattr(x, what)
        _require(got == wanted, f"the examples have {what} {got}, the images {wanted}")
    _require(not x_adv.requires_grad, "the examples are not detached")
    verdict = verify(model, x, x_adv, y, threat)
    _require(
        not verdict.outside.any(),
        f"{int(verdict.outside.sum())} of {len(x)} examples are outside {threat} (distances up "
        f"to {verdict.distance.max():.6g}) or outside [{threat.low:g}, {threat.high:g}]",
    )
    return verdict


@contextmanager
def _untouched(
    nets: Nets, x: Tensor, y: Tensor, buffers_of: Sequence[str] | None = None
) -> Iterator[None]:
    """Require that the block leaves networks and batch exactly as it found them."""
    inputs = _copy({"x": x, "y": y})
    before = {name: _state(net) for name, net in nets.items()}
    yield
    _require(_same(inputs, {"x": x, "y": y}), "x or y was changed in place")
    for name, net in nets.items():
        after = _state(net)
        for what, state in before[name].items():
            if what == "buffers" and buffers_of is not None and name not in buffers_of:
                continue
            _require(_same(state, after[what]), f"{name}: {what} changed and were not restored")


def _state(net: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything about a network that an attack may not change, by module or parameter name."""
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": _copy(parameters),
        "buffers": _copy(dict(net.named_buffers())),
        "modes": {name: module.training for name, module in modules.items()},
        "requires_grad flags": {name: p.requires_grad for name, p in parameters.items()},
        ".grad of parameters": {
            name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()
        },
        "hooks": {name: [list(getattr(m, h)) for h in hooks] for name, m in modules.items()},
    }


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Equal, tensors bit by bit."""
    return first.keys() == second.keys() and all(
        isinstance(b, Tensor) and torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in ((first[key], second[key]) for key in first)
    )


def _network(shape: tuple[int, int, int], seed: int) -> nn.Sequential:
    """A small network with everything that an attack might disturb."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(8 * shape[1] * shape[2], CLASSES),
        )
        for index, p in enumerate(net.parameters()):
            p.grad = torch.randn_like(p) if index % 2 else None
    net.train()
    net[1].eval()  # modes differ from module to module
    net[0].bias.requires_grad_(False)
    net[2].register_forward_hook(lambda module, args, output: None)
    return net


def _weak_network(shape: tuple[int, int, int]) -> tuple[nn.Sequential, Tensor, Tensor, int]:
    """A network, images (8, C, H, W), labels (8,), and how many of them it gets wrong.

    All images lie near its decision boundaries, and it knows all labels but one.
    """
    net = _network(shape, seed=0)
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    modes = [module.training for module in net.modules()]
    net.eval()
    with torch.no_grad():
        net[-1].bias -= net(x).mean(0)
        y = net(x).argmax(1)
    for module, training in zip(net.modules(), modes, strict=True):
        module.training = training
    y[0] = (y[0] + 1) % CLASSES
    return net, x, y, 1


def _seed(torch_seed: int, other: int) -> None:
    torch.manual_seed(torch_seed)
    np.random.seed(other)
    random.seed(other)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
