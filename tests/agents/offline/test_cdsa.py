"""CDSA: the correction against closed forms, its limits and ablations, and what it repairs beside a hazard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.offline.bc import BC
from agents.offline.cdsa import CDSA, CDSAConfig, CorrectedPolicy, choose_strength
from agents.offline.iql import IQL
from ccrl.data import Batching
from ccrl.diffusion import gaussian_score
from ccrl.offline import Dataset, from_arrays, tail_mean, value_at_risk
from ccrl.policies.recurrent import RecurrentPolicy
from envs.maze import HazardCorridor, cautious_action, overconfident_action

SMALL = {"hidden": (16,), "model_hidden": (16,), "batch_size": 32, "updates": 5, "compile": "off"}
WIDE = gymnasium.spaces.Box(-100, 100, (1,))
F64 = torch.float64


class GaussianScore(nn.Module):
    """The exact score of N(0, C), in place of the learned one."""

    def __init__(self, cov: Tensor) -> None:
        super().__init__()
        self.cov = cov

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        return gaussian_score(z, torch.zeros(len(self.cov), dtype=z.dtype), self.cov.to(z.dtype), sigma)


def exact(cov: list[list[float]], width: int = 1, base: Any = None, **settings: Any) -> CorrectedPolicy:
    """A corrected policy with the exact score of N(0, cov) and unit statistics, in float64."""
    obs = gymnasium.spaces.Box(-100, 100, (width,))
    options = {"hidden": (4,), "model_hidden": (4,)} | settings
    policy = CorrectedPolicy(obs, WIDE, base or (lambda o: -0.5 * o), CDSAConfig(**options)).double()
    policy.score = GaussianScore(torch.tensor(cov, dtype=F64))  # type: ignore[assignment]
    return policy


def test_action_part_climbs_the_density_of_actions() -> None:
    """C = [[1, .8], [.8, 1]], sigma .5, s = 1, a = -.5: raw steps of .1 times the score; the fixed point is where the
    action's score is 0, .8 / 1.25 = .64, and the distance to it shrinks by .86449864 at every step."""
    obs, action = torch.tensor([[1.0]], dtype=F64), torch.tensor([[-0.5]], dtype=F64)
    found = []
    policy = exact([[1, 0.8], [0.8, 1]], action_strength=0.1, state_strength=0.0, score_scale="raw")
    for _ in range(3):
        action, report = policy.correct(obs, action)
        found.append(float(action))
    assert found == pytest.approx([-0.34552846, -0.21198801, -0.09654248], abs=1e-8)
    assert (found[2] - 0.64) / (found[1] - 0.64) == pytest.approx(0.86449864, abs=1e-7)
    assert float(report["moved"]) == pytest.approx(found[2] - found[1])
    repeated = exact([[1, 0.8], [0.8, 1]], action_strength=0.1, state_strength=0.0, score_scale="raw", iterations=3)
    assert float(repeated.correct(obs, torch.tensor([[-0.5]], dtype=F64))[0]) == pytest.approx(found[2])


@pytest.mark.parametrize("nominal", ["forward", "zero"])
def test_state_part_through_linear_inverse_dynamics(nominal: Any) -> None:
    """s' = A s + B a, A = [[1, .1], [0, 1]], B = (.005, .1): pinv(B) = (.49875312, 9.97506234). The inverse of the
    displacement (A - I) s + B a at s = (.3, .1), a = .7 is .7; a displacement of (.2, -.4) is -3.89027431 in actions,
    whatever the nominal one is."""
    a_minus, b = torch.tensor([[0.0, 0.1], [0.0, 0.0]], dtype=F64), torch.tensor([[0.005], [0.1]], dtype=F64)
    pinv = torch.linalg.pinv(b)
    torch.testing.assert_close(pinv, torch.tensor([[0.49875312, 9.97506234]], dtype=F64))
    policy = exact(torch.eye(3).tolist(), width=2, nominal=nominal)
    policy.displace = lambda s, a: s @ a_minus.T + a @ b.T
    policy.invert = lambda s, d: (d - s @ a_minus.T) @ pinv.T  # type: ignore[method-assign]
    obs, action = torch.tensor([[0.3, 0.1]], dtype=F64), torch.tensor([[0.7]], dtype=F64)
    assert float(policy.invert(obs, policy.displace(obs, action))) == pytest.approx(0.7)
    wished = torch.tensor([[0.2, -0.4]], dtype=F64)
    assert float(policy._auxiliary(obs, action, wished)) == pytest.approx(-3.89027431, abs=1e-7)


def test_a_drift_is_stopped_where_the_score_balances_it() -> None:
    """y <- y + .1 (.3 + .02 score), data N(0, .01), sigma .1: .19539647 after ten steps, .3 in the end."""
    y, trace = torch.zeros(1, 1, dtype=F64), []
    for _ in range(400):
        score = gaussian_score(y, torch.zeros(1, dtype=F64), torch.tensor([[0.01]], dtype=F64), 0.1)
        y = y + 0.1 * (0.3 + 0.02 * score)
        trace.append(float(y))
    assert trace[9] == pytest.approx(0.19539647, abs=1e-8)
    assert trace[-1] == pytest.approx(0.3, abs=1e-8)


def test_without_strength_the_base_policy_acts_to_the_last_bit(line_env: Any, line_data: Dataset) -> None:
    base = BC(line_env, data=line_data, hidden=(8,), updates=5, compile="off").learn(5)
    agent = CDSA(line_env, data=line_data, policy=base.policy, action_strength=0.0, state_strength=0.0, **SMALL)
    agent.learn(5)
    found = agent.predict(line_data.obs, deterministic=True)[0]
    np.testing.assert_array_equal(found, base.predict(line_data.obs, deterministic=True)[0])
    noisy = IQL(line_env, data=line_data, hidden=(8,), updates=5, compile="off").policy
    sampling = CDSA(line_env, data=line_data, policy=noisy, action_strength=0.0, state_strength=0.0, **SMALL).policy
    obs, noise = torch.as_tensor(line_data.obs), noisy.draw_noise(len(line_data), None, torch.device("cpu"))
    assert torch.equal(sampling.act(obs, noise)["action"], noisy.to_env(noisy.act(obs, noise)["action"]))
    moved = CDSA(line_env, data=line_data, policy=base.policy, action_strength=0.5, **SMALL)
    assert not np.array_equal(moved.predict(line_data.obs, deterministic=True)[0], found)


def test_units_do_not_matter() -> None:
    """States in other units, the base policy with them: the same corrected action (the tweedie scale)."""
    generator = torch.Generator().manual_seed(0)
    obs, action = (torch.randn(200, 1, generator=generator, dtype=F64) for _ in range(2))
    found = []
    for scale in (1.0, 1000.0):
        policy = exact([[1, 0.8], [0.8, 1]], action_strength=0.7, state_strength=0.0, base=lambda o: o)
        policy.standardise(scale * obs, action, scale * obs, action)
        found.append(policy.correct(scale * obs, action)[0])
    torch.testing.assert_close(*found)


def test_scores_that_are_not_finite_change_nothing() -> None:
    policy = exact([[1, 0.8], [0.8, 1]], action_strength=1.0, state_strength=0.0)

    class Broken(nn.Module):
        def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
            return torch.where(z[:, :1] > 0, torch.nan, 1.0).expand_as(z)

    policy.score = Broken()  # type: ignore[assignment]
    obs = torch.tensor([[1.0], [-1.0]], dtype=F64)
    action, report = policy.correct(obs, torch.zeros(2, 1, dtype=F64))
    assert action.flatten().tolist() == [0.0, 0.25]
    assert float(report["away"][0]) == 0.0


def test_actions_stay_in_the_box_and_ignored_coordinates_have_no_displacement() -> None:
    policy = exact([[1, 0.8], [0.8, 1]], action_strength=1e6, state_strength=0.0)
    action, report = policy.correct(torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64))
    assert float(action) == 100.0
    assert float(report["clipped"]) == 1.0
    ignoring = exact(torch.eye(3).tolist(), width=2, ignored=(0,))
    state, moved, _ = ignoring.towards_data(torch.ones(1, 2, dtype=F64), torch.ones(1, 1, dtype=F64))
    # -sigma^2 / (1 + sigma^2) = -.2 of what is kept
    torch.testing.assert_close(state, torch.tensor([[0.0, -0.2]], dtype=F64))
    torch.testing.assert_close(moved, torch.tensor([[-0.2]], dtype=F64))
    with pytest.raises(ValueError, match="ignored: expected numbers below 2"):
        exact(torch.eye(3).tolist(), width=2, ignored=(2,))


def test_the_density_of_the_policy_has_its_actions(line_env: Any, line_data: Dataset) -> None:
    agent = CDSA(line_env, data=line_data, policy=_Half(), density_of="policy", **SMALL)
    draw = agent.source.sample(Batching(size=64), torch.Generator().manual_seed(0))
    assert draw["density_action"].eq(0.5).all()
    assert not draw["action"].eq(0.5).any()
    data = CDSA(line_env, data=line_data, policy=_Half(), **SMALL)
    draw = data.source.sample(Batching(size=64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw["density_action"], draw["action"])


class _Half(nn.Module):
    def act(self, obs: Tensor, noise: Tensor | None, *rest: Any) -> dict[str, Tensor]:
        return {"action": torch.full((len(obs), 1), 0.5)}

    def to_env(self, action: Tensor) -> Tensor:
        return action


def test_a_checkpoint_of_any_agent_is_corrected_and_resumes(line_data: Dataset, tmp_path: Path) -> None:
    data = from_arrays(line_data.columns() | {"obs": np.c_[line_data.obs, line_data.obs[:, :1]],
                                              "next_obs": np.c_[line_data.next_obs, line_data.obs[:, :1]]})  # fmt: skip
    base = BC("Pendulum-v1", data=data, hidden=(8,), updates=5, compile="off").learn(5)
    base.save(tmp_path / "base.pt")
    options = SMALL | {"base": str(tmp_path / "base.pt"), "action_strength": 0.2}
    agent = CDSA("Pendulum-v1", data=data, **options)
    before = {k: v.clone() for k, v in base.policy.state_dict().items()}
    agent.learn(until=10, callback=lambda a: a.save(tmp_path / "a.pt") if a.num_timesteps == 5 else None)
    for name, value in base.policy.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(agent.policy.base.state_dict()[name], value), "the base policy was trained"
    loaded = CDSA.load(tmp_path / "a.pt", data=data).learn(until=10)
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value), name
    with pytest.raises(ValueError, match="expected a trained policy, got none"):
        CDSA("Pendulum-v1", data=data)
    with pytest.raises(ValueError, match="leave one of them out"):
        CDSA("Pendulum-v1", data=data, policy=base.policy, base="x.pt")
    with pytest.raises(ValueError, match=r"a level at which the score is trained, 0\.05 to 1 "):
        CDSA("Pendulum-v1", data=data, policy=base.policy, sigma=2.0)
    with pytest.raises(ValueError, match=r"expected actions of shape \(1,\) as the environment has"):
        CDSA("Pendulum-v1", data=data, policy=lambda obs: obs)
    with pytest.raises(ValueError, match="it fails on them"):
        CDSA("Pendulum-v1", data=data, policy=nn.Sequential(nn.Linear(5, 1)))


def test_a_base_with_a_memory_is_refused(line_env: Any, line_data: Dataset) -> None:
    """Nobody would keep it: every action would be that of an episode's first step."""
    spaces = line_env.single_observation_space, line_env.single_action_space
    base = RecurrentPolicy(*spaces, recurrent="gru", hidden=(4,))
    with pytest.raises(ValueError, match="expected one without a memory"):
        CDSA(line_env, data=line_data, policy=base, **SMALL)


def test_settings_that_would_do_nothing_are_refused() -> None:
    for wrong in ({"normalise_obs": False}, {"aux_form": "absolute", "nominal": "zero"}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            CDSAConfig(**wrong)  # type: ignore[arg-type]


def test_risk_by_hand() -> None:
    """Sorted: -5 -1 1 2 3 3 4 5 6 9. The .2-quantile at 1.8 is between -1 and 1, lower: -1; worst two: (-5 - 1) / 2."""
    returns = np.array([3.0, -1, 4, 1, -5, 9, 2, 6, 5, 3])
    assert value_at_risk(returns, 0.2) == -1.0
    assert tail_mean(returns, 0.2) == -3.0
    # .07 * 100 is 7.000000000000001 and .29 * 100 is 28.999999999999996
    assert tail_mean(np.arange(100.0), 0.07) == 3.0
    assert value_at_risk(np.arange(101.0), 0.29) == 29.0
    with pytest.raises(ValueError, match="q in"):
        tail_mean(returns, 0.0)
    for measure in (tail_mean, value_at_risk):
        for wrong in ([], [1.0, np.nan]):
            with pytest.raises(ValueError, match="finite returns"):
                measure(np.array(wrong), 0.5)


def corridor_data(episodes: int = 60) -> Dataset:
    env, generator = HazardCorridor(episodes), torch.Generator().manual_seed(0)
    obs, rows = env.reset(seed=0), []
    for _ in range(100):
        action = cautious_action(obs) + 0.3 * torch.randn(episodes, 2, generator=generator)
        action = action.clamp(-1, 1)
        result = env.step(action)
        rows.append((obs, action, result.reward, result.final_obs, result.truncated))
        obs = result.obs
    names = ("obs", "action", "reward", "next_obs", "truncated")
    columns = {k: torch.stack(v, 1).flatten(0, 1).numpy() for k, v in zip(names, zip(*rows))}
    return from_arrays(columns | {"terminated": np.zeros(len(columns["reward"]), bool)}, "corridor")


class _Overconfident(nn.Module):
    def act(self, obs: Tensor, noise: Tensor | None, *rest: Any) -> dict[str, Tensor]:
        return {"action": overconfident_action(obs)}

    def to_env(self, action: Tensor) -> Tensor:
        return action


def returns(act: Any, episodes: int = 200) -> np.ndarray[Any, Any]:
    env = HazardCorridor(episodes)
    obs, total = env.reset(seed=5), torch.zeros(episodes)
    for _ in range(100):
        result = env.step(act(obs))
        obs, total = result.obs, total + result.reward
    return total.numpy()


def test_the_state_part_keeps_a_policy_out_of_the_hazard() -> None:
    """A small version of the study: fewer episodes, smaller networks, fewer steps."""
    base = _Overconfident()
    agent = CDSA(
        HazardCorridor(1), data=corridor_data(), policy=base, ignored=(0,), hidden=(64, 64), model_hidden=(64, 64),
        batch_size=256, updates=100, learning_rate=2e-3, compile="off",
    )  # fmt: skip
    agent.learn(800)
    lost = returns(lambda o: base.act(o, None)["action"])
    assert value_at_risk(lost, 0.05) < -19

    def with_strength(k_a: float, k_s: float) -> CorrectedPolicy:
        config = CDSAConfig(**{**vars(agent.config), "action_strength": k_a, "state_strength": k_s})
        agent.policy.config = config
        return agent.policy  # type: ignore[no-any-return]

    found = {}
    for k_s in (0.05, 0.1, 2.0):
        policy = with_strength(0.0, k_s)
        with torch.no_grad():
            found[k_s] = returns(lambda o, p=policy: p.act(o, None)["action"])
    for k_s in (0.05, 0.1):
        assert found[k_s].mean() > 8.0
        assert value_at_risk(found[k_s], 0.05) > 8.0
    assert found[2.0].mean() < found[0.1].mean(), "a stronger pull goes back to the behaviour"
    obs = torch.tensor(corridor_data(2).obs)
    chosen = choose_strength(with_strength, obs, [(0.0, 0.0), (0.0, 0.05), (1.0, 0.0)], budget=0.05)
    assert chosen in {(0.0, 0.0), (0.0, 0.05)}
    with pytest.raises(ValueError, match="budget"):
        choose_strength(with_strength, obs, [(1.0, 0.0)], budget=0.0)


def test_the_compiled_step_is_traced_whole(line_env: Any, line_data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Dynamo alone, without the minute of a C++ compiler: long trainings compile by themselves."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, backend="eager", fullgraph=True))
    monkeypatch.setattr("ccrl.learn.base.can_compile", lambda: (True, "traced: a test"))
    base = BC(line_env, data=line_data, hidden=(8,), updates=5, compile="off").policy
    found = []
    for mode in ("off", "on"):
        agent: Any = CDSA(line_env, data=line_data, policy=base, **SMALL | {"compile": mode}).learn(5)
        assert agent.learner.cycle.compiled == (mode == "on")
        found.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
