"""The outer losses, transcribed a second time from the methods specification.

Written from METHODS.md, whose sections the docstrings cite, without a look at robench.defenses,
in plain torch and with explicit sums. The defaults are its CIFAR-10 settings.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robench.defenses import Moment

from .formulas import cross_entropy, kl_batchmean, kl_mean, kl_rows, of_label, soft_cross_entropy
from .networks import NOW, Nets

# Each takes (nets, x, x_adv, y, options) and returns the total; the order of its forwards is
# the order of the batch-norm updates, where the specification tells one.


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
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, temperature: float = 30.0, alpha: float = 1.0
) -> Tensor:
    """Section 2.3: alpha tau^2 KLm(T(x)/tau || S(x*)/tau) + (1 - alpha) CE(S(x), y); adv, clean."""
    adv, clean = nets["student"](x_adv), nets["student"](x)
    distill = temperature**2 * kl_mean(nets["teacher"](x), adv, temperature)
    return alpha * distill + (1 - alpha) * cross_entropy(clean, y)


def rslad_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    weight: float = 0.1, adversarial_share: float = 5 / 6,
) -> Tensor:
    """Section 2.4: 0.1 (5/6 KLb(T(x) || S(x*)) + 1/6 KLb(T(x) || S(x))); adv, clean."""
    target = nets["teacher"](x)
    adv, clean = nets["student"](x_adv), nets["student"](x)
    share = adversarial_share
    return weight * (share * kl_batchmean(target, adv) + (1 - share) * kl_batchmean(target, clean))


def adaad_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, alpha: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Section 2.5: alpha KL(T(x*) || S(x*)) + (1 - alpha) KL(T(x) || S(x)); clean, adv."""
    kl = {"mean": kl_mean, "batchmean": kl_batchmean}[reduction]
    teacher, student = nets["teacher"], nets["student"]
    clean, adv = student(x), student(x_adv)
    return alpha * kl(teacher(x_adv), adv) + (1 - alpha) * kl(teacher(x), clean)


def mart_loss(nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, beta: float = 5.0) -> Tensor:
    """Section 2.6: BCE + beta mean_i[KL_i (1.0000001 - S(x)_y)]; nothing detached; clean, adv."""
    clean, adv = nets["student"](x), nets["student"](x_adv)
    p, q = torch.softmax(clean, 1), torch.softmax(adv, 1)
    rows, tiny = torch.arange(len(y)), 1e-12
    wrong = q.detach().clone()
    wrong[rows, y] = -1
    wrong_class = wrong.argmax(1)
    nll = -(1.0001 - q[rows, wrong_class] + tiny).log()
    kl = (p * ((p + tiny).log() - (q + tiny).log())).sum(1)
    weighted = beta * kl * (1.0000001 - p[rows, y])
    return cross_entropy(adv, y) + (nll + weighted).sum() / len(y)


def iad_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    now: Moment = NOW, temperature: float = 1.0, beta: float = 0.1, begin: float = 0.3,
) -> Tensor:
    """Section 2.8: ARD with KLb and alpha 1, joined after `begin` by mean (1 - A_i) KL(S||S*)_i."""
    student, teacher = nets["student"], nets["teacher"]
    adv, clean = student(x_adv), student(x)
    distill = temperature**2 * kl_batchmean(teacher(x), adv, temperature)
    if now.epoch < begin * now.epochs:
        return distill
    trust = of_label(teacher(x_adv), y) ** beta
    return distill + ((1 - trust) * kl_rows(clean, adv)).sum() / len(y)


def iad2_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    now: Moment = NOW, temperature: float = 1.0, beta: float = 0.1, begin: float = 0.2,
    teacher_weight: float = 0.5, natural_weight: float = 0.25,
) -> Tensor:
    """Section 2.8, IAD-II: AKD2 until `begin`; then the robust teacher is trusted by A_i."""
    label_weight = 1 - teacher_weight - natural_weight
    if now.epoch < begin * now.epochs:
        return akd2_loss(nets, x, x_adv, y, temperature, label_weight, natural_weight,
                         teacher_weight)  # fmt: skip
    student, target = nets["student"], nets["teacher"](x_adv)
    adv, clean = student(x_adv), student(x)
    trust = of_label(target, y) ** beta
    robust = (trust * kl_rows(target, adv) + (1 - trust) * kl_rows(clean, adv)).sum() / len(y)
    natural = kl_batchmean(nets["natural"](x_adv), adv)
    return (
        label_weight * cross_entropy(adv, y) + teacher_weight * robust + natural_weight * natural
    )


def akd2_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    temperature: float = 2.0, label_weight: float = 0.3, natural_weight: float = 0.1,
    teacher_weight: float = 0.6,
) -> Tensor:
    """Section 2.9: 0.3 CE + 0.1 tau^2 CEsoft(T_std, S) + 0.6 tau^2 CEsoft(T_adv, S), all at x*."""
    adv = nets["student"](x_adv)
    natural, robust = (
        temperature**2 * soft_cross_entropy(nets[name](x_adv), adv, temperature)
        for name in ("natural", "teacher")
    )
    return (
        label_weight * cross_entropy(adv, y) + natural_weight * natural + teacher_weight * robust
    )


def cat_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    beta: float = 6.0, cross_weight: float = 19 / 20,
) -> Tensor:
    """Section 2.10: 1/20 (L1 + L2) + 19/20 L3; cross targets detached, the pairing is not."""
    m1, m2 = nets["student"], nets["peer"]
    x1, x2 = x_adv.chunk(2)
    own1 = trades_loss({"student": m1}, x, x1, y, beta)
    clean2, adv2 = m2(x), m2(x2)
    pairing = (adv2 - clean2).square().sum() / adv2.numel()
    own2 = 0.5 * (cross_entropy(adv2, y) + cross_entropy(clean2, y)) + pairing
    cross = kl_batchmean(m2(x1).detach(), m1(x1)) + kl_batchmean(m1(x2).detach(), adv2)
    return (1 - cross_weight) * (own1 + own2) + cross_weight * cross


def mtard_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    weight: float = 0.1, rate: float = 0.025, natural_share: float = 0.5,
) -> Tensor:
    """Section 2.11: w_a KLm(T_a(x*) || S(x*)) + w_n KLm(T_n(x) || S(x)), x10 for CIFAR-100."""
    robust, natural = mtard_terms(nets, x, x_adv)
    times = {10: 1, 100: 10}[len(nets["student"](x)[0])] * weight / 0.1
    return times * ((1 - natural_share) * robust + natural_share * natural)


def mtard_terms(nets: Nets, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """The robust and the natural KLm, not weighted."""
    student = nets["student"]
    return kl_mean(nets["teacher"](x_adv), student(x_adv)), kl_mean(nets["natural"](x), student(x))


def lbgat_loss(nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    """Section 2.12: MSE(S(x*), N(x)) over logits + CE(N(x), y) + beta KLb(S(x) || S(x*))."""
    clean, adv, natural = nets["student"](x), nets["student"](x_adv), nets["natural"](x)
    guided = (adv - natural).square().sum() / adv.numel()
    return guided + cross_entropy(natural, y) + beta * kl_batchmean(clean, adv)


def hat_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    overshoot: float = 2.0, beta: float = 2.5, gamma: float = 0.5,
) -> Tensor:
    """Section 2.13: CE(S(x), y) + beta KLb(S(x) || S(x*)) + gamma CE(S(x_h), argmax H(x*))."""
    student, y_h = nets["student"], nets["helper"](x_adv).argmax(1)
    clean, adv, far = student(x), student(x_adv), student(x + overshoot * (x_adv - x))
    return (
        cross_entropy(clean, y) + beta * kl_batchmean(clean, adv) + gamma * cross_entropy(far, y_h)
    )


def ikl_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    now: Moment = NOW, alpha: float = 4.0, beta: float = 20.0, class_means: Tensor | None = None,
) -> Tensor:
    """Section 2.14: CE + alpha CEsoft(detach S(x), S(x*)) + beta 1/4 mean_i sum W (dn - da)^2.

    class_means (C, C): a row w_y per class; None: uniform 1/C, as in the first epoch.
    """
    clean, adv = nets["student"](x), nets["student"](x_adv)
    classes = clean.shape[1]
    means = torch.full((classes, classes), 1 / classes, dtype=clean.dtype)
    w = (means if class_means is None else class_means)[y]
    dn, da = (logits[:, :, None] - logits[:, None, :] for logits in (clean, adv))
    pairs = (w[:, :, None] * w[:, None, :] * (dn - da).square()).sum() / len(y) / 4
    return (
        cross_entropy(clean, y) + alpha * soft_cross_entropy(clean.detach(), adv) + beta * pairs
    )


def adr_label(
    nets: Nets,
    x: Tensor,
    y: Tensor,
    now: Moment = NOW,
    temperature_start: float = 2.5,
    temperature_end: float = 2.0,
    trust_start: float = 0.7,
    trust_end: float = 0.95,
    **_: Any,
) -> Tensor:
    """Section 2.16: lambda_i p_ema(x; temp) + (1 - lambda_i) onehot; cosine per iteration."""
    share = (now.epoch + now.step / now.steps) / now.epochs
    fall = (1 + math.cos(math.pi * share)) / 2  # from 1 to 0
    temperature = temperature_end + (temperature_start - temperature_end) * fall
    logits = nets["ema"](x) / temperature
    p = torch.softmax(logits, 1)
    trust = trust_end + (trust_start - trust_end) * fall - (p.amax(1) - of_label(logits, y))
    trust = trust.clamp(0, 1)[:, None]
    return trust * p + (1 - trust) * torch.eye(p.shape[1], dtype=p.dtype)[y]


def adr_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    loss_kind: str = "pgd", beta: float = 6.0, **options: Any,
) -> Tensor:
    """Section 2.16: PGD-AT or TRADES with the rectified label."""
    label, adv = adr_label(nets, x, y, **options), nets["student"](x_adv)
    if loss_kind == "pgd":
        return -(label * torch.log_softmax(adv, 1)).sum() / len(y)
    clean = nets["student"](x)
    return -(label * torch.log_softmax(clean, 1)).sum() / len(y) + beta * kl_batchmean(clean, adv)


def gradient_matching(nets: Nets, x: Tensor, x_adv: Tensor) -> Tensor:
    """Section 2.17: KL(softmax(T(x+d) - T(x-d)) || softmax(S(x+d) - S(x-d)))_i, d = x* - x."""
    target, student = (
        net(x_adv) - net(x - (x_adv - x)) for net in (nets["teacher"], nets["student"])
    )
    return kl_rows(target, student)


def igdm_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor, now: Moment = NOW, alpha: float = 1.0
) -> Tensor:
    """Section 2.17: KLb(T(x*) || S(x*)) + alpha (epoch / epochs, from 1) times the matching."""
    matched = alpha * (now.epoch + 1) / now.epochs * gradient_matching(nets, x, x_adv)
    return kl_batchmean(nets["teacher"](x_adv), nets["student"](x_adv)) + matched.sum() / len(y)


def saad_loss(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    now: Moment = NOW, correction: float = 1.0, igdm_alpha: float = 1.0,
    entropy_order: float = 1.0, clean_weight: float = 0.0, scale: float = 5.0,
) -> Tensor:
    """Section 2.17: mean_i[w_i (KL_adv + IGDM_i) + beta (1 - w_i / max w) KL_clean]."""
    student, target = nets["student"], nets["teacher"](x_adv)
    p = torch.softmax(target, 1)
    if entropy_order == 1:
        entropy = -(p * p.log()).sum(1)
    else:
        entropy = (p**entropy_order).sum(1).log() / (1 - entropy_order)
    w = scale * (entropy - entropy.min())
    matched = igdm_alpha * (now.epoch + 1) / now.epochs * gradient_matching(nets, x, x_adv)
    robust = w * (kl_rows(target, student(x_adv)) + matched)
    clean = (1 - w / w.max()) * kl_rows(nets["teacher"](x), student(x))
    return (robust + clean_weight * clean).sum() / len(y)


def peeraid_terms(
    nets: Nets, x: Tensor, x_adv: Tensor, y: Tensor,
    temperature: float = 5.0, peer_temperature: float = 1.0, gamma1: float = 1.0,
    gamma2: float = 0.1, lambda1: float = 0.0, lambda2: float = 1.0, lambda3: float = 1.0,
    detach_student: bool = False, detach_clean: bool = False,
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
    "mart": mart_loss,
    "iad": iad_loss,
    "iad-ii": iad2_loss,
    "akd2": akd2_loss,
    "cat": cat_loss,
    "mtard": mtard_loss,
    "lbgat": lbgat_loss,
    "hat": hat_loss,
    "ikl": ikl_loss,
    "adr": adr_loss,
    "igdm": igdm_loss,
    "saad": saad_loss,
}
