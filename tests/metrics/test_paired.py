"""Statistics over seeds are those of scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from comfyui_pcpo.metrics.paired import estimate, paired, student


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 101])
@pytest.mark.parametrize("t", [0.0, 0.3, -1.0, 2.5, 12.0])
def test_students_distribution_is_scipys(t, freedom):
    assert student(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-13)


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_the_paired_test_is_scipys(count):
    before, after = np.random.default_rng(count).normal(size=(2, count))
    want = stats.ttest_rel(after, before)
    test = paired(before.tolist(), after.tolist())
    assert (test.t, test.p) == pytest.approx((want.statistic, want.pvalue))
    assert test.difference.error == pytest.approx(stats.sem(after - before))


def test_failed_values_leave_the_statistics_with_their_pair():
    assert estimate([1.0, math.nan, 3.0]) == estimate([1.0, 3.0])
    assert paired([1.0, 2.0, math.nan, 4.0], [2.0, 4.0, 5.0, math.nan]) == paired([1.0, 2.0], [2.0, 4.0])


def test_nothing_is_claimed_from_one_seed_or_without_spread():
    equal = ([0.5, 0.45, 0.4, 0.55], [0.6, 0.55, 0.5, 0.65])  # differences of 0.1 but for rounding
    for before, after in (([1.0], [2.0]), ([1.0, 1.0], [2.0, 2.0]), ([math.nan], [1.0]), equal):
        assert math.isnan(paired(before, after).p)
    assert math.isnan(estimate([1.0]).error) and estimate([1.0]).mean == 1.0


def test_values_without_a_pair_are_refused():
    with pytest.raises(ValueError, match="the test needs pairs"):
        paired([1.0], [1.0, 2.0])
