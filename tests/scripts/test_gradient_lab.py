"""The gradient lab: its statistics by hand, its estimators against exact gradients, every name runs."""

from __future__ import annotations

import csv
import math
from itertools import islice, pairwise

import pytest
import torch

from ccrl.experiment.csv_table import read_rows
from ccrl.returns import gae
from ccrl.seeding import stream_seed
from ccrl.updaters import GradientEstimate
from scripts import gradient_lab as lab
from scripts import gradient_lab_estimators as estimators
from scripts import gradient_lab_problems as problems
from scripts.studies.momentum import study as momentum_study

pytest.importorskip("gpytorch")
F64 = torch.float64


def vector(*numbers):
    return torch.tensor(numbers, dtype=F64)


@pytest.fixture(scope="module")
def lqr():
    return problems.Setting("lqr", warmup=200)


def test_summary_by_hand():
    """Estimates (2, 2) and (2, 0) of (2, 0): mean (2, 1), variance 2 in the second component."""
    got = lab.summary([(vector(2, 2), 1.0, 0.5), (vector(2, 0), 0.5, 2.0)], vector(2, 0))
    expected = {
        "angle": 22.5, "angle_se": 22.5, "bias": 0.5, "bias_se": 0.5, "std": 2**0.5 / 2, "rmse": 2**0.5 / 2,
        "snr": 2.5, "coverage": 0.75, "chi2": 0.5,
    }  # fmt: skip
    assert got == pytest.approx(expected)
    zeros = lab.summary([(vector(0, 0), 0.0, 0.0)] * 2, vector(2, 0))
    assert (zeros["angle"], zeros["snr"]) == (90.0, math.inf)


def test_calibration_by_hand():
    """Errors (1, 0.5) with variances (4, 1/16): inside 1.96 * 2, outside 1.96 / 4; chi2 = (1/4 + 4) / 2."""
    covariance = torch.diag(vector(4, 1 / 16))
    estimate = GradientEstimate(vector(2, 1.5), covariance=lambda v: covariance @ v)
    assert lab._calibration(estimate, vector(1, 1)) == pytest.approx((0.5, 2.125))
    assert all(math.isnan(x) for x in lab._calibration(GradientEstimate(vector(2, 1.5)), vector(1, 1)))


@pytest.mark.parametrize("name", ["mc", "rloo", "gpomdp", "bpg2s"])
def test_unbiased_estimators_and_calibrated_covariances(name, lqr):
    """Means within 4.5 standard errors. Returns have heavy tails, and Bayesian quadrature is surer than its model is
    right: of nominal 95 % the intervals reach about 90 % and 60 % at 100 episodes."""
    estimate = estimators.build(name, lqr, 100)
    results = []
    for data in islice(lqr.rollouts(100, seed=7), 60):
        got = estimate(data)
        results.append((got.mean, *lab._calibration(got, lqr.truth)))
    row = lab.summary(results, lqr.truth)
    means = torch.stack([mean for mean, *_ in results])
    error = (means.mean(0) - lqr.truth).abs() / (means.std(0) / 60**0.5)
    assert error.max() < 4.5
    assert row["coverage"] > (0.75 if name != "bpg2s" else 0.4)


def test_bayesian_quadrature_on_the_bandit():
    """The bandit of docs/bpg.md: at 100 paths the reward lies in the kernel's span."""
    setting = problems.Setting("bandit-linear", warmup=10)
    built = {name: estimators.build(name, setting, 100) for name in ("mc", "bpg1")}
    means = {name: [] for name in built}
    for data in islice(setting.rollouts(100, seed=1), 30):
        for name, estimate in built.items():
            means[name].append(estimate(data).mean)
    spread = {name: torch.stack(x).std(0) for name, x in means.items()}
    assert 0.09 < spread["mc"][0] < 0.21
    assert 0.2 < spread["mc"][1] < 0.45
    assert spread["bpg1"].max() < 2e-5


@pytest.fixture(scope="module")
def mdp():
    """Discounted, unlike the regulator."""
    return problems.Setting("random-mdp", warmup=200)


def test_the_advantage_estimator_is_discounted_from_the_start(mdp):
    data = next(mdp.rollouts(4, seed=3))
    value, next_value = data.state_values(lambda x: problems.design(mdp.problem.features(x)).double() @ mdp.critic)
    a = torch.zeros_like(value)
    carried = torch.zeros(4, dtype=F64)
    for t in reversed(range(data.shape[0])):
        error = data["reward"][t].double() + 0.9 * data["alive"][t] * next_value[t] - value[t]
        carried = error + 0.9 * 0.95 * data["carry"][t] * carried
        a[t] = carried
    expected = mdp.scores(mdp.theta, data, "step").vjp(a * 0.9 ** data["t"].double() / 4)
    torch.testing.assert_close(estimators.build("gae", mdp, 4)(data).mean, expected, rtol=1e-4, atol=1e-6)


def test_scaled_estimates_have_squared_covariances(mdp):
    class Fixed:
        def fit(self, have, ctx): ...

        def prepare(self, have, ctx):
            return have

        def gradient(self, theta, data, ctx):
            return GradientEstimate(vector(1, 2), covariance=lambda v: 3.0 * v)

    got = estimators._prepared(mdp, Fixed(), lambda data, ready: vector(2)[0])(next(mdp.rollouts(2, seed=0)))
    assert got.mean.tolist() == [2.0, 4.0]
    assert got.covariance(vector(1, 0)).tolist() == [12.0, 0.0]


def test_the_actor_critic_is_scaled_to_whole_paths(mdp, monkeypatch):
    monkeypatch.setattr(estimators, "_prepared", lambda setting, estimator, scale=None: scale)
    setting = problems.Setting("CartPole-v1", warmup=5, reference=10)
    data = next(setting.rollouts(5, seed=0))
    scale = estimators.build("bac", mdp, 5)
    assert float(scale(data, None)) == pytest.approx(float(data["valid"].sum()) / 5)


def test_a_scaled_quadrature_has_the_mean_of_the_plain_one(lqr):
    """And a covariance in the scale of the returns: their variance over the number of parameters."""
    data = next(lqr.rollouts(20, seed=5))
    plain, scaled = (estimators.build(name, lqr, 20)(data) for name in ("bpg2c", "bpg2s"))
    torch.testing.assert_close(scaled.mean, plain.mean, rtol=1e-5, atol=1e-6)
    s = float(data["reward"].double().sum(0).var(unbiased=False)) / 2
    torch.testing.assert_close(scaled.covariance(vector(1, 2)), s * plain.covariance(vector(1, 2)), rtol=1e-4, atol=0)


def test_momentum_methods_arrive_along_the_gradient_by_their_own_steps(mdp, monkeypatch):
    seen, step = [], estimators.NPGIGTEstimator.step

    def watched(self, theta, gradient, have, ctx):
        seen.append((theta.clone(), float(ctx.k)))
        return step(self, theta, gradient, have, ctx)

    monkeypatch.setattr(estimators.NPGIGTEstimator, "step", watched)
    estimators.build("npg_igt", mdp, 2, path_step=0.1)(next(mdp.rollouts(2, seed=0)))
    assert [k for _, k in seen] == list(range(estimators.PATH + 1))
    torch.testing.assert_close(seen[-1][0], mdp.theta)
    for k, ((before, _), (after, _)) in enumerate(pairwise(seen)):
        torch.testing.assert_close(after - before, 0.1 * 2 / (k + 2) * mdp.truth / mdp.truth.norm())


def test_critic_and_fisher_matrix_of_the_warm_up():
    """Ridge regression on the reward to go of valid rows; the mean over episodes of their scores' products."""
    setting = problems.Setting("CartPole-v1", warmup=20, reference=40)
    data = next(setting.rollouts(20, stream_seed(setting.seed, "critic")))
    u = setting.scores(setting.theta, data, "trajectory").dense()
    torch.testing.assert_close(setting.fisher, u @ u.T / 20)
    keep = data["valid"] > 0
    x = problems.design(data["obs"][keep].double())
    residual = x @ setting.critic - setting.weigh(data)["reward_to_go"][keep].double()
    torch.testing.assert_close(x.T @ residual, -1e-3 * setting.critic, rtol=1e-3, atol=1e-6)


def test_the_reference_is_discounted(mdp):
    mean, error = mdp._reference(mdp.make(200), 20)
    assert ((mean - mdp.truth).abs() / error).max() < 4.5


def test_the_reference_is_the_gradient(lqr):
    """What stands in for the truth where there is none, on a task that has one."""
    mean, error = lqr._reference(lqr.make(200), 40)
    assert ((mean - lqr.truth).abs() / error).max() < 4.5
    assert (error / lqr.truth.norm()).max() < 0.05
    inexact = problems.Setting("CartPole-v1", warmup=20, reference=60)
    assert inexact.truth_error.shape == inexact.truth.shape == inexact.theta.shape


def test_surrogates_are_the_agents_own(lqr):
    """MDPO's loss at the sampling parameters is a mean of standardised advantages times scores; as a sum over steps."""
    estimate = estimators.build("mdpo", lqr, 5)
    data = next(lqr.rollouts(5, seed=3))
    got = estimate(data).mean
    value, next_value = data.state_values(lambda x: problems.design(x).double() @ lqr.critic)
    a = gae(data["reward"].double(), value, next_value, data["alive"].double(), data["carry"].double(), 0.95)
    a = (a - a.mean()) / a.std(unbiased=False)
    u = lqr.scores(lqr.theta, data, "step")
    torch.testing.assert_close(got, u.vjp(a / 5), rtol=2e-3, atol=1e-3)


def test_every_name_runs_and_files_are_written(tmp_path):
    args = ["--env", "random-mdp", "--samples", "3", "--repetitions", "2", "--out", str(tmp_path / "x" / "lab")]
    rows = lab.main([*args, "--estimators", *estimators.NAMES])
    assert [row["estimator"] for row in rows] == list(estimators.NAMES)
    for row in rows:
        assert math.isfinite(row["angle"]), row
        assert row["rmse"] < 100, row
    saved = list(csv.DictReader((tmp_path / "x" / "lab.csv").open()))
    assert [row["estimator"] for row in saved] == list(estimators.NAMES)
    text = (tmp_path / "x" / "lab.md").read_text()
    assert text.startswith("`python scripts/gradient_lab.py --env random-mdp")
    assert "| npg_igt | 3 |" in text
    assert (tmp_path / "x" / "lab.png").stat().st_size > 10_000


def test_one_episode_is_enough():
    rows = lab.measure(
        lab.Options(env="lqr", samples=(1,), repetitions=2, estimators=("rloo", "gpomdp", "bpg1", "bac"))
    )
    assert all(math.isfinite(row["angle"]) for row in rows)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"expected some of mc, .* got nope"):
        lab.Options(estimators=("mc", "nope"))
    with pytest.raises(ValueError, match="repetitions >= 2"):
        lab.Options(repetitions=1)
    with pytest.raises(ValueError, match="bpg1, bpg2"):
        estimators.build("bpg7", problems.Setting("lqr", warmup=5), 2)


def test_studies_of_momentum(tmp_path):
    folders = ["--out", str(tmp_path / "runs"), "--figures", str(tmp_path)]
    rows = momentum_study.main(["errors", "--seeds", "1", "--at", "2", "4", "--methods", "npg_igt", *folders])
    assert rows[0].keys() == {"method", "error at 2", "error at 4", "gap", "gap se"}
    kept = read_rows(tmp_path / "momentum_errors.csv")
    assert [(row["method"], row["seed"]) for row in kept] == [("npg_igt", "0")]
    assert rows[0]["error at 2"] > 0
    rows = momentum_study.main(
        ["samples", "--seeds", "2", "--trajectories", "40", "--methods", "harpg", "--learning-rates", "1", *folders]
    )
    assert 0 < rows[0]["gap"] < 6.0
    one, two = (float(row["gap"]) for row in read_rows(tmp_path / "runs" / "samples.csv"))
    assert (rows[0]["gap"], rows[0]["gap sd"]) == pytest.approx(((one + two) / 2, abs(one - two) / 2**0.5))


def test_missing_seeds_of_cartpole_are_added_with_the_step_size_of_the_first(tmp_path, monkeypatch):
    played = []

    def play(cell):
        played.append((cell["method"], cell["gamma_0"], cell["seed"]))
        last = 190.0 - 100 * abs(cell["gamma_0"] - 0.3) - cell["seed"]
        return [{"iteration": k, "steps": 1000 * k, "return": r} for k, r in ((2, 20.0), (4, last))]

    monkeypatch.setattr(momentum_study, "play_cartpole", play)
    command = ["cartpole", "--methods", "nmpg", "--out", str(tmp_path / "runs"), "--figures", str(tmp_path)]
    momentum_study.main([*command, "--seeds", "2"])
    assert played == [("nmpg", 0.1, 0), ("nmpg", 0.3, 0), ("nmpg", 1.0, 0), ("nmpg", 0.3, 1)]
    played.clear()
    rows = momentum_study.main([*command, "--seeds", "3"])
    assert played == [("nmpg", 0.3, 2)]
    assert [(row["gamma_0"], row["seed"], row["return"]) for row in rows if row["iteration"] == 4] == [
        (0.3, 0, 190.0), (0.3, 1, 189.0), (0.3, 2, 188.0)
    ]  # fmt: skip
    text = (tmp_path / "momentum_cartpole.md").read_text()
    assert text.startswith("`python scripts/studies/momentum cartpole --methods nmpg --out")
    assert "| nmpg | 0.3 | 3 of 3 | 4 | 4000 | 189 |" in text
    assert (tmp_path / "momentum_cartpole.png").stat().st_size > 10_000
    assert len(read_rows(tmp_path / "momentum_cartpole.csv")) == 6


def test_momentum_studies_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match=r"methods: expected some of .*nharpg.*, got adam"):
        momentum_study.Samples(out=None, methods=("adam",))
    with pytest.raises(ValueError, match="seeds >= 1, got 1 and 0"):
        momentum_study.CartPole(out=None, seeds=0)


def test_iterations_to_the_target():
    study = momentum_study.CartPole(out=None, methods=("pg",), target=180.0)
    rows = [
        {"method": "pg", "gamma_0": 0.1, "seed": seed, "iteration": k, "steps": 1000 * k, "return": r}
        for seed, curve in enumerate(((10, 190, 50), (20, 100, 185), (0, 0, 179)))
        for k, r in zip((2, 4, 6), curve)
    ]
    row = study.summary(rows)[0]
    assert (row["reached"], row["median iteration"], row["median steps"]) == ("2 of 3", 6, 6000)
    assert row["last return"] == 138
