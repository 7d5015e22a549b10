"""One surrogate, many algorithms: gradient identities of the unified estimator (Lv et al. 2025), float64.

The generic surrogate is ``-sum M * A * exp(log pi - stopgrad(log ref))``; each method is a mask ``M``, a denominator
and an advantage. The reference gradients come from the methods' own losses.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.modulations import modulated
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio, Outputs, Ratio, Term, surrogate

F64 = torch.float64
ACTIONS = torch.tensor([2, 0, 1])
OLD = torch.tensor([-1.40, -0.50, -1.30], dtype=F64)
EPS, GAMMA = 0.2, 0.1


def logits() -> Tensor:
    rows = [[0.2, -0.1, 0.4, 0.0], [1.0, 0.0, -0.5, 0.3], [-0.2, 0.6, 0.1, 0.0]]
    return torch.tensor(rows, dtype=F64, requires_grad=True)


def log_probs(x: Tensor) -> Tensor:
    return x.log_softmax(-1).gather(-1, ACTIONS[:, None]).squeeze(-1)


def batch(advantage: float, mask: Tensor | float = 1.0) -> Data:
    """The three tokens as one sequence ``[3, 1]``."""
    one = torch.ones(3, 1, dtype=F64)
    columns = {"valid": one, "log_prob": OLD[:, None], "advantage": advantage * one, "mask": (mask * one.T).T}
    return Data(columns).epoch(Batching("sequence", "full"), None)[0]


def unified(mask: Tensor | float, ratio: Ratio, advantage: float, scale: float = 1.0) -> Tensor:
    """Gradient of the generic surrogate, summed over tokens and divided by ``scale``."""
    x = logits()
    term = Term("upge", modulated(lambda ratio, advantage, batch: batch["mask"]), aggregates.fixed(scale), ratio)
    loss, _ = surrogate((term,), {"log_prob": log_probs(x)[:, None]}, batch(advantage, mask))
    return torch.autograd.grad(loss, x)[0]


def reference(loss: Callable[[Tensor], Tensor]) -> Tensor:
    x = logits()
    return torch.autograd.grad(loss(log_probs(x)), x)[0]


def clip_mask(rho: Tensor, advantage: float, eps: float = EPS) -> Tensor:
    return (((advantage > 0) & (rho <= 1 + eps)) | ((advantage < 0) & (rho >= 1 - eps))).to(F64)


def ppo(log_prob: Tensor, advantage: float, eps: float = EPS) -> Tensor:
    rho = (log_prob - OLD).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - eps, 1 + eps) * advantage).sum()


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def unit_denominator(outputs: Outputs, data: Data) -> LogRatio:
    log_prob = outputs["log_prob"]
    return LogRatio(log_prob, torch.zeros_like(log_prob), data["valid"])


def clipped_denominator(outputs: Outputs, data: Data) -> LogRatio:
    log_prob = outputs["log_prob"]
    rho = (log_prob.detach() - data["log_prob"]).exp().clamp(1 - EPS, 1 + EPS)
    return LogRatio(log_prob, log_prob.detach() - rho.log(), data["valid"])


RHO = (log_probs(logits()).detach() - OLD).exp()
PI = log_probs(logits()).detach().exp()


def test_1_log_probabilities_ratios_masks_and_first_row() -> None:
    assert PI.log().tolist() == pytest.approx([-1.129976, -0.736013, -0.957306], abs=1e-6)
    assert RHO.tolist() == pytest.approx([1.309996, 0.789771, 1.408737], abs=1e-6)
    assert clip_mask(RHO, 1.0).tolist() == [0, 1, 0]
    assert clip_mask(RHO, -1.0).tolist() == [1, 0, 1]
    row = unified(clip_mask(RHO, -1.0), ratios.token, -1.0)[0]
    assert row.tolist() == pytest.approx([-0.346473, -0.256673, 0.886814, -0.283668], abs=1e-6)


def test_2_supervised_and_reinforce() -> None:
    same(unified(1.0, ratios.plain, 1.0), reference(lambda lp: -lp.sum()))
    for advantage in (1.0, -1.0, 0.3):
        same(unified(1.0, ratios.plain, advantage), reference(lambda lp, a=advantage: -(a * lp).sum()))  # type: ignore[misc]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_2_ppo(advantage: float) -> None:
    expected = reference(lambda lp: ppo(lp, advantage))
    same(unified(clip_mask(RHO, advantage), ratios.token, advantage), expected)
    x = logits()
    term = Term("ppo", losses.clip(EPS, EPS), aggregates.fixed(1.0), ratios.token)
    loss, _ = surrogate((term,), {"log_prob": log_probs(x)[:, None]}, batch(advantage))
    same(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_2_gspo(advantage: float) -> None:
    s = RHO.log().mean().exp()
    assert float(s) == pytest.approx(1.133793, abs=1e-6)

    def loss(lp: Tensor) -> Tensor:
        ratio = (lp - OLD).mean().exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - EPS, 1 + EPS) * advantage)

    expected = reference(loss)
    same(unified(clip_mask(s, advantage).expand(3), ratios.sequence_token, advantage, scale=3.0), expected)
    x = logits()  # the same loss as a sequence-level term
    data = batch(advantage).derive(episode_reward=torch.full((1, 1), advantage, dtype=F64))
    term = Term("gspo", losses.clip(EPS, EPS), aggregates.sequence_mean, ratios.sequence, advantage="episode_reward")
    value, _ = surrogate((term,), {"log_prob": log_probs(x)[:, None]}, data)
    same(torch.autograd.grad(value, x)[0], expected)


def test_2_cispo_and_its_other_reading() -> None:
    expected = reference(lambda lp: -(RHO.clamp(1 - EPS, 1 + EPS) * lp).sum())
    same(unified(1.0, clipped_denominator, 1.0), expected)
    x = logits()
    term = Term("cispo", losses.cispo(EPS, EPS), aggregates.fixed(1.0), ratios.token)
    loss, _ = surrogate((term,), {"log_prob": log_probs(x)[:, None]}, batch(1.0))
    same(torch.autograd.grad(loss, x)[0], expected)
    saturated = ((RHO - 1).abs() <= EPS).to(F64)
    dropped = unified(saturated, ratios.token, 1.0)
    assert float((dropped - expected).abs().max()) > 0.5


def test_2_and_3_luffy_and_srft() -> None:
    slope = GAMMA / (PI + GAMMA).square()
    assert slope.tolist() == pytest.approx([0.558772, 0.298272, 0.427015], abs=1e-6)
    same(unified(slope, unit_denominator, 1.0), reference(lambda lp: -(lp.exp() / (lp.exp() + GAMMA)).sum()))
    same(unified(1.0, unit_denominator, 0.7), reference(lambda lp: -(0.7 * lp.exp()).sum()))


def test_5_group_advantages() -> None:
    reward, group = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0], dtype=F64), torch.zeros(8, dtype=torch.int64)
    centred = GroupBaseline().advantages(reward, group)
    assert centred[:2].tolist() == [0.75, -0.25]
    scaled = GroupBaseline(scale="std", eps=0.0).advantages(reward, group)
    assert scaled[:2].tolist() == pytest.approx([1.620185, -0.540062], abs=1e-6)
    verl = GroupBaseline(scale="std").advantages(reward, group)  # eps 1e-6
    assert verl[:2].tolist() == pytest.approx([1.620182, -0.540061], abs=1e-6)


def test_7_limits() -> None:
    x = logits()
    for advantage in (1.620182, -0.540061):
        # no clipping and old = current: PPO is REINFORCE
        data = Data(
            {k: v for k, v in batch(advantage).items() if k != "log_prob"} | {"log_prob": PI.log()[:, None]},
            scalars=frozenset({"n_valid", "n_sequences"}),
        )
        term = Term("ppo", losses.clip(1e9, 1e9), aggregates.fixed(1.0), ratios.token)
        loss, _ = surrogate((term,), {"log_prob": log_probs(x)[:, None]}, data)
        same(torch.autograd.grad(loss, x)[0], unified(1.0, ratios.plain, advantage))


@pytest.mark.parametrize(("reward", "mu"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.4)])
def test_7_reward_and_demonstration_terms_add_up(reward: float, mu: float) -> None:
    x = logits()
    pg = Term("rl", losses.weighted_ratio, aggregates.fixed(1.0), ratios.token)
    sft = Term("sft", losses.neg_log_prob, aggregates.fixed(1.0), ratios.plain, coef=torch.tensor(mu, dtype=F64))
    loss, _ = surrogate((pg, sft), {"log_prob": log_probs(x)[:, None]}, batch(reward))
    expected = reward * unified(1.0, ratios.token, 1.0) + mu * reference(lambda lp: -lp.sum())
    same(torch.autograd.grad(loss, x)[0], expected)
