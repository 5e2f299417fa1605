"""Power and sizes of the gate: exact against brute force, and 2,000 simulated checks."""

import numpy as np
import pytest
from scipy import stats

from robench.reports.drop import discordant, holm, mcnemar, pooled_z, regressed
from robench.reports.power import (
    ACCURACIES,
    DISCORDANT,
    DROPS,
    images_needed,
    images_to_pass,
    paired_power,
    paired_size,
    unpaired_power,
    unpaired_size,
)

DRAWS, ALPHA, POWER = 2000, 0.05, 0.8
TOO_OFTEN, TOO_RARELY = 0.010, 0.018  # two Monte Carlo standard errors of 2,000 draws


def rate(p, points, max_drop):
    return float(regressed(p, points, max_drop=max_drop, alpha=ALPHA).mean())


def paired_rate(n, share, drop, max_drop, seed):
    """How often 2,000 drawn comparisons are regressions; `share` and `drop` in percent."""
    shares = [(share + drop) / 200, (share - drop) / 200, 1 - share / 100]
    lost, gained, _ = np.random.default_rng(seed).multinomial(n, shares, DRAWS).T
    return rate(mcnemar(lost, gained), 100 * (lost - gained) / n, max_drop)


def unpaired_rate(n, accuracy, drop, max_drop, seed):
    random = np.random.default_rng(seed)
    before = random.binomial(n, accuracy / 100, DRAWS) / n
    after = random.binomial(n, (accuracy - drop) / 100, DRAWS) / n
    return rate(pooled_z(before, n, after, n), 100 * (before - after), max_drop)


SIZES = [(simulate, size, share, bar, drop)
         for simulate, size, shares in ((paired_rate, paired_size, DISCORDANT),
                                        (unpaired_rate, unpaired_size, ACCURACIES))
         for share in shares for bar, drop in DROPS if size is unpaired_size or share >= drop]


@pytest.mark.parametrize(("simulate", "size", "share", "bar", "drop"), SIZES)
def test_at_the_sizes_of_the_table(simulate, size, share, bar, drop):
    n = size(share, drop, bar)
    assert simulate(n, share, drop, bar, seed=1) >= POWER - TOO_RARELY
    assert simulate(n, share, 0.0, bar, seed=2) <= ALPHA + TOO_OFTEN


@pytest.mark.parametrize("n", [50, 100, 360, 1000, 10_000])
@pytest.mark.parametrize("share", [2, 10, 40])
def test_no_drop_is_rarely_called_one(n, share):
    assert paired_rate(n, share, 0, 0.0, seed=n) <= ALPHA + TOO_OFTEN
    assert unpaired_rate(n, share, 0, 0.0, seed=n) <= ALPHA + TOO_OFTEN


@pytest.mark.parametrize(("seeds", "n"), [((3, 1), 300), ((3, 3), 300), ((2, 1), 1000),
                                          ((5, 1), 100)])
def test_several_seeds_raise_no_more_false_alarms(seeds, n):
    """Images differ in how hard they are; the networks of both sides do not differ."""
    random = np.random.default_rng(3)
    counts = []
    for _ in range(DRAWS):
        hard = random.beta(0.4, 0.4, n)
        flags = random.random((sum(seeds), n)) < hard
        counts.append(discordant(flags[:seeds[0]], flags[seeds[0]:]))
    lost, gained, weight = np.array(counts).T
    assert rate(mcnemar(lost, gained), 100 * weight * (lost - gained) / n, 0.0) <= (
        ALPHA + TOO_OFTEN)


def test_holm_keeps_the_rate_of_false_alarms_of_three_metrics():
    random = np.random.default_rng(4)
    lost, gained, _ = random.multinomial(1000, [0.05, 0.05, 0.9], (DRAWS, 3)).transpose(2, 0, 1)
    plain = mcnemar(lost, gained)
    corrected = np.array([holm(list(ps)) for ps in plain])
    points = (lost - gained) / 10
    alarms = [regressed(p, points, max_drop=0, alpha=ALPHA).any(axis=1).mean()
              for p in (plain, corrected)]
    assert alarms[0] > ALPHA + TOO_OFTEN >= alarms[1]


@pytest.mark.parametrize(("n", "lost", "gained", "bar"), [
    (150, 0.08, 0.03, 0.0), (150, 0.08, 0.03, 2.5), (120, 0.05, 0.0, 0.0), (40, 0.2, 0.1, 0.5),
])
def test_paired_power_is_the_sum_over_all_that_may_be_seen(n, lost, gained, bar):
    total = 0.0
    for count in range(n + 1):
        for b in range(count + 1):
            p = stats.binom.sf(b - 1, count, 0.5)
            if p <= ALPHA and 100 * (2 * b - count) > bar * n:
                total += stats.multinomial.pmf([b, count - b, n - count], n,
                                               [lost, gained, 1 - lost - gained])
        if count > n * (lost + gained) + 40:
            break
    assert paired_power(n, lost, gained, max_drop=bar) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("bar", [0.0, 8.0])
def test_unpaired_power_is_the_sum_over_all_that_may_be_seen(bar):
    n = 60
    x, y = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    alarm = regressed(pooled_z(x / n, n, y / n, n), 100 * (x - y) / n, max_drop=bar, alpha=ALPHA)
    total = (np.outer(stats.binom.pmf(np.arange(n + 1), n, 0.7),
                      stats.binom.pmf(np.arange(n + 1), n, 0.5)) * alarm).sum()
    assert unpaired_power(n, 0.7, 0.5, max_drop=bar) == pytest.approx(total, abs=1e-9)


def test_the_size_is_where_the_power_is_reached():
    assert images_needed(lambda n: n / 1000) == 800
    assert images_needed(lambda n: 1.0) == 1
    assert images_needed(lambda n: 0.5) is None


def test_a_drop_cannot_be_larger_than_the_images_that_differ():
    assert paired_size(2, 3, 0.5) is None


def test_images_to_pass():
    """The interval of a drop of 0 ends below 1 point in 4 of 5 draws."""
    n = images_to_pass(0.0, 0.1, max_drop=1.0, alpha=ALPHA)
    lost, gained, _ = np.random.default_rng(5).multinomial(n, [0.05, 0.05, 0.9], DRAWS).T
    from robench.reports.drop import tango

    assert (tango(lost, gained, n, ALPHA)[1] <= 0.01).mean() == pytest.approx(POWER, abs=0.03)
    assert images_to_pass(1.0, 0.1, max_drop=1.0, alpha=ALPHA) is None
    assert images_to_pass(0.9999, 0.1, max_drop=1.0, alpha=ALPHA) is None
