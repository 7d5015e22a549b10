"""An environment from three functions: the contract, numbers by hand, refusals, and the page that teaches it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from ccrl.batched_env import AutoresetMode
from ccrl.testing import EnvContract, sample_actions
from ccrl.torch_env import TorchEnv

PAGE = Path(__file__).resolve().parents[2] / "docs" / "new_torch_env.md"


class Walk(TorchEnv):
    """A state of two parts and a ``Dict`` observation: ``x' = x + a - 0.5 + noise``, over where ``|x| > 2``. An image
    counts the steps in integers."""

    single_action_space = Discrete(2)
    single_observation_space = Dict({"x": Box(-9, 9, (1,), np.float32), "image": Box(0, 255, (1, 2), np.uint8)})

    def initial(self, generator, n):
        x = torch.rand(n, dtype=torch.float64, generator=generator, device=self.device) - 0.5
        return {"x": x, "age": torch.zeros(n, dtype=torch.int64, device=self.device)}

    def draw_noise(self, generator, n):
        return torch.rand(n, generator=generator, device=self.device) - 0.5

    def transition(self, state, action, noise):
        x = state["x"] + action - 0.5 + noise
        return {"x": x, "age": state["age"] + 1}, x * 2, x.abs() > 2.0

    def observe(self, state):
        return {"x": state["x"][:, None], "image": state["age"].to(torch.uint8)[:, None, None].expand(-1, 1, 2)}


class TestWalk(EnvContract):
    independent_copies = True

    def make_env(self, num_envs, autoreset_mode):
        return Walk(num_envs, autoreset_mode=autoreset_mode)


def test_noise_is_independent_of_a_collectors_with_the_same_seed():
    """Normal numbers of a generator seeded alike have a correlation of -.33 with its uniform ones."""
    env = Walk(4096)
    before = env.reset(seed=0)["x"].flatten().clone()
    noise = env.step(torch.zeros(4096, dtype=torch.int64)).final_obs["x"].flatten() - before + 0.5
    for draw in (torch.rand, torch.randn):
        exploration = draw(4096, generator=torch.Generator().manual_seed(0))
        assert abs(float(torch.corrcoef(torch.stack([noise, exploration]))[0, 1])) < 0.08  # five standard deviations


class TestWalkLimit(EnvContract):
    time_limit = 5
    independent_copies = True

    def make_env(self, num_envs, autoreset_mode):
        return Walk(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=5)


class Count(TorchEnv):
    """``x' = x + 1`` from 10 on, reward ``x'``, over at 12 for action 1."""

    single_action_space = Discrete(2)
    single_observation_space = Box(0, 99, (1,), np.float32)
    default_max_episode_steps = 3

    def initial(self, generator, n):
        return torch.full((n, 1), 10.0)

    def transition(self, state, action, noise):
        successor = state + 1
        return successor, successor[:, 0], (successor[:, 0] == 12) & (action == 1)


def test_one_episode_by_hand():
    actions = torch.tensor([0, 1])  # copy 0 is cut at step 3, copy 1 ends at step 2
    env = Count(2)
    assert env.reset(seed=0).tolist() == [[10.0], [10.0]]
    rows = [env.step(actions) for _ in range(3)]
    assert [row.obs.flatten().tolist() for row in rows] == [[11, 11], [12, 10], [10, 11]]
    assert [row.reward.tolist() for row in rows] == [[11, 11], [12, 12], [13, 11]]
    assert [row.terminated.tolist() for row in rows] == [[False, False], [False, True], [False, False]]
    assert [row.truncated.tolist() for row in rows] == [[False, False], [False, False], [True, False]]
    assert rows[1].final_obs[1].tolist() == [12.0]
    assert rows[2].final_obs[0].tolist() == [13.0]

    waiting = Count(2, autoreset_mode="NextStep")
    waiting.reset(seed=0)
    rows = [waiting.step(actions) for _ in range(4)]
    assert [row.obs.flatten().tolist() for row in rows] == [[11, 11], [12, 12], [13, 10], [10, 11]]
    assert [row.reward.tolist() for row in rows] == [[11, 11], [12, 12], [13, 0], [0, 11]]

    stopped = Count(2, autoreset_mode=AutoresetMode.DISABLED)
    stopped.reset(seed=0)
    rows = [stopped.step(actions) for _ in range(4)]
    assert [row.obs.flatten().tolist() for row in rows] == [[11, 11], [12, 12], [13, 12], [13, 12]]
    assert [row.reward.tolist() for row in rows] == [[11, 11], [12, 12], [13, 0], [0, 0]]
    assert stopped.reset(mask=torch.tensor([True, False])).flatten().tolist() == [10.0, 12.0]


def test_without_a_limit_nothing_is_truncated():
    env = Count(1, max_episode_steps=None)
    assert env.max_episode_steps == 3
    walk = Walk(4)
    walk.reset(seed=0)
    assert not any(bool(walk.step(torch.tensor([0, 1, 0, 1])).truncated.any()) for _ in range(50))


def test_a_compiled_step_is_the_same_function():
    plain, compiled = Walk(4), Walk(4, compile=True)
    assert compiled._advance != compiled._whole_step
    compiled._advance = torch.compile(compiled._whole_step, fullgraph=True, dynamic=False, backend="eager")
    plain.reset(seed=3)
    compiled.reset(seed=3)
    for step in range(30):
        action = torch.tensor([step % 2, 1, 0, 1])
        ours, theirs = plain.step(action), compiled.step(action)
        assert torch.equal(ours.obs["x"], theirs.obs["x"])
        assert torch.equal(ours.final_obs["image"], theirs.final_obs["image"])


def test_callers_cannot_change_the_state():
    class Plain(Count):
        def initial(self, generator, n):
            self.start = super().initial(generator, n)
            return self.start

    for mode in AutoresetMode:
        env = Plain(2, autoreset_mode=mode)
        env.reset(seed=0).add_(5.0)
        first = env.step(torch.tensor([0, 0]))
        assert first.reward.tolist() == [11.0, 11.0]
        first.obs.add_(5.0)
        assert env.step(torch.tensor([0, 0])).reward.tolist() == [12.0, 12.0]


def test_states_of_others_are_refused():
    env = Walk(3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"Walk: expected a state of .*\(4,\).*got .*\(3,\)"):
        Walk(4).load_state_dict(env.state_dict())
    with pytest.raises(ValueError, match="same id, num_envs and dtype"):
        Count(3).load_state_dict(env.state_dict())


class Wrong(Count):
    """``mistake`` in place of one of the three results of ``transition``."""

    def __init__(self, mistake, **options):
        super().__init__(2, **options)
        self.mistake = mistake

    def transition(self, state, action, noise):
        return self.mistake(state, *super().transition(state, action, noise))


def in_place(state, successor, reward, terminated):
    return state.add_(1.0), reward, terminated


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda state, *result: result[:2], r"expected \(state, reward, terminated\) from transition\(\), got 2"),
        (lambda state, *result: result[0], r"from transition\(\), got Tensor"),
        (lambda state, x, r, t: (x[:1], r, t), r"expected successors of shape \(2, 1\).*got shape \(1, 1\)"),
        (lambda state, x, r, t: (x.double(), r, t), r"expected successors of .*float32.*got .*float64"),
        (lambda state, x, r, t: (x, r[:, None], t), r"expected reward of shape \(2,\).*got shape \(2, 1\)"),
        (lambda state, x, r, t: (x, 1.0, t), r"expected reward of shape \(2,\).*got .*float"),
        (lambda state, x, r, t: (x, r, t.any()), r"expected terminated of shape \(2,\).*got shape \(\)"),
        (lambda state, x, r, t: (x, r, t.float()), r"expected terminated in bool.*float32"),
        (in_place, r"changed the state it was given; expected new tensors"),
    ],
)
def test_results_that_would_be_broadcast_or_cast_are_refused_in_the_first_step(mistake, message):
    env = Wrong(mistake)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("observe", "message"),
    [
        (lambda x: x[:, 0], r"expected observations of shape, type and device \(\(2, 1\).*got \(\(2,\)"),
        (lambda x: x.long(), "int64"),
        (lambda x: {"x": x}, r"expected observations \[''\], got \['x'\]"),
    ],
)
def test_observations_of_another_space_are_refused_in_the_first_reset(observe, message):
    class Seen(Count):
        def observe(self, state):
            return observe(state)

    with pytest.raises(ValueError, match=message):
        Seen(2).reset(seed=0)


def test_bad_settings():
    for wrong in ({"num_envs": 0}, {"max_episode_steps": 0}, {"autoreset_mode": "never"}, {"device": "tpu:9"}):
        with pytest.raises(ValueError):
            Count(**wrong)
    env = Count(2)
    with pytest.raises(RuntimeError, match=r"Count: call reset\(\) before step"):
        env.step(torch.tensor([0, 0]))
    env.reset()
    with pytest.raises(ValueError, match=r"Count: expected integer actions of shape \(2,\)"):
        env.step(torch.zeros(2))


def test_the_page_of_an_environment_of_your_own_runs(tmp_path):
    code, test = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    script = tmp_path / "page.py"
    script.write_text(code.replace("20_000", "2_048") + "\n\n" + test.replace("class Test", "class My"))
    names = runpy.run_path(str(script), run_name="__main__")
    assert names["agent"].num_timesteps == 2_048
    contract = names["MyPointMass"]()
    for name in (name for name in dir(contract) if name.startswith("test_")):
        getattr(contract, name)()


def test_states_of_numpy_are_refused_in_the_first_reset():
    class Arrays(Walk):
        def initial(self, generator, n):
            return {"x": np.zeros(n), "age": np.zeros(n)}

    with pytest.raises(TypeError, match="Arrays: expected tensors from its functions, got ndarray"):
        Arrays(2).reset()


def test_the_contract_plays_factored_actions():
    for space in (MultiDiscrete([2, 5]), MultiBinary(3)):
        actions = sample_actions(space, 50, torch.Generator().manual_seed(0))
        assert all(space.contains(row) for row in actions.numpy().astype(space.dtype))
        assert actions.amax(0).tolist() == ([1, 4] if space.shape == (2,) else [1, 1, 1])
