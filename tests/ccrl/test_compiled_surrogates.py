"""Compiled updates are the surrogate itself: parameters read anywhere inside it, the check of the first batch, pure
updates that share one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.updaters import FlatUpdater, ModuleUpdater, can_compile
from ccrl.updaters.check import unequal

F64 = torch.float64
pytestmark = pytest.mark.skipif(not can_compile()[0], reason="no C++ compiler")


class Tempered(nn.Module):
    """``log_prob = obs . weight``; the temperatures are read by terms alone, ``spare`` by nothing."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))
        self.log_temperature = nn.Parameter(torch.tensor([0.5, 0.1, -0.3], dtype=F64))
        self.spare = nn.Parameter(torch.tensor([1.0], dtype=F64))
        self.register_buffer("calls", torch.zeros(1, dtype=F64))

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        self.calls.add_(1.0)
        return {"log_prob": batch["obs"] @ self.weight}


def batch() -> Data:
    columns = {
        "obs": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]]], dtype=F64),
        "log_prob": torch.tensor([[0.1, -0.1, 0.3, 0.5]], dtype=F64),
        "advantage": torch.tensor([[1.0, -2.0, 0.5, 1.5]], dtype=F64),
        "valid": torch.ones(1, 4, dtype=F64),
    }
    return Data(columns).epoch(Batching(size="full"), None)[0]


def reading(module: Tempered, held: Tensor | None = None) -> tuple[Term, ...]:
    """A surrogate with a temperature in each slot: ``sum_i valid tau_1 (-A (exp(log_prob tau_2 - old)) tau_0) / n``.

    :param held: what the loss reads in place of the module's log-temperatures.
    """

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return -advantage * ratio.ratio * (module.log_temperature if held is None else held)[0].exp()

    def aggregate(valid: Tensor, batch: Data) -> Tensor:
        return valid * module.log_temperature[1].exp() / batch["n_valid"]

    def ratio(outputs: Outputs, batch: Data) -> LogRatio:
        return LogRatio(outputs["log_prob"] * module.log_temperature[2].exp(), batch["log_prob"], batch["valid"])

    kl = Term("kl", losses.k3, aggregates.mean, ratios.token, advantage=None)
    return (kl, Term("tempered", loss, aggregate, ratio))


def updater(kind: str, module: nn.Module, compile: bool) -> FlatUpdater | ModuleUpdater:
    if kind == "flat":
        return FlatUpdater(module, lr=0.01, eps=1e-5, compile=compile)
    return ModuleUpdater(module, lambda params: torch.optim.Adam(params, lr=0.01, eps=1e-5), compile=compile)


def test_graphs_are_traced_once_and_come_from_the_disk_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finds what this one compiled; a surrogate with another number in it does not."""

    def step(eps: float = 1e-5) -> tuple[Tensor, dict[str, int]]:
        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        counters.clear()
        module = Tempered().float()
        made = FlatUpdater(module, lr=0.01, eps=eps, compile=True)
        columns = {k: batch()[k].float() for k in ("obs", "log_prob", "advantage", "valid")}
        made.step(reading(module), Data(columns).epoch(Batching(size="full"), None)[0])
        return made.flat.clone(), dict(counters["aot_autograd"])

    first, counted = step()
    assert counted["total"] == 1, "traced again: a step size of no axis is a number at first"

    def compiled_anew(*args: object, **options: object) -> None:
        raise RuntimeError("compiled anew")

    monkeypatch.setattr("torch._inductor.compile_fx.fx_codegen_and_compile", compiled_anew)
    again, counted = step()
    assert torch.equal(again, first)
    assert counted["autograd_cache_hit"] == counted["total"] == 1
    with pytest.raises(Exception, match="compiled anew"):
        step(eps=1e-4)


@pytest.mark.parametrize("kind", ["flat", "module"])
def test_a_parameter_read_in_any_slot_has_its_gradient(kind: str) -> None:
    found = []
    for compile in (False, True):
        module = Tempered()
        updater(kind, module, compile).step(reading(module), batch())
        assert float(module.calls) == 1.0
        found.append({k: p.detach().clone() for k, p in module.named_parameters()})
    assert bool(((found[0]["log_temperature"] - Tempered().log_temperature).abs() > 1e-3).all())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert float(found[1]["spare"]) == 1.0, "no term reaches it"


def test_the_first_compiled_batch_is_checked() -> None:
    """A Parameter object held outside the module is a constant of the graph: refused, with term and parameter, and
    nothing has moved."""
    module = Tempered()
    u = FlatUpdater(module, lr=0.01, compile=True)
    before = u.flat.clone()
    with pytest.raises(RuntimeError, match=r"term 'tempered': the compiled update of 'log_temperature' is not"):
        u.step(reading(module, held=module.log_temperature), batch())
    assert torch.equal(u.flat, before)
    assert u.t.tolist() == [0.0]
    assert float(module.calls) == 0.0, "a check is no update: running statistics stay"
    assert bool(u.finite)


def test_the_check_tells_rounding_from_faults() -> None:
    """Allowed: 1e-4 of the norm, or 16 times what moves with the parameters' own rounding."""
    one = {"p": torch.tensor([1.0, 1.0])}
    none = {"p": 0.0}
    eps = torch.finfo(torch.float32).eps

    def said(value: float, perturbed: Callable[[float], dict[str, Tensor]]) -> list[str]:
        return unequal({"p": torch.tensor([1.0, value])}, one, none, eps, perturbed)

    assert said(1.00005, lambda moved: one) == []
    assert said(1.001, lambda moved: one) == ["p"]
    assert said(1.001, lambda moved: {"p": torch.tensor([1.0, 1.0001 if abs(moved) < 1e-6 else 1.0])}) == []
    assert said(torch.nan, lambda moved: one) == ["p"]


def test_the_check_tells_kinks_from_faults() -> None:
    """A unit of a ReLU goes on where the parameter, which is 1, passes a kink: at 1 + 10 eps, within the reach of
    rounding, or at 1 + 1e-3. The gradient is (1000, 1 if on), so that the unit is ten times the tolerance of 0.1. Where
    the kink is in reach 0.1 + 2 x 1 is allowed."""
    eps = torch.finfo(torch.float32).eps

    def said(got: float, kink: float) -> list[str]:
        def gradient(moved: float) -> dict[str, Tensor]:
            return {"p": torch.tensor([1000.0, float(1.0 + moved >= kink)])}

        return unequal({"p": torch.tensor([1000.0, got])}, gradient(0.0), {"p": 0.0}, eps, gradient)

    near, far = 1.0 + 10.0 * eps, 1.0 + 1e-3
    assert said(1.0, near) == []
    assert said(1.0, far) == ["p"]
    assert said(2.5, near) == ["p"]


def test_a_gradient_of_rounding_alone_passes_the_check() -> None:
    """The KL at the old parameters: eagerly 0 or a few ulp, compiled other ulp."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = module

        def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
            return {"log_prob": torch.nn.functional.logsigmoid(self.body(batch["obs"])[..., 0])}

    live = Policy()
    rows = Data({"obs": torch.randn(1, 64, 3), "valid": torch.ones(1, 64)})
    with torch.no_grad():
        rows = rows.derive(log_prob=live(rows, frozenset())["log_prob"])
    (full,) = rows.epoch(Batching(size="full"), None)
    u = FlatUpdater(live, lr=1e-3, compile=True)
    u.step((Term("kl", losses.k3, aggregates.mean, ratios.token, advantage=None),), full)
    assert u.t.tolist() == [1.0]


def test_a_surrogate_that_reaches_no_parameter_is_refused() -> None:
    module = Tempered()
    u = FlatUpdater(module, lr=0.01, prefixes=["spare"])
    with pytest.raises(ValueError, match=r"terms \['kl', 'tempered'\].*reads none of \['spare'\]"):
        u.columns(reading(module), batch())


class TwoParts(nn.Module):
    """A critic ``q = c . obs`` and an actor that reads it: ``actor = a q``."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Parameter(torch.tensor([0.5, -1.0], dtype=F64))
        self.actor = nn.Parameter(torch.tensor(0.2, dtype=F64))

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        q = batch["obs"] @ self.critic
        return {"q": q, "actor": self.actor * q}


def test_buffers_written_in_a_forward_pass_are_written_compiled() -> None:
    """Also a 0-d float64 one, whose in-place writes compiled CPU graphs drop; a flag has no difference."""
    module = Tempered()
    module.register_buffer("ready", torch.tensor(True))
    module.calls = torch.zeros((), dtype=F64)
    FlatUpdater(module, lr=0.01, compile=True, unroll=2).run(reading(module), [batch()] * 3)
    assert float(module.calls) == 3.0


def test_pure_updates_share_one_graph() -> None:
    """Critic, then an actor that sees the critic's new parameters, in one graph: as two eager updates in turn."""
    critic = (
        Term("q", lambda ratio, a, e, b: (e["q"] - b["advantage"]).square(), aggregates.mean, want=frozenset({"q"})),
    )  # fmt: skip
    actor = (Term("a", lambda ratio, a, e, b: (e["actor"] - 1).square(), aggregates.mean, want=frozenset({"actor"})),)
    rows = batch()

    def made() -> tuple[TwoParts, FlatUpdater, FlatUpdater]:
        module = TwoParts()
        return module, FlatUpdater(module, lr=0.1, prefixes=["critic"]), FlatUpdater(module, lr=0.2, prefixes=["actor"])

    eager, first, second = made()
    for _ in range(2):
        first.step(critic, rows)
        stats = second.step(actor, rows)

    module, first, second = made()
    one, two = first.pure(critic, rows), second.pure(actor, rows)
    assert one.columns == ["advantage", "n_valid", "obs", "valid"]
    assert two.names == ["a", "loss", "grad_norm"]

    def cycle(lives: list[list[Tensor]], rates: list[Tensor], values: list[Any]) -> Tensor:
        a, b = one.state.like(lives[0]), two.state.like(lives[1])
        out = rates[0]
        for _ in range(2):
            a, _ = one.step(a, rates[0], values[0], {})
            b, out = two.step(b, rates[1], values[1], first.views(a.flat))
        for live, state in zip(lives, (a, b)):
            for target, new in zip(live, state.tensors()):
                target.copy_(new)
        return out

    with torch.no_grad():
        out = torch.compile(cycle, dynamic=False)(
            [one.state.tensors(), two.state.tensors()],
            [first.lr, second.lr],
            [[rows[c] for c in one.columns], [rows[c] for c in two.columns]],
        )
    torch.testing.assert_close(dict(module.named_parameters()), dict(eager.named_parameters()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, torch.stack([stats[n] for n in two.names]), rtol=1e-10, atol=1e-12)


def test_measure_updates_nothing_and_adds_up_over_microbatches() -> None:
    """The KL's k3 at log-ratios ``obs . w - old`` = (.2, -.1, -.2, .3): mean of e^x - 1 - x = (.021403 + .004837 +
    .018731 + .049859) / 4 = .023707. The tempered term has no statistics: its loss is not evaluated."""
    module = Tempered()
    u = FlatUpdater(module, lr=0.01)
    kl, tempered = reading(module)
    terms = (replace(kl, stats=lambda *of: {"approx_kl": losses.k3(*of)}), tempered)
    pieces = batch()
    pieces.microbatch = 3
    before = u.flat.clone()
    found, again = u.measure(terms, batch()), u.measure(terms, pieces)
    assert found.keys() == again.keys() == {"approx_kl"}
    assert float(found["approx_kl"]) == pytest.approx(0.023707, abs=1e-6)
    assert float(again["approx_kl"]) == pytest.approx(0.023707, abs=1e-6)
    assert torch.equal(u.flat, before)
    assert float(module.calls) == 0.0
    assert u.measure((tempered,), batch()) == {}
