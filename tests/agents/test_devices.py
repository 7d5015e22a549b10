"""Tensors are made on the device of the data, for every agent, checked without an accelerator.

Factories that are called without ``device=`` make tensors on "meta" here, which mix with no others: what would fail on
an accelerator, or copy from the host in every iteration, fails on a CPU (in-place sums and indices are not noticed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import agents
from ccrl.policies import MLPPolicy

BATCHES = {"num_envs": 4, "n_steps": 16, "batch_size": 32, "n_epochs": 2}
REPLAY = {"num_envs": 4, "rounds": 4, "learning_starts": 8, "buffer_size": 200, "batch_size": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": BATCHES,
    "mdpo": {"num_envs": 4, "n_steps": 16},
    "bpo": BATCHES,
    "hdpo": {"n_train": 16, "n_dev": 16, "batch_size": 16},
    "bac": {"num_envs": 2, "n_steps": 20},
    "bpg": {"num_envs": 4, "n_steps": 20},
    "dbqpg": {"num_envs": 4, "n_steps": 16},
    "dqn": REPLAY,
    "qr_dqn": REPLAY,
    "sac": REPLAY,
    "td3": REPLAY,
    "mdpo_off_policy": REPLAY,
    "crossq": REPLAY | {"critic_hidden": (8,)},
    "subpo": {"credit": "gae"},
    "orpo": {"coef": 0.0},
    "flow_ppo": BATCHES | {"denoising_steps": 2, "critic_warmup": 0},
    "grouped": {"n_groups": 2, "group_size": 4, "n_steps": 32},
}
PENDULUM = gymnasium.spaces.Box(-8, 8, (3,)), gymnasium.spaces.Box(-2, 2, (1,))
OFFLINE = ("bc", "cdsa", "iql", "pgd", "rebrac", "td3_bc")
ENVS = {"bpo": "Pendulum-v1", "hdpo": "ccrl/InventoryOneStoreLost-v0"}
ENVS |= dict.fromkeys(("flow_ppo", "sac", "td3", "crossq", "mdpo_off_policy", *OFFLINE), "Pendulum-v1")


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def on_the_host(call: Callable[..., Any]) -> Callable[..., Any]:
    """For what belongs on the host: questions and answers of text tasks, constructors of GPyTorch."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return call(*args, **kwargs)

    return wrapped


def learns_elsewhere(agent: Any, steps: int) -> None:
    agent.learn(until=steps)  # tables that are made once may come from the host
    before = agent.num_timesteps
    with elsewhere():
        agent.learn(until=before + steps)
    assert agent.num_timesteps > before


@pytest.mark.parametrize("name", sorted(agents.AGENTS))
def test_control(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if name in ("bac", "bpg"):
        kernel = pytest.importorskip("gpytorch", reason="the extra gp is not installed").kernels.Kernel
        monkeypatch.setattr(kernel, "__init__", on_the_host(kernel.__init__))
    cls = agents.get_agent(name)
    settings = SETTINGS.get(name, {})
    if name in OFFLINE:
        rows = np.ones((64, 3), np.float32)
        np.savez(tmp_path / "a.npz", obs=rows, action=rows[:, :1], reward=rows[:, 0], terminated=rows[:, 0] * 0)
        settings = {"dataset": str(tmp_path / "a.npz"), "batch_size": 8, "updates": 8, "compile": "off"} | settings
    if name == "pgd":
        settings |= {"window": 4, "trajectories": 2, "generated": 3, "sampling_steps": 2, "denoiser_steps": 2,
                     "denoiser_features": 8, "regenerate_every": 64, "real_rows": 2}  # fmt: skip
    options = {"policy": MLPPolicy(*PENDULUM, hidden=(8,))} if name == "cdsa" else {}
    learns_elsewhere(cls(ENVS.get(name, "CartPole-v1"), cls.Config(**settings), **options), 64)


@pytest.mark.parametrize("name", sorted(agents.FLOW_METHODS))
def test_flow_policies(name: str) -> None:
    cls = agents.get_agent(name)
    more = {"teacher_steps": 1} if name == "diffusion_opd" else {}
    agent = cls("ring2d", cls.Config(n_prompts=2, group_size=4, steps=3, hidden=(8,), compile="off", **more))
    agent.collector.draw = on_the_host(agent.collector.draw)
    learns_elsewhere(agent, 8)


@pytest.mark.parametrize("name", sorted(agents.METHODS))
def test_language_models(name: str) -> None:
    pytest.importorskip("transformers", reason="the extra llm is not installed")
    cls = agents.get_agent(name)
    group = {} if name in ("div_prec", "sft") else {"group_size": 4}
    agent = cls("arithmetic", cls.Config(n_prompts=4, **group))
    agent.collector.collect = on_the_host(agent.collector.collect)
    agent.collector.draw = on_the_host(agent.collector.draw)
    learns_elsewhere(agent, 16)


@pytest.mark.parametrize(
    "use",
    [lambda x: x + torch.tensor(1.0), lambda x: torch.where(x > 0, x, torch.zeros(2)), lambda x: torch.eye(2).to(x)],
)
def test_a_tensor_on_the_default_device_is_found(use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(2)
    with elsewhere(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        use(x)
