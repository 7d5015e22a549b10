"""Action distributions and policy networks."""

from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, SQUASHED, Distribution
from ccrl.policies.mlp import MLPPolicy
from ccrl.policies.normaliser import RunningNorm

__all__ = ["CATEGORICAL", "GAUSSIAN", "SQUASHED", "Distribution", "MLPPolicy", "RunningNorm"]
