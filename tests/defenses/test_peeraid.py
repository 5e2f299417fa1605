"""PeerAiD: where the gradient of each of its terms goes, and what each term weighs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from .formulas import cross_entropy, kl_batchmean
from .networks import assert_close, assert_grads_close, grads_of, norm, setup
from .transcribed_losses import EVERY_TERM, TINY, peeraid_terms


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
