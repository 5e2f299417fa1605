"""Auto-PGD: against the reference step by step, on a linear model, and its contract."""

import dataclasses
import math
from collections.abc import Collection, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robench.attacks import ThreatModel, make_attack, verify
from robench.attacks.apgd import APGD
from robench.attacks.network import Network
from robench.attacks.noise import image_ids
from robench.attacks.pool import Images, Units, new_units
from robench.attacks.search import Search
from robench.attacks.threat import NORMS
from robench.errors import UsageError
from robench.testing import check_attack

EPS = {"Linf": 0.02, "L2": 0.2, "L1": 2.0}  # the labels of most images stand
GENEROUS = {"Linf": 0.2, "L2": 3.0, "L1": 30.0}  # and here they fall


def smooth_net(
    shape: tuple[int, int, int] = (3, 8, 8), classes: int = 10,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Without kinks, at which rounding alone could send two equal attacks different ways."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(shape[0], 6, 3, padding=1), nn.Tanh(),
            nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Tanh(),
            nn.Flatten(), nn.Linear(6 * math.ceil(shape[1] / 2) * math.ceil(shape[2] / 2), classes),
        )
    with torch.no_grad():
        for p in net.parameters():
            p *= 2
    return net.to(dtype).eval().requires_grad_(False)


def images_of(net: nn.Module, shape: tuple[int, int, int] = (3, 8, 8), n: int = 6) -> Images:
    """Images of which the network is sure, some pixels at the edges of the box."""
    dtype = next(net.parameters()).dtype
    x = torch.rand(60, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = ((x - 0.5) * 1.2 + 0.5).clamp(0, 1).to(dtype)
    top = net(x).topk(2, dim=1).values
    x = x[(top[:, 0] - top[:, 1]).topk(n).indices]
    logits = net(x)
    y = logits.argmax(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return Images(x, y, others.argsort(dim=1, descending=True)[:, :-1], image_ids(x))


def fresh(attack: APGD, images: Images, number: int = 0) -> Units:
    """One unit of each image, before its first step."""
    return new_units(attack, images, [(i, number) for i in range(len(images.x))], seed=3)


def network(net: nn.Module, images: Images) -> Network:
    return Network(lambda x: net(x), "exact", images.x)


def stepped(attack: APGD, net: Network, units: Units, steps: int | None = None) -> Units:
    for _ in range(attack.steps if steps is None else steps):
        attack.step(net, units)
        units.step += 1
    return units


# Parity with the reference implementation


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch):
    """pyautoattack's module, made fit for a comparison in float64."""
    module = pytest.importorskip("pyautoattack.autopgd_base")

    def projection(x: Tensor, delta: Tensor, eps: float) -> Tensor:
        return ThreatModel("L1", eps).project(x + delta, x) - (x + delta)

    def support(delta: Tensor) -> Tensor:
        # Its rounding leaves 1e-17 where there is no perturbation; and by chance it rounds 2/3 of
        # the count down or up where that is a whole number.
        return (delta.abs() > 1e-9).flatten(1).sum(1).double() * (1 - 2**-30)

    monkeypatch.setattr(module, "L1_projection", projection)
    monkeypatch.setattr(module, "L0_norm", support)
    torch.set_default_dtype(torch.float64)  # else it compares losses in float32
    yield module
    torch.set_default_dtype(torch.float32)


REFERENCE_LOSS = {"ce": "ce", "dlr": "dlr", "targeted-dlr": "dlr-targeted"}


def reference_run(
    module, net: nn.Module, attack: APGD, units: Units, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """(x_best, best loss) of the reference from the same start."""
    threat, start = attack.threat, units.state["x_adv"]
    kind = module.APGDAttack_targeted if "targeted" in attack.loss else module.APGDAttack
    run = kind(net, n_iter=attack.steps, norm=threat.norm, eps=threat.eps, rho=attack.rho)
    run.loss, run.y_target = REFERENCE_LOSS[attack.loss], units.target
    run.init_hyperparam(units.x)
    if threat.norm != "L1":
        x_best, _, loss, _ = run.attack_single_run(units.x, units.y, x_init=start)
    elif attack.large_eps is False:
        monkeypatch.setattr(torch, "randn", lambda shape: start - units.x)
        x_best, _, loss, _ = run.attack_single_run(units.x, units.y)
    else:
        monkeypatch.setattr(torch, "randn_like", lambda x: start - units.x)
        warm = math.ceil(0.3 * attack.steps)
        # Ours spends no gradient on the last iterate of a stage: one move fewer.
        moves = [warm - 1, warm - 1, attack.steps - 2 * warm]
        x_best, _, loss, _ = run.decr_eps_pgd(
            units.x, units.y, [3 * threat.eps, 2 * threat.eps, threat.eps], moves)
    return x_best, loss


@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
@pytest.mark.parametrize(("norm", "options"), [
    ("Linf", {}), ("L2", {}), ("L1", {}), ("L1", {"large_eps": False}),
    ("Linf", {"steps": 33, "rho": 0.5}), ("L2", {"steps": 7}), ("L1", {"steps": 20}),
])
def test_the_path_is_that_of_the_reference(norm, options, loss, reference, monkeypatch):
    net = smooth_net()
    images = images_of(net)
    attack = APGD(ThreatModel(norm, EPS[norm]), loss, **options)
    units = fresh(attack, images, number=1 if "targeted" in loss else 0)
    x_best, best = reference_run(reference, net, attack, units, monkeypatch)
    # A look at the last iterate, which the pool takes otherwise.
    stepped(attack, network(net, images), units, attack.steps + 1)
    torch.testing.assert_close(units.state["best"], best, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(units.state["x_best"], x_best, rtol=0, atol=1e-7)


@pytest.mark.parametrize("loss", ["ce", "targeted-dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_float32_follows_float64(norm, loss):
    found = []
    for dtype in (torch.float32, torch.float64):
        net = smooth_net(dtype=dtype)
        images = images_of(net)
        attack = APGD(ThreatModel(norm, EPS[norm]), loss, steps=20)
        found.append(stepped(attack, network(net, images), fresh(attack, images)))
    single, double = found
    assert single.state["x_adv"].dtype == torch.float32
    torch.testing.assert_close(single.state["best"].double(), double.state["best"],
                               rtol=1e-3, atol=1e-3)


# The rules one by one


class Flat(nn.Module):
    """The same logits for every image, and no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).to(x) + 0 * x.flatten(1)[:, :2]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_without_progress_the_step_size_is_halved_at_every_checkpoint(norm):
    """Croce and Hein 2020, section 3.1: p_0 = 0, p_1 = 0.22, then periods shorter by 0.03."""
    attack = APGD(ThreatModel(norm, 0.1))
    units = fresh(attack, Images(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]),
                                 torch.tensor([[1]]), torch.tensor([7])))
    start, net, halved = units.state["x_adv"], Network(Flat(), "exact", units.x), []
    for step in range(100):
        size = units.state["size"]
        stepped(attack, net, units, 1)
        if (units.state["size"] == size / 2).all():
            halved.append(step)
        assert torch.allclose(units.state["x_adv"], start)
    assert halved == [22, 41, 57, 70, 80, 87, 93, 99]


def test_a_linear_loss_is_maximal_after_one_step_in_linf():
    model, eps = Linear(torch.float64), 0.1
    x, y, _ = images_at_distance(model, "Linf")
    images = Images(x, y, torch.stack([1 - y, torch.full_like(y, 2)], 1), image_ids(x))
    attack = APGD(ThreatModel("Linf", eps), "cw")
    units = stepped(attack, Network(model, "exact", x), fresh(attack, images), 1)
    away = torch.where(y == 0, -1.0, 1.0).double()[:, None] * model.w.sign()
    torch.testing.assert_close(units.state["x_adv"], (x + eps * away.view_as(x)).clamp(0, 1))


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_on_the_sphere_and_belong_to_the_unit(norm):
    threat = ThreatModel(norm, 0.3)
    x = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64)
    x[3] = 0.4
    images = Images(x, torch.zeros(4, dtype=torch.int64),
                    torch.ones(4, 1, dtype=torch.int64), image_ids(x))
    attack = APGD(threat, restarts=2, large_eps=False if norm == "L1" else None)
    first, second = (fresh(attack, images, number).state["x_adv"] for number in (0, 1))
    torch.testing.assert_close(threat.distance(first, x), torch.full((4,), 0.3).double())
    assert torch.equal(first[0], first[1])  # the same image
    assert not torch.equal(first[0] - x[0], first[3] - x[3])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(("steps", "radii"), [
    (10, [3, 3, 3, 2, 2, 2, 1, 1, 1, 1]), (3, [3, 2, 1]), (2, [1, 1]), (1, [1]),
])
def test_the_l1_ball_shrinks(steps, radii):
    threat = ThreatModel("L1", 2.0)
    net = smooth_net()
    images = images_of(net)
    images = dataclasses.replace(images, y=images.ranked[:, 0])  # everything is misclassified
    attack = APGD(threat, steps=steps)
    units, passes = fresh(attack, images), network(net, images)
    for radius in radii:
        look = attack.step(passes, units)
        units.step += 1
        distance = threat.distance(look.candidate, images.x)
        assert (distance <= radius * threat.eps * (1 + 1e-9)).all()
        assert ((look.margin > 0) == (radius == 1)).all()
        if radius > 1:
            assert (distance > (radius - 1) * threat.eps).any()
    assert (threat.distance(units.state["x_adv"], images.x) <= threat.eps * (1 + 1e-9)).all()


# The contract of a stepper


@pytest.mark.parametrize("loss", ["ce", "targeted-dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_units_at_different_steps_do_not_see_each_other(norm, loss):
    net = smooth_net()
    images = images_of(net)
    attack = APGD(ThreatModel(norm, EPS[norm]), loss, steps=25, eot=2)
    passes = network(net, images)
    alone = [stepped(attack, passes, fresh(attack, images).take(torch.tensor([i])))
             for i in range(len(images.x))]
    together = fresh(attack, images).take(torch.tensor([4]))
    for others in ([1, 0], [2], [5, 3]):
        stepped(attack, passes, together, 4)
        late = fresh(attack, images).take(torch.tensor(others))
        together = Units.join([together, late])
    ended = {}
    for _ in range(attack.steps):
        stepped(attack, passes, together, 1)
        for i in (together.step == attack.steps).nonzero()[:, 0].tolist():
            ended[int(together.image[i])] = together.take(torch.tensor([i]))
        together = together.take(together.step < attack.steps)
    assert sorted(ended) == list(range(len(images.x)))
    for i, units in ended.items():
        for key, value in alone[i].state.items():
            torch.testing.assert_close(units.state[key], value, rtol=1e-6, atol=1e-8,
                                       msg=lambda text, key=key: f"{key}: {text}")


@settings(max_examples=30)
@given(
    norm=st.sampled_from(NORMS), share=st.floats(0, 1), steps=st.integers(1, 12),
    shape=st.sampled_from([(1, 8, 8), (3, 8, 8), (3, 5, 7), (1, 2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    loss=st.sampled_from(["ce", "cw", "dlr", "targeted-ce", "targeted-cw", "targeted-dlr"]),
    eot=st.integers(1, 2), n=st.integers(1, 3),
)
def test_what_is_claimed_lies_in_ball_and_box(norm, share, steps, shape, dtype, loss, eot, n):
    pixels = math.prod(shape)
    largest = {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}
    threat = ThreatModel(norm, share * largest[norm])
    net = smooth_net(shape, dtype=dtype)
    images = images_of(net, shape, n)
    attack = APGD(threat, loss, steps=steps, eot=eot)
    units, passes = fresh(attack, images), network(net, images)
    seen = []
    for _ in range(steps):
        look = attack.step(passes, units)
        units.step += 1
        seen.append((look.candidate, look.margin > -torch.inf))
    seen.append((units.state["x_adv"], torch.ones(n, dtype=torch.bool)))
    for x_adv, counts in seen:
        verdict = verify(net, images.x, x_adv, images.y, threat)
        assert not (verdict.outside & counts).any()
        assert x_adv.dtype == dtype and x_adv.shape == images.x.shape


def test_an_iterate_stays_as_it_was_looked_at():
    net = smooth_net()
    images = images_of(net)
    for norm in NORMS:
        attack = APGD(ThreatModel(norm, EPS[norm]), steps=10)
        units, passes = fresh(attack, images), network(net, images)
        for _ in range(attack.steps):
            before = units.state["x_adv"]
            copy = before.clone()
            look = attack.step(passes, units)
            units.step += 1
            assert look.candidate is before and torch.equal(before, copy)


class Scripted:
    """In place of a `Network`: call number i goes along grads[i], by default somewhere at random;
    the calls `wrong` misclassify everything, and the loss is the same in all others."""

    def __init__(self, wrong: Collection[int] = (), grads: Sequence[float] = ()) -> None:
        self.calls, self._wrong, self._grads = 0, wrong, grads

    def gradient(self, x, objective):
        self.calls += 1
        logits = torch.zeros(len(x), 2, dtype=x.dtype)
        logits[:, int(self.calls in self._wrong)] = 1
        grad = (torch.full_like(x, self._grads[self.calls - 1]) if self._grads
                else torch.randn_like(x))
        return logits, objective(logits), grad


def gray(n: int = 2) -> Images:
    x = torch.full((n, 1, 4, 4), 0.5)
    return Images(x, torch.zeros(n, dtype=torch.int64), torch.ones(n, 1, dtype=torch.int64),
                  image_ids(x))


@pytest.mark.parametrize(("wrong", "step"), [
    (set(), None), ({2}, 0), ({4, 10}, 4), ({3, 5, 6, 9}, 2),  # odd calls are not the last of two
    ({12}, 5), ({3}, None),
])
def test_eot_returns_the_last_misclassified_iterate(wrong, step):
    attack = APGD(ThreatModel("L2", 0.5), steps=6, eot=2)
    units, net, iterates = fresh(attack, gray()), Scripted(wrong), []
    for _ in range(attack.steps):
        look = attack.step(net, units)  # type: ignore[arg-type]
        units.step += 1
        assert (look.margin == -torch.inf).all()
        iterates.append(look.candidate)
    assert net.calls == 12
    last = units.state["x_adv"]
    assert [torch.equal(last, seen) for seen in iterates] == [i == step for i in range(6)]


@pytest.mark.parametrize(("grads", "way"), [((3.0, -1.0), 1), ((-3.0, 1.0), -1)])
def test_eot_goes_along_the_mean_gradient(grads, way):
    attack = APGD(ThreatModel("Linf", 0.1), steps=6, eot=2)
    units = stepped(attack, Scripted(grads=grads), fresh(attack, gray()), 1)
    torch.testing.assert_close(units.state["x_adv"], gray().x + way * 0.1)


@pytest.mark.parametrize("norm", NORMS)
def test_a_vanishing_gradient_is_as_good_as_any(norm):
    attack = APGD(ThreatModel(norm, 0.1), steps=10)
    large, tiny = (
        stepped(attack, Scripted(grads=(size, -size, 2 * size)), fresh(attack, gray()), 3)
        for size in (1.0, 1e-16)
    )
    torch.testing.assert_close(tiny.state["x_adv"], large.state["x_adv"])


def test_of_equal_losses_the_first_is_the_best():
    attack = APGD(ThreatModel("Linf", 0.1), steps=6)
    units = fresh(attack, gray())
    start = units.state["x_adv"]
    stepped(attack, Scripted(), units)
    assert torch.equal(units.state["x_best"], start)
    assert not torch.equal(units.state["x_adv"], start)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.")
        assert not any(f"aten.{name}" in str(func) for name in waits), func
        indices = args[1] if "aten.index" in str(func) and isinstance(args[1], list) else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_never_waits_for_the_device(norm):
    with pytest.raises(AssertionError), NoWaiting():
        bool(torch.ones(1).any())
    net = smooth_net()
    images = images_of(net)
    attack = APGD(ThreatModel(norm, EPS[norm]), "targeted-dlr", steps=10, eot=2)
    units, passes = fresh(attack, images), network(net, images)
    with NoWaiting():
        stepped(attack, passes, units)


# As attacks


class Linear(nn.Module):
    """Two classes with scores +-(w x + b) / 2; a third one with a low, constant score."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sign = torch.where(torch.rand(192, generator=generator) < 0.5, -1.0, 1.0)
        # Entries between 0.9 and 1 in size: in L1 one pixel is nearly as good as another.
        w = sign * (0.9 + 0.1 * torch.rand(192, generator=generator))
        self.register_buffer("w", w.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        half = (x.flatten(1) - 0.5) @ self.w / 2
        return torch.stack([half, -half, torch.full_like(half, -30.0)], 1)


DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
GAP = {"Linf": 1.0, "L2": 0.1, "L1": 0.01}  # keeps every boundary point inside [0, 1]


def images_at_distance(model: Linear, norm: str) -> tuple[Tensor, Tensor, float]:
    """Images near mid gray with labels, all at the same distance from the boundary."""
    w = model.w
    x = 0.5 + 0.05 * torch.randn(6, 192, generator=torch.Generator().manual_seed(1)).to(w)
    y = torch.arange(6) % 2
    side = torch.where(y == 0, GAP[norm], -GAP[norm]).to(w)
    x = x + ((side - (x - 0.5) @ w) / (w @ w))[:, None] * w
    # |w x + b| = GAP, so the boundary is GAP / ||w||_dual away (Hoelder).
    return x.view(-1, 3, 8, 8), y, GAP[norm] / float(torch.linalg.vector_norm(w, ord=DUAL[norm]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_budget_decides(name, norm, dtype):
    """A little more than the margin flips every label, a little less flips none."""
    model = Linear(dtype)
    x, y, margin = images_at_distance(model, norm)
    assert (model(x).argmax(1) == y).all()
    enough = ThreatModel(norm, margin * (1.2 if norm == "L1" else 1.05))
    assert verify(model, x, make_attack(name, enough)(model, x, y), y, enough).fooled.all()
    too_little = ThreatModel(norm, margin * 0.95)
    attack = make_attack(name, too_little, steps=20, restarts=1)
    verdict = verify(model, x, attack(model, x, y), y, too_little)
    assert not verdict.fooled.any() and not verdict.outside.any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_conformance(name, norm):
    check_attack(name, threat=ThreatModel(norm, GENEROUS[norm]), steps=20)


def test_conformance_on_random_networks():
    check_attack("apgd-ce", threat=ThreatModel("Linf", 0.2), steps=10, eot=3)


@pytest.mark.parametrize("classes", [2, 3, 5, 12])
@pytest.mark.parametrize("loss", ["ce", "cw", "dlr", "targeted-ce", "targeted-cw", "targeted-dlr"])
def test_any_number_of_classes(loss, classes):
    net = smooth_net((1, 8, 8), classes)
    images = images_of(net, (1, 8, 8), 4)
    attack = APGD(ThreatModel("L2", 8.0), loss, steps=20)
    found = Search(attack, net, images.x, images.y, seed=0).run()
    assert not found.standing.any() and not found.violations
    (stage,) = attack.stages(classes)
    used = {("dlr", 2): "cw", ("targeted-dlr", 2): "targeted-cw",
            ("targeted-dlr", 3): "targeted-cw"}.get((loss, classes), loss)
    assert stage.stepper == APGD(attack.threat, used, steps=20)
    targeted = "targeted" in loss
    assert stage.stepper.units(classes) == (min(9, classes - 1) if targeted else 1)
    notes = " ".join(attack.notes(classes))
    assert (f"{used} takes its place" in notes) == (used != loss)
    assert (f"{classes - 1} of the 9 targets" in notes) == (targeted and classes < 10)


def test_targets_and_restarts_are_units():
    attack = APGD(ThreatModel("Linf", 0.1), "targeted-ce", targets=3, restarts=2)
    assert attack.units(10) == 6 and attack.units(3) == 4
    assert [attack.rank(number) for number in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("name", "norm", "expected"), [
    ("apgd-ce", "Linf", {}),
    ("apgd-ce", "L1", {"restarts": 5}),
    ("apgd-dlr", "L2", {"loss": "dlr"}),
    ("apgd-dlr", "L1", {"loss": "dlr", "restarts": 5}),
    ("apgd-t", "L2", {"loss": "targeted-dlr", "targets": 9}),
    ("apgd-t", "L1", {"loss": "targeted-dlr", "targets": 5}),
])
def test_the_names_have_the_parameters_of_autoattack(name, norm, expected):
    threat = ThreatModel(norm, 0.1)
    attack = make_attack(name, threat)
    assert attack == APGD(threat, **expected) and attack.name == name
    assert attack.steps == 100


@pytest.mark.parametrize(("norm", "options", "message"), [
    ("Linf", {"steps": 0}, "steps must be >= 1, not 0"),
    ("L2", {"restarts": 0}, "restarts must be >= 1"),
    ("L2", {"eot": 0}, "eot must be >= 1"),
    ("L2", {"rho": 1.5}, "rho must be between 0 and 1"),
    ("L2", {"rho": math.nan}, "rho must be between 0 and 1"),
    ("L2", {"large_eps": True}, "large_eps is for L1"),
    ("L1", {"loss": "hinge"}, "unknown loss 'hinge'"),
])
def test_errors(norm, options, message):
    with pytest.raises(UsageError, match=message):
        APGD(ThreatModel(norm, 0.1), **options)
