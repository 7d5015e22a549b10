"""Distributions against torch.distributions, the perceptron policy's spaces and initialisation, the normaliser."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import distributions as D

from ccrl.data import Data
from ccrl.policies import CATEGORICAL, GAUSSIAN, SQUASHED, MLPPolicy, RunningNorm
from ccrl.policies.acting import predict

BOX3 = gym.spaces.Box(-1, 1, (3,))


def gaussian(*shape: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"mean": torch.randn(shape, dtype=torch.float64), "log_std": 0.5 * torch.randn(shape, dtype=torch.float64)}


def torch_normal(params: dict[str, torch.Tensor]) -> D.Independent:
    return D.Independent(D.Normal(params["mean"], params["log_std"].exp()), 1)


def test_gaussian_matches_torch() -> None:
    new, old = gaussian(5, 2), {k: v.roll(1, 0) for k, v in gaussian(5, 2).items()}
    action = torch.randn(5, 2, dtype=torch.float64)
    theirs = torch_normal(new)
    torch.testing.assert_close(GAUSSIAN.log_prob(new, action), theirs.log_prob(action))
    torch.testing.assert_close(GAUSSIAN.entropy(new, action), theirs.entropy())
    torch.testing.assert_close(GAUSSIAN.kl(new, old), D.kl_divergence(theirs, torch_normal(old)))
    noise = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close((GAUSSIAN.sample(new, noise) - new["mean"]) / noise, new["log_std"].exp())
    assert GAUSSIAN.mode(new) is new["mean"]


def test_kl_has_the_new_distribution_first() -> None:
    # KL(N(.3, .8^2) || N(0, 1)) = (.64 + .09 - 1) / 2 - log .8; the other direction is .1284189
    new = {"mean": torch.tensor([0.3]), "log_std": torch.tensor([math.log(0.8)])}
    old = {"mean": torch.tensor([0.0]), "log_std": torch.tensor([0.0])}
    assert float(GAUSSIAN.kl(new, old)) == pytest.approx(0.0881436, abs=1e-7)
    assert float(GAUSSIAN.kl(old, new)) == pytest.approx(0.1284189, abs=1e-7)
    assert float(SQUASHED.kl(new, old)) == float(GAUSSIAN.kl(new, old))


def test_squashed_log_prob_matches_torch_and_stays_finite() -> None:
    params, u = gaussian(5, 2), torch.randn(5, 2, dtype=torch.float64)
    base = D.Normal(params["mean"], params["log_std"].exp())
    theirs = D.Independent(D.TransformedDistribution(base, [D.TanhTransform()]), 1)
    torch.testing.assert_close(SQUASHED.log_prob(params, u), theirs.log_prob(u.tanh()))
    one = {"mean": torch.zeros(1), "log_std": torch.zeros(1)}
    # far out: log N(30) - log(1 - tanh(30)^2) = -450 - .9189 - (2 log 2 - 60)
    assert float(SQUASHED.log_prob(one, torch.tensor([30.0]))) == pytest.approx(-392.3052, abs=1e-3)
    assert float(SQUASHED.log_prob(one, torch.tensor([-30.0]))) == pytest.approx(-392.3052, abs=1e-3)


def test_categorical_matches_torch() -> None:
    torch.manual_seed(0)
    new, old = ({"logits": torch.randn(6, 4, dtype=torch.float64)} for _ in range(2))
    action = torch.tensor([0, 1, 2, 3, 0, 1])
    theirs, theirs_old = D.Categorical(logits=new["logits"]), D.Categorical(logits=old["logits"])
    torch.testing.assert_close(CATEGORICAL.log_prob(new, action), theirs.log_prob(action))
    torch.testing.assert_close(CATEGORICAL.entropy(new, action), theirs.entropy())
    torch.testing.assert_close(CATEGORICAL.kl(new, old), D.kl_divergence(theirs, theirs_old))
    assert CATEGORICAL.mode(new).tolist() == new["logits"].argmax(-1).tolist()


def test_categorical_sampling_inverts_the_cumulative_distribution() -> None:
    params = {"logits": torch.tensor([0.2, 0.3, 0.5]).log().expand(6, 3)}
    noise = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 1.0])  # 1.0: rounding may leave the last sum below it
    assert CATEGORICAL.sample(params, noise).tolist() == [0, 0, 1, 1, 2, 2]


def test_masked_actions_stay_out_of_values_and_gradients() -> None:
    logits = torch.tensor([[0.3, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    old = {"logits": torch.tensor([[0.1, -torch.inf, 0.2]], dtype=torch.float64)}
    kept, kept_old = D.Categorical(logits=logits[:, [0, 2]]), D.Categorical(logits=old["logits"][:, [0, 2]])
    entropy, kl = CATEGORICAL.entropy({"logits": logits}, torch.tensor([0])), CATEGORICAL.kl({"logits": logits}, old)
    torch.testing.assert_close(entropy, kept.entropy())
    torch.testing.assert_close(kl, D.kl_divergence(kept, kept_old))
    (entropy + kl).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert float(logits.grad[0, 1]) == 0.0
    noise = torch.linspace(0, 0.999, 50)
    assert 1 not in CATEGORICAL.sample({"logits": logits.detach().expand(50, 3)}, noise).tolist()


# -- the perceptron policy -------------------------------------------------------------------------------------------


def batch(obs: torch.Tensor | dict[str, torch.Tensor], action: torch.Tensor) -> Data:
    return Data({"obs": obs, "action": action, "valid": torch.ones(action.shape[:2])})


def test_initialisation_is_orthogonal_with_sb3_gains() -> None:
    policy = MLPPolicy(BOX3, gym.spaces.Box(-1, 1, (2,)), hidden=(16, 16), log_std_init=-0.5)
    gains = {"actor.net.0": 2.0, "actor.net.2": 2.0, "actor.net.4": 1e-4, "critic.trunk.0": 2.0, "critic.trunk.2": 2.0}
    gains |= {"critic.value.0": 1.0}
    for name, squared in gains.items():
        layer = policy.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        w = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
        torch.testing.assert_close(w @ w.T, squared * torch.eye(w.shape[0]), rtol=1e-4, atol=1e-5)
        assert layer.bias.eq(0).all()
    assert policy.actor.log_std.tolist() == [-0.5, -0.5]
    assert {k.split(".")[0] for k, _ in policy.named_parameters()} == {"actor", "critic"}


def test_act_and_evaluate_agree() -> None:
    for space in (gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3)):
        policy = MLPPolicy(BOX3, space, hidden=(8,), heads={"value": (), "median": (4,)})
        obs = torch.randn(4, 5, 3)
        noise = policy.draw_noise(20, torch.Generator().manual_seed(0), torch.device("cpu")).view(
            4, 5, *policy.action_shape
        )
        rows = [policy.act(obs[t], noise[t]) for t in range(4)]
        action = torch.stack([r["action"] for r in rows])
        old = {f"old_{k}": torch.stack([r[k] for r in rows]) for k in policy.distribution.names}
        out = policy.evaluate(batch(obs, action), frozenset({"log_prob", "entropy", "value", "median", "dist"}))
        torch.testing.assert_close(policy.behaviour(old, action)["log_prob"], out["log_prob"])
        assert out["value"].shape == out["median"].shape == out["entropy"].shape == (4, 5)
        torch.testing.assert_close(out["value"][0], policy.values(obs[0]))
        torch.testing.assert_close(out["median"][0], policy.values(obs[0], "median"))
        assert policy.outputs() == {"log_prob", "entropy", "dist", "value", "median"}
        assert set(policy.evaluate(batch(obs, action), frozenset({"value"}))) == {"value"}
        mode = policy.act(obs[0], None)["action"]
        assert mode.tolist() == policy.distribution.mode(policy.params(obs[0])).tolist()


def test_actions_reach_the_environment_within_bounds() -> None:
    space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))
    raw = torch.tensor([[-9.0, 0.5], [0.0, 9.0]])
    assert MLPPolicy(BOX3, space).to_env(raw).tolist() == [[-2.0, 0.5], [0.0, 1.0]]
    squashed = MLPPolicy(BOX3, space, squash=True).to_env(raw)
    torch.testing.assert_close(squashed, torch.tensor([[-2.0, 0.5 + 0.5 * math.tanh(0.5)], [0.0, 1.0]]))
    discrete = torch.tensor([0, 1])
    assert MLPPolicy(BOX3, gym.spaces.Discrete(2)).to_env(discrete) is discrete


def test_observation_spaces() -> None:
    mixed = gym.spaces.Dict(
        {"a": gym.spaces.Box(-1, 1, (2, 2)), "b": gym.spaces.Discrete(3), "c": gym.spaces.Box(0, 1, ())}
    )
    policy = MLPPolicy(mixed, gym.spaces.Discrete(2), groups={"actor": ["b", "a"], "critic": ["b"]})
    obs = {"a": torch.arange(8.0).view(2, 2, 2), "b": torch.tensor([2, 0]), "c": torch.zeros(2)}
    assert policy.features(obs, "actor").tolist() == [[0, 0, 1, 0, 1, 2, 3], [1, 0, 0, 4, 5, 6, 7]]
    assert policy.features(obs, "critic").tolist() == [[0, 0, 1], [1, 0, 0]]
    state = MLPPolicy(gym.spaces.Discrete(4), gym.spaces.Discrete(2)).double()
    assert state.features(torch.tensor([1]), "actor").dtype == torch.float64


def test_the_critic_has_inputs_layers_and_activations_of_its_own_side() -> None:
    spaces = gym.spaces.Dict({"seen": BOX3, "hidden": gym.spaces.Box(-1, 1, (2,))})
    policy = MLPPolicy(
        spaces, gym.spaces.Discrete(2), hidden=(8,), critic_hidden=(6, 5), activation="relu",
        heads={"value": (), "median": (4,)}, groups={"actor": ["seen"], "critic": ["hidden", "seen"]},
    )  # fmt: skip
    obs = {"seen": torch.randn(6, 3), "hidden": torch.randn(6, 2)}
    names = ("trunk.0", "trunk.2", "value.0", "median.0", "median.2")
    below, above, value, first, last = (policy.critic.get_submodule(n) for n in names)
    assert below.weight.shape == (6, 5)
    assert first.weight.shape == (4, 5)
    latent = above(below(torch.cat([obs["hidden"], obs["seen"]], -1)).relu()).relu()
    expected = {"value": value(latent).squeeze(-1), "median": last(first(latent).relu()).squeeze(-1)}
    whole = batch({k: x.unsqueeze(0) for k, x in obs.items()}, torch.zeros(1, 6, dtype=torch.int64))
    for head, numbers in expected.items():
        torch.testing.assert_close(policy.values(obs, head), numbers)
        torch.testing.assert_close(policy.evaluate(whole, frozenset({head}))[head][0], numbers)


def test_unsupported_spaces_fail_at_construction() -> None:
    with pytest.raises(ValueError, match="nested keys"):
        MLPPolicy(gym.spaces.Dict({"a": gym.spaces.Dict({"b": BOX3})}), gym.spaces.Discrete(2))
    with pytest.raises(ValueError, match="observation space"):
        MLPPolicy(gym.spaces.Text(2), gym.spaces.Discrete(2))
    with pytest.raises(ValueError, match="action space"):
        MLPPolicy(BOX3, gym.spaces.Text(2))
    with pytest.raises(ValueError, match="start"):
        MLPPolicy(BOX3, gym.spaces.Discrete(2, start=1))
    with pytest.raises(ValueError, match="finite action bounds"):
        MLPPolicy(BOX3, gym.spaces.Box(-np.inf, np.inf, (1,)), squash=True)
    with pytest.raises(ValueError, match="activation"):
        MLPPolicy(BOX3, gym.spaces.Discrete(2), activation="sine")
    with pytest.raises(ValueError, match="groups"):
        MLPPolicy(BOX3, gym.spaces.Discrete(2), groups={"actor": ["camera"]})


# -- the normaliser --------------------------------------------------------------------------------------------------


def test_running_norm_matches_numpy_and_skips_invalid_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(5.0, 3.0, (40, 2))
    valid = rng.random(40) > 0.3
    poisoned = np.where(valid[:, None], rows, np.nan)  # nobody may read an invalid row
    norm = RunningNorm((2,))
    for chunk, keep in zip(np.split(poisoned, [1, 7, 30]), np.split(valid, [1, 7, 30])):
        norm.update(torch.tensor(chunk), torch.tensor(keep).float())
    kept = rows[valid]
    np.testing.assert_allclose(norm.mean.numpy(), kept.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var.numpy(), kept.var(0), rtol=1e-12)
    assert float(norm.count) == valid.sum()
    x = torch.tensor(kept[:3], dtype=torch.float32)
    expected = (kept[:3] - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-8)
    np.testing.assert_allclose(norm(x).numpy(), expected, rtol=1e-4)


def test_running_norm_starts_as_identity_and_clips() -> None:
    norm = RunningNorm((1,), clip=2.0)
    assert norm(torch.tensor([[1.5], [-9.0]])).tolist() == [[1.5], [-2.0]]
    norm.update(torch.full((3, 1), torch.nan), torch.zeros(3))  # nothing valid: nothing moves
    assert (float(norm.mean), float(norm.var), float(norm.count)) == (0.0, 1.0, 0.0)


def test_policy_normaliser_is_saved_and_moves_by_valid_rows() -> None:
    policy = MLPPolicy(BOX3, gym.spaces.Discrete(2), normalise_obs=True)
    obs = torch.stack([torch.full((2, 3), 4.0), torch.full((2, 3), 8.0)])
    policy.update_normaliser(obs, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    norm = policy.norm["obs"]
    assert isinstance(norm, RunningNorm)
    assert norm.mean.tolist() == pytest.approx([20 / 3] * 3)
    other = MLPPolicy(BOX3, gym.spaces.Discrete(2), normalise_obs=True)
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(other.act(obs[0], None)["logits"], policy.act(obs[0], None)["logits"], rtol=0, atol=0)


def test_hooks_and_parametrised_layers_work_inside_the_perceptron() -> None:
    policy = MLPPolicy(BOX3, BOX3)
    net, x = policy.actor.net, torch.randn(5, 3)
    plain = net(x)
    torch.testing.assert_close(plain, torch.nn.Sequential(*net)(x), rtol=0, atol=0)
    seen: list[int] = []
    handles = [layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(net)]
    net(x)
    assert seen == [0, 1, 2, 3, 4]
    handles[0].remove()
    handles[1].remove()
    net[2].register_full_backward_hook(lambda *_: seen.append(20))
    net(x).sum().backward()
    assert seen[5:] == [2, 3, 4, 20]
    torch.nn.utils.parametrizations.weight_norm(net[0])
    torch.testing.assert_close(net(x), plain)
    net[0].parametrizations.weight.original0.data.mul_(2.0)
    assert not torch.allclose(net(x), plain)


def test_predict_asks_for_what_the_actor_reads_and_for_states_that_there_are():
    box, cpu = gym.spaces.Box(-1, 1, (2,)), torch.device("cpu")
    space = gym.spaces.Dict({"policy": box, "critic": box})
    policy = MLPPolicy(space, gym.spaces.Discrete(2), hidden=(4,))
    assert predict(policy, space, {"policy": np.zeros((3, 2))}, None, None, True, cpu)[0].shape == (3,)
    with pytest.raises(ValueError, match=r"keys \['policy'\], got \['critic'\]"):
        predict(policy, space, {"critic": np.zeros(2)}, None, None, True, cpu)
    for rooms, wrong in ((gym.spaces.Discrete(3), np.int64(3)), (gym.spaces.MultiDiscrete([3, 2]), np.array([1, 2]))):
        policy = MLPPolicy(rooms, gym.spaces.Discrete(2), hidden=(4,))
        with pytest.raises(ValueError, match=r"observation: expected one of (Multi)?Discrete"):
            predict(policy, rooms, wrong, None, None, True, cpu)
