"""Checks of an attack on a network: what other searches find that it did not.

Each check is one function that measures one number; what it means is in `robench.reports.trust`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.ascent import Ascent
from robench.attacks.base import Attack, Classifier, frozen
from robench.attacks.memory import Batches
from robench.attacks.objectives import ce, cw_margin
from robench.attacks.search import Pooled
from robench.attacks.threat import ThreatModel, lengths
from robench.attacks.verify import ABSOLUTE, RELATIVE, full_precision, verify
from robench.benchmark.data import Held, Images
from robench.benchmark.evaluate import Flags, Measurement, Target, measure
from robench.benchmark.models import build_model
from robench.benchmark.spec import AttackSpec
from robench.benchmark.trust.active import active_test
from robench.errors import UsageError
from robench.randomness import seeded
from robench.reports.judge import FALLS
from robench.reports.trust import beyond_luck
from robench.reports.uncertainty import Z95, wilson

QUERIES = 1000  # of Square; AutoAttack has 5000
DRAWS = 100  # of each kind of noise
SOME = 32  # standing images that a longer attack is tried on
PLANTED = 32  # images next to which an example is planted
SURROGATE, EPOCHS = 5000, 4  # training images of the undefended network, and passes over them
LADDER = (0.5, 1.0, 2.0)  # of eps
SEEDS = (0, 1, 2)
FGSM, PGD20 = AttackSpec(name="fgsm"), AttackSpec(name="pgd-20")


class Number(NamedTuple):
    """What a check measured, None where it does not apply, and a remark."""

    value: float | None
    note: str = ""


@dataclass
class Patient:
    """A network, test images, and the attacks that are put to the test.

    Attributes:
        train: of the data set, for a surrogate. classes: their number.
    """

    target: Target
    threat: ThreatModel
    attacks: tuple[AttackSpec, ...]
    train: Images
    classes: int
    seed: int = 0

    @property
    def model(self) -> Classifier:
        return self.target.model

    @property
    def data(self) -> Images:
        return self.target.data

    @property
    def n(self) -> int:
        return len(self.data)

    @cached_property
    def measured(self) -> list[Measurement]:
        """Each attack on all images, its examples kept if it is one of robench's."""
        return [measure(self.target, spec, self.threat, seed=self.seed,
                        keep=isinstance(spec.build(self.threat), Pooled)) for spec in self.attacks]

    @cached_property
    def standing(self) -> Flags:
        """(N,) right, and not fooled by any of the attacks."""
        stands: Flags = np.logical_and.reduce([m.robust for m in self.measured])
        return stands

    def survives(
        self, spec: AttackSpec, threat: ThreatModel | None = None, seed: int | None = None,
        among: Flags | None = None,
    ) -> Flags:
        """(N,) right and not fooled by another attack; of those in `among`, others are False."""
        chosen = self.target.correct if among is None else among
        found = np.zeros(self.n, dtype=bool)
        if chosen.any():
            part = Target(self.model, self.data.select(torch.from_numpy(chosen)))
            found[chosen] = measure(part, spec, threat or self.threat,
                                    seed=self.seed if seed is None else seed).robust
        return found

    @cached_property
    def fgsm(self) -> Flags:
        return self.survives(FGSM)

    @cached_property
    def pgd(self) -> Flags:
        return self.survives(PGD20)

    def broken(self, chosen: Flags, craft: Callable[[Tensor, Tensor], Tensor]) -> Flags:
        """(N,) which of the chosen images fall to the examples that `craft` makes of (x, y)."""
        found = np.zeros(self.n, dtype=bool)
        if chosen.any():
            x, y = self.on_device(self.data.select(torch.from_numpy(chosen)))
            x_adv = Batches(len(x))(craft, x, y)
            found[chosen] = verify(self.model, x, x_adv, y, self.threat).fooled.cpu().numpy()
        return found

    def on_device(self, images: Images) -> tuple[Tensor, Tensor]:
        held = images.to(self.target.device).held()
        return held.x, held.y


def _share(flags: Flags) -> float:
    return float(flags.mean())


def masking(p: Patient) -> Number:
    """Square on what stands."""
    spec = AttackSpec(name="square", options={"queries": QUERIES})
    fell = p.standing & ~p.survives(spec, among=p.standing)
    return Number(beyond_luck(int(fell.sum()), p.n))


def transfer(p: Patient) -> Number:
    """Examples of a small network that was trained without any defense."""
    surrogate = _surrogate(p)
    # To the last step: what barely fools one network does not fool another.
    ascent = Ascent(p.threat, 20, p.threat.eps / 8)

    def craft(x: Tensor, y: Tensor) -> Tensor:
        with frozen(surrogate):
            return ascent.maximize(lambda z: ce(surrogate(z), y), x)

    with seeded(p.seed, "doctor", "transfer"):
        broken = p.broken(p.standing, craft)
    right = Target(surrogate, p.data).correct.mean()
    return Number(_share(broken), f"the other network is right on {right:.0%}")


def _surrogate(p: Patient) -> nn.Module:
    """A few epochs of Adam on the cross-entropy."""
    x, y = p.on_device(p.train.take(min(SURROGATE, len(p.train))))
    with seeded(p.seed, "doctor", "surrogate"):
        net = build_model("smallcnn", classes=p.classes, channels=x.shape[1],
                          size=x.shape[2]).to(x.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(EPOCHS):
            for rows in torch.split(torch.randperm(len(x), device=x.device), 128):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x[rows]), y[rows])
                torch.autograd.backward(loss)
                optimizer.step()
    return net.eval()


def noise(p: Patient) -> Number:
    """Uniform in the ball, normal, and at its corners."""
    threat, left = p.threat, p.standing.copy()

    def uniform(x: Tensor, y: Tensor) -> Tensor:
        return threat.sample(x)

    def normal(x: Tensor, y: Tensor) -> Tensor:
        way = torch.randn_like(x)
        length = 1 if threat.norm == "Linf" else lengths(threat.norm, way.flatten(1)).view(
            -1, 1, 1, 1)
        return threat.project(x + threat.eps * way / length, x)

    def corner(x: Tensor, y: Tensor) -> Tensor:
        way = torch.randn_like(x).sign()
        return threat.project(x + threat.eps * way / lengths(
            threat.norm, way.flatten(1)).view(-1, 1, 1, 1), x)

    with seeded(p.seed, "doctor", "noise"):
        for _ in range(DRAWS):
            for draw in (uniform, normal, corner):
                left &= ~p.broken(left, draw)
    return Number(_share(p.standing & ~left))


def iter_single(p: Patient) -> Number:
    """PGD-20 against FGSM."""
    return Number(beyond_luck(int(p.pgd.sum()) - int(p.fgsm.sum()), p.n),
                  f"FGSM {_share(p.fgsm):.1%}, PGD-20 {_share(p.pgd):.1%}")


def monotone_eps(p: Patient) -> Number:
    """PGD-20 at half, once and twice eps; images that fell must not rise again."""
    ladder = [p.threat.scaled(factor) for factor in LADDER
              if p.threat.norm != "Linf" or p.threat.eps * factor <= 1]
    stands = [p.survives(PGD20, threat) for threat in ladder]
    risen = [beyond_luck(int((high & ~low).sum()), p.n)
             for low, high in zip(stands, stands[1:], strict=False)]
    return Number(max(risen, default=0.0), ", ".join(
        f"{_share(s):.1%} at {t}" for s, t in zip(stands, ladder, strict=True)))


def eps_to_all(p: Patient) -> Number:
    """PGD-20 where every image may become any grey one."""
    pixels = p.data.x.shape[1:].numel()
    reach = {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": float(pixels)}[p.threat.norm]
    left = _share(p.survives(PGD20, replace(p.threat, eps=reach / 2)))
    return Number(left * p.classes, f"robust accuracy {left:.1%}")


def steps_converged(p: Patient) -> Number:
    """The same attacks, twice as long and five times, on some of what stands."""
    first = p.standing & (p.standing.cumsum() <= SOME)
    left, tried = first, 0
    for spec in p.attacks:
        longer = _longer(spec, p.threat)
        if longer is not None:
            left, tried = p.survives(longer, among=left), tried + 1
    if not tried:
        return Number(None, "these attacks have no steps and restarts to add")
    broken, looked = int((first & ~left).sum()), int(first.sum())
    return Number(_share(p.standing) * broken / max(looked, 1),
                  f"{broken} of the {looked} images looked at")


def _longer(spec: AttackSpec, threat: ThreatModel) -> AttackSpec | None:
    made = spec.build(threat)
    steps, restarts = getattr(made, "steps", None), getattr(made, "restarts", None)
    if steps is None or restarts is None:
        return None
    options = {**spec.options, "steps": 2 * steps, "restarts": 5 * restarts}
    longer = AttackSpec(name=re.sub(r"-\d+$", "", spec.name), options=options)
    try:
        longer.build(threat)
    except UsageError:  # fgsm has no more
        return None
    return longer


def loss_plateau(p: Patient) -> Number:
    """50 steps of PGD on the margin; the best so far, as Pintor et al. 2022 smooth it."""
    x, y = p.on_device(p.data.select(torch.from_numpy(p.target.correct)))
    if not len(x):
        return Number(None, "no image is right")

    def growing(x: Tensor, y: Tensor) -> Tensor:
        values: list[Tensor] = []

        def watched(z: Tensor) -> Tensor:
            value = cw_margin(p.model(z), y)
            values.append(value.detach())
            return value

        Ascent(p.threat, 50, p.threat.eps / 10).maximize(watched, x)
        best = torch.stack(values).cummax(0).values
        return best[-1] - best[-11] > 0.05 * (best[-1] - best[0])

    with seeded(p.seed, "doctor", "plateau"), frozen(p.model), full_precision():
        return Number(float(Batches(len(x))(growing, x, y).float().mean()))


def silent_success(p: Patient) -> Number:
    """Each attack on a network that remembers what it was shown; the worst of them counts."""
    x, y = p.on_device(p.data.take(min(PLANTED, p.n)))

    def silent(attack: Attack, x: Tensor, y: Tensor) -> Tensor:
        met = torch.zeros_like(y, dtype=torch.bool)

        def remembers(z: Tensor) -> Tensor:
            logits = p.model(z)
            shown = z.detach().to(x)
            distance = torch.stack([p.threat.distance(shown, one) for one in x], 1)
            near, row = distance.min(1)
            near_enough = near <= p.threat.eps * (1 + RELATIVE) + ABSOLUTE
            inside = near_enough & ((shown >= 0) & (shown <= 1)).flatten(1).all(1)
            met[row[inside & (logits.argmax(1) != y[row])]] = True
            return logits

        x_adv = attack(remembers, x, y)
        return met & ~verify(p.model, x, x_adv, y, p.threat).fooled

    shares = {}
    for spec in p.attacks:
        with seeded(p.seed, "doctor", "silent"), frozen(p.model), full_precision():
            kept = Batches(len(x))(partial(silent, spec.build(p.threat)), x, y)
        shares[spec.label] = float(kept.float().mean())
    return Number(max(shares.values()), ", ".join(
        f"{share:.1%} by {name}" for name, share in shares.items() if share))


def outside(p: Patient) -> Number:
    """Claimed examples that were not counted."""
    return Number(float(sum(m.violations for m in p.measured)))


def eight_bit(p: Patient) -> Number:
    """The examples of all attacks, rounded to 255 steps; both numbers of the constraint apart."""
    fooled, inside, found = 0, 0, 0
    for m in p.measured:
        if m.examples is not None and len(m.examples[0]):
            rows, x_adv = m.examples
            x, y = p.on_device(p.data.select(rows))
            rounded = (x_adv.to(x) * 255).round() / 255
            verdict = verify(p.model, x, rounded, y, p.threat)
            found, fooled = found + len(rows), fooled + int(verdict.fooled.sum())
            inside += int((~verdict.outside).sum())
    if not found:
        return Number(None, "no example was kept")
    return Number(1 - fooled / found, f"of {found} examples {inside} are inside after rounding, "
                  f"and {fooled} of these still fool")


def seed_spread(p: Patient) -> Number:
    """All attacks together, with three seeds."""
    counts = [int(p.standing.sum())]
    for k in SEEDS[1:]:
        left = p.target.correct
        for spec in p.attacks:
            left = p.survives(spec, seed=p.seed + k, among=left)
        counts.append(int(left.sum()))
    return Number(beyond_luck(max(counts) - min(counts), p.n),
                  ", ".join(f"{count / p.n:.1%}" for count in counts))


def active(p: Patient) -> Number:
    """Planted examples, see `robench.benchmark.trust.active`: what all attacks together find."""
    images = p.data.select(torch.from_numpy(p.target.correct))
    if not len(images):
        return Number(None, "no image is right")
    x, y = p.on_device(images.take(min(PLANTED, len(images))))
    made: dict[str, Attack] = {spec.label: spec.build(p.threat) for spec in p.attacks}
    with seeded(p.seed, "doctor", "active"):
        outcome = active_test(p.model, Held(x, y), made, p.threat)
    if not outcome.valid:
        return Number(None, str(outcome))
    return Number(wilson(outcome.missed / outcome.tests, outcome.tests)[0], str(outcome))


def overfit_gap(p: Patient) -> Number:
    """PGD-20 on as many training images."""
    train = Target(p.model, p.train.take(min(p.n, len(p.train))))
    robust = _share(measure(train, PGD20, p.threat, seed=p.seed).robust)
    return Number(robust - _share(p.pgd), f"train {robust:.1%}, test {_share(p.pgd):.1%}")


def catastrophic(p: Patient) -> Number:
    """FGSM is withstood and PGD-20 is not."""
    right = max(int(p.target.correct.sum()), 1)
    collapsed = p.pgd.sum() < FALLS * right
    return Number(float(p.fgsm.sum() / right) if collapsed else 0.0)


def uncertainty(p: Patient) -> Number:
    """Wilson's interval for what stands."""
    low, high = wilson(_share(p.standing), p.n)
    return Number((high - low) / 2, f"{_share(p.standing):.1%} stand, 95 % interval "
                  f"{low:.1%} to {high:.1%} (z = {Z95:.2f}, {p.n} images)")


OUTCOMES: dict[str, Callable[[Patient], Number]] = {
    "masking": masking, "transfer<=whitebox": transfer, "noise": noise,
    "iter>=single": iter_single, "monotone-eps": monotone_eps, "eps->100%": eps_to_all,
    "steps-converged": steps_converged, "loss-plateau": loss_plateau,
    "silent-success": silent_success, "outside": outside, "eight-bit": eight_bit,
    "seed-spread": seed_spread, "active-test": active, "overfit-gap": overfit_gap,
    "catastrophic-overfitting": catastrophic, "uncertainty": uncertainty,
}
