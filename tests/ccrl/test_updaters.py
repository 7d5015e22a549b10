"""The three routes of an update agree; guards, state, recompilation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import gymnasium as gym
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.terms import Term, surrogate
from ccrl.policies import MLPPolicy
from ccrl.updaters import FlatUpdater, ModuleUpdater, can_compile

F64 = torch.float64
needs_compiler = pytest.mark.skipif(not can_compile()[0], reason="no C++ compiler")
BETAS, EPS = (0.9, 0.999), 1e-5


def policy(seed: int = 0) -> MLPPolicy:
    torch.manual_seed(seed)
    return MLPPolicy(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,)), hidden=(4,)).double()


def terms(entropy: Tensor | float = 0.01) -> tuple[Term, ...]:
    return (
        Term("policy", losses.clip(0.2, 0.2), aggregates.mean, ratios.token, stats=losses.ratio_stats(0.2, 0.2)),
        Term("value", losses.value_loss(), aggregates.mean, None, frozenset({"value"}), None, coef=0.5),
        Term(
            "entropy",
            losses.neg_entropy,
            aggregates.mean,
            None,
            frozenset({"entropy"}),
            None,
            coef=entropy,
        ),
    )


def batches(count: int, size: int = 6, seed: int = 1) -> list[Data]:
    generator = torch.Generator().manual_seed(seed)
    rows = count * size

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    valid = torch.ones(1, rows, dtype=F64)
    valid[0, 3] = 0.0
    columns = {
        "obs": draw(1, rows, 2),
        "action": draw(1, rows, 1),
        "log_prob": -1.5 + 0.1 * draw(1, rows),
        "advantage": draw(1, rows),
        "return": draw(1, rows),
        "valid": valid,
    }
    return Data(columns).epoch(Batching(size=size), generator)


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=3e-3, betas=BETAS, eps=EPS)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def updater(kind: str, module: nn.Module, **options: object) -> FlatUpdater | ModuleUpdater:
    if kind == "flat":
        return FlatUpdater(module, lr=3e-3, betas=BETAS, eps=EPS, **options)  # type: ignore[arg-type]
    return ModuleUpdater(module, adam, **options)  # type: ignore[arg-type]


BOTH = pytest.mark.parametrize("kind", ["flat", "module"])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# -- the routes agree -------------------------------------------------------------------------------------------------


def test_flat_and_module_updaters_match_plain_torch() -> None:
    live = [policy() for _ in range(3)]
    flat_, module = updater("flat", live[0], max_grad_norm=0.3), updater("module", live[1], max_grad_norm=0.3)
    optimiser = adam(list(live[2].parameters()))
    t = terms()
    for batch in batches(6):
        ours, theirs = flat_.step(t, batch), module.step(t, batch)
        out = live[2].evaluate(batch, frozenset({"log_prob", "value", "entropy"}))
        valid, rho = batch["valid"], (out["log_prob"] - batch["log_prob"]).exp()
        pg = -torch.minimum(rho * batch["advantage"], rho.clamp(0.8, 1.2) * batch["advantage"])
        element = pg + 0.5 * (out["value"] - batch["return"]).square() - 0.01 * out["entropy"]
        optimiser.zero_grad()
        loss = (valid * element).sum() / valid.sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(live[2].parameters(), 0.3)
        optimiser.step()
        for stats in (ours, theirs):
            close(stats["loss"], loss.detach())
            close(stats["grad_norm"], norm)
        close(flat(live[0]), flat(live[2]))
        close(flat(live[1]), flat(live[2]))
    assert norm > 0.3, "the clip was exercised"


@BOTH
def test_gradient_then_apply_is_step(kind: str) -> None:
    one, two, t = policy(), policy(), terms()
    a, b = updater(kind, one, max_grad_norm=0.5), updater(kind, two, max_grad_norm=0.5)
    for batch in batches(3):
        first, second = a.step(t, batch), b.apply(b.gradient(t, batch))
        assert first.keys() == second.keys()
        close(flat(one), flat(two))
    rows = [b.step(t, batch) for batch in batches(2)]
    ran = a.run(t, batches(2))
    close(ran["value"], torch.stack([r["value"] for r in rows]).mean())
    close(flat(one), flat(two))


@BOTH
def test_gradient_is_flat_in_parameter_order(kind: str) -> None:
    module, (batch,) = policy(), batches(1)
    got = updater(kind, module).gradient(terms(), batch).mean.clone()
    loss, _ = surrogate(terms(), module.evaluate(batch, frozenset({"log_prob", "value", "entropy"})), batch)
    close(got, torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))]))


@needs_compiler
def test_compiled_updates_match_eager_and_do_not_recompile() -> None:
    # also pins a trap of compiled CPU graphs: in-place writes to a 0-d float64 tensor are dropped, so t has shape [1]
    eager_module, compiled_module = policy(), policy()
    coefficient = torch.tensor(0.01, dtype=F64)
    t = terms(coefficient)
    eager = FlatUpdater(eager_module, lr=3e-3, max_grad_norm=0.5)
    compiled = FlatUpdater(compiled_module, lr=3e-3, max_grad_norm=0.5, compile=True, unroll=2)
    seen: list[int] = []
    for seed, lr, ent in ((1, 3e-3, 0.01), (2, 1e-3, 0.5), (3, 7e-4, 0.0)):
        coefficient.fill_(ent)
        for u in (eager, compiled):
            u.lr.fill_(lr)
        ours, expected = compiled.run(t, batches(2, seed=seed)), eager.run(t, batches(2, seed=seed))
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name].to(value), value, rtol=1e-8, atol=1e-10)
        for name in ("flat", "exp_avg", "exp_avg_sq", "t"):
            close(getattr(compiled, name), getattr(eager, name))
        close(flat(compiled_module), compiled.flat)
        seen.append(counters["stats"]["unique_graphs"])
    assert compiled.t.tolist() == [6.0]
    assert seen[0] == seen[-1], "a new learning rate or coefficient compiled another graph"
    # the finite guard inside the graph
    bad = batches(2)
    bad[1]["advantage"][0, 0] = torch.nan
    before = compiled.exp_avg.clone()
    compiled.run(t, bad)
    assert not bool(compiled.finite)
    assert compiled.t.tolist() == [7.0], "the good batch counted, the bad one did not"
    assert compiled.flat.isfinite().all()
    assert not torch.equal(before, compiled.exp_avg)
    with pytest.raises(ValueError, match="microbatch"):
        compiled.run(t, Data({"valid": torch.ones(1, 2)}).epoch(Batching(size="full", microbatch=1), None))


@needs_compiler
def test_compiled_graphs_of_equal_shapes_are_not_confused() -> None:
    # compiled graphs are cached by code object and only tensors are guarded: two updaters whose inputs look alike must
    # not run each other's graph (of the same terms on another module, or of other terms)
    def surrogate_only(loss: object) -> tuple[Term, ...]:
        return (Term("policy", loss, aggregates.mean, ratios.token),)

    first, second = surrogate_only(losses.weighted_ratio), surrogate_only(losses.k2)
    for t, seed in ((first, 0), (second, 0), (first, 1)):
        eager = FlatUpdater(policy(seed), lr=3e-2)
        compiled = FlatUpdater(policy(seed), lr=3e-2, compile=True, unroll=1)
        for u in (eager, compiled):
            u.run(t, batches(2))
        close(compiled.flat, eager.flat)
        assert not torch.equal(eager.flat, flat(policy(seed)))


@needs_compiler
def test_compiled_module_loss_matches_eager() -> None:
    one, two = policy(), policy()
    coefficient = torch.tensor(0.01, dtype=F64)
    t = terms(coefficient)
    eager, compiled = updater("module", one), updater("module", two, compile=True)
    graphs = []
    for batch, ent in zip(batches(3), (0.01, 0.3, 0.0)):
        coefficient.fill_(ent)
        a, b = eager.step(t, batch), compiled.step(t, batch)
        close(b["loss"].to(F64), a["loss"].to(F64))
        close(flat(two), flat(one))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


# -- guards and ownership ---------------------------------------------------------------------------------------------


@BOTH
def test_non_finite_gradients_change_nothing(kind: str) -> None:
    module, t = policy(), terms()
    u = updater(kind, module, max_grad_norm=0.5)
    good, bad = batches(2)
    u.step(t, good)
    before, state = flat(module), u.state_dict()
    bad["advantage"][0, 0] = torch.nan
    stats = u.step(t, bad)
    assert not bool(u.finite)
    assert not stats["grad_norm"].isfinite()
    torch.testing.assert_close(flat(module), before, rtol=0, atol=0)
    for a, b in zip(leaves(state), leaves(u.state_dict()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    u.step(t, good)
    assert flat(module).isfinite().all()
    assert not torch.equal(flat(module), before)
    assert not bool(u.finite), "stays cleared until the agent has read it"


def leaves(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [x for v in tree.values() for x in leaves(v)]
    return [x for v in tree for x in leaves(v)] if isinstance(tree, list | tuple) else []


@BOTH
def test_prefixes_own_a_subset(kind: str) -> None:
    module = policy()
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    actor, critic = updater(kind, module, prefixes=("actor",)), updater(kind, module, prefixes=("critic",))
    (batch,) = batches(1)
    actor.step(terms(), batch)
    moved = {k for k, p in module.named_parameters() if not torch.equal(p, before[k])}
    assert moved == {k for k in before if k.startswith("actor")}
    critic.step(terms(), batch)
    assert all(not torch.equal(p, before[k]) for k, p in module.named_parameters())
    with pytest.raises(ValueError, match=r"start with \('q',\).*actor\.log_std"):
        updater(kind, module, prefixes=("q",))


def test_module_updater_is_checked_at_construction() -> None:
    module = policy()

    def two_rates(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}])

    with pytest.raises(ValueError, match="one learning rate"):
        ModuleUpdater(module, two_rates)
    for p in module.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        ModuleUpdater(module, adam)
    module.actor.log_std.requires_grad_(True)
    assert [p is module.actor.log_std for p in ModuleUpdater(module, adam).params] == [True]


def test_flat_updater_refuses_mixed_dtypes() -> None:
    module = policy()
    module.critic.float()
    with pytest.raises(ValueError, match="one dtype"):
        FlatUpdater(module, lr=1e-3)


def test_module_updater_takes_other_optimisers_and_moving_rates() -> None:
    module, (batch,) = policy(), batches(1)
    u = ModuleUpdater(module, lambda params: torch.optim.SGD(params, lr=0.5))
    before, gradient = flat(module), u.gradient(terms(), batch).mean
    u.step(terms(), batch)
    close(flat(module), before - 0.5 * gradient)
    u.lr.fill_(0.25)
    before, gradient = flat(module), u.gradient(terms(), batch).mean
    u.step(terms(), batch)
    close(flat(module), before - 0.25 * gradient)
    u.lr.mul_(0.0)
    before = flat(module)
    u.step(terms(), batch)
    close(flat(module), before)


# -- state ------------------------------------------------------------------------------------------------------------


@BOTH
def test_resume_equals_an_uninterrupted_run(kind: str) -> None:
    t, data = terms(), batches(6)

    def train(u: FlatUpdater | ModuleUpdater, part: Sequence[Data]) -> None:
        u.run(t, part)

    straight_module = policy()
    straight = updater(kind, straight_module)
    straight.lr.fill_(1e-3)
    train(straight, data[:3])
    file = io.BytesIO()
    torch.save({"module": straight_module.state_dict(), "updater": straight.state_dict()}, file)
    train(straight, data[3:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_module = policy(seed=5)
    resumed = updater(kind, resumed_module)
    resumed_module.load_state_dict(saved["module"])
    resumed.load_state_dict(saved["updater"])
    train(resumed, data[3:])
    torch.testing.assert_close(flat(resumed_module), flat(straight_module), rtol=0, atol=0)
    assert float(resumed.lr) == 1e-3
    for a, b in zip(leaves(resumed.state_dict()), leaves(straight.state_dict()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_flat_parameters_stay_views_after_loading() -> None:
    module = policy()
    u = FlatUpdater(module, lr=1e-3)
    u.load_state_dict(u.state_dict())
    module.load_state_dict(policy(seed=3).state_dict())
    close(u.flat, flat(policy(seed=3)))


def test_a_machine_without_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    able, line = can_compile()
    assert not able
    assert "no C++ compiler" in line
