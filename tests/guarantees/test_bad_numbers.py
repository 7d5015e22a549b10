"""NaN and inf, from the environment or a loss, and files that are no checkpoints: training stops and says where."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agents import BPO, MDPO, PPO
from ccrl.batched_env import StepResult
from ccrl.estimators import aggregates, ratios
from ccrl.estimators.terms import Term
from ccrl.experiment import checkpoint
from ccrl.experiment.callbacks import CheckpointCallback
from ccrl.testing import ClockEnv, Episode

STEPS = 8
AGENTS = (PPO, MDPO, BPO)


class Faulty(ClockEnv):
    """From its step ``when`` on, one field of the result of copy 1 is ``value``."""

    def __init__(self, field: str = "reward", value: float = 1.0, when: int = 10**9, **options: Any) -> None:
        super().__init__([[Episode(0, 3)], [Episode(10, 5, "truncate")]], **options)
        self.field, self.value, self.when, self.count = field, value, when, 0

    def step(self, action: Tensor) -> StepResult:
        result = super().step(action)
        self.count += 1
        if self.count > self.when:
            # a copy of the field: the clock itself stays right
            broken = getattr(result, self.field).clone()
            broken[1] = self.value
            result = result._replace(**{self.field: broken})
        return result


def small(cls: type[Any], env: Any) -> Any:
    sizes: dict[str, Any] = {"num_envs": 2, "n_steps": STEPS, "hidden": (4,), "compile": "off", "normalise_obs": True}
    return cls(env, cls.Config(**sizes))


def vector(agent: Any) -> Tensor:
    return torch.cat([x.detach().flatten().double() for x in agent.policy.state_dict().values()])


@pytest.mark.parametrize("cls", AGENTS)
@pytest.mark.parametrize(
    ("field", "value", "when", "message"),
    [
        ("reward", float("nan"), 2 * STEPS + 5, "reward is not finite: environment 1, step 5 of the rollout"),
        ("reward", float("-inf"), 2 * STEPS, "reward is not finite: environment 1, step 0 of the rollout"),
        ("obs", float("nan"), 2 * STEPS + 2, "obs is not finite: environment 1, step 2 of the rollout"),
        ("obs", float("inf"), 2 * STEPS + 7, "obs is not finite: environment 1, step 7 of the rollout"),
        # copy 1's fourth episode ends at its step 20, the fourth of the third rollout
        ("final_obs", float("nan"), 2 * STEPS, "final obs is not finite: environment 1, step 3 of the rollout"),
    ],
)
@pytest.mark.parametrize("continuous", [False, True])
def test_environment(
    cls: type[Any], field: str, value: float, when: int, message: str, continuous: bool, tmp_path: Path
) -> None:
    space = spaces.Box(-1, 1, (1,)) if continuous else None
    agent = small(cls, Faulty(field, value, when, action_space=space))
    with pytest.raises(FloatingPointError) as caught:
        agent.learn(until=10 * agent.samples_per_iteration, callback=CheckpointCallback(tmp_path, every=1))
    good = checkpoint.checkpoint_path(tmp_path, 2 * 2 * STEPS)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"last good checkpoint: {good}")
    assert checkpoint.latest(tmp_path) == good, "the broken state was saved"
    loaded = cls.load(good, env=Faulty(action_space=space))
    assert bool(vector(agent).isfinite().all())
    assert torch.equal(vector(agent), vector(loaded)), "parameters or statistics moved with the bad data"
    loaded.learn(until=3 * agent.samples_per_iteration)
    assert bool(vector(loaded).isfinite().all())


def test_the_first_reset_counts_too() -> None:
    class Bad(ClockEnv):
        def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Any:
            obs = super().reset(seed, mask).clone()  # type: ignore[union-attr]
            obs[0] = torch.nan
            return obs

    agent = small(PPO, Bad([[Episode(0, 3)]] * 2))
    with pytest.raises(FloatingPointError, match=r"obs is not finite: environment 0, at its first reset .* none was"):
        agent.learn(until=1)


@pytest.mark.parametrize("cls", AGENTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss(cls: type[Any], value: float, tmp_path: Path) -> None:
    """A further term whose coefficient turns bad after two iterations."""
    agent = small(cls, Faulty())
    coef = torch.zeros(())
    bad = Term("bad", lambda ratio, a, outputs, batch: outputs["log_prob"], aggregates.mean, ratios.token, coef=coef)
    first, *rest = agent.estimator.phases()
    agent.estimator._phases = (dataclasses.replace(first, terms=(*first.terms, bad)), *rest)

    class Spoil(CheckpointCallback):
        def on_iteration(self, agent: Any) -> bool | None:
            if agent.iteration == 2:
                coef.fill_(value)
            return super().on_iteration(agent)

    with pytest.raises(FloatingPointError) as caught:
        agent.learn(until=10 * agent.samples_per_iteration, callback=Spoil(tmp_path, every=1))
    good = checkpoint.checkpoint_path(tmp_path, 2 * 2 * STEPS)
    message = str(caught.value)
    assert message.startswith("the policy loss or its gradient is not finite")
    assert f"iteration 2, {3 * 2 * STEPS} environment steps" in message
    assert message.endswith(f"last good checkpoint: {good}")
    assert checkpoint.latest(tmp_path) == good, "the broken state was saved"
    loaded = cls.load(good, env=Faulty())
    before, after = (a.updaters["policy"].state_dict() for a in (loaded, agent))
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert bool(vector(agent).isfinite().all())
    loaded.learn(until=3 * agent.samples_per_iteration)


def test_a_direction_that_is_not_finite_moves_nothing_and_is_reported() -> None:
    """Methods with an update rule of their own have no loss that could be caught."""

    class Wild:
        def step(self, theta: Tensor, *_: Any) -> Tensor:
            return torch.full_like(theta, torch.nan)

    agent = small(PPO, Faulty())
    agent.learner.direction = Wild()
    before = agent.updaters["policy"].flat.clone()
    agent.learner._update({"on": before}, {})
    assert torch.equal(agent.updaters["policy"].flat, before)
    with pytest.raises(FloatingPointError, match="the policy loss or its gradient is not finite"):
        agent.learner._check_finite({})


class Foreign:
    """Not a plain value."""


@pytest.mark.parametrize("cls", AGENTS)
def test_foreign_objects_in_a_checkpoint(cls: type[Any], tmp_path: Path) -> None:
    agent = small(cls, Faulty())
    agent.save(tmp_path / "good.pt")
    state = torch.load(tmp_path / "good.pt", weights_only=True)
    state["state"]["extra"] = Foreign()
    torch.save(state, tmp_path / "foreign.pt")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"expected tensors and plain values; received .*Foreign.*Save"
    ):
        cls.load(tmp_path / "foreign.pt", env=Faulty())
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(state))
    with pytest.raises(checkpoint.CheckpointError, match="expected a checkpoint written by save"):
        cls.load(tmp_path / "pickle.pt", env=Faulty())
