"""A method's loss on numbers of the caller, and the page that shows it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm import METHODS, get_method
from agents.llm.baselines import DAPO, GRPO, SAPO
from agents.llm.copg import CoPG
from agents.llm.d3s import D3S
from agents.llm.gdpo import GDPO
from agents.llm.r2vpo import R2VPO
from ccrl.estimators.evaluate import loss_of
from ccrl.packages import ROOT

OLD = torch.tensor([[-1.0, -1.0], [-2.0, 0.0]], dtype=torch.float64)
NEW = OLD + torch.tensor([[1.5, 0.5], [1.0, 1.0]], dtype=torch.float64).log()
MASK = torch.tensor([[1, 1], [1, 0]])
REWARD = torch.tensor([1.0, 0.0])
A = 0.5 / (math.sqrt(0.5) + 1e-6)
"""(1 - 1/2) / (std + 1e-6), the deviation of 1 and 0 being sqrt(1/2)."""


def test_grpo_by_hand() -> None:
    """Ratios 1.5 and 1 with A, and 0.5 with -A: the first and the last are clipped, to 1.2 and 0.8."""
    found = loss_of(GRPO, None, NEW, OLD, MASK, reward=REWARD)
    assert found.advantage is not None
    torch.testing.assert_close(found.advantage, A * torch.tensor([[1.0, -1.0], [1.0, 0.0]]).double())
    assert float(found.loss) == pytest.approx(A * (-(1.2 + 1.0) / 2 + 0.8) / 2)
    # the middle token's slope is -A rho, halved by its sequence's two tokens and by the two sequences
    torch.testing.assert_close(found.gradient, torch.tensor([[0.0, 0.0], [-A / 4, 0.0]]).double())
    assert float(found.stats["clip_fraction"]) == pytest.approx((1 / 2 + 1) / 2)  # averaged as the loss


def test_a_config_and_its_limits() -> None:
    wide = GRPO.Config(clip_high=1.0, clip_low=0.9)
    found = loss_of(GRPO, wide, NEW, OLD, MASK, reward=REWARD)
    assert float(found.loss) == pytest.approx(A * (-(1.5 + 1.0) / 2 + 0.5) / 2)
    with pytest.raises(TypeError, match="config: expected GRPOConfig or None, got SAPOConfig"):
        loss_of(GRPO, SAPO.Config(), NEW, OLD, MASK)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"log_prob": torch.zeros(3)}, r"log_prob: expected \[T, N\], got \(3,\)"),
        ({"mask": torch.ones(2, 3)}, r"mask: expected the shape of log_prob \(2, 2\), got \(2, 3\)"),
        (
            {"mask": torch.tensor([[2, 1], [1, 0]])},
            r"mask: expected 1 where there is a token and 0 elsewhere, got \[0, 1, 2\]",
        ),
        ({"rewards": REWARD}, "rewards: expected another name, or the argument reward; write reward="),
        ({"reward": torch.ones(3)}, r"reward: expected \[N\] = \(2,\), got \(3,\)"),
        ({"extra": torch.ones(5)}, r"extra: expected \[T, N, ...\] = \(2, 2\) or \[N, ...\], got \(5,\)"),
        ({"state": {"dual": 1.0}}, r"state: expected some of \[\], got 'dual'"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"log_prob": NEW, "old_log_prob": OLD, "mask": MASK, "reward": REWARD} | changes
    with pytest.raises(ValueError, match=match):
        loss_of(GRPO, None, **given)
    with pytest.raises(TypeError, match=r"method: expected a Method, as agents\.GRPO is, got str"):
        loss_of("grpo", None, NEW, OLD, MASK)  # type: ignore[arg-type]
    arrays = [x.numpy() for x in (NEW, OLD, MASK, REWARD)]
    assert torch.equal(loss_of(GRPO, None, *arrays).loss, loss_of(GRPO, None, NEW, OLD, MASK, REWARD).loss)  # type: ignore[arg-type]
    wide = torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"time comes first: is log_prob \[N, T\]"):
        loss_of(GRPO, None, wide, wide, torch.ones(4, 2), reward=torch.ones(4))


def test_missing_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"reads 'ref_log_prob' of a policy; pass ref_log_prob= of shape \[T, N\]"):
        loss_of(CoPG, None, NEW, OLD, MASK, reward=REWARD)
    with pytest.raises(ValueError, match="reads 'entropy' of a policy"):
        loss_of(GRPO, GRPO.Config(entropy_coef=0.1), NEW, OLD, MASK, reward=REWARD)


def test_a_reference_counts() -> None:
    """k3 of KL(policy || reference) has the slope 1 - ref / pi by a token's log-probability."""
    plain, kl = (
        loss_of(GRPO, GRPO.Config(kl_coef=c), NEW, OLD, MASK, reward=REWARD, ref_log_prob=OLD).gradient
        for c in (0.0, 0.1)
    )
    ratio = (OLD - NEW).exp()
    torch.testing.assert_close(kl - plain, 0.1 * (1.0 - ratio) * torch.tensor([[0.25, 0.5], [0.25, 0.0]]).double())


def test_state_and_components() -> None:
    """Lagrangian: the penalty's slope is 2 lambda (r - 1) r, a mean over three tokens."""
    free, held = (
        loss_of(R2VPO, None, NEW, OLD, MASK, reward=REWARD, state={"dual": dual}).gradient for dual in (0.0, 2.0)
    )
    r = (NEW - OLD).exp()
    torch.testing.assert_close(held - free, 2.0 * 2.0 * (r - 1.0) * r * MASK / 3.0)
    parts = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    summed = loss_of(GDPO, None, NEW, OLD, MASK, reward_components=parts)
    assert float(summed.loss) != float(loss_of(GDPO, None, NEW, OLD, MASK, reward_components=parts.flip(0)).loss)


def test_sequences_that_are_left_out_have_no_advantage_and_no_gradient() -> None:
    """DAPO keeps the groups whose outcomes differ; the gradient keeps its place."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 6, generator=generator, dtype=torch.float64)
    new = old + 0.01 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    group, reward = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    found = loss_of(DAPO, None, new, old, torch.ones(3, 6), reward=reward, group=group, max_length=100)
    assert found.advantage is not None
    for x in (found.advantage, found.gradient):
        assert not x[:, group == 0].any()
        assert x[:, group == 1].all()
    half = loss_of(D3S, D3S.Config(group_size=3), new, old, torch.ones(3, 6), reward, group, entropy=torch.ones(3, 6))
    assert 0 < int((half.gradient != 0).any(0).sum()) < 6


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_loss(name: str) -> None:
    """The derivative is that of the loss."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(3, 8, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -1.0 - draw().abs()
    new, mask = old + 0.1 * draw(), torch.arange(3)[:, None] < torch.tensor([3, 1, 2, 3, 3, 2, 1, 3])
    given = {
        "reward": torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 1]), "group": torch.arange(8) // 4, "ref_log_prob": old - 0.1,
        "entropy": draw().abs(), "tempered_log_prob": old + 0.05,
        "hidden": torch.ones(3, 8, 2).double(), "topk_index": torch.zeros(3, 8, 2).long(),
        "topk_log_prob": torch.zeros(3, 8, 2).double(), "action": torch.zeros(3, 8).long(),
        "sum_pi2": draw().sigmoid(), "answer": torch.tensor([0, 1, 0, 2, 3, 3, -1, 0]),
    }  # fmt: skip
    method = get_method(name)

    def value(x: Tensor) -> float:
        return float(loss_of(method, None, x, old, mask, **given).loss)

    found = loss_of(method, None, new, old, mask, **given)
    assert found.loss.isfinite()
    assert found.gradient.shape == new.shape
    assert not found.gradient[~mask].any()
    if name in ("cispo", "div_prec", "mhpo", "reinforce", "rloo", "hpt", "p3o"):
        return  # a factor of the loss is detached: the value has another slope
    way = draw() * mask
    slope = (value(new + 1e-6 * way) - value(new - 1e-6 * way)) / 2e-6
    assert slope == pytest.approx(float((found.gradient * way).sum()), rel=1e-5, abs=1e-8)


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks run one after another, and print what their comments say."""
    page = (ROOT / "docs" / "loss_of.md").read_text(encoding="utf-8")
    space: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, space)
    shown = capsys.readouterr().out
    for number in ("-0.1061", "-0.1768", "0.7071", "0.7500", "0.0151", "0.1000", "ref_log_prob= of shape"):
        assert number in shown, number
