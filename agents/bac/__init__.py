"""Bayesian actor-critic: the agent (``agent``), and rollouts as the chain of points its critic reads (``chain``)."""

from agents.bac.agent import BAC, BACConfig, BACEstimator, StateScale

__all__ = ["BAC", "BACConfig", "BACEstimator", "StateScale"]
