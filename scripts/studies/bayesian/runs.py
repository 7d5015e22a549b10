"""The runs of the study: agents, a mountain car that counts its episodes, one function that plays a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from agents.bac import BAC, BACConfig
from agents.dbqpg import DBQPGConfig
from agents.ppo import PPO, PPOConfig, PPOEstimator
from ccrl.collect import Collector, Request
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.trajectory import LinearBaseline, TrajectoryEstimator
from ccrl.learn import Learner, RolloutLearner
from ccrl.seeding import stream_seed
from ccrl.updaters import FlatUpdater
from envs.classic.mountain_car import MAX_SPEED, MountainCarTwoActions
from scripts import gradient_lab_problems as lab

__all__ = ["CAR", "GRADIENTS", "RATES", "STREAMS", "Car", "EpisodicPPO", "MonteCarlo", "play"]

CAR = MountainCarTwoActions.id
RATES = {
    "bac": (0.025,),  # a public MATLAB implementation (docs/bac.md)
    "mc": (0.0001, 0.0003, 0.001, 0.003),
    "mc-baseline": (0.0001, 0.0003, 0.001, 0.003),
    "ppo": (0.003, 0.01, 0.03, 0.1),
}
"""Method -> step sizes; of several, a search picks one."""
GRADIENTS: dict[str, dict[str, Any]] = {
    "mc": {"state_scale": 0.0}, "dbqpg": {}, "uapg": {"uncertainty": True},
}  # fmt: skip
"""Method -> settings of the DBQPG agent."""
EPISODES, HORIZON, JUDGED = 5, 200, 100
"""Episodes per update, their longest length, episodes of an evaluation from either start (docs/bac.md)."""
STREAMS = 6
"""Parallel environments of the DBQPG agent."""
NEAR_REST = 0.02 / MAX_SPEED
"""The second evaluation begins within this share of the speed limit."""


class Car(MountainCarTwoActions):
    """Begins in [-0.6, -0.4] with a velocity within ``speed`` times the limit, and counts the episodes asked for.

    At rest a policy of coin flips never reaches the goal within 200 steps, and there is nothing to learn from. A public
    MATLAB implementation of BAC (lionkt/RL_platoon, commit 106ab6b) trains from any velocity and evaluates within
    +-0.02; here both are evaluated.

    Args:
        speed: one number, or one per copy ``[N]``.
    """

    uniforms = 2

    def __init__(self, num_envs: int, speed: Any) -> None:
        super().__init__(num_envs, max_episode_steps=HORIZON)
        self.most, self.episodes = self.real(np.asarray(speed) * MAX_SPEED), 0

    def initial_state(self, uniform: Any) -> Any:
        start = super().initial_state(uniform[:1])
        return self.xp.concatenate((start[:1], (2.0 * uniform[1:] - 1.0) * self.most))

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tensor:
        # those that a copy begins by itself while it waits for slower ones are not seen by any method
        self.episodes += self.num_envs if mask is None else 0
        obs = super().reset(seed, mask)
        assert isinstance(obs, Tensor)
        return obs


class MonteCarlo(BAC):
    """The policy, the episodes and the constant step of BAC with the gradient from discounted rewards to go.

    :param baseline: subtract a linear baseline on the grid's features, fitted to the previous update's episodes.
    """

    def __init__(self, *args: Any, baseline: bool, **options: Any) -> None:
        self.baseline = baseline
        super().__init__(*args, **options)

    def build(self) -> Learner:
        learner = super().build()
        assert isinstance(learner, RolloutLearner)
        c, policy = self.config, learner.policy
        features: Any = policy.features
        estimator = TrajectoryEstimator(
            episodes=c.num_envs, horizon=c.n_steps, gamma=c.gamma, discount_from_start=False,
            baseline=LinearBaseline(features, features.width) if self.baseline else None,
        )  # fmt: skip
        return self.rollouts(policy, estimator, learner.updaters, learner.direction)


class EpisodicPPO(PPO):
    """PPO on whole fresh episodes, with the same policy and a critic that is linear in the same features, their squares
    and 1."""

    episodic = True

    def build(self) -> Learner:
        actor: Any = lab.problem("mountain-car").policy(self.env)
        weight = torch.zeros(2 * actor.features.width + 1)
        policy: Any = lab.ActorCritic(actor, actor.features, weight, ("value",))
        c = self.config
        updater = FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        return self.rollouts(policy, _EpisodicEstimator(c, policy, {"policy": updater}), {"policy": updater})


class _EpisodicEstimator(PPOEstimator):
    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [Request(episodes=self.config.num_envs, horizon=self.config.n_steps)]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        data = super().prepare(have, ctx)["on"]
        # without the rows after an episode's end: minibatches of them would be smaller than those of other agents
        kept = (data["valid"].reshape(-1) > 0).nonzero().squeeze(-1)
        names = ("obs", "action", "log_prob", "advantage", "value", "return", "valid")
        return {"on": Data({name: data[name].flatten(0, 1)[kept].unsqueeze(0) for name in names})}


def play(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Train as ``run`` says; the points of its curve."""
    settings = {k: v for k, v in run.items() if k not in ("env", "method", "seed")}
    if run["env"] == CAR:
        return _mountain_car(run["method"].split()[0], run["seed"], **settings)  # in a search the rate follows
    return _dbqpg(run["env"], run["method"], run["seed"], **settings)


def _mountain_car(
    method: str, seed: int, rate: float, updates: int, evaluate_every: int, start_speed: float
) -> list[dict[str, Any]]:
    env, judge_env = Car(EPISODES, start_speed), Car(2 * JUDGED, np.repeat((start_speed, NEAR_REST), JUDGED))
    sizes: dict[str, Any] = {"num_envs": EPISODES, "n_steps": HORIZON, "learning_rate": rate}
    if method == "ppo":
        agent: Any = EpisodicPPO(env, PPOConfig(**sizes, compile="off"), seed=seed)
    elif method == "bac":
        agent = BAC(env, BACConfig(**sizes, policy="grid"), seed=seed)
    else:
        agent = MonteCarlo(env, BACConfig(**sizes, policy="grid"), seed=seed, baseline=method == "mc-baseline")
    # of its own seed: what is evaluated must not depend on how often
    judge = Collector(judge_env, seed=stream_seed(seed, "evaluation"), make_env=lambda n: judge_env)
    start = time.process_time()
    points = []

    def evaluate() -> None:
        seconds = time.process_time() - start
        judge.collect(Request(episodes=2 * JUDGED, horizon=HORIZON), agent.policy)
        returns, lengths = judge.stats.returns, judge.stats.lengths
        reached = lengths.double() + returns  # the step that reaches the goal costs nothing
        points.append({
            "episodes": env.episodes, "steps": agent.num_timesteps, "return": float(returns[:JUDGED].mean()),
            "reached": float(reached[:JUDGED].mean()), "rest_return": float(returns[JUDGED:].mean()),
            "rest_reached": float(reached[JUDGED:].mean()), "cpu_seconds": round(seconds, 2),
        })  # fmt: skip

    def watch(agent: Any) -> bool:
        if agent.iteration % evaluate_every == 0 or agent.iteration == updates:
            evaluate()
        return bool(agent.iteration < updates)

    evaluate()
    agent.learn(updates * EPISODES * HORIZON, watch)
    return points


def _dbqpg(env: str, method: str, seed: int, timesteps: int, batch: int, **settings: Any) -> list[dict[str, Any]]:
    config = DBQPGConfig(
        num_envs=STREAMS, n_steps=batch // STREAMS, **settings, **GRADIENTS[method]
    )  # fmt: skip
    agent = agents.get_agent("dbqpg")(env, config, seed=seed)
    spent = dict.fromkeys(("kernel", "solve", "update", "all"), 0.0)
    for name, owner, attribute in (
        ("kernel", agent.estimator, "fit"),
        ("solve", agent.estimator, "gradient"),
        ("update", agent.learner.direction, "step"),
    ):
        setattr(owner, attribute, _timed(getattr(owner, attribute), spent, name))
    points: list[dict[str, Any]] = []
    clock = [time.process_time(), 0]

    def watch(agent: Any) -> None:
        now, steps = time.process_time(), agent.num_timesteps
        thousands = (steps - clock[1]) / 1000
        spent["all"] = now - clock[0]
        kernel, solve, whole, everything = (spent[k] / thousands for k in ("kernel", "solve", "update", "all"))
        ended = agent.collector.stats.returns
        if len(ended):  # with episodes of 1,000 steps not every iteration ends some
            points.append({
                "steps": steps, "return": float(ended.mean()), "kernel_seconds": kernel, "solve_seconds": solve,
                "gp_seconds": kernel + solve, "step_seconds": whole - solve, "all_seconds": everything,
            })  # fmt: skip
        spent.update(dict.fromkeys(spent, 0.0))
        clock[:] = time.process_time(), steps

    agent.learn(timesteps, watch)
    if not points:
        raise ValueError(f"{env}: no episode ended within {timesteps} steps; expected more timesteps")
    return points


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """``function``, whose processor seconds are added to ``spent[name]``."""

    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **options)
        finally:
            spent[name] += time.process_time() - start

    return timed
