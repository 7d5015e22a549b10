"""What must not matter: the autoreset mode, dummy rows, the simulator's threads; and when the normaliser may move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agents import BPO, MDPO, PPO
from ccrl.batched_env import AutoresetMode
from ccrl.data import Batching, Data
from ccrl.estimators import ratios
from ccrl.testing import ClockEnv, Episode, prepare_rollout

AGENTS = (PPO, MDPO, BPO)
SCRIPT = [[Episode(0, 3), Episode(40, 5, "truncate")], [Episode(10, 2, "truncate"), Episode(20, 6, "both")]]
"""Both copies end an episode at step 24 of a stream without dummy rows and at row 29 of one with them."""


def clock_agent(cls: type[Any], mode: AutoresetMode = AutoresetMode.SAME_STEP, **config: Any) -> Any:
    steps = 29 if mode == AutoresetMode.NEXT_STEP else 24
    env = ClockEnv(SCRIPT, autoreset_mode=mode)
    return cls(env, cls.Config(num_envs=2, n_steps=steps, hidden=(8,), compile="off", **config))


def by_copy(data: Data, column: str) -> Tensor:
    """Valid rows only, ``[2, 24]``."""
    return torch.stack([data[column][data["valid"][:, i] > 0, i] for i in range(2)])


@pytest.mark.parametrize("cls", AGENTS)
def test_autoreset_modes_give_the_same_advantages(cls: type[Any]) -> None:
    rollouts = [prepare_rollout(clock_agent(cls, mode)) for mode in AutoresetMode]
    first = rollouts[0]
    for other in rollouts[1:]:
        for column in ("value", "next_value", "advantage", "return"):
            assert by_copy(other, column).shape == (2, 24)
            torch.testing.assert_close(by_copy(other, column), by_copy(first, column), rtol=1e-5, atol=1e-6)
    assert first["advantage"].std() > 0.1


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_advantages_by_hand(mode: AutoresetMode) -> None:
    """V(o) = o / 10, gamma 0.9, lambda 0.8, reward 1. The episode 0, 1, 2: A_2 = 1 - .2 = .8,
    A_1 = 1 + .9 * .2 - .1 + .72 * .8 = 1.656, A_0 = 1 + .9 * .1 - 0 + .72 * 1.656 = 2.28232."""
    env = ClockEnv([[Episode(0, 3)], [Episode(10, 2, "truncate")]], autoreset_mode=mode)
    steps = 8 if mode == AutoresetMode.NEXT_STEP else 6
    agent = PPO(env, PPO.Config(num_envs=2, n_steps=steps, hidden=(), gamma=0.9, gae_lambda=0.8))
    with torch.no_grad():
        agent.policy.critic.value[0].weight.fill_(0.1)
        agent.policy.critic.value[0].bias.zero_()
    data = prepare_rollout(agent)
    first, second = (data["advantage"][data["valid"][:, i] > 0, i] for i in range(2))
    torch.testing.assert_close(first, torch.tensor([2.28232, 1.656, 0.8] * 2), rtol=0, atol=1e-5)
    # eight rows with dummies hold 3 of copy 1's episodes less the last dummy, six rows hold 3 without
    torch.testing.assert_close(second, torch.tensor([1.6956, 0.98] * 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", AGENTS)
def test_dummy_rows_have_no_gradient(cls: type[Any]) -> None:
    """The gradient with NEXT_STEP's dummy rows, whatever is in them, is that of the batch without them."""
    agent = clock_agent(cls, AutoresetMode.NEXT_STEP)
    data = prepare_rollout(agent)
    for phase in agent.estimator.phases():
        batch = data.epoch(Batching(size="full"), None)[0]
        keep = (batch["valid"][0] > 0).nonzero().squeeze(1)
        assert 0 < keep.shape[0] < batch["valid"].shape[1]
        columns = {k: v if k in batch.scalars else v.index_select(1, keep) for k, v in batch.items()}
        short = Data(columns, scalars=batch.scalars)
        garbage = {k: v.masked_fill(_like(batch["valid"] == 0, v), _worst(v)) for k, v in batch.items() if k in FLOATS}
        spoilt = Data({**batch, **garbage}, scalars=batch.scalars)
        gradients = [phase.updater.gradient(phase.terms, b).mean.clone() for b in (batch, short, spoilt)]
        assert gradients[0].norm() > 1e-3
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-6)
        unmasked = {k: batch[k] + 7.0 * (batch["valid"] == 0) for k in ("advantage", "return")}
        wrong = Data({**batch, **unmasked, "valid": torch.ones_like(batch["valid"])}, scalars=batch.scalars)
        assert not torch.allclose(phase.updater.gradient(phase.terms, wrong).mean, gradients[0], rtol=1e-3)


FLOATS = ("reward", "advantage", "return", "value", "next_value", "log_prob", "old_logits", "weight")


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (value.dim() - mask.dim()))


def _worst(value: Tensor) -> float:
    return -1e30 if value.dim() == 2 else 1e4


def test_simulator_threads_do_not_matter() -> None:
    def train(threads: int) -> Any:
        config = PPO.Config(num_envs=6, n_steps=16, n_epochs=2, hidden=(16,), normalise_obs=True, compile="off")
        agent = PPO("HalfCheetah-v5", config, env_kwargs={"nthread": threads})
        return agent.learn(until=3 * agent.samples_per_iteration).policy.state_dict()

    one, two = train(1), train(2)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


# -- the ratio at the old parameters --------------------------------------------------------------------------------


def _first_ratio(agent: Any, data: Data) -> Tensor:
    phase = agent.estimator.phases()[0]
    batch = data.epoch(phase.batching, agent.ctx.generator)[0]
    with torch.no_grad():
        evaluation = agent.policy.evaluate(batch, frozenset({"log_prob"}))
        ratio: Tensor = ratios.token(evaluation, batch).ratio
    return ratio


@pytest.mark.parametrize("cls", AGENTS)
@pytest.mark.parametrize("env", ["CartPole-v1", "HalfCheetah-v5"])
def test_the_first_ratio_is_one(cls: type[Any], env: str) -> None:
    config = cls.Config(num_envs=4, n_steps=32, hidden=(32,), normalise_obs=True, compile="off")
    agent = cls(env, config)
    agent.learn(until=3 * agent.samples_per_iteration)
    data = prepare_rollout(agent)
    ratio = _first_ratio(agent, data)
    assert ratio.numel() > 1
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-6)
    if env == "HalfCheetah-v5":
        agent.policy.update_normaliser(data["obs"], data["valid"])
        moved = _first_ratio(agent, data)
        assert (moved - 1.0).abs().max() > 1e-3, "moving the normaliser before the update must show here"


@pytest.mark.parametrize("cls", AGENTS)
def test_the_normaliser_moves_once_and_after_the_update(cls: type[Any]) -> None:
    agent = clock_agent(cls, normalise_obs=True)
    norm = agent.policy.norm["obs"]
    counts: list[float] = []
    original = agent.updaters["policy"].run

    def run(terms: Any, batches: Any) -> Any:
        counts.append(float(norm.count))
        return original(terms, batches)

    agent.updaters["policy"].run = run
    agent.learn(until=2 * agent.samples_per_iteration)
    assert sorted(set(counts)) == [0.0, 48.0]
    assert float(norm.count) == 96.0


def test_dummy_rows_do_not_move_the_normaliser() -> None:
    agent = clock_agent(PPO, AutoresetMode.NEXT_STEP, normalise_obs=True)
    agent.learn(until=1)
    norm = agent.policy.norm["obs"]
    assert float(norm.count) == agent.num_timesteps == 48 < agent.samples_per_iteration
    seen = torch.tensor([*range(3), *range(40, 45), *range(10, 12), *range(20, 26)], dtype=torch.float64)
    assert float(norm.mean) == pytest.approx(float(seen[:8].mean() + seen[8:].mean()) / 2)  # both copies 3 times
