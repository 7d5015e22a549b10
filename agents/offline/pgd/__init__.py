"""Policy-guided diffusion: the agent, its trajectories, its guidance, and rivals that make rows in other ways."""

from agents.offline.pgd.agent import PGD, PGDConfig

__all__ = ["PGD", "PGDConfig"]
