"""Spaces at the border: types of observations, spaces that are refused, NumPy observations of ``predict``."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from ccrl.adapters import from_gymnasium
from ccrl.adapters.spaces import numpy_act


def test_types_of_observations():
    leaves = {
        "float64": spaces.Box(-1, 1, (2,), np.float64),
        "uint8": spaces.Box(0, 255, (2, 2), np.uint8),
        "int32": spaces.Box(-5, 5, (1,), np.int32),
        "discrete": spaces.Discrete(7),
    }

    class Mixed(gymnasium.Env):
        action_space = spaces.Box(-1, 1, (2,), np.float64)
        observation_space = spaces.Dict(leaves)
        received = None

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            Mixed.received = action
            return self.observation_space.sample(), 0.0, False, False, {}

    env = from_gymnasium(Mixed, 2)
    obs = env.reset(seed=0)
    types = {"float64": torch.float32, "uint8": torch.uint8, "int32": torch.int32, "discrete": torch.int64}
    assert {key: leaf.dtype for key, leaf in obs.items()} == types
    assert env.single_observation_space["float64"].dtype == np.float32
    env.step(torch.zeros(2, 2))
    assert Mixed.received.dtype == np.float64


@pytest.mark.parametrize(
    ("observation", "action", "error"),
    [
        (spaces.Text(2), spaces.Discrete(2), TypeError),
        (spaces.Tuple((spaces.Discrete(2),)), spaces.Discrete(2), TypeError),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}), spaces.Discrete(2), TypeError),
        (spaces.Discrete(2), spaces.Text(2), TypeError),
        (spaces.Discrete(2), spaces.MultiDiscrete([2, 3], start=[0, 1]), ValueError),
        (spaces.Discrete(2), spaces.Discrete(2, start=1), ValueError),
        (spaces.Discrete(2, start=1), spaces.Discrete(2), ValueError),
        (spaces.Dict({"a": spaces.Discrete(2, start=1)}), spaces.Discrete(2), ValueError),
        (spaces.Discrete(2), spaces.Box(0, 5, (2,), np.int64), TypeError),
    ],
)
def test_spaces_that_are_not_supported_fail_at_construction(observation, action, error):
    class Odd(gymnasium.Env):
        observation_space = observation
        action_space = action

    with pytest.raises(error, match="expected"):
        from_gymnasium(Odd, 2)


def test_processes_cannot_share_what_has_no_fixed_shape():
    class Odd(gymnasium.Env):
        observation_space = spaces.Sequence(spaces.Box(-1, 1, (2,)))
        action_space = spaces.Discrete(2)

    with pytest.raises(
        ValueError, match="expected an observation space of a fixed shape, got one that processes cannot"
    ):
        from_gymnasium(Odd, 2, asynchronous=True)


ACTED = []


def act(obs):
    """Actions that count the observations, of which the last batch is kept."""
    ACTED[:] = [obs]
    first = obs["a"] if isinstance(obs, dict) else obs
    return torch.arange(len(first))


def test_one_observation_or_a_batch_as_numpy():
    box, cpu = spaces.Box(-1, 1, (2,)), torch.device("cpu")
    assert numpy_act(act, box, np.zeros(2), cpu).shape == ()
    assert numpy_act(act, box, np.zeros((3, 2)), cpu).tolist() == [0, 1, 2]
    assert ACTED[0].dtype == torch.float32
    assert numpy_act(act, spaces.Discrete(4), 3, cpu).shape == ()
    assert ACTED[0].tolist() == [3]
    two = spaces.Dict({"a": box, "b": spaces.Discrete(4)})
    assert numpy_act(act, two, {"b": np.array([1, 2, 3]), "a": np.zeros((3, 2)), "more": 1}, cpu).shape == (3,)
    assert ACTED[0].keys() == {"a", "b"}
    for space, wrong, message in (
        (box, np.zeros(3), r"expected shape \(2,\) or a batch of shape \(n, 2\), got \(3,\)"),
        (box, np.zeros((1, 1, 2)), r"got \(1, 1, 2\)"),
        (box, (np.zeros(2), {}), r"take \[0\]"),
        (two, np.zeros(2), r"expected a dict with the keys \['a', 'b'\], got ndarray"),
        (two, {"a": np.zeros(2)}, r"got \['a'\]"),
        (two, {"a": np.zeros(2), "b": np.zeros(3)}, "one of some keys, a batch of others"),
        (two, {"a": np.zeros(3), "b": 0}, r"observation 'a': expected shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            numpy_act(act, space, wrong, cpu)


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("action_space", gymnasium.spaces.Box(-1, 1, (0,)), "expected an action of at least one number"),
        ("observation_space", gymnasium.spaces.Box(-1, 1, (0,)), "expected an observation of at least one number"),
        ("observation_space", gymnasium.spaces.Dict({}), "expected at least one observation, got an empty Dict"),
        ("action_space", None, r"expected a space of gymnasium\.spaces as action_space, got None"),
    ],
)
def test_spaces_that_hold_nothing(name, space, message):
    class Empty(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(2)

    setattr(Empty, name, space)
    with pytest.raises((ValueError, TypeError), match=message):
        from_gymnasium(Empty, 2)


def test_nan_is_no_observation():
    space = spaces.Box(-1, 1, (2,), np.float32)
    with pytest.raises(ValueError, match="of numbers, got NaN"):
        numpy_act(lambda obs: obs, space, np.array([0.0, np.nan]), torch.device("cpu"))
