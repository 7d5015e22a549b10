"""Learners: what an iteration is. An agent has one; it knows a clock and ``iterate``, not rollouts."""

from ccrl.learn.base import COMPILE_FROM, Learner
from ccrl.learn.cycle import Cycle, Polyak
from ccrl.learn.replay import DatasetLearner, ReplayLearner
from ccrl.learn.rollout import RolloutLearner
from ccrl.learn.state import StateRegistry

__all__ = [
    "COMPILE_FROM",
    "Cycle",
    "DatasetLearner",
    "Learner",
    "Polyak",
    "ReplayLearner",
    "RolloutLearner",
    "StateRegistry",
]
