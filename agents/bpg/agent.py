"""BPG: Bayesian policy gradient (Ghavamzadeh, Engel 2006; Ghavamzadeh, Engel, Valko 2016, JMLR 17(66)).

The gradient is an integral over paths ``xi`` with scores ``u(xi) = sum_t grad log pi(a_t|o_t)`` and returns ``R(xi)``,

    grad eta = int R(xi) u(xi) Pr(xi) dxi,

and a Gaussian process on its unknown factor makes the posterior of the integral closed form. With the Fisher matrix
``G`` of path scores, ``U = [u_1 .. u_M]``, ``C = (K + sigma^2 I)^-1`` (amplitude 1, no constant):

    model 1   k = (1 + u^T G^-1 u')^2   mean = sum_i R_i u_i (C b)_i   cov = (1 + n - b^T C b) I
    model 2   k = u^T G^-1 u'           mean = U C R                   cov = G - U C U^T,    b_i = 1 + u_i^T G^-1 u_i

    theta <- theta + beta_j mean        or the natural step        theta <- theta + beta_j G^-1 mean

Every update plays M fresh episodes. Nothing asks for states: with partial observations the policy reads ``o_t`` and
nothing else changes.

Slots: plan = M episodes; prepare = episode returns; gradient = posterior mean and covariance; direction = ascent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from agents.base import Agent
from agents.bpg.quadrature import model1, model2
from agents.on_policy import OnPolicyConfig, check_eager, check_unused
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context, Estimator
from ccrl.estimators.directions import Ascent
from ccrl.estimators.stages import EpisodeReturn
from ccrl.gp.fisher import BatchFisher, Fisher, RunningFisher
from ccrl.learn import Learner
from ccrl.packages import require
from ccrl.settings import Count, Nonnegative, Positive, Unit
from ccrl.updaters import FlatUpdater, GradientEstimate

__all__ = ["BPG", "BPGConfig", "BPGEstimator", "EpisodicConfig", "make_fisher"]

MODELS = {1: model1, 2: model2}


@dataclass(frozen=True)
class EpisodicConfig(OnPolicyConfig):
    """What the Bayesian methods share: explicit steps on gradients of small policies, from whole episodes.

    The base's settings of critics and of Adam (``gae_lambda``, ``normalise_reward``, ``adam_eps``) have no meaning here
    and are refused; nothing is compiled.
    """

    search: ClassVar[dict[str, Any]] = {"n_steps": None}  # the horizon
    num_envs: Count = 10
    """M: every update plays this many fresh episodes, one environment each."""
    n_steps: Count = 200
    """The longest episode has this many steps; what goes on after it is not seen."""
    hidden: tuple[Count, ...] = ()
    """These are the widths of the policy's hidden layers (none: linear). Fisher matrices are n x n: keep it small."""
    learning_rate: Positive = 0.02
    """beta: steps are this long times the gradient, which no optimiser rescales."""
    lr_decay: Positive | None = None
    """c: step j is beta c / (c + j); None keeps it constant."""
    natural: bool = False
    """The gradient is multiplied with the inverse Fisher matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unused(self, "this agent has no use for it", "gae_lambda", "normalise_reward", "adam_eps")
        check_eager(self)
        if not self.normalise_obs:
            check_unused(self, "it clips normalised observations, normalise_obs is off", "clip_norm")
        if not self.hidden:
            check_unused(self, "there are no hidden layers", "activation")


@dataclass(frozen=True)
class BPGConfig(EpisodicConfig):
    """Model 2 on returns less their mean, with a Fisher matrix that remembers past iterations."""

    model: Literal[1, 2] = 2
    """Model 1 is a process on R u, model 2 on R."""
    fisher: Literal["running", "mean", "sum"] = "running"
    """The Fisher matrix of path scores runs over all iterations (running), or is the mean or the sum of this batch
    alone."""
    fisher_rate: Unit = 0.02
    """fisher=running: a new path has at least this weight; 0 forgets nothing, also not the scores of old policies."""
    damping: Nonnegative = 1e-6
    """fisher=mean or sum: this is added to the diagonal; running: the identity it started from keeps at least this
    share."""
    noise: Positive = 10.0
    """sigma^2: a return has this noise variance, in the unit of the amplitude."""
    amplitude: Positive = 1.0
    """The kernel is multiplied by this prior variance. The mean depends on noise / amplitude alone."""
    constant: Nonnegative = 0.0
    """The mean return has this prior variance (kernel + constant): model 2 lacks it in its plain form."""
    baseline: bool = True
    """The batch's mean return is subtracted, so that equal returns are no gradient."""
    sparsity: Positive | None = None
    """A path enters above this threshold of the approximate linear dependence test; None keeps every path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher != "running":
            check_unused(self, f"fisher={self.fisher} remembers no past path", "fisher_rate")
        check_unused(self, "returns of whole paths bootstrap nothing", "time_limit")


class BPGEstimator(Estimator):
    """Posterior of the policy gradient from the scores and returns of M paths.

    :param fisher: estimate of the path scores' Fisher matrix; an ``AnalyticFisher`` where the matrix is known.
    """

    def __init__(self, config: BPGConfig, fisher: Fisher) -> None:
        super().__init__()
        self.config, self.fisher = config, fisher
        self._returns = EpisodeReturn(config.gamma)

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [Request(episodes=self.config.num_envs, horizon=self.config.n_steps)]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        return have | {"on": self._returns(have["on"])}

    def gradient(self, theta: Tensor, data: Data, ctx: Context) -> GradientEstimate:
        c = self.config
        scores = ctx.scores(theta.double(), data, "trajectory").dense()
        returns = data["episode_reward"].double()
        if c.baseline and returns.shape[0] > 1:  # of a single path nothing would be left
            returns = returns - returns.mean()
        fisher = self.fisher.estimate(scores)
        posterior = MODELS[c.model](
            scores, returns, fisher, c.noise, amplitude=c.amplitude, constant=c.constant, sparsity=c.sparsity
        )
        if c.natural:
            posterior = posterior.natural(fisher.inverse)
        stats = {
            "gradient_norm": posterior.mean.norm(),
            "gradient_std": posterior.covariance.trace().clamp_min(0).sqrt(),
        }
        return GradientEstimate(posterior.mean, stats, posterior.covariance)


class BPG(Agent):
    """Bayesian policy gradient."""

    name = "bpg"
    paper = "Ghavamzadeh, Engel, Valko 2016, JMLR 17(66)"
    Config = BPGConfig
    episodic = True

    def build(self) -> Learner:
        require("gpytorch", "gp")  # here, not at the first gradient
        c: BPGConfig = self.config
        policy = self.make_policy({})
        updater = FlatUpdater(policy, lr=c.learning_rate)
        estimator = BPGEstimator(c, make_fisher(c, updater.flat.shape[0]))
        return self.rollouts(policy, estimator, {"policy": updater}, Ascent(updater.lr, c.lr_decay))

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "plan": "M fresh episodes",
            "prepare": "episode returns",
            "gradient": "Bayesian quadrature: posterior mean and covariance",
            "direction": "ascent, or natural",
        }


def make_fisher(config: Any, size: int) -> Fisher:
    """The estimate that ``config.fisher`` names, for ``size`` parameters."""
    if config.fisher == "running":
        return RunningFisher(size, config.fisher_rate, config.damping)
    return BatchFisher(config.fisher, config.damping)
