"""The pool and the search: whatever the batch, the order or an interruption, the same verdicts."""

import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robench.attacks.found import CLEAN, STANDS
from robench.attacks.gradient import PGD
from robench.attacks.objectives import cw_margin
from robench.attacks.pool import Step
from robench.attacks.search import OneStage, Pooled, Search, Stage
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import verify

THREAT = ThreatModel("Linf", 0.06)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
                            nn.Linear(6 * 36, 5)).double()
    return net


X = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
Y = network()(X).argmax(1)
Y[::10] = (Y[::10] + 1) % 5  # wrong when clean


@dataclass(frozen=True, slots=True)
class Both(Pooled):
    """Two stages, of which the second may see a share only."""

    threat: ThreatModel
    share: float = 1.0
    steps: int = 6

    def stages(self, classes):
        first = PGD(self.threat, self.steps, restarts=2)
        second = PGD(self.threat, self.steps, loss="targeted-cw", targets=3, start="none")
        return (Stage(first), Stage(Named(second.threat, self.steps), self.share))


@dataclass(frozen=True, slots=True)
class Named(PGD):
    """A second stage needs a name of its own."""

    loss: str = "targeted-cw"
    targets: int = 3
    start: str = "none"

    @property
    def name(self):
        return "pgd-t"


def search(attack=None, rows=None, **options):
    x, y = (X, Y) if rows is None else (X[rows], Y[rows])
    return Search(attack or Both(THREAT), network(), x, y, **{"seed": 0, **options}).run()


WHOLE = search()


def test_every_claim_is_verified_and_some_images_stand():
    verdict = verify(network(), X, WHOLE.x_adv, Y, THREAT)
    assert 5 < WHOLE.standing.sum() < 50
    assert torch.equal(torch.from_numpy(WHOLE.fell_to != STANDS), verdict.fooled)
    assert ((WHOLE.fell_to == CLEAN).nonzero()[0] % 10 == 0).all()
    assert set(WHOLE.fell_to.tolist()) == {CLEAN, STANDS, 0, 1}
    assert WHOLE.open == 0 and WHOLE.violations == 0


def test_predictions_are_of_the_confirmed_examples_and_else_of_the_clean_images():
    fell = torch.from_numpy(WHOLE.fell_to >= 0)[:, None, None, None]
    predicted = network()(torch.where(fell, WHOLE.x_adv, X)).argmax(1)
    assert WHOLE.predicted.tolist() == predicted.tolist()
    assert ((WHOLE.predicted == Y.numpy()) == WHOLE.standing).all()


@settings(max_examples=15, deadline=None)
@given(slots=st.integers(1, 80), order=st.permutations(range(60)))
def test_verdicts_do_not_depend_on_the_batch_or_the_order(slots, order):
    found = search(rows=order, slots=slots)
    assert (found.fell_to == WHOLE.fell_to[order]).all()
    assert (found.predicted == WHOLE.predicted[order]).all()


@pytest.mark.parametrize("shards", [2, 7])
def test_verdicts_do_not_depend_on_the_shard(shards):
    for part in range(shards):
        rows = list(range(part, 60, shards))
        assert (search(rows=rows).fell_to == WHOLE.fell_to[rows]).all()


def test_another_seed_gives_other_noise():
    other = search(seed=1)
    stand = torch.from_numpy(WHOLE.standing & other.standing)
    one, two = (search(PGD(THREAT, 1), seed=s).x_adv for s in (0, 1))
    assert stand.any() and not torch.equal(one[stand], two[stand])


def test_the_units_of_an_image_that_fell_are_dropped():
    """Slots 1: nothing runs beside a unit that succeeds."""
    easy = ThreatModel("Linf", 0.5)
    found = search(PGD(easy, 3, restarts=50), slots=1)
    assert not found.standing.any()
    assert found.backwards < 3 * 60 * 2


def test_passes_are_those_of_the_units():
    """A constant network is never fooled: every unit takes all its steps, then one last look."""
    def model(x):
        return x.flatten(1)[:, :5] * 0 + torch.tensor([5.0, 1, 1, 1, 1])

    zeros = torch.zeros(60, dtype=torch.int64)
    found = Search(PGD(THREAT, 4, restarts=3), model, X, zeros, seed=0, slots=16).run()
    assert found.standing.all()
    assert found.backwards == 60 * 3 * 4
    assert found.forwards == 60 * 3 * 4 + 60 * 3


def test_a_share_sees_the_same_images_in_every_order():
    found = search(Both(THREAT, share=0.5))
    mixed = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    again = search(Both(THREAT, share=0.5), rows=mixed)
    assert (again.fell_to == found.fell_to[mixed]).all()
    assert again.sampled == found.sampled
    seen, broke = found.sampled
    assert 0 < seen < 60 and broke == (found.fell_to == 1).sum() < (WHOLE.fell_to == 1).sum()
    assert WHOLE.sampled is None


class Stop(Exception):
    pass


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 60))
def test_a_search_that_was_stopped_goes_on_and_ends_as_if_it_had_not(tmp_path_factory, after):
    state = tmp_path_factory.mktemp("state") / "search.npz"
    left = after

    def stop(progress):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    rounds = 0
    while True:
        left = after
        running = Search(Both(THREAT), network(), X, Y, seed=0, slots=7, state=state,
                         keep=True, progress=stop)
        running.show_every = 0.0
        try:
            found = running.run()
            break
        except Stop:
            rounds += 1
            after += 5
            assert state.exists()
    assert (found.fell_to == WHOLE.fell_to).all()
    assert (found.predicted == WHOLE.predicted).all()
    fell = torch.from_numpy(found.fell_to >= 0)
    assert verify(network(), X[fell], found.x_adv[fell], Y[fell], THREAT).fooled.all()
    assert rounds > 0 or after >= 40


def test_ended_units_are_not_run_again(tmp_path):
    state = tmp_path / "search.npz"
    first = search(state=state)
    second = search(state=state)
    assert (second.fell_to == first.fell_to).all()
    assert (second.predicted == first.predicted).all()
    assert second.forwards == first.forwards and second.backwards == first.backwards


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not an archive", "other seed"])
def test_a_state_file_that_is_damaged_or_of_another_search_is_ignored(tmp_path, damage):
    state = tmp_path / "search.npz"
    if damage == "other seed":
        search(state=state, seed=5)
    else:
        state.write_bytes(damage)
    found = search(state=state)
    assert (found.fell_to == WHOLE.fell_to).all() and found.backwards == WHOLE.backwards


def test_a_deadline_leaves_an_honest_partial_result(tmp_path):
    state = tmp_path / "search.npz"
    found = search(deadline=time.monotonic(), state=state)
    assert found.open == found.standing.sum() > 0
    on = search(state=state)
    assert on.open == 0 and (on.fell_to == WHOLE.fell_to).all()


@pytest.mark.parametrize("slots", [16, 200])
def test_short_budgets_make_progress_and_repeat_no_step(tmp_path, slots):
    """Units that are under way go on where they were, though none of them ends in a budget."""
    state, rounds = tmp_path / "search.npz", 0
    while True:
        found = search(state=state, slots=slots, deadline=time.monotonic())  # one step each
        rounds += 1
        if not found.open:
            break
        assert rounds < 1000
    assert rounds > 10
    assert (found.fell_to == WHOLE.fell_to).all()
    whole = search(slots=slots)
    assert (found.backwards, found.forwards) == (whole.backwards, whole.forwards)


def test_the_state_of_another_network_or_without_examples_is_ignored(tmp_path):
    state = tmp_path / "search.npz"
    search(state=state, deadline=time.monotonic() + 0.05)
    other = nn.Sequential(network(), nn.Tanh())
    found = Search(Both(THREAT), other, X, Y, seed=0, state=state).run()
    assert (found.fell_to == Search(Both(THREAT), other, X, Y, seed=0).run().fell_to).all()
    search(state=state)
    kept = search(state=state, keep=True)
    fell = torch.from_numpy(kept.fell_to >= 0)
    assert verify(network(), X[fell], kept.x_adv[fell], Y[fell], THREAT).fooled.all()


@pytest.mark.parametrize("label", [0, 1])
def test_a_network_that_answers_nan_is_not_robust(label):
    """It knows the images that it was given, and nothing around them."""
    def model(x):
        known = (x.flatten(1)[:, None] - X.flatten(1)[None]).abs().amax(2).amin(1) < 1e-12
        logits = nn.functional.one_hot(torch.full((len(x),), label), 5).double() + 0 * x.sum()
        return torch.where(known[:, None], logits, torch.nan)

    y = torch.full((60,), label)
    for attack in (PGD(THREAT, 3), PGD(THREAT, 3, loss="cw")):
        found = Search(attack, model, X, y, seed=0).run()
        assert not found.standing.any() and set(found.predicted) == {-1}


def test_examples_from_elsewhere_are_looked_at_first_and_verified():
    outside = search(starts=1 - X)
    assert (outside.fell_to == WHOLE.fell_to).all() and outside.violations > 0
    replayed = search(starts=WHOLE.x_adv)
    assert replayed.stages[-1] == "replay"
    assert (replayed.standing == WHOLE.standing).all()
    assert ((replayed.fell_to == 2) == (WHOLE.fell_to >= 0)).all()


@dataclass(frozen=True, slots=True)
class Liar(OneStage):
    """Claims the clean image again and again, with a growing margin."""

    threat: ThreatModel
    steps: int = 10

    name = "liar"
    unseen_end = False

    def units(self, classes):
        return 1

    def rank(self, number):
        return 0

    def begin(self, units):
        return {"x_adv": units.x.clone()}

    def step(self, net, units):
        net.logits(units.x)
        return Step(units.x, units.step.double() + 1)


def test_claims_that_full_precision_denies_do_not_count_and_do_not_end_a_unit():
    found = search(Liar(THREAT), slots=8)
    assert found.standing.sum() == 54
    assert found.forwards == 54 * 20  # 10 steps and 10 denied claims for each


def test_the_margin_of_a_denied_claim_is_the_next_bar():
    @dataclass(frozen=True, slots=True)
    class Steady(Liar):
        def step(self, net, units):
            net.logits(units.x)
            return Step(units.x, torch.ones(len(units)).double())

    assert search(Steady(THREAT), slots=8).forwards == 54 * 10 + 54


def test_any_misclassified_iterate_counts():
    def model(x):  # wrong only where the first pixel is near 0.53, and uphill beyond that
        pixel = x.flatten(1)[:, 0]
        bump = 0.1 - 10 * (pixel - 0.53).abs()
        return torch.stack([pixel * 0, bump, pixel * 0 - 9], 1)

    x = torch.full((1, 1, 6, 6), 0.5).double()
    y = torch.zeros(1, dtype=torch.int64)
    attack = PGD(ThreatModel("Linf", 0.1), steps=2, step_size=0.03, loss="cw", start="none")
    found = Search(attack, model, x, y, seed=0).run()
    assert found.fell_to[0] == 0 and cw_margin(model(found.x_adv), y) > 0
    assert abs(float(found.x_adv[0, 0, 0, 0]) - 0.53) < 1e-6  # the first step, not the second
