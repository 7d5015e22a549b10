"""Encoders per observation key, groups of actor and critic, keys that modules do not take as names."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ccrl.policies import CNN, MLP, MLPPolicy
from ccrl.policies.encoders import ACTIVATIONS
from ccrl.policies.observations import module_name, observation_groups

TWO = gym.spaces.Discrete(2)
VECTOR = gym.spaces.Box(-1, 1, (3,))


def image(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(0, 255, shape, np.uint8)


def test_images_pass_through_convolutions_by_default() -> None:
    for shape in ((3, 84, 84), (84, 84, 3), (1, 16, 16), (8, 8, 3), (5, 9, 2)):
        policy = MLPPolicy(image(*shape), TWO, hidden=(8,))
        encoder = policy.actor.encoders["obs"]
        assert isinstance(encoder, CNN)
        assert encoder.channels_last == (shape[2] < shape[0])
        x = torch.randint(256, (2, *shape), dtype=torch.uint8)
        features = policy.features(x, "actor")
        assert features.shape == (2, encoder.width)
        assert policy.act(x, None)["action"].shape == (2,)
        assert policy.values(x).shape == (2,)
    # Mnih et al.'s layers on 84 x 84: 64 channels of 7 x 7
    assert CNN(image(4, 84, 84)).width == 3136
    # 16 -> 8 -> 4 pixels a side, 32 channels
    assert CNN(image(1, 16, 16)).width == 512


def test_pixels_are_scaled_to_one() -> None:
    cnn = CNN(image(1, 8, 8), channels=(1,))
    with torch.no_grad():
        cnn.net[0].weight.zero_()
        cnn.net[0].weight[0, 0, 1, 1] = 1.0  # the middle of the kernel: every second pixel
    x = torch.full((1, 1, 8, 8), 51, dtype=torch.uint8)
    torch.testing.assert_close(cnn(x), torch.full((1, 16), 0.2))
    floats = CNN(gym.spaces.Box(0, 1, (1, 8, 8)), channels=(1,))
    floats.load_state_dict(cnn.state_dict())
    torch.testing.assert_close(floats(torch.full((1, 1, 8, 8), 0.2)), torch.full((1, 16), 0.2))
    ram = MLPPolicy(image(4), TWO, hidden=(2,))
    torch.testing.assert_close(ram.features(torch.tensor([[0, 51, 102, 255]], dtype=torch.uint8), "actor"),
                               torch.tensor([[0.0, 0.2, 0.4, 1.0]]))  # fmt: skip


def test_channel_axes_that_cannot_be_seen_are_asked_for() -> None:
    for shape in ((16, 16, 16), (16, 3, 16), (3, 16, 3)):
        with pytest.raises(ValueError, match="which axis"):
            MLPPolicy(image(*shape), TWO)
    policy = MLPPolicy(image(16, 16, 16), TWO, encoders={"obs": functools.partial(CNN, channels_last=True)})
    assert policy.actor.encoders["obs"].channels_last
    with pytest.raises(ValueError, match="three axes"):
        CNN(VECTOR)


class Doubled(nn.Module):
    """A user's encoder with one parameter."""

    width = 3

    def __init__(self, space: gym.Space | None = None) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_every_key_has_its_own_encoder() -> None:
    space = gym.spaces.Dict({"image": image(1, 16, 16), "speed": VECTOR, "gear": gym.spaces.Discrete(4)})
    for encoder in (Doubled, Doubled()):
        policy = MLPPolicy(space, TWO, hidden=(8,), encoders={"speed": encoder}, normalise_obs=True)
        assert set(policy.norm) == {"speed"}, "vectors are normalised before their encoder, pixels never"
        actor, critic = policy.actor.encoders, policy.critic.encoders
        assert set(actor) == set(critic) == {"image", "speed"}
        assert actor["speed"].factor is not critic["speed"].factor, "actor and critic share a parameter"
        obs = {"image": torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "speed": torch.full((2, 3), 0.5),
               "gear": torch.tensor([1, 3])}  # fmt: skip
        features = policy.features(obs, "actor")
        # in the order of the space's keys, which Dict sorts
        assert features.shape == (2, 4 + 512 + 3)
        assert features[:, :4].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
        assert features[:, -3:].tolist() == [[1.0] * 3] * 2
        names = {name.split(".")[0] for name, _ in policy.named_parameters()}
        assert names == {"actor", "critic"}, "an updater of one side must find its encoders"


def test_an_mlp_in_front_of_one_key() -> None:
    encoder = MLP(VECTOR, (5, 2), "relu")
    assert encoder.width == 2
    first, second = encoder.net[0], encoder.net[2]
    x = torch.randn(4, 3)
    torch.testing.assert_close(encoder(x), second(first(x).relu()).relu())
    with pytest.raises(ValueError, match="at least one layer"):
        MLP(VECTOR, ())


def test_wrong_encoders_are_refused() -> None:
    with pytest.raises(TypeError, match="width"):
        MLPPolicy(VECTOR, TWO, encoders={"obs": nn.Linear(3, 3)})
    with pytest.raises(TypeError, match="width"):
        MLPPolicy(VECTOR, TWO, encoders={"obs": lambda space: "cnn"})
    with pytest.raises(ValueError, match=r"encoders: expected keys that are observed, \['obs'\], got \['image'\]"):
        MLPPolicy(VECTOR, TWO, encoders={"image": Doubled})


def test_discrete_observations_of_several_factors() -> None:
    policy = MLPPolicy(gym.spaces.MultiDiscrete([2, 3]), TWO, hidden=(2,))
    assert policy.features(torch.tensor([[1, 0], [0, 2]]), "actor").tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    policy = MLPPolicy(gym.spaces.MultiBinary(3), TWO, hidden=(2,))
    assert policy.features(torch.tensor([[1, 0, 1]]), "critic").tolist() == [[1, 0, 1]]
    with pytest.raises(ValueError, match="starting at 0"):
        MLPPolicy(gym.spaces.MultiDiscrete([2, 3], start=[1, 0]), TWO)


def test_an_encoder_admits_spaces_that_have_none() -> None:
    class Letters(nn.Module):
        width = 1

        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    space = gym.spaces.Dict({"text": gym.spaces.Text(4), "speed": VECTOR})
    policy = MLPPolicy(space, TWO, hidden=(2,), encoders={"text": Letters()})
    obs = {"text": torch.ones(2, 1, dtype=torch.int64), "speed": torch.zeros(2, 3)}
    assert policy.features(obs, "actor").shape == (2, 4)


# -- groups ----------------------------------------------------------------------------------------------------------


def test_an_actor_does_not_see_privileged_groups() -> None:
    # a humanoid of Isaac Lab: 99 numbers for the actor, 111 for the critic
    space = gym.spaces.Dict({"policy": gym.spaces.Box(-1, 1, (99,)), "critic": gym.spaces.Box(-1, 1, (111,))})
    policy = MLPPolicy(space, TWO, hidden=(4,))
    assert policy.actor.net[0].in_features == 99
    assert policy.critic.trunk[0].in_features == 111
    both = MLPPolicy(space, TWO, hidden=(4,), groups={"actor": None, "critic": ("policy", "critic")})
    assert (both.actor.net[0].in_features, both.critic.trunk[0].in_features) == (99, 210)


@pytest.mark.parametrize(
    ("keys", "actor", "critic"),
    [
        (["a", "b"], ["a", "b"], ["a", "b"]),
        (["policy", "camera"], ["policy", "camera"], ["policy", "camera"]),
        (["policy", "critic", "camera"], ["policy", "camera"], ["critic", "camera"]),
        (["actor", "critic"], ["actor"], ["critic"]),
        (["obs", "critic"], ["obs"], ["obs", "critic"]),
        (["critic"], ["critic"], ["critic"]),
    ],
)
def test_default_groups(keys: list[str], actor: list[str], critic: list[str]) -> None:
    assert observation_groups(keys) == {"actor": actor, "critic": critic}


@pytest.mark.parametrize("chosen", [{"actor": ["x"]}, {"actor": []}, {"critic": ["a", "a"]}, {"teacher": ["a"]}])
def test_wrong_groups_are_refused(chosen: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="groups: expected keys of"):
        observation_groups(["a", "b"], chosen)


@pytest.mark.parametrize("key", ["robot.pos", "keys", "type", "values", "", "a%b", "key:values"])
def test_any_key_can_be_normalised_and_encoded(key: str) -> None:
    space = gym.spaces.Dict({key: VECTOR, "other": VECTOR})
    policy = MLPPolicy(space, TWO, hidden=(2,), normalise_obs=True, encoders={key: Doubled})
    obs = {key: torch.ones(2, 3, 3), "other": torch.zeros(2, 3, 3)}
    policy.update_normaliser(obs, torch.ones(2, 3))
    means = {name: float(norm.mean[0]) for name, norm in policy.norm.items()}
    assert means == {module_name(key): 1.0, "other": 0.0}
    other = MLPPolicy(space, TWO, hidden=(2,), normalise_obs=True, encoders={key: Doubled})
    other.load_state_dict(policy.state_dict())
    row = {k: x[0] for k, x in obs.items()}
    torch.testing.assert_close(other.values(row), policy.values(row))


def test_escaped_names_do_not_collide() -> None:
    keys = ["a.b", "a%2Eb", "values", "key:values", "%2E", "."]
    assert len({module_name(k) for k in keys}) == len(keys)


def test_the_fast_tanh_is_tanh_where_it_is_compiled_to_1e_7(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([-200.0, -20.0, -1.3, -1e-4, 0.0, 1e-4, 0.7, 20.0, 200.0], requires_grad=True)
    assert torch.equal(ACTIVATIONS["fast_tanh"]()(x), x.tanh())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, expected = ACTIVATIONS["fast_tanh"]()(x), x.tanh()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=5e-7)
