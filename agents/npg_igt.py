"""N-PG-IGT: normalised policy gradient with momentum and implicit gradient transport.

Fatkhullin, Barakat, Kireeva, He 2023, ICML, arXiv 2302.01734. Ascent on ``J``; one small batch of trajectories per
iteration, no importance weights. With ``c_t = 2 / (t + 2)`` at iteration t = 0, 1, 2 ...

    N-PG-IGT   theta~_t = theta_t + (1 - eta_t) / eta_t (theta_t - theta_{t-1})          the look-ahead point
               d_t = (1 - eta_t) d_{t-1} + eta_t g(tau, theta~_t),  tau sampled with theta~_t
               theta_{t+1} = theta_t + gamma_t d_t / |d_t|        gamma_t = gamma_0 c_t, eta_t = eta_0 c_t^(4/5)
    N-MPG      the same with theta~_t = theta_t                   gamma_t = gamma_0 c_t, eta_t = eta_0 c_t^(2/3)
    PG         theta_{t+1} = theta_t + gamma_t g(tau, theta_t)    gamma_t = gamma_0 c_t^(2/3)

On a quadratic with exact gradients the transport keeps ``d_t = grad J(theta_t)``, which plain momentum does not. The
look-ahead and the average use the SAME eta_t (``lookahead_eta="previous"``: released code).

Slots: plan = fresh episodes at the look-ahead point; gradient = sum of psi_t times scores; direction = the update rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from agents.base import Agent
from agents.on_policy import OnPolicyConfig, check_eager, check_features, check_unused
from ccrl.batched_env import Tree
from ccrl.buffer import space_like
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.trajectory import LinearBaseline, TrajectoryEstimator
from ccrl.learn import Learner
from ccrl.policies import MLPPolicy
from ccrl.settings import Above, Count, Natural, Positive
from ccrl.updaters import FlatUpdater, GradientEstimate

__all__ = ["NPGIGT", "MomentumDirection", "NPGIGTConfig", "TheoryConstants", "TrajectoryConfig", "theory_constants"]

UNUSED = ("gae_lambda", "time_limit", "normalise_obs", "normalise_reward", "clip_norm", "adam_eps")
"""Settings of the base that these methods have no use for."""


@dataclass(frozen=True)
class TrajectoryConfig(OnPolicyConfig):
    """Whole episodes, no critic, no optimiser: the step size is the method. Settings of critics, of Adam and of
    normalisers (which would change the policy between two points) are refused."""

    search: ClassVar[dict[str, Any]] = {"n_steps": None}  # the horizon
    num_envs: Count = 10
    """Every rollout plays this many fresh episodes, one environment each."""
    n_steps: Count = 200
    """Horizon H: the longest episode has this many steps."""
    min_steps: Natural = 0
    """Further rollouts are played at the same point until an estimate has this many environment steps (0: one
    rollout)."""
    hidden: tuple[Count, ...] = (32, 32)
    """These are the widths of the policy's hidden layers. Second derivatives matter: tanh, elu or silu, not relu."""
    learning_rate: Positive = 0.1
    """gamma_0: this is the first step; of normalised methods the length of the first move."""
    momentum: Annotated[float, Above(0, 1)] = 1.0
    """eta_0: the momentum weights are multiplied by this factor (the first one is 1)."""
    discount_from_start: bool = True
    """Step t is weighted with gamma^t (the paper's estimator; released code does not)."""
    baseline: Literal["none", "linear"] = "none"
    """The baseline is none, or linear in the observation and fitted to the previous iteration's returns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unused(self, "this agent has no use for it", *UNUSED)
        check_eager(self)
        if self.activation == "relu":
            raise ValueError("activation: expected a smooth one (tanh, elu, silu), got 'relu'")


class Rule(NamedTuple):
    """Exponents of ``c_t`` in the step size and in the momentum weight (None: no momentum)."""

    step: float
    eta: float | None
    normalised: bool


@dataclass(frozen=True)
class NPGIGTConfig(TrajectoryConfig):
    """One of the update rules that need a single rollout per iteration."""

    variant: Literal["npg_igt", "nmpg", "normalised", "pg"] = "npg_igt"
    """The update rule is npg_igt, nmpg (no transport), normalised (no momentum either) or pg (the plain gradient)."""
    lookahead_eta: Literal["current", "previous"] = "current"
    """npg_igt: the look-ahead has the weight eta_t (current, the paper) or eta_{t-1} (previous, released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant != "npg_igt":
            check_unused(self, f"variant={self.variant} looks ahead at nothing", "lookahead_eta")
        if NPGIGTEstimator.rules[self.variant].eta is None:
            check_unused(self, f"variant={self.variant} has no momentum", "momentum")


class MomentumDirection(TrajectoryEstimator):
    """Gradients of whole episodes and the state of a momentum method: ``d``, the previous ``theta``, schedules.

    :param theta: the first parameters ``[n]``.
    :param step: 0-d, gets the step size of every iteration (the agent logs it).
    """

    rules: ClassVar[dict[str, Rule]]
    d: Tensor
    prev: Tensor

    def __init__(
        self, config: Any, theta: Tensor, step: Tensor | None = None, baseline: LinearBaseline | None = None
    ) -> None:
        c = config
        super().__init__(
            episodes=c.num_envs, horizon=c.n_steps, gamma=c.gamma, min_steps=c.min_steps,
            discount_from_start=c.discount_from_start, baseline=baseline,
        )  # fmt: skip
        self.config, self.rule, self._step = config, self.rules[c.variant], step
        self.register_buffer("d", torch.zeros_like(theta))
        self.register_buffer("prev", theta.clone())

    def eta(self, k: Tensor) -> Tensor:
        """Momentum weight of iteration k (0-d): 1 at k = 0 and without momentum."""
        if self.rule.eta is None:
            return torch.ones_like(k)
        eta: Tensor = self.config.momentum * (2.0 / (k + 2.0)) ** self.rule.eta
        return torch.where(k == 0, 1.0, eta)

    def step_size(self, k: Tensor) -> Tensor:
        """``gamma_k``, 0-d."""
        size: Tensor = self.config.learning_rate * (2.0 / (k + 2.0)) ** self.rule.step
        return size

    def advance(self, theta: Tensor, d: Tensor, ctx: Context) -> Tensor:
        """Remember ``d`` and ``theta``, return the next parameters. A zero direction does not move."""
        self.d.copy_(d)
        self.prev.copy_(theta)
        gamma = self.step_size(ctx.k)
        if self._step is not None:
            self._step.copy_(gamma)
        # the global norm: one norm per tensor or a rescaling optimiser would be another method
        length = torch.linalg.vector_norm(d) if self.rule.normalised else torch.ones((), device=d.device)
        return theta + gamma.to(theta) * d / torch.where(length > 0, length, 1.0)

    def points(self, theta: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Where the rule wants gradients: tag -> parameters ``[n]``."""
        raise NotImplementedError

    def step(
        self, theta: Tensor, gradient: Callable[[str], GradientEstimate], have: dict[str, Data], ctx: Context
    ) -> Tensor:
        """The next parameters ``[n]``."""
        raise NotImplementedError


class NPGIGTEstimator(MomentumDirection):
    """N-PG-IGT, N-MPG, and without momentum: normalised and vanilla PG."""

    rules: ClassVar[dict[str, Rule]] = {
        "npg_igt": Rule(1.0, 4 / 5, True),
        "nmpg": Rule(1.0, 2 / 3, True),
        "normalised": Rule(1.0, None, True),
        "pg": Rule(2 / 3, None, False),
    }

    def points(self, theta: Tensor, ctx: Context) -> dict[str, Tensor]:
        if self.config.variant != "npg_igt":
            return {"on": theta}
        back = 0.0 if self.config.lookahead_eta == "current" else 1.0
        eta = self.eta((ctx.k - back).clamp_min(0.0)).to(theta)
        return {"on": theta + (1.0 - eta) / eta * (theta - self.prev)}

    def step(
        self, theta: Tensor, gradient: Callable[[str], GradientEstimate], have: dict[str, Data], ctx: Context
    ) -> Tensor:
        eta = self.eta(ctx.k).to(theta)
        return self.advance(theta, (1.0 - eta) * self.d + eta * gradient("on").mean, ctx)


class TrajectoryAgent(Agent):
    """An agent whose update rule is a ``MomentumDirection``."""

    episodic = True
    Direction: ClassVar[type[MomentumDirection]]

    def build(self) -> Learner:
        c = self.config
        policy = self.make_policy({})
        updater = FlatUpdater(policy, lr=c.learning_rate)
        baseline = linear_baseline(policy, self.env.single_observation_space) if c.baseline == "linear" else None
        direction = self.Direction(c, updater.flat, updater.lr, baseline)
        return self.rollouts(policy, direction, {"policy": updater}, direction)


class NPGIGT(TrajectoryAgent):
    """Normalised policy gradient with implicit gradient transport."""

    name = "npg_igt"
    paper = "Fatkhullin et al. 2023, arXiv 2302.01734"
    Config = NPGIGTConfig
    Direction = NPGIGTEstimator

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "plan": "fresh episodes at the look-ahead point",
            "prepare": "reward to go",
            "gradient": "sum of psi_t times scores",
            "direction": "momentum, implicit gradient transport, normalised step",
        }


def linear_baseline(policy: MLPPolicy, space: Any) -> LinearBaseline:
    """A baseline on what the actor sees."""
    check_features(policy, "baseline=linear reads what the actor sees")
    device = next(policy.parameters()).device

    def features(obs: Tree) -> Tensor:
        return policy.features(obs, "actor")

    return LinearBaseline(features, features(space_like(space, (1,), device)).shape[1]).to(device)


class TheoryConstants(NamedTuple):
    """Constants of the paper's analysis, as bounds (docs/npg_igt.md lists the formulas and whence they are)."""

    L_g: float
    """Smoothness of the return."""
    sigma_g2: float
    """Variance of the gradient estimate of one trajectory."""
    sigma_h2: float
    """Variance of the Hessian estimate of one trajectory."""
    D_g: float
    """Bias of the truncated gradient, over gamma^H."""
    D_h: float
    """Bias of the truncated Hessian, over gamma^H."""
    M_g: float
    """Norm of a score."""
    truncation: float
    """``gamma^H``."""

    def npg_igt_step(self, mu_F: float) -> float:
        """gamma_0 of theorem 1 (and 3): ``3 M_g / mu_F``."""
        return 3.0 * self.M_g / mu_F

    def harpg_step(self, mu_F: float) -> float:
        """gamma_0 of theorem 2: the smaller of two bounds."""
        sigma_g = math.sqrt(self.sigma_g2)
        smooth = 1.0 / (8.0 * math.sqrt(6.0) * (self.L_g + sigma_g + self.D_h * self.truncation))
        return min(smooth, math.sqrt(2.0) * self.M_g / (math.sqrt(3.0) * sigma_g * mu_F))


def theory_constants(*, M_g: float, M_h: float, r_max: float, gamma: float, H: int) -> TheoryConstants:
    """The constants from bounds.

    :param M_g, M_h: of the norms of ``grad log pi`` and of ``hess log pi``.
    :param r_max: of ``|r|``.
    :param gamma: discount, below 1.
    :param H: horizon, in steps.
    :raises ValueError: a discount outside [0, 1).
    """
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma: expected a number in [0, 1), got {gamma}; the bounds grow with 1 / (1 - gamma)")
    left = 1.0 - gamma
    return TheoryConstants(
        L_g=r_max * (M_g**2 + M_h) / left**2,
        sigma_g2=r_max**2 * M_g**2 / left**3,
        sigma_h2=r_max**2 * (H**2 * M_g**4 + M_h**2) / left**4,
        D_g=M_g * r_max / left * (1.0 / left + H) ** 0.5,
        D_h=r_max * (M_h + M_g**2) / left * (H + 1.0 / left),
        M_g=M_g,
        truncation=gamma**H,
    )
