"""Every defense against a second transcription of its formulas.

The transcriptions below were written from the methods specification (METHODS.md, whose sections
the docstrings cite) without a look at robench.defenses, in plain torch and with explicit sums.
The networks are random and tiny, with batch-norm, in float64, so that both sides agree to rounding.
A new built-in defense needs an entry in LOSSES, CRAFTS and BN_UPDATES, or the first test fails.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robench.attacks import ThreatModel
from robench.defenses import DEFENSES, make_defense

EPS = 8 / 255
THREAT = ThreatModel("Linf", EPS)
CLOSE = 1e-9  # relative, float64

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


def make_nets(defense: Any, classes: int) -> Nets:
    nets: Nets = {name: Net(classes).train() for name in defense.trained}
    for name in defense.given:
        nets[name] = Net(classes, width=5).eval().requires_grad_(False)
    return nets


def make_batch(classes: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """x with many pixels at exactly 0 and 1, x_adv within EPS of it, y."""
    x = (torch.rand(size, 3, 6, 6, dtype=torch.float64) * 1.3 - 0.15).clamp(0, 1)
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    return x, x_adv, torch.randint(classes, (size,))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """A fixed seed, and one thread: the tensors are too small to share among cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240)
        yield
    torch.set_num_threads(threads)


def setup(name: str, classes: int = 10, **options: Any) -> tuple[Any, Nets, tuple[Tensor, ...]]:
    defense = make_defense(name, THREAT, **options) if options else make_defense(name, THREAT)
    return defense, make_nets(defense, classes), make_batch(classes)


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


# ------------------------------------------------------------------ transcriptions: building blocks


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """CE, mean over the batch."""
    return -torch.log_softmax(logits, 1)[torch.arange(len(y)), y].sum() / len(y)


def kl_batchmean(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KLb(p || q) of section 2: sum over the classes, mean over the batch; nothing detached."""
    log_p = torch.log_softmax(p_logits / temperature, 1)
    log_q = torch.log_softmax(q_logits / temperature, 1)
    return (log_p.exp() * (log_p - log_q)).sum() / len(p_logits)


def kl_mean(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KLm = KLb / C of sections 1.2 and 2: mean over batch and classes."""
    return kl_batchmean(p_logits, q_logits, temperature) / p_logits.shape[1]


# ------------------------------------------------------------------ transcriptions: losses
# Each takes (nets, x, x_adv, y, options) and returns the total; the order of its forwards is
# the order of the batch-norm updates. The defaults are the CIFAR-10 settings of METHODS.


def standard_loss(nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """Not in METHODS: cross-entropy on the clean batch, one forward."""
    return cross_entropy(nets["student"](x), y)


def pgd_at_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, extra_clean_forward: bool = False
) -> Tensor:
    """Section 2.1: CE(S(x*), y), nothing on clean."""
    return cross_entropy(nets["student"](x_adv), y)


def trades_loss(nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    """Section 2.2: CE(S(x), y) + beta KLb(S(x) || S(x*)), target not detached; clean, adv, clean.

    The third forward gives the logits of the label term or of the target, which are the same.
    """
    student = nets["student"]
    clean, adv, clean_again = student(x), student(x_adv), student(x)
    return cross_entropy(clean_again, y) + beta * kl_batchmean(clean, adv)


def ard_loss(
    nets: Nets,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    temperature: float = 30.0,
    alpha: float = 1.0,
) -> Tensor:
    """Section 2.3: alpha tau^2 KLm(T(x)/tau || S(x*)/tau) + (1 - alpha) CE(S(x), y); adv, clean."""
    adv, clean = nets["student"](x_adv), nets["student"](x)
    distill = temperature**2 * kl_mean(nets["teacher"](x), adv, temperature)
    return alpha * distill + (1 - alpha) * cross_entropy(clean, y)


def rslad_loss(
    nets: Nets,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    weight: float = 0.1,
    adversarial_share: float = 5 / 6,
) -> Tensor:
    """Section 2.4: 0.1 (5/6 KLb(T(x) || S(x*)) + 1/6 KLb(T(x) || S(x))); adv, clean."""
    target = nets["teacher"](x)
    adv, clean = nets["student"](x_adv), nets["student"](x)
    share = adversarial_share
    return weight * (share * kl_batchmean(target, adv) + (1 - share) * kl_batchmean(target, clean))


def adaad_loss(
    nets: Nets,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    alpha: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Section 2.5: alpha KL(T(x*) || S(x*)) + (1 - alpha) KL(T(x) || S(x)); clean, adv."""
    kl = {"mean": kl_mean, "batchmean": kl_batchmean}[reduction]
    teacher, student = nets["teacher"], nets["student"]
    clean, adv = student(x), student(x_adv)
    return alpha * kl(teacher(x_adv), adv) + (1 - alpha) * kl(teacher(x), clean)


def peeraid_terms(
    nets: Nets,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    temperature: float = 5.0,
    peer_temperature: float = 1.0,
    gamma1: float = 1.0,
    gamma2: float = 0.1,
    lambda1: float = 0.0,
    lambda2: float = 1.0,
    lambda3: float = 1.0,
    detach_student: bool = False,
    detach_clean: bool = False,
) -> dict[str, Tensor]:
    """Section 1.2, steps 5 to 8, with the two switches of 1.8 (2); student adv, adv, clean."""
    a = nets["peer"](x_adv)
    s1 = nets["student"](x_adv)
    p = a.detach()
    s2 = nets["student"](x_adv)
    s0 = nets["student"](x)
    s1 = s1.detach() if detach_student else s1
    s0 = s0.detach() if detach_clean else s0
    t, tr = temperature, peer_temperature
    return {
        "peer_ce": gamma1 * cross_entropy(a, y),
        "peer_kl": gamma2 * tr**2 * kl_mean(s1, a, tr),
        "student_ce": lambda1 * cross_entropy(s2, y),
        "student_kl": lambda2 * t**2 * kl_mean(p, s2, t),
        "student_self": lambda3 * t**2 * kl_mean(s0, s2, t),
    }


def peeraid_loss(nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Section 1.2, step 9: L_peer + L_student."""
    return torch.stack(list(peeraid_terms(nets, x, x_adv, y, **options).values())).sum()


TINY = dict(temperature=1.0, gamma2=100.0, lambda1=0.035, lambda2=35.0, lambda3=20.0)  # 1.3
EVERY_TERM = dict(
    temperature=3.0, peer_temperature=2.0, gamma1=0.8, gamma2=0.6, lambda1=0.7, lambda2=1.3,
    lambda3=0.4,
)  # fmt: skip

LOSSES: dict[str, Callable[..., Tensor]] = {
    "standard": standard_loss,
    "pgd-at": pgd_at_loss,
    "trades": trades_loss,
    "ard": ard_loss,
    "rslad": rslad_loss,
    "adaad": adaad_loss,
    "peeraid": peeraid_loss,
}

LOSS_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "standard": [{}],
    "pgd-at": [{}, dict(extra_clean_forward=True)],
    "trades": [{}, dict(beta=6.0), dict(beta=1.5), dict(beta=0.0)],
    "ard": [{}] + [dict(alpha=a, temperature=t) for a in (1.0, 0.7, 0.0) for t in (30.0, 4.0)],
    "rslad": [{}, dict(weight=1.0), dict(weight=0.3, adversarial_share=0.5)],
    "adaad": [{}]
    + [dict(alpha=a, reduction=r) for a in (1.0, 0.6) for r in ("mean", "batchmean")],
    "peeraid": [
        {},
        dict(gamma2=1.0),
        TINY,
        EVERY_TERM,
        EVERY_TERM | dict(detach_student=True),
        EVERY_TERM | dict(detach_clean=True),
        EVERY_TERM | dict(detach_student=True, detach_clean=True),
    ],
}


# ------------------------------------------------------------------ transcriptions: crafting
# An objective takes the networks (modes already set) and the batch and returns the function of
# x~ that the attack maximizes. Whatever it computes before that is fixed for all steps.

Objective = Callable[[Tensor], Tensor]


def label_objective(nets: Nets, x: Tensor, y: Tensor) -> Objective:
    """Sections 2.1, 2.3 and 5.1, PGD-AT and ARD: CE(S(x~), y)."""
    return lambda z: cross_entropy(nets["student"](z), y)


def _towards(target: Tensor, student: nn.Module) -> Objective:
    return lambda z: kl_batchmean(target, student(z))


def trades_objective(nets: Nets, x: Tensor, y: Tensor) -> Objective:
    """Sections 2.2 and 5.1: KL(S(x) || S(x~)), fixed target."""
    return _towards(nets["student"](x).detach(), nets["student"])


def rslad_objective(nets: Nets, x: Tensor, y: Tensor) -> Objective:
    """Sections 2.4 and 5.1: KL(T(x) || S(x~)), fixed target."""
    return _towards(nets["teacher"](x), nets["student"])


def adaad_objective(nets: Nets, x: Tensor, y: Tensor) -> Objective:
    """Sections 2.5 and 5.1: KL(T(x~) || S(x~)), recomputed, gradient through the teacher too."""
    return lambda z: kl_batchmean(nets["teacher"](z), nets["student"](z))


def peeraid_objective(nets: Nets, x: Tensor, y: Tensor) -> Objective:
    """Section 1.2, steps 2 and 3: KL(P(x) || S(x~)) at temperature 1, P in eval mode, fixed."""
    return _towards(nets["peer"](x).detach(), nets["student"])


CRAFTS: dict[str, Callable[[Nets, Tensor, Tensor], Objective] | None] = {
    "standard": None,  # no attack
    "pgd-at": label_objective,
    "ard": label_objective,
    "trades": trades_objective,
    "rslad": rslad_objective,
    "adaad": adaad_objective,
    "peeraid": peeraid_objective,
}
ADVERSARIAL = [name for name, craft in CRAFTS.items() if craft is not None]


def sign_pgd(
    name: str,
    nets: Nets,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    mode: str,
    steps: int = 10,
    step_size: float = 2 / 255,
) -> Tensor:
    """Section 1.2, step 3, and 5.1: x~ <- clamp(proj(x~ + step sign(grad)), 0, 1), last iterate.

    Only the student can be attacked in train mode; peer and teacher are in eval mode (1.2, 2.5).
    """
    for key, net in nets.items():
        net.train(key == "student" and mode == "train")
    make_objective = CRAFTS[name]
    assert make_objective is not None
    objective = make_objective(nets, x, y)
    x_adv = start
    for _ in range(steps):
        z = x_adv.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(z), z)
        z = z.detach() + step_size * grad.sign()
        z = torch.minimum(torch.maximum(z, x - EPS), x + EPS)
        x_adv = z.clamp(0, 1)
    return x_adv


def normal_start(x: Tensor) -> Tensor:
    """Section 1.2, step 3: x + 0.001 N(0, I), neither clamped nor projected."""
    return x + 0.001 * torch.randn_like(x)


# ------------------------------------------------------------------ coverage


def test_every_built_in_defense_has_a_transcription() -> None:
    built_in = {e.name for e in DEFENSES if e.value.__module__.startswith("robench.defenses")}
    assert set(LOSSES) == set(LOSS_OPTIONS) == set(CRAFTS) == set(BN_UPDATES) == built_in


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_networks_of_a_defense(name: str) -> None:
    defense = make_defense(name, THREAT)
    trained = ("student", "peer") if name == "peeraid" else ("student",)
    given_nets = {"teacher"} if name in ("ard", "rslad", "adaad") else set()
    assert tuple(defense.trained) == trained
    assert set(defense.given) == given_nets


# ------------------------------------------------------------------ 1. losses


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, cases in LOSS_OPTIONS.items() for options in cases],
    ids=lambda value: value if isinstance(value, str) else
    ",".join(f"{k}={v}" for k, v in value.items()) or "defaults",
)  # fmt: skip
def test_loss_gradients_and_running_statistics(
    name: str, options: dict[str, Any], classes: int
) -> None:
    defense, nets, (x, x_adv, y) = setup(name, classes, **options)
    mine = copy.deepcopy(nets)
    batch = [t.clone() for t in (x, x_adv, y)]
    givens = {key: snapshot(nets[key]) for key in defense.given}

    losses = defense.loss(nets, x, x_adv, y)
    want = LOSSES[name](mine, x, x_adv, y, **options)

    assert losses.total.shape == ()
    assert_close(losses.total, want, "total")
    for key in defense.trained:
        got_grads, want_grads = grads_of(losses.total, nets[key]), grads_of(want, mine[key])
        assert norm(want_grads) > 0
        assert_grads_close(got_grads, want_grads, key)
        assert_buffers_close(nets[key], mine[key], key)
        assert all(m.training for m in nets[key].modules())
    for key, before in givens.items():
        assert_bit_identical(nets[key], before)
        assert not any(m.training for m in nets[key].modules())
    assert all(map(torch.equal, (x, x_adv, y), batch))


def test_pgd_at_extra_clean_forward_only_moves_the_running_statistics() -> None:
    """Section 2.1, Rice: a clean forward in train mode after the optimizer step."""
    defense, nets, (x, x_adv, y) = setup("pgd-at", extra_clean_forward=True)
    student, mine = nets["student"], copy.deepcopy(nets["student"])
    losses = defense.loss(nets, x, x_adv, y)
    losses.total.backward()
    grads = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
    params = {key: p.detach().clone() for key, p in student.named_parameters()}
    with torch.no_grad():
        defense.after_step(nets, x, y, losses)
    mine(x_adv)
    mine(x)
    assert_buffers_close(student, mine, "student")
    for key, param in student.named_parameters():
        assert torch.equal(param, params[key])
        assert param.grad is not None and torch.equal(param.grad, grads[key])


# ------------------------------------------------------------------ 2. batch-norm updates

# Updates of (student, peer) by craft + loss + after_step at 10 steps, sections 1.2 and 2.
BN_UPDATES: dict[str, list[tuple[dict[str, Any], dict[str, int]]]] = {
    "standard": [({}, {"student": 1})],
    "pgd-at": [
        ({}, {"student": 1}),
        (dict(extra_clean_forward=True), {"student": 2}),
        (dict(craft_mode="train"), {"student": 11}),
        (dict(craft_mode="train", extra_clean_forward=True), {"student": 12}),
    ],
    "trades": [({}, {"student": 3})],
    "ard": [
        ({}, {"student": 12}),
        (dict(alpha=0.5), {"student": 12}),
        (dict(steps=4), {"student": 6}),
        (dict(craft_mode="eval"), {"student": 2}),
    ],
    "rslad": [({}, {"student": 2}), (dict(craft_mode="train"), {"student": 12})],
    "adaad": [
        ({}, {"student": 2}),
        (dict(alpha=0.5), {"student": 2}),
        (dict(craft_mode="train"), {"student": 12}),
    ],
    "peeraid": [
        ({}, {"student": 3, "peer": 1}),
        (EVERY_TERM, {"student": 3, "peer": 1}),
        (dict(detach_student=True, detach_clean=True), {"student": 3, "peer": 1}),
        (dict(lambda2=0.0, lambda3=0.0, lambda1=1.0), {"student": 3, "peer": 1}),
        (dict(craft_mode="train"), {"student": 13, "peer": 1}),
    ],
}


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [(name, *case) for name, cases in BN_UPDATES.items() for case in cases],
)
def test_batch_norm_updates_of_one_step(
    name: str, options: dict[str, Any], counts: dict[str, int]
) -> None:
    defense, nets, (x, _, y) = setup(name, **options)
    x_adv = defense.craft(nets, x, y)
    losses = defense.loss(nets, x, x_adv, y)
    losses.total.backward()
    defense.after_step(nets, x, y, losses)
    got = {key: bn_updates(net) for key, net in nets.items()}
    assert got == counts | {key: 0 for key in defense.given}


# ------------------------------------------------------------------ 3. PeerAiD


def part_sum(parts: Any, prefix: str) -> Tensor:
    chosen = [value for key, value in parts.items() if key.startswith(prefix)]
    assert chosen
    return torch.stack(chosen).sum()


@pytest.mark.parametrize("options", [{}, dict(gamma2=1.0), TINY, EVERY_TERM])
def test_peeraid_gradient_routing(options: dict[str, Any]) -> None:
    """Section 1.2: L_peer reaches the student, L_student does not reach the peer."""
    defense, nets, (x, x_adv, y) = setup("peeraid", **options)
    mine = copy.deepcopy(nets)
    losses = defense.loss(nets, x, x_adv, y)
    want = peeraid_terms(mine, x, x_adv, y, **options)
    assert losses.parts.keys() == want.keys()
    for key in want:
        assert_close(losses.parts[key], want[key], key)
    assert_close(losses.total, torch.stack(list(losses.parts.values())).sum(), "sum of the parts")

    for prefix in ("peer_", "student_"):
        for net in ("peer", "student"):
            got_grads = grads_of(part_sum(losses.parts, prefix), nets[net])
            want_grads = grads_of(part_sum(want, prefix), mine[net])
            assert_grads_close(got_grads, want_grads, f"{prefix} into {net}")
            assert (norm(got_grads) > 0) == ((prefix, net) != ("student_", "peer"))


def test_peer_loss_into_the_student_by_hand() -> None:
    """Section 5.4: d KLm / d target logit = q (log q - log p - KL_i) / (B C)."""
    options: dict[str, Any] = dict(gamma2=0.7, peer_temperature=2.0)
    defense, nets, (x, x_adv, y) = setup("peeraid", **options)
    mine = copy.deepcopy(nets)
    parts = defense.loss(nets, x, x_adv, y).parts
    target, logits = mine["student"](x_adv), mine["peer"](x_adv)
    log_q = torch.log_softmax(target.detach() / 2, 1)
    log_p = torch.log_softmax(logits.detach() / 2, 1)
    kl = (log_q.exp() * (log_q - log_p)).sum(1, keepdim=True)
    by_hand = 0.7 * 2**2 * log_q.exp() * (log_q - log_p - kl) / (8 * 10) / 2
    want = grads_of((target * by_hand).sum(), mine["student"])
    assert_grads_close(grads_of(part_sum(parts, "peer_"), nets["student"]), want, "by hand")


def test_peeraid_detach_student_cuts_the_peer_loss_off_the_student() -> None:
    defense, nets, (x, x_adv, y) = setup("peeraid", **EVERY_TERM, detach_student=True)
    parts = defense.loss(nets, x, x_adv, y).parts
    assert norm(grads_of(part_sum(parts, "peer_"), nets["student"])) == 0
    assert norm(grads_of(part_sum(parts, "peer_"), nets["peer"])) > 0


@pytest.mark.parametrize(
    ("classes", "options", "weights"),
    [
        (10, {}, (1, 0.01, 0, 2.5, 2.5)),
        (100, dict(gamma2=1.0), (1, 0.01, 0, 0.25, 0.25)),
        (200, TINY, (1, 0.5, 0.035, 0.175, 0.10)),
    ],
    ids=["cifar10", "cifar100", "tinyimagenet"],
)
def test_peeraid_effective_weights(
    classes: int, options: dict[str, Any], weights: tuple[float, ...]
) -> None:
    """The second table of section 1.3: what multiplies each term in batchmean form."""
    defense, nets, (x, x_adv, y) = setup("peeraid", classes, **options)
    mine = copy.deepcopy(nets)
    parts = defense.loss(nets, x, x_adv, y).parts
    adv, clean, peer = mine["student"](x_adv), mine["student"](x), mine["peer"](x_adv)
    t = options.get("temperature", 5.0)
    forms = {
        "peer_ce": cross_entropy(peer, y),
        "peer_kl": kl_batchmean(adv, peer),
        "student_ce": cross_entropy(adv, y),
        "student_kl": kl_batchmean(peer, adv, t),
        "student_self": kl_batchmean(clean, adv, t),
    }
    got = [float((parts[key] / form).detach()) for key, form in forms.items()]
    assert got == pytest.approx(weights, rel=1e-7, abs=1e-12)


# ------------------------------------------------------------------ 4. crafting

# (name, options for make_defense, start in words, mode). For uniform starts see further down.
CRAFT_CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("pgd-at", dict(start="none"), "none", "eval"),
    ("pgd-at", dict(start="none", craft_mode="train"), "none", "train"),
    ("ard", dict(start="none"), "none", "train"),
    ("ard", dict(start="none", craft_mode="eval"), "none", "eval"),
    ("trades", {}, "normal", "eval"),
    ("trades", dict(steps=1), "normal", "eval"),
    ("trades", dict(clamp_start=True), "clamped", "eval"),
    ("rslad", {}, "normal", "eval"),
    ("rslad", dict(start="none", craft_mode="train"), "none", "train"),
    ("adaad", {}, "normal", "eval"),
    ("adaad", dict(craft_mode="train"), "normal", "train"),
    ("adaad", dict(reduction="batchmean", alpha=0.5), "normal", "eval"),
    ("peeraid", {}, "normal", "eval"),
    ("peeraid", dict(temperature=2.0, peer_temperature=3.0), "normal", "eval"),
    ("peeraid", dict(craft_mode="train"), "normal", "train"),
    ("peeraid", dict(steps=3, step_size=1 / 255), "normal", "eval"),
]


def assert_valid(x_adv: Tensor, x: Tensor) -> None:
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert not x_adv.requires_grad and x_adv.grad_fn is None
    assert float((x_adv - x).abs().max()) <= EPS + 1e-12
    assert float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(("name", "options", "start", "mode"), CRAFT_CASES)
def test_craft_maximizes_what_it_should(
    name: str, options: dict[str, Any], start: str, mode: str, classes: int
) -> None:
    defense, nets, (x, _, y) = setup(name, classes, **options)
    mine, modes = copy.deepcopy(nets), {key: net.training for key, net in nets.items()}

    torch.manual_seed(7)
    got = defense.craft(nets, x, y)
    torch.manual_seed(7)
    x_start = x if start == "none" else normal_start(x)
    x_start = x_start.clamp(0, 1) if start == "clamped" else x_start
    schedule = {key: options[key] for key in ("steps", "step_size") if key in options}
    want = sign_pgd(name, mine, x, y, x_start, mode, **schedule)

    assert_valid(got, x)
    assert float((got - x).abs().max()) > 0
    assert float((got - want).abs().max()) <= 1e-9
    for key in nets:
        assert_buffers_close(nets[key], mine[key], key)  # train mode updates, eval mode does not
        assert nets[key].training == modes[key]


@pytest.mark.parametrize("name", ["pgd-at", "ard"])
def test_craft_from_a_uniform_start(name: str) -> None:
    """The default start of sections 2.1 and 2.3, seen as the first input of the student."""
    defense, nets, (x, _, y) = setup(name)
    mine = copy.deepcopy(nets)
    seen: list[Tensor] = []
    hook = nets["student"].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach().clone())
    )
    got = defense.craft(nets, x, y)
    hook.remove()

    x_start = seen[0]
    assert len(seen) in (10, 11)  # the last iterate needs no forward
    assert float((x_start - x).abs().max()) <= EPS + 1e-12
    outside = float(torch.maximum(-x_start, x_start - 1).max())
    assert (outside > 0) == (name == "ard")  # PGD-AT clamps its start, ARD does not
    noise = (x_start - x)[(x > EPS) & (x < 1 - EPS)].sort().values
    empirical = torch.linspace(0, 1, len(noise), dtype=torch.float64)
    assert float((empirical - (noise / EPS + 1) / 2).abs().max()) < 0.08  # Kolmogorov-Smirnov
    mode = "train" if name == "ard" else "eval"
    assert_valid(got, x)
    assert float((got - sign_pgd(name, mine, x, y, x_start, mode)).abs().max()) <= 1e-9


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_craft_leaves_no_trace_on_the_networks(name: str, mode: str) -> None:
    """Sections 5.1 and 5.4: modes of every module, requires_grad and .grad as before."""
    defense, nets, (x, _, y) = setup(name, craft_mode=mode)
    batch = x.clone(), y.clone()
    for key in defense.trained:
        net = nets[key]
        net.get_submodule("bn2").eval()  # a layer kept in another mode than the rest
        net.get_parameter("conv1.weight").requires_grad_(False)
        net.get_parameter("head.bias").grad = torch.randn_like(net.get_parameter("head.bias"))

    def state(net: nn.Module) -> tuple[Any, ...]:
        return (
            [m.training for m in net.modules()],
            [p.requires_grad for p in net.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        )

    before = {key: state(net) for key, net in nets.items()}
    values = {key: snapshot(net) for key, net in nets.items()}
    x_adv = defense.craft(nets, x, y)

    assert_valid(x_adv, x)
    assert torch.equal(x, batch[0]) and torch.equal(y, batch[1]) and not x.requires_grad
    for key, net in nets.items():
        assert state(net) == before[key], key
        if key == "student" and mode == "train":
            for name_, param in net.named_parameters():
                assert torch.equal(param, values[key][name_])
        else:
            assert_bit_identical(net, values[key])


def test_standard_training_crafts_nothing() -> None:
    defense, nets, (x, _, y) = setup("standard")
    before = snapshot(nets["student"])
    assert torch.equal(defense.craft(nets, x, y), x)
    assert_bit_identical(nets["student"], before)


# ------------------------------------------------------------------ 5. properties for any logits


class TwoLogits(nn.Module):
    """Gives one table of logits for the all-zero images and another for the all-one images."""

    def __init__(self, clean: Tensor, adv: Tensor) -> None:
        super().__init__()
        self.clean, self.adv = nn.Parameter(clean.clone()), nn.Parameter(adv.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.adv if float(x.mean()) > 0.5 else self.clean


def loss_of_logits(
    name: str, student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], **options: Any
) -> tuple[Tensor, Nets]:
    """The total for given logits (clean, adversarial); other: those of the teacher or the peer."""
    defense = make_defense(name, THREAT, **options)
    nets: Nets = {"student": TwoLogits(*student).train()}
    for key in set(defense.trained) - {"student"}:
        nets[key] = TwoLogits(*other).train()
    for key in defense.given:
        nets[key] = TwoLogits(*other).eval().requires_grad_(False)
    rows, classes = student[0].shape
    x = torch.zeros(rows, 3, 2, 2, dtype=student[0].dtype)
    total = defense.loss(nets, x, torch.ones_like(x), torch.arange(rows) % classes).total
    return total, nets


def logits(bound: float) -> st.SearchStrategy[Tensor]:
    value = st.floats(-bound, bound, allow_nan=False)
    table = st.lists(st.lists(value, min_size=4, max_size=4), min_size=3, max_size=3)
    return table.map(lambda rows: torch.tensor(rows, dtype=torch.float64))


def pairs(bound: float) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    return st.tuples(logits(bound), logits(bound))


quick = settings(max_examples=25, deadline=None, derandomize=True)


@quick
@given(student=pairs(30), other=pairs(30), shift=st.floats(-20, 20))
def test_losses_of_any_logits(
    student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], shift: float
) -> None:
    """Reduction (KLm = KLb / C), temperature, sign, zero and shift of the distillation losses."""
    def total(name: str, s: Any = student, o: Any = other, **options: Any) -> float:
        return float(loss_of_logits(name, s, o, **options)[0].detach())

    def near(value: float) -> Any:
        return pytest.approx(value, rel=1e-9, abs=1e-10)

    batchmean = total("adaad", reduction="batchmean", alpha=0.6)
    assert total("adaad", reduction="mean", alpha=0.6) == near(batchmean / 4)
    cooled = [tuple(t / 30 for t in pair) for pair in (student, other)]
    assert total("ard") == near(900 * total("ard", *cooled, temperature=1.0))
    everything = dict(gamma1=0.0, gamma2=1.0, lambda1=0.0)
    for name, options in (("ard", {}), ("rslad", {}), ("adaad", {}), ("peeraid", everything)):
        value = total(name, **options)
        assert value >= -1e-10
        moved = student[0] + shift, student[1] - shift
        assert total(name, s=moved, **options) == near(value)
        same = (student[0], student[0])
        assert total(name, s=same, o=same, **options) == near(0)


@quick
@given(student=pairs(30), other=pairs(30))
def test_adaad_gradient_of_any_logits(
    student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> None:
    """d KLm(p || softmax(z)) / dz = (softmax(z) - p) / (B C)."""
    total, nets = loss_of_logits("adaad", student, other)
    grads = grads_of(total, nets["student"])
    want = (student[1].softmax(1) - other[1].softmax(1)) / 12
    assert float((grads["adv"] - want).abs().max()) <= 1e-12
    assert norm({"clean": grads["clean"]}) == 0


@pytest.mark.parametrize("name", sorted(LOSSES))
@quick
@given(student=pairs(1e4), other=pairs(1e4))
def test_losses_stay_finite_for_extreme_logits(
    name: str, student: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> None:
    """In float32, value and gradients."""
    single = [tuple(t.float() for t in pair) for pair in (student, other)]
    total, nets = loss_of_logits(name, *single)
    assert total.isfinite()
    for net in nets.values():
        if any(p.requires_grad for p in net.parameters()):
            assert all(grad.isfinite().all() for grad in grads_of(total, net).values())
