"""``engine="warp"``. What surrounds the engine is tested on a stand-in for it, MuJoCo's own behind the same interface;
mujoco-warp itself where it is installed (docs/robots.md; the first run compiles its kernels, for minutes)."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import envs
from agents import PPO
from ccrl.adapters import as_vector_env
from ccrl.batched_env import AutoresetMode
from ccrl.testing import EnvContract
from envs.mujoco import TASKS, MujocoTask, make_mujoco
from envs.mujoco.engine import BatchEngine
from envs.mujoco.task import ASSETS
from envs.mujoco.tasks.ant import Ant
from envs.mujoco.tasks.runners import HalfCheetah, Hopper
from envs.mujoco.warp import WarpEnv

needs_warp = pytest.mark.skipif(importlib.util.find_spec("mujoco_warp") is None, reason="needs mujoco-warp")
MASSES = {"body_mass+body_inertia": (0.5, 2.0), "geom_friction": (0.2, 0.9)}


class StandIn:
    """As ``WarpEngine``: nothing is kept between calls, and all of a step's results are copies in float32."""

    dtype = torch.float32

    def __init__(self, model, num_envs, device, fields, variants=None, nconmax=None, njmax=None):
        self.inner, self.model, self.rows = (
            BatchEngine(model, num_envs, 1, fields, variants),
            model,
            torch.arange(num_envs),
        )
        state = self.inner.state
        self.rest = {name: getattr(state, name).float() for name in ("time", "qpos", "qvel", "act", "ctrl")}
        self.names = (*self.rest, *fields)

    def load(self, state, variant=None):
        with _disable_current_modes():
            if variant is not None:
                self.inner.play(self.rows, variant)
            self.inner.reset(self.rows, state["qpos"], state["qvel"])
            for name in ("time", "act", "ctrl"):
                getattr(self.inner.state, name).copy_(state[name])

    def step(self, nstep):
        with _disable_current_modes():
            self.inner.step(nstep)

    def forward(self):
        """``load`` has done it."""

    def read(self):
        with _disable_current_modes():
            return {name: getattr(self.inner.state, name).float().clone() for name in self.names}

    def dropped(self):
        return torch.zeros(())


class OnStandIn(WarpEnv):
    engine_class = StandIn


class Contract(EnvContract):
    time_limit, max_steps = 12, 40
    made = WarpEnv

    def make_env(self, num_envs, autoreset_mode):
        options = {"autoreset_mode": autoreset_mode, "max_episode_steps": self.time_limit}
        return self.made(self.task, num_envs, **options)


class TestStandIn(Contract):
    made, task = OnStandIn, Hopper()


@needs_warp
class TestHopper(Contract):
    task = Hopper()


@needs_warp
class TestHalfCheetah(Contract):
    task = HalfCheetah()


class Waits(TorchDispatchMode):
    """Fails at operations for which a GPU's host has to wait."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        constant = name == "lift_fresh" and args[0].dim() > 0  # of a list; single numbers go with the kernel
        assert name not in self.WAITING, f"{func} waits for the device"
        assert not constant, f"{args[0]} is copied to the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("task_id", TASKS)
def test_a_step_never_waits_for_the_device(task_id, mode):
    env = OnStandIn(TASKS[task_id](), 3, autoreset_mode=mode, max_episode_steps=2)
    env.reset(seed=0)
    action = torch.zeros(3, *env.single_action_space.shape)
    env.step(action)  # the first one checks
    with Waits():
        for _ in range(3):
            env.step(action)


@pytest.mark.gpu
@needs_warp
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("task_id", TASKS)
def test_a_step_never_waits_for_a_gpu(task_id):
    env = envs.make(task_id, 64, engine="warp", device="cuda", max_episode_steps=3, seed=0)
    action = torch.zeros(64, *env.single_action_space.shape, device="cuda")
    env.step(action)  # the first one checks, compiles and records
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            result = env.step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(result.obs.isfinite().all())


@pytest.mark.parametrize("task_id", TASKS)
def test_a_step_is_that_of_the_other_engine(task_id):
    """The same first states from one seed, observations, rewards and flags, up to float32."""
    ours, other = (make_mujoco(task_id, 3, seed=4), OnStandIn(TASKS[task_id](), 3, seed=4))
    torch.testing.assert_close(other.reset(), ours.reset(), rtol=1e-6, atol=1e-6)
    action = torch.full((3, *other.single_action_space.shape), 0.3)
    for _ in range(2):
        a, b = ours.step(action), other.step(action)
        torch.testing.assert_close(b.obs, a.obs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.reward, a.reward, rtol=1e-4, atol=1e-3)
        assert torch.equal(a.terminated, b.terminated)


def test_an_explosion_is_put_back_and_reported(monkeypatch):
    for unstable in ("nan", "continue"):
        env = OnStandIn(HalfCheetah(), 2, unstable=unstable)
        env.reset(seed=0)
        with monkeypatch.context() as patch:
            exploded = env.engine.read()
            exploded["qvel"][1, 3] = torch.inf
            patch.setattr(env.engine, "read", lambda: exploded)  # noqa: B023
            env._checked = True
            result = env.step(torch.zeros(2, 6))
        assert bool(result.reward[1].isnan()) == (unstable == "nan")
        assert bool(result.obs.isfinite().all())
        assert bool(env.step(torch.zeros(2, 6)).reward.isfinite().all())


def test_set_state_begins_episodes_in_rows():
    env = OnStandIn(HalfCheetah(), 3, max_episode_steps=2, autoreset_mode="Disabled")
    env.reset(seed=0)
    before = env.step(torch.zeros(3, 6)).obs.clone()
    obs = env.set_state(torch.ones(1, 9), torch.full((1, 9), 2.0), torch.tensor([1]))
    assert obs[1].tolist() == [1.0] * 8 + [2.0] * 9  # all of qpos but x, and qvel
    assert torch.equal(obs[0], before[0])
    assert env.step(torch.zeros(3, 6)).truncated.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"expected qpos, qvel of shapes \(\(3, 9\), \(3, 9\)\)"):
        env.set_state(torch.zeros(2, 9), torch.zeros(2, 9))


def test_variants_belong_to_episodes_and_are_saved():
    make = lambda: OnStandIn(Hopper(), 6, max_episode_steps=3, seed=1, randomise=MASSES, models=5)  # noqa: E731
    env = make()
    env.reset()
    of = lambda env: env.state_dict()["state"]["variant"]  # noqa: E731
    first = of(env)
    assert len(first.unique()) > 1
    action = torch.full((6, 3), 0.5)
    env.step(action)
    assert torch.equal(of(env), first)
    other = make()
    other.reset(seed=9)
    other.load_state_dict(env.state_dict())
    for _ in range(4):
        assert torch.equal(env.step(action).obs, other.step(action).obs)
    assert not torch.equal(of(env), first)


@dataclass
class Slider(MujocoTask):
    """A user's task: a cart on a rail, told where it is."""

    xml_file: str = str(ASSETS / "inverted_pendulum.xml")
    frame_skip: int = 2
    max_episode_steps: ClassVar = 5

    def observe(self, state):
        return torch.cat((state.qpos, state.qvel, state.xpos[:, 1]), 1)

    def reward(self, state):
        return -state.qpos[:, 0].abs()

    fields = ("xpos",)


Slider.reset_noise_scale = 0.01


def make_slider(num_envs, device="cpu", **options):
    return as_vector_env(make_mujoco(Slider, num_envs, device=device, **options))


def test_a_task_of_ones_own_takes_engine_and_device(monkeypatch):
    monkeypatch.setattr(WarpEnv, "engine_class", StandIn)
    if "Slider-v0" not in gymnasium.registry:
        gymnasium.register("Slider-v0", vector_entry_point=make_slider)
    env = envs.make("Slider-v0", 4, engine="warp", seed=0)
    assert isinstance(env, WarpEnv)
    assert env.step(torch.zeros(4, 1)).obs.shape == (4, 7)
    with pytest.raises(ValueError, match="MuJoCo's own engine simulates on the CPU, got device='meta'"):
        envs.make("Slider-v0", 4, device="meta")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nthread": 2}, TypeError, "expected options among .*njmax.*; received nthread for engine='warp'"),
        ({"dtype": torch.float64}, TypeError, "received dtype"),
        ({"njmax": 0}, ValueError, "njmax: expected >= 1"),
        ({"unstable": "maybe"}, ValueError, "unstable: expected one of"),
        ({"engine": "jax"}, ValueError, "engine: expected 'mujoco' or 'warp', received 'jax'"),
    ],
)
def test_options_of_the_engine_are_checked(monkeypatch, options, error, message):
    monkeypatch.setattr(WarpEnv, "engine_class", StandIn)
    with pytest.raises(error, match=message):
        envs.make("HalfCheetah-v5", 2, **{"engine": "warp", **options})


def test_the_own_engine_says_which_takes_other_devices():
    with pytest.raises(ValueError, match="give engine='warp'"):
        make_mujoco("HalfCheetah-v5", 2, device="meta")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "warp", None)
    with pytest.raises(ImportError, match=r'the extra .warp.: pip install -e "\.\[warp\]"'):
        envs.make("HalfCheetah-v5", 2, engine="warp")


# mujoco-warp itself


def gaps(task, options=None, steps=1, n=4):
    """Differences, relative where above 1, of the observation after a reset, of that after a step and of its reward:
    the largest of all copies, and of that the median over ``steps`` along a trajectory of MuJoCo's."""
    ours, other = (
        make_mujoco(task, n, dtype=torch.float64, **options or {}),
        make_mujoco(task, n, engine="warp", **options or {}),
    )
    found = [[relative(other.reset(seed=3), ours.reset(seed=3))], [], []]
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.as_tensor(x) for x in (other.single_action_space.low, other.single_action_space.high))
    for _ in range(steps):
        qpos, qvel = ours.engine.state.qpos.float(), ours.engine.state.qvel.float()
        ours.set_state(qpos, qvel)
        other.set_state(qpos, qvel)
        action = low + (high - low) * torch.rand(n, len(low), generator=generator)
        a, b = ours.step(action), other.step(action)
        done = (a.terminated | a.truncated)[:, None]
        found[1].append(relative(torch.where(done, b.final_obs, b.obs), torch.where(done, a.final_obs, a.obs)))
        found[2].append(relative(b.reward, a.reward))
    return [torch.stack(x).median().item() for x in found]


def relative(x, y):
    return ((x - y).abs() / y.abs().clamp(min=1)).max()


@needs_warp
@pytest.mark.parametrize("task_id", TASKS)
def test_one_step_is_mujocos(task_id, tmp_path):
    options = {}
    if task_id.startswith("Humanoid"):  # their solver, PGS, is not in mujoco-warp: of both, Newton's method
        name = TASKS[task_id]().xml_file
        model = tmp_path / name
        model.write_text((ASSETS / name).read_text().replace('solver="PGS"', 'solver="Newton"'))
        options = {"xml_file": str(model)}
    start, obs, reward = gaps(task_id, options)
    print(f"\n{task_id}: after a reset {start:.1e}, one step {obs:.1e}, its reward {reward:.1e}")
    assert start < 1e-5
    assert max(obs, reward) < (1e-3 if options else 1e-5)


@needs_warp
def test_one_step_of_a_trajectory_with_contacts_is_mujocos():
    """The median: where a foot has just touched, float32 at the start alone moves MuJoCo's own result by 2e-4."""
    for task in ("HalfCheetah-v5", "Hopper-v5"):
        _, obs, reward = gaps(task, steps=30)
        assert max(obs, reward) < 3e-5


@needs_warp
def test_an_ant_needs_the_elliptic_cone(tmp_path):
    """With the pyramidal one the tangents at a contact count, and the engines choose different ones."""
    text = (ASSETS / "ant.xml").read_text()
    elliptic = tmp_path / "ant.xml"
    elliptic.write_text(text.replace("<option ", '<option cone="elliptic" '))
    found = {file: gaps(Ant, {"xml_file": file}, steps=12)[1] for file in (str(elliptic), "ant.xml")}
    print(f"\none step of the ant, along a trajectory: {found}")
    assert found[str(elliptic)] < 1e-4


@needs_warp
def test_worlds_are_of_their_variants():
    options = {"randomise": MASSES, "models": 3, "seed": 0}
    env = make_mujoco("Hopper-v5", 6, engine="warp", **options)
    env.reset(seed=0)
    variant = env.state_dict()["state"]["variant"]
    assert len(variant.unique()) > 1
    own = make_mujoco("Hopper-v5", 6, **options)
    own.reset(seed=0)
    own.engine.play(torch.arange(6), variant)
    qpos, qvel = env._memory[0]["qpos"].clone(), env._memory[0]["qvel"].clone()
    qpos[:, 1] -= 0.02  # a foot in the floor
    own.set_state(qpos, qvel)
    env.set_state(qpos, qvel)
    action = torch.full((6, 3), 0.7)
    a, b = own.step(action).obs, env.step(action).obs
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    plain = make_mujoco("Hopper-v5", 6)
    plain.reset(seed=0)
    plain.set_state(qpos, qvel)
    assert (plain.step(action).obs - a).abs().amax(1).min() > 1e-3


@needs_warp
def test_contacts_without_room_are_told():
    for options in ({"njmax": 4}, {}):
        env = make_mujoco("Ant-v5", 4, engine="warp", **options)
        env.reset(seed=0)
        for _ in range(20):  # it lands
            result = env.step(torch.zeros(4, 8))
        assert bool(result.log["simulator/dropped"] > 0) == bool(options)


@needs_warp
def test_fields_that_cannot_vary_are_refused():
    def more(model, rng):
        model.geom_condim[:] = rng.choice([1, 3])

    with pytest.raises(ValueError, match="it has no values per world of geom_condim"):
        make_mujoco("Hopper-v5", 2, engine="warp", randomise=more, models=8)

    def air(model, rng):
        model.opt.viscosity = rng.uniform(0.1, 0.2)

    with pytest.raises(ValueError, match=r"whether there is any opt\.viscosity"):
        make_mujoco("Hopper-v5", 2, engine="warp", randomise=air, models=2)


@needs_warp
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_whole_training_is_on_one_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    sizes = {"num_envs": 8, "n_steps": 8, "batch_size": 32, "n_epochs": 1, "hidden": (8,)}
    agent = PPO("HalfCheetah-v5", device=device, env_kwargs={"engine": "warp"}, seed=0, **sizes)
    agent.learn(128)
    assert agent.env.device.type == next(agent.policy.parameters()).device.type == device
    assert float(agent.scalars["simulator/dropped"]) == 0.0


@needs_warp
def test_pictures_are_those_of_the_other_engine():
    pictures = []
    for engine in ("mujoco", "warp"):
        env = make_mujoco("Hopper-v5", 2, engine=engine, width=64, height=48)
        env.reset(seed=0)
        try:
            pictures.append(env.render(1).astype(np.int64))
        except RuntimeError as error:
            pytest.skip(str(error))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1.0
    assert pictures[0].std() > 1.0
