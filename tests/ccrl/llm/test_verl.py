"""verl's contracts, without verl: signatures, shapes, means over the whole optimiser batch, registration."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.llm.baselines import GRPO, GSPO, DrGRPO
from agents.llm.bnpo import BNPO
from agents.llm.d3s import D3S
from agents.llm.r2vpo import R2VPO
from ccrl.llm.verl import VerlAdvantage, VerlLoss, bridge, register

SIZES = {"max_length": 4, "group_size": 2}
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
UIDS = np.array(["x", "y", "x", "y"], dtype=object)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Log-probabilities, advantages and mask ``(4, 4)``; garbage where the mask is 0."""
    torch.manual_seed(0)
    old = -torch.rand(4, 4, dtype=torch.float64)
    new = (old + 0.4 * torch.randn(4, 4, dtype=torch.float64)).masked_fill(MASK == 0, -torch.inf)
    return {"old_log_prob": old, "log_prob": new, "advantages": torch.randn(4, 1).double().expand(4, 4),
            "response_mask": MASK}  # fmt: skip


def functions(method: Any, config: Any = None) -> tuple[VerlLoss, VerlAdvantage]:
    return bridge(method.Recipe, config or method.Config(), **SIZES)


def grpo_by_hand(batch: dict[str, Tensor], low: float = 0.2, high: float = 0.2) -> Tensor:
    """Per token ``(4, 4)``."""
    ratio = torch.where(MASK > 0, batch["log_prob"] - batch["old_log_prob"], 0.0).exp()
    advantage = batch["advantages"]
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage) * MASK


def test_policy_loss_is_a_scalar_and_metrics(batch: dict[str, Tensor]) -> None:
    found = functions(GRPO)[0](**batch)
    assert len(found) == 2
    loss, metrics = found
    assert loss.shape == ()
    assert all(isinstance(value, float) for value in metrics.values())
    assert {"actor/clip_fraction", "actor/approx_kl", "actor/loss"} <= metrics.keys()
    by_hand = (grpo_by_hand(batch).sum(1) / MASK.sum(1)).mean()
    torch.testing.assert_close(loss, by_hand)


def test_gradient_is_finite_and_zero_off_the_mask(batch: dict[str, Tensor]) -> None:
    leaf = batch["log_prob"].masked_fill(MASK == 0, 0.0).requires_grad_()
    functions(GRPO)[0](**batch | {"log_prob": leaf})[0].backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())
    assert bool((leaf.grad[MASK == 0] == 0).all())
    assert bool((leaf.grad[MASK > 0] != 0).any())


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean_token_mean", "sequence_mean", "fixed"])
def test_micro_batches_of_two_ranks_average_to_the_whole(batch: dict[str, Tensor], aggregate: str) -> None:
    loss = functions(GRPO, GRPO.Config(aggregate=aggregate))[0]
    info = {"dp_size": 2, "batch_num_tokens": MASK.sum(), "global_batch_size": 4, "loss_scale_factor": None}
    config = SimpleNamespace(global_batch_info=info)
    pieces = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    ranks = [sum(loss(**pieces[i], config=config)[0] for i in rows) for rows in ((0, 1), (2, 3))]
    torch.testing.assert_close((ranks[0] + ranks[1]) / 2, loss(**batch)[0])


def test_ranks_without_counts_are_refused(batch: dict[str, Tensor]) -> None:
    config = SimpleNamespace(global_batch_info={"dp_size": 2, "global_batch_size": 4})
    with pytest.raises(ValueError, match="batch_num_tokens"):
        functions(GRPO)[0](**batch, config=config)


def test_token_weights_multiply_the_loss(batch: dict[str, Tensor]) -> None:
    weights = torch.rand(4, 4, dtype=torch.float64)
    loss, _ = functions(GRPO)[0](**batch, rollout_is_weights=weights)
    torch.testing.assert_close(loss, ((grpo_by_hand(batch) * weights).sum(1) / MASK.sum(1)).mean())
    with pytest.raises(ValueError, match="weights of tokens"):
        functions(GRPO)[0](**batch, rollout_is_weights=weights[:, :1])


def test_sequence_ratio(batch: dict[str, Tensor]) -> None:
    loss, _ = functions(GSPO, GSPO.Config(clip_low=0.1, clip_high=0.1))[0](**batch)
    gap = torch.where(MASK > 0, batch["log_prob"] - batch["old_log_prob"], 0.0)
    ratio, advantage = (gap.sum(1) / MASK.sum(1)).exp(), batch["advantages"][:, 0]
    torch.testing.assert_close(
        loss, -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).mean(), atol=1e-7, rtol=0.0
    )


def rewards(scores: list[float]) -> Tensor:
    """On the last token of every row; garbage after it."""
    last = MASK.sum(1).long() - 1
    return torch.full((4, 4), 7.0).where(MASK == 0, torch.tensor(0.0)).index_put(
        (torch.arange(4), last), torch.tensor(scores)
    )  # fmt: skip


def test_advantages_compare_completions_of_one_uid() -> None:
    advantage, returns = functions(DrGRPO)[1](rewards([1.0, 0.5, 0.0, 0.25]), MASK, index=UIDS, config=object())
    assert advantage.shape == returns.shape == (4, 4)
    torch.testing.assert_close(advantage, torch.tensor([[0.5], [0.125], [-0.5], [-0.125]]) * MASK)
    torch.testing.assert_close(returns, advantage)


def test_advantages_use_the_statistics_of_the_whole_batch() -> None:
    """BNPO: rates 1/2 and 1/2 do not vary, so its Beta density is that of REINFORCE; 0.9 and 0.2 do."""
    estimator = functions(BNPO)[1]
    plain, _ = estimator(rewards([1.0, 1.0, 0.0, 0.0]), MASK, index=UIDS)
    torch.testing.assert_close(plain, torch.tensor([[0.5], [0.5], [-0.5], [-0.5]]) * MASK)
    weighted, _ = estimator(rewards([1.0, 0.4, 0.8, 0.0]), MASK, index=UIDS)
    assert float(weighted[0, 0]) != pytest.approx(0.1)


def test_groups_are_needed() -> None:
    with pytest.raises(ValueError, match="uids"):
        functions(GRPO)[1](rewards([1.0, 0.0, 0.0, 0.0]), MASK)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        (GRPO, {"kl_coef": 0.1}, "compares with a reference policy"),
        (GRPO, {"entropy_coef": 0.1}, "wants \\['entropy'\\]"),
        (R2VPO, {}, "R2VPORecipe does not fit into verl"),
        (D3S, {}, "D3SRecipe does not fit into verl"),
    ],
)
def test_recipes_that_need_more_are_refused(method: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        functions(method, method.Config(**options))


def test_missing_verl_names_the_command() -> None:
    if "verl" in sys.modules:
        pytest.skip("verl is installed")
    with pytest.raises(ImportError, match=r"pip install -e \"\.\[verl\]\""):
        register("bnpo", BNPO.Recipe, BNPO.Config(), **SIZES)


def test_registration(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor]) -> None:
    """A stand-in with verl's two registries."""
    losses: dict[str, Any] = {}
    estimators: dict[str, Any] = {}
    core = ModuleType("verl.trainer.ppo.core_algos")
    core.register_policy_loss = lambda name: lambda fn: losses.setdefault(name, fn)  # type: ignore[attr-defined]
    core.register_adv_est = lambda name: lambda fn: estimators.setdefault(name, fn)  # type: ignore[attr-defined]
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    register("ours", GRPO.Recipe, GRPO.Config(), **SIZES)
    # by position and by name, as verl's actor and its trainer call them
    loss, metrics = losses["ours"](*batch.values(), "token-mean", SimpleNamespace(global_batch_info={}), None)
    torch.testing.assert_close(loss, functions(GRPO)[0](**batch)[0])
    assert metrics
    found = estimators["ours"](
        token_level_rewards=rewards([1.0, 0.5, 0.0, 0.25]), response_mask=MASK, config=object(), index=UIDS
    )
    assert [x.shape for x in found] == [(4, 4), (4, 4)]
    assert list(inspect.signature(losses["ours"]).parameters)[:7] == [
        "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
    ]  # fmt: skip
