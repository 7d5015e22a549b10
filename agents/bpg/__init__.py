"""Bayesian policy gradient: the agent (``agent``), and the posterior of the gradient over paths (``quadrature``)."""

from agents.bpg.agent import BPG, BPGConfig, BPGEstimator, EpisodicConfig, make_fisher

__all__ = ["BPG", "BPGConfig", "BPGEstimator", "EpisodicConfig", "make_fisher"]
