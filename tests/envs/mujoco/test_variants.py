"""Domain randomisation: episodes on models that differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from envs.mujoco import make_mujoco
from envs.mujoco.model import load_model
from envs.mujoco.variants import draw_variants

SCALES = {"body_mass+body_inertia": (0.5, 2.0), "opt.gravity": (0.9, 1.1)}


def test_variants_are_scaled_as_asked_with_their_constants():
    model = load_model("hopper.xml")
    variants = draw_variants(model, SCALES, 20, seed=0)
    mass, inertia, gravity = (variants.values[k] for k in ("body_mass", "body_inertia", "opt.gravity"))
    factor = mass[:, 1] / model.body_mass[1]
    assert np.allclose(mass, factor[:, None] * model.body_mass)
    assert np.allclose(inertia, factor[:, None, None] * model.body_inertia)  # joined: one factor
    assert factor.min() >= 0.5
    assert factor.max() <= 2.0
    assert factor.std() > 0.2
    assert abs(np.corrcoef(factor, gravity[:, 2])[0, 1]) < 0.6  # not joined
    # derived by MuJoCo: what a slide joint of the root moves is the whole mass
    assert np.allclose(variants.values["body_subtreemass"][:, 1], factor * model.body_subtreemass[1])
    assert np.allclose(variants.values["dof_M0"][:, 0], factor * model.body_subtreemass[0])
    assert variants.changed == ("body_inertia", "body_mass", "opt.gravity")
    again = draw_variants(model, SCALES, 20, seed=0)
    assert np.array_equal(again.values["body_mass"], mass)
    assert not np.array_equal(draw_variants(model, SCALES, 20, seed=1).values["body_mass"], mass)


def test_a_copy_moves_as_the_model_of_its_variant():
    """A function of one's own that sets gears; the copies against environments of one variant each."""

    def gears(low, high):
        return lambda model, rng: model.actuator_gear.__setitem__((..., 0), rng.uniform(low, high))

    options = {"models": 2, "models_seed": 3, "dtype": torch.float64}
    env = make_mujoco("Hopper-v5", 8, seed=0, randomise=gears(50.0, 100.0), **options)
    env.reset()
    variant = env.state_dict()["simulator"]["variant"]
    assert variant.unique().tolist() == [0, 1]
    qpos, qvel = env.engine.state.qpos.clone(), env.engine.state.qvel.clone()
    action = torch.full((8, 3), 0.5)
    obs = env.step(action).obs.clone()
    for k in (0, 1):
        gear = env.engine._variants.models[k].actuator_gear[0, 0]
        alone = make_mujoco("Hopper-v5", 8, randomise=gears(gear, gear), **options)
        alone.set_state(qpos, qvel)
        expected = alone.step(action).obs
        assert torch.equal(obs[variant == k], expected[variant == k])
        assert not torch.equal(obs[variant != k], expected[variant != k])


def test_episodes_draw_variants_and_resume_with_them():
    make = lambda: make_mujoco("Ant-v5", 4, randomise=SCALES, models=8, max_episode_steps=3)  # noqa: E731
    env, other = make(), make()
    env.reset(seed=5)
    other.reset(seed=6)
    first = env.state_dict()["simulator"]["variant"]
    action = torch.full((4, 8), 0.5)
    env.step(action)
    other.load_state_dict(env.state_dict())
    for _ in range(5):
        assert torch.equal(env.step(action).obs, other.step(action).obs)
    assert not torch.equal(env.state_dict()["simulator"]["variant"], first)
    drawn = env.engine._variants.models[int(env.engine._variant[0])]
    assert env.engine.data(0).model.body_mass[1] == drawn.body_mass[1]  # a picture is of it


@pytest.mark.parametrize(
    ("randomise", "message"),
    [
        ({"body_weight": (0.5, 2.0)}, "expected real fields of MjModel, got 'body_weight'; near ones: .*body_"),
        ({"body_jntnum": (0.5, 2.0)}, "expected real fields of MjModel, got 'body_jntnum'"),
        ({"body_mass": (2.0, 0.5)}, "expected low <= high"),
        ({"body_mass": (0.0, 1.0)}, "body_mass: expected > 0"),
        ({"body_gravcomp": (0.5, 2.0)}, "body_gravcomp is 0 in this model"),
        ({"opt.timestep": (0.5, 2.0)}, r"may differ between copies, got \['opt.timestep'\]"),
        (lambda model, rng: None, "expected changes of the model, got none in 64 draws"),
    ],
)
def test_what_cannot_be_meant_is_refused(randomise, message):
    with pytest.raises(ValueError, match=message):
        make_mujoco("Hopper-v5", 2, randomise=randomise)


def test_variants_without_randomisation_are_refused():
    with pytest.raises(ValueError, match="models, models_seed: expected none without randomise, got 8 and None"):
        make_mujoco("Hopper-v5", 2, models=8)


def test_the_centre_of_mass_is_that_of_the_variant():
    """A humanoid is paid for the speed of its centre of mass: here of one with a heavy foot, by MuJoCo's own."""

    def heavy(model, rng):
        model.body_mass[model.body("left_foot").id] += rng.uniform(10.0, 30.0)

    free = {"healthy_reward": 0.0, "ctrl_cost_weight": 0.0, "contact_cost_weight": 0.0, "dtype": torch.float64}
    env = make_mujoco("Humanoid-v5", 2, seed=0, randomise=heavy, models=3, frame_skip=1, **free)
    env.reset()
    places = []
    for _ in range(2):
        result = env.step(torch.full((2, 17), 0.4))
        mass = env.engine.state.body_mass
        places.append((env.engine.state.xipos[:, :, 0] * mass).sum(1) / mass.sum(1))
    expected = 1.25 * (places[1] - places[0]) / env.task.dt
    torch.testing.assert_close(result.reward, expected)
    for i in range(2):
        model = env.engine._variants.models[int(env.engine._variant[i])]
        assert torch.equal(env.engine.state.body_mass[i], torch.from_numpy(model.body_mass))
