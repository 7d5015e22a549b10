"""The unified gradient: with its modulation a surrogate is the classic one, to 1e-15 (Lv et al. 2025, table 1)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators import losses, ratios
from ccrl.estimators.modulations import cispo_mask, clip_mask, clipped_weight, modulated, shaping
from ccrl.estimators.terms import LogRatio, Loss, Ratio

F64 = torch.float64
LOGITS = torch.tensor([[0.2, -0.1, 0.4, 0.0], [1.0, 0.0, -0.5, 0.3], [-0.2, 0.6, 0.1, 0.0]], dtype=F64)
ACTION = torch.tensor([[2], [0], [1]])
OLD = torch.tensor([[-1.40], [-0.50], [-1.30]], dtype=F64)
"""Three tokens of one sequence, ``[T, 1]``."""


def log_prob(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ACTION)


def unified(loss: Loss, ratio: Ratio, advantage: float = 1.0, old: Tensor = OLD) -> Tensor:
    """Gradient of the summed loss with respect to the logits."""
    logits = LOGITS.clone().requires_grad_()
    batch = Data({"log_prob": old, "valid": torch.ones_like(old)})
    evaluation = {"log_prob": log_prob(logits)}
    level = ratio(evaluation, batch)
    return torch.autograd.grad(loss(level, torch.full_like(old, advantage), evaluation, batch).sum(), logits)[0]


def classic(objective: Any) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(objective(log_prob(logits)), logits)[0]


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=0)


ONE = modulated(lambda level, advantage, batch: torch.ones_like(level.valid))
NO_REFERENCE = torch.zeros_like(OLD)


def test_log_probs_ratios_and_masks() -> None:
    level = ratios.token({"log_prob": log_prob(LOGITS)}, Data({"log_prob": OLD, "valid": torch.ones_like(OLD)}))
    expected = torch.tensor([-1.129976, -0.736013, -0.957306], dtype=F64)
    torch.testing.assert_close(level.log_prob[:, 0], expected, atol=6e-7, rtol=0)
    expected = torch.tensor([1.309996, 0.789771, 1.408737], dtype=F64)
    torch.testing.assert_close(level.ratio[:, 0], expected, atol=6e-7, rtol=0)
    mask = clip_mask(0.2, 0.2)
    assert mask(level, torch.ones_like(OLD), Data({}))[:, 0].tolist() == [0.0, 1.0, 0.0]
    assert mask(level, -torch.ones_like(OLD), Data({}))[:, 0].tolist() == [1.0, 0.0, 1.0]
    row = unified(modulated(mask), ratios.token, -1.0)[0]
    expected = torch.tensor([-0.346473, -0.256673, 0.886814, -0.283668], dtype=F64)
    torch.testing.assert_close(row, expected, atol=6e-7, rtol=0)


def test_supervised_and_reinforce() -> None:
    same(unified(ONE, ratios.plain), classic(lambda lp: -lp.sum()))
    same(unified(ONE, ratios.plain, -0.7), classic(lambda lp: 0.7 * lp.sum()))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ppo_and_gspo(advantage: float) -> None:
    found = unified(modulated(clip_mask(0.2, 0.2)), ratios.token, advantage)
    same(found, unified(losses.clip(0.2, 0.2), ratios.token, advantage))

    def clipped(s: Tensor) -> Tensor:
        return -torch.minimum(s * advantage, s.clamp(0.8, 1.2) * advantage)

    same(found, classic(lambda lp: clipped((lp - OLD).exp()).sum()))
    found = unified(modulated(clip_mask(0.2, 0.2)), ratios.sequence_token, advantage)
    same(found, classic(lambda lp: 3 * clipped((lp - OLD).mean().exp())))
    assert float((log_prob(LOGITS) - OLD).mean().exp()) == pytest.approx(1.133793, abs=6e-7)


def test_two_readings_of_cispo() -> None:
    published = unified(modulated(clipped_weight(0.2, 0.2)), ratios.plain)
    same(published, unified(losses.cispo(0.2, 0.2), ratios.token))
    same(published, classic(lambda lp: -((lp - OLD).exp().clamp(0.8, 1.2).detach() * lp).sum()))
    masked = unified(modulated(cispo_mask(0.2, 0.2)), ratios.token)
    # all three tokens are saturated: the table's reading loses them, clip(r) (1 - pi) at most
    assert not masked.any()
    assert float((published - masked).abs().max()) == pytest.approx(1.2 * (1 - math.exp(-1.129976)), abs=1e-6)


def test_demonstrations_of_luffy_and_srft() -> None:
    same(unified(ONE, ratios.token, 0.6, NO_REFERENCE), classic(lambda lp: -0.6 * lp.exp().sum()))
    found = unified(modulated(shaping(0.1)), ratios.token, 0.6, NO_REFERENCE)
    same(found, classic(lambda lp: -0.6 * (lp.exp() / (lp.exp() + 0.1)).sum()))
    level = LogRatio(log_prob(LOGITS), NO_REFERENCE, torch.ones_like(OLD))
    expected = torch.tensor([0.558772, 0.298272, 0.427015], dtype=F64)
    found = shaping(0.1)(level, OLD, Data({}))[:, 0]
    torch.testing.assert_close(found, expected, atol=6e-7, rtol=0)


def test_one_objective_on_three_arms() -> None:
    mu, reward = 0.4, torch.tensor([1.0, 0.0, 0.5], dtype=F64)
    shown = torch.tensor([0.1, 0.6, 0.3], dtype=F64)
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
    pi = logits.softmax(0)
    objective = (pi * reward).sum() - mu * (shown * (shown.log() - pi.log())).sum()
    assert float(objective.detach()) == pytest.approx(0.4169281613, abs=6e-11)
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)
    numbers = torch.tensor([0.050761, 0.032049, -0.082810], dtype=F64)
    torch.testing.assert_close(expected, numbers, atol=6e-7, rtol=0)
    valid = torch.ones(1, 3, dtype=F64)

    def ascent(loss: Loss, advantage: Tensor, weight: Tensor) -> Tensor:
        """Expectation over arms drawn with ``weight``."""
        evaluation, batch = {"log_prob": logits.log_softmax(0).unsqueeze(0)}, Data({"valid": valid})
        element = loss(ratios.plain(evaluation, batch), advantage, evaluation, batch)
        return -torch.autograd.grad((weight * element).sum(), logits)[0]

    pi = pi.detach()
    parts = ascent(losses.weighted_ratio, reward, pi) + mu * ascent(losses.neg_log_prob, reward, shown)
    same(parts, expected)
    united = reward + mu * shown / pi
    numbers = torch.tensor([1.113117, 1.118994, 0.777838], dtype=F64)
    torch.testing.assert_close(united, numbers, atol=6e-7, rtol=0)
    same(ascent(losses.weighted_ratio, united, pi), expected)
    # mu = 0 is reinforcement alone; no reward and mu = 1 imitation alone, whose gradient is pi_beta - pi
    same(ascent(losses.neg_log_prob, reward, shown), shown - pi)
    same(ascent(losses.weighted_ratio, reward, pi), pi * (reward - (pi * reward).sum()))


def test_without_clip_and_on_policy_everything_is_reinforce() -> None:
    now = log_prob(LOGITS)
    found = unified(losses.clip(1.0, math.inf), ratios.token, -0.4, now)
    same(found, unified(ONE, ratios.plain, -0.4, now))
