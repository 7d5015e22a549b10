"""Cycles: the order of a gradient step, phases that wait, what is handed on, averages, and what one graph refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccrl.bank import Bank
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import Term
from ccrl.learn import Cycle, Polyak
from ccrl.updaters import FlatUpdater, ModuleUpdater, can_compile


class Two(nn.Module):
    """Two numbers; outputs are both, for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return {"first": self.first.expand(batch.shape), "second": self.second.expand(batch.shape)}


def context(policy: nn.Module) -> Context:
    return Context(torch.Generator(), Bank(policy), lambda *args: None)  # type: ignore[arg-type, return-value]


def rows() -> Data:
    return Data({"valid": torch.ones(1, 4), "n_valid": torch.tensor(4.0)}, scalars=frozenset({"n_valid"}))


def term(name: str, loss: Any, want: str, stats: Any = None) -> Term:
    return Term(name, loss, aggregates.mean, want=frozenset({want}), advantage=None, stats=stats)


class Simple(Cycle):
    hands_on = ("seen",)

    def __init__(self, policy: Two, averages: tuple[Polyak, ...] = (), every: int = 1, **updaters: Any) -> None:
        super().__init__()
        self.averages = averages
        first = term("a", lambda ratio, adv, out, batch: (out["first"] - batch["goal"]).square(), "first",
                     stats=lambda ratio, adv, out, batch: {"seen": out["first"]})  # fmt: skip
        second = term("b", lambda ratio, adv, out, batch: (out["second"] - batch["seen"]).square(), "second")
        spec = Batching(size=4)
        self._phases = (
            Phase("one", (first,), spec, updaters["first"]),
            Phase("two", (second,), spec, updaters["second"], every=every),
        )

    def targets(self, draw: Data, ctx: Context) -> Data:
        return draw.derive(goal=torch.ones(1, 4))

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def sgd(policy: nn.Module, name: str) -> ModuleUpdater:
    return ModuleUpdater(policy, lambda p: torch.optim.SGD(p, lr=0.25), prefixes=[name])


def make(averages: tuple[Polyak, ...] = (), every: int = 1) -> tuple[Two, Simple, Context]:
    policy = Two()
    cycle = Simple(policy, averages, every, first=sgd(policy, "first"), second=sgd(policy, "second"))
    ctx = context(policy)
    cycle.start(ctx.bank)
    return policy, cycle, ctx


def test_later_phases_read_what_earlier_ones_hand_on() -> None:
    policy, cycle, ctx = make()
    policy.first.data.fill_(0.5)
    stats, taken = cycle.step(rows(), ctx)
    # first: .5 - .25 * 2 (.5 - 1) = .75; second goes towards the first of before its step: 0 - .25 * 2 (0 - .5) = .25
    assert (float(policy.first.detach()), float(policy.second.detach()), taken) == (0.75, 0.25, 2)
    assert {"one_total_loss", "two_total_loss", "one_grad_norm", "seen"} <= stats.keys()


def test_a_phase_runs_at_every_so_manyth_step_and_averages_after_it() -> None:
    policy, cycle, ctx = make((Polyak("target", 0.5, every=3),), every=3)
    for step in range(1, 4):
        before = ctx.bank.policy("target").first.clone()
        _, taken = cycle.step(rows(), ctx)
        assert taken == (2 if step == 3 else 1)
        assert torch.equal(ctx.bank.policy("target").first, before) == (step < 3)
    assert float(ctx.bank.policy("target").first) == pytest.approx(0.5 * float(policy.first.detach()))


def test_the_count_of_steps_is_saved() -> None:
    _, cycle, ctx = make(every=2)
    cycle.step(rows(), ctx)
    _, other, ctx2 = make(every=2)
    other.load_state_dict(cycle.state_dict())
    assert other.step(rows(), ctx2)[1] == 2


def test_polyak_averages_converge_as_one_minus_tau_to_the_k() -> None:
    # from 0 to 1 with tau .005: 1 - .995^100 = .394230, 1 - .995^1000 = .993346
    policy = Two()
    bank = Bank(policy)
    bank.refresh("target")
    policy.first.data.fill_(1.0)
    for k in range(1, 1001):
        bank.refresh("target", mix=0.005)
        if k == 100:
            assert float(bank.policy("target").first) == pytest.approx(0.394230, abs=1e-5)  # type: ignore[arg-type]
    assert float(bank.policy("target").first) == pytest.approx(0.993346, abs=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("beta", "expected"), [(0.5, 4.7619e-5), (0.9, -5.45154e-4)])
def test_adam_of_three_gradients(beta: float, expected: float) -> None:
    """Gradients 1, -1, -1, lr 1e-3: a short memory has turned round, a long one has not."""
    policy = Two()
    updater = FlatUpdater(policy, prefixes=["first"], lr=1e-3, betas=(beta, 0.999), eps=1e-8)
    for sign in (1.0, -1.0, -1.0):
        loss = term("x", lambda ratio, adv, out, batch, s=sign: s * out["first"], "first")
        updater.step((loss,), rows())
    assert float(policy.first.detach()) == pytest.approx(expected, rel=1e-4)


class Fused(Simple):
    one_graph = True


@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_that_belongs_to_no_updater_is_refused(compiled: bool) -> None:
    """A multiplier held beside the policy: no updater moves it, so its gradient would be dropped without a word."""
    policy, multiplier = Two(), nn.Parameter(torch.ones(1))
    cycle = Fused(policy, **{name: FlatUpdater(policy, lr=0.1, prefixes=[name]) for name in ("first", "second")})
    priced = term("a", lambda ratio, adv, out, batch: multiplier * out["first"], "first")
    cycle._phases = (Phase("one", (priced,), Batching(size=4), cycle._phases[0].updater),)
    cycle.compile_steps(compiled)
    with pytest.raises(ValueError, match=r"terms \['a'\].*a Parameter of shape \(1,\) that belongs to none"):
        cycle.step(rows(), context(policy))
    assert float(policy.first.detach()) == 0.0


@pytest.mark.skipif(not can_compile()[0], reason="no C++ compiler")
def test_one_graph_refuses_a_parameter_that_it_cannot_see_move() -> None:
    """The second phase reads the first one's Parameter object, not the policy's output: eagerly it has moved by then,
    in the graph it is the one from before the step."""
    policy = Two()
    held = policy.first
    cycle = Fused(policy, **{name: FlatUpdater(policy, lr=0.1, prefixes=[name]) for name in ("first", "second")})
    reads = term("b", lambda ratio, adv, out, batch: (out["second"] - 10.0 * held - 1.0).square(), "second")
    cycle._phases = (cycle._phases[0], Phase("two", (reads,), Batching(size=4), cycle._phases[1].updater))
    cycle.compile_steps(True)
    with pytest.raises(RuntimeError, match=r"phases \['one', 'two'\]: the compiled step of \['second'\] is not"):
        cycle.step(rows(), context(policy))
    assert [float(p.detach()) for p in policy.parameters()] == [0.0, 0.0]


def test_one_graph_refuses_other_updaters_and_halves_of_one() -> None:
    policy = Two()
    cycle = Fused(policy, first=sgd(policy, "first"), second=sgd(policy, "second"))
    cycle.compile_steps(True)
    with pytest.raises(TypeError, match="expected FlatUpdater in every phase"):
        cycle.step(rows(), context(policy))
    both = FlatUpdater(policy, lr=0.1)
    cycle = Fused(policy, first=both, second=both)
    cycle.compile_steps(True)
    with pytest.raises(ValueError, match="expected one updater per phase"):
        cycle.step(rows(), context(policy))
    cycle = Fused(
        policy, (Polyak("target", 0.5, ("first",)),), first=FlatUpdater(policy, lr=0.1),
        second=FlatUpdater(policy, lr=0.1, prefixes=["second"]),
    )  # fmt: skip
    ctx = context(policy)
    cycle.start(ctx.bank)
    cycle.compile_steps(True)
    with pytest.raises(ValueError, match="expected averages of all parameters of an updater"):
        cycle.step(rows(), ctx)
