import math

import pytest
from scipy import stats

from msv.ablation.statistics import holm, mean, paired_difference, sample_std


def test_mean_and_std_by_hand():
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert sample_std([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
    assert mean([]) is None
    assert sample_std([4.0]) is None


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975, 2) = 4.302653.
    difference = paired_difference({0: 71.0, 1: 73.0, 2: 70.0}, {0: 70.0, 1: 71.0, 2: 67.0})
    assert difference.n == 3
    assert difference.mean == pytest.approx(2.0)
    assert difference.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert difference.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    # t = 2 sqrt(3) with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2).
    assert difference.p == pytest.approx(1 - math.sqrt(12 / 14))


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_paired_difference_equals_scipy(confidence):
    row, baseline = [72.1, 71.4, 73.0, 72.2, 70.9], [71.8, 71.9, 71.2, 71.1, 71.0]
    result = stats.ttest_rel(row, baseline)
    interval = result.confidence_interval(confidence)
    difference = paired_difference(dict(enumerate(row)), dict(enumerate(baseline)), confidence)
    assert difference.p == pytest.approx(result.pvalue, rel=1e-12)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_only_common_seeds_are_paired():
    difference = paired_difference({0: 10.0, 1: 12.0, 7: 99.0}, {1: 11.0, 0: 10.5, 3: 0.0})
    assert difference.n == 2
    assert difference.mean == pytest.approx(0.25)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_a_difference_and_no_interval():
    difference = paired_difference({0: 72.0}, {0: 71.5})
    assert (difference.n, difference.mean) == (1, 0.5)
    assert difference.low is difference.high is difference.p is None


def test_equal_differences_show_nothing():
    # 0.1 steps are not exact: without a guard against rounding this would come out as p = 0.
    difference = paired_difference({0: 90.1, 1: 90.2, 2: 90.7}, {0: 90.0, 1: 90.1, 2: 90.6})
    assert difference.mean == pytest.approx(0.1)
    assert difference.low is difference.high is difference.p is None


def test_confidence_out_of_range():
    with pytest.raises(ValueError, match="confidence is 95"):
        paired_difference({0: 1.0}, {0: 1.0}, 95)


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; the last is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_counts_only_tests_that_were_made():
    assert holm([None, 0.03, None, 0.01]) == [None, pytest.approx(0.03), None, pytest.approx(0.02)]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None]) == [None]
    assert holm([]) == []


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match=r"p-value 1\.5 at position 1"):
        holm([0.5, 1.5])
