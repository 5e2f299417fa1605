"""Every defense against a second transcription of its formulas: values, gradients, statistics.

A new built-in defense needs an entry in LOSSES (transcribed_losses.py), CRAFTS
(transcribed_attacks.py), LOSS_OPTIONS and BN_UPDATES, or the first test fails.
"""

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from robench.defenses import DEFENSES, Moment, make_defense

from .networks import (
    THREAT,
    assert_bit_identical,
    assert_buffers_close,
    assert_close,
    assert_grads_close,
    assert_same_batches,
    bn_updates,
    grads_of,
    inputs_of,
    norm,
    setup,
    snapshot,
)
from .transcribed_attacks import CRAFTS
from .transcribed_losses import EVERY_TERM, LOSSES, TINY

FIRST, LAST = Moment(0, 200), Moment(199, 200, 9, 10)

# `now` is the moment for schedules; everything else goes to make_defense.
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
    "mart": [{}, dict(beta=6.0), dict(beta=0.0)],
    "iad": [
        {},
        dict(now=FIRST),
        dict(now=Moment(59, 200, 9, 10), temperature=3.0),
        dict(now=Moment(60, 200), beta=1.0),
        dict(now=Moment(60, 200), begin=0.5),
        dict(now=LAST, beta=0.0),
    ],
    "iad-ii": [
        {},
        dict(now=FIRST),
        dict(now=Moment(39, 200, 9, 10), temperature=3.0),
        dict(now=Moment(40, 200), beta=1.0),
        dict(teacher_weight=0.6, natural_weight=0.3),
        dict(now=FIRST, teacher_weight=0.6, natural_weight=0.3),
    ],
    "akd2": [
        {},
        dict(temperature=4.0),
        dict(temperature=1.0, label_weight=0.25, natural_weight=0.25, teacher_weight=0.5),
        dict(label_weight=0.0, natural_weight=0.7, teacher_weight=1.3),
    ],
    "cat": [{}, dict(beta=1.5), dict(cross_weight=0.0), dict(cross_weight=1.0)],
    "mtard": [{}, dict(weight=1.0), dict(rate=0.5)],
    "lbgat": [{}, dict(beta=0.0)],
    "hat": [{}, dict(overshoot=3.0, beta=1.0, gamma=0.2), dict(overshoot=1.0), dict(gamma=0.0)],
    "ikl": [{}, dict(now=FIRST), dict(alpha=5.0, beta=3.0), dict(alpha=0.0), dict(beta=0.0)],
    "adr": [
        {},
        dict(now=FIRST),
        dict(now=LAST),
        dict(loss_kind="trades", now=Moment(50, 200, 1, 3)),
        dict(loss_kind="trades", beta=1.5),
        dict(temperature_start=4.0, temperature_end=1.0, trust_start=0.2, trust_end=0.5),
    ],
    "igdm": [{}, dict(now=FIRST), dict(now=Moment(1, 200)), dict(alpha=10.0, now=LAST)],
    "saad": [
        {},
        dict(now=FIRST),
        dict(igdm_alpha=3.0, scale=2.0, correction=0.5),
        dict(entropy_order=2.0),
        dict(entropy_order=0.5, clean_weight=0.7),
        dict(clean_weight=1.3),
    ],
}

TRAINED = {
    "peeraid": ("student", "peer"),
    "cat": ("student", "peer"),
    "lbgat": ("student", "natural"),
}
GIVEN = {
    "ard": {"teacher"},
    "rslad": {"teacher"},
    "adaad": {"teacher"},
    "iad": {"teacher": "pgd-at"},
    "iad-ii": {"teacher": "pgd-at", "natural": "standard"},
    "akd2": {"teacher": "pgd-at", "natural": "standard"},
    "mtard": {"teacher": "trades", "natural": "standard"},
    "hat": {"helper": "standard"},
    "igdm": {"teacher": "trades"},
    "saad": {"teacher": "trades"},
}

# The specification does not tell in which order (or how often) these forward their batches.
ORDER_UNKNOWN = ("iad", "iad-ii", "cat", "mtard", "lbgat", "ikl", "adr", "igdm", "saad")

# Updates by craft + loss + after_step at 10 steps, sections 1.2 and 2; a range where the
# specification leaves a choice.
BN_UPDATES: dict[str, list[tuple[dict[str, Any], dict[str, int | range]]]] = {
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
    "mart": [({}, {"student": 2}), (dict(craft_mode="train"), {"student": 12})],
    # The extra forwards of 2.8: one S(x*), one or two S(x).
    "iad": [(dict(now=FIRST), {"student": 12}), ({}, {"student": range(12, 16)})],
    "iad-ii": [(dict(now=FIRST), {"student": 11}), ({}, {"student": range(12, 16)})],
    "akd2": [({}, {"student": 11}), (dict(craft_mode="eval"), {"student": 1})],
    "cat": [({}, {"student": range(3, 5), "peer": 3})],
    "mtard": [({}, {"student": 2})],
    "lbgat": [({}, {"student": range(2, 4), "natural": 1})],
    "hat": [({}, {"student": 3}), (dict(gamma=0.0), {"student": 3})],
    "ikl": [({}, {"student": range(2, 4)})],
    "adr": [
        ({}, {"student": 11}),
        (dict(loss_kind="trades"), {"student": range(12, 14)}),
        (dict(craft_mode="eval"), {"student": 1}),
    ],
    "igdm": [({}, {"student": range(2, 4)})],
    "saad": [({}, {"student": range(2, 4)})],
}


# ------------------------------------------------------------------ coverage


def test_every_built_in_defense_has_a_transcription() -> None:
    built_in = {e.name for e in DEFENSES if e.value.__module__.startswith("robench.defenses")}
    assert set(LOSSES) == set(LOSS_OPTIONS) == set(CRAFTS) == set(BN_UPDATES) == built_in


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_networks_of_a_defense(name: str) -> None:
    defense, wanted = make_defense(name, THREAT), GIVEN.get(name, {})
    assert tuple(defense.trained) == TRAINED.get(name, ("student",))
    assert set(defense.given) == set(wanted)
    if isinstance(wanted, dict):
        assert dict(defense.given) == wanted


# ------------------------------------------------------------------ values and gradients


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
    untrained = {key: snapshot(nets[key]) for key in nets.keys() - set(defense.trained)}

    with ExitStack() as stack:
        inputs = {key: [stack.enter_context(inputs_of(side[key])) for side in (nets, mine)]
                  for key in defense.trained}  # fmt: skip
        losses = defense.loss(nets, x, x_adv, y)
        want = LOSSES[name](mine, x, x_adv, y, **options)

    assert losses.total.shape == ()
    assert_close(losses.total, want, "total")
    for key in defense.trained:
        got_grads, want_grads = grads_of(losses.total, nets[key]), grads_of(want, mine[key])
        assert norm(want_grads) > 0
        assert_grads_close(got_grads, want_grads, key)
        if name in ORDER_UNKNOWN:
            assert_same_batches(*inputs[key], key)
        else:
            assert_buffers_close(nets[key], mine[key], key)
        assert all(m.training for m in nets[key].modules())
    for key, before in untrained.items():
        assert_bit_identical(nets[key], before)
        assert not any(m.training for m in nets[key].modules())
    assert not any(seen.requires_grad for seen in losses.seen.values())
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


# ------------------------------------------------------------------ batch-norm updates


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [(name, *case) for name, cases in BN_UPDATES.items() for case in cases],
)
def test_batch_norm_updates_of_one_step(
    name: str, options: dict[str, Any], counts: dict[str, int | range]
) -> None:
    defense, nets, (x, _, y) = setup(name, **options)
    x_adv = defense.craft(nets, x, y)
    losses = defense.loss(nets, x, x_adv, y)
    losses.total.backward()
    with torch.no_grad():
        defense.after_step(nets, x, y, losses)
    for key in (*defense.trained, *defense.given):
        wanted = counts.get(key, 0)
        allowed = wanted if isinstance(wanted, range) else (wanted,)
        assert bn_updates(nets[key]) in allowed, key
