"""BPO: the gradient at ratio 1, both kinds of weights, the median's level, shrinking bounds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import BPO
from agents.bpo import BPOConfig
from ccrl.data import Batching, Data
from ccrl.estimators import losses
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.testing import ClockEnv, Episode, prepare_rollout


def make(env: Any = "Pendulum-v1", **options: Any) -> BPO:
    sizes: dict[str, Any] = {"num_envs": 2, "n_steps": 24, "hidden": (8,), "median_hidden": (8,), "compile": "off"}
    return BPO(env, BPOConfig(**(sizes | options)), seed=0)


def terms(agent: BPO) -> dict[str, Term]:
    return {term.name: term for term in agent.estimator.phases()[0].terms}


def policy_gradient(agent: BPO, data: Data) -> Tensor:
    batch = data.epoch(Batching(size="full"), None)[0]
    return agent.updaters["policy"].gradient((terms(agent)["policy_gradient_loss"],), batch).mean.clone()


def plain_gradient(agent: BPO, data: Data, weight: Tensor) -> Tensor:
    """Of ``-mean(weight log pi)``."""
    twin = copy.deepcopy(agent.policy)
    params = twin.params(data["obs"].flatten(0, 1))
    log_prob = twin.distribution.log_prob(params, data["action"].flatten(0, 1))
    loss = -(weight.flatten() * log_prob).mean()
    gradients = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(twin.parameters(), gradients)])  # fmt: skip


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("eps", [(0.25, 0.25), (0.1, 0.4)])
def test_the_first_gradient_is_the_policy_gradient(env: str, eps: tuple[float, float]) -> None:
    """Ratio 1, no median, temperature -> 0. The width of the bounds does not enter."""
    agent = make(env, use_median=False, temperature=1e-9, eps_low=eps[0], eps_high=eps[1])
    data = prepare_rollout(agent)
    expected = plain_gradient(agent, data, data["return"] - data["value"])
    assert expected.norm() > 0.1
    torch.testing.assert_close(policy_gradient(agent, data), expected, rtol=1e-4, atol=1e-5)


def test_stored_weights() -> None:
    """Size from the standardised advantage of the rollout, side from the return against the current threshold."""
    agent = make(advantage="stored", use_median=False, temperature=1e-9)
    data = prepare_rollout(agent)
    advantage = data["advantage"]
    torch.testing.assert_close(data["weight"], (advantage - advantage.mean()) / (advantage.std() + 1e-8))
    weight = data["weight"].abs() * (data["return"] - data["value"]).sign()
    torch.testing.assert_close(policy_gradient(agent, data), plain_gradient(agent, data, weight), rtol=1e-4, atol=1e-5)
    # a critic that has moved since changes online weights and leaves stored ones
    online = make(advantage="online", use_median=False, temperature=1e-9)
    same = prepare_rollout(online)
    assert "weight" not in same
    before = policy_gradient(online, same), policy_gradient(agent, data)
    for moved in (online, agent):
        with torch.no_grad():
            moved.policy.critic.get_parameter("value.0.bias").add_(-0.05)
    after = policy_gradient(online, same), policy_gradient(agent, data)
    assert not torch.allclose(after[0], before[0], rtol=1e-3)
    torch.testing.assert_close(after[1], before[1])


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_target_ratios_average_to_one(low: float, high: float, temperature: float) -> None:
    """The agent's own median term, minimised, and its own bounds: mean target 1 also where they are asymmetric."""
    agent = make(eps_low=low, eps_high=high, temperature=temperature, median_temperature=temperature)
    returns = torch.cat([torch.linspace(-1, 1, 41), torch.tensor([3.0, 5.0, 9.0])]).double().view(1, -1)
    batch = Data({"return": returns, "valid": torch.ones_like(returns)})
    threshold = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([threshold], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = terms(agent)["median_loss"].loss(None, None, {"median": threshold.expand_as(returns)}, batch).mean()  # type: ignore[arg-type]
        loss.backward()
        return loss

    optimiser.step(closure)
    x = returns - threshold.detach()
    target = losses.bounded_target(x, agent.estimator.eps_low.double(), agent.estimator.eps_high.double(), temperature)
    assert float(target.mean()) == pytest.approx(1.0, abs=1e-4)
    assert float(target.min()) >= 1 - low - 1e-6
    assert float(target.max()) <= 1 + high + 1e-6
    if low != high:  # the plain median would not do
        x = returns - returns.median()
        plain = losses.bounded_target(x, agent.estimator.eps_low.double(), agent.estimator.eps_high.double(), 1e-3)
        assert abs(float(plain.mean()) - 1.0) > 0.05


@pytest.mark.parametrize(("temperature", "loss", "gradient"), [
    (1e-3, 0.2775, (-0.2625, -0.1125, 0.325, 0.05)), (1.0, 0.136270, None),
])  # fmt: skip
def test_loss_by_hand(temperature: float, loss: float, gradient: tuple[float, ...] | None) -> None:
    """The batch of tests/ccrl/test_bounded_ratio.py, through the agent's terms."""
    agent = make(eps_low=0.3, eps_high=0.3, temperature=temperature)
    log_ratio = torch.tensor([[1.05, 0.9, 1.3, 1.0]]).log().requires_grad_()
    evaluation: Outputs = {
        "value": torch.tensor([[1.0, 1.0, 0.0, 0.0]]), "median": torch.tensor([[0.8, 0.4, -0.5, 0.3]]),
    }  # fmt: skip
    batch = Data({"return": torch.tensor([[2.0, 0.5, -1.0, 0.2]])})
    level = LogRatio(log_ratio, torch.zeros(1, 4), torch.ones(1, 4))
    named = terms(agent)
    value = named["policy_gradient_loss"].loss(level, torch.zeros(1, 4), evaluation, batch).mean()
    assert float(value.detach()) == pytest.approx(loss, abs=1e-5)
    median = named["median_loss"].loss(level, torch.zeros(1, 4), evaluation, batch).mean()
    assert float(median) == pytest.approx(0.744038, abs=1e-5)
    value.backward()  # type: ignore[no-untyped-call]
    if gradient is not None:
        torch.testing.assert_close(log_ratio.grad, torch.tensor([gradient]), rtol=0, atol=1e-5)


def test_bounds_shrink_with_training() -> None:
    seen: list[tuple[float, float]] = []
    agent = make("CartPole-v1", anneal_eps=True, eps_low=0.2, eps_high=0.4, n_epochs=1)
    agent.learn(until=4 * 48, callback=lambda a: seen.append((float(a.estimator.eps_low), float(a.estimator.eps_high))))
    assert seen == [pytest.approx((0.2 * f, 0.4 * f)) for f in (1.0, 0.75, 0.5, 0.25)]
    agent.ctx.k.fill_(4)
    prepare_rollout(agent)
    assert float(agent.estimator.eps_high) == pytest.approx(4e-4), "bounds of no width give every ratio the target 1"


def test_shrinking_bounds_reach_the_loss() -> None:
    agent = make()
    data = prepare_rollout(agent)
    before = float(agent.updaters["policy"].gradient(agent.estimator.phases()[0].terms, data.epoch(
        Batching(size="full"), None)[0]).stats["policy_gradient_loss"])  # fmt: skip
    agent.estimator.eps_low.mul_(0.5)
    agent.estimator.eps_high.mul_(0.5)
    after = float(agent.updaters["policy"].gradient(agent.estimator.phases()[0].terms, data.epoch(
        Batching(size="full"), None)[0]).stats["policy_gradient_loss"])  # fmt: skip
    assert after == pytest.approx(0.5 * before, rel=1e-4)  # at ratio 1 the loss is eps |w|


def test_diagnostics_use_the_bounds_of_the_moment() -> None:
    """At ratio 1 + d the share outside the bounds jumps when they shrink below d; the gap to the targets is a size."""
    agent = make(eps_low=0.2, eps_high=0.2)
    term = terms(agent)["policy_gradient_loss"]
    assert term.stats is not None
    evaluation: Outputs = {"value": torch.zeros(1, 2), "median": torch.zeros(1, 2)}
    batch = Data({"return": torch.tensor([[1.0, -1.0]])})
    level = LogRatio(torch.tensor([[1.1, 0.9]]).log(), torch.zeros(1, 2), torch.ones(1, 2))
    stats = term.stats(level, torch.zeros(1, 2), evaluation, batch)
    assert stats["clip_fraction"].tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(stats["target_gap"], torch.tensor([[0.1, 0.1]]))  # targets 1.2 and .8
    agent.estimator.eps_low.fill_(0.05)
    agent.estimator.eps_high.fill_(0.05)
    stats = term.stats(level, torch.zeros(1, 2), evaluation, batch)
    assert stats["clip_fraction"].tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(stats["target_gap"], torch.tensor([[0.05, 0.05]]))  # 1.05 and .95


def test_each_coefficient_weighs_its_own_term() -> None:
    agent = make(vf_coef=0.3, u_coef=0.7, ent_coef=0.011)
    coefficients = {name: float(term.coef) for name, term in terms(agent).items()}
    assert coefficients == {
        "policy_gradient_loss": 1.0, "value_loss": 0.3, "entropy_loss": 0.011, "median_loss": 0.7,
    }  # fmt: skip


def test_the_median_has_a_temperature_and_layers_of_its_own() -> None:
    """1 as released, not lambda, unless it is set: x = 2 costs softplus(2) - 1 = 1.126928."""
    batch, head = Data({"return": torch.tensor([[2.0]])}), {"median": torch.zeros(1, 1)}
    for options, expected in (({}, 1.126928), ({"median_temperature": 0.5}, 0.5 * 4.0181499 - 1.0)):
        agent = make(temperature=0.01, median_hidden=(5, 3), **options)
        loss = terms(agent)["median_loss"].loss(None, None, head, batch)  # type: ignore[arg-type]
        assert float(loss) == pytest.approx(expected, abs=1e-5)
        sizes = [m.out_features for m in agent.policy.critic.median if isinstance(m, torch.nn.Linear)]
        assert sizes == [5, 3, 1]


def test_the_median_head_exists_only_where_it_is_used() -> None:
    assert "median" in make().policy.heads
    without = make(use_median=False)
    assert without.policy.heads == ("value",)
    assert "median_loss" not in terms(without)


def test_returns_are_recomputed_on_request() -> None:
    def spread(recompute: bool) -> Tensor:
        agent = make(ClockEnv([[Episode(0, 5)], [Episode(3, 4, "truncate")]]), n_epochs=2, batch_size=48,
                     learning_rate=1e-2, recompute_returns=recompute)  # fmt: skip
        seen: list[Tensor] = []
        original = agent.updaters["policy"].run

        def run(terms: Any, batches: Any) -> Any:
            seen.append(batches[0]["return"].sort().values.clone())
            return original(terms, batches)

        agent.updaters["policy"].run = run  # type: ignore[method-assign]
        agent.learn(until=1)
        return (seen[0] - seen[1]).abs().max()

    assert float(spread(False)) == 0.0
    assert float(spread(True)) > 1e-3


@pytest.mark.parametrize("wrong", [{"eps_low": 0.0}, {"eps_low": 1.5}, {"eps_high": 0.0}, {"temperature": 0.0},
                                   {"advantage": "offline"}])  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.*got"):
        BPOConfig(**wrong)
