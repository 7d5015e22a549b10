"""Ids of Isaac Lab and mjlab, on stand-ins of the two packages."""

from __future__ import annotations

import contextlib
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import pytest
import torch

import envs
from agents import PPO
from ccrl.batched_env import AutoresetMode
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.testing.lab import FakeLab, LabCfg
from envs import isaac

TASK = "Isaac-Stand-In-Direct"


@dataclass
class Scene:
    num_envs: int = 1


@dataclass
class Cfg(LabCfg):
    one_per_process: bool = True
    scene: Scene = field(default_factory=Scene)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


class InGymnasium(gymnasium.Env):
    """What ``gymnasium.make`` accepts."""

    def __init__(self, cfg: Cfg, **_: Any) -> None:
        self.lab = FakeLab(cfg)

    @property
    def unwrapped(self) -> Any:
        return self.lab

    @property
    def spec(self) -> Any:
        return self.lab.spec

    def reset(self, **options: Any) -> Any:
        return self.lab.reset(**options)

    def step(self, action: Any) -> Any:
        return self.lab.step(action)

    def close(self) -> None:
        self.lab.close()


@pytest.fixture
def lab(monkeypatch):
    """Isaac Lab, with one task; what happened, in order."""
    seen = []

    @contextlib.contextmanager
    def launch(cfg, options):
        seen.append("launched")
        yield
        seen.append("ended")

    module(monkeypatch, "isaaclab.app", launch_simulation=launch)
    context = types.SimpleNamespace(instance=lambda: context, clear_instance=lambda: seen.append("cleared"))
    module(monkeypatch, "isaaclab.sim", SimulationContext=context)
    module(monkeypatch, "isaaclab_tasks")
    module(monkeypatch, "isaaclab_tasks.utils.parse_cfg",
           parse_env_cfg=lambda task, device, num_envs: Cfg(num_envs=num_envs, compute_final_obs=False))  # fmt: skip
    spec = gymnasium.envs.registration.EnvSpec(TASK, InGymnasium, disable_env_checker=True, order_enforce=False)
    monkeypatch.setitem(gymnasium.registry, TASK, spec)
    return seen


def test_an_id_is_trained_and_evaluated_in_the_one_simulation(lab):
    agent = PPO(f"isaac:{TASK}", num_envs=4, n_steps=8, n_minibatches=2, n_epochs=1, hidden=(4,), seed=0)
    assert agent.env.unwrapped.cfg.compute_final_obs  # asked for, else time limits have no value
    agent.learn(64)
    evaluation = envs.make(f"isaac:{TASK}-v0", 10)
    assert evaluation.num_envs == 4  # that of the simulation
    assert evaluate_agent(agent, evaluation, episodes=6).lengths.tolist() == [12] * 6
    agent.learn(64)
    assert lab == ["launched"]
    evaluation.close()
    agent.close()
    assert lab == ["launched", "cleared", "ended"]
    envs.make(f"isaac:{TASK}", 2).close()
    assert lab == ["launched", "cleared", "ended"] * 2


def test_closing_twice_leaves_the_simulation_to_its_other_user(lab):
    env, evaluation = (envs.make(f"isaac:{TASK}", 2) for _ in range(2))
    evaluation.close()
    evaluation.close()
    assert lab == ["launched"]
    env.close()
    assert lab == ["launched", "cleared", "ended"]


def test_a_task_that_is_refused_ends_its_simulation(lab, monkeypatch):
    def discrete(self, cfg, **_):
        self.lab = FakeLab(cfg)
        self.lab.single_action_space = gymnasium.spaces.Discrete(2)

    monkeypatch.setattr(InGymnasium, "__init__", discrete)
    with pytest.raises(ValueError, match="expected a Box, got Discrete"):
        envs.make(f"isaac:{TASK}", 2)
    assert lab == ["launched", "cleared", "ended"]


def test_a_second_simulation_is_refused_in_words(lab):
    env = envs.make(f"isaac:{TASK}", 2)
    with pytest.raises(RuntimeError, match=r"one simulation per process.*evaluate\.py"):
        envs.make(f"isaac:{TASK}", 2, cfg={"limit": 5})
    env.close()


def test_names_of_tasks(lab):
    assert isaac.resolve_task("Isaac-Ant-v0", ["Isaac-Ant"]) == "Isaac-Ant"
    assert isaac.resolve_task("Isaac-Ant", ["Isaac-Ant-v0", "Isaac-Ant-Direct"]) == "Isaac-Ant-v0"
    with pytest.raises(ValueError, match=rf"no task 'Isaac-Stand-Direct'; did you mean {TASK}"):
        envs.make("isaac:Isaac-Stand-Direct", 2)
    with pytest.raises(ValueError, match="expected one of Isaac-Ant"):
        isaac.resolve_task("x", ["Isaac-Ant"])


def test_options_by_dotted_name(lab):
    env = envs.make(f"isaac:{TASK}", 2, cfg={"limit": 5, "scene.num_envs": 7, "seed": 3}, clip_actions=1.0)
    assert (env.unwrapped.cfg.limit, env.unwrapped.cfg.scene.num_envs, env.unwrapped.cfg.seed) == (5, 7, 3)
    assert float(env.single_action_space.high[0]) == 1.0
    env.close()
    for wrong, near in (({"limits": 5}, "limit"), ({"scene.envs": 5}, "num_envs"), ({"no.such": 1}, "cfg")):
        with pytest.raises(ValueError, match=near):
            envs.make(f"isaac:{TASK}", 2, cfg=wrong)
    with pytest.raises(ValueError, match="clip_actions"):
        envs.make(f"isaac:{TASK}", 2, clip_actions=-1.0)
    with pytest.raises(ValueError, match="resets as SameStep alone"):
        envs.make(f"isaac:{TASK}", 2, autoreset_mode="NextStep")


def test_the_simulators_own_recorder_films(lab, monkeypatch, tmp_path):
    shown = []

    @contextlib.contextmanager
    def launch(cfg, options):
        shown.append(options["visualizer"])
        yield

    monkeypatch.setattr(sys.modules["isaaclab.app"], "launch_simulation", launch)
    module(monkeypatch, "isaaclab.envs.utils.video_recorder_cfg", VideoRecorderCfg=types.SimpleNamespace)
    env = envs.make(f"isaac:{TASK}", 2, video=str(tmp_path), video_length=30)
    (recorder,) = env.unwrapped.cfg.video_recorders
    assert (recorder.output_dir, recorder.video_length) == (str(tmp_path), 30)
    env.close()
    envs.make(f"isaac:{TASK}", 2).close()
    assert shown == [["newton"], ["none"]]


def test_a_missing_asset_names_the_variable(lab, monkeypatch):
    def broken(*_, **__):
        raise FileNotFoundError("USD file not found at path: /nowhere/cartpole.usd")

    monkeypatch.setattr(gymnasium, "make", broken)
    monkeypatch.setenv("ISAACSIM_ASSET_ROOT", "/nowhere")
    with pytest.raises(FileNotFoundError, match=r"cartpole\.usd.*ISAACSIM_ASSET_ROOT = '/nowhere'.*setup/isaac\.sh"):
        envs.make(f"isaac:{TASK}", 2)
    assert lab == ["launched", "ended"]  # and the process may try again


def test_making_one_leaves_the_callers_random_numbers_alone(lab):
    state = torch.get_rng_state()
    env = envs.make(f"isaac:{TASK}", 2, seed=5)
    env.close()
    assert torch.equal(state, torch.get_rng_state())


def test_mjlab_waits_for_the_collector_and_may_be_made_twice(monkeypatch):
    module(monkeypatch, "mjlab.tasks")
    module(monkeypatch, "mjlab.envs", ManagerBasedRlEnv=lambda cfg, device, render_mode: FakeLab(
        LabCfg(cfg.scene.num_envs, cfg.seed, auto_reset=cfg.auto_reset, actor_name="actor")))  # fmt: skip
    module(monkeypatch, "mjlab.tasks.registry", list_tasks=lambda: ["Mjlab-Stand-In"],
           load_env_cfg=lambda task: Cfg())  # fmt: skip
    agent = PPO("mjlab:Mjlab-Stand-In", num_envs=4, n_steps=8, n_minibatches=2, n_epochs=1, hidden=(4,), seed=0)
    assert agent.env.autoreset_mode == AutoresetMode.DISABLED
    assert list(agent.env.single_observation_space) == ["actor", "critic"]
    other = envs.make("mjlab:Mjlab-Stand-In", 3)
    agent.learn(64)
    assert evaluate_agent(agent, other, episodes=5).lengths.tolist() == [12] * 5
    other.close()
    agent.close()
    filmed = []
    module(monkeypatch, "mjlab.utils.wrappers", VideoRecorder=lambda env, *options: filmed.append(options) or env)
    envs.make("mjlab:Mjlab-Stand-In", 2, video="films").close()
    (folder, episode, step, length, *_), = filmed  # fmt: skip
    assert (folder, length, [episode(0), step(0), step(1)]) == ("films", 200, [False, True, False])


@pytest.mark.parametrize(
    ("id", "extra"), [("isaac:Isaac-Ant-Direct", "isaac"), ("mjlab:Mjlab-Cartpole-Balance", "mjlab")]
)
def test_without_the_simulator_the_extra_is_named(id, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, "isaaclab", None)
    monkeypatch.setitem(sys.modules, "mjlab", None)
    with pytest.raises(ImportError, match=rf"\[{extra}\]"):
        envs.make(id, 2)
