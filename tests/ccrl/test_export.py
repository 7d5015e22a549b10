"""Exported policies: what comes out of the file is what the policy does."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from ccrl.policies import MLPPolicy, RecurrentPolicy
from ccrl.policies.export import Deployed, export, largest_difference

BOX = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
UNIT = gym.spaces.Box(-1.0, 2.0, (3,), np.float32)
DICT = gym.spaces.Dict({
    "policy": BOX, "critic": gym.spaces.Box(-np.inf, np.inf, (7,), np.float32), "mode": gym.spaces.Discrete(4),
})  # fmt: skip
IMAGE = gym.spaces.Box(0, 255, (3, 36, 36), np.uint8)


def trained(cls, space, action, **settings):
    """A policy whose weights, statistics and outputs are none of a fresh one's."""
    torch.manual_seed(0)
    policy = cls(space, action, hidden=(16,), **settings)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if policy.normalise_obs:
        rows = {k: 3.0 + 2.0 * torch.randn(4, 6, s.shape[0]) for k, s in space.items() if k != "mode"} \
            if isinstance(space, gym.spaces.Dict) else 3.0 + 2.0 * torch.randn(4, 6, 5)  # fmt: skip
        if isinstance(space, gym.spaces.Dict):
            rows["mode"] = torch.zeros(4, 6, dtype=torch.int64)
        policy.update_normaliser(rows, torch.ones(4, 6))
    return policy


CASES = {
    "clipped": (MLPPolicy, BOX, UNIT, {"normalise_obs": True}),
    "squashed": (MLPPolicy, BOX, UNIT, {"squash": True, "state_dependent_std": True}),
    "discrete": (MLPPolicy, BOX, gym.spaces.Discrete(6), {}),
    "factored": (MLPPolicy, BOX, gym.spaces.MultiDiscrete([3, 4]), {}),
    "groups": (MLPPolicy, DICT, UNIT, {"normalise_obs": True}),
    "pixels": (MLPPolicy, IMAGE, gym.spaces.Discrete(4), {}),
    "gru": (RecurrentPolicy, BOX, UNIT, {"recurrent": "gru", "recurrent_size": 6, "normalise_obs": True}),
    "lstm": (RecurrentPolicy, DICT, UNIT, {"recurrent": "lstm", "recurrent_size": 6}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_the_file_computes_what_the_policy_does(name, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    cls, space, action, settings = CASES[name]
    policy = trained(cls, space, action, **settings)
    deployed = Deployed(policy, space)
    export(deployed, tmp_path / "file", format, {"agent": "test"})
    # 64 rows, where 3 were traced
    assert largest_difference(deployed, tmp_path / "file", format) <= 1e-5


def test_one_action_by_hand(tmp_path):
    """A linear policy whose numbers can be followed: normalise, multiply, clip."""
    onnxruntime = pytest.importorskip("onnxruntime")
    policy = MLPPolicy(gym.spaces.Box(-9, 9, (2,), np.float32), UNIT, hidden=(), normalise_obs=True)
    with torch.no_grad():
        policy.actor.net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        policy.actor.net[0].bias.copy_(torch.tensor([0.0, 0.5, 0.0]))
    # mean (2, 4), variance (1, 4)
    policy.update_normaliser(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]), torch.ones(1, 2))
    export(Deployed(policy, gym.spaces.Box(-9, 9, (2,), np.float32)), tmp_path / "p.onnx", "onnx", {})
    session = onnxruntime.InferenceSession(str(tmp_path / "p.onnx"))
    # x = (3, 3): normalised (1, -0.5); W x + b = (1, 0, 0.5). x = (5, 8): (3, 2) -> (3, 2.5, 5), clipped to 2
    found = session.run(None, {"obs": np.array([[3.0, 3.0], [5.0, 8.0]], np.float32)})[0]
    np.testing.assert_allclose(found, [[1.0, 0.0, 0.5], [2.0, 2.0, 2.0]], atol=1e-6)


def test_a_memory_is_handed_from_step_to_step(tmp_path):
    """Ten steps through the file, the state handed back, are the policy's own ten steps; the critic's memory and its
    observations are not asked for."""
    onnxruntime = pytest.importorskip("onnxruntime")
    cls, space, action, settings = CASES["lstm"]
    policy = trained(cls, space, action, **settings)
    deployed = Deployed(policy, space)
    assert deployed.inputs == ["mode", "policy", "state"]
    assert deployed.state_size == 12  # h and c of the actor alone; with the critic's 24
    export(deployed, tmp_path / "p.onnx", "onnx", {"agent": "test"})
    session = onnxruntime.InferenceSession(str(tmp_path / "p.onnx"))
    state, own = np.zeros((2, 12), np.float32), None
    torch.manual_seed(1)
    for _ in range(10):
        obs = {"policy": torch.randn(2, 5), "mode": torch.randint(4, (2,)), "critic": torch.randn(2, 7)}
        feed = {"policy": obs["policy"].numpy(), "mode": obs["mode"].numpy(), "state": state}
        found, state = session.run(["action", "next_state"], feed)
        with torch.no_grad():
            out = policy.act(obs, None, own)
        own = out["state"]
        np.testing.assert_allclose(found, policy.to_env(out["action"]).numpy(), atol=1e-5)
    np.testing.assert_allclose(state, own[:, :12].numpy(), atol=1e-5)


def test_the_file_says_what_it_is(tmp_path):
    onnx = pytest.importorskip("onnx")
    policy = trained(MLPPolicy, BOX, UNIT)
    deployed = Deployed(policy, BOX)
    export(deployed, tmp_path / "p.onnx", "onnx", {"agent": "ppo", "step": 7})
    export(deployed, tmp_path / "p.ts", "torchscript", {"agent": "ppo", "step": 7})
    held = {p.key: p.value for p in onnx.load(str(tmp_path / "p.onnx")).metadata_props}["ccrl"]
    extra = {"ccrl.json": ""}
    torch.jit.load(str(tmp_path / "p.ts"), _extra_files=extra)
    expected = {
        "agent": "ppo", "step": 7,
        "inputs": {"obs": {"shape": ["N", 5], "dtype": "float32"}},
        "outputs": {"action": {"shape": ["N", 3], "dtype": "float32"}},
    }  # fmt: skip
    assert json.loads(held) == json.loads(extra["ccrl.json"]) == expected


def test_exporting_leaves_the_policy_alone(tmp_path):
    policy = trained(MLPPolicy, BOX, UNIT)
    export(Deployed(policy, BOX), tmp_path / "p.ts", "torchscript", {})
    assert policy.heads == ("value",)
    assert policy.training
    assert all(p.requires_grad for p in policy.parameters())
    assert policy.values(torch.zeros(2, 5)).shape == (2,)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_policy_that_knows_its_batch_size_is_refused(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")

    class Counting(MLPPolicy):
        def act(self, obs, noise, state=None, first=None):
            out = super().act(obs, noise)
            return out | {"action": out["action"] + torch.zeros(len(obs.tolist()), 1)}

    deployed = Deployed(Counting(BOX, UNIT, hidden=(4,)), BOX)
    export(deployed, tmp_path / "file", format, {})
    with pytest.raises(ValueError, match="keep it in tensors"):
        largest_difference(deployed, tmp_path / "file", format)
