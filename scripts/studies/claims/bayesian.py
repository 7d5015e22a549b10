"""Claims of the methods that estimate gradients or simulate through: Bayesian quadrature, Hessian corrections, HDPO."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.bpg import BPG, BPGConfig
from agents.hdpo import HDPO, HDPOConfig
from ccrl.estimators.trajectory import LinearBaseline, TrajectoryEstimator
from ccrl.inventory.pathwise import Unrolled, average_cost
from ccrl.learn import Learner, RolloutLearner
from envs.inventory.oracle import oracle_cost
from scripts.studies.bayesian import runs
from scripts.studies.claims.claim import Arm, Claim
from scripts.studies.inventory import cells
from scripts.studies.momentum import study as momentum

__all__ = ["CLAIMS"]


def rates(*values: float, **fixed: Any) -> tuple[dict[str, Any], ...]:
    """A grid of step sizes."""
    return tuple({"learning_rate": value, **fixed} for value in values)


# -- BPG --------------------------------------------------------------------------------------------------------------


class MonteCarlo(BPG):
    """BPG's policy, episodes and constant step with the gradient from discounted rewards to go, less a linear baseline
    fitted to the previous update's episodes."""

    def build(self) -> Learner:
        learner = super().build()
        assert isinstance(learner, RolloutLearner)
        c, policy = self.config, learner.policy
        width = self.env.single_observation_space.shape[0]
        estimator = TrajectoryEstimator(
            episodes=c.num_envs, horizon=c.n_steps, gamma=c.gamma, discount_from_start=False,
            baseline=LinearBaseline(_observations, width),
        )  # fmt: skip
        return self.rollouts(policy, estimator, learner.updaters, learner.direction)


def _observations(obs: Any) -> Any:
    return obs


def mean_return(agent: Any, steps: int) -> float:
    """Mean return of training's episodes, over ``steps`` environment steps."""
    found, clock = 0.0, 0

    def watch(agent: Any) -> None:
        nonlocal found, clock
        now = min(agent.num_timesteps, steps)
        found += (now - clock) * float(agent.collector.stats.returns.mean())
        clock = now

    agent.learn(steps, watch)
    return found / steps


def paths(agent: Any, **fixed: Any) -> Any:
    """On CartPole with at most 200 steps."""

    def play(seed: int, **settings: Any) -> float:
        made = agent("CartPole-v1", BPGConfig(**fixed, **settings), seed=seed, env_kwargs={"max_episode_steps": 200})
        return mean_return(made, 30_000)

    return play


BPG_PATHS = Claim(
    "bpg",
    "Bayesian quadrature of whole paths learns from fewer steps than Monte Carlo with a baseline",
    "CartPole-v1 of at most 200 steps, linear policy, 10 episodes per update, 30,000 steps; step size from four",
    "mean return over training",
    (
        Arm("BPG, model 2", paths(BPG), rates(0.005, 0.02, 0.08, 0.32)),
        Arm("BPG, model 1", paths(BPG, model=1, noise=1.0), rates(0.005, 0.02, 0.08, 0.32)),
        Arm("Monte Carlo, linear baseline", paths(MonteCarlo), rates(0.001, 0.003, 0.01, 0.03)),
    ),
    (("BPG, model 2", "Monte Carlo, linear baseline"), ("BPG, model 1", "Monte Carlo, linear baseline")),
)


# -- BAC --------------------------------------------------------------------------------------------------------------


def car(method: str) -> Any:
    """On the mountain car: 500 episodes, five per update."""

    def play(seed: int, **settings: Any) -> float:
        run = {"env": runs.CAR, "method": method, "seed": seed, "rate": settings["learning_rate"], "updates": 100,
               "evaluate_every": 10, "start_speed": 1.0}  # fmt: skip
        return fmean(float(point["return"]) for point in runs.play(run))

    return play


BAC_CAR = Claim(
    "bac",
    "a Gaussian-process critic learns the mountain car from fewer episodes than Monte Carlo with a baseline",
    "two-action mountain car of at most 200 steps, softmax policy on 4 x 4 bumps, 500 episodes, five per update; step "
    "size from four",
    "mean over training of the return of 100 evaluation episodes",
    (
        Arm("BAC", car("bac"), rates(0.00625, 0.0125, 0.025, 0.05)),
        Arm("Monte Carlo, linear baseline", car("mc-baseline"), rates(0.0001, 0.0003, 0.001, 0.003)),
    ),
    (("BAC", "Monte Carlo, linear baseline"),),
    tuning_seeds=4,
    test_seeds=20,
)


# -- DBQPG ------------------------------------------------------------------------------------------------------------


def quadrature(method: str) -> Any:
    """On the inverted pendulum, with the trust region of the paper."""

    def play(seed: int) -> float:
        run = {"env": "InvertedPendulum-v5", "method": method, "seed": seed, "timesteps": 20_000, "batch": 1_000,
               "update": "trpo", "targets": "returns"}  # fmt: skip
        return fmean(float(point["return"]) for point in runs.play(run))

    return play


DBQPG_PENDULUM = Claim(
    "dbqpg",
    "with the same trust region, the Bayesian gradient, and the one shaped by its uncertainty, learn from fewer steps "
    "than the Monte-Carlo gradient",
    "InvertedPendulum-v5, 20,000 steps, 1,000 per update, one agent with and without state kernel (Monte Carlo: "
    "without); nothing tuned, the trust region is the paper's for all",
    "mean training return over updates",
    tuple(Arm(name, quadrature(method), ({},))
          for name, method in (("DBQPG", "dbqpg"), ("UAPG", "uapg"), ("Monte Carlo", "mc"))),
    (("DBQPG", "Monte Carlo"), ("UAPG", "Monte Carlo")),
)  # fmt: skip


# -- Hessian corrections ----------------------------------------------------------------------------------------------


def tabular_gap(method: str) -> Any:
    """Minus the gap to the optimal return after 2,000 trajectories, ten per estimate."""

    def play(seed: int, **settings: Any) -> float:
        agent = momentum.tabular(method, seed, num_envs=10, **settings)
        agent.learn(2000 * agent.config.n_steps)
        return -momentum.gap(agent)

    return play


HARPG_GAP = Claim(
    "harpg",
    "with as many trajectories, Hessian corrections (with and without normalised steps) come nearer to the optimal "
    "return than the policy gradient",
    "random MDP of five states, softmax table, 2,000 trajectories of 15 steps, ten per estimate; step size from four",
    "minus the gap to the optimal return, exactly computed",
    tuple(Arm(method, tabular_gap(method), rates(0.3, 1.0, 3.0, 10.0)) for method in ("nharpg", "harpg", "pg")),
    (("nharpg", "pg"), ("harpg", "pg")),
)


# -- HDPO -------------------------------------------------------------------------------------------------------------


STORES = ({"lead_time": 1, "underage": 39.0}, {"lead_time": 4, "underage": 9.0})
"""Of one store with lost sales: where one of five seeds had missed, and the one in the middle of the published grid."""


def over_optimum(trained: bool) -> Any:
    """Minus the cost over the optimum, in per cent, as a mean over ``STORES``: of HDPO after 800 updates, or of the
    best capped base stock."""

    def play(seed: int) -> float:
        return fmean(-_gap(options, seed, trained) for options in STORES)

    return play


def _gap(options: dict[str, float], seed: int, trained: bool) -> float:
    config = HDPOConfig(policy="vanilla", n_train=8192, n_dev=1024, batch_size=512, learning_rate=1e-2, dev_every=5,
                        anneal_lr=True, patience=10**9, whole_units=True)  # fmt: skip
    agent = HDPO("ccrl/InventoryOneStoreLost-v0", config, seed=seed, env_kwargs=dict(options))
    env = cells.simulator(agent.simulator).split("test")
    control, expected = cells.control_policy(env)
    optimum = oracle_cost(env.task)
    assert optimum is not None
    if not trained:
        return 100 * (expected / optimum - 1)
    agent.learn(50 * agent.samples_per_iteration)
    scenarios = agent.scenarios("test", 500, 10**6 + cells.TEST_SEED)
    costs = average_cost(Unrolled(env, agent.ctx.bank.policy("best")), scenarios, whole_units=True)
    mean, _ = cells.adjusted(costs, average_cost(Unrolled(env, control), scenarios), expected)
    return 100 * (mean / optimum - 1)


HDPO_STORES = Claim(
    "hdpo",
    "one setting of HDPO, whatever the seed, is nearer to the optimum than the best capped base stock",
    "one store with lost sales, lead times 1 and 4, underage costs 39 and 9, 800 updates of 512 scenarios, step size "
    "1e-2; 500 test scenarios of 5,000 periods with a control variate; the rival's cost is exact",
    "minus the cost over the optimum in per cent, mean of both instances",
    (Arm("HDPO", over_optimum(True), ({},)), Arm("best capped base stock", over_optimum(False), ({},))),
    (("HDPO", "best capped base stock"),),
)

CLAIMS = (BPG_PATHS, BAC_CAR, DBQPG_PENDULUM, HARPG_GAP, HDPO_STORES)
