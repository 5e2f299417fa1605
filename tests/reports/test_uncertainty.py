import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from robench.reports.uncertainty import estimate, paired_p, wilson


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts):
    right, n = counts
    low, high = wilson(right / n, n)
    reference = binomtest(right, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert 0 <= low <= right / n <= high <= 1


def test_one_network_has_no_seed_spread():
    got = estimate([520], 1000)
    assert (got.mean, got.n) == (0.52, 1000)
    assert math.isnan(got.std)


def test_more_seeds_do_not_pretend_to_be_more_images():
    one, three = estimate([520], 1000), estimate([510, 520, 530], 1000)
    assert (three.low, three.high) == pytest.approx((one.low, one.high))
    assert three.std == pytest.approx(0.01)  # the seeds are reported apart


def flags(n, *survivors):
    rows = np.zeros((len(survivors), n), bool)
    for row, images in zip(rows, survivors, strict=True):
        row[list(images)] = True
    return rows


def test_mcnemar_on_known_counts():
    # 10 images only ours survives on, 2 only theirs: 2 * P(X <= 2), X ~ Bin(12, 1/2).
    p = paired_p(flags(100, range(10)), flags(100, range(10, 12)))
    assert p == pytest.approx(2 * (1 + 12 + 66) / 2**12)


def test_equal_networks_do_not_differ():
    assert paired_p(flags(50, range(20)), flags(50, range(20))) == 1.0


def test_several_seeds_count_an_image_once():
    same = flags(100, range(10)), flags(100, range(10, 12))
    twice = [np.repeat(side, 2, axis=0) for side in same]
    assert paired_p(*twice) == paired_p(*same)


@given(st.integers(0, 2**32 - 1))
def test_the_test_is_symmetric(seed):
    random = np.random.default_rng(seed)
    ours, theirs = random.random((2, 3, 40)) < 0.5
    assert paired_p(ours, theirs) == paired_p(theirs, ours)
