"""Streams of one seed have nothing to do with each other: of an agent, of its environments, of their evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import envs
from agents import PPO
from ccrl.collect import Collector, Request
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.seeding import named_generator, stream_seed

N = 4096
BOUND = 5 / N**0.5
"""Five standard deviations of the correlation of ``N`` independent pairs."""


def _correlation(x: Tensor, y: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([x.flatten().double(), y.flatten().double()]))[0, 1]))


class _Recorder(torch.nn.Module):
    """Stands still, and keeps the noise that its collector drew."""

    draw: Any = torch.rand

    def draw_noise(self, n: int, generator: Any, device: Any) -> Tensor:
        self.noise = self.draw(n, generator=generator)
        return self.noise

    def initial_state(self, n: int) -> None:
        return None

    def act(self, obs: Any, noise: Tensor, state: Any = None, first: Any = None) -> dict[str, Tensor]:
        return {"action": self.still.expand(len(noise), *self.still.shape)}

    def to_env(self, action: Tensor) -> Tensor:
        return action

    def behaviour_fields(self) -> tuple[Any, ...]:
        return ()

    def behaviour(self, columns: Any, action: Tensor) -> dict[str, Tensor]:
        return {}


def test_same_numbers_for_the_same_name_and_others_for_another() -> None:
    assert stream_seed(3, "steps") == stream_seed(3, "steps")
    seeds = {stream_seed(s, name) for s in range(100) for name in ("steps", "exploration", "initial states")}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert stream_seed(2**70, "steps") != stream_seed(2**70 + 1, "steps")
    # by hand: 101 is "e"
    assert stream_seed(0, "e") == int(np.random.SeedSequence(0, spawn_key=(101,)).generate_state(1)[0]) >> 1


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError), ("0", TypeError)])
def test_a_seed_that_is_none_is_refused(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        stream_seed(seed, "steps")


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
@pytest.mark.parametrize("id", ["Pendulum-v1", "InvertedPendulum-v5", "ccrl/InventoryOneStoreLost-v0"])
def test_exploration_is_not_what_the_environment_drew(id: str, draw: Any) -> None:
    """Both are given the seed 0. With one stream for the two, the first numbers of exploration were those of the first
    states: Pendulum's angles (sines of them below) had a correlation of .77 with uniform exploration."""
    env = envs.make(id, N)
    policy: Any = _Recorder()
    policy.draw, policy.still = draw, torch.zeros(env.single_action_space.shape or ())
    data = Collector(env, seed=0).collect(Request(steps=1), policy)
    shown: Any = data["obs"][0]
    for column in [*shown.flatten(1).T, data["reward"][0]]:
        if column.std() > 0:
            assert _correlation(column, policy.noise) < BOUND


def test_a_generator_of_the_same_number_is_another_stream() -> None:
    """What a caller draws with a generator of its own, seeded like the environment, is none of the environment's."""
    env = envs.make("Pendulum-v1", N)
    obs = env.reset(seed=7)
    angle = torch.atan2(obs[:, 1], obs[:, 0])  # uniform in (-pi, pi)
    own = torch.rand(2 * N, generator=torch.Generator().manual_seed(7))
    for half in (own[:N], own[N:], own[::2], own[1::2]):
        assert _correlation(angle, half) < BOUND


def test_evaluation_does_not_begin_where_training_began() -> None:
    """``agent.evaluate(env)`` and an agent both have the seed 0 by default."""
    agent = PPO("Pendulum-v1", num_envs=4, n_steps=8, compile="off")
    started: list[Tensor] = []

    class Watched(type(agent.env)):  # type: ignore[misc]
        def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Any:
            obs = super().reset(seed, mask)
            started.append(obs.clone())
            return obs

    agent.env.__class__ = Watched
    agent.learn(32)
    evaluate_agent(agent, Watched(4), episodes=4)
    training, evaluation = started[0], started[-1]
    assert not torch.isclose(training, evaluation).any()


def test_streams_of_an_agent_are_different() -> None:
    agent = PPO("Pendulum-v1", num_envs=4, n_steps=8, compile="off", seed=5)
    generators = [agent.collector.generator, agent.collector.fresh_generator, agent.ctx.generator]
    seeds = {g.initial_seed() for g in generators}
    assert len(seeds) == 3
    assert 5 not in seeds
    assert named_generator(5, "exploration").initial_seed() == agent.collector.generator.initial_seed()
