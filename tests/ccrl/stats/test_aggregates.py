from functools import partial

import numpy as np
import pytest
import scipy.stats

from ccrl.stats import (
    iqm,
    median_of_means,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    probability_of_improvement_interval,
    sample_efficiency,
    stratified_bootstrap,
)


def test_iqm_by_hand():
    assert iqm([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5  # cut 2 + 2: (2 + 3 + 4 + 5) / 4
    assert iqm(np.arange(10)) == 4.5  # cut 2 + 2
    assert iqm([5.0]) == 5.0
    assert iqm([1.0, 2.0, 6.0]) == 3.0  # fewer than four: nothing is cut


@pytest.mark.parametrize("n", [*range(1, 14), 1001])
def test_iqm_is_the_trimmed_mean(n):
    x = np.random.default_rng(n).normal(size=(3, n, 2))
    np.testing.assert_allclose(iqm(x, axis=1), scipy.stats.trim_mean(x, 0.25, axis=1), rtol=1e-12)


def test_optimality_gap_by_hand():
    assert optimality_gap([0.0, 0.5, 1.0, 3.0]) == 0.375  # (1 + .5 + 0 + 0) / 4
    assert optimality_gap([0.0, 3.0], target=2.0) == 1.0
    assert optimality_gap([[0.0, 3.0], [1.0, 1.0]], axis=0).tolist() == [0.5, 0.0]


def test_performance_profile_by_hand():
    profile = performance_profile([0.1, 0.5, 0.5, 0.9], [0.0, 0.1, 0.5, 0.7, 1.0])
    assert profile.tolist() == [1.0, 0.75, 0.25, 0.25, 0.0]  # strictly above
    both = performance_profile(np.array([[0.0, 1.0], [1.0, 1.0]]), [0.5], axis=0)
    assert both.tolist() == [[0.5], [1.0]]


def test_probability_of_improvement_by_hand():
    x, y = np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])
    assert probability_of_improvement(x, y) == 0.625  # pairs: tie .5, loss 0, win 1, win 1
    two = [[1.0, 3.0], [0.0]], [[1.0, 2.0], [1.0, 2.0, 3.0]]
    assert probability_of_improvement(*two) == 0.3125  # mean of .625 and 0
    assert probability_of_improvement(two[1], two[0]) == 1 - 0.3125


def test_probability_of_improvement_is_mann_whitney():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 5, size=(7, 3)).astype(float)  # few values: many ties
    y = generator.integers(0, 5, size=(9, 3)).astype(float)
    expected = [scipy.stats.mannwhitneyu(x[:, m], y[:, m]).statistic / 63 for m in range(3)]
    np.testing.assert_allclose(probability_of_improvement(x, y), np.mean(expected), rtol=1e-12)


def test_sample_efficiency_by_hand():
    curves = [[0, 1, 5, 2], [0, 0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 3]]
    assert sample_efficiency([10, 20, 30, 40], curves, 3).tolist() == [30, np.inf, 10, 40]


def test_bootstrap_agrees_with_scipy():
    x = np.random.default_rng(1).gamma(2.0, size=(12, 1))
    ours = stratified_bootstrap(x, iqm, repetitions=20_000)
    theirs = scipy.stats.bootstrap(
        (x[:, 0],), lambda v, axis: scipy.stats.trim_mean(v, 0.25, axis=axis), n_resamples=20_000, method="percentile",
        random_state=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.point == pytest.approx(scipy.stats.trim_mean(x[:, 0], 0.25))
    assert abs(ours.low - theirs.low) < 0.02 * width
    assert abs(ours.high - theirs.high) < 0.02 * width


def test_bootstrap_is_stratified():
    """Tasks with constant scores: resampling within a task changes nothing, across tasks it would."""
    x = np.tile([0.0, 10.0, 20.0], (5, 1))
    interval = stratified_bootstrap(x, lambda v, axis: v.mean(axis=axis))
    assert interval == (10.0, 10.0, 10.0)


def test_bootstrap_of_the_mean_has_the_known_spread():
    # Resampled mean of n values: variance (population variance) / n, here for two tasks of n=50.
    x = np.random.default_rng(3).normal(size=(50, 2))
    low, high = stratified_bootstrap(x, lambda v, axis: v.mean(axis=axis), repetitions=20_000)[1:]
    sigma = np.sqrt(x.var(axis=0).sum() / 50) / 2
    assert high - low == pytest.approx(2 * 1.96 * sigma, rel=0.03)


def test_tasks_are_resampled_independently():
    """Two tasks with the same scores: drawn together, their errors would add up instead of averaging out."""
    x = np.repeat(np.random.default_rng(3).normal(size=(50, 1)), 2, axis=1)
    low, high = stratified_bootstrap(x, lambda v, axis: v.mean(axis=axis), repetitions=20_000)[1:]
    sigma = np.sqrt(2 * x[:, 0].var() / 50) / 2
    assert high - low == pytest.approx(2 * 1.96 * sigma, rel=0.03)


def test_a_curve_is_resampled_whole():
    run = np.random.default_rng(4).normal(size=(6, 1, 1))
    curves = run + np.zeros((6, 1, 50))  # every point of a run is the same, so every point of the band must be
    band = stratified_bootstrap(curves)
    assert band.low.shape == (50,)
    assert np.ptp(band.low) == 0
    assert np.ptp(band.high) == 0
    assert (band.low < band.point).all()


def test_unequal_runs_seeds_and_chunks(monkeypatch):
    tasks = [np.arange(3.0), np.arange(8.0)]
    first = stratified_bootstrap(tasks, seed=1)
    assert first.point == iqm(np.concatenate(tasks))
    assert stratified_bootstrap(tasks, seed=1) == first
    assert (
        stratified_bootstrap(tasks, repetitions=50, seed=2)[1:]
        != stratified_bootstrap(tasks, repetitions=50, seed=1)[1:]
    )
    monkeypatch.setattr("ccrl.stats.aggregates._CHUNK", 11 * 7)  # 7 repetitions at a time, the last chunk short
    counted = []
    stratified_bootstrap(tasks, lambda v, axis: counted.append(v.shape) or iqm(v, axis), repetitions=20)
    assert counted == [(11,), (7, 11), (7, 11), (6, 11)]


def test_profile_with_band():
    x = np.random.default_rng(5).uniform(size=(10, 4))
    statistic = lambda v, axis: performance_profile(v, [0.25, 0.5], axis)  # noqa: E731
    band = stratified_bootstrap(x, statistic)
    np.testing.assert_allclose(band.point, [(x > 0.25).mean(), (x > 0.5).mean()])
    assert ((band.low < band.point) & (band.point < band.high)).all()


def test_probability_of_improvement_interval():
    generator = np.random.default_rng(6)
    x, y = generator.normal(1.0, size=(10, 3)), generator.normal(0.0, size=(10, 3))
    interval = probability_of_improvement_interval(x, y)
    assert interval.point == probability_of_improvement(x, y)
    assert 0.5 < interval.low < interval.point < interval.high <= 1
    assert probability_of_improvement_interval(x, x - 100) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("sides", [([[0.0, 1.0]], [[0.5]]), ([[0.5]], [[1.0, 0.0]])])
def test_probability_of_improvement_interval_by_hand(sides):
    """Two runs against one in the middle, on either side: a resampled probability is 0, 1/2, 1/2 or 1."""
    interval = probability_of_improvement_interval
    assert interval(*sides) == (0.5, 0.0, 1.0)
    assert interval(*sides, confidence=0.4) == (0.5, 0.5, 0.5)
    single = [interval(*sides, repetitions=1, seed=seed) for seed in range(40)]
    assert all(one.low == one.high for one in single)
    assert {float(one.low) for one in single} == {0.0, 0.5, 1.0}


def test_probability_of_improvement_interval_agrees_with_scipy():
    generator = np.random.default_rng(7)
    x, y = generator.normal(0.5, size=12), generator.normal(size=9)
    ours = probability_of_improvement_interval([x], [y], repetitions=20_000, confidence=0.9)
    theirs = scipy.stats.bootstrap(
        (x, y), lambda a, b, axis: scipy.stats.mannwhitneyu(a, b, axis=axis).statistic / 108, n_resamples=4_000,
        confidence_level=0.9, method="percentile", random_state=np.random.default_rng(2), batch=500,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(iqm, []), "expected at least one run"),
        (partial(stratified_bootstrap, np.zeros(3)), r"expected \[runs, tasks, ...\]; received shape \(3,\)"),
        (partial(stratified_bootstrap, np.zeros((0, 2))), "expected at least one run"),
        (partial(stratified_bootstrap, [[1.0, np.nan]]), "task 0: expected finite numbers"),
        (partial(stratified_bootstrap, [[1.0], [-np.inf]]), "task 1: expected finite numbers"),
        (
            partial(stratified_bootstrap, np.zeros((2, 2)), confidence=95),
            "confidence: expected a number between 0 and 1",
        ),
        (partial(probability_of_improvement, np.zeros((2, 2)), np.zeros((2, 3))), "zip"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_of_rliable():
    """The scores of rliable 1.2's own tests (google-research/rliable, tests/rliable/metrics_test.py and
    tests/library_test.py), and what these expect."""
    x, y = np.array([[1.0, 2], [2, 2], [1, 1], [2, 1]]), np.array([[1.0, 1], [2, 2], [3, 3]])
    for scores, expected in ((x, 1.5), (y, 2.0)):
        found = iqm(scores.ravel()), median_of_means(scores), scores.mean()
        np.testing.assert_allclose(found, 3 * [expected], rtol=1e-12)
    # on either task x has 1, 1, 2, 2 against 1, 2, 3: (2 * 1/2 + 2 * (1 + 1/2)) / 12
    np.testing.assert_allclose(probability_of_improvement(x, y), 1 / 3, rtol=1e-12)
    grid = np.arange(80.0).reshape(5, 16)
    flipped = np.flip(grid, axis=0)
    np.testing.assert_allclose(iqm(grid.ravel()), 39.5, rtol=1e-12)  # 20 to 59
    np.testing.assert_allclose(optimality_gap(grid.ravel()), 1 / 80, rtol=1e-12)  # only the score 0 is below 1
    profile = performance_profile(grid.ravel(), [0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(profile, [79 / 80, 79 / 80, 79 / 80, 78 / 80], rtol=1e-12)
    assert probability_of_improvement(grid, flipped) == 0.5
    better = probability_of_improvement_interval(grid, flipped, repetitions=100)
    assert better.low < better.point < better.high


def test_definitions_of_rliable():
    """Each aggregate beside the definition that rliable 1.2 states in its docstrings, written out in SciPy."""
    generator = np.random.default_rng(8)
    x, y = generator.gamma(2.0, size=(7, 5)), np.round(generator.gamma(2.0, size=(9, 5)), 1)
    exact = {"rtol": 1e-12, "atol": 0}
    np.testing.assert_allclose(iqm(x.ravel()), scipy.stats.trim_mean(x, 0.25, axis=None), **exact)
    np.testing.assert_allclose(median_of_means(x), np.median(x.mean(axis=0)), **exact)
    np.testing.assert_allclose(optimality_gap(x.ravel(), 2.0), 2.0 - np.minimum(x, 2.0).mean(), **exact)
    profile = [np.mean(x > tau) for tau in (0.5, 2.0, 4.0)]
    np.testing.assert_allclose(performance_profile(x.ravel(), [0.5, 2.0, 4.0]), profile, **exact)
    wins = [scipy.stats.mannwhitneyu(x[:, m], y[:, m], alternative="greater").statistic / 63 for m in range(5)]
    np.testing.assert_allclose(probability_of_improvement(x, y), np.mean(wins), **exact)
