"""Claims of the methods for control."""

from __future__ import annotations

from typing import Any

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from agents.bpo import BPO, BPOConfig
from agents.mdpo import MDPO, MDPOConfig
from agents.ppo import PPO, PPOConfig
from ccrl.experiment.evaluation import evaluate_agent
from scripts.reproductions import r2vpo
from scripts.studies.claims.claim import Arm, Claim
from scripts.studies.momentum import study as momentum

__all__ = ["CLAIMS"]


def returns(agent: Any, config: Any, env: str, steps: int, **fixed: Any) -> Any:
    """Mean return of 20 episodes with the most probable actions, at the end of training; eager."""

    def play(seed: int, **settings: Any) -> float:
        trained = agent(env, config(compile="off", **fixed, **settings), seed=seed)
        trained.learn(steps)
        return float(evaluate_agent(trained, envs.make(env, 20), 20, seed).returns.mean())

    return play


def rates(*values: float, **fixed: Any) -> tuple[dict[str, Any], ...]:
    """A grid of step sizes."""
    return tuple({"learning_rate": value, **fixed} for value in values)


RATES = rates(3e-4, 1e-3, 3e-3)
NORMALISED = {"normalise_obs": True, "normalise_reward": True}
PLAIN = {"normalise_obs": False, "normalise_reward": False}
MDPO_NORMALISED = Claim(
    "mdpo",
    "mirror descent learns CartPole better than PPO's clip, where both or neither normalise observations and rewards",
    "CartPole-v1, 51,200 steps, 16 x 128, two layers of 64; step size of each of the four from three. Plain MDPO keeps "
    "its value clipping at .2, which on raw rewards holds the critic back ([control](control.md) has it without)",
    "mean return of 20 episodes at the end",
    (
        Arm("MDPO, normalised", returns(MDPO, MDPOConfig, "CartPole-v1", 51_200, **NORMALISED), RATES),
        Arm("PPO, normalised", returns(PPO, PPOConfig, "CartPole-v1", 51_200, batch_size=256, **NORMALISED), RATES),
        Arm("MDPO, plain", returns(MDPO, MDPOConfig, "CartPole-v1", 51_200, **PLAIN), RATES),
        Arm("PPO, plain", returns(PPO, PPOConfig, "CartPole-v1", 51_200, batch_size=256, **PLAIN), RATES),
    ),
    (("MDPO, normalised", "PPO, normalised"), ("MDPO, plain", "PPO, plain")),
)
SHARED = {"num_envs": 4, "n_steps": 512, "batch_size": 256, "hidden": (64, 64), "activation": "tanh"}
BPO_CARTPOLE = Claim(
    "bpo",
    "the bounded ratio's optimum as target learns CartPole better than PPO's clip",
    "CartPole-v1, 51,200 steps, 4 x 512, minibatches of 256, ten epochs, two layers of 64; step size from three",
    "mean return of 20 episodes at the end",
    (
        Arm("BPO", returns(BPO, BPOConfig, "CartPole-v1", 51_200, median_hidden=(64, 64), **SHARED), RATES),
        Arm("PPO", returns(PPO, PPOConfig, "CartPole-v1", 51_200, **SHARED), RATES),
    ),
    (("BPO", "PPO"),),
    test_seeds=20,
)


def held(estimator: type[r2vpo.Clipped]) -> Any:
    """Return after 20,480 steps of CartPole with 40 epochs per rollout."""

    def play(seed: int, **settings: Any) -> float:
        return r2vpo.control(estimator, 40, seed, **settings)[1]

    return play


R2VPO_CARTPOLE = Claim(
    "r2vpo",
    "holding the ratio's variance at a budget is better than the clip, each at its own best bound",
    "CartPole-v1, PPO with 40 epochs per rollout of 8 x 128; clip range of the one, variance budget of the other from "
    "four",
    "return of the last episodes after 20,480 steps",
    (
        Arm("R2VPO", held(r2vpo.Held), tuple({"budget": b} for b in (0.01, 0.02, 0.04, 0.08))),
        Arm("PPO", held(r2vpo.Clipped), tuple({"clip_range": c} for c in (0.1, 0.2, 0.3, 0.4))),
    ),
    (("R2VPO", "PPO"),),
)


STEPS = 40_000


def momentum_area(method: str) -> Any:
    """Mean return over the first ``STEPS`` environment steps on CartPole with at most 200 steps, updates of about
    1,000; those of Hessian corrections have as many again for the second rollout, which count."""

    def play(seed: int, **settings: Any) -> float:
        cell = {"method": method, "seed": seed, "iterations": 40, "min_steps": 1000, "discount_from_start": False,
                "gamma_0": settings["learning_rate"]}  # fmt: skip
        return mean_over_steps(momentum.play_cartpole(cell), STEPS)

    return play


def mean_over_steps(curve: list[dict[str, Any]], steps: int) -> float:
    """Mean of ``return`` over the first ``steps`` of a curve, an evaluation standing for the steps since the one
    before.

    Raises:
        ValueError: the curve ends before.
    """
    if curve[-1]["steps"] < steps:
        raise ValueError(f"expected a curve of at least {steps} steps, got {curve[-1]['steps']}; train longer")
    total, before = 0.0, 0
    for row in curve:
        now = min(row["steps"], steps)
        total += (now - before) * row["return"]
        before = now
    return total / steps


NPG_IGT_AREA = Claim(
    "npg_igt",
    "momentum with implicit gradient transport, and with Hessian corrections, learns CartPole from fewer steps than "
    "the policy gradient",
    "CartPole-v1 of at most 200 steps, 40,000 steps, an update of about 1,000 and, of nharpg, as many again for its "
    "second rollout; linear baseline; step size from four",
    "mean return over these steps",
    (
        Arm("npg_igt", momentum_area("npg_igt"), rates(0.1, 0.3, 1.0, 3.0)),
        Arm("nharpg", momentum_area("nharpg"), rates(0.1, 0.3, 1.0, 3.0)),
        Arm("pg", momentum_area("pg"), rates(1e-3, 3e-3, 1e-2, 3e-2)),
    ),
    (("npg_igt", "pg"), ("nharpg", "pg")),
)

CLAIMS = (MDPO_NORMALISED, BPO_CARTPOLE, R2VPO_CARTPOLE, NPG_IGT_AREA)
