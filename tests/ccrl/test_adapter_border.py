"""Environments of strangers at the border: arrays they use again, results of other kinds, their state."""

from __future__ import annotations

import io
from collections import deque

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from ccrl.adapters import GymnasiumEnv, SB3Env, from_gymnasium
from ccrl.adapters.plain_state import load_plain_state, plain_state
from ccrl.batched_env import AutoresetMode, resume_note
from ccrl.collect import Collector

NOTHING = torch.zeros(2, dtype=torch.int64)
INFO = {}


class InPlace(gymnasium.Env):
    """Observations -7, 1, 2, 3 in one array, and one info for all copies; cut at step 3 (copies made later: 4, 5)."""

    observation_space = spaces.Box(-100, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length=3):
        self.array, self.length = np.zeros(1, np.float32), length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.array[0] = -7.0
        return self.array, INFO

    def step(self, action):
        self.time += 1
        self.array[0] = self.time
        return self.array, 1.0, False, self.time >= self.length, INFO


class InPlaceDict(InPlace):
    observation_space = spaces.Dict({"x": InPlace.observation_space, "t": spaces.Discrete(9)})

    def reset(self, *, seed=None, options=None):
        array, info = super().reset(seed=seed)
        self.tree = {"x": array, "t": 0}
        return self.tree, info

    def step(self, action):
        _, *rest = super().step(action)
        self.tree["t"] = self.time
        return self.tree, *rest


def dummy_vec_env(make, n=2):
    return pytest.importorskip("stable_baselines3.common.vec_env").DummyVecEnv([make] * n)


@pytest.mark.parametrize(
    "make",
    [
        lambda: from_gymnasium(InPlace, 2),
        lambda: from_gymnasium(InPlace, 2, asynchronous=True),
        lambda: GymnasiumEnv(
            SyncVectorEnv([InPlace] * 2, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        ),
        lambda: from_gymnasium(lambda: gymnasium.wrappers.TimeLimit(InPlace(9), 3), 2),
        lambda: SB3Env(dummy_vec_env(InPlace)),
        lambda: SB3Env(pytest.importorskip("stable_baselines3.common.vec_env").VecMonitor(dummy_vec_env(InPlace))),
    ],
    ids=["sync", "async", "made sync", "wrapped", "sb3", "wrapped sb3"],
)  # fmt: skip
def test_the_last_observation_is_kept_where_an_environment_uses_its_array_again(make):
    env = make()
    assert env.reset(seed=0).tolist() == [[-7.0], [-7.0]]
    rows = []
    for _ in range(3):
        result = env.step(NOTHING)
        rows.append(result.obs.flatten().tolist())
    env.close()
    assert rows == [[1, 1], [2, 2], [-7, -7]]
    assert result.truncated.tolist() == [True, True]
    assert result.final_obs.tolist() == [[3.0], [3.0]]


def test_dict_observations_and_infos_are_copied_too():
    env = from_gymnasium(InPlaceDict, 2)
    env.reset(seed=0)
    for _ in range(3):
        result = env.step(NOTHING)
    assert {key: x.flatten().tolist() for key, x in result.final_obs.items()} == {"x": [3, 3], "t": [3, 3]}
    assert {key: x.flatten().tolist() for key, x in result.obs.items()} == {"x": [-7, -7], "t": [0, 0]}
    # SB3 writes "TimeLimit.truncated" into the info: copy 0, cut at step 3, would read what copy 1 wrote
    lengths = iter((3, 5))
    env = SB3Env(dummy_vec_env(lambda: InPlace(next(lengths))))
    env.reset(seed=0)
    flags = [env.step(NOTHING).truncated.tolist() for _ in range(3)]
    assert flags == [[False, False], [False, False], [True, False]]


def test_processes_that_were_built_elsewhere_are_warned_of():
    env = GymnasiumEnv(AsyncVectorEnv([InPlace] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    env.reset(seed=0)
    for _ in range(5):
        env.step(NOTHING)
    with pytest.warns(UserWarning, match="writes its observations into one array"):
        env.step(NOTHING)
    env.close()


# -- results of another kind ------------------------------------------------------------------------------------------


def returning(reset=None, step=None):
    """An environment whose ``reset`` and ``step`` return these; alone, and inside Gymnasium's wrappers."""

    class Odd(InPlace):
        def reset(self, *, seed=None, options=None):
            usual = super().reset(seed=seed)
            return usual if reset is None else reset(*usual)

        def step(self, action):
            usual = super().step(action)
            return usual if step is None else step(*usual)

    return Odd, lambda: gymnasium.wrappers.TimeLimit(Odd(), 50)


def play(env):
    env.reset(seed=0)
    env.step(NOTHING)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"reset": lambda obs, info: obs}, r"Odd: expected \(observation, info\) from reset\(\), got shape \(1,\)"),
        ({"reset": lambda obs, info: (obs, None)}, r"expected \(observation, info\) from reset\(\), got a tuple of 2"),
        ({"step": lambda o, r, a, b, i: (o, r, a, i)}, r"Odd: expected .* got a tuple of 4 values; split done into"),
        ({"step": lambda o, r, a, b, i: o}, r"expected \(observation, reward, terminated, truncated, info\) from step"),
        ({"step": lambda o, r, a, b, i: (o, r, a, b, 0)}, "from step.., got a tuple of 5 values"),
        ({"step": lambda o, r, a, b, i: (o, r, "False", b, i)}, "as terminated from step.., got 'False', .* as true"),
        ({"step": lambda o, r, a, b, i: (o, r, a, None, i)}, r"True or False as truncated .*, got None, .* as false"),
        ({"step": lambda o, r, a, b, i: (o, r, np.zeros(2), b, i)}, r"as terminated from step\(\), got shape \(2,\)"),
        ({"step": lambda o, r, a, b, i: (o, r, 2, b, i)}, "as terminated from step.., got 2"),
        ({"step": lambda o, r, a, b, i: (o, "1.0", a, b, i)}, "expected a number as reward from step.., got '1.0'"),
        ({"step": lambda o, r, a, b, i: (o, None, a, b, i)}, "expected a number as reward from step.., got None"),
        ({"step": lambda o, r, a, b, i: (o, [1.0, 2.0], a, b, i)}, "expected a number as reward .* a list of 2 values"),
        ({"step": lambda o, r, a, b, i: (np.zeros(2), r, a, b, i)}, r"an observation of shape \(1,\) .* shape \(2,\)"),
        ({"step": lambda o, r, a, b, i: (["x"], r, a, b, i)}, r"step\(\): expected an observation of shape"),
    ],
)
@pytest.mark.parametrize("wrapped", [0, 1], ids=["bare", "wrapped"])
def test_results_of_another_kind_are_refused_by_name(how, message, wrapped):
    make = returning(**how)[wrapped]
    for env in (from_gymnasium(make, 2), SB3Env(dummy_vec_env(make))):
        with pytest.raises(ValueError, match=message):
            play(env)


def test_numbers_that_mean_the_same_are_taken():
    for reward in (2, np.float32(2.0), np.array(2.0), np.array([2.0]), True + 1):
        for flag in (1, np.bool_(True), np.array(True), 1.0):
            env = from_gymnasium(returning(step=lambda o, r, a, b, i, x=reward, y=flag: (o, x, y, b, i))[0], 1)
            env.reset(seed=0)
            result = env.step(NOTHING[:1])
            assert (result.reward.tolist(), result.terminated.tolist()) == ([2.0], [True])


def test_what_was_checked_once_is_as_it_was():
    env = from_gymnasium(returning()[1], 1)
    inner = env.env.envs[0].unwrapped
    assert {"reset", "step"} <= vars(inner).keys()
    env.reset(seed=0)
    env.step(NOTHING[:1])
    assert not {"reset", "step"} & vars(inner).keys()


class Odd4(gymnasium.vector.VectorEnv):
    num_envs, metadata = 2, {"autoreset_mode": AutoresetMode.NEXT_STEP}
    single_observation_space, single_action_space = InPlace.observation_space, InPlace.action_space
    rewards, flags = np.zeros(2), np.zeros(2, bool)

    def reset(self, *, seed=None, options=None):
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions):
        return np.zeros((2, 1), np.float32), self.rewards, self.flags, np.zeros(2, bool), {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"rewards": np.zeros((2, 1))}, r"expected rewards of shape \(2,\) in numbers, got float64 of shape \(2, 1\)"),
        ({"rewards": 0.5}, r"rewards of shape \(2,\)"),
        ({"flags": np.array(["False", "False"])}, r"expected terminated of shape \(2,\) in bool, got <U5"),
        ({"flags": np.zeros(1, bool)}, r"terminated of shape \(2,\)"),
    ],
)
def test_arrays_of_vector_environments_are_checked_in_the_first_step(what, message):
    env = GymnasiumEnv(type("Odd", (Odd4,), what)())
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(NOTHING)


def test_the_autoreset_mode_in_the_metadata_may_be_a_text():
    env = GymnasiumEnv(type("Named", (Odd4,), {"metadata": {"autoreset_mode": "NextStep"}})())
    assert env.autoreset_mode is AutoresetMode.NEXT_STEP
    with pytest.raises(ValueError, match="one of 'NextStep', 'SameStep', 'Disabled' as autoreset_mode, got 'never'"):
        from_gymnasium(InPlace, 1, autoreset_mode="never")


# -- state ------------------------------------------------------------------------------------------------------------


class Part:
    def __init__(self):
        self.speed, self.owner = 0.0, None


class Rich(gymnasium.Env):
    """All kinds of attributes that plain data can stand for: views, aliases, cycles, random streams, containers."""

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def __init__(self, **more):
        self.action_space = spaces.Discrete(2)
        self.table, self.names = np.zeros((2, 3)), {"a": [1, (2, 3)], 4: {5, 6}}
        self.view, self.alias = self.table[1], self.table
        self.part = Part()
        self.part.owner = self
        self.past = deque(maxlen=2)
        self.python, self.legacy = __import__("random").Random(3), np.random.RandomState(4)
        self.torch, self.text = torch.Generator().manual_seed(5), np.array(["x", "yz"])
        self.kind = np.float32(0.5)
        vars(self).update(more)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.table[:], self.count = self.np_random.random((2, 3)), 0
        self.past.clear()
        return self.seen(), {}

    def seen(self):
        draws = self.python.random() + self.legacy.rand() + float(torch.rand((), generator=self.torch))
        return np.array([self.view[0], self.alias[0, 1] + draws, self.part.owner.part.speed, sum(self.past)])

    def step(self, action):
        self.view += self.np_random.random()
        self.part.speed += self.table.sum() * self.kind
        self.kind = np.float32(self.kind * 0.9)
        self.count += 1
        self.past.append(self.count)
        self.names["a"].append(self.count)
        self.later = [self.count]  # an attribute that a new environment has not yet
        return self.seen(), float(len(self.names["a"])), False, False, {"action": self.action_space.sample()}


def test_state_comes_back_through_views_aliases_cycles_and_random_streams():
    env, other = Rich(), Rich()
    env.reset(seed=0)
    for _ in range(5):
        env.step(0)
    file = io.BytesIO()
    state, note = plain_state(env)
    assert note is None
    torch.save(state, file)
    file.seek(0)
    load_plain_state(other, torch.load(file, weights_only=True))
    assert other.alias is other.table
    assert other.view.base is other.table
    assert other.part.owner is other
    assert (other.names, other.later, other.past.maxlen) == (env.names, env.later, 2)
    for _ in range(4):
        ours, theirs = env.step(0), other.step(0)
        assert np.array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    assert np.array_equal(env.reset()[0], other.reset()[0])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (open(__file__, encoding="utf-8"), "_io.TextIOWrapper"),  # noqa: SIM115
        ([Part()], r"Rich.odd\[0\]: .*Part in a container"),
        (np.array([Part()], dtype=object), "numpy.ndarray"),
        ({Part(): 1}, "keys of a dict"),
        (iter([1, 2]), "list_iterator"),
        (type("Listing", (list,), {})([1]), "Listing"),
        (type("Slots", (), {"__slots__": ("x", "__dict__")})(), "Slots"),
        (np.longdouble(0.5), "numpy.longdouble"),
        (np.zeros(2, ">f4"), "numpy.ndarray"),
    ],
    ids=["file", "objects", "object array", "keys", "iterator", "subclass of list", "slots", "128 bits", "byte order"],
)
def test_what_plain_data_cannot_stand_for_is_named(value, named):
    state, note = plain_state(Rich(odd=value))
    assert state == {}
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(note)


def test_states_of_other_environments_are_refused():
    env, other = Rich(), Rich(part=deque())
    with pytest.raises(ValueError, match=r"Rich.part: expected a Part, got a .*deque"):
        load_plain_state(other, plain_state(env)[0])
    env.observe_with, other.observe_with = max, min
    env.part = other.part = None
    with pytest.raises(ValueError, match=r"Rich.observe_with: expected max, got min"):
        load_plain_state(other, plain_state(env)[0])
    sync, fewer = from_gymnasium("CartPole-v1", 3), from_gymnasium("CartPole-v1", 2)
    sync.reset(seed=0)
    with pytest.raises(ValueError, match="expected 3 copies as saved, got 2"):
        fewer.load_state_dict(sync.state_dict())


@pytest.mark.parametrize("id", ["Hopper-v5", "Ant-v5", "Acrobot-v1"])
def test_gymnasiums_own_environments_resume_exactly(id):
    """MuJoCo too, whose rewards read positions derived one sub-step before."""
    env, other = (from_gymnasium(id, 2, max_episode_steps=9) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    shape = env.single_action_space.shape
    actions = [
        torch.rand(2, *shape, generator=generator) * 2 - 1 if shape else torch.randint(3, (2,), generator=generator)
        for _ in range(25)
    ]
    env.reset(seed=0)
    for action in actions[:5]:
        env.step(action)
    assert resume_note(env) is None
    other.load_state_dict(env.state_dict())
    for action in actions[5:]:
        ours, theirs = env.step(action), other.step(action)
        assert torch.equal(ours.obs, theirs.obs)
        assert torch.equal(ours.reward, theirs.reward)
        assert torch.equal(ours.truncated, theirs.truncated)


class Hiding(InPlace):
    def __init__(self):
        super().__init__()
        self.engine = iter([1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: from_gymnasium(Hiding, 1), "Hiding.engine: a builtins.list_iterator"),
        (lambda: SB3Env(dummy_vec_env(InPlace, 1)), "SB3Env has no state_dict"),
        (lambda: GymnasiumEnv(gymnasium.make_vec("CartPole-v1", 1, "vector_entry_point")), "CartPole"),
    ],
)
def test_a_run_that_cannot_resume_exactly_says_so_once(make, reason, recwarn):
    collector = Collector(make(), seed=0)
    collector._stream.obs = collector.env.reset(seed=0)
    collector.total_steps = 3  # a run that has begun
    assert not collector.exact
    assert reason in collector.resume_note
    recwarn.clear()
    states = [collector.state_dict() for _ in range(3)]
    assert not any("env" in state for state in states)
    messages = [str(each.message) for each in recwarn if "fresh episodes" in str(each.message)]
    assert len(messages) == 1
    assert reason in messages[0]
    other = Collector(make(), seed=0)
    with pytest.warns(UserWarning, match="a resumed run starts fresh episodes here"):
        other.load_state_dict(states[0])
