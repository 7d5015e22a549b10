"""Mirror Descent Policy Optimization (Tomar, Shani, Efroni, Ghavamzadeh 2020, arXiv 2005.09814): on and off policy."""

from agents.mdpo.off_policy import OffPolicyMDPO, OffPolicyMDPOConfig
from agents.mdpo.on_policy import MDPO, MDPOConfig, MDPOEstimator, step_size

__all__ = ["MDPO", "MDPOConfig", "MDPOEstimator", "OffPolicyMDPO", "OffPolicyMDPOConfig", "step_size"]
