"""What only updaters of one kind have: skipped gradients, parameter groups; clipping, and what they leave alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.terms import Term
from ccrl.updaters import FlatUpdater, GradientEstimate, ModuleUpdater
from ccrl.updaters.check import check_loss
from ccrl.updaters.common import surrogate_loss

F64 = torch.float64


class Net(nn.Module):
    """``log_prob = actor . x``; ``other.actor`` has a gradient too."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Linear(2, 1, bias=False, dtype=F64)
        self.other = nn.ModuleDict({"actor": nn.Linear(2, 1, bias=False, dtype=F64)})
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return {"log_prob": (self.actor(batch["x"]) + self.other["actor"](batch["x"])).squeeze(-1)}


TERMS = (Term("nll", losses.neg_log_prob, aggregates.mean, ratios.plain, advantage=None),)


def batch(x: float = 3.0, y: float = 4.0) -> Data:
    """The gradient is ``(-x, -y)``."""
    columns = {"x": torch.tensor([[[x, y]]], dtype=F64), "valid": torch.ones(1, 1, dtype=F64)}
    return Data(columns).epoch(Batching(size="full"), None)[0]


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0, momentum=0.5)


def flat(module: nn.Module) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()


def test_gradients_beyond_the_skip_norm_change_nothing_and_are_counted() -> None:
    net = Net()
    updater = ModuleUpdater(net, sgd, prefixes=("actor.",), max_grad_norm=1.0, skip_norm=5.0)
    updater.step(TERMS, batch())  # norm 5: not larger
    assert flat(net)[:2] == pytest.approx([0.6, 0.8], rel=1e-5)
    before, momentum = flat(net), updater.optimiser.state[net.actor.weight]["momentum_buffer"].clone()
    stats = updater.step(TERMS, batch(30.0, 40.0))
    assert float(stats["grad_norm"]) == pytest.approx(50.0), "the norm before clipping decides"
    assert flat(net) == before
    assert updater.skipped == 1
    assert bool(updater.finite), "left out on purpose: no error"
    saved = updater.state_dict()
    assert torch.equal(saved["optimiser"]["state"][0]["momentum_buffer"], momentum)
    other = ModuleUpdater(Net(), sgd, prefixes=("actor.",), skip_norm=5.0)
    other.load_state_dict(saved)
    assert other.skipped == 1


@pytest.mark.parametrize("kind", ["flat", "module"])
def test_small_gradients_are_not_scaled_up(kind: str) -> None:
    estimates = []
    for limit in (None, 100.0):
        net = Net()
        updater = (
            FlatUpdater(net, lr=1.0, max_grad_norm=limit)
            if kind == "flat"
            else ModuleUpdater(net, lambda p: torch.optim.Adam(p, lr=1.0), max_grad_norm=limit)
        )
        updater.step(TERMS, batch())
        state = (
            updater.exp_avg
            if isinstance(updater, FlatUpdater)
            else updater.optimiser.state[net.actor.weight]["exp_avg"]
        )
        estimates.append(state.flatten()[:2].tolist())
    assert estimates[0] == pytest.approx([-0.3, -0.4])  # Adam's moment after one step: a tenth of the gradient
    assert estimates[1] == pytest.approx(estimates[0])


@pytest.mark.parametrize("kind", ["flat", "module"])
def test_clipping_leaves_the_callers_gradient_alone(kind: str) -> None:
    net = Net()
    options = {"prefixes": ("actor.",), "max_grad_norm": 1.0}
    updater = FlatUpdater(net, lr=1.0, **options) if kind == "flat" else ModuleUpdater(net, sgd, **options)  # type: ignore[arg-type]
    estimate = GradientEstimate(torch.tensor([-3.0, -4.0], dtype=F64))
    updater.apply(estimate)
    assert estimate.mean.tolist() == [-3.0, -4.0]


@pytest.mark.parametrize("kind", ["flat", "module"])
def test_others_parameters_get_no_gradient(kind: str) -> None:
    """Prefixes are beginnings of names: ``other.actor`` is not one of ``actor``'s."""
    net, own = Net(), ("actor",)
    updater = FlatUpdater(net, lr=1.0, prefixes=own) if kind == "flat" else ModuleUpdater(net, sgd, prefixes=own)
    updater.step(TERMS, batch())
    assert flat(net)[2:] == [0.0, 0.0]
    assert flat(net)[0] > 0.0
    assert net.other["actor"].weight.grad is None


@pytest.mark.parametrize("kind", ["flat", "module"])
def test_loading_clears_the_sign_of_a_bad_gradient(kind: str) -> None:
    """Going on from a good checkpoint after an error must not raise it again."""
    net = Net()
    updater = FlatUpdater(net, lr=1.0) if kind == "flat" else ModuleUpdater(net, sgd)
    state = updater.state_dict()
    updater.step(TERMS, batch(torch.nan))
    assert not bool(updater.finite)
    updater.load_state_dict(state)
    assert bool(updater.finite)


def test_a_new_rate_reaches_every_parameter_group() -> None:
    net = Net()
    updater = ModuleUpdater(net, lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}], lr=1.0))
    updater.lr.fill_(0.5)
    updater.step(TERMS, batch())
    assert flat(net) == [1.5, 2.0, 1.5, 2.0]


def test_flags_among_the_buffers_are_compared() -> None:
    net = Net()
    net.register_buffer("seen", torch.tensor([True]))
    updater = ModuleUpdater(net, sgd)
    check_loss(updater, TERMS, batch(), partial(surrogate_loss, net, TERMS))


def test_adam_without_a_first_moment() -> None:
    """The arithmetic of compiled updates is that of eager ones, also where beta1 is 0."""
    found = []
    for compiled in (False, True):
        net = Net()
        updater = FlatUpdater(net, lr=0.1, betas=(0.0, 0.9))
        if compiled:
            update = updater.pure(TERMS, batch())
            values = [batch()[name] for name in update.columns]
            found.append(update.step(update.state, updater.lr.view(1), values, {})[0].flat)
        else:
            updater.step(TERMS, batch())
            found.append(updater.flat)
    torch.testing.assert_close(*found)


def test_a_smaller_last_batch_counts_less() -> None:
    """Losses of the columns 1, 2, 6: (1 + 2) / 2 and 6 in batches of two, 3 over all (not 3.75)."""
    valid = torch.ones(1, 3, dtype=F64)
    data = Data({"x": torch.tensor([[[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]]], dtype=F64), "valid": valid})
    net = Net()
    net.actor.weight.data[0, 0] = -1.0
    updater = ModuleUpdater(net, partial(torch.optim.SGD, lr=0.0))
    stats = updater.run(TERMS, data.epoch(Batching("sequence", 2), torch.Generator().manual_seed(0)))
    assert float(stats["nll"]) == pytest.approx(3.0, abs=1e-12)
