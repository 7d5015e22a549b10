"""For tests: a scripted environment, and the contracts that environments and agents keep.

A new environment is tested by a subclass with one method::

    class TestMyEnv(EnvContract):
        def make_env(self, num_envs, autoreset_mode):
            return MyEnv(num_envs, autoreset_mode=autoreset_mode)

and a new agent by :class:`AgentContract`, which sets a class, a small config and an id.
"""

from ccrl.testing.agent_contract import AgentContract, SpacesEnv, prepare_rollout
from ccrl.testing.clock import ClockEnv, Episode
from ccrl.testing.contract import EnvContract, sample_actions

__all__ = ["AgentContract", "ClockEnv", "EnvContract", "Episode", "SpacesEnv", "prepare_rollout", "sample_actions"]
