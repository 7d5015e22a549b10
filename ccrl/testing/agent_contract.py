"""The contract of an agent as a test class: SB3's signatures, an exact clock, honest seeds, whole checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, StepResult, Tree
from ccrl.data import Data
from ccrl.experiment import config as configs
from ccrl.experiment.callbacks import Callback, CheckpointCallback, EvalCallback, StopOnReward
from ccrl.testing.clock import ClockEnv, Episode

__all__ = ["AgentContract", "SpacesEnv", "prepare_rollout"]


class SpacesEnv:
    """Two copies that never end, with observations and actions of any space: to see which ones an agent takes.

    Observations are zeros of the space's shape and type; the reward is 1.
    """

    num_envs = 2
    autoreset_mode = AutoresetMode.SAME_STEP
    provides_final_obs = True

    def __init__(self, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]) -> None:
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.device = torch.device("cpu")

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        def zeros(space: gymnasium.Space[Any]) -> Tensor:
            dtype = torch.int64 if isinstance(space, spaces.Discrete) else torch.float32
            return torch.zeros(self.num_envs, *(space.shape or ()), dtype=dtype)

        space = self.single_observation_space
        return {k: zeros(s) for k, s in space.items()} if isinstance(space, spaces.Dict) else zeros(space)

    def step(self, action: Tensor) -> StepResult:
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        return StepResult(self.reset(), torch.ones(self.num_envs), never, never, self.reset())

    def close(self) -> None:
        """Nothing to release."""


class _Counter(Callback):
    """Counts its calls; ends training after ``stop_after`` iterations."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.started, self.ended, self.steps = stop_after, 0, 0, list[int]()

    def on_training_start(self, agent: Any) -> None:
        self.started += 1

    def on_iteration(self, agent: Any) -> bool | None:
        self.steps.append(agent.num_timesteps)
        return None if len(self.steps) != self.stop_after else False

    def on_training_end(self, agent: Any) -> None:
        self.ended += 1


class AgentContract:
    """What every agent promises, as tests. Subclass it, name the class ``Test...``, set ``agent`` and ``config``.

    ``config`` must ask for two environments and few steps: tests train for at most four iterations.
    """

    agent: Any
    """The class."""
    config: Any
    """Of ``agent.Config``, small."""
    env_id: str
    """An id that the agent takes, with Box observations."""
    single_env: Callable[[], gymnasium.Env[Any, Any]]
    """One Gymnasium environment with the spaces of ``env_id``, for SB3's ``evaluate_policy``."""

    def make_agent(self, env: str | BatchedEnv | None = None, seed: int = 0) -> Any:
        """A new agent on ``env`` (None: ``env_id``)."""
        return self.agent(self.env_id if env is None else env, self.config, seed=seed)

    def make_clock(self, **options: Any) -> ClockEnv:
        """Dict observations, episodes of 3 and 5 steps with a return as long, actions of the kind of ``env_id``."""
        script = [[Episode(0, 3)], [Episode(1, 5, "truncate")]]
        space = self.make_agent().env.single_action_space
        return ClockEnv(script, groups=True, action_space=space, **options)

    # -- learning -----------------------------------------------------------------------------------------------------

    def test_the_clock_counts_environment_steps(self) -> None:
        agent = self.make_agent()
        assert agent.num_timesteps == 0
        size = agent.samples_per_iteration
        assert agent.learn(until=size + 1) is agent, "learn() must return the agent"
        assert agent.num_timesteps == 2 * size, "whole iterations, as many as the total needs"
        agent.learn(until=3 * size)
        assert agent.num_timesteps == 3 * size, "until is absolute: learn() again goes on from the clock"
        assert agent.iteration == 3
        agent.learn(until=3 * size)
        assert agent.iteration == 3, "the clock is there: nothing to do"
        agent.learn(size)
        assert agent.num_timesteps == 4 * size, "so many more steps, as SB3's learn()"

    def test_dummy_rows_are_not_counted(self) -> None:
        env = self.make_clock(autoreset_mode=AutoresetMode.NEXT_STEP)
        agent = self.make_agent(env)
        agent.learn(until=1)
        rows = agent.config.n_steps
        assert agent.num_timesteps == 2 * rows - sum(rows // (length + 1) for length in (3, 5))

    def test_learning_changes_parameters_and_keeps_them_finite(self) -> None:
        for env in (None, self.make_clock()):
            agent = self.make_agent(env)
            before = _parameters(agent)
            agent.learn(until=2 * agent.samples_per_iteration)
            after = _parameters(agent)
            assert not torch.equal(before, after)
            assert bool(after.isfinite().all())
            assert "train/learning_rate" in agent.scalars
            assert agent.scalars["time/total_timesteps"] == 2 * agent.samples_per_iteration

    def test_training_return_is_that_of_the_script(self) -> None:
        agent = self.make_agent(self.make_clock())
        assert agent.ep_rew_mean is None
        agent.learn(until=agent.samples_per_iteration)
        rows = agent.config.n_steps
        short, long = rows // 3, rows // 5
        assert abs(agent.ep_rew_mean - (3 * short + 5 * long) / (short + long)) < 1e-9

    def test_seeds(self) -> None:
        def train(seed: int) -> Tensor:
            torch.manual_seed(seed + 99)  # the global stream must not matter
            agent = self.make_agent(seed=seed)
            agent.learn(until=2 * agent.samples_per_iteration)
            return _parameters(agent)

        first = train(0)
        assert torch.equal(first, train(0)), "two runs with one seed differ"
        assert not torch.equal(first, train(1)), "two seeds give one run"

    def test_building_an_agent_leaves_the_callers_random_numbers_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        self.make_agent()
        assert torch.equal(torch.rand(1), expected)

    # -- acting -------------------------------------------------------------------------------------------------------

    def test_predict_takes_one_observation_or_a_batch(self) -> None:
        agent = self.make_agent()
        batch = _observations(agent, 3)
        _check_predict(agent, batch[0], batch, agent.env.single_action_space)

    def test_predict_takes_dict_observations(self) -> None:
        agent = self.make_agent(self.make_clock())
        single = {"policy": np.array([2.0], np.float32), "critic": np.array([2.0, 1.0], np.float32)}
        _check_predict(agent, single, {k: np.stack([v] * 3) for k, v in single.items()}, agent.env.single_action_space)

    def test_predict_takes_discrete_observations(self) -> None:
        agent = self.make_agent(SpacesEnv(spaces.Discrete(4), self._action_space()))
        agent.learn(until=agent.samples_per_iteration)
        _check_predict(agent, np.int64(3), np.array([0, 1, 3]), agent.env.single_action_space)

    def test_predict_repeats_only_when_deterministic(self) -> None:
        agent = self.make_agent()
        obs = _observations(agent, 64)
        fixed = [agent.predict(obs, deterministic=True)[0] for _ in range(2)]
        assert np.array_equal(*fixed)
        assert not np.array_equal(*[agent.predict(obs)[0] for _ in range(2)])

    def test_predict_hands_the_state_through(self) -> None:
        agent = self.make_agent()
        state = (np.zeros(2),)
        assert agent.predict(_observations(agent, 1), state, np.array([True]))[1] is state

    def test_sb3_evaluates_it(self) -> None:
        """Needs SB3; skipped without it."""
        import pytest

        evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
        monitor = pytest.importorskip("stable_baselines3.common.monitor")
        env = monitor.Monitor(type(self).single_env())
        returns, lengths = evaluation.evaluate_policy(
            self.make_agent(), env, n_eval_episodes=2, return_episode_rewards=True
        )
        env.close()
        assert len(returns) == 2
        assert np.isfinite(returns).all()
        assert min(lengths) > 0

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def test_a_loaded_agent_acts_alike(self, tmp_path: Path) -> None:
        agent = self.make_agent()
        agent.learn(until=2 * agent.samples_per_iteration)
        agent.save(tmp_path / "a.pt")
        loaded = type(agent).load(tmp_path / "a.pt")
        obs = _observations(agent, 64)
        assert np.array_equal(agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
        assert loaded.config == agent.config
        assert loaded.num_timesteps == agent.num_timesteps
        assert loaded.ep_rew_mean == agent.ep_rew_mean

    def test_a_loaded_agent_goes_on_as_the_saved_one(self, tmp_path: Path) -> None:
        agent = self.make_agent()
        total = 4 * agent.samples_per_iteration
        agent.learn(until=total, callback=lambda a: a.save(tmp_path / "a.pt") if a.iteration == 2 else None)
        loaded = type(agent).load(tmp_path / "a.pt")
        assert loaded.iteration == 2
        loaded.learn(until=total)
        assert torch.equal(_parameters(loaded), _parameters(agent))
        assert loaded.num_timesteps == agent.num_timesteps
        assert loaded.ep_rew_mean == agent.ep_rew_mean

    def test_callback_state_waits_for_its_callback(self, tmp_path: Path) -> None:
        """Also through a load and a save without training in between."""
        agent, folder = self.make_agent(), tmp_path / "checkpoints"
        agent.learn(
            until=2 * agent.samples_per_iteration,
            callback=CheckpointCallback(folder, every=10 * agent.samples_per_iteration),
        )
        agent.save(tmp_path / "a.pt")
        type(agent).load(tmp_path / "a.pt").save(tmp_path / "b.pt")
        callback = CheckpointCallback(tmp_path / "second", every=1)
        loaded = type(agent).load(tmp_path / "b.pt")
        loaded.learn(until=3 * loaded.samples_per_iteration, callback=callback)
        assert callback.next == 10 * agent.samples_per_iteration

    def test_saving_changes_nothing(self, tmp_path: Path) -> None:
        plain, saved = self.make_agent(), self.make_agent()
        plain.learn(until=2 * plain.samples_per_iteration)
        saved.learn(until=2 * plain.samples_per_iteration, callback=lambda a: a.save(tmp_path / "a.pt"))
        assert torch.equal(_parameters(plain), _parameters(saved))

    def test_another_agents_checkpoint_is_refused(self, tmp_path: Path) -> None:
        agent = self.make_agent()
        agent.save(tmp_path / "a.pt")
        other = type("Other", (type(agent),), {"name": "other"})
        message = _error(ValueError, lambda: other.load(tmp_path / "a.pt"))  # type: ignore[attr-defined]
        assert "expected a checkpoint of other" in message
        assert repr(agent.name) in message

    def test_an_environment_object_must_be_given_again(self, tmp_path: Path) -> None:
        agent = self.make_agent(self.make_clock())
        agent.learn(until=agent.samples_per_iteration)
        agent.save(tmp_path / "a.pt")
        assert "pass env=" in _error(ValueError, lambda: type(agent).load(tmp_path / "a.pt"))
        loaded = type(agent).load(tmp_path / "a.pt", env=self.make_clock())
        assert torch.equal(_parameters(loaded), _parameters(agent))

    def test_other_spaces_are_refused_when_loading(self, tmp_path: Path) -> None:
        agent = self.make_agent()
        agent.save(tmp_path / "a.pt")
        other = SpacesEnv(spaces.Box(-1, 1, (17,)), self._action_space())
        message = _error(ValueError, lambda: type(agent).load(tmp_path / "a.pt", env=other))
        assert "expected an environment with the spaces it was trained on" in message
        assert "(17,)" in message

    # -- construction -------------------------------------------------------------------------------------------------

    def test_wrong_configs_are_refused(self) -> None:
        message = _error(TypeError, lambda: self.agent(self.env_id, {"num_envs": 2}))
        assert self.agent.Config.__name__ in message
        assert "dict" in message
        key = _error(configs.ConfigError, lambda: configs.from_dict(self.agent.Config, {"learning_rat": 1e-3}))
        assert "learning_rat" in key
        assert "learning_rate" in key, "no near match in the message"
        _error(TypeError, lambda: self.agent.Config(learning_rat=1e-3))
        for wrong in ({"num_envs": 0}, {"gamma": 1.5}, {"compile": "maybe"}, {"time_limit": "ignore"}):
            assert next(iter(wrong)) in _error(ValueError, lambda w=wrong: self.agent.Config(**w))  # type: ignore[misc]

    def test_wrong_environments_are_refused(self) -> None:
        assert "num_envs" in _error(ValueError, lambda: self.make_agent(ClockEnv([[Episode(0, 3)]] * 3)))
        assert "BatchedEnv" in _error(TypeError, lambda: self.make_agent(object()))  # type: ignore[arg-type]
        box = spaces.Box(-1, 1, (2,))
        bad = [
            (box, spaces.MultiDiscrete([2, 2], start=[0, 1])), (box, spaces.Box(-1, 1, (2, 2))),
            (box, spaces.Discrete(3, start=1)),
            (spaces.Tuple((box, box)), self._action_space()),
            (spaces.Dict({"a": spaces.Dict({"b": box})}), self._action_space()),
        ]  # fmt: skip
        for observation, action in bad:
            message = _error(ValueError, lambda o=observation, a=action: self.make_agent(SpacesEnv(o, a)))  # type: ignore[misc]
            assert "expected" in message
            assert "got" in message

    def test_wrong_totals_are_refused(self) -> None:
        for wrong in (0, -1, float("nan"), float("inf"), True, 1.5):
            assert "total_timesteps" in _error(ValueError, lambda n=wrong: self.make_agent().learn(n))  # type: ignore[misc]
            assert "until" in _error(ValueError, lambda n=wrong: self.make_agent().learn(until=n))  # type: ignore[misc]
        assert "total_timesteps or until" in _error(ValueError, lambda: self.make_agent().learn())

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def test_callbacks_are_called_and_can_stop(self) -> None:
        agent = self.make_agent()
        size = agent.samples_per_iteration
        first, second = _Counter(stop_after=2), _Counter()
        second_key = type("_Second", (_Counter,), {})()
        agent.learn(until=4 * size, callback=[first, second, second_key])
        assert first.steps == second.steps == second_key.steps == [size, 2 * size]
        assert (first.started, first.ended, second.started, second.ended) == (1, 1, 1, 1)
        assert agent.num_timesteps == 2 * size
        calls: list[int] = []
        agent.learn(until=4 * size, callback=lambda a: calls.append(a.num_timesteps))
        assert calls == [3 * size, 4 * size]

    def test_stop_on_reward(self) -> None:
        agent = self.make_agent(self.make_clock())
        agent.learn(until=4 * agent.samples_per_iteration, callback=StopOnReward(1.0))  # every episode returns 3 or 5
        assert agent.iteration == 1
        agent.learn(until=4 * agent.samples_per_iteration, callback=StopOnReward(100.0))
        assert agent.iteration == 4

    def test_evaluation_saves_the_best(self, tmp_path: Path) -> None:
        agent = self.make_agent(self.make_clock())
        callback = EvalCallback(self.make_clock(), tmp_path, every=agent.samples_per_iteration, episodes=2)
        agent.learn(until=2 * agent.samples_per_iteration, callback=callback)
        assert callback.best == 4.0, "one episode of 3 and one of 5 steps, reward 1"
        loaded = type(agent).load(tmp_path / "best.pt", env=self.make_clock())
        assert loaded.num_timesteps == agent.samples_per_iteration, "an equal score is not better"
        assert len((tmp_path / "eval.csv").read_text().splitlines()) == 3

    def test_evaluation_changes_nothing(self, tmp_path: Path) -> None:
        plain, watched = self.make_agent(self.make_clock()), self.make_agent(self.make_clock())
        plain.learn(until=2 * plain.samples_per_iteration)
        watched.learn(
            until=2 * plain.samples_per_iteration,
            callback=EvalCallback(self.make_clock(), tmp_path, every=1, episodes=2),
        )
        assert torch.equal(_parameters(plain), _parameters(watched))

    def _action_space(self) -> gymnasium.Space[Any]:
        space: gymnasium.Space[Any] = self.make_agent().env.single_action_space
        return space


def prepare_rollout(agent: Any) -> Data:
    """The data of the agent's next iteration, collected and prepared, without the update that would follow."""
    have: dict[str, Data] = {}
    points = {"on": agent.updaters["policy"].flat}
    while requests := agent.estimator.plan(points, have, agent.ctx):
        for request in requests:
            have[request.tag] = agent.collector.collect(request, agent.ctx.bank.policy(request.params))
    agent.estimator.fit(have, agent.ctx)
    with torch.no_grad():
        data: Data = agent.estimator.prepare(have, agent.ctx)["on"]
    return data


def _parameters(agent: Any) -> Tensor:
    return torch.cat([x.detach().flatten().double() for x in agent.policy.state_dict().values()])


def _observations(agent: Any, n: int) -> np.ndarray[Any, Any]:
    """Normal numbers: a sample of an unbounded space is so large that every network saturates."""
    shape = (n, *agent.env.single_observation_space.shape)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _check_predict(agent: Any, single: Any, batch: Any, actions: gymnasium.Space[Any]) -> None:
    for deterministic in (True, False):
        action, state = agent.predict(single, deterministic=deterministic)
        assert state is None
        assert actions.contains(np.asarray(action)[()]), f"{action!r} is not in {actions}"
        several, _ = agent.predict(batch, deterministic=deterministic)
        assert several.shape == (3, *(actions.shape or ()))
        assert all(actions.contains(row) for row in several)


def _error(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"expected a {kind.__name__}")
