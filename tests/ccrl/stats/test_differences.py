import itertools

import numpy as np
import pytest
import scipy.stats

from ccrl.stats import holm, paired_t, score_after_evaluations, score_at_budget, sign_flip, welch_t


def test_paired_t_is_scipys():
    generator = np.random.default_rng(0)
    x, y = generator.normal(0.4, size=9), generator.normal(size=9)
    theirs = scipy.stats.ttest_rel(x, y)
    ours = paired_t(x, y, 0.9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert paired_t([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired_t([2.0, 3.0], [1.0, 2.0]).p == 0


def test_welch_by_hand():
    # Two runs a side with equal variances 2: error sqrt(2 / 2 + 2 / 2), degrees of freedom 2^2 / (1 / 1 + 1 / 1) = 2,
    # of which the distribution is (1 + t / sqrt(2 + t^2)) / 2: t_.975 = .95 sqrt(2 / (1 - .95^2)), p(t = 1) = 1 - 3^-.5
    ours = welch_t([2**0.5, 2 + 2**0.5], [0.0, 2.0])
    half = 0.95 * (2 / 0.0975) ** 0.5 * 2**0.5
    assert ours == pytest.approx((2**0.5, 2**0.5 - half, 2**0.5 + half, 1 - 3**-0.5), rel=1e-12)
    # One side constant: the other's degrees of freedom. Variance 1 of three runs: 5 +- t_2 / sqrt(3)
    high = welch_t([4.0, 5.0, 6.0], [0.0, 0.0, 0.0, 0.0]).high
    assert high == pytest.approx(5 + 0.95 * (2 / 0.0975) ** 0.5 / 3**0.5, rel=1e-12)
    assert welch_t([1.0, 1.0], [0.0, 0.0]) == (1.0, 1.0, 1.0, 0.0)
    assert welch_t([1.0, 1.0], [1.0, 1.0]).p == 1.0


def test_welch_is_scipys():
    generator = np.random.default_rng(0)
    x, y = generator.normal(0.4, 3.0, size=9), generator.normal(size=5)
    theirs = scipy.stats.ttest_ind(x, y, equal_var=False)
    ours, interval = welch_t(x, y, 0.9), theirs.confidence_interval(0.9)
    assert ours == pytest.approx((x.mean() - y.mean(), interval.low, interval.high, theirs.pvalue), rel=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0], [1.0, 2.0], "at least two runs each, got shapes \\(1,\\) and \\(2,\\)"),
        ([[1.0, 2.0]], [1.0, 2.0], "expected two lists"),
        ([1.0, np.nan], [1.0, 2.0], "expected finite numbers"),
    ],
)
def test_welch_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        welch_t(x, y)
    with pytest.raises(ValueError, match="confidence: expected a number in \\(0, 1\\), got 95"):
        welch_t([1.0, 2.0], [1.0, 2.0], 95)


def test_sign_flip_by_hand():
    # Differences 1, 2, 3: sums of the 8 patterns +-6, +-4, +-2, 0, 0; only +-6 are as far as 6: 2 / 8.
    assert sign_flip([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == 0.25
    # Differences 1, 2, -1: the sum seen is 2; |sums| are 4, 2, 2, 0 and their mirrors: 6 of 8 are at least 2.
    assert sign_flip([1.0, 2.0, -1.0], [0.0, 0.0, 0.0]) == 0.75
    assert sign_flip(np.full(6, 0.1), np.zeros(6)) == 2 / 64
    assert sign_flip([1.0, 1.0], [1.0, 1.0]) == 1.0


def test_sign_flip_of_many_pairs():
    generator = np.random.default_rng(1)
    d = generator.normal(0.5, size=25)
    theirs = scipy.stats.permutation_test(
        (d,), lambda v, axis: v.mean(axis=axis), permutation_type="samples", n_resamples=20_000, rng=2
    )
    assert sign_flip(d, np.zeros(25)) == pytest.approx(theirs.pvalue, abs=0.005)


def test_holm_by_hand():
    # Sorted .01 .02 .04: times 3, 2, 1 gives .03 .04 .04
    assert holm([0.04, 0.01, 0.02]).tolist() == [0.04, 0.03, 0.04]
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]


def test_score_at_budget_is_the_mean_over_all_subsets():
    trials, test = [3.0, 1.0, 2.0, 2.0, 5.0], [30.0, 10.0, 20.0, 24.0, 7.0]
    for k in range(1, 6):
        best, shown = [], []
        for subset in itertools.combinations(range(5), k):
            top = max(trials[i] for i in subset)
            tied = [i for i in subset if trials[i] == top]
            best.append(top)
            shown.append(np.mean([test[i] for i in tied]))
        assert score_at_budget(trials, budgets=[k])[0] == pytest.approx(np.mean(best), rel=1e-12)
        assert score_at_budget(trials, test, [k])[0] == pytest.approx(np.mean(shown), rel=1e-12)
    assert len(score_at_budget(trials)) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_t([1.0, 2.0], [1.0]), "same n >= 2 pairs"),
        (lambda: sign_flip([1.0, np.inf], [1.0, 2.0]), "finite"),
        (lambda: holm([0.5, 1.5]), r"\[0, 1\]"),
        (lambda: score_at_budget([]), "n >= 1"),
        (lambda: score_at_budget([1.0, 2.0], budgets=[3]), "from 1 to 2"),
        (lambda: score_at_budget([1.0, np.nan]), "finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_score_after_evaluations_by_hand():
    # blindly the mean of 0, 6 and 12; the better of two policies seen: (6 + 12 + 12) / 3; then all are known
    found = score_after_evaluations([[0.0] * 2, [6.0] * 2, [12.0] * 2], 5, repeats=60_000)
    np.testing.assert_allclose(found, [6.0, 10.0, 12.0, 12.0, 12.0], atol=0.1)
    # equal means, one of them noisy: whatever is chosen is worth 5
    assert score_after_evaluations([[5.0, 5.0], [0.0, 10.0]], 4, repeats=10).tolist() == [5.0] * 4
    # one episode misleads about half of the time, UCB1 comes back
    curve = score_after_evaluations([[4.0, 4.0], [0.0, 10.0]], 60, scale=10.0, repeats=500)
    assert curve[1] < 4.6
    assert curve[-1] > 4.75


@pytest.mark.parametrize(
    ("returns", "options"),
    [([1.0, 2.0], {}), ([[np.nan]], {}), ([[1.0]], {"evaluations": 0}), ([[1.0]], {"scale": 0.0})],
)
def test_score_after_evaluations_refuses(returns, options):
    with pytest.raises(ValueError, match="expected"):
        score_after_evaluations(returns, **{"evaluations": 3, **options})
