"""Action distributions and policy networks."""

from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, SQUASHED, Distribution
from ccrl.policies.gibbs import GibbsPolicy, OneHot, RBFGrid
from ccrl.policies.linear import LinearGaussianPolicy
from ccrl.policies.mlp import MLPPolicy
from ccrl.policies.normaliser import RunningNorm

__all__ = [
    "CATEGORICAL",
    "GAUSSIAN",
    "SQUASHED",
    "Distribution",
    "GibbsPolicy",
    "LinearGaussianPolicy",
    "MLPPolicy",
    "OneHot",
    "RBFGrid",
    "RunningNorm",
]
