import numpy as np
import pytest
import scipy.stats

from ccrl.stats import (
    iqm,
    iqm_interval,
    stratified_bootstrap,
    t_interval,
    tolerance_interval,
    tolerance_runs,
    trimmed_t_interval,
)
from ccrl.stats.student import binomial_tail, t_cdf, t_quantile

T_2 = 0.95 * (2 / 0.0975) ** 0.5
"""The .975 quantile of Student's t with two degrees of freedom."""


@pytest.mark.parametrize("df", [0.6, 1, 2, 2.94, 3, 4, 5, 9, 10, 30, 101])
def test_students_distribution(df):
    for t in (-40.0, -2.0, -0.3, 0.0, 0.7, 3.0):
        assert t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), rel=1e-9, abs=1e-14)
    for t in (-60.0, -1534.3, -1e5):
        assert t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), rel=1e-9, abs=0.0), "not what rounding leaves"
    for p in (0.005, 0.025, 0.5, 0.9, 0.975):
        assert t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-9, abs=1e-12)


def test_binomial_tail():
    assert binomial_tail(2, 3, 0.5) == 0.5  # (3 + 1) / 8
    assert binomial_tail(0, 3, 0.2) == pytest.approx(1.0)
    assert binomial_tail(7, 12, 0.3) == pytest.approx(scipy.stats.binom.sf(6, 12, 0.3), rel=1e-12)


def test_t_interval_by_hand():
    # mean 2, s = 1; with two degrees of freedom t has a closed form, t_.975 = .95 sqrt(2 / (1 - .95^2)) = 4.3027;
    # half width 4.3027 / sqrt(3)
    point, low, high = t_interval([1.0, 2.0, 3.0])
    assert point == 2.0
    assert high - 2 == pytest.approx(T_2 / 3**0.5, rel=1e-12)
    assert low == pytest.approx(4 - high)


def test_t_interval_on_an_axis():
    x = np.random.default_rng(0).normal(size=(5, 3))
    point, low, high = t_interval(x, 0.9, axis=0)
    expected = scipy.stats.t.interval(0.9, 4, loc=x.mean(0), scale=scipy.stats.sem(x, axis=0))
    np.testing.assert_allclose((low, high), expected, rtol=1e-9)
    np.testing.assert_allclose(point, x.mean(0))


def test_trimmed_interval_by_hand():
    # n = 5, g = 1: kept 2, 3, 4 (mean 3). Winsorised 2 2 3 4 4: squares 1+1+0+1+1 = 4, s_w = 1.
    # half width t_2 * 1 * sqrt(4 / (3 * 2)) = 4.3027 * .8165
    point, _low, high = trimmed_t_interval([100.0, 3.0, 2.0, -50.0, 4.0])
    assert point == 3.0
    assert high - 3 == pytest.approx(T_2 * (2 / 3) ** 0.5, rel=1e-12)
    assert trimmed_t_interval([1.0, 2.0, 6.0]) == t_interval([1.0, 2.0, 6.0])


def test_runs_for_a_tolerance_interval():
    assert tolerance_runs(0.95, 0.95) == 93  # Wilks, 1941
    assert tolerance_runs(0.9, 0.95) == 46
    assert tolerance_runs(0.5, 0.95) == 8


def test_tolerance_interval_by_hand():
    x = np.arange(8.0)[::-1]
    # With all of 8: 1 - 8 * .5^7 + 7 * .5^8 = .9648 >= .95; leaving one out: P(Bin(8, .5) <= 5) = .8555 < .95.
    assert tolerance_interval(x) == (3.5, 0.0, 7.0)
    # .8555 >= .8 leaves out one, the lowest; two: P(Bin <= 4) = .637 < .8.
    assert tolerance_interval(x, confidence=0.8) == (3.5, 1.0, 7.0)
    assert tolerance_interval(x, confidence=0.6) == (3.5, 1.0, 6.0)


def test_a_tolerance_interval_holds_what_it_says():
    x = np.random.default_rng(1).exponential(size=(4000, 12))
    _, low, high = tolerance_interval(x, 0.5, 0.9)
    held = np.exp(-low) - np.exp(-high)
    # 12 runs, two left out: P(Bin(12, .5) <= 8) = .927, the largest number that is >= .9
    assert (held >= 0.5).mean() == pytest.approx(0.927, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([1.0]), "at least 2 runs"),
        (lambda: t_interval([1.0, np.nan]), "finite"),
        (lambda: t_interval([1.0, 2.0], 95), "between 0 and 1"),
        (lambda: tolerance_interval(np.arange(5.0)), "at least 8 runs .* got 5"),
        (lambda: tolerance_interval(np.arange(9.0), content=1.0), "content"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_interval_of_an_iqm_changes_with_the_number_of_runs():
    x = np.random.default_rng(0).normal(size=(12, 3))
    for n in (2, 3, 9):
        np.testing.assert_array_equal(iqm_interval(x[:n], axis=0), trimmed_t_interval(x[:n], axis=0))
    np.testing.assert_array_equal(iqm_interval(x, axis=0), stratified_bootstrap([x], iqm))
    np.testing.assert_array_equal(iqm_interval(x[:1], axis=0), [x[0]] * 3)
