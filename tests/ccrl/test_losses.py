"""Losses against the numbers of the MDPO and BPO sheets (sections 7)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.losses import bounded_target
from ccrl.estimators.stages import GroupBaseline, GroupThreshold, RewardNorm, Standardise
from ccrl.estimators.terms import Term, surrogate
from ccrl.policies import CATEGORICAL, GAUSSIAN

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def batch(**columns: Tensor) -> Data:
    """Rows ``[B]`` as one shuffled batch ``[1, B]``."""
    size = next(iter(columns.values())).shape[0]
    rows = {k: v.unsqueeze(0) for k, v in columns.items()} | {"valid": torch.ones(1, size, dtype=F64)}
    return Data(rows).epoch(Batching("transition", "full"), None)[0]


def gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


# -- MDPO ------------------------------------------------------------------------------------------------------------

PI_K, Q = tensor(0.5, 0.3, 0.2), tensor(1.0, 0.0, -1.0)


def mdpo_terms(inverse_step: float | Tensor, distribution: object) -> tuple[Term, ...]:
    kl = losses.closed_form_kl(distribution)  # type: ignore[arg-type]
    pg = Term("pg", losses.weighted_ratio, aggregates.mean, ratios.token)
    penalty = Term("kl", kl, aggregates.mean, ratios.unweighted, frozenset({"dist"}), None, coef=inverse_step)
    return pg, penalty


def exact_step(t: float) -> tuple[Tensor, float]:
    """Maximise the surrogate over three logits; the batch holds every action, weighted by its probability."""
    advantage = Q - PI_K @ Q
    data = batch(
        action=torch.arange(3),
        log_prob=PI_K.log(),
        advantage=3.0 * PI_K * advantage,  # the aggregation divides by three rows
        old_logits=PI_K.log().expand(3, 3),
    )
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimiser.zero_grad()
        params = {"logits": logits.expand(1, 3, 3)}
        evaluation = {"log_prob": CATEGORICAL.log_prob(params, data["action"]), **params}
        loss, _ = surrogate(mdpo_terms(1.0 / t, CATEGORICAL), evaluation, data)
        loss.backward()
        return loss

    for _ in range(5):
        loss = optimiser.step(closure)
    return logits.detach().softmax(-1), -float(loss.detach())


@pytest.mark.parametrize(
    ("t", "expected"), [(1.0, [0.784399, 0.173139, 0.042463]), (0.5, [0.661783, 0.240835, 0.097382])]
)
def test_mdpo_1_exact_step(t: float, expected: list[float]) -> None:
    pi, value = exact_step(t)
    assert pi.tolist() == pytest.approx(expected, abs=1e-5)
    if t == 1.0:
        assert value == pytest.approx(0.249691, abs=1e-6)


def test_mdpo_8_limits_of_the_step_size() -> None:
    pi, _ = exact_step(1e-6)
    assert pi.tolist() == pytest.approx(PI_K.tolist(), abs=1e-5)
    mean, log_std, evaluation, data = mdpo_4_inputs(shift=0.3)
    free, _ = surrogate(mdpo_terms(0.0, GAUSSIAN)[:1], evaluation, data)
    far, _ = surrogate(mdpo_terms(1e-9, GAUSSIAN), evaluation, data)
    for a, b in zip(gradient(free, mean, log_std), gradient(far, mean, log_std)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def mdpo_4_inputs(shift: float = 0.0) -> tuple[Tensor, Tensor, dict[str, Tensor], Data]:
    """``shift`` moves the current mean off the old one."""
    old_mean, old_log_std = tensor(0.1, -0.2), tensor(-0.1, 0.2)
    action = torch.tensor([[0.5, 0.1], [-0.3, 0.4], [0.2, -1.0]], dtype=F64)
    old = {"mean": old_mean.expand(3, 2), "log_std": old_log_std.expand(3, 2)}
    data = batch(
        action=action,
        log_prob=GAUSSIAN.log_prob(old, action),
        advantage=tensor(1, -2, 0.5),
        old_mean=old["mean"],
        old_log_std=old["log_std"],
    )
    mean, log_std = (old_mean + shift).requires_grad_(), old_log_std.clone().requires_grad_()
    params = {"mean": mean.expand(1, 3, 2), "log_std": log_std.expand(1, 3, 2)}
    return mean, log_std, {"log_prob": GAUSSIAN.log_prob(params, data["action"]), **params}, data


@pytest.mark.parametrize("inverse_step", [1e-3, 1.0, 244.0])
def test_mdpo_4_gradient_at_the_old_policy_is_the_policy_gradient(inverse_step: float) -> None:
    mean, log_std, evaluation, data = mdpo_4_inputs()
    loss, _ = surrogate(mdpo_terms(torch.tensor(inverse_step, dtype=F64), GAUSSIAN), evaluation, data)
    d_mean, d_log_std = gradient(-loss, mean, log_std)
    assert d_mean.tolist() == pytest.approx([0.508918, -0.290472], abs=1e-6)
    assert d_log_std.tolist() == pytest.approx([0.103561, 0.097400], abs=1e-6)


@pytest.mark.parametrize(
    ("old_mean", "mean", "variance", "value"),
    [
        (0.0, 0.35, 1.0, lambda mu, var: 0.7 * mu),  # A(a) = .7 a
        (1.0, 0.5, 0.5, lambda mu, var: -(mu**2 + var)),  # A(a) = -2 a^2 / 2
    ],
)
def test_mdpo_5_gaussian_closed_forms_are_stationary(
    old_mean: float, mean: float, variance: float, value: object
) -> None:
    mu, log_std = tensor(mean).requires_grad_(), tensor(variance).log().div(2).requires_grad_()
    old = {"mean": tensor(old_mean), "log_std": tensor(0.0)}
    objective = value(mu, (2 * log_std).exp()).sum() - GAUSSIAN.kl({"mean": mu, "log_std": log_std}, old) / 0.5  # type: ignore[operator]
    for g in gradient(objective, mu, log_std):
        assert float(g) == pytest.approx(0.0, abs=1e-12)


def test_mdpo_9_standardised_advantages_ignore_shift_and_scale() -> None:
    torch.manual_seed(0)
    x, valid = torch.randn(6, 2, dtype=F64), torch.ones(6, 2, dtype=F64)
    valid[3, 1] = 0.0
    stage = Standardise(ddof=1, eps=0.0)
    first = stage(Data({"valid": valid}).derive(advantage=x))["advantage"]
    poisoned = torch.where(valid > 0, 3.0 * x + 7.0, torch.nan)  # invalid rows are never read
    second = stage(Data({"valid": valid}).derive(advantage=poisoned))["advantage"]
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    kept = first[valid > 0]
    assert float(kept.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(kept.std()) == pytest.approx(1.0)
    assert float(first[3, 1]) == 0.0
    constant = Standardise()(Data({"valid": valid}).derive(advantage=torch.full((6, 2), 3.0, dtype=F64)))
    assert constant["advantage"].eq(0).all()


# -- BPO -------------------------------------------------------------------------------------------------------------


def solve_threshold(pi: Tensor, q: Tensor, low: float, high: float, temperature: float) -> Tensor:
    """``mu`` with ``E_pi[rho*] = 1``, by bisection (the expectation falls in ``mu``)."""
    left, right = q.min() - 50 * temperature, q.max() + 50 * temperature
    for _ in range(200):
        mu = (left + right) / 2
        above = pi @ bounded_target(q - mu, low, high, temperature) > 1.0
        left, right = torch.where(above, mu, left), torch.where(above, right, mu)
    return (left + right) / 2


@pytest.mark.parametrize(
    ("temperature", "mu", "target"),
    [
        (0.5, 1.04731, [1.19891, 0.99055, 1.14820, 0.84385]),
        (1.0, 1.11552, [1.17883, 0.98846, 1.08310, 0.89874]),
        (1e-7, 1.0, [1.2, 1.0, 1.2, 0.8]),
    ],
)
def test_bpo_1_bounded_optimum(temperature: float, mu: float, target: list[float]) -> None:
    pi, q = tensor(0.1, 0.2, 0.3, 0.4), tensor(4, 1, 2, 0)
    threshold = solve_threshold(pi, q, 0.2, 0.2, temperature)
    rho = bounded_target(q - threshold, 0.2, 0.2, temperature)
    assert float(threshold) == pytest.approx(mu, abs=1e-5)
    assert rho.tolist() == pytest.approx(target, abs=1e-5)
    if temperature == 1e-7:
        assert float((pi * (rho - 1)) @ q) == pytest.approx(0.2, abs=1e-5)


def test_bpo_2_uniform_policy() -> None:
    q, pi = tensor(4, 1, 2, 0), torch.full((4,), 0.25, dtype=F64)
    rho = bounded_target(q - 1.5, 0.2, 0.2, 1e-3)  # the median of 0, 1, 2, 4
    assert rho.tolist() == pytest.approx([1.2, 0.8, 1.2, 0.8])
    assert float((pi * (rho - 1)) @ q) == pytest.approx(0.25)
    assert float(0.2 * pi @ (q - 1.5).abs()) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("bounds", "target"),
    [((0.0, 5.0), [0.0] * 8 + [5.0, 5.0]), ((0.5, 2.0), [0.5] * 6 + [1.0, 2.0, 2.0, 2.0])],
)
def test_bpo_3_asymmetric_bounds_are_elite_weights(bounds: tuple[float, float], target: list[float]) -> None:
    q, pi = torch.arange(10, dtype=F64), torch.full((10,), 0.1, dtype=F64)
    low, high = 1.0 - bounds[0], bounds[1] - 1.0
    threshold = solve_threshold(pi, q, low, high, 1e-3)
    assert bounded_target(q - threshold, low, high, 1e-3).tolist() == pytest.approx(target, abs=1e-6)
    # mu is the (1 - kappa)-quantile, kappa = (1 - c_l) / (c_h - c_l)
    kappa = low / (low + high)
    assert float((q > threshold).double().mean()) <= kappa <= float((q >= threshold - 0.01).double().mean())


def median_elements(returns: Tensor, head: Tensor, **options: float) -> Tensor:
    data = batch(**{"return": returns})
    level = ratios.unweighted({}, data)
    return losses.median_loss(**options)(level, returns, {"median": head}, data)  # type: ignore[arg-type]


def test_bpo_4_median_loss() -> None:
    x = tensor(0, 2, 4, 6)
    got = median_elements(x, torch.zeros(1, 4, dtype=F64))
    assert got.flatten().tolist() == pytest.approx([0.69315, 1.12693, 2.01815, 3.00248], abs=1e-5)
    torch.testing.assert_close(got.flatten(), (2 * (x / 2).cosh()).log())
    data = tensor(0, 0, 0, 10)
    u = torch.tensor(0.693013, dtype=F64, requires_grad=True)
    (slope,) = gradient(median_elements(data, u.expand(1, 4)).mean(), u)
    assert float(slope) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="kappa"):
        losses.median_loss(kappa=1.0)


def test_median_loss_of_asymmetric_bounds_is_the_matching_quantile() -> None:
    # kappa = 1/4: minimiser has a quarter of the data above it; small temperature: the 3/4-quantile of 0..99
    data = torch.arange(100, dtype=F64)
    for u, sign in ((70.0, -1), (79.0, 1)):
        head = torch.tensor(u, dtype=F64, requires_grad=True)
        loss = median_elements(data, head.expand(1, 100), kappa=0.25, temperature=0.01).mean()
        assert gradient(loss, head)[0].sign() == sign


def bounded(
    rho: Tensor, temperature: float, returns: Tensor, value: Tensor, head: Tensor | None
) -> tuple[Tensor, Tensor]:
    """BPO loss, mean over the batch, and its gradient with respect to ``log rho``."""
    log_rho = rho.log().requires_grad_()
    data = batch(log_prob=torch.zeros_like(rho), **{"return": returns})
    evaluation = {"log_prob": log_rho.unsqueeze(0), "value": value.unsqueeze(0)}
    if head is not None:
        evaluation["median"] = head.unsqueeze(0)
    loss = losses.bounded_ratio(0.3, 0.3, temperature, threshold="value" if head is None else "median")
    total, _ = surrogate((Term("bpo", loss, aggregates.mean, ratios.token, advantage=None),), evaluation, data)
    return total.detach(), gradient(total, log_rho)[0]


@pytest.mark.parametrize(
    ("rho", "sign", "ppo", "bpo"),
    [
        (0.6, 1, -0.6, -0.6),
        (0.6, -1, 0.0, -0.6),
        (0.75, -1, 0.75, 0.75),
        (1.25, 1, -1.25, -1.25),
        (1.4, 1, 0.0, 1.4),
        (1.4, -1, 1.4, 1.4),
    ],
)
def test_bpo_5_gradients_of_clip_and_bounded_ratio(rho: float, sign: int, ppo: float, bpo: float) -> None:
    zero, advantage = tensor(0.0), tensor(sign)
    assert float(bounded(tensor(rho), 1e-3, advantage, zero, zero)[1]) == pytest.approx(bpo)
    log_rho = tensor(rho).log().requires_grad_()
    data = batch(log_prob=zero, advantage=advantage)
    clipped = (Term("ppo", losses.clip(0.3, 0.3), aggregates.mean, ratios.token),)
    total, _ = surrogate(clipped, {"log_prob": log_rho.unsqueeze(0)}, data)
    assert float(gradient(total, log_rho)[0]) == pytest.approx(ppo)


def test_bpo_6_first_step_is_the_policy_gradient() -> None:
    returns, value = tensor(2, 0.5, -1, 0.2), tensor(1, 1, 0, 0)
    _, slope = bounded(torch.ones(4, dtype=F64), 1e-4, returns, value, None)
    torch.testing.assert_close(4 * slope, -(returns - value))


@pytest.mark.parametrize(
    ("temperature", "targets", "loss", "slope"),
    [
        (1e-3, [1.3, 1.3, 0.7, 0.7], 0.2775, [-0.2625, -0.1125, 0.325, 0.05]),
        (1.0, [1.161115, 1.014988, 0.926524, 0.985012], 0.136270, None),
    ],
)
def test_bpo_7_worked_batch(temperature: float, targets: list[float], loss: float, slope: list[float] | None) -> None:
    returns, value, head = tensor(2, 0.5, -1, 0.2), tensor(1, 1, 0, 0), tensor(0.8, 0.4, -0.5, 0.3)
    assert bounded_target(returns - head, 0.3, 0.3, temperature).tolist() == pytest.approx(targets, abs=1e-6)
    total, got = bounded(tensor(1.05, 0.9, 1.3, 1.0), temperature, returns, value, head)
    assert float(total) == pytest.approx(loss, abs=1e-6)
    if slope is not None:
        assert got.tolist() == pytest.approx(slope, abs=1e-6)
    assert float(median_elements(returns, head.unsqueeze(0)).mean()) == pytest.approx(0.744038, abs=1e-6)


def test_bpo_trains_neither_critic_through_the_policy_loss() -> None:
    heads = {k: tensor(0.1, 0.2).requires_grad_() for k in ("value", "median")}
    log_prob = tensor(0.1, -0.1).requires_grad_()
    data = batch(log_prob=tensor(0, 0), **{"return": tensor(1, -1)})
    evaluation = {"log_prob": log_prob.unsqueeze(0)} | {k: v.unsqueeze(0) for k, v in heads.items()}
    for threshold in heads:
        loss = losses.bounded_ratio(0.2, 0.2, 1.0, threshold=threshold)
        total, _ = surrogate((Term("bpo", loss, aggregates.mean, ratios.token, advantage=None),), evaluation, data)
        total.backward()
        assert log_prob.grad is not None
        assert heads["value"].grad is None
        assert heads["median"].grad is None


def test_bpo_stored_advantage_replaces_the_online_weight() -> None:
    data = batch(log_prob=tensor(0, 0), stored=tensor(2, -3), **{"return": tensor(1, -1)})
    evaluation = {"log_prob": tensor(0, 0).unsqueeze(0), "median": tensor(0, 0).unsqueeze(0)}
    loss = losses.bounded_ratio(0.2, 0.2, 1e-3, weight="stored")
    got = loss(ratios.token(evaluation, data), torch.zeros(1, 2), evaluation, data)
    assert got.flatten().tolist() == pytest.approx([0.4, 0.6])  # |1 - 1.2| * 2, |1 - .8| * 3


@pytest.mark.parametrize(
    ("scores", "advantage", "target"),
    [
        ([1, 1, 0, 0, 0, 0, 0, 0], [1.6202] * 2 + [-0.5401] * 6, [1.2] * 2 + [1.0] * 6),
        ([1, 1, 1, 1, 0, 0, 0, 0], None, [1.2] * 4 + [0.8] * 4),
        ([1, 1, 1, 1, 1, 1, 0, 0], None, [1.0] * 6 + [0.8] * 2),
        ([1, 0, 0.5, 0.25], [1.3175, -1.0247, 0.1464, -0.4392], [1.2, 0.8, 1.2, 0.8]),
        ([1, 1, 1, 1], [0.0] * 4, [1.0] * 4),
        ([3.0], [3.0], [1.2]),  # alone: mean 0, deviation 1, threshold 0
    ],
)
def test_bpo_8_group_relative_targets(scores: list[float], advantage: list[float] | None, target: list[float]) -> None:
    score = tensor(*scores, 9.0, -9.0)  # another group, which must not matter
    group = torch.tensor([5] * len(scores) + [2, 2])
    got = GroupBaseline(scale="std").advantages(score, group)
    threshold = GroupThreshold().thresholds(got, group)
    rho = bounded_target(got - threshold, 0.2, 0.2, 1e-4)[: len(scores)]
    assert rho.tolist() == pytest.approx(target, abs=1e-6)
    if advantage is not None:
        assert got[: len(scores)].tolist() == pytest.approx(advantage, abs=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 2 / 3, 1.0])
def test_group_threshold_interpolates_like_torch(level: float) -> None:
    torch.manual_seed(0)
    group = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 2])
    score = torch.randn(9, dtype=F64)
    got = GroupThreshold(level=level)(Data({"valid": torch.ones(1, 9), "score": score, "group": group}))["threshold"]
    for g in range(3):
        assert got[group == g].tolist() == pytest.approx(
            [float(score[group == g].quantile(level))] * int((group == g).sum())
        )


def test_bpo_9_improvement_identity_on_a_tabular_mdp() -> None:
    # eta(pi*) - eta(pi_0) = eps * E_{d of pi*, a ~ pi_0} |Q_0 - median|, uniform pi_0, even number of actions
    generator = torch.Generator().manual_seed(0)
    states, actions, gamma, eps = 4, 4, 0.9, 0.3
    p = torch.rand(states, actions, states, generator=generator, dtype=F64)
    p, reward = p / p.sum(-1, keepdim=True), torch.rand(states, actions, generator=generator, dtype=F64)
    start, eye = torch.full((states,), 1 / states, dtype=F64), torch.eye(states, dtype=F64)

    def value(pi: Tensor) -> Tensor:
        return torch.linalg.solve(eye - gamma * torch.einsum("sa,sat->st", pi, p), (pi * reward).sum(-1))

    uniform = torch.full((states, actions), 1 / actions, dtype=F64)
    q = reward + gamma * p @ value(uniform)
    median = q.sort(-1).values[:, 1:3].mean(-1, keepdim=True)
    best = uniform * bounded_target(q - median, eps, eps, 1e-12)
    torch.testing.assert_close(best.sum(-1), torch.ones(states, dtype=F64))
    visits = torch.linalg.solve((eye - gamma * torch.einsum("sa,sat->st", best, p)).T, start)
    gain = start @ (value(best) - value(uniform))
    assert float(gain) == pytest.approx(eps * float(visits @ (uniform * (q - median).abs()).sum(-1)), abs=1e-12)


# -- advantages, penalties, critics, plumbing ------------------------------------------------------------------------


def test_group_baselines_on_the_canonical_rewards() -> None:
    score, group = tensor(1, 0, 0, 1), torch.zeros(4, dtype=torch.int64)
    assert GroupBaseline(scale="std").advantages(score, group).tolist() == pytest.approx(
        [0.866024, -0.866024, -0.866024, 0.866024], abs=1e-6
    )
    assert GroupBaseline(scale="std", ddof=0, eps=0.0).advantages(score, group).abs().tolist() == pytest.approx([1] * 4)
    assert GroupBaseline().advantages(score, group).abs().tolist() == pytest.approx([0.5] * 4)
    rloo = GroupBaseline(baseline="leave_one_out")
    assert rloo.advantages(score, group).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    alone = torch.tensor([0, 1, 1, 1])
    assert float(rloo.advantages(score, alone)[0]) == 1.0
    assert float(replace(rloo, single="zero").advantages(score, alone)[0]) == 0.0
    with pytest.raises(ValueError, match="leave_one_out"):
        GroupBaseline(baseline="leave_one_out", scale="std")


def test_sampled_kl_estimators_by_hand() -> None:
    data = batch(log_prob=tensor(0.0, 0.0))
    level = ratios.token({"log_prob": tensor(0.5, -0.5).unsqueeze(0)}, data)
    rows = [f(level, level.valid, {}, data).flatten().tolist() for f in (losses.k1, losses.k2, losses.k3)]
    assert rows[0] == [-0.5, 0.5]
    assert rows[1] == [0.125, 0.125]
    assert rows[2] == pytest.approx([0.1487213, 0.1065307])  # e^.5 - 1.5, e^-.5 - .5


def test_value_losses_by_hand() -> None:
    data = batch(value=tensor(1.0, 1.0, 1.0), **{"return": tensor(2.0, 2.0, 1.0)})
    evaluation, level = {"value": tensor(1.1, 3.0, 0.9).unsqueeze(0)}, ratios.unweighted({}, data)
    plain = losses.value_loss(scale=0.5)(level, level.valid, evaluation, data)
    assert plain.flatten().tolist() == pytest.approx([0.405, 0.5, 0.005])
    # clipped at +-.2: 1.1 -> 1.1, 3 -> 1.2, .9 -> .9; the larger error counts: .9^2, max(1, .8^2), .1^2
    clipped = losses.value_loss(clip_range=torch.tensor(0.2))(level, level.valid, evaluation, data)
    assert clipped.flatten().tolist() == pytest.approx([0.81, 1.0, 0.01])
    far = losses.value_loss(clip_range=0.2)(level, level.valid, {"value": tensor(1.9, 2, 1).unsqueeze(0)}, data)
    assert float(far[0, 0]) == pytest.approx(0.64)  # (1.2 - 2)^2 beats (1.9 - 2)^2


def test_canonical_batch_aggregations() -> None:
    # llm_baselines sheet, C0 with PPO-clip .2
    old = torch.tensor([[-1.2, -0.5, -1.9], [-0.3, -1.6, 0], [-0.7, -0.9, -0.3], [-1.1, 0, 0]], dtype=F64).T
    new = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -1.2, 0], [-0.7, -0.7, -0.7], [-1.5, 0, 0]], dtype=F64).T
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=F64).T
    advantage = tensor(1, -1, -1, 1)
    columns = {"log_prob": old, "valid": valid, "advantage": advantage.expand(3, 4)}
    data = Data(columns).epoch(Batching("sequence", "full"), None)[0]

    def loss(aggregate: object) -> float:
        term = Term("pg", losses.clip(0.2, 0.2), aggregate, ratios.token, stats=losses.ratio_stats(0.2, 0.2))  # type: ignore[arg-type]
        return float(surrogate((term,), {"log_prob": new}, data)[0])

    assert loss(aggregates.mean) == pytest.approx(0.193119, abs=1e-6)
    assert loss(aggregates.sequence_mean) == pytest.approx(0.434517, abs=1e-6)
    assert loss(aggregates.sequence_mean_token_mean) == pytest.approx(0.136945, abs=1e-6)
    assert loss(aggregates.fixed(4 * 3)) == pytest.approx(0.144839, abs=1e-6)
    assert loss(aggregates.fixed(4 * 8)) == pytest.approx(0.054315, abs=1e-6)
    with pytest.raises(ValueError, match="positive count"):
        aggregates.fixed(0)


def test_invalid_rows_may_hold_anything() -> None:
    log_prob = torch.tensor([[-1.0, -torch.inf, 90.0]], dtype=F64, requires_grad=True)
    data = Data(
        {
            "log_prob": torch.tensor([[-1.0, 0.0, -90.0]], dtype=F64),
            "valid": torch.tensor([[1.0, 0.0, 0.0]], dtype=F64),
            "advantage": torch.tensor([[2.0, torch.nan, torch.inf]], dtype=F64),
            "n_valid": torch.tensor(1.0),
        },
        scalars=frozenset({"n_valid"}),
    )
    term = Term("pg", losses.weighted_ratio, aggregates.mean, ratios.token, stats=losses.ratio_stats(0.2, 0.2))
    loss, stats = surrogate((term,), {"log_prob": log_prob}, data)
    assert float(loss.detach()) == -2.0
    assert float(stats["approx_kl"]) == 0.0
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [[-2.0, 0.0, 0.0]]


def test_coefficients_and_weights_enter_the_sum_but_not_the_statistics() -> None:
    data = batch(log_prob=tensor(0, 0), advantage=tensor(1, 3), w=tensor(1, 0.5))
    pg = Term("pg", losses.weighted_ratio, aggregates.mean, ratios.token, weight="w", coef=torch.tensor(10.0))
    total, stats = surrogate((pg, replace(pg, name="again", coef=1.0)), {"log_prob": tensor(0, 0).unsqueeze(0)}, data)
    assert float(stats["pg"]) == float(stats["again"]) == -1.25
    assert float(total) == float(stats["loss"]) == -13.75
    with pytest.raises(ValueError, match="at least one term"):
        surrogate((), {}, data)


def test_reward_normalisation_by_hand() -> None:
    # one environment, gamma .5: discounted returns 2, 2 + .5*2 = 3 | end | 4: mean 3, variance 2/3
    stage = RewardNorm(1, 0.5, clip=3.0, eps=0.0)
    data = Data(
        {
            "reward": tensor(2, 2, 4).unsqueeze(-1),
            "carry": tensor(1, 0, 1).unsqueeze(-1),
            "valid": torch.ones(3, 1, dtype=F64),
        }
    )
    scale = (2 / 3) ** -0.5
    assert stage(data)["shaped_reward"].flatten().tolist() == pytest.approx([2 * scale, 2 * scale, 3.0])  # 4.9: clipped
    assert stage.running.tolist() == [4.0]  # the last episode goes on in the next rollout
