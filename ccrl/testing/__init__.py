"""For tests: a scripted environment, and the contract that every :class:`ccrl.batched_env.BatchedEnv` keeps.

A new environment is tested by a subclass with one method::

    class TestMyEnv(EnvContract):
        def make_env(self, num_envs, autoreset_mode):
            return MyEnv(num_envs, autoreset_mode=autoreset_mode)
"""

from ccrl.testing.clock import ClockEnv, Episode
from ccrl.testing.contract import EnvContract, sample_actions

__all__ = ["ClockEnv", "EnvContract", "Episode", "sample_actions"]
