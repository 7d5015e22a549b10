"""Micro-batches: gradients and statistics add up exactly, and what a loss compares stays together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.updaters import FlatUpdater, ModuleUpdater

F64 = torch.float64
BOTH = pytest.mark.parametrize("kind", ["flat", "module"])


def updater(kind: str, module: nn.Module) -> FlatUpdater | ModuleUpdater:
    if kind == "flat":
        return FlatUpdater(module, lr=0.01)
    return ModuleUpdater(module, lambda params: torch.optim.SGD(params, lr=0.01))


class Tokens(nn.Module):
    """Log-probabilities as parameters, picked by a column."""

    def __init__(self, log_prob: Tensor) -> None:
        super().__init__()
        self.log_prob = nn.Parameter(log_prob)
        self.widths: list[int] = []

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        self.widths.append(batch.shape[1])
        return {"log_prob": self.log_prob[:, batch["column"]]}


def canonical(microbatch: int | None) -> tuple[Tokens, Data]:
    """Batch C0 of docs/llm/baselines.md, time-major."""
    new = torch.tensor([[-1.0, -0.5, -2.0], [-0.3, -1.2, 0], [-0.7, -0.7, -0.7], [-1.5, 0, 0]], dtype=F64).T
    old = torch.tensor([[-1.2, -0.5, -1.9], [-0.3, -1.6, 0], [-0.7, -0.9, -0.3], [-1.1, 0, 0]], dtype=F64).T
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=F64).T
    columns = {
        "log_prob": old,
        "valid": valid,
        "column": torch.arange(4),
        "episode_reward": torch.tensor([1, -1, -1, 1.0], dtype=F64),
    }
    data = Data(columns, sequence=frozenset({"column", "episode_reward"}))
    (batch,) = data.epoch(Batching("sequence", "full", microbatch=microbatch), None)
    return Tokens(new.clone()), batch


@BOTH
@pytest.mark.parametrize("microbatch", [None, 1, 2, 3])
def test_microbatches_add_up_exactly(kind: str, microbatch: int | None) -> None:
    module, batch = canonical(microbatch)
    term = Term("pg", losses.clip(0.2, 0.2), aggregates.mean, ratios.token, advantage="episode_reward")
    estimate = updater(kind, module).gradient((term,), batch)
    assert module.widths == {None: [4], 1: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1]}[microbatch]
    # the mean of the two halves' token means would be .2326
    assert float(estimate.stats["pg"]) == pytest.approx(0.193119, abs=1e-6)
    expected = [[0, -0.111111, -0.100537], [0.111111, 0.165758, 0], [0.111111, 0.135711, 0], [-0.074480, 0, 0]]
    torch.testing.assert_close(estimate.mean.view(3, 4).T, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("microbatch", [None, 1, 2, 3])
def test_microbatches_never_split_what_a_loss_compares(kind: str, microbatch: int | None) -> None:
    """Pairs (x0, x2) and (x1, x3), loss the mean over pairs of the squared difference, each member half of it. With
    x = (1, 4, 3, -1) the gradient of member i is (x_i - x_j): (1 - 3, 4 + 1, 3 - 1, -1 - 4) = (-2, 5, 2, -5), of norm
    sqrt(58) = 7.6158. Pieces of one column would have no pairs and no gradient."""

    def differences(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        x, group = outputs["log_prob"], batch["group"]
        same = (group.unsqueeze(1) == group).to(x.dtype)
        return 0.5 * (same * (x[0].unsqueeze(1) - x[0]).square()).sum(1).unsqueeze(0)

    def over_groups(valid: Tensor, batch: Data) -> Tensor:
        return valid / batch["n_groups"]

    module = Tokens(torch.tensor([[1.0, 4.0, 3.0, -1.0]], dtype=F64))
    columns = {"valid": torch.ones(1, 4, dtype=F64), "column": torch.arange(4), "group": torch.tensor([0, 1, 0, 1])}
    data = Data(columns, sequence=frozenset({"column", "group"}))
    (batch,) = data.epoch(Batching("group", "full", microbatch=microbatch), None)
    term = Term("pairs", differences, over_groups, advantage=None)
    stats = updater(kind, module).step((term,), batch)
    assert float(stats["grad_norm"]) == pytest.approx(58**0.5, rel=1e-12)
    assert float(stats["pairs"]) == pytest.approx((4 + 25) / 2, rel=1e-12)
    assert module.widths == {None: [4], 1: [2, 2], 2: [2, 2], 3: [2, 2]}[microbatch]
