"""PeerAiD: improving adversarial distillation from a specialized peer tutor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robench.attacks.objectives import kl
from robench.defenses.base import (
    DEFENSES,
    Adversarial,
    Losses,
    Nets,
    clean_logits,
    mean_over_classes,
)


@DEFENSES.register(
    "peeraid",
    description="a peer learns online, with the student, to defend against the student's attacks",
    paper="Jung et al. 2024, CVPR, arXiv 2403.06668",
)
@dataclass(frozen=True, kw_only=True)
class PeerAiD(Adversarial):
    """Student s and peer p train together from scratch; one backward, two optimizers.

    Craft:   x_adv maximizes KL(p(x) || s(x')), p in eval mode; only the student is attacked.
    Peer:    gamma1 CE(p(x_adv), y) + gamma2 tp^2 KL(s(x_adv)/tp || p(x_adv)/tp)
    Student: lambda1 CE(s(x_adv), y) + lambda2 t^2 KL(p(x_adv)/t || s(x_adv)/t)
             + lambda3 t^2 KL(s(x)/t || s(x_adv)/t)

    Reduction: mean over batch and classes, as released. The peer's loss sends gradient into the
    student (its target is not detached); the student's sends none into the peer. On CIFAR
    lambda1 is 0: only the peer ever sees a label. Batch-norm updates: peer adv; student adv,
    adv, clean, since the released code forwards x_adv through the student once per loss.

    Attributes:
        temperature: t of the student's loss. peer_temperature: tp of the peer's.
        gamma1, gamma2, lambda1, lambda2, lambda3: weights of the terms; defaults: CIFAR-10.
        detach_student: cut the gradient of the peer's loss into the student.
        detach_clean: cut the gradient of the lambda3 term into s(x).
    """

    trained = ("student", "peer")

    temperature: float = 5.0
    peer_temperature: float = 1.0
    gamma1: float = 1.0
    gamma2: float = 0.1
    lambda1: float = 0.0
    lambda2: float = 1.0
    lambda3: float = 1.0
    detach_student: bool = False
    detach_clean: bool = False

    def craft(self, nets: Nets, x: Tensor, y: Tensor) -> Tensor:
        return self.attack_target(nets["student"], x, clean_logits(nets["peer"], x))

    def loss(self, nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        student, peer = nets["student"], nets["peer"]
        peer_adv = peer(x_adv)
        for_peer = student(x_adv)
        peer_parts = {
            "peer_ce": self.gamma1 * self.label_loss(peer_adv, y),
            "peer_kl": self.gamma2 * self._kl(
                for_peer.detach() if self.detach_student else for_peer,
                peer_adv,
                self.peer_temperature,
            ),
        }
        adv = student(x_adv)
        clean = student(x)
        student_parts = {
            "student_ce": self.lambda1 * self.label_loss(adv, y),
            "student_kl": self.lambda2 * self._kl(peer_adv.detach(), adv, self.temperature),
            "student_self": self.lambda3 * self._kl(
                clean.detach() if self.detach_clean else clean, adv, self.temperature
            ),
        }
        return Losses(peer_parts | student_parts)

    @staticmethod
    def _kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
        divergence = kl(target, logits, temperature)
        return temperature**2 * mean_over_classes(divergence, logits)
