"""Environments around environments: a :class:`ccrl.batched_env.BatchedEnv` in, another one out."""

from ccrl.wrappers.stacked import StackedEnv

__all__ = ["StackedEnv"]
