"""BPO and GBPO: targets, losses and gradients by hand, on bandits and small batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.losses import bounded_target
from ccrl.estimators.stages import GroupBaseline, GroupThreshold
from ccrl.estimators.terms import Term, no_ratio, surrogate

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
    level = no_ratio(data["valid"])
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
    got = GroupThreshold(level=level)(Data({"valid": torch.ones(1, 9), "episode_reward": score, "group": group}))[
        "threshold"
    ]
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
