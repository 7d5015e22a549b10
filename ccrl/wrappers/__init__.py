"""Environments around environments: a :class:`ccrl.batched_env.BatchedEnv` in, another one out. ``StockWrapper`` is for
one environment of Gymnasium."""

from ccrl.wrappers.reward_wrapper import RewardWrapper
from ccrl.wrappers.set_reward import SetFunction, SetReward, SetState
from ccrl.wrappers.stacked import StackedEnv
from ccrl.wrappers.stock import StockEnv, relabel_stock
from ccrl.wrappers.stock_gymnasium import StockWrapper

__all__ = [
    "RewardWrapper", "SetFunction", "SetReward", "SetState", "StackedEnv", "StockEnv", "StockWrapper", "relabel_stock",
]  # fmt: skip
