"""Collection that writes into the buffer's rows gives the numbers of ``act``, ``to_env`` and ``step``, bit for bit."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, StepRows, stepper
from ccrl.collect import Collector, Request
from ccrl.data import tree_map
from ccrl.policies import MLPPolicy
from ccrl.policies.in_place import FROM_STEPS, InPlaceActor
from envs.classic import CartPole, Pendulum

VECTOR, STEPS = gym.spaces.Box(-np.inf, np.inf, (5,)), 9
BOX = gym.spaces.Box(np.array([-1.0, -0.3, -2.0], np.float32), np.array([0.1, 0.5, 2.0], np.float32))
CASES: list[tuple[gym.Space[Any], gym.Space[Any], dict[str, Any]]] = [
    (VECTOR, BOX, {}),
    (VECTOR, BOX, {"normalise_obs": True, "clip_obs": 1.0}),
    (VECTOR, BOX, {"activation": "fast_tanh"}),
    (VECTOR, BOX, {"squash": True, "hidden": (8,), "activation": "relu"}),
    (VECTOR, BOX, {"state_dependent_std": True, "log_std_init": -1.0, "activation": "elu"}),
    (VECTOR, BOX, {"state_dependent_std": True, "squash": True, "activation": "silu"}),
    (VECTOR, BOX, {"std_parameter": "raw", "log_std_init": -0.5, "hidden": ()}),
    (VECTOR, gym.spaces.Box(-0.1, 0.1, (3,), np.float64), {}),
    (VECTOR, gym.spaces.Discrete(4), {"normalise_obs": True}),
    (VECTOR, gym.spaces.MultiDiscrete([3, 2]), {}),
    (gym.spaces.Discrete(5), BOX, {"normalise_obs": True}),
    (gym.spaces.Dict(a=VECTOR, b=gym.spaces.Discrete(3)), BOX, {"normalise_obs": True}),
    (gym.spaces.Box(0, 255, (36, 36, 1), np.uint8), gym.spaces.Discrete(2), {"hidden": (8,)}),
]


def observation(space: gym.Space[Any], n: int) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return {key: observation(leaf, n) for key, leaf in space.items()}
    if isinstance(space, gym.spaces.Discrete):
        return torch.randint(int(space.n), (n,))
    shape = (n, *(space.shape or ()))
    return torch.randint(256, shape, dtype=torch.uint8) if space.dtype == np.uint8 else 3.0 * torch.randn(shape)


def columns_of(policy: MLPPolicy, n: int) -> dict[str, Tensor]:
    return {name: torch.full((STEPS, n, policy.n_out), torch.nan) for name in policy.distribution.names}


def rows_for(policy: MLPPolicy, n: int) -> Tensor:
    dtype = torch.float32 if "mean" in policy.distribution.names else torch.int64
    return torch.full((STEPS, n, *policy.action_shape), -9, dtype=dtype)


@pytest.mark.parametrize(("space", "actions", "options"), CASES)
@pytest.mark.parametrize("n", [1, 6])
def test_actions_are_those_of_act_and_to_env(space: Any, actions: Any, options: dict[str, Any], n: int) -> None:
    torch.manual_seed(0)
    policy = MLPPolicy(space, actions, **({"hidden": (16, 8)} | options))
    with torch.no_grad():
        for parameter in policy.actor.parameters():  # the last layer starts near 0: every action would be noise
            parameter.add_(0.3 * torch.randn_like(parameter))
        seen = [observation(space, n) for _ in range(STEPS)]
        if policy.normalise_obs:
            for obs in seen[:3]:
                stacked = {k: x[None] for k, x in obs.items()} if isinstance(obs, dict) else obs[None]
                policy.update_normaliser(stacked, torch.ones(1, n))
        noise = policy.draw_noise(STEPS * n, None, torch.device("cpu")).view(STEPS, n, *policy.action_shape)
        stored, columns = rows_for(policy, n), columns_of(policy, n)
        actor = InPlaceActor.of(policy, seen[0], noise, stored.unbind(), columns)
        assert actor is not None
        executed = [actor(t, obs) for t, obs in enumerate(seen)]  # all kept: an environment may keep the last one
        for t, obs in enumerate(seen):
            out = policy.act(obs, noise[t])
            assert torch.equal(stored[t], out["action"])
            assert torch.equal(executed[t], policy.to_env(out["action"]))
            assert executed[t].dtype == policy.to_env(out["action"]).dtype
            for name, column in columns.items():
                assert torch.equal(column[t], out[name]), name


def test_a_policy_of_its_own_kind_acts_for_itself() -> None:
    class Bold(MLPPolicy):
        def to_env(self, action: Tensor) -> Tensor:
            return 2.0 * super().to_env(action)

    def found(policy: MLPPolicy, steps: int = STEPS) -> InPlaceActor | None:
        noise = torch.zeros(steps, 2, 3)
        return InPlaceActor.of(policy, torch.zeros(2, 5), noise, rows_for(policy, 2).unbind(), columns_of(policy, 2))

    assert found(MLPPolicy(VECTOR, BOX)) is not None
    assert found(MLPPolicy(VECTOR, BOX), FROM_STEPS - 1) is None
    assert found(Bold(VECTOR, BOX)) is None
    assert found(MLPPolicy(VECTOR, BOX).double()) is None
    hooked, patched, other = (MLPPolicy(VECTOR, BOX) for _ in range(3))
    hooked.actor.net[0].register_forward_hook(lambda *_: None)
    patched.act = patched.act  # type: ignore[method-assign]
    other.actor.net[1] = torch.nn.Hardtanh()
    assert found(hooked) is None
    assert found(patched) is None
    assert found(other) is None


class Plain:
    """An environment behind its ``step`` alone."""

    def __init__(self, env: Any) -> None:
        self.env = env
        for name in ("num_envs", "device", "single_observation_space", "single_action_space", "autoreset_mode"):
            setattr(self, name, getattr(env, name))
        self.provides_final_obs = env.provides_final_obs
        self.reset, self.close = env.reset, env.close

    def step(self, action: Tensor) -> StepResult:
        result: StepResult = self.env.step(action)
        return result


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("kind", [CartPole, Pendulum])
def test_rollouts_are_those_of_step(kind: Any, mode: AutoresetMode) -> None:
    rollouts: list[dict[str, Any]] = []
    for plain in (False, True):
        env: Any = kind(4, autoreset_mode=mode, max_episode_steps=13)
        torch.manual_seed(0)
        policy = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(8,), normalise_obs=True)
        whole: Any = Plain(env) if plain else env
        collector = Collector(whole, seed=1)
        for steps in (20, 5, 20):
            data = collector.collect(Request(steps=steps), policy)
            rollouts.append({k: data[k].clone() for k in data})
            if mode != AutoresetMode.NEXT_STEP:
                rollouts[-1]["next"] = tree_map(torch.clone, data.next_obs())
            rollouts[-1]["returns"] = collector.stats.returns
            policy.update_normaliser(data["obs"], data["valid"])
    for found, expected in zip(rollouts[:3], rollouts[3:]):
        assert bool((found["terminated"] | found["truncated"]).any()) or len(found["reward"]) == 5
        assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_step_of_its_own_is_not_passed_over() -> None:
    class Doubled(CartPole):
        def step(self, action: Tensor) -> StepResult:
            result = super().step(action)
            return result._replace(reward=2.0 * result.reward, log={"seen": 1.0})

    env = Doubled(2)
    env.reset(seed=0)
    rows = StepRows(torch.zeros(2, 4), torch.zeros(2), *torch.ones(2, 2, dtype=torch.bool))
    assert stepper(env)(torch.zeros(2, dtype=torch.int64), rows) == {"seen": 1.0}
    assert rows.reward.tolist() == [2.0, 2.0]
    patched = CartPole(2)
    patched.reset(seed=0)
    patched.step = env.step  # type: ignore[method-assign]
    assert stepper(patched)(torch.zeros(2, dtype=torch.int64), rows) == {"seen": 1.0}
