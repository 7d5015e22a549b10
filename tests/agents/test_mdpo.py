"""On-policy MDPO: the step at theta_k, the step size, batches without information, what standardisation removes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import MDPO
from agents.mdpo import MDPOConfig, step_size
from ccrl.data import Batching, Data
from ccrl.estimators.base import run_phases
from ccrl.testing import ClockEnv, Episode, prepare_rollout


def make(env: Any = "Pendulum-v1", **options: Any) -> MDPO:
    sizes: dict[str, Any] = {"num_envs": 2, "n_steps": 20, "hidden": (8,), "compile": "off", "critic_epochs": 1}
    return MDPO(env, MDPOConfig(**(sizes | options)), seed=0)


def clock() -> ClockEnv:
    return ClockEnv([[Episode(0, 3), Episode(7, 4, "truncate")], [Episode(10, 5, "truncate")]])


# -- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_one_inner_step_is_a_policy_gradient_step(env: str) -> None:
    agent = make(env, inner_steps=1, learning_rate=1e-2)
    data = prepare_rollout(agent)
    twin = copy.deepcopy(agent.policy)
    optimiser = torch.optim.Adam(twin.actor.parameters(), lr=1e-2, eps=1e-5)
    params = twin.params(data["obs"].flatten(0, 1))
    old = {k: v.detach().clone() for k, v in params.items()}
    log_prob = twin.distribution.log_prob(params, data["action"].flatten(0, 1))
    (-(data["advantage"].flatten() * log_prob).mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.actor.parameters(), 0.5)
    optimiser.step()
    stats, _ = run_phases(agent.estimator, {"on": data}, agent.ctx)
    torch.testing.assert_close(stats["policy_grad_norm"], norm)
    with torch.no_grad():
        moved = twin.params(data["obs"].flatten(0, 1))
        kl = twin.distribution.kl(moved, old).mean()
        rho = (twin.distribution.log_prob(moved, data["action"].flatten(0, 1)) - log_prob).exp()
    # of the policy after its step: before it they are 0
    assert float(kl) > 1e-5
    assert float(stats["kl"]) == pytest.approx(float(kl), rel=1e-3)
    assert float(stats["approx_kl"]) == pytest.approx(float((rho - 1.0 - rho.log()).mean()), rel=1e-3)
    assert float(stats["clip_fraction"]) == pytest.approx(float(((rho - 1.0).abs() > 0.2).float().mean()))
    for name, value in agent.policy.actor.named_parameters():
        torch.testing.assert_close(value, twin.actor.get_parameter(name), rtol=1e-5, atol=1e-6, msg=name)


def test_the_penalty_has_no_gradient_at_the_old_policy_and_one_beside_it() -> None:
    agent = make()
    data = prepare_rollout(agent)
    phase = agent.estimator.phases()[0]
    batch, kl = data.epoch(Batching(size="full"), None)[0], phase.terms[1:]
    assert float(phase.updater.gradient(kl, batch).mean.norm()) < 1e-6
    agent.updaters["policy"].flat.add_(0.05)
    assert float(phase.updater.gradient(kl, batch).mean.norm()) > 1e-2


def test_more_inner_steps_move_further_and_stay_nearer_than_without_the_penalty() -> None:
    def distance(steps: int, k: int) -> float:
        agent = make(inner_steps=steps, learning_rate=1e-2)
        agent.ctx.end.fill_(100_000)
        agent.ctx.clock.fill_(k)
        data = prepare_rollout(agent)
        run_phases(agent.estimator, {"on": data}, agent.ctx)
        phase = agent.estimator.phases()[0]
        batch = data.epoch(Batching(size="full"), None)[0]
        return float(phase.updater.gradient(phase.terms, batch).stats["kl"])

    assert distance(10, 0) > 3 * distance(2, 0)
    assert distance(30, 99_999) < 0.1 * distance(30, 0)  # t_k = 2e-5 holds the policy at theta_k up to Adam's noise


# -- the step size ----------------------------------------------------------------------------------------------------


def test_step_size_schedule() -> None:
    expected = {0: 1.002049, 1: 1.0, 244: 0.502049, 487: 0.004098}
    for k, value in expected.items():
        share = torch.tensor(1 / 488, dtype=torch.float64)  # K = 488 iterations
        got = step_size(k * share, share)
        assert float(got) == pytest.approx(value, abs=5e-7)


def test_the_agent_plans_488_iterations_and_penalises_by_one_over_t() -> None:
    agent = MDPO("CartPole-v1", MDPOConfig(inner_steps=1, critic_epochs=1, hidden=(4,), compile="off"))
    agent.learn(until=1_000_000, callback=lambda a: False)
    # 1,000,000 / 2,048 is not whole: the share of an iteration is .002048, where a count of 488 would give .002049
    assert float(agent.ctx.share) == pytest.approx(0.002048, rel=1e-12)
    assert float(agent.estimator.inv_t) == pytest.approx(1 / 1.002048, rel=1e-6)
    data = prepare_rollout(agent)  # prepares with k = 1
    assert float(agent.estimator.inv_t) == 1.0
    agent.ctx.clock.fill_(488 * 2048)  # the last iteration, which passes the end
    agent.estimator.prepare({"on": Data({k: data[k] for k in data.raw}, successors=data._successors)}, agent.ctx)
    assert float(agent.estimator.inv_t) == pytest.approx(1 / (2 * 0.002048), rel=1e-6)
    term = agent.estimator.phases()[0].terms[1]
    assert term.coef is agent.estimator.inv_t


def test_the_step_size_is_restored(tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {"whole": [], "resumed": []}

    def note(name: str) -> Any:
        return lambda a: seen[name].append(float(a.estimator.inv_t))

    agent = make("CartPole-v1")
    agent.learn(
        until=6 * 40, callback=lambda a: note("whole")(a) or (a.save(tmp_path / "a.pt") if a.iteration == 3 else None)
    )
    MDPO.load(tmp_path / "a.pt").learn(until=6 * 40, callback=note("resumed"))
    assert seen["whole"] == pytest.approx([1 / (1 - (k - 1) / 6) for k in range(6)])
    assert seen["resumed"] == seen["whole"][3:]


def test_going_on_past_the_plan_keeps_the_last_step_size() -> None:
    agent = make("CartPole-v1")
    agent.ctx.end.fill_(4)
    for k in (3, 4, 9):
        agent.ctx.clock.fill_(k)
        prepare_rollout(agent)
        assert float(agent.estimator.inv_t) == 2.0


# -- advantages -------------------------------------------------------------------------------------------------------


def test_equal_advantages_leave_the_policy_alone() -> None:
    """Adam's momentum would move it on a zero gradient. 0.3 is a number whose mean over 2,048 rows rounds."""
    agent = MDPO(
        ClockEnv([[Episode(0, 5)]] * 16), MDPOConfig(hidden=(8,), gamma=0.0, normalise_reward=False, compile="off")
    )
    agent.learn(until=1)
    policy, critic = agent.updaters["policy"], agent.updaters["critic"]
    assert policy.exp_avg.abs().max() > 1e-4, "no momentum: the test would prove nothing"
    critic.flat.zero_()
    agent.env.reward = 0.3
    before = {k: getattr(policy, k).clone() for k in ("flat", "exp_avg", "exp_avg_sq", "t")}
    agent.learn(until=agent.num_timesteps + 1)
    for name, value in before.items():
        assert torch.equal(getattr(policy, name), value), name
    assert critic.flat.abs().max() > 0.0, "the critic's phase must still run"
    assert "train/policy_gradient_loss" not in agent.scalars


def _policy_loss(agent: MDPO, data: Data) -> Tensor:
    phase = agent.estimator.phases()[0]
    agent.updaters["policy"].flat.add_(0.02)
    gradient = phase.updater.gradient(phase.terms, data.epoch(Batching(size="full"), None)[0])
    return torch.cat([gradient.mean, gradient.stats["loss"].view(1)])


@pytest.mark.parametrize("change", ["scale", "shift"])
def test_scaling_and_shifting_advantages_changes_nothing(change: str) -> None:
    """gamma = 0: the advantage is r - V(s); a larger reward or another bias of the critic is a scale or a shift."""

    def build() -> MDPO:
        class Varied(ClockEnv):
            def step(self, action: Tensor) -> Any:
                result = super().step(action)
                return result._replace(reward=result.obs[:, 0].sin() * self.reward)  # type: ignore[call-overload]

        env = Varied([[Episode(0, 3), Episode(7, 4, "truncate")], [Episode(10, 5, "truncate")]])
        agent = make(env, gamma=0.0, normalise_reward=False)
        agent.updaters["critic"].flat.zero_()
        return agent

    plain, changed = build(), build()
    if change == "scale":
        changed.env.reward = 7.0
    else:
        changed.policy.critic.get_parameter("value.0.bias").data.fill_(5.0)
    first, second = prepare_rollout(plain), prepare_rollout(changed)
    assert not torch.allclose(first["return"] - first["value"], second["return"] - second["value"])
    torch.testing.assert_close(second["advantage"], first["advantage"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_policy_loss(changed, second), _policy_loss(plain, first), rtol=1e-4, atol=1e-5)


def test_actor_and_critic_share_nothing() -> None:
    agent = make(clock())
    names = {name: set(updater.names) for name, updater in agent.updaters.items()}
    assert not names["policy"] & names["critic"]
    assert names["policy"] | names["critic"] == {k for k, _ in agent.policy.named_parameters()}
    agent.learn(until=1)
    assert float(agent.updaters["policy"].t) == 10.0  # m full-batch steps
    assert float(agent.updaters["critic"].t) == 1.0  # one epoch of one minibatch


def test_the_critic_has_batches_and_epochs_of_its_own() -> None:
    agent = make(clock(), inner_steps=4, critic_batch_size=16, critic_epochs=3)
    agent.learn(until=1)
    assert float(agent.updaters["policy"].t) == 4.0
    assert float(agent.updaters["critic"].t) == 9.0  # 40 steps: 3 minibatches, 3 times


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_clipping_can_be_left_out(clip: float | None) -> None:
    agent = make(clip_range_vf=clip, normalise_reward=False)
    data = prepare_rollout(agent)
    with torch.no_grad():
        agent.policy.critic.get_parameter("value.0.bias").sub_(1.0)  # the returns are negative
    batch, phase = data.epoch(Batching(size="full"), None)[0], agent.estimator.phases()[1]
    got = phase.updater.gradient(phase.terms, batch).stats["value_loss"]
    old, target = batch["value"], batch["return"]
    moved = (old - 1.0 - target).square()
    expected = moved if clip is None else torch.maximum(moved, (old - clip - target).square())
    assert not torch.allclose(moved, (old - 0.2 - target).square())
    torch.testing.assert_close(got, expected.mean(), rtol=1e-4, atol=1e-4)


def test_standardised_advantages_have_unit_spread_over_the_batch() -> None:
    """The released code's deviation: that of the batch itself (ddof 0)."""
    advantage = prepare_rollout(make())["advantage"]
    assert float(advantage.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantage.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_wrong_inner_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="inner_steps: expected >= 1, got 0"):
        MDPOConfig(inner_steps=0)
