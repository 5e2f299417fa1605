"""FAB: its projections against solvers, its runs against closed forms and the reference."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from torch import Tensor, nn

from robench.attacks import Classifier, ThreatModel, make_attack, verify
from robench.attacks.fab import FAB, onto_plane
from robench.attacks.network import Network
from robench.attacks.noise import image_ids
from robench.attacks.pool import Images, Units, new_units
from robench.attacks.threat import NORMS, Norm
from robench.errors import UsageError
from robench.testing import check_attack

ORDER: dict[Norm, float] = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
DUAL: dict[Norm, float] = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
EPS: dict[Norm, float] = {"Linf": 0.02, "L2": 0.2, "L1": 2.0}
GENEROUS: dict[Norm, float] = {"Linf": 0.2, "L2": 3.0, "L1": 30.0}
by_norm = pytest.mark.parametrize("norm", NORMS)
by_kind = pytest.mark.parametrize("targeted", [True, False], ids=["fab-t", "fab"])


# Projections


def shortest(norm: Norm, z: Any, w: Any, gap: float, threat: ThreatModel) -> float | None:
    """Length of the shortest move onto the plane inside the box, by scipy; None: there is none."""
    d, low, high = len(z), threat.low - z, threat.high - z
    if norm == "L2":
        def left(t: float) -> float:
            return float(gap + w @ np.clip(-np.sign(gap) * t * w, low, high))

        end = 2 * (threat.high - threat.low) / max(np.abs(w[w != 0]).min(initial=1.0), 1e-9)
        if gap == 0:
            return 0.0
        if left(end) * gap > 0:
            return None
        t = brentq(left, 0, end, xtol=1e-14)
        return float(np.linalg.norm(np.clip(-np.sign(gap) * t * w, low, high)))
    eye, bounds = np.eye(d), np.stack([low, high], 1).tolist()
    # Variables: the move, and bounds on its sizes: one for all, or one for each.
    sizes = np.ones((d, 1)) if norm == "Linf" else eye
    count = sizes.shape[1]
    found = linprog(
        np.concatenate([np.zeros(d), np.ones(count)]),
        A_ub=np.block([[eye, -sizes], [-eye, -sizes]]), b_ub=np.zeros(2 * d),
        A_eq=np.concatenate([w, np.zeros(count)])[None], b_eq=[-gap],
        bounds=bounds + [(0, None)] * count, method="highs",
    )
    return float(found.fun) if found.status == 0 else None


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(NORMS), seed=st.integers(0, 10**6), d=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.01, 0.3, 0.7, 0.95, 1.2]), sign=st.sampled_from([-1, 1]),
    box=st.sampled_from([(0.0, 1.0), (-1.0, 2.5)]), scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_the_move_is_the_shortest_that_reaches_the_plane(norm, seed, d, share, sign, box, scale):
    threat = ThreatModel(norm, 0.5, *box)
    rng = np.random.default_rng(seed)
    low, high = box
    z = np.clip(rng.uniform(low - 0.5, high + 0.5, (2, d)), low, high)  # some at the edges
    w = rng.normal(size=d) * (rng.random(d) < 0.8) * scale  # some are 0
    down = np.where(w > 0, z - low, high - z) @ np.abs(w)
    up = np.where(w > 0, high - z, z - low) @ np.abs(w)
    gap = share * (down if sign > 0 else -up)  # share of the most that the box allows
    moves = onto_plane(threat, *(torch.tensor(v)[None] for v in (z, gap, w)))[0].numpy()
    assert ((z + moves >= low - 1e-12) & (z + moves <= high + 1e-12)).all()
    assert (moves[:, w == 0] == 0).all()
    for row in range(2):
        wanted = shortest(norm, z[row], w / scale, gap[row] / scale, threat)
        left = gap[row] + w @ moves[row]
        if wanted is None or (share > 1 and wanted == 0):
            corner = np.where(sign * w > 0, low, high)
            np.testing.assert_allclose((z[row] + moves[row])[w != 0], corner[w != 0], atol=1e-12)
        else:
            assert abs(left) <= 1e-9 * scale
            length = np.linalg.norm(moves[row], ord=ORDER[norm])
            assert length == pytest.approx(wanted, abs=1e-7)


def hard_planes(rows: int = 4, d: int = 3072) -> tuple[Tensor, Tensor]:
    """Points with many pixels at or near the edges, gradients over many orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(rows, 2, d, generator=generator) * 0.5 + 0.5).clamp(0, 1)
    z[0] = 2 ** (-20 * torch.rand(2, d, generator=generator))
    w = torch.randn(rows, d, generator=generator)
    w[0] = w[0].sign() * 2 ** (-30 * torch.rand(d, generator=generator))
    w[1] = w[1] * (3 * torch.randn(d, generator=generator)).exp()
    w[2] = w[2].clamp_min(0) * 1e-9
    return z, w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("share", [1e-5, 0.03, 0.5, 0.9, 0.99])
@by_norm
def test_planes_at_the_far_end_of_the_box_are_reached(norm, share, dtype):
    z, w = (tensor.to(dtype) for tensor in hard_planes())
    most = (torch.where(w[:, None] > 0, z, 1 - z) * w[:, None].abs()).sum(-1)
    gap = share * most
    moves = onto_plane(ThreatModel(norm, 0.1), z, gap, w)
    left = gap + (moves * w[:, None]).sum(-1)
    assert (left.abs() <= 1e-5 * gap).all()


@by_norm
def test_projections_equal_the_reference(norm):
    projections = pytest.importorskip("pyautoattack.fab_projections")
    generator = torch.Generator().manual_seed(1)
    z = (torch.rand(8, 2, 3072, generator=generator) * 1.2 - 0.1).clamp(0, 1).double()
    w = torch.randn(8, 3072, generator=generator).double()
    gap = torch.randn(8, 2, generator=generator).double() * 100
    b = (z * w[:, None]).sum(-1) - gap
    wide = w[:, None].expand_as(z)
    reference = getattr(projections, f"projection_{norm.lower()}")
    torch.set_default_dtype(torch.float64)  # else it bisects in float32
    try:
        wanted = reference(z.flatten(0, 1), wide.flatten(0, 1), b.flatten()).view_as(z)
    finally:
        torch.set_default_dtype(torch.float32)
    moves = onto_plane(ThreatModel(norm, 0.1), z, gap, w)
    torch.testing.assert_close(moves, wanted, atol=1e-8, rtol=0)


@by_norm
def test_without_a_gradient_nothing_moves(norm):
    z = torch.rand(2, 2, 12, generator=torch.Generator().manual_seed(0))
    gap = torch.tensor([[-1.0, 0.0], [1.0, 3e38]])
    assert not onto_plane(ThreatModel(norm, 0.1), z, gap, torch.zeros(2, 12)).any()


# Whole runs


class Linear(nn.Module):
    """Two classes with scores +-(w x - b) / 2, and a third one that is out of reach."""

    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(192, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        half = (x.flatten(1) - 0.5) @ self.w / 2
        return torch.stack([half, -half, torch.full_like(half, -30.0)], 1)


def images_at_distance(model: Linear, norm: Norm) -> tuple[Tensor, Tensor, float]:
    """Images near mid gray with labels, all at the same distance from the boundary."""
    w, gap = model.w, {"Linf": 3.0, "L2": 0.5, "L1": 0.5}[norm]
    x = 0.5 + 0.05 * torch.randn(6, 192, generator=torch.Generator().manual_seed(1))
    y = torch.arange(6) % 2
    side = torch.where(y == 0, gap, -gap)
    x = x + ((side - (x - 0.5) @ w) / (w @ w))[:, None] * w
    return x.view(-1, 3, 8, 8), y, gap / float(torch.linalg.vector_norm(w, ord=DUAL[norm]))


def smooth_net(
    shape: tuple[int, int, int] = (3, 8, 8), classes: int = 10, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = 6 * math.ceil(shape[1] / 2) * math.ceil(shape[2] / 2)
        net = nn.Sequential(
            nn.Conv2d(shape[0], 6, 3, padding=1), nn.Tanh(),
            nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(),
            nn.Linear(size, classes),
        )
    with torch.no_grad():
        for p in net.parameters():
            p *= 2
    return net.to(dtype).eval().requires_grad_(False)


def images_of(net: nn.Module, shape: tuple[int, int, int] = (3, 8, 8), n: int = 6) -> Images:
    """Random images, some pixels at the edges of the box, labeled as the network sees them."""
    dtype = next(net.parameters()).dtype
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = ((x - 0.5) * 1.4 + 0.5).clamp(0, 1).to(dtype)
    logits = net(x)
    return labeled(x, logits.argmax(1), logits)


def labeled(x: Tensor, y: Tensor, logits: Tensor) -> Images:
    others = logits.scatter(1, y[:, None], -torch.inf)
    return Images(x, y, others.argsort(dim=1, descending=True)[:, :-1], image_ids(x))


def fresh(attack: FAB, images: Images, number: int = 0) -> Units:
    """One unit of each image, before its first step."""
    return new_units(attack, images, [(i, number) for i in range(len(images.x))], seed=3)


def network(model: Classifier, images: Images) -> Network:
    return Network(lambda x: model(x), "exact", images.x)


def stepped(attack: FAB, net: Network, units: Units, steps: int | None = None) -> Units:
    for _ in range(attack.steps if steps is None else steps):
        attack.step(net, units)
        units.step += 1
    return units


@by_kind
@by_norm
def test_the_nearest_point_of_a_linear_model(norm, targeted):
    model = Linear()
    x, y, margin = images_at_distance(model, norm)
    images = labeled(x, y, model(x))
    threat = ThreatModel(norm, margin / 2)  # what is looked for does not depend on eps
    attack = FAB(threat, targeted, steps=20)
    state = stepped(attack, network(model, images), fresh(attack, images)).state
    assert (model(state["best"]).argmax(1) != y).all()
    distance = threat.distance(state["best"], x)
    torch.testing.assert_close(state["best_norm"].double(), distance, rtol=1e-5, atol=1e-6)
    assert ((distance >= margin * (1 - 1e-5)) & (distance <= margin * 1.01)).all()


@by_kind
@by_norm
def test_budget_decides(norm, targeted):
    """A little more than the margin flips every label, a little less flips none."""
    model, name = Linear(), "fab-t" if targeted else "fab"
    x, y, margin = images_at_distance(model, norm)
    enough = ThreatModel(norm, margin * 1.05)
    x_adv = make_attack(name, enough, steps=20)(model, x, y)
    assert verify(model, x, x_adv, y, enough).fooled.all()
    too_little = ThreatModel(norm, margin * 0.95)
    assert torch.equal(make_attack(name, too_little, steps=20)(model, x, y), x)


@pytest.mark.parametrize("restart", [0, 1])
@by_kind
@by_norm
def test_a_run_equals_the_reference(norm, targeted, restart, monkeypatch):
    module = pytest.importorskip("pyautoattack.fab_pt")
    net = smooth_net(dtype=torch.float32)
    images = images_of(net)
    threat = ThreatModel(norm, EPS[norm])
    attack = FAB(threat, targeted, steps=25, restarts=2, targets=2)
    number = 2 * targeted + restart  # the second target
    units = fresh(attack, images, number)
    monkeypatch.setattr(torch, "rand", lambda shape: units.noise(0).uniform(*shape[1:]))
    monkeypatch.setattr(torch, "randn", lambda shape: units.noise(0).normal(*shape[1:]))
    run = module.FABAttack_PT(net, norm=norm, n_iter=attack.steps, eps=threat.eps)
    run.target_class = 3  # counted from 1, the label included
    with torch.enable_grad():
        wanted = run.attack_single_run(
            images.x, images.y, use_rand_start=restart > 0, is_targeted=targeted)
    stepped(attack, network(net, images), units)
    torch.testing.assert_close(
        units.state["best_norm"].double(), threat.distance(wanted, images.x), rtol=2e-3, atol=0)
    assert (units.state["best_norm"] < torch.inf).all()
    assert ((wanted == 0) | (wanted == 1)).any()  # the box was in the way


@by_kind
@by_norm
def test_units_do_not_depend_on_the_others(norm, targeted):
    net = smooth_net()
    images = images_of(net)
    looked = network(net, images)
    attack = FAB(ThreatModel(norm, EPS[norm]), targeted, steps=9, restarts=2, targets=2)
    early = stepped(attack, looked, fresh(attack, images, 1), 4)
    mixed = Units.join([early, fresh(attack, images)])
    mixed = stepped(attack, looked, mixed.take(torch.arange(1, len(mixed))), 3)
    assert mixed.step.unique().tolist() == [3, 7]
    for place in (0, len(images.x) - 1):  # the second image early, the first one late
        image, number, steps = (1, 1, 7) if place == 0 else (0, 0, 3)
        alone = stepped(
            attack, looked, new_units(attack, images, [(image, number)], seed=3), steps)
        for name, tensor in alone.state.items():
            torch.testing.assert_close(mixed.state[name][[place]], tensor, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)], ids=str)
@by_kind
@by_norm
def test_what_is_claimed_is_allowed_and_misclassified(norm, targeted, shape, dtype):
    net = smooth_net(shape, dtype=dtype)
    images = images_of(net, shape)
    threat = ThreatModel(norm, GENEROUS[norm])
    attack = FAB(threat, targeted, steps=6, restarts=2, targets=2)
    claims = torch.zeros(len(images.x), dtype=torch.int64)
    for number in range(attack.units(10)):
        units = fresh(attack, images, number)
        for _ in range(attack.steps):
            step = attack.step(network(net, images), units)
            units.step += 1
            verdict = verify(net, images.x, step.candidate, images.y, threat)
            inside = step.margin > -torch.inf
            assert not verdict.outside[inside].any()
            assert torch.equal(verdict.fooled[inside], step.margin[inside] > 0)
            claims += step.margin > 0
            assert ((units.state["point"] >= 0) & (units.state["point"] <= 1)).all()
            assert units.state["point"].dtype == step.margin.dtype == dtype
        known = units.state["best_norm"] < torch.inf
        assert (net(units.state["best"]).argmax(1) != images.y)[known].all()
    assert (claims > 0).all()


@by_norm
def test_restarts_start_at_the_image_and_then_around_it(norm):
    net = smooth_net()
    images = images_of(net)
    threat = ThreatModel(norm, GENEROUS[norm])
    attack = FAB(threat, restarts=3, targets=4)
    assert [attack.rank(n) for n in range(attack.units(10))] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    first, second, third = (fresh(attack, images, n).state["point"] for n in (3, 4, 5))
    assert torch.equal(first, images.x)
    for start in (second, third):
        distance = threat.distance(start, images.x)
        assert ((distance > threat.eps / 10) & (distance <= threat.eps / 2 * (1 + 1e-9))).all()
        assert ((start >= 0) & (start <= 1)).all()
    assert not torch.isclose(second, third).all()


@by_kind
def test_two_classes_and_a_single_image(targeted):
    net = smooth_net(classes=2)
    images = images_of(net, n=1)
    attack = FAB(ThreatModel("L2", 0.1), targeted, steps=10)
    assert attack.units(2) == 1
    units = stepped(attack, network(net, images), fresh(attack, images))
    assert (net(units.state["best"]).argmax(1) != images.y).all()


@by_kind
@by_norm
def test_flat_and_broken_networks_leave_the_image(norm, targeted):
    def flat(x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]) + 0 * x.flatten(1)[:, :3]

    def broken(x: Tensor) -> Tensor:
        return flat(x) * torch.nan

    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = labeled(x, torch.zeros(3, dtype=torch.int64), flat(x))
    for model in (flat, broken):
        attack = FAB(ThreatModel(norm, 0.5), targeted, steps=3)
        units = stepped(attack, network(model, images), fresh(attack, images))
        assert (units.state["best_norm"] == torch.inf).all()
        assert torch.equal(units.state["best"], x)
        torch.testing.assert_close(units.state["point"], x)


def test_after_a_claim_in_vain_it_aims_beyond_its_margin():
    net = smooth_net()
    images = images_of(net)
    attack = FAB(ThreatModel("L2", 1.0), steps=10)
    units = fresh(attack, images)
    units.bar = torch.full_like(units.bar, 0.5)
    stepped(attack, network(net, images), units)
    logits = net(units.state["best"])
    label = logits.gather(1, images.y[:, None])[:, 0]
    assert (logits.amax(1) - label > 0.5).all()
    assert (logits.amax(1) - label < 0.6).all()


@pytest.mark.parametrize("name", ["fab-t", "fab"])
@by_norm
def test_contract(name, norm):
    check_attack(name, threat=ThreatModel(norm, GENEROUS[norm]), steps=10)


def test_options():
    threat = ThreatModel("Linf", 0.1)
    assert make_attack("fab-t-7", threat, targets=3) == FAB(threat, steps=7, targets=3)
    assert make_attack("fab", threat, restarts=2) == FAB(threat, targeted=False, restarts=2)
    assert FAB(threat).notes(10) == () and "9 of the 12" in FAB(threat, targets=12).notes(10)[0]
    assert FAB(threat, targeted=False, targets=12).notes(10) == ()


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("restarts", 0), ("targets", 0), ("eta", 0.9), ("beta", 1.5),
     ("alpha_max", -0.1), ("beta", math.nan)],
)
def test_errors(option, value):
    with pytest.raises(UsageError, match=f"{option} must be"):
        dataclasses.replace(FAB(ThreatModel("Linf", 0.1)), **{option: value})
