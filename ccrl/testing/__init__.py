"""For tests: a scripted environment, and the contracts that environments and agents keep.

A new environment is tested by a subclass::

    class TestMyEnv(EnvContract):
        env = MyEnv
        options = {"size": 3}

and a new agent by :class:`AgentContract`, which sets a class, a small config and an id.
"""

from ccrl.testing.agent_contract import AgentContract, SpacesEnv, prepare_rollout
from ccrl.testing.clock import ClockEnv, Episode
from ccrl.testing.contract import EnvContract
from ccrl.testing.env_checks import sample_actions

__all__ = ["AgentContract", "ClockEnv", "EnvContract", "Episode", "SpacesEnv", "prepare_rollout", "sample_actions"]
