"""Environments around environments: a :class:`ccrl.batched_env.BatchedEnv` in, another one out."""

from ccrl.wrappers.reward_wrapper import RewardWrapper
from ccrl.wrappers.set_reward import SetFunction, SetReward, SetState
from ccrl.wrappers.stacked import StackedEnv

__all__ = ["RewardWrapper", "SetFunction", "SetReward", "SetState", "StackedEnv"]
