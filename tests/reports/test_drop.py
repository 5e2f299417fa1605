"""The tests and intervals of the gate against scipy, against likelihoods and by enumeration."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize_scalar

from robench.reports.drop import (
    discordant,
    holm,
    mcnemar,
    over_seeds,
    paired,
    pooled_z,
    tango,
    unpaired,
)

COUNTS = st.integers(0, 40)


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_binomial_test(lost, gained):
    exact = stats.binomtest(lost, lost + gained, alternative="greater").pvalue if (
        lost + gained) else 1.0
    assert float(mcnemar(lost, gained)) == pytest.approx(exact, rel=1e-9)


def score(lost, gained, n, delta):
    """The score statistic, with the nuisance share found by maximizing the likelihood."""
    low, high = max(0.0, -delta), (1 - delta) / 2

    def loss(share):
        shares = share + delta, share, 1 - delta - 2 * share
        return -sum(count * math.log(max(s, 1e-300)) for count, s in zip(
            (lost, gained, n - lost - gained), shares, strict=True))

    share = minimize_scalar(loss, bounds=(low, high), method="bounded",
                            options={"xatol": 1e-12}).x
    return (lost - gained - n * delta) / math.sqrt(n * (2 * share + delta * (1 - delta)))


@pytest.mark.parametrize(("lost", "gained", "n"), [
    (12, 2, 44), (5, 0, 100), (0, 7, 100), (30, 28, 500), (3, 1, 360), (60, 20, 90),
])
def test_tangos_interval_ends_where_the_score_test_rejects(lost, gained, n):
    low, high = tango(lost, gained, n, 0.05)
    z = stats.norm.ppf(0.95)
    assert score(lost, gained, n, float(low)) == pytest.approx(z, abs=1e-3)
    assert score(lost, gained, n, float(high)) == pytest.approx(-z, abs=1e-3)


@given(COUNTS, COUNTS, st.integers(80, 500))
def test_tangos_interval_is_symmetric_and_around_the_difference(lost, gained, n):
    low, high = map(float, tango(lost, gained, n, 0.05))
    assert -1 <= low <= (lost - gained) / n <= high <= 1
    assert tuple(map(float, tango(gained, lost, n, 0.05))) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("n", "share", "drop"), [
    (100, 0.1, 0.0), (100, 0.1, 0.05), (100, 0.3, 0.1), (300, 0.05, 0.0), (300, 0.05, 0.02),
])
def test_tangos_interval_covers_as_often_as_it_says(n, share, drop):
    """Exactly, summed over all that may be observed; 90 % within a point."""
    lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1))
    some = (lost + gained <= n) & (lost + gained < n * share + 60)
    lost, gained = lost[some], gained[some]
    chance = stats.multinomial.pmf(np.stack([lost, gained, n - lost - gained], 1), n,
                                   [(share + drop) / 2, (share - drop) / 2, 1 - share])
    likely = chance > 1e-9
    low, high = tango(lost[likely], gained[likely], n, 0.05)
    covered = chance[likely][(low <= drop) & (drop <= high)].sum()
    assert covered == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (0.5, 0.45), (0.9, 0.8)])
def test_newcombes_interval_covers_as_often_as_it_says(before, after):
    n, m = 150, 100
    covered = 0.0
    for x, p in enumerate(stats.binom.pmf(np.arange(n + 1), n, before)):
        for y, q in enumerate(stats.binom.pmf(np.arange(m + 1), m, after)):
            if p * q > 1e-6:
                drop = unpaired(x / n, n, y / m, m, 0.05)
                covered += p * q * (drop.low <= 100 * (before - after) <= drop.high)
    assert covered == pytest.approx(0.9, abs=0.015)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_unpaired_test_is_about_fishers(before, after):
    fisher = stats.fisher_exact([[before, 60 - before], [after, 60 - after]],
                                alternative="greater").pvalue
    assert float(pooled_z(before / 60, 60, after / 60, 60)) == pytest.approx(fisher, abs=0.025)


FLAGS = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


@given(FLAGS, st.integers(1, 3), st.integers(1, 3))
def test_effective_images_keep_sum_and_squares(random, before, after):
    ours, theirs = random.random((before, 50)) < 0.7, random.random((after, 50)) < 0.5
    lost, gained, weight = discordant(ours, theirs)
    difference = ours.mean(0) - theirs.mean(0)
    assert lost >= 0 and gained >= 0
    assert (lost - gained) * weight == pytest.approx(difference.sum(), abs=1e-9)
    assert (lost + gained) * weight**2 == pytest.approx((difference**2).sum())


@given(FLAGS, st.integers(1, 3))
def test_the_same_network_several_times_is_one_network(random, times):
    ours, theirs = random.random((1, 50)) < 0.7, random.random((1, 50)) < 0.5
    lost, gained = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    once, more = paired(ours, theirs, 0.05), paired(np.repeat(ours, times, 0), theirs, 0.05)
    assert (once.lost, once.gained, once.weight) == pytest.approx((lost, gained, 1))
    assert (more.points, more.low, more.high, more.p) == pytest.approx(
        (once.points, once.low, once.high, once.p))
    assert once.points == pytest.approx(100 * (lost - gained) / 50)


@pytest.mark.parametrize(("before", "after"), [
    ([0.5, 0.52, 0.51], [0.47, 0.5]), ([0.5, 0.52, 0.51], [0.48]), ([0.5], [0.5, 0.6]),
])
def test_over_seeds_it_is_students_test(before, after):
    reference = stats.ttest_ind(before, after, alternative="greater")
    two_sided = stats.ttest_ind(before, after).confidence_interval(0.9)
    drop = over_seeds(before, after, 0.05)
    assert drop.p == pytest.approx(reference.pvalue)
    assert (drop.low, drop.high) == pytest.approx((100 * two_sided.low, 100 * two_sided.high))


def test_single_networks_have_no_spread_over_seeds():
    assert over_seeds([0.5], [0.4], 0.05) is None
    equal = over_seeds([0.5, 0.5], [0.4], 0.05)
    assert (equal.p, equal.low, equal.high) == (0.0, pytest.approx(10), pytest.approx(10))


def test_holm_on_a_known_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_helps(ps):
    adjusted = holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
