"""DDN, FMN and the smallest perturbation, on models whose nearest boundary point is known."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robench.attacks import ThreatModel, make_attack, verify
from robench.attacks.base import frozen
from robench.attacks.fab import FAB
from robench.attacks.gradient import PGD
from robench.attacks.minimum import DDN, FMN, _thresholded, accuracy_curve, minimum_norm
from robench.attacks.network import Network, Precision
from robench.attacks.noise import image_ids
from robench.attacks.objectives import ce, cw_margin
from robench.attacks.pool import Images, Units, new_units
from robench.attacks.threat import Norm
from robench.errors import UsageError
from robench.testing import check_attack

Pair = DDN | FMN
SHAPE = (3, 8, 8)
D = math.prod(SHAPE)
ORDER = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
GAP: dict[Norm, float] = {"Linf": 2.0, "L2": 2.0, "L1": 0.5}  # the box is out of reach
SHARP = 20.0  # size of the weights: the softmax sees one rival, as margins do
ATTACKS: list[tuple[type[Pair], Norm]] = [
    (DDN, "L2"), (FMN, "Linf"), (FMN, "L2"), (FMN, "L1"),
]
each_attack = pytest.mark.parametrize(("attack", "norm"), ATTACKS)


class Linear(nn.Module):
    """Logits weight (x - 0.5) + bias of K classes; weights are about SHARP."""

    def __init__(self, classes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(classes, D, generator=generator, dtype=torch.float64)
        self.linear = nn.Linear(D, classes, dtype=dtype)
        with torch.no_grad():
            self.linear.weight.copy_(SHARP * weight)
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1) - 0.5)
        return logits


def inner_images(model: Linear, gap: float, n: int = 6) -> tuple[Tensor, Tensor]:
    """Images around mid gray whose label leads the runner-up by SHARP gap."""
    generator = torch.Generator().manual_seed(1)
    weight = model.linear.weight.detach()
    x = 0.02 * torch.randn(n, D, generator=generator).to(weight)
    top = (x @ weight.T).topk(2, dim=1).indices
    normal = weight[top[:, 0]] - weight[top[:, 1]]
    missing = SHARP * gap - (x * normal).sum(1)
    x = 0.5 + x + (missing / normal.square().sum(1))[:, None] * normal
    return x.view(-1, *SHAPE), top[:, 0]


def optimum(model: Linear, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """(N,) distance to the nearest boundary: gap / dual norm, the least over classes (Hoelder)."""
    weight, logits = model.linear.weight.detach().double(), model(x).detach().double()
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=DUAL[norm], dim=2)
    nearest: Tensor = (gaps / slopes).scatter(1, y[:, None], math.inf).amin(1)
    return nearest


def started(attack: Pair, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor,
            ) -> tuple[Network, Units]:
    ranked = model(x).detach().scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
    images = Images(x, y, ranked[:, :-1], image_ids(x))
    return Network(model, "exact", x[:8]), new_units(
        attack, images, [(i, 0) for i in range(len(x))], seed=0
    )


class TestLinear:
    @pytest.mark.parametrize("classes", [2, 5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
    @each_attack
    def test_distance(
        self, attack: type[Pair], norm: Norm, dtype: torch.dtype, classes: int
    ) -> None:
        model = Linear(classes, dtype=dtype)
        x, y = inner_images(model, GAP[norm])
        best = optimum(model, x, y, norm)
        x_adv, distance = minimum_norm(attack(ThreatModel(norm, 0.5)), model, x, y)
        assert x_adv.dtype == dtype and ((x_adv > 0) & (x_adv < 1)).all()
        assert (model(x_adv).argmax(1) != y).all()
        torch.testing.assert_close(distance, ThreatModel(norm, 0.5).distance(x_adv, x))
        assert (distance >= best * (1 - 1e-4)).all()
        assert (distance <= best * (1.05 if norm == "L1" else 1.02)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
    @each_attack
    def test_budget_decides(self, attack: type[Pair], norm: Norm, dtype: torch.dtype) -> None:
        model = Linear(2, dtype=dtype)
        x, y = inner_images(model, GAP[norm])
        margin = float(optimum(model, x, y, norm).max())
        enough = ThreatModel(norm, margin * (1.2 if norm == "L1" else 1.05))
        x_adv = attack(enough)(model, x, y)
        assert x_adv.dtype == dtype
        assert verify(model, x, x_adv, y, enough).fooled.all()
        too_little = ThreatModel(norm, margin * 0.95)
        verdict = verify(model, x, attack(too_little)(model, x, y), y, too_little)
        assert not verdict.fooled.any() and not verdict.outside.any()

    @each_attack
    def test_last_iterate_is_in_the_ball(self, attack: type[Pair], norm: Norm) -> None:
        """On gray images all roundings add up, and a small ball shows them."""
        gray = torch.full((2, 3, 32, 32), 0.7)
        threat = ThreatModel(norm, {"Linf": 1e-4, "L2": 1e-3, "L1": 1e-2}[norm])

        def model(x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([-mean, mean - 1.9], 1)

        y = torch.zeros(2, dtype=torch.int64)
        x_adv = attack(threat, steps=5)(model, gray, y)
        verdict = verify(model, gray, x_adv, y, threat)
        assert not verdict.outside.any() and not verdict.fooled.any()
        assert (verdict.distance > 0.5 * threat.eps).all() or norm == "L1"

    @settings(max_examples=20)
    @given(norm=st.sampled_from(["Linf", "L2", "L1"]), seed=st.integers(0, 10**6),
           gap=st.floats(0.1, 50), classes=st.integers(2, 4))
    def test_box_active(self, norm: Norm, seed: int, gap: float, classes: int) -> None:
        """Images at the edges of the box: results stay inside, beyond the optimum without it."""
        model = Linear(classes, seed)
        x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
        with torch.no_grad():
            model.linear.bias[model(x).argmax(1)[0]] += SHARP * gap
        y = model(x).argmax(1)
        for attack in [FMN(ThreatModel(norm, 0.5), 20)] + (
            [DDN(ThreatModel("L2", 0.5), 20)] if norm == "L2" else []
        ):
            x_adv, distance = minimum_norm(attack, model, x, y)
            assert ((x_adv >= 0) & (x_adv <= 1)).all()
            found = distance < math.inf
            assert torch.equal(x_adv[~found], x[~found])
            assert (model(x_adv).argmax(1)[found] != y[found]).all()
            assert (distance >= optimum(model, x, y, norm) * (1 - 1e-4) - 1e-6).all()


class TestSteps:
    def net(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(6 * 64, 4),
        ).double()

    def images(self, net: nn.Module, n: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(n, *SHAPE, dtype=torch.float64)
        return x, net(x).argmax(1)

    @each_attack
    def test_units_at_different_steps_equal_those_alone(
        self, attack: type[Pair], norm: Norm
    ) -> None:
        net = self.net()
        x, y = self.images(net, 5)
        made = attack(ThreatModel(norm, 0.5), steps=12)
        with frozen(net):
            network, together = started(made, net, x, y)
            alone = [together.take(torch.tensor([i])) for i in range(len(x))]
            flying = together.take(torch.tensor([0, 1]))
            for step in range(12):
                if step == 3:
                    flying = Units.join([flying, together.take(torch.tensor([2, 3, 4]))])
                made.step(network, flying)
                flying.step += 1
            for i, unit in enumerate(alone):
                for _ in range(12 if i < 2 else 9):
                    made.step(network, unit)
                    unit.step += 1
                for name, value in flying.take(torch.tensor([i])).state.items():
                    torch.testing.assert_close(value, unit.state[name], rtol=1e-7, atol=1e-9)

    @each_attack
    def test_algorithm(self, attack: type[Pair], norm: Norm) -> None:
        """The best distances are those of the papers' algorithms, one image at a time."""
        net = self.net()
        x, y = self.images(net, 4)
        made = attack(ThreatModel(norm, 0.5), steps=30)
        with frozen(net):
            network, units = started(made, net, x, y)
            for _ in range(30):
                made.step(network, units)
                units.step += 1
            plain = ddn_of_the_paper if attack is DDN else fmn_of_the_paper
            expected = [plain(net, x[i], y[i : i + 1], norm, 30) for i in range(len(x))]
        assert min(expected) < math.inf
        assert units.state["best_norm"].tolist() == pytest.approx(expected, rel=1e-6)

    @each_attack
    def test_step_looks_once_and_claims_in_the_ball_only(
        self, attack: type[Pair], norm: Norm
    ) -> None:
        net = self.net()
        x, y = self.images(net, 6)
        with frozen(net):
            nearest = minimum_norm(attack(ThreatModel(norm, 0.5), 40), net, x, y)[1]
            threat = ThreatModel(norm, float(nearest.median()))
            made = attack(threat, steps=40)
            network, units = started(made, net, x, y)
            claims = torch.zeros(6, dtype=torch.bool)
            for taken in range(1, 41):
                before = units.state["x_adv"]
                step = made.step(network, units)
                units.step += 1
                assert network.forwards == network.backwards == 6 * taken
                assert torch.equal(step.candidate, before)
                inside = threat.distance(before, x) <= threat.eps
                wanted = torch.where(inside, cw_margin(net(before), y), -math.inf)
                torch.testing.assert_close(step.margin, wanted)
                claims |= step.margin > 0
        assert torch.equal(claims, nearest <= threat.eps) and 0 < claims.sum() < 6

    def test_a_find_that_was_not_confirmed_raises_the_bar(self) -> None:
        model = Linear(2, dtype=torch.float64)
        x, y = inner_images(model, 2.0)
        made = FMN(ThreatModel("L2", 0.5))
        network, units = started(made, model, x, y)
        units.bar += 0.5 * SHARP
        for _ in range(made.steps):
            made.step(network, units)
            units.step += 1
        far = optimum(model, x, y, "L2") * 2.5 / 2.0  # a lead of 2 to lose and 0.5 to gain
        torch.testing.assert_close(units.state["best_norm"], far, rtol=0.01, atol=0)

    def test_ddn_finds_its_way_where_cross_entropy_is_flat(self) -> None:
        model = Linear(3)
        x, y = inner_images(model, 2.0)

        def sure(z: Tensor) -> Tensor:
            logits: Tensor = model(z) * 1e3
            return logits

        flat = x.clone().requires_grad_(True)
        assert not torch.autograd.grad(ce(sure(flat), y).sum(), flat)[0].any()
        distance = minimum_norm(DDN(ThreatModel("L2", 0.5)), sure, x, y)[1]
        assert (distance <= 1.05 * optimum(model, x, y, "L2")).all()


def fmn_of_the_paper(net: nn.Module, x: Tensor, y: Tensor, norm: Norm, steps: int) -> float:
    """Pintor et al. 2021, algorithm 1, with the factor 1 + gamma on the estimate."""
    delta, radius, best = torch.zeros_like(x), math.inf, math.inf
    for k in range(steps):
        decay = (1 + math.cos(math.pi * k / steps)) / 2
        alpha, gamma = 0.01 + 0.99 * decay, 0.001 + 0.049 * decay
        image = (x + delta).requires_grad_(True)
        loss = cw_margin(net(image[None]), y)[0]
        (grad,) = torch.autograd.grad(loss, image)
        length = float(delta.flatten().norm(p=ORDER[norm]))
        if loss > 0:
            best = min(best, length)
            radius = min(radius * (1 - gamma), best)
        elif best < math.inf:
            radius *= 1 + gamma
        else:
            slope = grad.flatten().norm(p=DUAL[norm])
            radius = (length + float((loss.detach() / slope).abs())) * (1 + gamma)
        far = (x + delta + alpha * grad / grad.norm())[None]
        ball = ThreatModel(norm, radius, low=-1e3, high=1e3)
        delta = ball.project(far, x[None])[0].clamp(0, 1) - x
    return best


def ddn_of_the_paper(net: nn.Module, x: Tensor, y: Tensor, norm: Norm, steps: int) -> float:
    """Rony et al. 2019, algorithm 1, without quantization."""
    delta, radius, best = torch.zeros_like(x), 1.0, math.inf
    for k in range(steps):
        alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2
        image = (x + delta).requires_grad_(True)
        logits = net(image[None])
        (grad,) = torch.autograd.grad(ce(logits, y)[0], image)
        wrong = bool(logits.argmax(1) != y)
        if wrong:
            best = min(best, float(delta.norm()))
        radius *= 0.95 if wrong else 1.05
        delta = delta + alpha * grad / grad.norm()
        delta = (x + delta * radius / delta.norm()).clamp(0, 1) - x
    return best


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), pixels=st.sampled_from([1, 2, 48, 3072]),
       power=st.integers(1, 5), share=st.floats(1e-4, 2))
def test_threshold_is_the_projection_onto_the_l1_ball(
    seed: int, pixels: int, power: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(2, 1, 1, pixels, generator=generator, dtype=torch.float64) ** power
    radius = delta.flatten(1).abs().sum(1) * share
    for row in range(2):
        free = ThreatModel("L1", float(radius[row]), low=-1e9, high=1e9)
        wanted = free.project(delta[row : row + 1], torch.zeros_like(delta[:1]))
        got = _thresholded(delta[row : row + 1], radius[row : row + 1])
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * float(radius[row]))


class TestMinimumNorm:
    @pytest.mark.parametrize("precision", ["exact", "ieee", "bf16"])
    @each_attack
    def test_every_find_is_confirmed(
        self, attack: type[Pair], norm: Norm, precision: Precision
    ) -> None:
        model = Linear(4)
        x, y = inner_images(model, GAP[norm], n=9)
        y[2] = (y[2] + 1) % 4
        made = attack(ThreatModel(norm, 1e-3), precision=precision)  # this eps does not matter
        x_adv, distance = minimum_norm(made, model, x, y)
        assert torch.equal(x_adv[2], x[2]) and distance[2] == 0
        assert (model(x_adv).argmax(1) != y).all() and (distance < math.inf).all()
        others = torch.arange(9) != 2
        best = optimum(model, x, y, norm)[others]
        # bf16 sees the boundary elsewhere, and in L1 a class that is not the nearest may win.
        assert (distance[others] <= best * (1.5 if norm == "L1" else 1.2)).all()
        assert (distance[others] >= best * (1 - 1e-4)).all()
        again = minimum_norm(made, model, x, y)
        assert torch.equal(again[0], x_adv) and torch.equal(again[1], distance)

    @each_attack
    def test_nothing_to_find(self, attack: type[Pair], norm: Norm) -> None:
        def constant(x: Tensor) -> Tensor:
            return torch.stack([1 + 0 * x.sum((1, 2, 3)), 0 * x.sum((1, 2, 3))], 1)

        x, y = torch.rand(3, *SHAPE), torch.tensor([0, 1, 0])
        x_adv, distance = minimum_norm(attack(ThreatModel(norm, 0.5)), constant, x, y)
        assert torch.equal(x_adv, x)
        assert distance.tolist() == [math.inf, 0.0, math.inf]

    def test_no_images(self) -> None:
        x = torch.rand(0, *SHAPE)
        y = torch.zeros(0, dtype=torch.int64)
        x_adv, distance = minimum_norm(FMN(ThreatModel("L2", 1)), Linear(2), x, y)
        assert x_adv.shape == x.shape and distance.shape == (0,)

    def test_batches_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Linear(3, dtype=torch.float64)
        x, y = inner_images(model, 2.0)
        attack = FMN(ThreatModel("L2", 1), steps=20)
        whole = minimum_norm(attack, model, x, y)
        monkeypatch.setattr("robench.attacks.minimum.BATCH", 4)
        torch.testing.assert_close(minimum_norm(attack, model, x, y), whole)

    @pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
    def test_fab(self, norm: Norm) -> None:
        """All targets run, and the nearest of their finds is returned."""
        model = Linear(4)
        x, y = inner_images(model, GAP[norm])
        distance = minimum_norm(FAB(ThreatModel(norm, 1e-3), steps=20), model, x, y)[1]
        torch.testing.assert_close(distance, optimum(model, x, y, norm), rtol=0.02, atol=0)

    def test_other_attacks(self) -> None:
        model = Linear(2)
        x, y = inner_images(model, 1.0)
        with pytest.raises(UsageError, match="pgd looks for no smallest perturbation"):
            minimum_norm(PGD(ThreatModel("L2", 1)), model, x, y)

    @given(st.lists(st.one_of(st.just(0.0), st.just(math.inf), st.floats(0, 10)), min_size=1),
           st.lists(st.floats(0, 10), min_size=1).map(sorted))
    def test_curve(self, distance: list[float], eps: list[float]) -> None:
        curve = accuracy_curve(torch.tensor(distance, dtype=torch.float64), eps)
        assert curve == sorted(curve, reverse=True)
        assert curve == [sum(d > e for d in distance) / len(distance) for e in eps]

    def test_curve_agrees_with_verdicts(self) -> None:
        model = Linear(2)
        x, y = inner_images(model, 2.0)
        x = 0.5 + (x - 0.5) * torch.linspace(0.5, 1.5, len(x))[:, None, None, None]
        distance = minimum_norm(FMN(ThreatModel("Linf", 1)), model, x, y)[1]
        for share, eps in zip([1, 0.5, 0], [0.0, float(distance.median()), 1.0], strict=True):
            threat = ThreatModel("Linf", eps)
            fooled = verify(model, x, FMN(threat)(model, x, y), y, threat).fooled
            assert accuracy_curve(distance, [eps]) == [float((~fooled).double().mean())]
            assert share - 1e-9 <= float((~fooled).double().mean()) <= share + 0.2


@pytest.mark.parametrize(("name", "threat"), [
    ("ddn", "L2:2"), ("fmn", "Linf:0.2"), ("fmn", "L2:2"), ("fmn", "L1:15"),
])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_contract(name: str, threat: str, shape: tuple[int, int, int]) -> None:
    check_attack(name, threat=ThreatModel.parse(threat), shape=shape, steps=30)


@pytest.mark.parametrize(("name", "norm", "options", "message"), [
    ("ddn", "Linf", {}, "L2 only, not in Linf: write fmn"),
    ("ddn", "L2", {"init": 0}, "init must be > 0"),
    ("ddn", "L2", {"gamma": 1}, "gamma must be < 1"),
    ("ddn", "L2", {"steps": 0}, "steps must be >= 1"),
    ("fmn", "L2", {"gamma_final": float("nan")}, "gamma_final must be > 0"),
    ("fmn", "L1", {"alpha_init": float("inf")}, "alpha_init must be > 0 and finite"),
    ("fmn", "L1", {"init": 1}, "init"),
])
def test_errors(name: str, norm: Norm, options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_attack(name, ThreatModel(norm, 0.5), **options)


def test_the_name_may_hold_the_steps() -> None:
    threat = ThreatModel("L2", 0.5)
    assert make_attack("fmn-300", threat) == FMN(threat, steps=300)
    assert FMN(threat).config(10)["stages"]["fmn"]["units"] == 1
