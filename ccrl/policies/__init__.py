"""Action distributions, encoders and policy networks."""

from ccrl.policies.actions import ActionSpec, RandomActor
from ccrl.policies.actor_q import ActorQ, DeterministicActorQ
from ccrl.policies.build import build_actor_critic
from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, SQUASHED, Distribution, FactoredCategorical
from ccrl.policies.encoders import CNN, MLP
from ccrl.policies.gibbs import GibbsPolicy, OneHot, RBFGrid
from ccrl.policies.linear import LinearGaussianPolicy
from ccrl.policies.mlp import MLPPolicy
from ccrl.policies.normaliser import RunningNorm
from ccrl.policies.protocol import Policy
from ccrl.policies.q import QuantilePolicy, TwinQ
from ccrl.policies.recurrent import RecurrentPolicy

__all__ = [
    "CATEGORICAL",
    "CNN",
    "GAUSSIAN",
    "MLP",
    "SQUASHED",
    "ActionSpec",
    "ActorQ",
    "DeterministicActorQ",
    "Distribution",
    "FactoredCategorical",
    "GibbsPolicy",
    "LinearGaussianPolicy",
    "MLPPolicy",
    "OneHot",
    "Policy",
    "QuantilePolicy",
    "RBFGrid",
    "RandomActor",
    "RecurrentPolicy",
    "RunningNorm",
    "TwinQ",
    "build_actor_critic",
]
