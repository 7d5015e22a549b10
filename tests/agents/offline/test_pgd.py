"""Policy-guided diffusion: guidance by hand and on exact denoisers, trajectories, rows made anew, resume, rivals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.offline.pgd import PGD, PGDConfig
from agents.offline.pgd.guidance import PolicyGuide, strengths
from agents.offline.pgd.rivals import TransitionCodec, WorldModel
from agents.offline.pgd.trajectories import Codec
from ccrl.data import Batching
from ccrl.diffusion import Churn, karras_levels, sample
from ccrl.offline import DataError, Dataset

F64 = torch.float64
SMALL = {
    "hidden": (8,), "batch_size": 16, "updates": 5, "compile": "off", "window": 4, "stride": 2, "generated": 3,
    "trajectories": 6, "sampling_steps": 4, "regenerate_every": 10, "real_rows": 4, "denoiser_steps": 12,
    "denoiser_batch": 2, "denoiser_features": 8, "denoiser_levels": 1, "model_length": 2,
}  # fmt: skip


def codec(mean: list[float], std: list[float], observations: int = 1, actions: int = 1) -> Codec:
    return Codec(torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64), observations, actions)


def fixed(mean: float, std: float = 1.0) -> Any:
    """A policy with the same action everywhere."""
    return lambda obs: (torch.full((len(obs), 1), mean, dtype=F64), torch.full((len(obs), 1), std, dtype=F64))


# -- guidance ---------------------------------------------------------------------------------------------------------


def test_strengths_of_the_schedule() -> None:
    """lam (1 - i / N + .3 sin(pi (i + 1) / N)), and 0 at the last step; N = 8, then 256."""
    expected = [1.114805, 1.087132, 1.027164, 0.925, 0.777164, 0.587132, 0.364805, 0.0]
    assert strengths(1.0, 8) == pytest.approx(expected, abs=1e-6)
    fine = strengths(1.0, 256)
    found = [fine[i] for i in (0, 64, 128, 254, 255)]
    assert found == pytest.approx([1.003681, 0.964719, 0.799977, 0.011494, 0.0], abs=1e-6)
    # their sum is about lam N (1 / 2 + 2 c / pi)
    assert sum(fine) == pytest.approx(256 * (0.5 + 0.6 / math.pi), rel=0.01)


def test_guidance_by_hand() -> None:
    """Channel mean .1, deviation .5, x = .4, policy N(.3, 1): a = tanh(.3) = .29131261 and
    g = -(a - .3) (1 - a^2) .5 = .00397507, the slope of -(a - .3)^2 / 2 in x."""
    guide = PolicyGuide(codec([0, 0.1, 0, 0], [1, 0.5, 1, 1]), fixed(0.3), [1.0])
    x = torch.tensor([[[7.0, 0.4, 5.0, 3.0]]], dtype=F64)
    assert float(guide.codec.action(x)) == pytest.approx(0.29131261, abs=1e-8)
    assert float(guide.gradient(x)) == pytest.approx(0.00397507, abs=1e-8)
    step = 1e-6
    value = [-0.5 * (math.tanh(0.5 * (0.4 + d) + 0.1) - 0.3) ** 2 for d in (-step, step)]
    assert float(guide.gradient(x)) == pytest.approx((value[1] - value[0]) / (2 * step), rel=1e-5)
    wide = PolicyGuide(guide.codec, fixed(0.3, 2.0), [1.0])
    assert float(wide.gradient(x)) == pytest.approx(float(guide.gradient(x)) / 4)


def test_only_actions_are_guided_and_a_zero_gradient_is_no_nan() -> None:
    guide = PolicyGuide(codec([0] * 4, [1] * 4), fixed(0.0), [2.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, generator=generator, dtype=F64)
    x[1, :, 1] = 0.0  # a = 0 = the policy's mean
    moved = guide(x, 0, 1.0, lambda x, s: x)
    assert torch.equal(moved[..., [0, 2, 3]], x[..., [0, 2, 3]])
    assert torch.equal(moved[1], x[1])
    # normalised over the whole trajectory: the move has the norm of the strength
    torch.testing.assert_close((moved - x)[0].norm(), torch.tensor(2.0, dtype=F64), rtol=1e-6, atol=0)
    assert guide(x, 1, 1.0, lambda x, s: x) is x
    denoised = PolicyGuide(guide.codec, fixed(0.5), [1.0], denoised=True, normalise=False)
    torch.testing.assert_close(
        denoised(x, 0, 1.0, lambda x, s: 0.5 * x) - x,
        PolicyGuide(guide.codec, fixed(0.5), [1.0], normalise=False)(0.5 * x, 0, 1.0, lambda x, s: x) - 0.5 * x,
    )


class _Plain(PolicyGuide):
    """Actions without tanh: towards N(1, 1)."""

    def gradient(self, x: Tensor) -> Tensor:
        return 1.0 - x[..., self.codec.action_slice]


@pytest.mark.parametrize(
    ("rows", "actions", "strength", "n", "mean", "std"),
    [(16, 4, 0.1, 256, 0.218, 0.818), (16, 4, 0.3, 256, 0.625, 0.432), (16, 4, 1.0, 256, 1.000, 0.001),
     (16, 4, 1.0, 32, 0.381, 0.670), (32, 12, 0.1, 256, 0.087, 0.929), (32, 12, 0.3, 256, 0.262, 0.772),
     (32, 12, 1.0, 256, 0.827, 0.212)],
)  # fmt: skip
def test_guided_samples_of_a_normal_distribution(
    rows: int, actions: int, strength: float, n: int, mean: float, std: float
) -> None:
    """Data N(0, 1), 64 or 384 action entries per trajectory, guided to N(1, 1): means and deviations grow towards the
    mode and shrink with strength over the root of the entries, and the other channels stay N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    start = 80.0 * torch.randn(25_600 // (rows * actions), rows, actions + 3, generator=generator)
    width = start.shape[-1]
    guide = _Plain(Codec(torch.zeros(width), torch.ones(width), 1, actions), fixed(1.0), strengths(strength, n))
    options: dict[str, Any] = {"churn": Churn(), "generator": generator}
    x = sample(lambda x, s: x / (1 + s * s), start, karras_levels(n), guide=guide, **options)
    action = x[..., guide.codec.action_slice]
    assert float(action.mean()) == pytest.approx(mean, abs=0.03)
    assert float(action.std()) == pytest.approx(std, abs=0.03)
    assert float(x[..., 0].mean()) == pytest.approx(0.0, abs=0.07)


def test_no_strength_is_the_plain_sampler_bit_for_bit() -> None:
    found = []
    for lam in (None, strengths(0.0, 16)):
        generator = torch.Generator().manual_seed(3)
        start = 80.0 * torch.randn(4, 3, 4, generator=generator, dtype=F64)
        guide = None if lam is None else PolicyGuide(codec([0] * 4, [1] * 4), fixed(1.0), lam)
        found.append(sample(lambda x, s: x / (1 + s * s), start, karras_levels(16), churn=Churn(), guide=guide,
                            generator=generator))  # fmt: skip
    assert torch.equal(*found)


# -- trajectories -----------------------------------------------------------------------------------------------------


def rows(count: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "obs": torch.randn(count, 2, generator=generator) * 3 + 1, "reward": torch.randn(count, generator=generator),
        "action": torch.rand(count, 1, generator=generator) * 1.99 - 0.995,
        "terminated": torch.arange(count) % 10 == 9, "next_obs": torch.randn(count, 2, generator=generator),
    }  # fmt: skip


def test_round_trip_of_trajectories() -> None:
    data = rows()
    found = Codec.of(data)
    x = found.encode(data)
    torch.testing.assert_close(x.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    made = found.decode(x.view(4, 10, 5))
    assert len(made["reward"]) == 4 * 9
    keep = torch.arange(40) % 10 != 9
    for name in ("obs", "action", "reward"):
        torch.testing.assert_close(made[name], data[name][keep], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made["next_obs"], data["obs"][torch.arange(40) % 10 != 0], atol=1e-5, rtol=1e-5)
    assert not made["terminated"].any(), "the last row, the terminal, has no successor here"
    full = data | {"action": torch.ones(40, 1)}
    assert float(found.action(found.encode(full)).max()) == pytest.approx(0.999, abs=1e-6)
    line = torch.linspace(-0.999, 0.999, 40).unsqueeze(1)
    torch.testing.assert_close(found.action(found.encode(data | {"action": line})), line, atol=1e-6, rtol=0)


def test_rows_after_a_terminal_and_broken_trajectories_are_dropped() -> None:
    found = codec([0] * 4, [1] * 4)
    x = torch.zeros(3, 5, 4, dtype=F64)
    x[0, 1, 3] = 1.0  # done in the second row: two transitions are left
    x[2, 3, 0] = torch.nan
    made = found.decode(x)
    assert len(made["reward"]) == 2 + 4
    assert made["terminated"].tolist() == [False, True] + [False] * 4


def test_a_constant_done_channel_decodes_to_not_done() -> None:
    data = rows() | {"terminated": torch.zeros(40, dtype=torch.bool)}
    found = Codec.of(data)
    x = found.encode(data)
    assert bool(x.isfinite().all())
    assert not found.decode(x.view(4, 10, 5))["terminated"].any()
    x[:, -1] = 7.0
    assert not found.decode(x.view(4, 10, 5))["terminated"].any(), "an imprecise denoiser ended episodes"


def test_round_trip_of_transitions() -> None:
    data = rows()
    found = TransitionCodec.of(data)
    made = found.decode(found.encode(data))
    for name in ("obs", "action", "reward", "next_obs"):
        torch.testing.assert_close(made[name], data[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(made["terminated"], data["terminated"])
    broken = found.encode(data)
    broken[3] = torch.inf
    assert len(found.decode(broken)["reward"]) == 39


# -- the world model --------------------------------------------------------------------------------------------------


def test_the_ensemble_learns_linear_dynamics_and_is_rolled_out_by_the_policy() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    obs, action = torch.randn(2000, 2, generator=generator), torch.rand(2000, 1, generator=generator) * 2 - 1
    data = {"obs": obs, "action": action, "next_obs": obs * 0.9 + 0.5 * action, "reward": obs[:, 0]}
    model = WorldModel(2, 1, width=32, layers=2, n=3, elites=2)
    errors = model.fit(data, 400, generator, rate=3e-3)
    assert float(errors.min()) < 0.02
    assert len(set(model.elites.tolist())) == 2
    assert float(errors[model.elites[0]]) == float(errors.min())

    def actor(o: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(o), 1), 0.5), torch.zeros(len(o), 1)

    made = model.rollout(obs[:50], actor, 3, generator)
    assert len(made["reward"]) == 150
    assert made["action"].eq(0.5).all()
    torch.testing.assert_close(made["obs"][50:100], made["next_obs"][:50])
    assert float((made["next_obs"] - (0.9 * made["obs"] + 0.25)).abs().mean()) < 0.15
    ended = model.rollout(obs[:50], actor, 3, generator, terminal=lambda o: o[:, 0] > -9)
    assert len(ended["reward"]) == 50
    assert ended["terminated"].all()
    less = model.rollout(obs[:50], actor, 1, torch.Generator().manual_seed(1), penalty=10.0)["reward"]
    assert bool((less < model.rollout(obs[:50], actor, 1, torch.Generator().manual_seed(1))["reward"]).all())


# -- the agent --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"rows": "guided"}, {"rows": "guided", "base": "iql"}, {"rows": "unguided"}, {"rows": "transitions"},
     {"rows": "model"}, {"rows": "real"}],
    ids=lambda o: "-".join(o.values()),
)  # fmt: skip
def test_every_kind_of_rows_trains_and_resumes(
    options: dict[str, Any], line_env: Any, line_data: Dataset, tmp_path: Path
) -> None:
    def make() -> PGD:
        return PGD(line_env, data=line_data, **SMALL | options)

    agent = make()
    agent.learn(until=20, callback=lambda a: a.save(tmp_path / "a.pt") if a.num_timesteps == 10 else None)
    loaded = PGD.load(tmp_path / "a.pt", env=line_env, data=line_data)
    loaded.learn(until=20)
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value), name
    if options["rows"] != "real":
        assert agent.maker.ready
        draw = agent.learner.source.sample(Batching(size=16), torch.Generator().manual_seed(0))
        assert float(draw["action"].abs().max()) <= 1.0
    assert line_env.single_action_space.contains(agent.predict(line_data.obs[0])[0])


def test_rows_are_made_anew_by_the_current_policy(
    line_env: Any, line_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first set without guidance, then every ten updates, not at step 0."""
    calls: list[tuple[int, bool]] = []
    agent = PGD(line_env, data=line_data, **SMALL)
    plain = agent.regenerate

    def watch(guided: bool) -> None:
        calls.append((agent.num_timesteps, guided))
        plain(guided)

    monkeypatch.setattr(agent, "regenerate", watch)
    agent.learn(until=30)
    assert calls == [(0, False), (10, True), (20, True)]


def test_guided_rows_are_likelier_under_the_policy(line_env: Any, line_data: Dataset) -> None:
    options = SMALL | {"denoiser_steps": 60, "denoiser_batch": 32, "sampling_steps": 16, "generated": 7, "window": 8}
    found = []
    for strength in (0.0, 1.0, 4.0):
        agent = PGD(line_env, data=line_data, strength=strength, **options)
        agent.before_learning()
        made = agent.generate(60, guided=True)
        with torch.no_grad():
            mean, _ = agent.actor(made["obs"])
        found.append(float(-(made["action"] - mean).square().mean()))
    assert found[0] < found[1] < found[2]


def test_wrong_settings_are_refused(line_env: Any, line_data: Dataset, tmp_path: Path) -> None:
    for options, message in (
        ({"rows": "unguided", "strength": 1.0}, "it is for guided rows"),
        ({"updates": 7}, "a multiple of updates = 7"),
        ({"real_rows": 16}, "less than batch_size"),
        ({"sampling_steps": 1}, "sampling_steps"),
        ({"expectile": 1.0, "base": "iql"}, "expectile"),
        ({"expectile": 0.9}, "expectile: base=td3_bc has none"),
        ({"alpha": 1.0, "base": "iql"}, "alpha: base=iql has none"),
        ({"rows": "unguided", "bump": 0.0}, "bump: rows=unguided are not guided"),
        ({"model_penalty": 1.0}, "model_penalty: rows=guided come from no model"),
    ):
        with pytest.raises(ValueError, match=message):
            PGDConfig(**SMALL | options)  # type: ignore[arg-type]
    # episodes have 10 rows, and windows that end in a time-out are none
    with pytest.raises(DataError, match=r"windows of 11 rows .* found none in episodes of 10 rows"):
        PGD(line_env, data=line_data, **SMALL | {"window": 11})
    agent = PGD(line_env, data=line_data, **SMALL)
    agent.learn(5)
    agent.save(tmp_path / "a.pt")
    with pytest.raises(DataError, match="found none"):
        PGD.load(tmp_path / "a.pt", env=line_env).learn(5)
