"""IAD: introspective adversarial distillation, built on ARD (IAD-I) and on AKD2 (IAD-II)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from robench.attacks.ascent import Start
from robench.attacks.base import Mode
from robench.attacks.objectives import ce, kl
from robench.defenses.akd2 import AKD2
from robench.defenses.base import DEFENSES, Adversarial, Defense, Losses, Moment, Nets, clean_logits

_PAPER = "Zhu et al. 2022, ICLR, arXiv 2106.04928"


@dataclass(frozen=True, kw_only=True)
class _Introspective(Adversarial):
    """What both share: the attack, and how far an image's teacher is trusted.

    Attributes:
        temperature: t of the teachers' terms; the term with the student's own output has none.
        beta: A = T(x_adv)_y^beta is the trust, 1 at beta = 0.
    """

    start: Start = "uniform"
    craft_mode: Mode = "train"
    temperature: float = 1.0
    beta: float = 0.1

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_labels(nets["student"], x, y)

    def _trust(self, teacher: Tensor, y: Tensor) -> Tensor:
        """A (N,), from the teacher's logits (N, K) on adversarial images."""
        return (-self.beta * ce(teacher, y)).exp()

    def _distill(self, target: Tensor, logits: Tensor) -> Tensor:
        """t^2 KL(target/t || logits/t) per image, (N,)."""
        return self.temperature**2 * kl(target, logits, self.temperature)


@DEFENSES.register(
    "iad",
    description="IAD-I: ARD, and the student's own clean output where the teacher is unsure",
    paper=_PAPER,
)
@dataclass(frozen=True, kw_only=True)
class IAD(_Introspective):
    """min mean_i t^2 KL(T(x)/t || s(x_adv)/t) + (1 - A_i) KL(s(x) || s(x_adv)).

    A_i = T(x_adv)_y^beta; s(x) carries gradient. Reduction: batchmean. Before `begin` the second
    term is 0, which is ARD with alpha = 1. Batch-norm updates: one per ascent step, adv, clean.

    Attributes:
        begin: from this epoch on (or share of all epochs). Released: 60 of 200.
    """

    given = {"teacher": "pgd-at"}

    begin: float = 0.3

    def begun(self, now: Moment) -> bool:
        return now.reached(self.begin)

    def at(self, now: Moment) -> Defense:
        return self if now.reached(self.begin) else replace(self, beta=0.0)

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, teacher = nets["student"], nets["teacher"]
        adv = student(x_adv)
        clean = student(x)
        distrust = 1 - self._trust(clean_logits(teacher, x_adv), y)
        return Losses({
            "kl_teacher": self._distill(clean_logits(teacher, x), adv).mean(),
            "kl_self": (distrust * kl(clean, adv)).mean(),
        })


@DEFENSES.register(
    "iad-ii",
    description="IAD-II: AKD2, and the student's own clean output where the teacher is unsure",
    paper=_PAPER,
)
@dataclass(frozen=True, kw_only=True)
class IAD2(_Introspective):
    """min (1 - a - n) CE(s(x_adv), y) + n t^2 KL(N(x_adv)/t || s(x_adv)/t)
    + a t^2 mean_i [A_i KL(T(x_adv)/t || s(x_adv)/t) + (1 - A_i) KL(s(x) || s(x_adv))].

    A_i = T(x_adv)_y^beta; s(x) carries gradient. Reduction: batchmean. Before `begin`: AKD2 with
    these weights. Batch-norm updates: one per ascent step, adv, from `begin` on clean.

    Attributes:
        begin: from this epoch on (or share of all epochs). Released: 40 of 200.
        teacher_weight, natural_weight: a and n.
    """

    given = AKD2.given

    begin: float = 0.2
    teacher_weight: float = 0.5
    natural_weight: float = 0.25

    @property
    def label_weight(self) -> float:
        return 1 - self.teacher_weight - self.natural_weight

    def begun(self, now: Moment) -> bool:
        return now.reached(self.begin)

    def at(self, now: Moment) -> Defense:
        if now.reached(self.begin):
            return self
        shared = (*(f.name for f in fields(Adversarial)),
                  "temperature", "label_weight", "natural_weight", "teacher_weight")
        return AKD2(**{name: getattr(self, name) for name in shared})

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, teacher = nets["student"], clean_logits(nets["teacher"], x_adv)
        adv = student(x_adv)
        clean = student(x)
        trust, scale = self._trust(teacher, y), self.temperature**2
        natural = self._distill(clean_logits(nets["natural"], x_adv), adv)
        return Losses({
            "ce": self.label_weight * self.label_loss(adv, y),
            "natural": self.natural_weight * natural.mean(),
            "teacher": self.teacher_weight * (trust * self._distill(teacher, adv)).mean(),
            "self": self.teacher_weight * scale * ((1 - trust) * kl(clean, adv)).mean(),
        })
